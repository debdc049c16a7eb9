"""Helpers of the tests that need torch: compiled tiny models, results to compare, and comparison by bits.

Words
    *toy*        a small transformers model whose layers compute whatever a test asks for.
    *reference*  what the unmodified model returns in this process: logits and every layer's keys and values.
    *same bits*  same shape, same dtype, same bytes: a zero's sign and a NaN's payload count.

Models and programs are cached for the session, since compiling takes a second and neither is ever changed by
a test; a test that must change one makes its own.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fpcompile
from fpcompile.models.zoo import tiny_model

DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (1, 2, 17, 128)
"""128 is far past the tiny sliding window of 16; 1 and 2 are what tracers specialise on."""


@functools.cache
def model_of(arch: str, dtype: torch.dtype = torch.float32, rope: str | None = None) -> PreTrainedModel:
    """The unmodified tiny model that :func:`program_of` was compiled from."""
    return tiny_model(arch, dtype=dtype, rope=rope)


@functools.cache
def program_of(
    arch: str, dtype: torch.dtype = torch.float32, granularity: str = "operator", rope: str | None = None
) -> fpcompile.Program:
    """The tiny model, compiled by the packed route."""
    return fpcompile.segment(model_of(arch, dtype, rope), granularity=granularity, route="packed")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Logits and, for each cache layer, (keys, values)."""

    logits: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...]


def outcome(output: Any) -> Outcome:
    """The parts of a model's or a run's output that are compared."""
    return Outcome(output.logits, cache_layers(output.past_key_values))


def cache_layers(cache: DynamicCache | None) -> tuple[tuple[Tensor, Tensor], ...]:
    """(keys, values) of every layer of a transformers cache."""
    layers: Iterable[Any] = () if cache is None else cache.layers
    return tuple((layer.keys, layer.values) for layer in layers)


@torch.no_grad()
def reference(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Outcome:
    """What the unmodified model returns, through its public call. A given cache is copied first."""
    if kwargs.get("past_key_values") is not None:
        kwargs["past_key_values"] = copy.deepcopy(kwargs["past_key_values"])
    return outcome(model(input_ids=ids, **{"use_cache": True, **kwargs}))


def finish(run: fpcompile.Run, *, validate: bool = True) -> Outcome:
    """Step a run to its end; its invariant is checked after every step."""
    while not run.done:
        run.step()
        if validate:
            run.validate()
    return outcome(run.result())


def cuts(run: fpcompile.Run) -> Iterator[int]:
    """Drive ``run`` to its end and stop at every cut: before the first segment, ..., behind the last one."""
    while True:
        run.validate()
        yield run.cursor
        if run.done:
            return
        run.step()


def relay(
    program: fpcompile.Program,
    run: fpcompile.Run,
    carry: Callable[[fpcompile.Checkpoint, int], fpcompile.Checkpoint] = lambda checkpoint, cut: checkpoint,
) -> Outcome:
    """Step to the end in as many runs as there are cuts: each is snapshotted, dropped and resumed.

    ``carry`` may take the snapshot elsewhere (a file) on its way.
    """
    while True:
        run.suspend()
        checkpoint = carry(run.checkpoint(), run.cursor)
        run.release()
        run = program.resume(checkpoint)
        run.validate()
        if run.done:
            return outcome(run.result())
        run.step()


def through_file(path: Path) -> Callable[[fpcompile.Checkpoint, int], fpcompile.Checkpoint]:
    """A ``carry`` for :func:`relay` by way of a file."""

    def carry(checkpoint: fpcompile.Checkpoint, cut: int) -> fpcompile.Checkpoint:
        checkpoint.save(path)
        return fpcompile.Checkpoint.load(path)

    return carry


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Same shape, dtype and bytes."""
    return (
        left.shape == right.shape and left.dtype == right.dtype and torch.equal(_bytes(left), _bytes(right))
    )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def differences(got: Outcome, expected: Outcome) -> list[str]:
    """What differs between two outcomes, by bits; empty when nothing does."""
    found: list[str] = []
    if len(got.layers) != len(expected.layers):
        found.append(f"{len(got.layers)} cache layers instead of {len(expected.layers)}")
    pairs = [("logits", got.logits, expected.logits)]
    for index, (mine, theirs) in enumerate(zip(got.layers, expected.layers, strict=False)):
        pairs += [
            (f"{name} of layer {index}", a, b)
            for name, a, b in zip(("keys", "values"), mine, theirs, strict=True)
        ]
    for name, a, b in pairs:
        if not same_bits(a, b):
            found.append(f"{name}: {_difference(a, b)}")
    return found


def _difference(a: Tensor, b: Tensor) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype}{list(a.shape)} instead of {b.dtype}{list(b.shape)}"
    return f"largest difference {(a.double() - b.double()).abs().max():.3g}"


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected magnitude."""
    scale = expected.double().abs().max().clamp_min(1e-30)
    return float((got.double() - expected.double()).abs().max() / scale)


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind ``tensors``, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class ToyConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Configuration of :class:`Toy`; the fields that transformers' mask functions and caches read."""

    model_type = "fpcompile_toy"

    def __init__(self, layers: int = 2, **kwargs: Any) -> None:
        self.num_hidden_layers = layers
        self.hidden_size, self.vocab_size, self.max_position_embeddings = 32, 128, 512
        self.num_attention_heads = self.num_key_value_heads = 2
        super().__init__(**{"tie_word_embeddings": False, **kwargs})


@dataclasses.dataclass(frozen=True, slots=True)
class Spot:
    """What a toy's own computation is given: hidden states ``x [B, T, 32]`` and the inputs."""

    x: Tensor
    ids: Tensor
    positions: Tensor
    layer: Any


Mix = Callable[[Spot], Tensor]


class ToyLayer(nn.Module):
    """Attention whose queries, keys and values are views of one fused projection; then ``mix``."""

    def __init__(self, index: int, mix: Mix) -> None:
        super().__init__()
        self.layer_idx, self.is_causal, self.mix = index, True, mix
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=2)
        self.register_buffer("counts", torch.zeros(32))

    def forward(
        self, x: Tensor, ids: Tensor, positions: Tensor, mask: Any, cache: Any, attend: Any
    ) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attended, _ = attend(self, q, k, v, mask, scaling=0.25)
        x = x + self.out(attended.reshape(*x.shape))
        return x + self.mix(Spot(x, ids, positions, self))


class Toy(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A decoder LM of the transformers kind, with room for any computation in its layers."""

    config_class = ToyConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: ToyConfig, mix: Mix) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(128, 32)
        self.layers = nn.ModuleList(ToyLayer(i, mix) for i in range(config.num_hidden_layers))
        self.head = nn.Linear(32, 128, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: Any = 0,
    ) -> CausalLMOutputWithPast:
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(seen, seen + input_ids.shape[1])[None]
        x = self.embed(input_ids)
        mask = create_causal_mask(self.config, x, attention_mask, past_key_values, position_ids=position_ids)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        for layer in self.layers:
            x = layer(x, input_ids, position_ids, mask, past_key_values, attend)
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(logits=self.head(x[:, rows]), past_key_values=past_key_values)


def toy(mix: Mix, *, layers: int = 2) -> Toy:
    """A toy whose layers add ``mix``; weights from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Toy(ToyConfig(layers, attn_implementation="sdpa"), mix)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
    model.train(False)
    return model


def mlp(spot: Spot) -> Tensor:
    """A token-wise computation with two projections."""
    down: Tensor = spot.layer.down(torch.nn.functional.silu(spot.layer.up(spot.x)))
    return down
