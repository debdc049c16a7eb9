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

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from fpcompile.errors import ProgramFileError
from fpcompile.executor import cost_cache
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.paths import as_path
from fpcompile.executor.program_file import write_folder
from fpcompile.executor.saving_parts import (
    CONSTANTS,
    FUNCTIONS,
    compare,
    device_of,
    generated_keys,
    identity_of,
    read_functions,
    refuse_graphs,
    same_tensor,
    spec_of,
    tensors_of,
    write_compiled_functions,
    write_functions,
)
from fpcompile.ir import PartKind
from fpcompile.models.attention import AttentionCall, MaskKind, MaskSpec, own_attention
from fpcompile.models.capture import Bindings, marked
from fpcompile.models.leaves import remake
from fpcompile.passes import plan_text
from fpcompile.passes.graph_text import read_value, write_value
from fpcompile.passes.lower import renamed_functions
from fpcompile.passes.partition import Partitioned
from fpcompile.passes.prepack import PACKED, can_prepack

PLAN, CALLS, COSTS = "plan.jsonl", "calls.json", "costs.json"


def save(program: PackedProgram, path: str | os.PathLike[str]) -> None:
    """Write ``program`` to a folder; see :meth:`Program.save`."""
    refuse_graphs(program.functions)
    model = program.bindings.model
    used = {p.function for s in program.plan.segments for p in s.parts if p.kind is PartKind.GRAPH}
    functions = {key: f for key, f in program.functions.items() if key in used}
    own = tensors_of(model)
    constants = {
        n: t for n, t in program.bindings.weights.values() if n not in own or not same_tensor(own[n], t)
    }
    files = {
        PLAN: plan_text.render(program.plan).encode(),
        FUNCTIONS: json.dumps(write_functions(functions)).encode(),
        **write_compiled_functions(functions),
        CALLS: json.dumps(_calls(program.bindings)).encode(),
        CONSTANTS: safetensors.torch.save({n: t.cpu().contiguous().clone() for n, t in constants.items()}),
    }
    if program.measured is not None:
        files[COSTS] = cost_cache.write_text(program, program.measured, program.bits).encode()
    head = {
        **identity(model),
        "fingerprint": program.fingerprint,
        "max_blocking_ms": program.max_blocking_ms,
        "strict_budget": program.strict_budget,
    }
    write_folder(as_path(path), head, files)


def load(
    path: str,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    model: PreTrainedModel,
    trust_code: bool,
) -> tuple[PackedProgram, PackedProgram]:
    """The program in a folder that was read, for ``model``, and the same with generated code only."""
    own = marked(model)
    for name, value in identity(own).items():
        compare(name, manifest.get(name), value, path)
    plan = plan_text.parse(files[PLAN].decode())
    functions, compiled = read_functions(files, device_of(model), trust_code)
    constants = safetensors.torch.load(files[CONSTANTS])
    bindings = _bindings(json.loads(files[CALLS]), constants, own)
    for path_ in {p for s in plan.segments for part in s.parts for p in part.params if p.endswith(PACKED)}:
        if not can_prepack(bindings.weights[path_.removesuffix(PACKED)][1]):
            raise ProgramFileError(
                "the program was saved with packed weights, which this processor does not have",
                expected="a CPU with a bf16 matrix kernel",
                got=path_,
                remedy="compile the model here, with weights='shared'",
            )
    budget = {name: manifest[name] for name in ("max_blocking_ms", "strict_budget")}
    program = plain = PackedProgram(Partitioned(plan, {**functions, **compiled}), bindings, model, **budget)
    if compiled:
        generated = Partitioned(renamed_functions(plan, generated_keys(compiled)), functions)
        plain = PackedProgram(generated, bindings, model, **budget)
    compare("fingerprint", manifest.get("fingerprint"), program.fingerprint, path)
    if COSTS in files:
        text = files[COSTS].decode(errors="replace")
        samples = cost_cache.read_text(program, text, path)
        if samples is not None:
            program.use_costs(samples, cost_cache.bits_of_text(program, text))
    return program, plain


def identity(model: nn.Module) -> dict[str, Any]:
    """What must be equal for a saved program to fit a model (its marked shadow), as JSON data."""
    configs = (getattr(module, "config", None) for module in model.modules())
    own = {str(getattr(c, "_fpcompile_attention", None) or "eager") for c in configs if c is not None}
    return {"route": "packed", "attention implementation": sorted(own), **identity_of(model)}


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
        "weights": {path: spec_of(weight) for path, weight in bindings.weights.values()},
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
    own = {**tensors_of(model), **{name: tensor.to(device) for name, tensor in constants.items()}}
    compare("set of buffers", data["weights"], {n: spec_of(own[n]) for n in data["weights"] if n in own}, "")
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
