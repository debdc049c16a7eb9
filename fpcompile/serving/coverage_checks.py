"""What a row of the coverage table is made from: one architecture, compiled and compared with itself.

Words: a *check* compares the program with the unmodified model on the same arguments and records the largest
difference relative to the largest logit: 0 means bit-equal. ``None`` means that the unmodified model itself
refuses the arguments. The program is preempted at every cut and resumed from its checkpoint in one of them.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fpcompile
from fpcompile.executor.generic import GenericProgram
from fpcompile.models.generic_tree import flatten
from fpcompile.models.zoo import CAUSAL_ARCHS, arch_facts, sample_ids, tiny_any, tiny_model

LENGTHS = (1, 2, 3, 15, 16, 17, 40, 200)
ROUNDING = 2e-6
_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")


@dataclasses.dataclass(slots=True)
class Row:
    """One row of the table; plain data."""

    name: str
    model: str = ""
    family: str = "causal"
    status: str = "crashed"
    route: str = ""
    why: str = ""
    segments: int = 0
    states: tuple[str, ...] = ()
    opaque: tuple[str, ...] = ()
    seconds: float = 0.0
    variants: int = 0
    errors: dict[str, float | None] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def worst(self) -> float:
        """Largest relative difference of any check."""
        return max((e for e in self.errors.values() if e is not None), default=0.0)

    def settle(self) -> None:
        """Fill ``status`` from the checks: ``bits``, ``close``, or ``differs``."""
        if self.failures:
            self.status = "failed"
        else:
            self.status = "bits" if self.worst == 0 else "close" if self.worst <= ROUNDING else "differs"


class _Checker:
    def __init__(self, row: Row, model: nn.Module, program: Any) -> None:
        self.row, self.model, self.program = row, model, program

    def own(self, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(**kwargs)

    def check(
        self,
        name: str,
        pick: Callable[[Any], list[Tensor]],
        run: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Compare what ``pick`` takes from both results; both results, or (None, None)."""
        try:
            own = self.own(**copy.deepcopy(kwargs))
        except Exception:
            self.row.errors[name] = None
            return None, None
        try:
            got = run() if run else self.program(**kwargs)
            self.row.errors[name] = difference(pick(own), pick(got))
        except Exception as error:
            self.row.failures[name] = f"{type(error).__name__}: {error}"[:400]
            return None, None
        return own, got


def difference(own: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference of any pair relative to its largest element; infinite for other shapes or NaNs."""
    if len(own) != len(got):
        return math.inf
    worst = 0.0
    for a, b in zip(own, got, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.isnan(), b.isnan()):
            return math.inf
        x, y = a[~a.isnan()].double(), b[~b.isnan()].double()
        if torch.equal(x, y):
            continue
        error = float((x - y).abs().max() / x.abs().max().clamp_min(1e-30))
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _logits(out: Any) -> list[Tensor]:
    return [out.logits]


def preempted(program: Any, **kwargs: Any) -> Any:
    """Run with a pause at every cut; at each one the run goes on from its checkpoint."""
    run = program.start(**kwargs)
    owner = run.program
    while not run.done:
        run.step()
        if not run.done:
            run.suspend()
            run = owner.resume(run.checkpoint())
    return run.result()


def check_causal(arch: str) -> Row:
    """The row of a causal LM of the zoo."""
    facts = arch_facts(arch)
    row = Row(arch, states=facts.states, note=facts.note)
    torch.manual_seed(0)
    model: Any = tiny_model(arch)
    row.model = type(model).__name__
    if not facts.left_as_found:  # its first forward changes the model itself
        with torch.no_grad():
            model(input_ids=sample_ids(8))
    program = _compile(row, model)
    if program is None:
        return row
    c = _Checker(row, model, program)
    for length in LENGTHS:
        c.check(f"length {length}", _logits, input_ids=sample_ids(length, seed=length))
    c.check("batch 4", _logits, input_ids=sample_ids(40, batch=4))
    _padded(c)
    ids = sample_ids(40, seed=7)
    c.check("preempted at every cut", _logits, lambda: preempted(program, input_ids=ids), input_ids=ids)
    _continued(c, model)
    _reduced(row, arch)
    _finish(row, program)
    return row


def _compile(row: Row, model: nn.Module, **options: Any) -> Any:
    begun = time.perf_counter()
    try:
        program = fpcompile.segment(model, **options)
    except fpcompile.errors.UnsupportedModelError as refused:
        row.status, row.why = "refused", f"{refused.reason} ({refused.where})"
        return None
    row.seconds = time.perf_counter() - begun
    row.route, row.segments = str(program.route), len(program.segments)
    return program


def _finish(row: Row, program: Any) -> None:
    row.why = next((n.partition(": ")[2] for n in program.plan.notes if n.startswith("the packed")), "")
    if isinstance(program, GenericProgram):
        row.variants = len(program.variants)
        row.opaque = tuple(sorted({o for v in program.variants for o in v.captured.opaque}))
        if any("constant" in n for v in program.variants for n in v.captured.notes):
            row.note = "; ".join(filter(None, (row.note, "some lengths compile a variant of their own")))
    row.settle()


def _padded(c: _Checker) -> None:
    """Two sequences of different lengths, padded on either side; compared where there are tokens.

    The packed route counts positions from the first token that is not hidden, so the model is given those
    positions too, as its own ``generate`` gives them; the generic route takes the model's default.
    """
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[0, 33:] = 0
    ids = sample_ids(50, batch=2, seed=3) * mask
    counted = "position_ids" in inspect.signature(c.model.forward).parameters
    for name, i, m in (("padded right", ids, mask), ("padded left", ids.flip(1), mask.flip(1))):
        real = m.bool()
        arguments: dict[str, Any] = {"input_ids": i, "attention_mask": m}

        def pick(out: Any, real: Tensor = real) -> list[Tensor]:
            return [out.logits[real]]

        if c.row.route == "packed" and name == "padded left" and counted:
            given = {**arguments, "position_ids": (m.cumsum(1) - 1).clamp_min(0)}
            c.check(name, pick, functools.partial(c.program, **arguments), **given)
        else:
            c.check(name, pick, **arguments)


def _continued(c: _Checker, model: Any) -> None:
    """A prefill, its continuation by the program and by the model, and generation from its cache."""
    ids = sample_ids(60, seed=5)
    own, got = c.check("prefill for a cache", _logits, input_ids=ids[:, :41], use_cache=True)
    key = next((k for k in _CACHES if getattr(own, k, None) is not None), None)
    if key is None or got is None:
        return
    mine, theirs = getattr(got, key), getattr(own, key)
    if type(mine) is not type(theirs):
        c.row.failures["cache class"] = f"{type(mine).__name__} instead of {type(theirs).__name__}"
        return
    for name, part in (("one more token", ids[:, 41:42]), ("19 more tokens", ids[:, 41:])):
        before = flatten(mine).tensors
        kept = [t.clone() for t in before]
        try:
            expected = c.own(input_ids=part, use_cache=True, **{key: copy.deepcopy(theirs)})
        except Exception:
            c.row.errors[name] = None
            continue
        try:
            result = c.program(input_ids=part, use_cache=True, **{key: mine})
            c.row.errors[name] = difference([expected.logits], [result.logits])
            goes_on = c.own(input_ids=part, use_cache=True, **{key: copy.deepcopy(mine)})
            c.row.errors[f"{name}, model on our cache"] = difference([expected.logits], [goes_on.logits])
        except Exception as error:
            c.row.failures[name] = f"{type(error).__name__}: {error}"[:400]
        if difference(kept, list(flatten(mine).tensors)) > 0:
            c.row.failures[name] = "the caller's cache was changed"
    _generated(c, model, ids[:, :41], key, mine, theirs)


def _generated(c: _Checker, model: Any, ids: Tensor, key: str, mine: Any, theirs: Any) -> None:
    """``generate`` goes on from the program's cache to the tokens that it finds from the model's own."""
    if key != "past_key_values":
        return
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "use_cache": True}
    first = c.own(input_ids=ids).logits[:, -1:].argmax(-1)
    given = torch.cat([ids, first], dim=1)
    try:
        with torch.no_grad():
            expected = model.generate(given, past_key_values=copy.deepcopy(theirs), **options)
    except Exception:
        c.row.errors["generate"] = None
        return
    try:
        with torch.no_grad():
            got = model.generate(given, past_key_values=copy.deepcopy(mine), **options)
        c.row.errors["generate"] = 0.0 if torch.equal(expected, got) else math.inf
    except Exception as error:
        c.row.failures["generate"] = f"{type(error).__name__}: {error}"[:400]


def _reduced(row: Row, arch: str) -> None:
    """bf16: bit-equal, or an error against fp32 of at most 1.1 times the model's own."""
    try:
        model = tiny_model(arch, dtype=torch.bfloat16)
        ids = sample_ids(40, seed=9)
        with torch.no_grad():
            own = model(input_ids=ids).logits
    except Exception:
        row.errors["bf16"] = None
        return
    try:
        got = fpcompile.segment(model)(input_ids=ids).logits
    except Exception as error:
        row.failures["bf16"] = f"{type(error).__name__}: {error}"[:400]
        return
    if torch.equal(own, got):
        row.errors["bf16"] = 0.0
        return
    with torch.no_grad():
        exact = tiny_model(arch)(input_ids=ids).logits
    ratio = difference([exact], [got.float()]) / max(difference([exact], [own.float()]), 1e-30)
    row.errors["bf16"] = 0.0 if ratio <= 1.1 else float(ratio)
    row.note = "; ".join(filter(None, (row.note, f"bf16 error {ratio:.2f} of the model's own")))


def check_any(name: str) -> Row:
    """The row of a class beyond causal LMs."""
    row = Row(name, model=name, family="other")
    torch.manual_seed(0)
    case = tiny_any(name)
    program = _compile(row, case.model, example_inputs=case.small)
    if program is None:
        return row
    c = _Checker(row, case.model, program)

    def tensors(out: Any) -> list[Tensor]:
        return [t for t in flatten(out).tensors if t.is_floating_point()]

    small: dict[str, Any] = dict(case.small)
    large: dict[str, Any] = dict(case.large)
    c.check("small", tensors, **small)
    c.check("large", tensors, **large)
    c.check("preempted at every cut", tensors, lambda: preempted(program, **large), **large)
    _finish(row, program)
    return row


def row_of(name: str) -> Row:
    """The row of an architecture of the causal zoo, or of a class beyond it; a failure is a row too."""
    try:
        return check_causal(name) if name in CAUSAL_ARCHS else check_any(name)
    except Exception as error:
        failed = Row(name, family="causal" if name in CAUSAL_ARCHS else "other")
        failed.why = f"{type(error).__name__}: {error}"[:400]
        return failed
