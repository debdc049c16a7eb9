"""Programs on disk: what a compiled program is, without its model, and a program again from both.

Stored are the plan in its text form, the generated functions as records (:mod:`fpcompile.passes.graph_text`),
what attention calls and leaves are made of, tensors that the trace made, and what was measured, which is used
on an equal device. Weights are not: the model brings them. Nothing is traced when a program is read.

Compiled functions are stored twice: as what they were compiled from, and as torch's artefact, which is code
in a pickle (on a GPU the kernels, on a CPU their C++, built again where the compiler's cache lacks it).
Whoever can write the folder could run code through it. It is therefore loaded only for a caller who says that
he trusts the folder; otherwise the functions are compiled again.

A program may be read for a model only that it would have been compiled to from scratch: versions, device,
configuration, structure, dtypes and shapes must be those that it was saved with.

Invariant: the program read has the fingerprint of the one saved, and gives the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from fpcompile.errors import ProgramFileError
from fpcompile.executor import cost_cache
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.program import settings
from fpcompile.executor.program_file import read_folder, write_folder
from fpcompile.ir import PartKind, Plan
from fpcompile.models.attention import AttentionCall, MaskKind, MaskSpec, own_attention
from fpcompile.models.capture import Bindings, attention_implementation, marked
from fpcompile.models.leaves import remake
from fpcompile.passes import plan_text
from fpcompile.passes.codegen import Function, key_of
from fpcompile.passes.compiled import load_artifact, read_compiled, write_compiled
from fpcompile.passes.graph_text import read_function, read_value, write_function, write_value
from fpcompile.passes.lower import compiled_key, renamed_functions, target_of
from fpcompile.passes.lower_function import RefusedError, compile_again, with_compiled
from fpcompile.passes.partition import Partitioned

PLAN, FUNCTIONS, CALLS, CONSTANTS = "plan.jsonl", "functions.json", "calls.json", "constants.safetensors"
COSTS, COMPILED, CODE = "costs.json", "compiled.json", "code-"


def save(program: PackedProgram, path: str | os.PathLike[str]) -> None:
    """Write ``program`` to a folder; see :meth:`Program.save`."""
    if any(function.buckets for function in program.functions.values()):
        raise ProgramFileError(
            "CUDA graphs cannot be saved",
            expected="a program with another backend",
            got="backend='cudagraphs', whose graphs hold the addresses of this process",
            remedy="save the program of backend='eager', or capture the graphs in each process",
        )
    model, (implementation,) = program.bindings.model, {c.implementation for c in program.bindings.attention}
    own = _tensors(model)
    constants = {n: t for n, t in program.bindings.weights.values() if n not in own or not _same(own[n], t)}
    files = {
        PLAN: plan_text.render(program.plan).encode(),
        FUNCTIONS: json.dumps(_functions(program.plan, program.functions)).encode(),
        **_compiled(program.functions),
        CALLS: json.dumps(_calls(program.bindings)).encode(),
        CONSTANTS: safetensors.torch.save({n: t.cpu().contiguous().clone() for n, t in constants.items()}),
    }
    if program.measured is not None:
        files[COSTS] = cost_cache.write_text(program, program.measured).encode()
    head = {
        **_identity(model, implementation),
        "fingerprint": program.fingerprint,
        "max_blocking_ms": program.max_blocking_ms,
        "strict_budget": program.strict_budget,
    }
    write_folder(Path(path), head, files)


def load(
    path: str | os.PathLike[str], model: PreTrainedModel, *, trust_code: bool = False
) -> tuple[PackedProgram, PackedProgram]:
    """The program in a folder, for ``model``, and the same with generated code only.

    Raises :class:`ProgramFileError`.
    """
    manifest, files = read_folder(Path(path), (PLAN, FUNCTIONS, CALLS, CONSTANTS), (COSTS, COMPILED), CODE)
    own = marked(model)
    for name, value in _identity(own, attention_implementation(model)).items():
        _compare(name, manifest.get(name), value, str(path))
    try:
        plan = plan_text.parse(files[PLAN].decode())
        records = json.loads(files[FUNCTIONS])
        functions = {key: read_function(key, record) for key, record in records.items()}
        device = next(model.parameters()).device
        compiled = _read_compiled(files, functions, device, trust_code) if COMPILED in files else {}
        constants = safetensors.torch.load(files[CONSTANTS])
        bindings = _bindings(json.loads(files[CALLS]), constants, own)
        budget = {name: manifest[name] for name in ("max_blocking_ms", "strict_budget")}
        program = PackedProgram(Partitioned(plan, {**functions, **compiled}), bindings, model, **budget)
        plain = program
        if compiled:
            generated = {key: key.split()[-1] for key in compiled}
            plain = PackedProgram(
                Partitioned(renamed_functions(plan, generated), functions), bindings, model, **budget
            )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ProgramFileError):
            raise
        raise ProgramFileError(
            "the saved program is not complete",
            expected="what Program.save writes",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
        ) from error
    _compare("fingerprint", manifest.get("fingerprint"), program.fingerprint, str(path))
    if COSTS in files:
        samples = cost_cache.read_text(program, files[COSTS].decode(errors="replace"), str(path))
        if samples is not None:
            program.use_costs(samples)
    return program, plain


def _identity(model: nn.Module, implementation: str) -> dict[str, Any]:
    """What must be equal for a saved program to fit a model (its marked shadow), as JSON data."""
    return {
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fpcompile": sys.modules["fpcompile"].__version__,  # above this layer: read, not imported
        },
        "device": str(next(model.parameters()).device),
        "attention implementation": implementation,
        "configuration": json.loads(settings(model.config)),
        "modules": {path: _kind(module) for path, module in model.named_modules()},
        "weights": {path: _spec(weight) for path, weight in model.named_parameters(remove_duplicate=False)},
    }


def _kind(module: nn.Module) -> str:
    """A module's class and the hooks that are called with its forward: both are part of what is traced."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    names = [getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks]
    return " + ".join([f"{type(module).__module__}.{type(module).__qualname__}", *names])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a model by every path that they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` was detached from ``a``."""
    return a.shape == b.shape and (a.is_meta or a.detach().is_set_to(b))


def _compare(name: str, saved: Any, own: Any, where: str) -> None:
    """Raise unless ``saved`` and ``own`` are equal; mappings are compared entry by entry."""
    if saved == own:
        return
    old, new = [saved], [own]
    if isinstance(saved, dict) and isinstance(own, dict):
        differing = [k for k in {**saved, **own} if saved.get(k) != own.get(k)]
        old, new = ([f"{k}: {side.get(k)}" for k in differing[:4]] for side in (saved, own))
        if len(differing) > 4:
            old.append(f"and {len(differing) - 4} more")
    raise ProgramFileError(
        f"the program was saved for another {name}",
        expected="; ".join(map(str, old)),
        got="; ".join(map(str, new)),
        where=where,
        remedy="compile the model anew with fpcompile.segment(model), or load the program for the model and "
        "with the versions that it was saved with",
    )


def _functions(plan: Plan, functions: Mapping[str, Function]) -> dict[str, Any]:
    """Records of the functions that a plan calls, compiled ones as what they were compiled from."""
    used = {p.function for s in plan.segments for p in s.parts if p.kind is PartKind.GRAPH}
    return {
        key_of(functions[key].graph, functions[key].shapes): write_function(functions[key])
        for key in functions
        if key in used
    }


def _compiled(functions: Mapping[str, Function]) -> dict[str, bytes]:
    """The files of compiled functions: one of data for all, one of code for each."""
    files: dict[str, bytes] = {}
    table: dict[str, Any] = {}
    for key, function in functions.items():
        if function.compiled is not None:
            data, code = write_compiled(function.compiled)
            name = f"{CODE}{len(table)}.bin"
            table[key] = {"file": name, "data": data}
            files[name] = code
    if table:
        files[COMPILED] = json.dumps(table).encode()
    return files


def _read_compiled(
    files: Mapping[str, bytes], functions: Mapping[str, Function], device: torch.device, trust_code: bool
) -> dict[str, Function]:
    """Read back :func:`_compiled`: the code if it is trusted, else compiled again."""
    found: dict[str, Function] = {}
    target = target_of((device,))
    for key, row in json.loads(files[COMPILED]).items():
        own = key.split()[-1]
        if key != compiled_key(target, own):
            raise ProgramFileError(
                "the program was compiled for another processor",
                expected=compiled_key(target, own),
                got=key,
                remedy="compile the model on this machine with fpcompile.segment(model, backend='inductor')",
            )
        compiled = read_compiled(row["data"])
        if trust_code:
            compiled = dataclasses.replace(compiled, artifact=load_artifact(files[row["file"]]))
            found[key] = with_compiled(functions[own], compiled)
            continue
        try:
            found[key] = compile_again(functions[own], compiled.arguments)
        except RefusedError as error:
            raise ProgramFileError(
                "a function of the program cannot be compiled again", got=str(error), where=key
            ) from error
    return found


def _calls(bindings: Bindings) -> dict[str, Any]:
    """Attention calls, leaves and weights as JSON data."""
    paths = {id(module): path for path, module in bindings.model.named_modules()}
    kind = bindings.output_type
    leaves = []
    for leaf in bindings.leaves:
        if leaf.recipe is None or id(leaf.recipe.module) not in paths:
            raise ProgramFileError("a leaf of the program cannot be saved", got=leaf.name)
        leaves.append(
            {
                "kind": leaf.kind,
                "module": paths[id(leaf.recipe.module)],
                "arguments": write_value(leaf.recipe.arguments),
            }
        )
    return {
        "output_type": [kind.__module__, kind.__qualname__],
        "weights": {path: _spec(weight) for path, weight in bindings.weights.values()},
        "leaves": leaves,
        "attention": [
            {
                "module": paths[id(call.module)],
                "implementation": call.implementation,
                "layer": call.layer,
                "mask": [call.mask.kind, call.mask.span],
                "kwargs": write_value(call.kwargs),
                "heads": call.heads,
                "kv_heads": call.kv_heads,
                "dims": list(call.dims),
                "writes": call.writes,
            }
            for call in bindings.attention
        ],
    }


def _bindings(data: Mapping[str, Any], constants: Mapping[str, Tensor], model: Any) -> Bindings:
    """Read back :func:`_calls` for a marked shadow of the model."""
    device = next(model.parameters()).device
    own = {**_tensors(model), **{name: tensor.to(device) for name, tensor in constants.items()}}
    _compare("set of buffers", data["weights"], {n: _spec(own[n]) for n in data["weights"] if n in own}, "")
    return Bindings(
        weights={path: (path, own[path]) for path in data["weights"]},
        attention=tuple(_attention(data["attention"], model)),
        leaves=tuple(
            remake(leaf["kind"], model.get_submodule(leaf["module"]), read_value(leaf["arguments"], {}))
            for leaf in data["leaves"]
        ),
        output_type=_output_type(*data["output_type"]),
        model=model,
    )


def _attention(rows: list[dict[str, Any]], model: nn.Module) -> Iterator[AttentionCall]:
    for row in rows:
        module = model.get_submodule(row["module"])
        kind, span = row["mask"]
        yield AttentionCall(
            module,
            own_attention(module, row["implementation"]),
            row["implementation"],
            row["layer"],
            MaskSpec(MaskKind(kind), span),
            read_value(row["kwargs"], {}),
            row["heads"],
            row["kv_heads"],
            (row["dims"][0], row["dims"][1]),
            writes=row["writes"],
        )


def _output_type(module: str, name: str) -> type[Any]:
    """A class of model outputs; nothing is imported for it: the model's own modules are."""
    found = getattr(sys.modules.get(module), name, None)
    if not isinstance(found, type) or not issubclass(found, ModelOutput):
        raise ProgramFileError(
            "the saved program returns an unknown type", expected="a ModelOutput", got=f"{module}.{name}"
        )
    return found
