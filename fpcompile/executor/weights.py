"""Whether a program's model is still the one that was compiled, and the digest of its weights.

A program reads the model's own parameters. Values that are changed in place are seen by the next run; what
else is changed is not: a parameter that is replaced (``model.to(...)``, ``load_state_dict(assign=True)``),
a buffer of the state dict, a submodule in another's place (adapters), an adapter that is switched or merged,
a hook, a forward of an instance, the configuration. Each is found before a run starts, since its numbers
would silently be those of the model that was compiled.

What forward itself may change is left alone: buffers outside the state dict, plain attributes, the hooks by
which transformers collects hidden states.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fpcompile.errors import UsageError

_ADAPTERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
"""Attributes by which PEFT's layers choose among adapters."""
_COLLECTS = "transformers.utils.output_capturing"
_FREE = frozenset(
    {
        "_experts_implementation_internal",
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
    }
)
"""Of a configuration: switched by ``generate`` for its own steps, and what ``save_pretrained`` writes."""


class WeightWatch:
    """A model as it was when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._held = [
            (module._parameters, name, parameter, _address(parameter))
            for module in modules
            for name, parameter in module._parameters.items()
        ]
        self._buffers = [
            (module._buffers, name, buffer, _version(buffer))
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and name not in module._non_persistent_buffers_set
        ]
        self._children = [(module._modules, dict(module._modules)) for module in modules if module._modules]
        self._hooks = [
            (table, _hooks(table))
            for module in modules
            for table in (module._forward_pre_hooks, module._forward_hooks)
        ]
        self._forwards = [(vars(module), vars(module).get("forward")) for module in modules]
        self._adapters = [
            (module, name, copy.copy(getattr(module, name, None)))
            for module in modules
            if hasattr(module, "merged_adapters")
            for name in _ADAPTERS
        ]
        self._config = getattr(model, "config", None)
        self._settings = copy.deepcopy(_settings(self._config))

    def check(self) -> None:
        """Raise :class:`UsageError` when something was replaced or changed that a run would not see."""
        self.check_parameters()
        self._check_buffers()
        self._check_modules()
        self._check_settings()

    def check_parameters(self) -> None:
        """As :meth:`check`, for the parameters only: before each token of a sequence that began checked."""
        for table, name, parameter, address in self._held:
            if table.get(name) is not parameter or _address(parameter) != address:
                raise _changed(
                    "the model's weights were replaced after it was compiled",
                    expected="weights that are changed in place, or not at all",
                    got=f"another tensor for {name!r}",
                )

    def _check_buffers(self) -> None:
        for table, name, buffer, version in self._buffers:
            if table.get(name) is not buffer or _version(buffer) != version:
                raise _changed(
                    "the model's buffers were changed after it was compiled",
                    expected="the buffers that it had, of which a program has copies",
                    got=f"another value for {name!r}",
                )

    def _check_modules(self) -> None:
        for children, kept in self._children:
            if children != kept:
                names = [n for n in {**kept, **children} if kept.get(n) is not children.get(n)]
                raise _changed(
                    "the model's submodules were replaced after it was compiled",
                    expected="the modules that it had",
                    got=f"another module for {names[0]!r}",
                )
        for hooks, known in self._hooks:
            if (hooks or known) and _hooks(hooks) != known:
                raise _changed(
                    "the model's forward hooks were changed after it was compiled",
                    expected="the hooks that it had: a program has traced what they do",
                    got=f"{len(_hooks(hooks))} hooks on a module that had {len(known)}",
                )
        for attributes, forward in self._forwards:
            if attributes.get("forward") != forward:
                raise _changed(
                    "the forward of one of the model's modules was replaced after it was compiled",
                    expected="the forward that it had",
                    got=repr(attributes.get("forward")),
                )
        for module, name, value in self._adapters:
            if getattr(module, name, None) != value:
                raise _changed(
                    "the model's adapters were switched after it was compiled",
                    expected=f"{name.lstrip('_')} = {value!r}",
                    got=repr(getattr(module, name, None)),
                    remedy="switch them back, or call fpcompile.segment(model) again: one program for each "
                    "setting of the adapters",
                )

    def _check_settings(self) -> None:
        now = _settings(self._config)
        if now != self._settings:
            name = next(n for n in {**self._settings, **now} if self._settings.get(n) != now.get(n))
            raise _changed(
                "the model's configuration was changed after it was compiled",
                expected=f"{name} = {self._settings.get(name)!r}",
                got=repr(now.get(name)),
                remedy="change it before fpcompile.segment(model), or call that again",
            )

    @property
    def version(self) -> int:
        """A number that grows with every change in place that torch counts (not through ``.data``)."""
        return sum(parameter._version for _, _, parameter, _ in self._held if parameter is not None)


def _changed(
    what: str, *, expected: str, got: str, remedy: str = "call fpcompile.segment(model) again"
) -> UsageError:
    return UsageError(what, expected=expected, got=got, remedy=remedy)


def _address(parameter: Tensor | None) -> int:
    """Where the values lie; 0 for tensors without memory of their own (meta, quantised wrappers)."""
    return parameter.data_ptr() if type(parameter) is nn.Parameter else 0


def _version(buffer: Tensor) -> int:
    """How often a buffer was written; torch does not count for tensors made in inference mode."""
    return 0 if buffer.is_inference() else buffer._version


def _hooks(table: dict[int, Any]) -> list[Any]:
    return [hook for hook in table.values() if getattr(hook, "__module__", None) != _COLLECTS]


def _settings(config: Any) -> dict[str, Any]:
    """The fields of a configuration, and those of the ones inside, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in getattr(config, "__dict__", {}).items():
        if hasattr(value, "to_dict"):
            found |= {f"{name}.{inner}": v for inner, v in _settings(value).items()}
        elif name not in _FREE:
            found[name] = value
    return found


def digest_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of up to 64 evenly spaced elements of every weight, with names, shapes and dtypes."""
    digest = hashlib.sha256()
    plain = (part for path, weight in weights for part in _parts(path, weight))
    for path, weight in sorted(plain, key=lambda item: item[0]):
        digest.update(f"{path}{tuple(weight.shape)}{weight.dtype}".encode())
        if weight.numel():
            flat = weight.reshape(-1)
            count = min(64, flat.numel())
            at = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
            digest.update(flat[at].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _parts(path: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A weight, or the plain tensors inside a quantised one (a tensor subclass)."""
    if hasattr(weight, "__tensor_flatten__"):
        for name in weight.__tensor_flatten__()[0]:
            yield from _parts(f"{path}.{name}", getattr(weight, name))
    else:
        yield path, weight
