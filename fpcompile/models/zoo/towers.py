"""A stand-in for Gemma 3n's vision tower, which lives in timm, a package that this project does not need.

A text prefill never runs the tower; the config and the rest of the model are the real ones.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

__all__ = ["Gemma3nTowerConfig"]


class Gemma3nTowerConfig(Gemma3nVisionConfig):  # type: ignore[no-untyped-call]
    """Gemma 3n's vision config under a name of its own, so that ``AutoModel`` builds the stand-in."""

    model_type = "fpcompile_gemma3n_tower"


class _Gemma3nTower(PreTrainedModel):  # type: ignore[no-untyped-call]
    """One strided convolution: pixels ``[B, 3, H, W]`` to features ``[B, hidden, H/16, W/16]``."""

    config_class = Gemma3nTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: Gemma3nTowerConfig) -> None:
        super().__init__(config)
        self.patches = nn.Conv2d(3, config.hidden_size, kernel_size=16, stride=16)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.patches(pixel_values))


AutoConfig.register(Gemma3nTowerConfig.model_type, Gemma3nTowerConfig)
AutoModel.register(Gemma3nTowerConfig, _Gemma3nTower)
