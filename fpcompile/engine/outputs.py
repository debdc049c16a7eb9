"""Tensors that cross between the streams of callers and of the device: a run's inputs, a model's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache

from fpcompile.engine.programs import RunLike
from fpcompile.executor.run import Run
from fpcompile.executor.slices import Chunks, Sliced

__all__ = ["inputs_of", "tensors_in"]


def inputs_of(run: RunLike | Sliced) -> Iterator[Tensor]:
    """Every tensor that a compiled run holds before its first launch: made or given by who started it."""
    if isinstance(run, Chunks):
        run = run.sliced.run
    elif isinstance(run, Sliced):
        run = run.run
    if isinstance(run, Run):
        yield from tensors_in((run.values, run.partial, run.call.tensors()))
        for layers in run.kv:
            for kv in layers.values():
                yield from (kv.keys, kv.values)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a model output: fields, nested containers, and the layers of a cache."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Cache):
        for layer in value.layers:
            yield from tensors_in(vars(layer))
