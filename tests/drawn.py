"""How calls of a backend's operations are drawn: shapes, layouts, and buffers for what they write."""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

SIZES = (1, 2, 3, 4, 5, 8, 13)
MOST_ELEMENTS = 2000
SEED = 77


def chosen(draw, tensor, *, expand=True, holes=True):
    """The tensor in some layout; expanding over a dimension changes its values."""
    layout = draw(st.sampled_from(("plain", "transposed", "sliced", "expanded")))
    if layout == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced" and holes:
        wide = torch.empty(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        return wide[..., 1::2].copy_(tensor)
    if layout == "expanded" and expand:
        dim = draw(st.integers(0, tensor.dim() - 1))
        return tensor.narrow(dim, 0, 1).expand(tensor.shape)
    return tensor


def buffer(draw, shape, dtype):
    return chosen(draw, torch.empty(shape, dtype=dtype), expand=False)


def wide(t):
    return t if t is None or not t.is_floating_point() else t.double()


def shapes(rows):
    """Shapes with ``rows`` leading dimensions that are small enough."""
    dims = st.lists(st.sampled_from(SIZES), min_size=rows, max_size=rows + 3)
    return dims.filter(lambda shape: math.prod(shape) <= MOST_ELEMENTS)
