"""What the worker serves from: models, programs and one engine, made from the settings.

One engine holds every model, so that language models and embedders share one bound on blocking time.
"""

from __future__ import annotations

import json
import math
import threading
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import GenerationConfig

from fpcompile.api import segment
from fpcompile.engine.engine import Engine
from fpcompile.engine.generation import DEFAULT_TBT_SLO
from fpcompile.engine.handle import Handle
from fpcompile.errors import InvalidInputError
from fpcompile.executor.program import Program
from fpcompile.serving.server.messages import Embed, Facts, Generate, Sampling, Terms
from fpcompile.serving.server.models import build_model, kind_of, load_config
from fpcompile.serving.server.sampling import config_for, processors_for
from fpcompile.serving.server.settings import EngineSettings, ModelSpec

__all__ = ["EngineBackend", "Gate", "build", "pooled"]

_POOLINGS = {
    "mean_tokens": "mean", "mean": "mean", "mean_sqrt_len_tokens": "mean", "cls_token": "cls", "cls": "cls",
    "lasttoken": "last",
}  # fmt: skip
"""sentence-transformers' names; vectors get length 1, so that mean_sqrt_len is mean."""
_WARM = 16  # tokens of the prompts that warm a program up


@final
class Gate:
    """The engine's hook behind each launch: adds up device time, and holds the device while it is closed."""

    def __init__(self) -> None:
        self.busy = 0.0
        self._open = threading.Event()
        self._open.set()

    def __call__(self, run: object, segment: object, start: float, end: float) -> None:
        """Called by the device thread; times in seconds."""
        self.busy += end - start
        if not self._open.is_set():
            self._open.wait()

    @property
    def closed(self) -> bool:
        """Whether the device is held."""
        return not self._open.is_set()

    def close(self) -> None:
        """Hold the device at the next cut; what runs is kept as it is."""
        self._open.clear()

    def open(self) -> None:
        """Let it go on."""
        self._open.set()


@final
class EngineBackend:
    """The engine, the facts of its models, and how requests become submissions."""

    def __init__(
        self,
        engine: Engine,
        gate: Gate,
        programs: Mapping[str, Program],
        facts: Mapping[str, Facts],
        generation: Mapping[str, GenerationConfig],
        pooling: Mapping[str, str],
        tbt_slo: float | None = None,
    ) -> None:
        self._tbt_slo = tbt_slo
        self.engine, self.gate, self.programs, self.facts = engine, gate, programs, facts
        self._generation, self._pooling = generation, pooling

    def generate(self, ask: Generate) -> Handle:
        """Submit; tokens come from the handle."""
        config = config_for(
            self._generation[ask.program],
            ask.sampling,
            ask.max_new_tokens,
            self.facts[ask.program].vocabulary,
        )
        processors = processors_for(ask.sampling, len(ask.ids))
        return self.engine.submit(
            _tensor(ask.ids),
            program=ask.program,
            request_id=ask.id,
            generation_config=config,
            max_new_tokens=ask.max_new_tokens,
            seed=ask.sampling.seed,
            logits_processor=processors or None,
            tbt_slo=self._between_tokens(ask.terms),
            **_terms(ask.terms),
        )

    def _between_tokens(self, terms: Terms) -> float | None:
        """Asking for nothing gets no more than asking for the floor, where there is one."""
        if terms.tbt_slo is not None:
            return terms.tbt_slo
        if self._tbt_slo is None and not terms.min_tbt:
            return None
        return max(self._tbt_slo or DEFAULT_TBT_SLO, terms.min_tbt)

    def embed(self, ask: Embed) -> Handle:
        """Submit; the vector is :meth:`vector` of the result."""
        return self.engine.submit(
            _tensor(ask.ids), program=ask.program, request_id=ask.id, **_terms(ask.terms)
        )

    def vector(self, program: str, output: Any) -> bytes:
        """The vector of a result: little-endian float32, of length 1."""
        vector = pooled(output.last_hidden_state, self._pooling[program])
        values: bytes = vector.cpu().numpy().astype("<f4").tobytes()
        return values

    def statistics(self) -> dict[str, Any]:
        """Counts of the engine, and seconds of device time so far."""
        s = self.engine.statistics()
        return {
            "running": s.running,
            "waiting": s.waiting,
            "paused": s.paused,
            "paused_bytes": s.paused_bytes,
            "preemptions": s.preemptions,
            "blocking": s.blocking,
            "prediction_count": s.prediction_error.count,
            "prediction_error": s.prediction_error.mean_absolute,
            "busy": self.gate.busy,
            "decoding": s.decoding,
            "decoding_bytes": s.decoding_bytes,
            "host_bytes": s.memory.host_bytes,
            "kv_usage": s.memory.blocks_used / s.memory.blocks if s.memory.blocks else None,
            "blocks_prefill": max(s.memory.blocks_used - s.memory.blocks_decoding, 0),
            "blocks_decoding": s.memory.blocks_decoding,
            "blocks_cached": s.memory.blocks_cached,
            "blocks_free": s.memory.blocks_free,
            "reused_tokens": s.memory.reused_tokens,
        }

    def health(self) -> tuple[bool, str]:
        """What the engine's watchdog says; a device that is held on purpose is well."""
        if self.gate.closed:
            return True, "paused"
        health = self.engine.health()
        return health.healthy, health.reason

    def pause(self) -> None:
        """Hold the device; what is live is kept."""
        self.gate.close()

    def resume(self) -> None:
        """Go on."""
        self.gate.open()

    def close(self) -> None:
        """End the engine; what is live is cancelled."""
        self.gate.open()
        self.engine.close(drain=False, timeout=10.0)


def _tensor(ids: Sequence[int]) -> torch.Tensor:
    """``[1, n]``; of an array without a Python object for each id."""
    return torch.frombuffer(array("q", ids), dtype=torch.int64)[None]


def _terms(terms: Terms) -> dict[str, Any]:
    return {
        "ttft_slo": terms.ttft_slo,
        "arrival": terms.arrival,
        "tenant": terms.tenant,
        "slo_class": terms.slo_class,
        "timeout": terms.timeout,
    }


def pooled(hidden: torch.Tensor, how: str) -> torch.Tensor:
    """One vector of length 1, ``[width]`` in fp32, out of ``hidden [1, tokens, width]``."""
    states = hidden[0].float()
    vector = states.mean(0) if how == "mean" else states[0 if how == "cls" else -1]
    return torch.nn.functional.normalize(vector, dim=0)


def build(settings: EngineSettings) -> EngineBackend:
    """Load, compile and warm everything. Raises typed errors."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = _device(settings.device)
    programs: dict[str, Program] = {}
    facts, generation, pooling = {}, {}, {}
    for spec in settings.models:
        config = load_config(spec)
        kind = kind_of(spec, config)
        dtype = None if settings.dtype in (None, "auto") else getattr(torch, settings.dtype or "")
        model = build_model(spec, kind, config, device, dtype)
        programs[spec.name] = segment(
            model,
            granularity=settings.granularity,
            max_blocking_ms=settings.max_blocking_ms,
            weights=settings.weights,
            backend=settings.backend,
        )
        positions = (getattr(model.config, "max_position_embeddings", None), programs[spec.name].max_tokens)
        longest = min((limit for limit in positions if limit is not None), default=None)
        embeddings: Any = model.get_input_embeddings()
        vocabulary = int(embeddings.weight.shape[0])
        if kind == "generate":
            generation[spec.name] = model.generation_config
            facts[spec.name] = Facts(kind, vocabulary, longest)
        else:
            pooling[spec.name] = settings.pooling or _pooling_of(spec)
            facts[spec.name] = Facts(kind, vocabulary, longest, int(model.config.hidden_size))
    gate = Gate()
    engine = Engine(
        programs,
        policy=settings.policy,
        max_blocking_ms=settings.max_blocking_ms,
        on_segment=gate,
        record_timeline=False,
        **settings.options,
    )
    tbt_slo = settings.options.get("tbt_slo")
    backend = EngineBackend(engine, gate, programs, facts, generation, pooling, tbt_slo)
    try:
        _warm(backend)
    except BaseException:
        engine.close(drain=False)
        raise
    return backend


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise InvalidInputError("unknown device", expected="auto, cpu, cuda or cuda:N", got=name) from error


def _pooling_file(source: str) -> Path | None:
    """Of a folder or hub id, None when it has none; raises OSError when the hub does not say."""
    name = "1_Pooling/config.json"
    folder = Path(source).expanduser()
    if folder.exists():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError as error:  # no connection: perhaps it was not there when there was one
        if try_to_load_from_cache(source, name) is _CACHED_NO_EXIST:
            return None
        raise OSError(str(error)) from error
    except EntryNotFoundError:
        return None


def _pooling_of(spec: ModelSpec) -> str:
    """What a repository or folder of sentence-transformers says; mean for any other.

    Raises :class:`InvalidInputError` for a mode that is not served, and where nobody can say.
    """
    if spec.random_weights:
        return "mean"
    try:
        path = _pooling_file(spec.source)
        fields = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"how model {spec.source!r} pools is not known",
            expected="its 1_Pooling/config.json, or the news that it has none",
            got=" ".join(str(error).split()),
            remedy="say --pooling mean, cls or last",
        ) from error
    modes = [
        name.removeprefix("pooling_mode_") for name, on in fields.items() if on is True and "mode" in name
    ]
    modes += [mode for mode in (fields.get("pooling_mode"),) if isinstance(mode, str)]
    if path is None or (len(modes) == 1 and modes[0] in _POOLINGS):
        return _POOLINGS[modes[0]] if modes else "mean"
    raise InvalidInputError(
        f"model {spec.source!r} pools in a way that is not served",
        expected=f"one of {', '.join(_POOLINGS)}",
        got=", ".join(modes) or "none",
        remedy="say --pooling mean, cls or last, if that is what you want",
    )


def _warm(backend: EngineBackend) -> None:
    """Short requests to every model: what compiles or allocates lazily does it now."""
    arrival = backend.engine.now()
    for name, facts in backend.facts.items():
        longest = facts.max_tokens or _WARM
        if facts.kind == "generate":
            sampling = Sampling(temperature=0, ignore_eos=True)
            ids = (1,) * max(min(_WARM, longest - 2), 1)
            ask = Generate(f"warm-{name}", name, ids, 2 if longest > 2 else 1, sampling, Terms(arrival))
            backend.generate(ask).result()
            continue
        for length in sorted({1, 2, min(_WARM, longest)}):  # one and two tokens may have graphs of their own
            ask_vector = Embed(f"warm-{name}-{length}", name, (1,) * length, Terms(arrival))
            _check_vector(backend, name, backend.embed(ask_vector).result())


def _check_vector(backend: EngineBackend, name: str, output: Any) -> None:
    if not hasattr(output, "last_hidden_state"):
        raise InvalidInputError(
            f"model {name!r} has no vectors",
            expected="a model that gives last_hidden_state",
            got=type(output).__name__,
        )
    if not math.isfinite(sum(memoryview(backend.vector(name, output)).cast("f"))):
        raise InvalidInputError(f"model {name!r} gives no finite vectors", got="NaN or inf")
