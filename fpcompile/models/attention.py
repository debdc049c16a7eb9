"""Attention as one node per call: mask recognition at capture, the model's own kernel at run time.

At capture, transformers' registries are given fpcompile's mask and attention functions. The mask function
materialises nothing and returns a frozen :class:`MaskSpec`; the attention function makes one
``fpcompile::attention`` node and records an :class:`AttentionCall`. At run time :func:`attend` calls the
function that the unmodified model would have called, with the mask that it would have built, on explicit
(q, k, v) and explicit sequence boundaries: no ambient state.

Shapes: q ``[B, Hq, T, D]``, k and v ``[B, Hkv, T, D]``, output ``[B, T, Hq, Dv]``.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import sys
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers import masking_utils as mu
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fpcompile.errors import UnsupportedModelError

NAME = "fpcompile"
_IGNORED_KWARGS = frozenset(
    {
        "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
        "cache_position", "dropout", "return_dict", "layer_idx", "num_items_in_batch", "is_training",
        "logits_to_keep",
    }
)  # fmt: skip


class MaskKind(StrEnum):
    """The recognised shapes of attention masks."""

    CAUSAL = "causal"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    BIDIRECTIONAL = "bidirectional"


@dataclasses.dataclass(frozen=True, slots=True)
class MaskSpec:
    """Which keys a query sees. ``span`` is the window or chunk in tokens, 0 when the kind has none."""

    kind: MaskKind
    span: int = 0

    def __str__(self) -> str:
        return f"{self.kind}({self.span})" if self.span else str(self.kind)

    def hides_nothing(self, implementation: str) -> bool:
        """Whether the newest token alone needs no mask: what :meth:`build` would find out by more work."""
        return self.kind is MaskKind.CAUSAL and implementation == "sdpa"

    def build(
        self,
        implementation: str,
        *,
        queries: int,
        q_offset: int,
        keys: int,
        k_offset: int,
        like: Tensor,
        config: Any,
    ) -> Tensor | None:
        """The mask that transformers' ``implementation`` builds for one sequence; None if it needs none.

        ``queries`` new tokens start at position ``q_offset``; ``keys`` visible keys start at ``k_offset``.
        """
        function: Callable[..., Any] = mu.causal_mask_function
        if self.kind is MaskKind.SLIDING:
            function = mu.sliding_window_causal_mask_function(self.span)
        elif self.kind is MaskKind.CHUNKED:
            function = mu.chunked_causal_mask_function(
                self.span, torch.zeros(1, dtype=torch.long, device=like.device)
            )
        elif self.kind is MaskKind.BIDIRECTIONAL:
            function = mu.bidirectional_mask_function
        bidirectional = self.kind is MaskKind.BIDIRECTIONAL
        mask: Tensor | None = mu.ALL_MASK_ATTENTION_FUNCTIONS[implementation](
            batch_size=1,
            q_length=queries,
            kv_length=keys,
            q_offset=q_offset,
            kv_offset=k_offset,
            mask_function=function,
            attention_mask=None,
            local_size=self.span or None,
            allow_is_causal_skip=not bidirectional,
            allow_is_bidirectional_skip=bidirectional,
            dtype=like.dtype,
            config=config,
            use_vmap=False,
            device=like.device,
        )
        return mask

    def band(self, rows: int, width: int, ahead: int, like: Tensor) -> Tensor:
        """``[1, 1, rows, width + ahead]`` of ``like``'s dtype: 0 where one of the last ``rows`` of ``width``
        positions sees a key, else minus infinity; nobody sees the ``ahead`` keys behind. Causal and sliding
        masks only: others do not follow distances.
        """
        mask = like.new_zeros(rows, width + ahead)
        later = torch.ones(rows, rows + ahead, dtype=torch.bool, device=like.device).triu_(1)
        mask[:, width - rows :].masked_fill_(later, float("-inf"))
        if self.span:
            behind = torch.ones(rows, width, dtype=torch.bool, device=like.device)
            mask[:, :width].masked_fill_(behind.tril_(width - rows - self.span), float("-inf"))
        return mask[None, None]


def _closure(function: Callable[..., Any]) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in cells), strict=True))


def _same_code(function: Callable[..., Any], other: Callable[..., Any]) -> bool:
    return function.__code__ is other.__code__


_AND = mu.and_masks(mu.causal_mask_function)
_PACKED = mu.packed_sequence_mask_function(torch.zeros(1, 1))
_REMAP = mu.remap_positions_for_packed_sequence(mu.causal_mask_function, torch.zeros(1, 1))
_SLIDING = mu.sliding_window_overlay(1)
_CHUNKED = mu.chunked_overlay(1, torch.zeros(1))


def recognise_mask(function: Callable[..., Any]) -> MaskSpec | None:
    """The :class:`MaskSpec` that ``function`` computes, read off its closures, or None when unknown.

    transformers composes masks from a few factories; each is known by its code object, so a function
    that merely looks alike is not accepted.
    """
    if _same_code(function, mu.causal_mask_function):
        return MaskSpec(MaskKind.CAUSAL)
    if _same_code(function, mu.bidirectional_mask_function):
        return MaskSpec(MaskKind.BIDIRECTIONAL)
    if _same_code(function, _REMAP):
        return recognise_mask(_closure(function)["mask_function"])
    if not _same_code(function, _AND):
        return None
    members = [m for m in _closure(function)["mask_functions"] if not _same_code(m, _PACKED)]
    if len(members) == 1:
        return recognise_mask(members[0])
    if len(members) == 2 and recognise_mask(members[1]) == MaskSpec(MaskKind.CAUSAL):
        if _same_code(members[0], _SLIDING):
            return MaskSpec(MaskKind.SLIDING, int(_closure(members[0])["sliding_window"]))
        if _same_code(members[0], _CHUNKED):
            return MaskSpec(MaskKind.CHUNKED, int(_closure(members[0])["chunk_size"]))
    return None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """Everything static about one attention node.

    ``module`` is the shadow's own attention module (it carries head counts and sinks), ``function`` the
    attention function of the unmodified model, ``layer`` the index of its key/value cache entry, ``dims``
    the widths of a key and of a value head. ``writes`` is False for a layer that reads the entry of an
    earlier one and adds nothing to it.
    """

    module: nn.Module
    function: Callable[..., tuple[Tensor, Tensor | None]]
    implementation: str
    layer: int
    mask: MaskSpec
    kwargs: dict[str, Any]
    heads: int
    kv_heads: int
    dims: tuple[int, int]
    writes: bool = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """One call of the model's own attention function; the output is ``[B, T, Hq, Dv]``."""
        return self.function(self.module, q, k, v, mask, dropout=0.0, **self.kwargs)[0]

    def attend_block(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As :meth:`attend`, for a block of query rows and heads.

        The CPU kernel takes grouped heads together with a mask, so that keys and values are not repeated
        for each block as the model's own function would.
        """
        if not self.torch_kernel or q.device.type != "cpu":
            return self.attend(q, k, v, mask)
        causal = mask is None and self.mask.kind is not MaskKind.BIDIRECTIONAL and q.shape[2] > 1
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.kwargs.get("scaling"), enable_gqa=True
        )
        return out.transpose(1, 2)

    @property
    def torch_kernel(self) -> bool:
        """Whether ``function`` is transformers' own around torch's kernel, not one in its place."""
        return self.implementation == "sdpa" and self.function is sdpa_attention_forward

    @property
    def head_unit(self) -> int:
        """How many query heads have to be computed together; 0 when the function needs all of them.

        Torch's kernel on a CPU takes any query heads with their key head; the model's own functions repeat
        the keys for all query heads of a group.
        """
        if hasattr(self.module, "sinks"):
            return 0
        weight = next(self.module.parameters(), None)
        alone = self.torch_kernel and weight is not None and weight.device.type == "cpu"
        return 1 if alone else self.heads // self.kv_heads


class CacheProbe(DynamicCache):
    """The cache that a trace is given: empty, and it remembers what each layer puts into it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Remember and return what the layer gives."""
        self.written[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def _state(self, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            "the model cannot take the packed route",
            reason="a layer carries a state from token to token (convolution, recurrence, linear attention)",
        )

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _state
    get_linear_cache = set_linear_cache = _state

    def entry(self, k: Tensor, v: Tensor, layer: int) -> int | None:
        """The layer whose entry holds exactly these keys and values: ``layer`` itself, or an earlier one."""
        for index in (layer, *self.written):
            keys, values = self.written.get(index, (None, None))
            if keys is k and values is v:
                return index
        return None


@dataclasses.dataclass(slots=True)
class AttentionRecorder:
    """Collects the attention calls of one trace. ``implementation`` is what the unmodified model uses, where
    the configuration of an attention module does not say otherwise (a language model inside another).

    ``cache`` is the trace's: it tells which entry of the model's own cache holds a call's keys and values.
    """

    implementation: str
    calls: list[AttentionCall] = dataclasses.field(default_factory=list)
    cache: CacheProbe = dataclasses.field(default_factory=CacheProbe)

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: object, kwargs: dict[str, Any]
    ) -> Tensor:
        """Add a call and return its node."""

        def refuse(reason: str) -> UnsupportedModelError:
            return UnsupportedModelError(
                "an attention call cannot take the packed route",
                reason=reason,
                module_path=f"{type(module).__name__} (layer {getattr(module, 'layer_idx', '?')})",
            )

        if isinstance(mask, UnknownMask):
            raise refuse(f"attention mask of an unknown form: {mask.why}")
        if mask is None:
            raise refuse("attention is called without a mask of a known form")
        if not isinstance(mask, MaskSpec):
            raise refuse("the model builds an attention mask of its own")
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise refuse("the attention module has no layer_idx")
        entry = self.cache.entry(k, v, layer)
        if entry is None:
            raise refuse("the model's cache holds something else than the keys and values that are attended")
        writers = [c for c in self.calls if c.layer == entry and c.writes]
        if entry == layer and writers:
            raise refuse(f"two attention calls share the cache entry {layer}")
        if entry != layer and not writers:
            raise refuse(f"the cache entry {entry} is read before it is written")
        config = getattr(module, "config", None)
        implementation = getattr(config, "_fpcompile_attention", None) or self.implementation
        keep: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in _IGNORED_KWARGS or value is None:
                continue
            if key == "s_aux" and isinstance(value, Tensor) and implementation in ("eager", "sdpa"):
                continue  # sinks: the eager function reads them from the module, torch's kernel has none
            if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raise refuse(f"attention takes an argument {key!r} that follows the number of tokens")
            if isinstance(value, Tensor):
                raise refuse(f"attention takes an extra tensor argument {key!r}")
            keep[key] = value
        if implementation not in mu.ALL_MASK_ATTENTION_FUNCTIONS:
            raise refuse(f"attention {implementation!r} is registered without a mask function")
        function = own_attention(module, implementation)
        self.calls.append(
            AttentionCall(
                module,
                function,
                implementation,
                entry,
                mask,
                keep,
                int(q.shape[1]),
                int(k.shape[1]),
                (int(k.shape[3]), int(v.shape[3])),
                writes=entry == layer,
            )
        )
        node: Tensor = torch.ops.fpcompile.attention(q, k, v, len(self.calls) - 1)
        return node


@dataclasses.dataclass(frozen=True, slots=True)
class UnknownMask:
    """Stands in for a mask that was not recognised; using it is what fails."""

    why: str


def own_attention(module: nn.Module, implementation: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that ``module`` itself calls under ``implementation``."""
    if implementation != "eager":
        function: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[implementation]
        return function
    for cls in type(module).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise UnsupportedModelError(
        "an attention call cannot take the packed route",
        reason="the model's eager attention function was not found",
        module_path=type(module).__name__,
        remedy='load the model with attn_implementation="sdpa"',
    )


_recorder: contextvars.ContextVar[AttentionRecorder] = contextvars.ContextVar("fpcompile_attention_recorder")


@contextlib.contextmanager
def recording(implementation: str) -> Iterator[AttentionRecorder]:
    """While it is open, attention calls made under the name ``fpcompile`` are recorded (trace time only)."""
    recorder = AttentionRecorder(implementation)
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


def _mask_entry(**kwargs: Any) -> MaskSpec | UnknownMask:
    spec = recognise_mask(kwargs["mask_function"])
    if spec is None:
        return UnknownMask("its mask function is not one of causal, sliding window, chunked, bidirectional")
    if kwargs.get("attention_mask") is not None:
        return UnknownMask("it is combined with a padding mask")
    return spec


def _attention_entry(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **kwargs: Any
) -> tuple[Tensor, None]:
    return _recorder.get().record(module, query, key, value, attention_mask, kwargs), None


@torch.library.custom_op("fpcompile::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor, call: int) -> Tensor:
    raise NotImplementedError("fpcompile::attention is a marker for the compiler and is never executed")


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, call: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


AttentionInterface.register(NAME, _attention_entry)
AttentionMaskInterface.register(NAME, _mask_entry)
