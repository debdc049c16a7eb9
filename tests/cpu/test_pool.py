"""Keys and values in blocks of a pool: the bits of a bare run, in one extent, scattered, or moved away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fpcompile
from fpcompile.errors import InternalError, InvalidInputError
from fpcompile.executor.device import CpuDevice
from fpcompile.executor.offload import Parking
from fpcompile.executor.packed import PackedProgram
from fpcompile.executor.pool import KVPool, PooledKV, Room, layout_of
from tests.cpu.support import DTYPES, Outcome, differences, finish, outcome, program_of

BUDGETS = pytest.mark.filterwarnings("ignore::fpcompile.errors.BudgetWarning")


def _pool(program: fpcompile.Program, *, scattered: bool = False) -> KVPool:
    """A pool of 32 blocks, of which every second one is taken when ``scattered``."""
    assert isinstance(program, PackedProgram)
    pool = KVPool(layout_of(program.attention, program.dtype), 32, 16, torch.device("cpu"))
    if scattered:
        taken = pool.blocks.take(32)
        for block in taken[::2]:
            pool.blocks.give([block])
    else:
        pool.blocks.take(3)
    for store in (s for pair in pool.stores.values() for s in pair):
        store.fill_(torch.nan)  # what is not written must not matter
    return pool


def _seated(program: fpcompile.Program, pool: KVPool, ids: torch.Tensor, **kwargs: Any) -> tuple[Any, Room]:
    """A run whose cache lies in ``pool``."""
    run = program.start(ids, **kwargs)
    (group,) = run.call.layout.groups  # type: ignore[attr-defined]
    room = pool.room(group.batch, group.context)
    for layer, *_ in pool.layout.entries:
        past = run.kv[0].get(layer)
        kv = PooledKV(room, layer)
        run.kv[0][layer] = kv if past is None else kv.append(past.keys, past.values)
    return run, room


def _ids(length: int, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(100, (batch, length), generator=generator)


@BUDGETS
@pytest.mark.parametrize("scattered", [False, True], ids=["extent", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "gpt_oss"])
def test_a_pool_gives_the_bits_of_a_bare_run(arch: str, dtype: torch.dtype, scattered: bool) -> None:
    """Grouped heads, sliding windows and sinks; one prompt and two; in one launch a segment, and in tiles."""
    program = program_of(arch, dtype)
    for length, batch in ((17, 1), (40, 2), (128, 1)):
        for budget in (None, 0.05):
            ids = _ids(length, batch)
            bare = finish(program.start(ids, max_blocking_ms=budget))
            run, room = _seated(program, _pool(program, scattered=scattered), ids, max_blocking_ms=budget)
            assert room.contiguous is not scattered
            assert differences(finish(run), bare) == []


@pytest.mark.parametrize("scattered", [False, True], ids=["extent", "scattered"])
def test_a_cache_is_continued_in_a_pool(scattered: bool) -> None:
    program = program_of("qwen3")
    first = program(_ids(21)).past_key_values
    bare = finish(program.start(_ids(9), past_key_values=first))
    run, _ = _seated(program, _pool(program, scattered=scattered), _ids(9), past_key_values=first)
    assert differences(finish(run), bare) == []


def test_a_result_does_not_lie_in_the_pool() -> None:
    program = program_of("qwen3")
    pool = _pool(program)
    run, room = _seated(program, pool, _ids(17))
    got, bare = finish(run), finish(program.start(_ids(17)))
    room.release()
    for store in (s for pair in pool.stores.values() for s in pair):
        store.zero_()
    assert differences(got, bare) == []


def test_a_checkpoint_of_a_pooled_run_holds_its_own_tokens_only() -> None:
    program = program_of("qwen3")
    run, room = _seated(program, _pool(program), _ids(17))
    for _ in range(len(run.schedule) // 2):
        run.step()
    checkpoint = run.checkpoint()
    assert checkpoint.nbytes < 60_000, "not the pool's bytes"
    room.release()
    assert differences(finish(program.resume(checkpoint)), finish(program.start(_ids(17)))) == []


@pytest.mark.parametrize("arch", ["qwen3", "gemma3"])
def test_parked_at_every_cut_and_back_in_other_blocks(arch: str) -> None:
    program = program_of(arch)
    pool = _pool(program)
    run, room = _seated(program, pool, _ids(40))
    parking, copied = Parking(CpuDevice()), 0
    free, seen = pool.blocks.free, set[tuple[int, ...]]()
    while not run.done:
        seen.add(tuple(room.blocks))
        copied += parking.stash(run, [room]) + parking.park(run)
        room.free()
        assert (run.live_bytes, run.kv_bytes, pool.blocks.free) == (0, 0, free + 3)
        between = pool.blocks.take(1)
        room.take()
        pool.blocks.give(between)
        parking.restore([room])
        parking.bring_back()
        run.validate()
        run.step()
    assert len(seen) > 1, "blocks did move"
    assert differences(outcome(run.result()), finish(program.start(_ids(40)))) == []
    assert sum(s.nbytes for s in (room.stash,)) == 40 * pool.layout.token_bytes, "each token was copied once"


def test_only_what_is_new_is_copied() -> None:
    program = program_of("qwen3")
    run = program.start(_ids(40))
    parking = Parking(CpuDevice())
    for _ in range(len(run.schedule) // 2):
        run.step()
    held = run.live_bytes + run.kv_bytes
    assert parking.park(run) == held == parking.host_bytes([])
    parking.bring_back()
    assert run.live_bytes + run.kv_bytes == held
    assert parking.park(run) == 0, "nothing has changed"
    parking.bring_back()
    run.step()
    new = parking.new_bytes(run)
    assert 0 < new < held
    assert parking.park(run) == new
    parking.bring_back()
    parking.forget([])
    assert parking.host_bytes([]) == 0
    assert parking.new_bytes(run) == run.live_bytes + run.kv_bytes
    assert differences(finish(run), finish(program.start(_ids(40)))) == []


@BUDGETS
def test_a_run_is_parked_in_the_middle_of_a_tile_plan() -> None:
    """Outputs of which some tiles are written still change: they are copied each time."""
    program = program_of("qwen3")
    bare = finish(program.start(_ids(128), max_blocking_ms=0.02))
    run, parking = program.start(_ids(128), max_blocking_ms=0.02), Parking(CpuDevice())
    partial = 0
    while not run.done:
        partial += bool(run.partial)
        parking.park(run)
        parking.bring_back()
        run.step()
    assert partial, "the budget made tiles"
    assert differences(outcome(run.result()), bare) == []


def test_what_does_not_fit_is_refused() -> None:
    program = program_of("qwen3")
    pool = _pool(program)
    room = pool.room(1, 16)
    layer, heads, key, value = pool.layout.entries[0]
    kv = PooledKV(room, layer)
    with pytest.raises(InvalidInputError, match="do not fit the cache blocks"):
        kv.append(torch.zeros(1, heads, 17, key), torch.zeros(1, heads, 17, value))
    with pytest.raises(InvalidInputError, match="do not fit the cache blocks"):
        kv.append(torch.zeros(1, heads, 2, key).double(), torch.zeros(1, heads, 2, value).double())
    with pytest.raises(InternalError, match="has blocks already"):
        room.take()


def test_outcomes_of_different_runs_differ() -> None:
    """The comparison above can fail."""
    program = program_of("qwen3")
    a, b = finish(program.start(_ids(17))), finish(program.start(_ids(18)[:, :17]))
    assert isinstance(a, Outcome)
    assert differences(a, b)
