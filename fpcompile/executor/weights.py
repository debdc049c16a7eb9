"""What a program knows about its model's weights: whether they are still the same ones, and their digest.

A program reads the model's own weights. Values that are changed in place are seen by the next run; a weight
that is replaced (``model.to(...)``, ``load_state_dict(assign=True)``) is not, which would be silently wrong.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from fpcompile.errors import UsageError


class WeightWatch:
    """The parameters of a model as they were when it was compiled."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [
            (module._parameters, name, parameter, _address(parameter))
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]

    def check(self) -> None:
        """Raise :class:`UsageError` when a parameter was replaced or moved since."""
        for table, name, parameter, address in self._held:
            if table.get(name) is not parameter or _address(parameter) != address:
                raise UsageError(
                    "the model's weights were replaced after it was compiled",
                    expected="weights that are changed in place, or not at all",
                    got=f"another tensor for {name!r}",
                    remedy="call fpcompile.segment(model) again",
                )

    @property
    def version(self) -> int:
        """A number that grows with every change in place that torch counts (not through ``.data``)."""
        return sum(parameter._version for _, _, parameter, _ in self._held)


def _address(parameter: Tensor) -> int:
    """Where the values lie; 0 for tensors without memory of their own (meta, quantised wrappers)."""
    return parameter.data_ptr() if type(parameter) is nn.Parameter else 0


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
