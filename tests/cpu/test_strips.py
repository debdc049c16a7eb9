"""Strips: long chains of elementwise operators are executed range by range, and give the whole's bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.executor import rooms, strips
from fpcompile.models.zoo import tiny_model
from fpcompile.passes.prepack import can_prepack
from tests.cpu.support import differences, finish, model_of, reference

LENGTH = 7 * 16 + 5

needs_bf16 = pytest.mark.skipif(
    not can_prepack(torch.zeros(1, 1, dtype=torch.bfloat16)), reason="this CPU has no bf16 matrix kernel"
)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Strips of 16 tokens; the sizes that were executed."""
    monkeypatch.setattr(strips, "STRIP", 16)
    sizes: list[int] = []
    own = rooms.room

    def room(tile: torch.Tensor, axis: int, length: int) -> torch.Tensor:
        sizes.append(int(tile.shape[axis]))
        return own(tile, axis, length)

    monkeypatch.setattr(strips, "room", room)
    return sizes


@functools.cache
def packed(arch: str) -> fpcompile.Program:
    """With packed weights: the products of others are not taken apart, and with them hardly a part."""
    return fpcompile.segment(model_of(arch, torch.bfloat16), route="packed", weights="packed", verify=False)


def ids_of(program: fpcompile.Program, length: int) -> torch.Tensor:
    return torch.randint(0, program.vocabulary, (1, length), generator=torch.Generator().manual_seed(5))


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "gpt_neox", "mixtral"])
def test_strips_have_the_models_bits(arch: str, narrow: list[int]) -> None:
    program = packed(arch)
    ids = ids_of(program, LENGTH)
    assert differences(finish(program.start(ids)), reference(model_of(arch, torch.bfloat16), ids)) == []
    assert narrow, "some parts are taken apart"
    assert set(narrow) == {16}


@needs_bf16
@pytest.mark.slow
def test_so_have_strips_of_their_real_size() -> None:
    model = tiny_model("qwen3", dtype=torch.bfloat16, overrides={"max_position_embeddings": 4096})
    program = fpcompile.segment(model, weights="packed", verify=False)
    ids = ids_of(program, strips.STRIPS * strips.STRIP + strips.STRIP // 2)
    assert differences(finish(program.start(ids)), reference(model, ids)) == []


@needs_bf16
@pytest.mark.slow
@pytest.mark.parametrize("length", [15, 95])
def test_short_inputs_are_executed_at_once(length: int, narrow: list[int]) -> None:
    program = packed("qwen3")
    finish(program.start(ids_of(program, length)))
    assert narrow == []


@needs_bf16
@pytest.mark.slow
def test_results_have_the_strides_of_the_whole(narrow: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Strides decide which kernel runs next."""
    program = packed("qwen3")
    ids = ids_of(program, LENGTH)

    def strides() -> list[dict[str, Any]]:
        run, found = program.start(ids), []
        while not run.done:
            run.step()
            found.append({name: (v.shape, v.stride(), v.dtype) for name, v in run.values.items()})
        return found

    taken_apart = strides()
    assert narrow
    monkeypatch.setattr(strips, "STRIP", 1 << 20)
    assert strides() == taken_apart


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("torch.relu(torch.exp(x))", True),
        ("torch.relu(torch.exp(x)).transpose(0, 1)", True),
        ("torch.exp(x)", False),  # one operator is not worth a copy
        ("torch.relu(torch.exp(x)) @ w", False),  # its rows may depend on how many there are
        ("torch.relu(torch.exp(x))[:, :, :2]", False),  # a part of a result
        ("(lambda y: (y, y.transpose(1, 2)))(torch.relu(torch.exp(x)))", False),  # one memory, two results
        ("(torch.relu(torch.exp(x)), x.transpose(1, 2))", False),  # an input
        ("torch.exp(x).relu().add_(1)", False),  # written in place
    ],
)
def test_who_is_taken(source: str, expected: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from fpcompile.ir import Cost, Part, PartKind
    from fpcompile.passes.codegen import Function

    def body(x: torch.Tensor, w: torch.Tensor) -> Any:
        return eval(source, {"torch": torch, "x": x, "w": w})

    graph = make_fx(body)(torch.zeros(1, 6, 4), torch.zeros(4, 4)).graph
    results = next(n for n in graph.nodes if n.op == "output").all_input_nodes
    axes = ((1, -1), (1,) * len(results))
    part = Part("p", PartKind.GRAPH, "f", ("x", "w"), (), (), ("y",), -1, Cost(), (), "tokens", axes)
    assert strips.suits(part, Function(lambda box: (), (), graph)) is expected
