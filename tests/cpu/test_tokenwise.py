"""The token-wise proof: what is proven really is token-wise, and what mixes tokens is refused with its line.

A table of small graphs for the rules, some that pass and some that are refused; random graphs, of which every
proven one must give each row by itself; and whole models whose layers mix tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fpcompile
from fpcompile.errors import UnsupportedModelError
from fpcompile.models.capture import Capture
from fpcompile.models.zoo import tiny_model
from fpcompile.passes.context import Context
from fpcompile.passes.normalise import normalise
from fpcompile.passes.tokenwise import prove_tokenwise
from tests.cpu.support import Mix, Spot, differences, mlp, outcome, reference, toy

WIDTH = 8


class Small(nn.Module):
    """A graph in the making: ids are embedded to ``x [1, T, 8]``, then ``body`` computes."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.table = nn.Embedding(128, WIDTH)
            self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
            self.v = nn.Parameter(torch.randn(WIDTH))
            self.many = nn.Parameter(torch.randn(512, WIDTH))
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2)

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        return self.body(Given(self, self.table(input_ids), input_ids, position_ids, logits_to_keep))


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What a small graph computes with."""

    weights: Any
    x: Tensor
    ids: Tensor
    positions: Tensor
    keep: Tensor


Body = Callable[[Given], Tensor]


def traced(body: Body) -> tuple[fx.GraphModule, Context]:
    """The normalised graph of ``body``, as the packed route would trace it."""
    tokens, rows = (
        torch.export.Dim("tokens", min=2, max=1 << 20),
        torch.export.Dim("rows", min=2, max=1 << 20),
    )
    example = (torch.zeros(1, 13, dtype=torch.long), torch.arange(13)[None], torch.arange(5))
    with torch.no_grad():
        exported = torch.export.export(
            Small(body).eval(), example, dynamic_shapes=({1: tokens}, {1: tokens}, {0: rows}), strict=False
        )
    capture = Capture({}, (), (), object, cast("Any", None), graph=exported.graph_module)
    ctx = Context(capture)
    normalise(exported.graph_module.graph, ctx)
    return exported.graph_module, ctx


def prove(body: Body) -> None:
    """Raise unless ``body`` is proven."""
    module, ctx = traced(body)
    prove_tokenwise(module.graph, ctx)


TOKENWISE: dict[str, Body] = {
    "linear": lambda g: F.linear(g.x, g.weights.w, g.weights.v),
    "matmul with a weight": lambda g: g.x @ g.weights.w,
    "matmul of heads": lambda g: g.x.view(1, -1, 2, 4).transpose(1, 2) @ g.weights.w[:4, :4],
    "weight times transposed": lambda g: (g.weights.w @ g.x.transpose(1, 2)).transpose(1, 2),
    "weight times a transposed row": lambda g: (g.weights.w @ g.x[0].t()).t()[None],
    "addmm": lambda g: torch.addmm(g.weights.v, g.x[0], g.weights.w)[None],
    "embedding": lambda g: F.embedding(g.ids, g.weights.many),
    "positions from their input": lambda g: g.x + F.embedding(g.positions, g.weights.many),
    "a constant looked up": lambda g: g.x + g.weights.many[g.positions],
    "softmax over features": lambda g: g.x.softmax(-1),
    "log softmax over features": lambda g: g.x.log_softmax(2),
    "cumsum over features": lambda g: g.x.cumsum(-1),
    "mean over features": lambda g: g.x - g.x.mean(-1, keepdim=True),
    "sum that drops a dimension": lambda g: g.x.view(1, -1, 2, 4).sum(2),
    "sum before the tokens": lambda g: g.x.transpose(1, 2).reshape(2, 4, -1).sum(0).t()[None],
    "maximum": lambda g: g.x.amax(-1, keepdim=True) + g.x.max(dim=-1, keepdim=True).values,
    "variance": lambda g: g.x.var(-1, keepdim=True, unbiased=False),
    "variance that drops a dimension": lambda g: g.x.view(1, -1, 2, 4).var(2).repeat(1, 1, 2) + g.x,
    "deviation": lambda g: g.x / g.x.std(dim=-1, keepdim=True, unbiased=False) + g.x.std(-1)[..., None],
    "an operator of constants": lambda g: g.x + torch.linalg.inv(g.weights.w).sum(0),
    "argmax over features": lambda g: g.x.argmax(-1)[..., None] + g.x,
    "layer norm": lambda g: F.layer_norm(g.x, (WIDTH,), g.weights.v),
    "rms norm": lambda g: F.rms_norm(g.x, (WIDTH,), g.weights.v),
    "split and joined": lambda g: torch.cat([-g.x[..., 4:], g.x[..., :4]], dim=-1),
    "chunk": lambda g: torch.mul(*g.x.chunk(2, dim=-1)),
    "split": lambda g: torch.cat([p.sin() for p in torch.split(g.x, [3, 5], dim=-1)], -1),
    "stack": lambda g: torch.stack([g.x, g.x.cos()], dim=-1).flatten(-2),
    "stack in front": lambda g: torch.stack([g.x, g.x.cos()]).sum(0),
    "unbind": lambda g: torch.mul(*g.x.view(1, -1, 2, 4).unbind(2)),
    "unbind along the first dimension": lambda g: torch.stack((g.x[0], g.x[0] + 1)).unbind()[1][None],
    "top k of features": lambda g: g.x.topk(3, dim=-1).values,
    "gather of features": lambda g: g.x.gather(-1, g.x.topk(3, dim=-1).indices),
    "scatter into features": lambda g: torch.zeros_like(g.x).scatter(-1, g.x.topk(3, -1).indices, 1.0),
    "sorted features": lambda g: g.x.sort(dim=-1, descending=True).values,
    "flipped features": lambda g: g.x.flip(-1),
    "one hot": lambda g: F.one_hot(g.x.argmax(-1), WIDTH) * g.x,
    "views": lambda g: g.x.view(1, -1, 2, 4).permute(0, 2, 1, 3).transpose(1, 2).reshape(1, -1, WIDTH),
    "unsqueeze and squeeze": lambda g: g.x[:, None].squeeze(1) + g.x.unsqueeze(0).squeeze(0),
    "repeated in front": lambda g: g.x.repeat(3, 1, 1, 1).sum(0),
    "expand of heads": lambda g: g.x[:, :, None].expand(1, g.x.shape[1], 3, WIDTH).flatten(2),
    "select of features": lambda g: g.x[..., 3:4] * g.x[..., 5][..., None],
    "operators by their long names": lambda g: torch.multiply(g.x, torch.divide(g.x, g.weights.v)),
    "where": lambda g: torch.where(g.x > 0, g.x, g.weights.v),
    "casts": lambda g: g.x.double().sin().to(torch.float32).type_as(g.weights.v),
    "in place on its own": lambda g: g.x.sin().mul_(2).add_(g.weights.v),
    "rows kept": lambda g: g.x[:, g.keep].sin(),
    "rows kept, then projected": lambda g: F.linear(g.x[:, g.keep], g.weights.w).softmax(-1),
    "rotary": lambda g: g.x * (g.positions[..., None].float() * g.weights.v).cos(),
}

MIXING: dict[str, Body] = {
    "softmax over tokens": lambda g: g.x.softmax(1),
    "cumsum over tokens": lambda g: g.x.cumsum(1),
    "mean over tokens": lambda g: g.x - g.x.mean(1, keepdim=True),
    "mean over all": lambda g: g.x - g.x.mean(),
    "sum over tokens": lambda g: g.x.sum(1, keepdim=True) + g.x,
    "maximum over tokens": lambda g: g.x.amax(1, keepdim=True) + g.x,
    "maximum over tokens with its index": lambda g: g.x.max(dim=1, keepdim=True).values + g.x,
    "maximum over all": lambda g: g.x / g.x.max(),
    "variance over tokens": lambda g: g.x.var(1, keepdim=True) + g.x,
    "deviation over tokens": lambda g: g.x.std(1, keepdim=True) + g.x,
    "deviation over all": lambda g: g.x / g.x.std(),
    "norm over all": lambda g: g.x / g.x.norm(),
    "argmax over tokens": lambda g: g.x.argmax(1),
    "argmax over all": lambda g: g.x + g.x.argmax(),
    "layer norm over tokens": lambda g: F.layer_norm(g.x.transpose(1, 2), (g.x.shape[1],)),
    "group norm": lambda g: F.group_norm(g.x.transpose(1, 2), 2).transpose(1, 2),
    "batch norm": lambda g: F.batch_norm(g.x[0], None, None, training=True)[None],
    "roll": lambda g: g.x.roll(1, dims=1),
    "flip": lambda g: g.x.flip(1),
    "shift": lambda g: F.pad(g.x, (0, 0, 1, 0))[:, :-1],
    "first token": lambda g: g.x + g.x[:, :1],
    "last token": lambda g: g.x + g.x[:, -1:],
    "one token selected": lambda g: g.x + g.x[:, 0][:, None],
    "convolution": lambda g: g.weights.conv(g.x.transpose(1, 2))[..., :-2].transpose(1, 2),
    "attention by hand": lambda g: (g.x @ g.x.transpose(1, 2)).softmax(-1) @ g.x,
    "fused attention": lambda g: F.scaled_dot_product_attention(g.x, g.x, g.x),
    "einsum over tokens": lambda g: g.x + torch.einsum("btd,bte->bde", g.x, g.x)[:, 0],
    "positions counted from ids": lambda g: g.x + F.embedding(g.ids.ne(0).cumsum(1), g.weights.many),
    "positions counted by arange": lambda g: g.x + g.weights.many[torch.arange(g.x.shape[1])],
    "positions sliced off a table": lambda g: g.x + g.weights.many[: g.x.shape[1]],
    "a bias by distance": lambda g: (
        g.x + (g.positions[:, :, None] - g.positions[:, None, :]).sum(-1)[..., None]
    ),
    "rows repeated": lambda g: g.x.repeat_interleave(2, dim=1),
    "rows merged": lambda g: g.x.reshape(-1).sin(),
    "rows regrouped": lambda g: g.x.view(1, WIDTH, -1).softmax(-1).view(1, -1, WIDTH),
    "tokens repeated": lambda g: g.x.repeat(1, 2, 1),
    "tokens repeated in turn": lambda g: g.x.repeat(1, 2, 1)[:, : g.x.shape[1]],
    "tokens sorted": lambda g: g.x.sort(dim=1).values,
    "best tokens": lambda g: g.x.topk(2, dim=1).values.sum(1, keepdim=True) + g.x,
    "tokens gathered": lambda g: g.x.gather(1, g.x.argsort(1)),
    "tokens indexed": lambda g: g.x[:, g.positions[0].flip(0)],
    "neighbours joined": lambda g: torch.cat([g.x, g.x.flip(1)], dim=1),
    "tokens written": lambda g: torch.zeros_like(g.x).scatter(1, g.x.argsort(1), g.x),
    "counted ids": lambda g: g.x + torch.zeros(1, 128).scatter(1, g.ids, 1.0)[:, :WIDTH],
    "rows and tokens together": lambda g: g.x.mean(-1)[0][: g.keep.shape[0]] + g.x[:, g.keep].mean(-1),
    "the number of tokens as a number": lambda g: g.x * g.x.shape[1],
    "the number of tokens in a tensor": lambda g: g.x / torch.full((1,), g.x.shape[1]),
    "the number of tokens by expanding": lambda g: (
        g.x[..., :1].expand(1, -1, g.x.shape[1]).sum(-1)[..., None]
    ),
    "a vector product, then over tokens": lambda g: torch.matmul(g.x[0], g.weights.v).cumsum(0),
    "a vector product, then softmax": lambda g: torch.mv(g.x[0], g.weights.v).softmax(0),
    "a constant read by the row's place": lambda g: g.weights.many.gather(1, g.x[0].argsort(-1))[None] + g.x,
    "rows numbered by a constant": lambda g: g.x + g.weights.many.cumsum(0)[: g.x.shape[1]],
    "random numbers": lambda g: g.x + torch.rand_like(g.x),
    "random numbers of a constant": lambda g: g.x + torch.multinomial(g.weights.v.abs(), 8),
    "dropout": lambda g: F.dropout(g.x, 0.5, training=True),
    "coin tosses": lambda g: g.x * torch.bernoulli(g.x.sigmoid()),
}


@pytest.mark.parametrize("name", TOKENWISE)
def test_what_is_token_wise_is_proven(name: str) -> None:
    prove(TOKENWISE[name])
    assert _each_row_alone(traced(TOKENWISE[name])[0]), "the example is not token-wise at all"


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused(name: str) -> None:
    try:
        module, ctx = traced(MIXING[name])
    except (UnsupportedModelError, RuntimeError, torch._dynamo.exc.UserError):
        return  # it cannot even be traced with symbolic lengths
    with pytest.raises(UnsupportedModelError, match="not proven token-wise") as caught:
        prove_tokenwise(module.graph, ctx)
    assert caught.value.node in {node.name for node in module.graph.nodes}
    assert caught.value.reason
    assert caught.value.remedy
    assert (caught.value.source_line or "").startswith("test_tokenwise.py:")


def _evaluate(module: fx.GraphModule, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
    """The graph's result; after the passes it also takes its two lengths."""
    weights = dict(Small(lambda g: g.x).named_parameters())
    arguments: list[object] = []
    given = {"input_ids": ids, "position_ids": positions, "logits_to_keep": keep}
    lengths = {"tokens": ids.shape[1], "rows": keep.shape[0]}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = node.name.removeprefix("p_").replace("_weight", ".weight").replace("_bias", ".bias")
            arguments.append({**given, **lengths, **weights}[name])
    result = fx.Interpreter(module).run(*arguments)
    (logits,) = result
    return cast("Tensor", logits).detach()


TOKENS, ROWS = 11, 5  # no other dimension of a small graph has these sizes


def _each_row_alone(module: fx.GraphModule, tolerance: float = 1e-5) -> bool:
    """Whether each row of the result is the one that its token gives among other tokens, and elsewhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(128, (1, TOKENS), generator=generator)
    positions = torch.randint(40, (1, TOKENS), generator=generator)
    other = torch.randint(128, (1, TOKENS + 6), generator=generator)
    elsewhere = torch.randint(40, (1, TOKENS + 6), generator=generator)
    order = torch.randperm(TOKENS, generator=generator)
    places = torch.randperm(TOKENS + 6, generator=generator)[:TOKENS]
    other[0, places], elsewhere[0, places] = ids[0, order], positions[0, order]
    keep = order[:ROWS]
    here = _evaluate(module, ids, positions, keep)
    there = _evaluate(module, other, elsewhere, places[:ROWS])
    axis = next(d for d in range(here.dim()) if here.shape[d] in (TOKENS, ROWS))
    if here.shape[axis] == TOKENS:
        here, there = here.index_select(axis, order), there.index_select(axis, places)
    return torch.allclose(there, here, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["mean over tokens", "roll", "cumsum over tokens", "first token"])
def test_the_test_of_rows_sees_mixing(name: str) -> None:
    assert not _each_row_alone(traced(MIXING[name])[0])


STEPS: dict[str, Callable[[Given, Tensor, Tensor], Tensor]] = {
    "add": lambda g, a, b: a + b,
    "mul": lambda g, a, b: a * b.sigmoid(),
    "linear": lambda g, a, b: F.linear(a, g.weights.w),
    "left": lambda g, a, b: g.weights.w @ a,
    "right": lambda g, a, b: a @ g.weights.w,
    "vector": lambda g, a, b: a @ g.weights.v,
    "product": lambda g, a, b: a @ b,
    "outer": lambda g, a, b: a @ b.transpose(-1, -2),
    "transpose": lambda g, a, b: a.transpose(-1, -2),
    "swap": lambda g, a, b: a.transpose(0, 1),
    "first": lambda g, a, b: a[0],
    "last": lambda g, a, b: a[..., -1],
    "wrap": lambda g, a, b: a[None],
    "tail": lambda g, a, b: a[..., None],
    "half": lambda g, a, b: a[..., : a.shape[-1] // 2],
    "softmax last": lambda g, a, b: a.softmax(-1),
    "softmax before": lambda g, a, b: a.softmax(-2),
    "cumsum first": lambda g, a, b: a.cumsum(0),
    "mean last": lambda g, a, b: a.mean(-1),
    "mean before": lambda g, a, b: a.mean(-2, keepdim=True),
    "sum first": lambda g, a, b: a.sum(0),
    "var": lambda g, a, b: a.var(0, unbiased=False),
    "max": lambda g, a, b: a.max(dim=-1).values,
    "norm": lambda g, a, b: F.layer_norm(a, a.shape[-1:]),
    "joined": lambda g, a, b: torch.cat([a, b], dim=-1),
    "joined before": lambda g, a, b: torch.cat([a, b], dim=-2),
    "stacked": lambda g, a, b: torch.stack([a, b], dim=1),
    "flip": lambda g, a, b: a.flip(-1),
    "heads": lambda g, a, b: torch.unflatten(a, -1, (2, -1)),
    "merged": lambda g, a, b: a.flatten(-2),
    "flat": lambda g, a, b: a.reshape(-1, WIDTH),
    "permuted": lambda g, a, b: a.permute(*range(1, a.dim()), 0),
    "gather": lambda g, a, b: a.gather(-1, b.argsort(-1)),
    "lookup": lambda g, a, b: F.embedding(a.abs().long() % 128, g.weights.many),
    "in place": lambda g, a, b: a.sin().add_(b),
    "sorted": lambda g, a, b: a.sort(dim=-1).values,
    "expanded": lambda g, a, b: a.unsqueeze(-2).expand(*a.shape[:-1], 3, a.shape[-1]),
    "constant": lambda g, a, b: g.weights.many[:WIDTH] + a,
    "length": lambda g, a, b: a / a.shape[-2],
}
steps = st.lists(
    st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6
)


@pytest.mark.slow
@settings(max_examples=150)
@given(plan=steps)
def test_of_random_graphs_every_proven_one_gives_each_row_by_itself(plan: list[tuple[str, int, int]]) -> None:
    """Permuting the rows permutes the results; other rows beside them, or other places, change nothing."""

    def body(g: Given) -> Tensor:
        values = [g.x, g.x.sin()]
        for name, left, right in plan:
            a, b = values[-1 - left % len(values)], values[-1 - right % len(values)]
            values.append(STEPS[name](g, a, b))
        return values[-1]

    try:
        module, ctx = traced(body)
        prove_tokenwise(module.graph, ctx)
    except Exception as error:
        if not isinstance(error, (UnsupportedModelError, RuntimeError, ValueError, IndexError, TypeError)):
            raise
        return  # not a graph, or not proven: nothing is promised
    result = next(n for n in module.graph.nodes if n.op == "output").args[0][0]
    if not any(isinstance(size, torch.SymInt) for size in result.meta["val"].shape):
        return  # a constant: no token reached it
    assert _each_row_alone(module, tolerance=1e-3), [name for name, *_ in plan]


def _mixes(operation: Callable[[Spot], Tensor]) -> Mix:
    return operation


MODELS: dict[str, Mix] = {
    "cumsum": lambda s: s.x.cumsum(1),
    "mean": lambda s: s.x.mean(1, keepdim=True).expand_as(s.x),
    "convolution": lambda s: s.layer.conv(s.x.transpose(1, 2))[..., : s.x.shape[1]].transpose(1, 2),
    "roll": lambda s: s.x.roll(1, 1),
    "positions from ids": lambda s: F.embedding(s.ids.ne(0).cumsum(1) % 48, s.layer.up.weight),
    "first token": lambda s: s.x[:, :1].expand_as(s.x),
    "a second attention by hand": lambda s: (s.x @ s.x.transpose(1, 2)).softmax(-1) @ s.x,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_mixes_tokens_cannot_be_packed(name: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        fpcompile.segment(toy(MODELS[name]), route="packed", verify=False)
    assert caught.value.node
    assert caught.value.module_path is not None
    assert caught.value.module_path.startswith("layers.0")
    assert caught.value.source_line
    assert caught.value.reason
    assert caught.value.remedy


@pytest.mark.slow
def test_a_buffer_that_is_written_cannot_be_packed() -> None:
    def counts(s: Spot) -> Tensor:
        s.layer.counts.add_(1)
        result: Tensor = s.x * s.layer.counts
        return result

    model: Any = toy(counts)
    with pytest.raises(UnsupportedModelError, match=r"packed route|writes into") as caught:
        fpcompile.segment(model, route="packed", verify=False)
    assert "write" in str(caught.value)
    assert not model.layers[0].counts.any(), "the model's own buffer was written"


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["bloom", "mpt", "gpt_neo", "falcon", "mamba", "rwkv", "recurrent_gemma"])
def test_architectures_that_cannot_be_packed_say_why(arch: str) -> None:
    """ALiBi, masks of their own, recurrences."""
    model = tiny_model(arch, overrides={"alibi": True} if arch == "falcon" else {})
    with pytest.raises(UnsupportedModelError) as caught:
        fpcompile.segment(model, route="packed", verify=False)
    assert caught.value.reason
    assert caught.value.where


@pytest.mark.slow
def test_the_self_check_catches_what_a_wrong_proof_lets_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the proof switched off, packing a model that mixes tokens must still be noticed."""
    import fpcompile.passes.pipeline

    monkeypatch.setattr(fpcompile.passes.pipeline, "prove_tokenwise", lambda graph, ctx: graph)
    with pytest.raises(UnsupportedModelError, match="does not give the model's numbers"):
        fpcompile.segment(toy(MODELS["cumsum"]), route="packed")


@pytest.mark.slow
def test_a_toy_that_mixes_nothing_is_packed() -> None:
    model = toy(mlp)
    program = fpcompile.segment(model, route="packed")
    ids = torch.randint(128, (1, 21), generator=torch.Generator().manual_seed(0))
    assert differences(outcome(program(ids)), reference(model, ids)) == []
