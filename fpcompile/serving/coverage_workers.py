"""Coverage rows in processes of their own, with limits on time and memory: a crash costs one row."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

SECONDS = 900.0
BYTES = 12 << 30


@dataclasses.dataclass(slots=True)
class _Worker:
    name: str
    process: Any
    receive: Connection
    deadline: float


def run_rows(
    names: Sequence[str], *, jobs: int, seconds: float = SECONDS, memory: int = BYTES
) -> Iterator[dict[str, Any]]:
    """Rows as plain data, in the order in which they are done.

    A worker that dies or runs past ``seconds`` gives a row with ``status`` ``crashed`` or ``timed out``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fpcompile.serving.coverage_checks"])
    todo, running = list(reversed(names)), list[_Worker]()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                running.append(_start(context, todo.pop(), seconds, memory))
            ready = set(wait([w.receive for w in running], timeout=1.0))
            for worker in [w for w in running if w.receive in ready or time.monotonic() > w.deadline]:
                running.remove(worker)
                yield _collect(worker, worker.receive in ready)
    finally:
        for worker in running:
            worker.process.kill()
            worker.process.join()


def _start(context: Any, name: str, seconds: float, memory: int) -> _Worker:
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, math.ceil(seconds), memory, send), daemon=True)
    process.start()
    send.close()
    return _Worker(name, process, receive, time.monotonic() + seconds)


def _collect(worker: _Worker, ready: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": worker.name, "status": "timed out"}
    if ready:
        try:
            row = worker.receive.recv()
        except EOFError:
            worker.process.join(5)
            row = {"name": worker.name, "status": "crashed", "why": f"exit code {worker.process.exitcode}"}
    worker.process.kill()
    worker.process.join()
    worker.receive.close()
    return row


def _work(name: str, seconds: int, memory: int, send: Connection) -> None:
    """One row, in a fresh process."""
    import resource

    import torch
    import transformers

    from fpcompile.serving.coverage_checks import row_of

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # also when nobody is left to stop it
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    send.send(dataclasses.asdict(row_of(name)))
    send.close()
