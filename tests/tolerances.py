"""The dtypes under test. What results may deviate by stands in ``fused_elbo.accuracy``, which the ``check`` command shares."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)


def compute(dtype: torch.dtype) -> torch.dtype:
    """The dtype of terms and losses for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
