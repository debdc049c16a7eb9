"""Whether a program's model is still the one that was compiled, and the digest of its weights.

A program reads the model's own parameters. Values that are changed in place are seen by the next run; what
else is changed is not: a parameter that is replaced (``model.to(...)``, ``load_state_dict(assign=True)``),
a buffer of the state dict, a submodule in another's place (adapters), an adapter that is switched or merged,
a hook, a forward of an instance, the configuration. Each is found before a run starts, since its numbers
would silently be those of the model that was compiled.

What forward itself may change is left alone: buffers outside the state dict, plain attributes, the hooks by
which transformers collects hidden states. So are adapters that are not active, where they come or go whole.

Another thread may change the model while it is looked at: what can grow is copied before it is iterated over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from operator import is_, is_not, ne
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from fpcompile.errors import UsageError

_COLLECTS = "transformers.utils.output_capturing"
_FREE = frozenset(
    {
        "_experts_implementation_internal",
        "_name_or_path",
        "_commit_hash",
        "architectures",
        "dtype",
        "gradient_checkpointing",
        "label2id",
        "torch_dtype",
        "transformers_version",
    }
)
"""Of a configuration: switched by ``generate`` for its own steps, what ``save_pretrained`` writes, and what
decides only how gradients are computed or how people read a result. Not so the ids of tokens: forward reads
``pad_token_id`` to pick a classifier's position, to shift a decoder's ids, to pad to a window (Longformer,
BigBird), to put embeddings of images in (Gemma 4); ``eos_token_id`` in classifiers (BART) and in n-grams
(Qwen4Exp). Whether a model does cannot be told from outside."""
_ATOMS = frozenset({type(None), bool, int, float, str, torch.dtype})
_ABSENT = "(no such field)"
_SWITCHES = ("active_adapter", "_active_adapter", "_disable_adapters")
"""Attributes by which PEFT's models and wrappers choose, beside its layers: learned prompts, modules that
were saved whole."""
_DEPTH = 8
"""Containers and configurations inside one another that are looked into."""


class WeightWatch:
    """A model as it was when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._layers = [_AdapterLayer(module) for module in modules if hasattr(module, "merged_adapters")]
        named = {at: active for layer in self._layers for at, active in layer.named.items()}
        self._parameters = _Slots((m._parameters, m._parameters, named.get(id(m))) for m in modules)
        self._addressed: list[Tensor] = [p for p in self._parameters.values if type(p) is nn.Parameter]
        self._addresses = list(map(Tensor.data_ptr, self._addressed))
        self._buffers = _Slots((m._buffers, _kept_buffers(m), named.get(id(m))) for m in modules)
        self._versions = list(map(_version, self._buffers.values))
        self._named_children = _Slots(
            (m._modules, m._modules, named[id(m)]) for m in modules if id(m) in named
        )
        whole = [m._modules for m in modules if m._modules and id(m) not in named]
        self._children, self._children_kept = whole, list(map(dict, whole))
        tables = [table for m in modules for table in (m._forward_pre_hooks, m._forward_hooks)]
        self._hooked = [(table, _hooks(table)) for table in tables if _hooks(table)]
        self._hookless = [table for table in tables if not _hooks(table)]
        self._attributes = list(map(vars, modules))
        choosing = (vars(m) for m in modules if not hasattr(m, "merged_adapters"))
        self._switches = [(own, _switches(own)) for own in choosing if not own.keys().isdisjoint(_SWITCHES)]
        self._forwards = self._own_forwards()
        self._config = getattr(model, "config", None)
        self._settings = _settings(self._config)

    def check(self) -> None:
        """Raise :class:`UsageError` when something was replaced or changed that a run would not see."""
        self.check_parameters()
        self._check_buffers()
        self._check_modules()
        for layer in self._layers:
            layer.check()
        for own, kept in self._switches:
            if (now := _switches(own)) != kept:
                name = next(n for n in kept if kept[n] != now[n])
                raise _switched(name, kept[name], now[name])
        self._check_settings()

    def check_parameters(self) -> None:
        """As :meth:`check`, for the parameters only: before each token of a sequence that began checked."""
        name = self._parameters.replaced()
        if name is None and list(map(Tensor.data_ptr, self._addressed)) != self._addresses:
            moved = next(
                p for p, at in zip(self._addressed, self._addresses, strict=True) if p.data_ptr() != at
            )
            name = self._parameters.name_of(moved)
        if name is not None:
            raise _changed(
                "the model's weights were replaced after it was compiled",
                expected="weights that are changed in place, or not at all",
                got=f"another tensor for {name!r}",
            )

    def _check_buffers(self) -> None:
        name = self._buffers.replaced()
        if name is None and list(map(_version, self._buffers.values)) != self._versions:
            written = zip(self._buffers.values, self._versions, strict=True)
            name = self._buffers.name_of(next(b for b, version in written if _version(b) != version))
        if name is not None:
            raise _changed(
                "the model's buffers were changed after it was compiled",
                expected="the buffers that it had, of which a program has copies",
                got=f"another value for {name!r}",
            )

    def _check_modules(self) -> None:
        name = self._named_children.replaced()
        if name is None and any(map(ne, self._children, self._children_kept)):
            pairs = zip(map(dict, self._children), self._children_kept, strict=True)
            names = (n for now, kept in pairs for n in {**kept, **now} if kept.get(n) is not now.get(n))
            name = next(names, None)
        if name is not None:
            raise _changed(
                "the model's submodules were replaced after it was compiled, or by its own forward",
                expected="the modules that it had",
                got=f"another module for {name!r}",
            )
        for table, known in chain(self._hooked, zip(filter(None, self._hookless), repeat([]))):
            hooks = _hooks(table)
            if hooks != known:
                raise _changed(
                    "the model's forward hooks were changed after it was compiled",
                    expected="the hooks that it had: a program has traced what they do",
                    got=f"{len(hooks)} hooks on a module that had {len(known)}",
                )
        forwards = self._own_forwards()
        if forwards != self._forwards:
            raise _changed(
                "the forward of one of the model's modules was replaced after it was compiled",
                expected="the forward that it had",
                got=repr(next(n for n, kept in zip(forwards, self._forwards, strict=True) if n != kept)),
            )

    def _own_forwards(self) -> list[Any]:
        return list(map(dict.get, self._attributes, repeat("forward")))

    def _check_settings(self) -> None:
        now = _settings(self._config)
        if now != self._settings:
            both = (
                (n, self._settings.get(n, _ABSENT), now.get(n, _ABSENT)) for n in {**self._settings, **now}
            )
            name, kept, got = next(entry for entry in both if entry[1] != entry[2])
            raise _changed(
                "the model's configuration was changed after it was compiled",
                expected=f"{name} = {kept!r}",
                got=repr(got),
                remedy="change it before fpcompile.segment(model), or call that again",
            )

    @property
    def version(self) -> int:
        """A number that grows with every change in place that torch counts (not through ``.data``)."""
        return sum(parameter._version for parameter in self._parameters.values if parameter is not None)


class _Slots:
    """Names in tables of modules and what each had: told by identity, without a loop in Python."""

    def __init__(
        self, tables: Iterable[tuple[dict[str, Any], dict[str, Any], frozenset[str] | None]]
    ) -> None:
        """``tables``: a table, what of it is held, and by adapters: the names of the active ones."""
        entries = [
            (table, name, held.get(name), active is not None and name not in active)
            for table, held, active in tables
            for name in chain(list(held), (active or frozenset()) - table.keys())
        ]
        self._tables = [table for table, *_ in entries]
        self._names = [name for _, name, *_ in entries]
        self.values: list[Any] = [value for *_, value, _ in entries]
        self._without = [value if spare else None for *_, value, spare in entries]

    def replaced(self) -> str | None:
        """The first name that has something else now; one of an adapter that is not active may be gone."""
        now = list(map(dict.get, self._tables, self._names, self._without))
        if all(map(is_, now, self.values)):
            return None
        return next(
            n for n, is_other in zip(self._names, map(is_not, now, self.values), strict=True) if is_other
        )

    def name_of(self, value: object) -> str:
        return next(name for name, held in zip(self._names, self.values, strict=True) if held is value)


class _AdapterLayer:
    """A layer of PEFT's kind: which adapters it adds, and how much of each."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._chosen = self._choice()
        active = self._chosen["active_adapter"]
        self._scaling = dict.fromkeys(active, None) | self._scales()
        self._active = frozenset(active)
        # "lora_arrow" is a router over all adapters of the layer: there every one counts
        keyed = () if hasattr(module, "lora_arrow") else self._tables()
        self.named = {id(table): self._active for table in keyed}
        """Modules below that hold one entry for each adapter, by id, with the names of the active ones."""

    def check(self) -> None:
        """Raise :class:`UsageError` when other adapters are added than were, or with other factors."""
        chosen = self._choice()
        if chosen != self._chosen:
            name = next(n for n in chosen if chosen[n] != self._chosen[n])
            raise _switched(name, self._chosen[name], chosen[name])
        scaling = self._scales()
        for name, kept in self._scaling.items():
            if (name in scaling or name in self._active) and scaling.get(name) != kept:
                raise _switched(f"scaling[{name!r}]", kept, scaling.get(name))

    def _choice(self) -> dict[str, Any]:
        active = getattr(self._module, "_active_adapter", None) or ()
        return {
            "active_adapter": [active] if isinstance(active, str) else list(active),
            "disable_adapters": getattr(self._module, "_disable_adapters", None),
            "merged_adapters": list(self._module.merged_adapters),  # type: ignore[arg-type]
        }

    def _scales(self) -> dict[str, Any]:
        scaling = getattr(self._module, "scaling", None)
        if not isinstance(scaling, dict):
            scaling = dict.fromkeys(self._chosen["active_adapter"], scaling)
        return {name: _plain(value) for name, value in list(scaling.items())}

    def _tables(self) -> list[nn.Module]:
        """What PEFT itself deletes an adapter from."""
        names = [getattr(self._module, of, ()) for of in ("adapter_layer_names", "other_param_names")]
        found = (getattr(self._module, name, None) for name in chain(*names))
        return [table for table in found if isinstance(table, nn.Module) and hasattr(table, "keys")]


class _Same:
    """A value that is not plain data, which nothing but itself equals: neither copied nor compared."""

    def __init__(self, value: object) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    def __hash__(self) -> int:
        return id(self._value)

    def __repr__(self) -> str:
        return repr(self._value)


def _changed(
    what: str, *, expected: str, got: str, remedy: str = "call fpcompile.segment(model) again"
) -> UsageError:
    return UsageError(what, expected=expected, got=got, remedy=remedy)


def _switched(name: str, kept: object, got: object) -> UsageError:
    return _changed(
        "the model's adapters were switched after it was compiled",
        expected=f"{name} = {kept!r}",
        got=repr(got),
        remedy="switch them back, or call fpcompile.segment(model) again; programs for two settings of the "
        "adapters need two models: copy.deepcopy(model), one for each",
    )


def _switches(own: dict[str, Any]) -> dict[str, Any]:
    found = {name: own.get(name) for name in _SWITCHES}
    return {name: [value] if isinstance(value, str) else _plain(value) for name, value in found.items()}


def _version(buffer: Tensor | None) -> int:
    """How often a buffer was written; torch does not count for tensors made in inference mode."""
    return 0 if buffer is None or buffer.is_inference() else buffer._version


def _kept_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that are part of its state dict."""
    free = module._non_persistent_buffers_set
    return {name: b for name, b in module._buffers.items() if b is not None and name not in free}


def _hooks(table: dict[int, Any]) -> list[Any]:
    return [hook for hook in list(table.values()) if getattr(hook, "__module__", None) != _COLLECTS]


def _settings(config: Any, depth: int = 0) -> dict[str, Any]:
    """The fields of a configuration, and those of the ones inside, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in list(getattr(config, "__dict__", {}).items()):
        if name in _FREE:
            continue
        if type(value) in _ATOMS:
            found[name] = value
        elif name == "id2label" and isinstance(value, dict):
            found["num_labels"] = len(value)  # which is how transformers computes it; forward reads no label
        elif isinstance(value, PreTrainedConfig) and depth < _DEPTH:
            found |= {f"{name}.{inner}": v for inner, v in _settings(value, depth + 1).items()}
        else:
            found[name] = _plain(value, depth)
    return found


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of plain data (numbers, strings, dtypes, containers and configurations of these) that can be
    compared; anything else, and what is nested without an end, by what it is."""
    if isinstance(value, (type(None), bool, int, float, str, torch.dtype)):
        return value
    if depth < _DEPTH:
        if isinstance(value, (list, tuple)):
            inner = [_plain(v, depth + 1) for v in list(value)]
            return tuple(inner) if isinstance(value, tuple) else inner
        if isinstance(value, dict):
            return {key: _plain(v, depth + 1) for key, v in list(value.items())}
        if isinstance(value, (set, frozenset)):
            return {v if type(v) in _ATOMS else _Same(v) for v in list(value)}
        if isinstance(value, PreTrainedConfig):
            return _settings(value, depth + 1)
    return _Same(value)


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
