"""What results may deviate by: the one table, by dtype and quantity."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LOW = (torch.bfloat16, torch.float16)

# The envelope: no worse than eager PyTorch in the same dtype, plus this many units in the last place. A result of one
# element's arithmetic has a handful of roundings, and a low precision only the last of them; a sum has one more for every
# level of its tree.
ELEMENT_ULPS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
SUM_ULPS = 8

# Normals of the stream, absolute, against the reference; a hardware logarithm and sine are allowed for in float32 only.
NOISE = {torch.float64: 1e-12, torch.float32: 1e-5}

# A sum of non-negative terms, relative, whatever its length; and the KL of one element.
SUM_RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6}
KL_RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6}


def compute(dtype: torch.dtype) -> torch.dtype:
    """The dtype of terms and losses for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
