"""Programs of the generic route on disk: every variant, and the conditions under which it holds.

A variant is stored as its plan, its functions (:mod:`fpcompile.executor.saving`), the spec of the call that
it was traced for and of what it returns (:mod:`fpcompile.models.tree_text`), its guards and its decisions,
which are small graphs, and the signatures of its opaque leaves. Nothing is traced when a program is read;
it compiles a variant, as any program of the route, when a call of a new kind comes.

Invariant: each variant read has the fingerprint of the one saved, and gives the same bits. Formulas of sizes
in its plan have the same values; sympy may write some in another form.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import safetensors.torch
import sympy
from torch import Tensor, fx, nn

from fpcompile.errors import ProgramFileError
from fpcompile.executor.generic import GenericProgram, Variant
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
from fpcompile.ir import Granularity
from fpcompile.models.generic import GenericBindings, Guards
from fpcompile.models.generic_decisions import Decision
from fpcompile.models.leaves import Leaf, remake
from fpcompile.models.opaque import Affine, Signature, opaque_leaf
from fpcompile.models.shadow import shadow
from fpcompile.models.tree_text import read_spec, write_spec
from fpcompile.passes import plan_text
from fpcompile.passes.codegen import Function, key_of
from fpcompile.passes.design import Design, Rates
from fpcompile.passes.expr_text import read_expr, write_expr
from fpcompile.passes.generic_partition import Compiled
from fpcompile.passes.graph_text import read_function, read_value, write_function, write_value
from fpcompile.passes.lower import renamed_functions

VARIANTS = "variants.json"
_MARK = "a transformers configuration"


def save(program: GenericProgram, path: str | os.PathLike[str]) -> None:
    """Write ``program`` to a folder; see :meth:`Program.save`."""
    if program.dynamic_shapes:
        raise ProgramFileError(
            "a program with dynamic_shapes cannot be saved",
            expected="a program whose varying sizes the route chose by itself",
            got=f"promises for {', '.join(map(str, program.dynamic_shapes))}",
            remedy="compile the model in each process, or without dynamic_shapes",
        )
    constants: dict[str, Tensor] = {}
    functions: dict[str, Function] = {}
    variants = []
    for number, variant in enumerate(program.variants):
        variants.append(_write_variant(variant, f"{number}/", constants))
        functions |= variant.compiled.functions
    refuse_graphs(functions)
    head = {
        **identity(program.model),
        "fingerprint": program.fingerprint,
        "max_blocking_ms": program.max_blocking_ms,
        "strict_budget": program.strict_budget,
        "granularity": program.granularity,
        "backend": program.backend,
        "notes": program.notes,
        "design": None if program.design is None else dataclasses.asdict(program.design),
    }
    files = {
        VARIANTS: json.dumps(variants).encode(),
        FUNCTIONS: json.dumps(write_functions(functions)).encode(),
        CONSTANTS: safetensors.torch.save(
            {n: t.detach().cpu().contiguous().clone() for n, t in constants.items()}
        ),
        **write_compiled_functions(functions),
    }
    write_folder(as_path(path), head, files)


def load(
    path: str,
    manifest: Mapping[str, Any],
    files: Mapping[str, bytes],
    model: nn.Module,
    trust_code: bool,
    verify: bool,
) -> tuple[GenericProgram, GenericProgram]:
    """The program in a folder that was read, for ``model``, and the same with generated code only.
    ``verify``: variants that it compiles itself are checked.
    """
    for name, value in identity(model).items():
        compare(name, manifest.get(name), value, path)
    design = manifest["design"]
    functions, compiled = read_functions(files, device_of(model), trust_code)
    rows, constants = json.loads(files[VARIANTS]), safetensors.torch.load(files[CONSTANTS])

    def program(table: Mapping[str, Function], generated: Mapping[str, str]) -> GenericProgram:
        return GenericProgram(
            model,
            None,
            granularity=Granularity(manifest["granularity"]),
            max_blocking_ms=manifest["max_blocking_ms"],
            strict_budget=manifest["strict_budget"],
            notes=tuple(manifest["notes"]),
            backend=manifest["backend"],
            design=None if design is None else Design(**{**design, "rates": Rates(**design["rates"])}),
            saved=lambda owner: [
                _read_variant(owner, row, f"{i}/", constants, table, generated) for i, row in enumerate(rows)
            ],
            verify=verify,
        )

    found = program({**functions, **compiled}, {})
    compare("fingerprint", manifest.get("fingerprint"), found.fingerprint, path)
    return found, program(functions, generated_keys(compiled)) if compiled else found


def identity(model: nn.Module) -> dict[str, Any]:
    """What must be equal for a saved program to fit a model, as JSON data."""
    config = getattr(model, "config", None)
    own = {
        name: str(getattr(config, f"_{name}_implementation_internal", None)) for name in ("attn", "experts")
    }
    return {"route": "generic", "implementations": own, **identity_of(model)}


def _write_variant(variant: Variant, prefix: str, constants: dict[str, Tensor]) -> dict[str, Any]:
    """One variant as JSON data; tensors that are not the model's go into ``constants``."""
    captured, compiled = variant.captured, variant.compiled
    own = tensors_of(captured.model)
    for path, tensor in captured.weights.values():
        if path not in own or not same_tensor(own[path], tensor):
            constants[prefix + path] = tensor
    plain = _Plain(captured.model)
    guards = captured.guards
    paths = {id(module): path for path, module in captured.model.named_modules()}
    return {
        "plan": plan_text.render(compiled.plan),
        "outputs": compiled.outputs,
        "lengths": {name: write_expr(s) for name, s in compiled.lengths.items()},
        "picks": [[call, picks] for call, picks in compiled.picks.items()],
        "weights": {name: [path, spec_of(t)] for name, (path, t) in captured.weights.items()},
        "symbols": _symbols(captured, compiled),
        "guards": {
            "spec": write_spec(guards.spec, plain.write),
            "shapes": [[write_expr(s) for s in shape] for shape in guards.shapes],
            "strides": [[write_expr(s) for s in strides] for strides in guards.strides],
            "dtypes": [str(d).removeprefix("torch.") for d in guards.dtypes],
            "conditions": [write_expr(c) for c in guards.conditions],
            "bounds": [[write_expr(e) for e in bound] for bound in guards.bounds],
            "decisions": [
                _write_decision(d, f"{prefix}decision {i} ", constants)
                for i, d in enumerate(guards.decisions)
            ],
            "default_dtype": str(guards.default_dtype).removeprefix("torch."),
        },
        "inputs": captured.inputs,
        "result": write_spec(captured.result, plain.write),
        "counts": [write_expr(c) for c in captured.counts],
        "opaque": captured.opaque,
        "notes": captured.notes,
        "length": None if captured.length is None else write_expr(captured.length),
        "growing": sorted(captured.growing),
        "tables": captured.tables,
        "kept": sorted(captured.kept),
        "memoised": sorted(captured.memoised),
        "distrusted": sorted(captured.distrusted),
        "leaves": [_write_leaf(leaf, paths, plain) for leaf in captured.leaves],
    }


def _read_variant(
    owner: GenericProgram,
    row: Mapping[str, Any],
    prefix: str,
    constants: Mapping[str, Tensor],
    functions: Mapping[str, Function],
    generated: Mapping[str, str],
) -> Variant:
    """Read back :func:`_write_variant`."""
    traced = shadow(owner.model)
    made = {
        name: sympy.Symbol(name, integer=True, **dict.fromkeys(signs, True))
        for name, signs in row["symbols"].items()
    }

    def expr(data: Any) -> Any:
        return read_expr(data, made.__getitem__)

    fixed = {n.removeprefix(prefix): t.to(owner.device) for n, t in constants.items() if n.startswith(prefix)}
    own = {**tensors_of(traced), **fixed}
    paths = {path: spec_of(own[path]) for path, _ in row["weights"].values() if path in own}
    compare("set of buffers", dict(row["weights"].values()), paths, "")
    plain = _Plain(owner.model)
    modules = {kind.__module__ for module in owner.model.modules() for kind in type(module).__mro__}
    modules -= {"builtins"} | {m for m in modules if m.split(".")[0] == "torch"}
    guards = row["guards"]
    captured = GenericBindings(
        weights={name: (path, own[path]) for name, (path, _) in row["weights"].items()},
        leaves=tuple(_read_leaf(leaf, traced, expr, plain, modules) for leaf in row["leaves"]),
        model=traced,
        guards=Guards(
            read_spec(guards["spec"], plain.read, modules),
            tuple(tuple(map(expr, shape)) for shape in guards["shapes"]),
            tuple(tuple(map(expr, strides)) for strides in guards["strides"]),
            tuple(read_value({"dtype": name}, {}) for name in guards["dtypes"]),
            tuple(map(expr, guards["conditions"])),
            tuple((expr(s), expr(low), expr(high)) for s, low, high in guards["bounds"]),
            tuple(_read_decision(d, f"decision {i} ", fixed) for i, d in enumerate(guards["decisions"])),
            read_value({"dtype": guards["default_dtype"]}, {}),
        ),
        inputs=tuple(row["inputs"]),
        result=read_spec(row["result"], plain.read, modules),
        counts=tuple(map(expr, row["counts"])),
        opaque=tuple(row["opaque"]),
        notes=tuple(row["notes"]),
        length=None if row["length"] is None else expr(row["length"]),
        growing=frozenset(row["growing"]),
        tables=tuple((int(i), str(name), int(rows)) for i, name, rows in row["tables"]),
        kept=frozenset(row["kept"]),
        memoised=frozenset(row.get("memoised", ())),
        distrusted=frozenset(row["distrusted"]),
    )
    compiled = Compiled(
        renamed_functions(plan_text.parse(row["plan"]), generated),
        dict(functions),
        tuple(row["outputs"]),
        {name: expr(s) for name, s in row["lengths"].items()},
        {int(call): tuple(picks) for call, picks in row["picks"]},
    )
    return Variant(owner, captured, compiled)


def _symbols(captured: GenericBindings, compiled: Compiled) -> dict[str, list[str]]:
    """Every symbol of a variant, with what its sign is known to be."""
    guards = captured.guards
    found: set[sympy.Symbol] = set(compiled.lengths.values())
    for group in (*guards.shapes, *guards.strides, guards.conditions, captured.counts, *guards.bounds):
        found |= {s for e in group for s in getattr(e, "free_symbols", ())}
    for leaf in captured.leaves:
        if leaf.kind != "experts" and leaf.recipe is not None:
            signature = leaf.recipe.arguments["signature"]
            found |= {s for sizes in signature.sizes for e in sizes for s in getattr(e, "free_symbols", ())}
            found |= {s for shape in signature.shapes for a in shape for s in a.slopes}
    return {
        s.name: [sign for sign in ("positive", "nonnegative") if s.assumptions0.get(sign)]
        for s in sorted(found, key=str)
    }


class _Plain:
    """Plain values of specs; a configuration is written as the place of the model's own."""

    def __init__(self, model: nn.Module) -> None:
        self.configs: dict[str, Any] = {}
        for path, module in model.named_modules():
            config = getattr(module, "config", None)
            if config is not None and not any(config is known for known in self.configs.values()):
                self.configs[path] = config

    def write(self, value: Any) -> Any:
        """JSON data of ``value``."""
        if type(value).__name__.endswith("Config"):
            for path, config in self.configs.items():
                if config is value or config.to_dict() == value.to_dict():
                    return {"tuple": [_MARK, path]}
        return write_value(value)

    def read(self, data: Any) -> Any:
        """Read back what :meth:`write` gave."""
        value = read_value(data, {})
        if isinstance(value, tuple) and len(value) == 2 and value[0] == _MARK:
            return self.configs[value[1]]
        return value


def _write_leaf(leaf: Leaf, paths: Mapping[int, str], plain: _Plain) -> dict[str, Any]:
    if leaf.recipe is None or id(leaf.recipe.module) not in paths:
        raise ProgramFileError("a leaf of the program cannot be saved", got=leaf.name)
    row = {"kind": leaf.kind, "module": paths[id(leaf.recipe.module)]}
    signature = leaf.recipe.arguments.get("signature")
    if signature is None:
        return {**row, "arguments": write_value(leaf.recipe.arguments)}
    return {
        **row,
        "signature": {
            "spec": write_spec(signature.spec, plain.write),
            "arguments": signature.arguments,
            "mutated": sorted(signature.mutated),
            "shapes": [
                [[a.constant, [[write_expr(s), n] for s, n in a.slopes.items()]] for a in shape]
                for shape in signature.shapes
            ],
            "sizes": [[write_expr(s) for s in sizes] for sizes in signature.sizes],
            "orders": signature.orders,
            "copies": signature.copies,
            "kept": sorted(signature.kept),
            "constants": signature.constants,
        },
    }


def _read_leaf(
    row: Mapping[str, Any], traced: nn.Module, expr: Callable[[Any], Any], plain: _Plain, modules: set[str]
) -> Leaf:
    module = traced.get_submodule(row["module"])
    if "signature" not in row:
        return remake(row["kind"], module, read_value(row["arguments"], {}))
    kept = row["signature"]
    signature = Signature(
        module,
        read_spec(kept["spec"], plain.read, modules),
        int(kept["arguments"]),
        frozenset(kept["mutated"]),
        tuple(
            tuple(Affine(int(constant), {expr(s): int(n) for s, n in slopes}) for constant, slopes in shape)
            for shape in kept["shapes"]
        ),
        tuple(tuple(map(expr, sizes)) for sizes in kept["sizes"]),
        orders=tuple(map(tuple, kept["orders"])),
        copies=bool(kept["copies"]),
        kept=frozenset(kept["kept"]),
        constants=tuple(kept["constants"]),
    )
    return opaque_leaf(signature, module, row["kind"])


def _write_decision(decision: Decision, prefix: str, constants: dict[str, Tensor]) -> dict[str, Any]:
    """A decision as a record whose last inputs are its constants."""
    module = decision.graph
    if isinstance(module, _Restored):
        for i, tensor in enumerate(module.constants):
            constants[f"{prefix}{i}"] = tensor
        function, fixed = module.function, len(module.constants)
    else:
        assert isinstance(module, fx.GraphModule)
        function, tensors = _as_function(module)
        fixed = len(tensors)
        for i, tensor in enumerate(tensors):
            constants[f"{prefix}{i}"] = tensor
    return {
        "key": key_of(function.graph, ""),
        "function": write_function(function),
        "constants": fixed,
        "inputs": decision.inputs,
        "read": decision.read,
        "value": write_value(decision.value),
    }


def _as_function(module: fx.GraphModule) -> tuple[Function, list[Tensor]]:
    """A decision's graph with its constants as further inputs."""
    graph, tensors = fx.Graph(), list[Tensor]()
    copied: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copied[node] = graph.placeholder(node.name)
    for node in module.graph.nodes:
        if node.op == "get_attr":
            copied[node] = graph.placeholder(node.name)
            tensors.append(getattr(module, str(node.target)))
    for node in module.graph.nodes:
        if node.op == "call_function":
            copied[node] = graph.node_copy(node, copied.__getitem__)
        elif node.op == "output":
            graph.output((copied[node.args[0]],))
    return Function(lambda box: (), (), graph), tensors


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Restored:
    """The graph of a decision that was read back."""

    function: Function
    constants: tuple[Tensor, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        (found,) = self.function.call([*tensors, *self.constants])
        return found


def _read_decision(row: Mapping[str, Any], prefix: str, fixed: Mapping[str, Tensor]) -> Decision:
    function = read_function(row["key"], row["function"])
    constants = tuple(fixed[f"{prefix}{i}"] for i in range(int(row["constants"])))
    return Decision(
        _Restored(function, constants),
        tuple(int(i) for i in row["inputs"]),
        str(row["read"]),
        read_value(row["value"], {}),
    )
