"""``fpcompile serve``: the options, and what they make."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from fpcompile.errors import UsageError

__all__ = ["serve"]


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Hub id or folder; NAME=MODEL names it.")
    ] = None,
    random_weights: Annotated[
        list[str] | None,
        typer.Option(help="tiny (built-in LLM and embedder), a demo model, or a configuration; repeatable."),
    ] = None,
    embed: Annotated[
        list[str] | None,
        typer.Option(help="Name of a model for embeddings; else by architecture."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    config: Annotated[
        Path | None, typer.Option(help="SLO classes, keys and floors, in TOML or YAML; see docs/serving.md.")
    ] = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Serve an address that others can reach without keys.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    policy: Annotated[str, typer.Option(help="Scheduling policy.")] = "fpcompile",
    max_blocking_ms: Annotated[
        float, typer.Option(min=0, help="Bound of a launch's predicted time; 0: each segment is a launch.")
    ] = 20.0,
    granularity: Annotated[str, typer.Option(help="operator, layer, model or auto.")] = "operator",
    backend: Annotated[str, typer.Option(help="eager or inductor.")] = "eager",
    weights: Annotated[str, typer.Option(help="shared or packed.")] = "shared",
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads of the engine.")] = None,
    pooling: Annotated[str | None, typer.Option(help="Of embedders: mean, cls or last.")] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait to be launched.")] = 1024,
    max_queue_s: Annotated[float | None, typer.Option(help="Reject what has waited so many seconds.")] = None,
    tbt_slo: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Seconds between tokens, of requests that name none; else two steps and a launch at most.",
        ),
    ] = None,
    decode_first: Annotated[
        bool,
        typer.Option("--decode-first/--prefill-first", help="Which SLO is kept if not both: TBT or TTFT."),
    ] = True,
    piggyback: Annotated[
        bool,
        typer.Option(help="Decode steps may be executed with short prompts: cheaper, agrees to rounding."),
    ] = True,
    max_decode_batch: Annotated[int, typer.Option(min=1, help="Sequences of a decode step.")] = 256,
    kv_memory: Annotated[
        int | None,
        typer.Option(min=1, help="Bytes of the pool of cache blocks; else each run owns its cache."),
    ] = None,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache", help="Reuse prefixes; needs --kv-memory.")
    ] = False,
    memory_budget: Annotated[
        int | None, typer.Option(min=0, help="Bytes for paused and decoding requests, besides blocks.")
    ] = None,
    host_memory: Annotated[
        int | None, typer.Option(min=0, help="Host bytes for what is moved there.")
    ] = None,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="A request's bits do not depend on others.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="File for the log of decisions, see fpcompile replay.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Tokens of prompt and answer.")] = None,
    max_choices: Annotated[int, typer.Option(min=1, help="n x prompts of a request.")] = 16,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Size of a request's body.")] = 4 << 20,
    max_live: Annotated[int, typer.Option(min=1, help="Requests in the server at once.")] = 1024,
    max_connections: Annotated[int, typer.Option(min=1, help="Connections at once.")] = 2048,
    max_buffered_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens kept for a slow reader before its request is ended.")
    ] = 4096,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds that a request may take.")] = None,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish in after SIGTERM.")] = 30.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts into the log.")] = False,
) -> None:
    """Serve models over OpenAI's API, the engine in a process of its own.

    The admin key, for /metrics, /pause and /resume, comes from the configuration or from FPCOMPILE_ADMIN_KEY.
    """
    _need_packages()
    from fpcompile.serving.server.config_file import read_config
    from fpcompile.serving.server.models import parse_models
    from fpcompile.serving.server.promises import Accounts, digest_of
    from fpcompile.serving.server.run import serve as run
    from fpcompile.serving.server.settings import EngineSettings, Limits, ServerSettings

    accounts, admin = read_config(config) if config is not None else (Accounts(), None)
    if key := os.environ.get("FPCOMPILE_ADMIN_KEY"):
        admin = digest_of(key)
    if dtype not in (known := ("auto", "float32", "bfloat16", "float16")):
        raise UsageError("unknown dtype", expected=", ".join(known), got=dtype)
    options: dict[str, Any] = {
        "max_queue": max_queue, "tbt_slo": tbt_slo, "decode_first": decode_first, "kv_memory": kv_memory,
        "max_decode_batch": max_decode_batch, "prefix_cache": prefix_cache, "memory_budget": memory_budget,
        "host_memory": host_memory, "deterministic": deterministic, "piggyback": piggyback,
    }  # fmt: skip
    if record is not None:
        options["record"] = record
    if max_queue_s is not None:
        options["max_queue_s"] = max_queue_s
    run(
        ServerSettings(
            EngineSettings(
                parse_models(models or [], random_weights or [], embed or []),
                device=device,
                dtype=None if dtype == "auto" else dtype,
                granularity=granularity,
                weights=weights,
                backend=backend,
                max_blocking_ms=max_blocking_ms or None,
                policy=policy,
                threads=threads,
                pooling=pooling,
                options=options,
            ),
            host=host,
            port=port,
            limits=Limits(
                body_bytes=max_body_bytes,
                tokens=max_model_len,
                choices=max_choices,
                live=max_live,
                connections=max_connections,
                buffered_tokens=max_buffered_tokens,
                request_s=request_timeout,
            ),
            accounts=accounts,
            admin_digest=admin,
            open=open_,
            drain_timeout=drain_timeout,
            log_prompts=log_prompts,
        )
    )


def _need_packages() -> None:
    try:
        import fastapi
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise UsageError(
            "the server's packages are not installed", got=str(error), remedy="pip install 'fpcompile[serve]'"
        ) from error
    del fastapi, prometheus_client, uvicorn
