"""Capture by the packed route: a decoder LM as one graph over a row of tokens, attention left as nodes.

The graph's inputs are ``input_ids [1, tokens]``, ``position_ids [1, tokens]`` and ``logits_to_keep [rows]``
(row indices), its output is ``logits [1, rows, vocabulary]``. It is traced by :func:`torch.export.export`
on a shadow of the model (:mod:`fpcompile.models.shadow`) with both lengths symbolic.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from fpcompile.errors import UnsupportedModelError
from fpcompile.models import attention, leaves
from fpcompile.models.ambient import without_kernel_choice
from fpcompile.models.generic_shapes import readable
from fpcompile.models.lengths import LengthWatch
from fpcompile.models.shadow import shadow

INPUTS = ("input_ids", "position_ids", "logits_to_keep")
_DESIGN_TOKENS, _DESIGN_ROWS = 37, 11  # any two distinct sizes that no model dimension is likely to have


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Bindings:
    """What the parts of a program are bound to: weights, attention calls and leaves of a shadow ``model``.

    ``weights`` maps a placeholder's name to (path in the model, tensor). ``output_type`` is the class of
    output that the model itself returns.
    """

    weights: dict[str, tuple[str, Tensor]]
    attention: tuple[attention.AttentionCall, ...]
    leaves: tuple[leaves.Leaf, ...]
    output_type: type[Any]
    model: PreTrainedModel

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model's embedding knows."""
        table = self.model.get_input_embeddings().weight
        assert isinstance(table, Tensor)
        return int(table.shape[0])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Capture(Bindings):
    """A traced model: its graph, the weights behind the graph's placeholders, and the marked calls."""

    graph: fx.GraphModule

    @property
    def bindings(self) -> Bindings:
        """What stays when the graph has become segments."""
        return Bindings(self.weights, self.attention, self.leaves, self.output_type, self.model)


class _Wrapper(nn.Module):
    """Gives the model the three inputs of the packed route and picks the logits."""

    def __init__(
        self,
        model: PreTrainedModel,
        returned: list[type[Any]],
        cache: attention.CacheProbe,
        watch: LengthWatch,
    ) -> None:
        super().__init__()
        self.model = model
        self.watching = functools.partial(watch.watching, model)
        self.note = returned.append  # a bound method: export restores plain attributes after the trace
        self.cache: Callable[[], attention.CacheProbe] = lambda: cache
        self.picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor) -> Tensor:
        rows = {"logits_to_keep": logits_to_keep} if self.picks_rows else {}
        with self.watching([input_ids.shape[1], logits_to_keep.shape[0]]):
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,
                past_key_values=self.cache(),
                use_cache=False,
                **rows,
            )
        _refuse_more(self.model, out)
        self.note(type(out))
        logits: Tensor = out.logits
        return logits if self.picks_rows else logits[:, logits_to_keep, :]


_RETURNED = ("logits", "past_key_values", "last_hidden_state")


def _refuse_more(model: PreTrainedModel, out: Any) -> None:
    """A packed program returns logits and cache only. (Moshi's hidden states are left out.)"""
    fields = out.items() if isinstance(out, Mapping) else ()
    more = [n for n, v in fields if n not in _RETURNED and v is not None and not _empty(v)]
    if more:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route",
            reason=f"it returns {', '.join(more)} besides logits and cache",
        )


def _empty(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not value


def attention_implementation(model: PreTrainedModel) -> str:
    """The attention implementation that the unmodified model uses."""
    return str(model.config._attn_implementation or "eager")


def marked(model: PreTrainedModel) -> PreTrainedModel:
    """A shadow of ``model`` whose attention and experts modules call fpcompile's functions."""
    traced = shadow(model)
    for module in traced.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            for sub in (config, *(getattr(config, k, None) for k in getattr(config, "sub_configs", {}))):
                if sub is not None:
                    _mark(sub)
        if hasattr(type(module).forward, "__wrapped__") and hasattr(module, "_is_expert_parallel"):
            module._fpcompile_experts = getattr(config, "_fpcompile_experts", None) or "eager"  # type: ignore[assignment]
    return traced


def _mark(config: Any) -> None:
    """Route a shadow's config to fpcompile's attention and experts functions, remembering its own."""
    if getattr(config, "_attn_implementation_internal", None) == attention.NAME:
        return
    config._fpcompile_attention = getattr(config, "_attn_implementation_internal", None)
    config._fpcompile_experts = getattr(config, "_experts_implementation_internal", None)
    config._attn_implementation_internal = attention.NAME
    config._experts_implementation_internal = attention.NAME


def _refuse_positions_from_ids(model: PreTrainedModel) -> None:
    """Models in the manner of RoBERTa count positions from the ids that are no padding, beside ``pad + 1``.

    The positions that a packed graph is given would silently replace those.
    """
    for path, module in model.named_modules():
        home = sys.modules[type(module).__module__]
        counts = hasattr(home, _COUNT) and getattr(module, "padding_idx", None) is not None
        if hasattr(module, _COUNT) or (counts and hasattr(module, "position_embeddings")):
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot take the packed route",
                reason="its positions are counted from the token ids",
                module_path=path,
            )


_WANTED = ("output_hidden_states", "output_attentions", "output_router_logits")


def _refuse_settings(model: PreTrainedModel) -> None:
    """Settings under which the model returns more than logits and cache, or attends in a way of its own."""
    config = model.config
    asked = [name for name in _WANTED if getattr(config, name, False)]
    if getattr(config, "return_dict", True) is False:
        asked.append("return_dict=False")
    if asked:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route",
            reason=f"its configuration asks for {', '.join(asked)}",
            remedy="switch it off in model.config, or use route='generic'",
        )
    implementation = attention_implementation(model)
    if implementation not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route",
            reason=f"attention {implementation!r} is registered without a mask function",
            remedy="register one: transformers.AttentionMaskInterface.register(name, function)",
        )


_COUNT = "create_position_ids_from_input_ids"


def capture(model: PreTrainedModel) -> Capture:
    """Trace ``model`` by the packed route. The model is left as found, also when tracing fails.

    Raises :class:`UnsupportedModelError` when it cannot be traced with symbolic lengths or its attention
    is not of a form that the route knows; the message names the module, the source line and the reason.
    """
    _refuse_positions_from_ids(model)
    _refuse_settings(model)
    traced = marked(model)
    for module in traced.modules():
        if leaves.needs_rotary_leaf(module):
            leaves.install_rotary_leaf(module)
    returned: list[type[Any]] = []
    device = next(model.parameters()).device
    example = (
        torch.zeros(1, _DESIGN_TOKENS, dtype=torch.long, device=device),
        torch.arange(_DESIGN_TOKENS, device=device)[None],
        torch.arange(_DESIGN_ROWS, device=device),
    )
    tokens, rows = (
        torch.export.Dim("tokens", min=2, max=1 << 24),
        torch.export.Dim("rows", min=2, max=1 << 24),
    )
    shapes = ({1: tokens}, {1: tokens}, {0: rows})
    try:
        exported, recorder, collected = _traced(model, traced, returned, example, shapes)
    except UnsupportedModelError as error:
        if not isinstance(error.__cause__, UserError) or not _convolves(model):
            raise
        with without_kernel_choice():  # which kernel a convolution takes depends on its length
            exported, recorder, collected = _traced(model, traced, returned, example, shapes)
    signature = exported.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot take the packed route",
            reason=f"its forward writes into buffers: {sorted(signature.buffers_to_mutate.values())}",
        )
    return Capture(
        graph=exported.graph_module,
        weights=weights_of(exported),
        attention=tuple(recorder.calls),
        leaves=tuple(collected),
        output_type=returned[-1],
        model=traced,
    )


def _traced(
    model: PreTrainedModel,
    traced: PreTrainedModel,
    returned: list[type[Any]],
    example: tuple[Tensor, ...],
    shapes: Any,
) -> tuple[torch.export.ExportedProgram, attention.AttentionRecorder, list[leaves.Leaf]]:
    """The exported program, its attention calls and its leaves; raises :class:`UnsupportedModelError`."""
    with (
        torch.no_grad(),
        attention.recording(attention_implementation(model)) as recorder,
        leaves.collecting() as collected,
    ):
        watch = LengthWatch()
        wrapper = _Wrapper(traced, returned, recorder.cache, watch).eval()
        try:
            exported = torch.export.export(wrapper, example, dynamic_shapes=shapes, strict=False)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise _explain(model, error, watch) from error
    return exported, recorder, collected


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, _ConvNd) for module in model.modules())


def weights_of(exported: torch.export.ExportedProgram) -> dict[str, tuple[str, Tensor]]:
    """Placeholder -> (path in the model, tensor) of every weight, buffer and constant of a trace.

    Parameters stay parameters: torch folds the matrix product of a transposed batch with a weight that
    requires a gradient, and only with such a one, into another kernel.
    """
    signature = exported.graph_signature
    tensors: dict[str, Tensor] = {**exported.state_dict, **exported.constants}
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {p: (path.removeprefix("model."), tensors[path]) for p, path in named.items()}


def _explain(model: PreTrainedModel, error: Exception, watch: LengthWatch) -> UnsupportedModelError:
    """The user's error for a failed trace: the model's line, and what torch.export said."""
    line, path = None, watch.stack[-1] if watch.stack else None
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if re.search(r"modeling_\w+\.py$", frame.filename) or "/models/" in frame.filename.replace(
            "fpcompile", ""
        ):
            line = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}: {frame.line}"
            break
    reason = _in_words(error, line or "")
    if "Constraints violated" in reason:
        guard = re.search(r"generated guard (.+?)\.?$", str(error), re.MULTILINE)
        if watch.specialised is not None or guard is None:
            reason = "the model's code makes the number of tokens a constant (it loops over positions)"
        else:
            reason = (
                f"torch.export cannot prove a condition on the number of tokens: {readable(guard[1], {})}"
            )
        line, path = None, watch.specialised
    return UnsupportedModelError(
        f"{type(model).__name__} cannot be traced with symbolic lengths",
        reason=reason,
        module_path=path or "<model>",
        source_line=line,
        remedy="pass a model whose forward does not branch on tensor values or lengths",
    )


def _in_words(error: Exception, line: str) -> str:
    """What a trace's error means for the user, where that is known; else its first line."""
    said = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    if re.search(r"\b(MaskSpec|UnknownMask)\b", said):
        return "its code computes with the attention mask itself, which packed sequences do not have"
    if isinstance(error, (IndexError, AttributeError)) and "past_key_values" in line:
        return "its code uses cache entries of its own kind"
    if isinstance(error, GuardOnDataDependentSymNode):
        return "a decision in its code depends on activations"
    return f"{type(error).__name__}: {said[:300]}" if said else type(error).__name__
