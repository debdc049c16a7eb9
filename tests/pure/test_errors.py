"""Errors: which built-in class catches them, what their message says, and that they survive pickling."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle

import pytest

from fpcompile import errors
from fpcompile.errors import (
    BudgetError,
    BudgetWarning,
    CheckpointError,
    DeviceFailedError,
    EngineClosedError,
    FpcompileError,
    InternalError,
    InvalidInputError,
    ProgramFileError,
    QueueFullError,
    RequestCancelledError,
    RequestRejectedError,
    RequestTimeoutError,
    SegmentError,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)


def _examples() -> list[FpcompileError]:
    """One error of each concrete class, with every field that its constructor takes."""
    return [
        FpcompileError("what", expected="e", got="g", where="w", remedy="r"),
        UsageError("what", expected="e", got="g", where="w", remedy="r"),
        InvalidInputError("input_ids is empty", expected="at least one token", got="shape [1, 0]"),
        UnknownNameError("policy", "sedf", known=("s-edf", "fcfs")),
        CheckpointError(
            "the checkpoint file is truncated", expected="120 bytes", got="64 bytes", where="a.ckpt"
        ),
        ProgramFileError("saved for another device", expected="cuda:0", got="cpu", where="program"),
        BudgetError("cannot be kept", segment="lm_head", seconds=0.02, budget=0.01, smallest_ms=20.0),
        EngineClosedError("the engine is closed", remedy="create another one"),
        QueueFullError("the queue is full", retry_after=0.25, got="1024 requests waiting"),
        UnsupportedModelError(
            "cannot segment XModel",
            reason="sums over tokens",
            node="sum_1",
            module_path="model.layers.0",
            source_line="modeling_x.py:12",
            remedy="use another architecture",
        ),
        SegmentError("layers.0.mlp", cause=KeyError("w"), node="mm_3", source_line="modeling_x.py:40"),
        RequestCancelledError("r1", where="segment 3 of 9"),
        RequestRejectedError("r2", reason="waited longer than max_queue_s = 5 s", remedy="raise max_queue_s"),
        RequestTimeoutError("r3", timeout=2.5),
        DeviceFailedError("cuda:0", cause=RuntimeError("illegal memory access")),
        InternalError("live set differs", expected="{a}", got="{a, b}", where="cut 3"),
    ]


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (UsageError, ValueError),
        (InvalidInputError, UsageError),
        (UnknownNameError, UsageError),
        (CheckpointError, UsageError),
        (EngineClosedError, UsageError),
        (EngineClosedError, RuntimeError),
        (QueueFullError, RuntimeError),
        (UnsupportedModelError, NotImplementedError),
        (SegmentError, RuntimeError),
        (RequestCancelledError, concurrent.futures.CancelledError),
        (RequestRejectedError, RuntimeError),
        (RequestTimeoutError, TimeoutError),
        (DeviceFailedError, RuntimeError),
        (InternalError, RuntimeError),
        (BudgetWarning, UserWarning),
    ],
)
def test_a_caller_who_does_not_know_the_package_can_catch_it(
    cls: type[Exception], builtin: type[Exception]
) -> None:
    assert issubclass(cls, builtin)


def test_overload_is_not_misuse() -> None:
    assert not issubclass(QueueFullError, UsageError)


def test_every_class_of_the_module_is_an_fpcompile_error_or_a_warning_and_has_an_example() -> None:
    classes = {getattr(errors, name) for name in errors.__all__}
    assert {cls for cls in classes if not issubclass(cls, FpcompileError)} == {BudgetWarning}
    assert {type(error) for error in _examples()} == classes - {BudgetWarning}


def test_message_has_every_field_in_order() -> None:
    error = InvalidInputError(
        "bad ids", expected="int64", got="float32", where="submit()", remedy="cast them"
    )
    assert str(error) == "bad ids\n  expected: int64\n  got: float32\n  where: submit()\n  remedy: cast them"


def test_message_leaves_out_what_is_not_set() -> None:
    assert str(InvalidInputError("bad ids", got="float32")) == "bad ids\n  got: float32"
    assert str(InvalidInputError()) == "InvalidInputError"


def test_unknown_name_lists_the_legal_ones_and_suggests_the_nearest() -> None:
    error = UnknownNameError("policy", "sedf", known=("s-edf", "fcfs"))
    assert error.known == ("fcfs", "s-edf")
    assert error.expected == "one of 'fcfs', 's-edf'"
    assert error.got == "'sedf'"
    assert error.remedy == "did you mean 's-edf'?"


def test_unknown_name_that_resembles_nothing_suggests_nothing() -> None:
    assert UnknownNameError("backend", 7, known=("eager",)).remedy is None
    assert UnknownNameError("backend", "x", known=()).expected == "no backend is registered"


def test_queue_full_says_when_to_come_back() -> None:
    error = QueueFullError("full", retry_after=0.1234567)
    assert error.retry_after == 0.1234567
    assert error.remedy == "submit again in 0.123 s"


def test_unsupported_model_locates_the_node() -> None:
    error = UnsupportedModelError(
        "no", reason="loops over positions", node="n1", module_path="a.b", source_line="m.py:3"
    )
    assert error.where == "node n1, module a.b, m.py:3"
    assert error.got == error.reason == "loops over positions"
    assert UnsupportedModelError("no", reason="r").where is None


def test_segment_error_keeps_its_cause() -> None:
    cause = ZeroDivisionError("by zero")
    with pytest.raises(SegmentError) as caught:
        raise SegmentError("layers.3.mlp", cause=cause, node="div_2")
    assert caught.value.__cause__ is cause
    assert caught.value.got == "ZeroDivisionError: by zero"
    assert "layers.3.mlp" in str(caught.value)
    assert "div_2" in str(caught.value)


@pytest.mark.parametrize("error", _examples(), ids=lambda error: type(error).__name__)
def test_pickle_and_copy_keep_everything(error: FpcompileError) -> None:
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert twin.args == error.args
        assert vars(twin) == vars(error)
