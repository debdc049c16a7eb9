"""One generated function compiled by TorchInductor for symbolic lengths.

It serves every length, those of tiles included: lengths are traced as symbols of two or more (one works as
well: no size of a graph is compared with one). Compiled code assumes a *layout* of each input, the strides
that the tracer saw; a value that comes in another one is copied first. Conditions on lengths that the
compiler adds (*guards*) are kept, and where they do not hold the generated code is called instead: what is
called is a function of shapes alone, and so are the bits.

Linear layers on packed weights are calls of an operator that the compiler does not look into.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from fpcompile.passes.aliases import mutated_arguments, storage_owners
from fpcompile.passes.codegen import Function
from fpcompile.passes.compiled import Argument, Compiled
from fpcompile.passes.prepack import LINEAR, pack

aten = torch.ops.aten
_PRODUCTS: frozenset[Any] = frozenset(
    {aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, LINEAR}
)
_GATHERS: frozenset[Any] = frozenset(
    {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.slice.Tensor}
)
_PROBES = (1, 2, 3, 17, 64, 512, 4096, 32768)
_VERIFIED = (1, 2, 37)

_ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    result: Tensor = LINEAR(x, weight, bias, "none", [], "")
    return result


def _packed_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = torch.library.Library("fpcompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("packed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")  # type: ignore[no-untyped-call]
for _key in ("CPU", "MkldnnCPU"):
    _library.impl("packed_linear", _packed_linear, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("fpcompile::packed_linear", _packed_linear_fake, lib=_library)


class RefusedError(Exception):
    """A function stays eager; carries the reason."""


def compile_function(function: Function, *, verify: bool = True) -> Function:
    """``function`` with compiled code behind its call. Raises :class:`RefusedError`.

    ``verify`` runs both on random numbers and refuses compiled code whose results differ beyond rounding.
    """
    _check(function.graph)
    lengths = _Lengths()
    examples = [lengths.fake(n.meta["val"]) for n in function.inputs]
    return _compile(function, lengths, examples, verify=verify)


def compile_again(function: Function, arguments: Sequence[Argument], *, verify: bool = True) -> Function:
    """A function that was compiled for ``arguments`` before. Raises :class:`RefusedError`."""
    lengths = _Lengths()
    examples = [lengths.again(argument) for argument in arguments]
    return _compile(function, lengths, examples, verify=verify)


def _compile(function: Function, lengths: _Lengths, examples: list[Any], *, verify: bool) -> Function:
    module = _module(function.graph, lengths.mode)
    packed = any(n.target is LINEAR for n in function.graph.nodes)  # such a weight has no strides to assert
    try:
        with warnings.catch_warnings(), torch._inductor.config.patch(size_asserts=not packed):
            warnings.simplefilter("ignore")  # the compiler's own, which a filter must not turn into refusals
            artifact = torch._inductor.standalone_compile(module, examples, dynamic_shapes="from_graph")
    except Exception as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise RefusedError(f"it does not compile ({type(error).__name__}: {text[:200]})") from error
    values = [
        (i, example)
        for i, (node, example) in enumerate(zip(function.inputs, examples, strict=True))
        if isinstance(example, Tensor) and node.name.startswith("x")
    ]
    compiled = with_compiled(
        function,
        Compiled(
            artifact,
            tuple(lengths.fresh.values()),
            lengths.bound(examples),
            lengths.guards(),
            tuple((i, tuple(map(_expression, example.stride()))) for i, example in values),
            tuple(map(_argument, examples)),
        ),
    )
    if verify:
        for length in _VERIFIED:
            _compare(function, compiled, lengths, examples, length)
    return compiled


def with_compiled(function: Function, compiled: Compiled) -> Function:
    """``function`` with compiled code behind its call."""
    return dataclasses.replace(function, call=compiled.call(function.call), compiled=compiled)


def _argument(example: Any) -> Argument:
    if isinstance(example, Tensor):
        sizes, strides = (tuple(map(_expression, n)) for n in (example.shape, example.stride()))
        return Argument(example.dtype, str(example.device), sizes, strides)
    return Argument(None, "", (_expression(example),), ())


def _compare(
    function: Function, compiled: Function, lengths: _Lengths, examples: Sequence[Any], length: int
) -> None:
    """Refuse compiled code whose results at ``length`` are not the generated code's."""
    generator = torch.Generator().manual_seed(length)
    box = [_random(n, lengths, e, length, generator) for n, e in zip(function.inputs, examples, strict=True)]
    for expected, got in zip(function.call(list(box)), compiled.call(box), strict=True):
        if expected.shape != got.shape or expected.dtype != got.dtype:
            raise RefusedError(f"compiled code gives {got.dtype}{list(got.shape)} at length {length}")
        if not expected.is_floating_point():
            continue  # the order of experts that are nearly equal may turn on rounding
        finite = torch.isfinite(expected)
        scale = float(expected[finite].float().abs().max()) if bool(finite.any()) else 0.0
        error = float((expected.float() - got.float())[finite].abs().max()) if bool(finite.any()) else 0.0
        if not error <= _ROUNDING.get(expected.dtype, 0.05) * scale:
            raise RefusedError(f"compiled code differs by {error:.2g} of {scale:.2g} at length {length}")


def _random(node: fx.Node, lengths: _Lengths, example: Any, length: int, generator: torch.Generator) -> Any:
    """An argument like ``example`` when all lengths are ``length``: normal numbers, zeros for integers."""
    values = dict.fromkeys(lengths.fresh.values(), length)
    if not isinstance(example, Tensor):
        return _at(example, values)
    size = [_at(s, values) for s in example.shape]
    if not example.is_floating_point():
        return torch.zeros(size, dtype=example.dtype, device=example.device)
    made = torch.randn(size, generator=generator).to(example.device, example.dtype)
    reads_packed = any(user.target is LINEAR and user.args[1] is node for user in node.users)
    return pack(made) if reads_packed else made


def _at(size: Any, values: dict[sympy.Symbol, int]) -> int:
    return int(_expression(size).subs(values))


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


class _Lengths:
    """Fresh symbols for a function's lengths, and fake tensors of such sizes.

    The compiler tunes loops for the symbols' example values: long, divisible by nothing, no two alike.
    """

    def __init__(self) -> None:
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env)
        self.fresh: dict[sympy.Symbol, sympy.Symbol] = {}

    def size(self, size: Any) -> Any:
        """An int, or a SymInt of this environment."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        return self._sized(size.node.expr)

    def _sized(self, expr: sympy.Expr) -> Any:
        """An int or a SymInt from an expression in symbols of another environment."""
        if expr.is_Integer:
            return int(expr)
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self.fresh:
                number = len(self.fresh)
                self.fresh[symbol] = self.env.create_symbol(
                    2039 - 30 * number, ConstantSource(f"length_{number}"), dynamic_dim=DimDynamic.DYNAMIC
                )
        expr = expr.subs(self.fresh)
        hint = expr.subs({s: self.env.backed_var_to_val[s] for s in self.fresh.values()})
        if not hint.is_Integer:
            raise RefusedError("a size depends on values")
        return self.env.create_symintnode(expr, hint=int(hint))

    def fake(self, value: Any) -> Any:
        """A fake tensor like ``value`` of another environment, or a length."""
        if not isinstance(value, Tensor):
            return self.size(value)
        sizes, strides = [self.size(s) for s in value.shape], [self.size(s) for s in value.stride()]
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)

    def again(self, argument: Argument) -> Any:
        """A fake tensor, or a length, as one was compiled before."""
        sizes = [self._sized(s) for s in argument.sizes]
        if argument.dtype is None:
            return sizes[0]
        strides = [self._sized(s) for s in argument.strides]
        with self.mode:
            return torch.empty_strided(sizes, strides, dtype=argument.dtype, device=argument.device)

    def bound(self, examples: Sequence[Any]) -> tuple[tuple[int, int], ...]:
        """For each symbol the argument, and its dimension (-1: itself), whose size is the symbol."""
        found: dict[sympy.Symbol, tuple[int, int]] = {}
        for i, example in enumerate(examples):
            sizes: list[tuple[int, Any]] = [(-1, example)]
            if isinstance(example, Tensor):
                sizes = list(enumerate(example.shape))
            for d, size in sizes:
                if isinstance(size, torch.SymInt):
                    found.setdefault(size.node.expr, (i, d))
        if any(symbol not in found for symbol in self.fresh.values()):
            raise RefusedError("a length is the size of none of its inputs")
        return tuple(found[symbol] for symbol in self.fresh.values())

    def guards(self) -> tuple[sympy.Basic, ...]:
        """The compiler's conditions on the lengths.

        Raises :class:`RefusedError` when one fails at one of the usual lengths.
        """
        if any(symbol in self.env.replacements for symbol in self.fresh.values()):
            raise RefusedError("the compiler made a length a constant")
        guards = tuple(g.expr for g in self.env.guards if g.expr is not sympy.true)
        for n in _PROBES:
            values = dict.fromkeys(self.fresh.values(), n)
            if any(g.subs(values) != sympy.true for g in guards):
                raise RefusedError(f"compiled code does not hold at length {n} ({guards[0]})")
        return guards


def _check(graph: fx.Graph) -> None:
    """Refuse what gains nothing, or must not be compiled alone."""
    inputs = {n.name for n in graph.nodes if n.op == "placeholder"}
    owners = storage_owners(graph)
    fused = 0
    for node in graph.nodes:
        if any(owners.get(written.name) in inputs for written in mutated_arguments(node)):
            raise RefusedError("it writes in place into its input")
        if node.op == "call_function":
            fused += isinstance(node.meta.get("val"), Tensor) and _computes(node, owners)
    if not fused:
        raise RefusedError("nothing to fuse")


def _computes(node: fx.Node, owners: dict[str, str]) -> bool:
    """Whether a node is no matrix product, no view and no mere copy of rows."""
    return node.target not in _PRODUCTS | _GATHERS and owners[node.name] == node.name


def _module(graph: fx.Graph, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph as the compiler takes it: flat arguments, a list of results, a mark of the fake mode."""
    copied = fx.Graph()
    results = copied.graph_copy(graph, {})
    assert isinstance(results, tuple)
    for node in copied.nodes:
        if node.target is LINEAR:
            node.target = torch.ops.fpcompile.packed_linear.default
            node.args = node.args[:3]
    with mode:
        for result in results:
            result.meta["example_value"] = torch.empty(())
    copied.output(list(results))
    return fx.GraphModule(nn.Module(), copied)
