"""Tests of a CUDA device are skipped where there is none: a fake cannot tell what its kernels compute."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> None:
    """Skip without a device; these tests then say nothing about CUDA, and nothing else in the suite does."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
