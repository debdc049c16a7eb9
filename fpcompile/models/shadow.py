"""A *shadow* of a model: a copy that shares its weights, so that tracing never touches the original.

Parameters are shared by identity, buffers are cloned (models write into them while they run, and a trace
would leave fake tensors behind), everything else is copied by :func:`copy.deepcopy`. No weight is copied.
A shadow is in evaluation mode, as every program is, whatever mode the model was put into since.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from fpcompile.errors import UnsupportedModelError

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def shadow(model: ModuleT) -> ModuleT:
    """Structural copy of ``model`` that shares every parameter and owns its buffers.

    Raises :class:`UnsupportedModelError` for models whose forward is wrapped by accelerate hooks: those
    move weights between devices behind the graph's back.
    """
    for path, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                "a model dispatched by accelerate cannot be segmented",
                reason="its hooks (device_map) move weights between devices while it runs",
                module_path=path or "<model>",
                remedy="load the model on one device, or call accelerate.hooks.remove_hook_from_module first",
            )
    memo: dict[int, object] = {id(p): p for p in model.parameters()}
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone()
    for module in model.modules():  # plain tensor attributes: shared, never written by the trace's own code
        for value in vars(module).values():
            if isinstance(value, torch.Tensor):
                memo.setdefault(id(value), value.detach().clone())
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module.training = False  # not eval(): a module out of torch.export raises
    return copied
