"""A server of the tests: ``fpcompile serve`` in a process of its own, on a free loopback port.

Processes are ended by their id when the test that asked for them ends; every wait has a bound.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 90.0  # seconds; tests share a small machine

_COSTS = tempfile.TemporaryDirectory(prefix="fpcompile-costs-")  # measured by the first server of the session

COMMAND = [sys.executable, "-c", "from fpcompile.cli import main; main()", "serve"]


class Served:
    """A running server. ``url`` without a slash at the end; ``lines``: its log so far.

    ``group``: its processes are a group of their own.
    """

    def __init__(
        self,
        *arguments: str,
        key: str | None = None,
        environment: dict[str, str] | None = None,
        group: bool = False,
    ) -> None:
        self._key = key
        known = {**os.environ, "OMP_NUM_THREADS": "1", "FPCOMPILE_CACHE": _COSTS.name, **(environment or {})}
        self.process = subprocess.Popen(
            [*COMMAND, "--port", "0", *arguments], cwd=ROOT, env=known, stderr=subprocess.PIPE, text=True,
            start_new_session=group,
        )  # fmt: skip
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            found = re.search(r"listening on (http://\S+)", self.wait_for("listening on"))
            assert found is not None
            self.url = found.group(1)
        except BaseException:
            self.end()
            raise

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip("\n"))
                self._news.notify_all()

    def wait_for(self, text: str) -> str:
        """The first line of the log with ``text``."""
        until = time.monotonic() + PATIENCE
        seen = 0
        with self._news:
            while True:
                for line in self.lines[seen:]:
                    if text in line:
                        return line
                seen = len(self.lines)
                left = until - time.monotonic()
                ended = self.process.poll() is not None and not self._reader.is_alive()
                if left <= 0 or ended:
                    log = "\n".join(self.lines)
                    raise AssertionError(f"the server has not said {text!r}:\n{log}")
                self._news.wait(min(left, 0.5))

    def client(self, key: str | None = None) -> httpx.Client:
        """For plain requests."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of ``name`` (without ``fpcompile:``) that have these labels."""
        with self.client(self._key) as client:
            text = client.get("/metrics").text
        total = 0.0
        for line in text.splitlines():
            found = re.fullmatch(rf"fpcompile:{name}(?:{{(.*)}})? (\S+)", line)
            if found and all(f'{key}="{value}"' in (found.group(1) or "") for key, value in labels.items()):
                total += float(found.group(2))
        return total

    def settles(self, name: str, value: float) -> None:
        """Wait until a metric has this value."""
        until = time.monotonic() + PATIENCE
        while (now := self.metric(name)) != value:
            assert time.monotonic() < until, f"{name} is {now}, not {value}"
            time.sleep(0.05)

    def idle(self) -> None:
        """Wait until nothing is live and nothing is held, in the front as in the engine."""
        for state in ("live", "running", "waiting", "paused", "decoding"):
            self.settles(f"num_requests_{state}", 0)
        for held in ("paused", "decoding", "host"):
            self.settles(f"{held}_kv_bytes", 0)

    def signal(self, number: int) -> None:
        """To the front."""
        self.process.send_signal(number)

    def worker(self) -> int:
        """Process id of the engine."""
        return int(self.wait_for("the engine's process is").rpartition(" ")[2])

    def children(self) -> list[Any]:
        """All processes that the front has started."""
        import psutil

        return list(psutil.Process(self.process.pid).children(recursive=True))

    def end(self) -> int:
        """End the process, if it has not ended; its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(30)
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait(30)
        self._reader.join(30)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


@contextlib.contextmanager
def served(*arguments: str, ready: bool = True, **options: Any) -> Iterator[Served]:
    """A server for a block; ``ready``: after its warm-up."""
    server = Served(*arguments, **options)
    try:
        if ready:
            server.wait_for("ready: ")
        yield server
    finally:
        server.end()
