"""The intermediate representation: frozen, counts storages once, refuses inconsistent live sets."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from fpcompile.errors import InternalError
from fpcompile.ir import (
    CONTEXT,
    ROWS,
    SYMBOLS,
    TOKENS,
    ZERO,
    Cost,
    CutReason,
    Granularity,
    LiveSet,
    Part,
    PartKind,
    Plan,
    Route,
    Segment,
    Source,
    Value,
    evaluate,
)


def value(name: str, storage: str | None = None, size: sympy.Expr = 64 * TOKENS) -> Value:
    return Value(name, (sympy.Integer(1), TOKENS, sympy.Integer(16)), "torch.float32", storage or name, size)


def part(inputs: str, outputs: str, cost: Cost | None = None) -> Part:
    return Part(
        name="layers.0",
        kind=PartKind.GRAPH,
        function="f",
        inputs=tuple(inputs.split()),
        params=("weight",),
        lengths=("tokens",),
        outputs=tuple(outputs.split()),
        call=-1,
        cost=cost or Cost(),
        nodes=(("mm", Source("layers.0", "modeling_x.py:3: x @ w")),),
    )


def segment(index: int, live: str, *parts: Part) -> Segment:
    values = LiveSet(tuple(value(name) for name in live.split()))
    return Segment(index, f"s{index}", "projection", parts, values, CutReason.PROJECTION)


def plan(*segments: Segment, inputs: str = "ids", output: str = "out", more: str = "") -> Plan:
    return Plan(
        architecture="X",
        route=Route.PACKED,
        granularity=Granularity.OPERATOR,
        inputs=tuple(inputs.split()),
        output=output,
        segments=segments,
        more_outputs=tuple(more.split()),
    )


def test_sizes_are_evaluated_at_lengths() -> None:
    assert evaluate(3 * TOKENS + 5 * ROWS + 7 * CONTEXT, tokens=10, rows=2, context=100) == 740
    assert evaluate(TOKENS * CONTEXT, tokens=10) == 100, "without a cache the context is the new tokens"
    assert evaluate(ROWS, tokens=10) == 1
    assert evaluate(ZERO, tokens=10) == 0
    assert evaluate(sympy.Min(TOKENS, 16), tokens=40) == 16
    assert evaluate(TOKENS * (TOKENS + 1) / 2, tokens=7) == 28


@given(tokens=st.integers(1, 10**6), rows=st.integers(1, 10**6), context=st.integers(1, 10**6))
def test_large_sizes_are_exact(tokens: int, rows: int, context: int) -> None:
    expr = TOKENS * CONTEXT - TOKENS * (TOKENS - 1) / 2 + 8 * ROWS
    expected = tokens * context - tokens * (tokens - 1) // 2 + 8 * rows
    assert evaluate(expr, tokens=tokens, rows=rows, context=context) == expected


def test_the_three_lengths_are_known_by_name() -> None:
    assert {"tokens": TOKENS, "rows": ROWS, "context": CONTEXT} == SYMBOLS
    assert all(symbol.is_integer and symbol.is_positive for symbol in SYMBOLS.values())


def test_costs_add_up() -> None:
    total = Cost(2 * TOKENS, 3 * TOKENS) + Cost(ROWS, 4 * TOKENS) + Cost()
    assert total == Cost(2 * TOKENS + ROWS, 7 * TOKENS)
    found = segment(0, "out", part("ids", "h", Cost(TOKENS, ROWS)), part("h", "out", Cost(TOKENS, ROWS)))
    assert found.cost == Cost(2 * TOKENS, 2 * ROWS)
    assert plan(found).cost == found.cost


def test_a_shared_storage_is_counted_once() -> None:
    live = LiveSet((value("q", "qkv"), value("k", "qkv"), value("x", "x", 8 * ROWS)))
    assert live.nbytes == 64 * TOKENS + 8 * ROWS
    assert live.names == ("q", "k", "x")
    assert LiveSet().nbytes == 0


def test_a_live_set_names_each_value_once() -> None:
    with pytest.raises(InternalError, match="names a value twice"):
        LiveSet((value("x"), value("x", "other")))


def test_a_consistent_plan_is_accepted() -> None:
    found = plan(
        segment(0, "a keep", part("ids keep", "a")),
        segment(1, "b", part("a keep", "b")),
        segment(2, "out", part("b", "c"), part("b c", "out")),
        inputs="ids keep unused",
    )
    assert found.results == ("out",)


@pytest.mark.parametrize(
    ("live", "what"),
    [("a", "a value that is read later is missing"), ("a keep more", "a value that nobody reads is held")],
)
def test_a_live_set_that_is_not_what_is_read_later_is_refused(live: str, what: str) -> None:
    with pytest.raises(InternalError, match="behind segment 0") as caught:
        plan(
            segment(0, live, part("ids keep", "a more")),
            segment(1, "out", part("a keep", "out")),
            inputs="ids keep",
        )
    assert caught.value.expected == "['a', 'keep']", what
    assert caught.value.got == str(sorted(live.split()))


def test_a_value_that_is_redefined_is_not_live_before() -> None:
    plan(segment(0, "a", part("ids", "a")), segment(1, "out", part("a", "b"), part("b", "out")))
    with pytest.raises(InternalError, match="behind segment 0"):
        plan(segment(0, "a b", part("ids", "a b")), segment(1, "out", part("a", "b"), part("b", "out")))


def test_a_plan_that_reads_what_nobody_defines_is_refused() -> None:
    with pytest.raises(InternalError, match="undefined") as caught:
        plan(segment(0, "out", part("ids ghost", "out")))
    assert caught.value.got == "['ghost']"


def test_further_results_stay_live_to_the_end() -> None:
    found = plan(
        segment(0, "a state", part("ids", "a state")),
        segment(1, "out state", part("a", "out")),
        more="state",
    )
    assert found.results == ("out", "state")
    with pytest.raises(InternalError, match="behind segment 1"):
        plan(segment(0, "a state", part("ids", "a state")), segment(1, "out", part("a", "out")), more="state")


def test_everything_is_frozen_equal_by_value_and_survives_pickling() -> None:
    found = plan(segment(0, "a", part("ids", "a")), segment(1, "out", part("a", "out")))
    again = plan(segment(0, "a", part("ids", "a")), segment(1, "out", part("a", "out")))
    assert found == again
    assert pickle.loads(pickle.dumps(found)) == found
    assert copy.deepcopy(found) == found
    assert found != dataclasses.replace(found, architecture="Y")
    first = found.segments[0]
    for thing, field in (
        (found, "output"),
        (first, "name"),
        (first.parts[0], "call"),
        (first.live, "values"),
        (first.live.values[0], "dtype"),
        (first.cost, "flops"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
        assert not hasattr(thing, "__dict__"), "slotted"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (Source("layers.0.mlp", "modeling_x.py:3: y = f(x)"), "layers.0.mlp (modeling_x.py:3: y = f(x))"),
        (Source("layers.0.mlp"), "layers.0.mlp"),
        (Source("", "modeling_x.py:3"), "<model> (modeling_x.py:3)"),
        (Source(""), "<model>"),
    ],
)
def test_a_source_reads_well(source: Source, text: str) -> None:
    assert str(source) == text


def test_names_are_words_for_people() -> None:
    assert [str(g) for g in Granularity] == ["operator", "layer", "model", "auto"]
    assert [str(r) for r in Route] == ["packed", "generic"]
    assert all(str(reason).islower() for reason in CutReason)
