"""Python decisions of a traced model: made as the unmodified model makes them, and checked before each run.

transformers takes other paths while it is traced (masks are materialised, checks skipped). :func:`as_eager`
undoes that, so that the same kernels run. A decision on a tensor's *value* (is the mask all ones? is the
longest position beyond the threshold?) is answered with the values of the example, when the tensor is
computed from the caller's inputs alone, and becomes a :class:`Decision`: a small graph from inputs to that
value. A graph serves a call only if all its decisions come out the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
import transformers.utils.import_utils as import_utils
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    get_proxy_slot,
)
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from fpcompile.models.draws import may_draw

_READS: dict[Any, Any] = {
    Tensor.__bool__: bool,
    Tensor.__int__: int,
    Tensor.__float__: float,
    Tensor.__index__: int,
    Tensor.item: Tensor.item,
    Tensor.tolist: Tensor.tolist,
}
_MOST_NODES = 400
_lock = threading.RLock()


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """``graph(*inputs)`` gives the tensor that was read; ``value`` is what the example's reading gave."""

    graph: Callable[..., Any]
    inputs: tuple[int, ...]
    read: str
    value: Any

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the reading is the same for a call's input tensors."""
        with torch.no_grad():
            tensor = self.graph(*(tensors[i] for i in self.inputs))
        return bool(_read(self.read, tensor) == self.value)


def _of_fakes(data: Any) -> bool:
    """Whether new tensors are asked for with a list of tensors, which reads their values."""
    return isinstance(data, (list, tuple)) and any(isinstance(part, FakeTensor) for part in data)


def _open(size: torch.SymInt) -> bool:
    """Whether a size depends on values that the trace does not know."""
    env, expr = size.node.shape_env, size.node.expr
    return any(str(s).startswith("u") and s not in env.replacements for s in expr.free_symbols)


def _storage(node: fx.Node) -> int | None:
    """The memory that a node's result lies in."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _written(node: fx.Node) -> list[fx.Node]:
    """Nodes into whose results a node writes in place."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.is_mutable:
        return []
    given = [
        node.args[i] if i < len(node.args) else node.kwargs.get(a.name)
        for i, a in enumerate(schema.arguments)
    ]
    infos = [a.alias_info for a in schema.arguments]
    return [
        g for g, info in zip(given, infos, strict=True) if info and info.is_write and isinstance(g, fx.Node)
    ]


def _writers(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """Memory -> the nodes that write into it. A view is written into as well as what it is a view of."""
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in _written(node):
            found.setdefault(_storage(target), []).append(node)
    found.pop(None, None)
    return found


def _read(name: str, tensor: Tensor) -> Any:
    if name == "shape":
        return list(tensor.shape)
    return next(how for function, how in _READS.items() if function.__name__ == name)(tensor)


class Deciding(TorchFunctionMode):
    """Answers readings of fake tensors that depend on ``fakes`` only; ``real`` are the example's tensors."""

    def __init__(self, fakes: Sequence[Tensor], real: Sequence[Tensor]) -> None:
        super().__init__()
        self.real = real
        self.tracer = get_proxy_mode().tracer  # type: ignore[union-attr]
        self.inputs = {self._node(t): i for i, t in enumerate(fakes)}
        self.decisions: list[Decision] = []

    def _node(self, tensor: Tensor) -> fx.Node | None:
        slot = get_proxy_slot(tensor, self.tracer, None)
        return None if slot is None else slot.proxy.node

    def of_weights(self, tensor: Tensor) -> bool:
        """Whether a tensor of the trace is computed from weights alone: nothing that the caller passes, no
        other tensor of the model's, nothing that a call writes into.
        """
        node, found = self._node(tensor), dict[fx.Node, None]()
        written = {} if node is None else _writers(node.graph)
        todo = [] if node is None else [node]
        while todo:
            current = todo.pop()
            if current in found:
                continue
            if current in self.inputs or current.op == "get_attr" or may_draw(current):
                return False
            writers = written.get(_storage(current), ())
            if current.op == "placeholder" and writers:
                return False
            found[current] = None
            todo.extend((*current.all_input_nodes, *writers))
        return any(current.op == "placeholder" for current in found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and isinstance(args[0], FakeTensor):
            node = self._node(args[0])
            needed = None if node is None else self._ancestors(node)
            if node is not None and needed is not None:
                return self._decide(node, needed, func.__name__)
        if func is Tensor.__contains__:
            with self:
                return bool((args[0] == args[1]).any())
        if func is torch.tensor and _of_fakes(args[0]):
            with self:
                made = torch.stack([torch.as_tensor(part) for part in args[0]])
                return made.to(**{k: v for k, v in (kwargs or {}).items() if v is not None})
        if func is torch.equal:
            with self:
                return args[0].shape == args[1].shape and bool((args[0] == args[1]).all())
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, FakeTensor):
                self._settle_sizes(value)
        return result

    def _settle_sizes(self, tensor: FakeTensor) -> None:
        """Decide sizes that depend on values (of ``nonzero``, say) when the inputs alone determine them."""
        sizes: list[Any] = list(tensor.shape)
        if not any(isinstance(s, torch.SymInt) and _open(s) for s in sizes):
            return
        node = self._node(tensor)
        needed = None if node is None else self._ancestors(node)
        if node is None or needed is None:
            return
        for size, real in zip(sizes, self._decide(node, needed, "shape"), strict=True):
            if isinstance(size, torch.SymInt) and _open(size):
                expr = size.node.expr
                if isinstance(expr, sympy.Symbol):
                    env = size.node.shape_env
                    env.size_like.discard(expr)  # sizes of a sort that is never taken for 0 or 1
                    env._set_replacement(expr, sympy.Integer(real), "decided by the inputs")
                else:
                    torch._check(size == real)  # type: ignore[no-untyped-call]

    def _ancestors(self, node: fx.Node) -> list[fx.Node] | None:
        """Nodes that ``node`` is computed from, in order, and those that write in place into what they gave;
        None when weights, activations or random numbers are among them.
        """
        found: dict[fx.Node, None] = {}
        written = _writers(node.graph)
        todo = [node]
        while todo:
            current = todo.pop()
            if current in found:
                continue
            known = current in self.inputs or (current.op == "call_function" and not may_draw(current))
            if not known and self._constant(current) is None:
                return None
            found[current] = None
            todo.extend(written.get(_storage(current), ()))
            if current not in self.inputs:
                todo.extend(current.all_input_nodes)
            if len(found) > _MOST_NODES:
                return None
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        return sorted(found, key=order.__getitem__)

    def _constant(self, node: fx.Node) -> Tensor | None:
        """The tensor behind a node that stands for a constant made in the model's code."""
        if node.op != "get_attr":
            return None
        tracer: Any = self.tracer
        value = getattr(tracer.root, str(node.target), None)
        if isinstance(value, FakeTensor):
            value = value.constant
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return None
        return value if value.numel() <= _MOST_NODES else None

    def _decide(self, node: fx.Node, needed: list[fx.Node], read: str) -> Any:
        graph, root = fx.Graph(), nn.Module()
        copied: dict[fx.Node, fx.Node] = {}
        for source in needed:
            if source.op == "get_attr":
                root.register_buffer(str(source.target), self._constant(source))
        used = [n for n in needed if n in self.inputs]
        for source in used:
            copied[source] = graph.placeholder(f"x{self.inputs[source]}")
        if any(_written(source) for source in needed):  # into copies: the tensors are the caller's
            for source in used:
                copied[source] = graph.call_function(torch.ops.aten.clone.default, (copied[source],))
        for source in needed:
            if source not in copied:
                copied[source] = graph.node_copy(source, copied.__getitem__)
        graph.output(copied[node])
        module = fx.GraphModule(root, graph)
        indices = tuple(self.inputs[n] for n in used)
        with unset_fake_temporarily(), disable_proxy_modes_tracing(), torch.no_grad():
            value = _read(read, module(*(self.real[i] for i in indices)))
        self.decisions.append(Decision(module, indices, read, value))
        return value


def _broadcast_mask(mask_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A mask ``[B, H, Q, K]`` by broadcasting its indices: what vmap gives, which is not traced."""

    def expand(batch: Tensor, heads: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        indices = masking_utils._non_vmap_expansion_sdpa(batch, heads, queries, keys)
        sizes = [index.shape[0] for index in (batch, heads, queries, keys)]
        return mask_function(*indices).expand(sizes)

    return expand


@contextlib.contextmanager
def as_eager() -> Iterator[None]:
    """While open (inside a trace), transformers does not see that it is traced. One trace at a time."""
    with _lock:
        flags = torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag
        fake, expansion = import_utils.is_fake_tensor, masking_utils._vmap_expansion_sdpa
        checks = Distribution._validate_args
        torch.compiler._is_compiling_flag = torch.compiler._is_exporting_flag = False
        Distribution.set_default_validate_args(False)  # reads activations, and only to raise
        import_utils.is_fake_tensor = lambda x: False
        masking_utils._vmap_expansion_sdpa = _broadcast_mask
        try:
            yield
        finally:
            torch.compiler._is_compiling_flag, torch.compiler._is_exporting_flag = flags
            import_utils.is_fake_tensor = fake
            masking_utils._vmap_expansion_sdpa = expansion
            Distribution.set_default_validate_args(checks)
