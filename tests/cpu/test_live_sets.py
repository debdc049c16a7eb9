"""Live sets, both directions: every value of a cut is needed, and nothing but values and cache is held.

Three accounts are compared at every cut: the plan's formulas, the tensors reachable from the run, and the net
bytes that torch's CPU allocator gave out since the run began (the profiler sees also what only C++ holds).
"""

from __future__ import annotations

import dataclasses
import gc
import types
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import PretrainedConfig

import fpcompile
from fpcompile.errors import CheckpointError, SegmentError, UsageError
from fpcompile.ir import PartKind, evaluate
from fpcompile.models.zoo import MAIN_ARCHS, sample_ids
from tests.cpu.support import DTYPES, cache_layers, cuts, finish, program_of, storage_bytes

ACCOUNTED = ("llama", "gemma2", "phi3", "gpt_neox", "mixtral", "gpt_oss")


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_without_any_one_live_value_a_checkpoint_does_not_resume(arch: str) -> None:
    program = program_of(arch)
    run = program.start(sample_ids(3))
    for _ in cuts(run):
        checkpoint = run.checkpoint()
        assert checkpoint.values
        for name in checkpoint.values:
            values = {n: place for n, place in checkpoint.values.items() if n != name}
            with pytest.raises(CheckpointError, match="live set") as caught:
                program.resume(dataclasses.replace(checkpoint, values=values))
            assert repr(name) in str(caught.value.expected)
            assert repr(name) not in str(caught.value.got)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_every_live_value_is_read_by_a_later_segment(arch: str) -> None:
    """The check above compares names; here the value is really gone, and a segment really misses it."""
    program = program_of(arch)
    run = program.start(sample_ids(3))
    for _ in cuts(run):
        checkpoint = run.checkpoint()
        for name in checkpoint.values:
            crippled = program.resume(checkpoint)
            del crippled.values[name]
            if crippled.done:
                assert name == program.plan.output
                continue
            with pytest.raises((KeyError, SegmentError)) as caught:
                finish(crippled, validate=False)
            assert repr(name) in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
@pytest.mark.parametrize("length", [1, 17])
def test_a_run_reaches_its_live_values_its_cache_and_the_program_only(
    arch: str, dtype: torch.dtype, length: int
) -> None:
    program = program_of(arch, dtype)
    run = program.start(sample_ids(length))
    for cut in cuts(run):
        run.suspend()
        held = {t.untyped_storage().data_ptr() for t in _reachable(run)}
        expected = [*run.values.values(), *_cache_tensors(run)]
        assert held == {t.untyped_storage().data_ptr() for t in expected}, f"cut {cut}"
        assert run.live_bytes == storage_bytes(run.values.values())
        assert run.kv_bytes == storage_bytes(_cache_tensors(run))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_live_bytes_are_those_of_the_plan(arch: str, dtype: torch.dtype) -> None:
    program = program_of(arch, dtype)
    for length, keep in ((1, 0), (2, 0), (17, 0), (17, 1), (40, 5)):
        run = program.start(sample_ids(length), logits_to_keep=keep)
        for cut in cuts(run):
            if cut:
                planned = program.segments[cut - 1].live.nbytes
                assert run.live_bytes == evaluate(planned, tokens=length, rows=keep or length), f"cut {cut}"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", MAIN_ARCHS)
@pytest.mark.parametrize("length", [1, 2, 17])
def test_the_cache_holds_no_more_than_its_keys_and_values(arch: str, dtype: torch.dtype, length: int) -> None:
    """Not, for example, the fused projection that they are views of."""
    program = program_of(arch, dtype)
    run = program.start(sample_ids(length))
    attended = 0
    for _ in cuts(run):
        tensors = _cache_tensors(run)
        assert run.kv_bytes == sum(t.nbytes for t in tensors)
        attended = max(attended, len(tensors) // 2)
    assert attended == sum(p.kind is PartKind.ATTENTION for s in program.segments for p in s.parts)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ACCOUNTED)
def test_the_allocator_gave_out_no_more_than_the_live_set_and_the_cache(arch: str) -> None:
    program = program_of(arch)
    ids = sample_ids(17)
    program(ids)  # whatever torch allocates at the first use of a kernel

    def paused(cut: int) -> fpcompile.Run:
        run = program.start(ids)
        for _ in range(cut):
            run.step()
        run.suspend()
        return run

    for cut in range(1, len(program.segments) + 1):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run = paused(cut)
        net = sum(event.self_cpu_memory_usage for event in seen.events())
        held = [*run.values.values(), *_cache_tensors(run)]
        theirs = ids.nbytes if any(t.data_ptr() == ids.data_ptr() for t in held) else 0
        assert net == storage_bytes(held) - theirs, f"cut {cut}"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["release", "delete", "finish"])
def test_memory_returns(how: str) -> None:
    program = program_of("gpt_oss")
    ids = sample_ids(33)
    finish(program.start(ids))
    gc.collect()
    before = _all_cpu_bytes()
    run: fpcompile.Run | None = program.start(ids)
    assert run is not None
    for _ in range(len(program.segments) // 2):
        run.step()
    held = [weakref.ref(t) for t in (*run.values.values(), *_cache_tensors(run))]
    assert _all_cpu_bytes() > before
    if how == "release":
        run.release()
    elif how == "finish":
        finish(run)
        run = None
    else:
        run = None
    gc.collect()
    assert [ref() for ref in held if ref() is not None] == []
    assert _all_cpu_bytes() == before


def test_a_released_run_says_so() -> None:
    run = program_of("llama").start(sample_ids(4))
    run.step()
    run.release()
    for action in (run.step, run.checkpoint, run.result):
        with pytest.raises(UsageError, match="released") as caught:
            action()
        assert caught.value.remedy
    assert run.live_bytes == run.kv_bytes == 0
    run.release()


def test_a_result_before_the_end_and_a_step_behind_it_are_refused() -> None:
    run = program_of("llama").start(sample_ids(4))
    with pytest.raises(UsageError, match="not done"):
        run.result()
    first = finish(run)
    with pytest.raises(UsageError, match="done"):
        run.step()
    assert torch.equal(run.result().logits, first.logits)


def _cache_tensors(run: fpcompile.Run) -> list[Tensor]:
    return [t for group in run.kv for kv in group.values() for t in (kv.keys, kv.values)]


_SHARED = (
    fpcompile.Program,
    PretrainedConfig,
    nn.Module,
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
)


def _reachable(root: object) -> list[Tensor]:
    """Tensors that ``root`` keeps alive by itself: not by way of the program, its model or code."""
    seen = {id(root)}
    todo: list[Any] = [root]
    found: list[Tensor] = []
    while todo:
        for referent in gc.get_referents(todo.pop()):
            if id(referent) not in seen and not isinstance(referent, _SHARED):
                seen.add(id(referent))
                (found if isinstance(referent, Tensor) else todo).append(referent)
    return found


def _all_cpu_bytes() -> int:
    """Bytes of every CPU tensor that Python knows of."""
    plain = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    tensors = [t for t in plain if not t.is_mkldnn]  # packed weights of other tests' programs have no storage
    return storage_bytes(t for t in tensors if t.device.type == "cpu")


def test_the_accounts_see_what_a_run_should_not_hold() -> None:
    """A stowaway is found by the walk and by the allocator's account."""
    program = program_of("llama")
    run = program.start(sample_ids(4))
    before = _all_cpu_bytes()
    run.values["stowaway"] = torch.zeros(1000)
    assert any(t.numel() == 1000 for t in _reachable(run))
    assert _all_cpu_bytes() - before == 4000


def test_cache_layers_match_what_a_run_accounts_for() -> None:
    program = program_of("llama")
    run = program.start(sample_ids(9))
    output = finish(run)
    assert run.kv_bytes == storage_bytes(t for layer in output.layers for t in layer)
    assert len(cache_layers(run.result().past_key_values)) == len(output.layers)
