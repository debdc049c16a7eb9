"""Memory for a whole value of which parts are computed one after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def room(tile: Tensor, axis: int, length: int) -> Tensor:
    """Memory for the whole of which ``tile`` is a part, ``length`` along ``axis``, with the same order of
    dimensions.
    """
    sizes = [length if d == axis else int(n) for d, n in enumerate(tile.shape)]
    strides = [int(s) for s in tile.stride()]
    order = sorted(range(tile.dim()), key=lambda d: (-strides[d], d))
    return torch.empty_permuted(sizes, order, dtype=tile.dtype, device=tile.device)
