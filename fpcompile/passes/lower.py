"""Lower: the distinct functions of a plan compiled by TorchInductor; attention and leaves stay outside.
CUDA graphs are :mod:`fpcompile.passes.lower_graphs`.

Identical layers share one function (:mod:`fpcompile.passes.codegen`) and weights are its inputs, so each is
compiled once, whatever the depth, when the program is made: a run never waits for a compiler.

Word: a function is *refused* when it stays eager; the plan's notes give the reason.

Invariants: the key of a compiled function says that it is compiled and for which instructions. Keys are part
of the program's fingerprint, as bits are a function of them.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fpcompile.errors import UnknownNameError, UsageError
from fpcompile.ir import Plan, Segment
from fpcompile.passes.codegen import Function
from fpcompile.passes.lower_function import RefusedError, compile_function
from fpcompile.passes.lower_graphs import check_device, lower_to_graphs

BACKENDS = ("eager", "inductor", "cudagraphs")


def lower(
    plan: Plan, functions: Mapping[str, Function], backend: str, *, verify: bool = True
) -> tuple[Plan, dict[str, Function]]:
    """``plan`` and ``functions``, those compiled that ``backend`` can compile; "eager" changes nothing.

    ``verify`` compares each compiled function with what was generated, on random numbers.
    Raises :class:`UnknownNameError`, and :class:`UsageError` when the machine lacks a compiler.
    """
    if backend not in BACKENDS:
        raise UnknownNameError("backend", backend, known=BACKENDS)
    if backend == "eager":
        return plan, dict(functions)
    read = [n.meta["val"] for f in functions.values() for n in f.inputs]
    devices = {value.device for value in read if isinstance(value, Tensor)}
    if torch.device("meta") in devices:
        note = f"backend {backend}: a model on the meta device is not compiled"
        return dataclasses.replace(plan, notes=(*plan.notes, note)), dict(functions)
    if backend == "cudagraphs":
        check_device(devices)
        renamed, lowered, refused = lower_to_graphs(plan, functions)
        return _told(plan, backend, len(functions), renamed, refused), lowered
    target = target_of(devices)
    lowered, renamed, refused = {}, {}, {}
    for key, function in functions.items():
        try:
            compiled = compile_function(function, verify=verify)
        except RefusedError as error:
            lowered[key], refused[key] = function, str(error)
        else:
            renamed[key] = compiled_key(target, key)
            lowered[renamed[key]] = compiled
    return _told(plan, f"{backend} ({target})", len(functions), renamed, refused), lowered


def _told(
    plan: Plan, backend: str, count: int, renamed: Mapping[str, str], refused: Mapping[str, str]
) -> Plan:
    """The plan with the functions' new names, and notes on those that keep theirs."""
    summary = f"backend {backend}: {len(renamed)} of {count} functions are compiled"
    notes = (*plan.notes, summary, *_reasons(plan, backend.split(maxsplit=1)[0], refused))
    return dataclasses.replace(renamed_functions(plan, renamed), notes=notes)


def compiled_key(target: str, key: str) -> str:
    """The key of the compiled form of a generated function."""
    return f"inductor {target} {key}"


def target_of(devices: Iterable[torch.device]) -> str:
    """What code for ``devices`` is compiled for. Raises :class:`UsageError` when the compiler is missing."""
    return "+".join(sorted({_target(device) for device in devices}))


def renamed_functions(plan: Plan, renamed: Mapping[str, str]) -> Plan:
    """``plan`` with other names for some of its functions."""
    segments: tuple[Segment, ...] = tuple(
        dataclasses.replace(
            segment,
            parts=tuple(
                dataclasses.replace(part, function=renamed.get(part.function, part.function))
                for part in segment.parts
            ),
        )
        for segment in plan.segments
    )
    return dataclasses.replace(plan, segments=segments)


def _target(device: torch.device) -> str:
    """What compiled code is made for: on a CPU the vector instructions, elsewhere the kind of device.

    Raises :class:`UsageError` when the compiler for it is missing.
    """
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import pick_vec_isa
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UsageError(
                "backend 'inductor' needs a C++ compiler on a CPU",
                expected="g++ or clang++ on the PATH, or the one that the environment variable CXX names",
                got="none that works",
                remedy="install one, for instance with `apt-get install g++`, or use backend='eager'",
            ) from error
        return str(pick_vec_isa()) or "scalar"
    from torch.utils._triton import has_triton

    if not has_triton():
        raise UsageError(
            f"backend 'inductor' needs Triton on {device.type}",
            expected="a package triton that supports the device",
            got="none",
            remedy="install triton, or use backend='eager'",
        )
    return device.type


def _reasons(plan: Plan, backend: str, refused: Mapping[str, str]) -> Iterable[str]:
    """One note for each reason, with the modules whose functions it concerns."""
    found: dict[str, list[str]] = defaultdict(list)
    for segment in plan.segments:
        for part in segment.parts:
            if part.function in refused:
                found[refused[part.function]].append(part.name)
    for reason, names in found.items():
        more = f" and of {len(names) - 1} more parts" if len(names) > 1 else ""
        yield f"backend {backend}: the code of {names[0]}{more} stays eager: {reason}"
