"""What Prometheus reads. Stems are those of other servers, under ``fpcompile:``; the front counts.

Times of requests are what the front sees, from the arrival on; the engine's own figures come from its records
and, when somebody reads, from its statistics. Counters of the worker are kept monotone by differences.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fpcompile.serving.server.messages import Ended, Record, Terms
from fpcompile.serving.server.streams import RefusedError, SlowReaderError

__all__ = ["Metrics", "RequestWatch", "newer"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_FINE = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_BLOCKING = tuple(round(1e-4 * 10 ** (step / 10), 7) for step in range(48))  # to 5 s, each 26 % more
_LABELS = ("model_name", "slo_class")
_BLOCKS = ("prefill", "decoding", "cached", "free")


def newer(before: Sequence[float], now: Sequence[float]) -> Sequence[float]:
    """The part of ``now`` that was not in ``before``: both are the newest values of one growing series."""
    if not before:
        return now
    tail = tuple(before[-3:])
    for end in range(len(now), 0, -1):
        if tuple(now[max(end - len(tail), 0) : end]) == tail[-end:]:
            return now[end:]
    return now


@final
class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._before: dict[str, Any] = {"blocking": (), "preemptions": 0, "busy": 0.0, "reused_tokens": 0}
        self._looked = time.monotonic()

        def histogram(name: str, about: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"fpcompile:{name}", about, _LABELS, registry=self.registry, buckets=buckets)

        def counter(name: str, about: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"fpcompile:{name}", about, labels, registry=self.registry)

        def gauge(name: str, about: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"fpcompile:{name}", about, labels, registry=self.registry)

        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self.itl = histogram("inter_token_latency_seconds", "Between tokens of one request.", _FINE)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first launch.")
        self.prefill = histogram("request_prefill_time_seconds", "From the first launch to the first token.")
        self.suspended = histogram("request_suspended_time_seconds", "Paused, over all preemptions.")
        self.success = counter(
            "request_success", "Requests that ended well.", ("model_name", "finished_reason")
        )
        self.prompt = counter("prompt_tokens", "Tokens of prompts.", ("model_name",))
        self.generated = counter("generation_tokens", "Tokens made.", ("model_name",))
        self.rejected = counter("requests_rejected", "Requests that were not served.", ("reason",))
        self.failed = counter("requests_failed", "Requests that the engine failed on.", ("reason",))
        self.cancelled = counter("requests_cancelled", "Requests whose client went away or had enough.")
        self.slo = counter(
            "slo_requests", "Requests with a promise, by whether it was kept.", (*_LABELS, "slo", "met")
        )
        self.attainment = gauge("slo_attainment", "Share of promises kept.", (*_LABELS, "slo"))
        self.blocking = Histogram(
            "fpcompile:blocking_time_seconds", "From asking for a preemption to a free device.",
            registry=self.registry, buckets=_BLOCKING,
        )  # fmt: skip
        self.preemptions = counter("num_preemptions", "Runs that gave way.")
        self.busy = counter("device_busy_seconds", "Time in launches.")
        self.idle = gauge("device_idle_share", "Share of the time since the last reading without launches.")
        self.live = gauge("num_requests_live", "In the server, in whatever state.")
        self.running = gauge("num_requests_running", "On the device.")
        self.waiting = gauge("num_requests_waiting", "Not launched yet.")
        self.paused = gauge("num_requests_paused", "Paused.")
        self.paused_bytes = gauge("paused_kv_bytes", "What paused runs hold: live values and caches.")
        self.decoding = gauge("num_requests_decoding", "Behind their first token.")
        self.decoding_bytes = gauge("decoding_kv_bytes", "What decoding requests hold.")
        self.host_bytes = gauge("host_kv_bytes", "What is moved to the host.")
        self.kv = gauge("kv_cache_usage_perc", "Share of the pool's blocks in use; 0 without a pool.")
        self.blocks = gauge("kv_cache_blocks", "Blocks of the pool, by what holds them.", ("state",))
        self.reused = counter("prefix_cache_hit_tokens", "Tokens of prompts that were in the cache.")
        self.error = gauge("predictor_error_ratio", "Mean of |predicted - measured| / measured.")
        self.judged = gauge("predictor_judged", "Runs whose prediction was compared.")
        self.stale = counter("stale_statistics", "Readings at which the worker did not answer.")
        self._kept: dict[tuple[str, str, str], list[int]] = {}

    def refused(self, reason: str) -> None:
        """A request was turned away."""
        self.rejected.labels(reason).inc()

    def judge(self, model: str, klass: str, slo: str, met: bool) -> None:
        """A promise was kept, or not."""
        kept = self._kept.setdefault((model, klass, slo), [0, 0])
        kept[0] += met
        kept[1] += 1
        self.slo.labels(model, klass, slo, str(met).lower()).inc()
        self.attainment.labels(model, klass, slo).set(kept[0] / kept[1])

    def update(self, statistics: Mapping[str, Any]) -> None:
        """Take over what the worker says now."""
        before, now = self._before, time.monotonic()
        for value in newer(before["blocking"], statistics["blocking"]):
            self.blocking.observe(value)
        self.preemptions.inc(max(statistics["preemptions"] - before["preemptions"], 0))
        busy = max(statistics["busy"] - before["busy"], 0.0)
        self.busy.inc(busy)
        if now > self._looked:
            self.idle.set(min(max(1 - busy / (now - self._looked), 0.0), 1.0))
        self.running.set(statistics["running"])
        self.waiting.set(statistics["waiting"])
        self.paused.set(statistics["paused"])
        self.paused_bytes.set(statistics["paused_bytes"])
        self.error.set(statistics["prediction_error"])
        self.judged.set(statistics["prediction_count"])
        self.decoding.set(statistics["decoding"])
        self.decoding_bytes.set(statistics["decoding_bytes"])
        self.host_bytes.set(statistics["host_bytes"])
        self.reused.inc(max(statistics["reused_tokens"] - before["reused_tokens"], 0))
        if statistics["kv_usage"] is not None:
            self.kv.set(statistics["kv_usage"])
        for state in _BLOCKS:
            self.blocks.labels(state).set(statistics[f"blocks_{state}"])
        self._before, self._looked = dict(statistics), now

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


@final
class RequestWatch:
    """Counts one request for :class:`Metrics`; see :class:`fpcompile.serving.server.streams.Watch`."""

    def __init__(
        self, metrics: Metrics, model: str, terms: Terms, prompt: int, *, vector: bool = False
    ) -> None:
        self._metrics, self._model, self._terms = metrics, model, terms
        self._class = terms.slo_class or "none"
        self._gaps = metrics.itl.labels(model, self._class)
        self._made = metrics.generated.labels(model)
        self._vector = vector
        self._last: float | None = None
        self._count = 0
        self._late = False
        self._left = False
        self.ttft: float | None = None
        self.record: Record | None = None
        metrics.prompt.labels(model).inc(prompt)

    def tokens(self, count: int) -> None:
        """So many have come now."""
        now, terms = time.monotonic(), self._terms
        for _ in range(count):
            if self._last is None:
                self._first(now)
            else:
                self._gaps.observe(now - self._last)
                if terms.tbt_slo is not None:
                    due = terms.arrival + (terms.ttft_slo or 0.0) + self._count * terms.tbt_slo
                    paced = terms.ttft_slo is None or now <= due
                    self._late |= not paced or now - self._last > 3 * terms.tbt_slo
            self._last = now
            self._count += 1
        self._made.inc(count)

    def left(self, reason: str | None) -> None:
        """The reader went; with a ``reason`` it has got what it wanted."""
        self._left = True
        if reason is None:
            self._metrics.cancelled.inc()
        else:
            self._succeeded(reason)

    def ended(self, ended: Ended) -> None:
        """It ended well, or was cancelled."""
        metrics, labels = self._metrics, (self._model, self._class)
        self.record = record = ended.record
        if self._vector and ended.vector is not None and not self._left:
            self._first(time.monotonic())
        if record.queued is not None:
            metrics.queue.labels(*labels).observe(record.queued)
            if record.ttft is not None:
                metrics.prefill.labels(*labels).observe(max(record.ttft - record.queued, 0.0))
        metrics.suspended.labels(*labels).observe(record.suspended)
        if self._left:
            pass  # counted when it went
        elif ended.finish_reason is None:
            metrics.cancelled.inc()
        else:
            self._succeeded(ended.finish_reason)
        if self._terms.tbt_slo is not None and self._count > 1:
            metrics.judge(*labels, "tbt", not self._late)

    def failed(self, error: Exception) -> None:
        """It ended otherwise."""
        if self._left:
            return
        because = error.refused.because if isinstance(error, RefusedError) else "gone"
        if isinstance(error, SlowReaderError):
            self._metrics.cancelled.inc()
            return
        if because in ("full", "rejected", "closed"):
            self._metrics.refused(because)
        elif because != "invalid":
            self._metrics.failed.labels(because).inc()
        if self._last is None and self._terms.ttft_slo is not None and because != "invalid":
            self._metrics.judge(self._model, self._class, "ttft", False)

    def _succeeded(self, reason: str) -> None:
        self._metrics.e2e.labels(self._model, self._class).observe(time.monotonic() - self._terms.arrival)
        self._metrics.success.labels(self._model, reason).inc()

    def _first(self, now: float) -> None:
        self.ttft = now - self._terms.arrival
        self._metrics.ttft.labels(self._model, self._class).observe(self.ttft)
        if self._terms.ttft_slo is not None:
            self._metrics.judge(self._model, self._class, "ttft", self.ttft <= self._terms.ttft_slo)
