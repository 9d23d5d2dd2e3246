"""What results may deviate by: the one table, and the envelope. The tests and ``python -m fused_elbo check`` share it."""

from __future__ import annotations

import torch
from torch import Tensor

# The envelope: no worse than eager PyTorch in the same dtype, plus this many units in the last place. A result of one
# element's arithmetic has a handful of roundings, and a low precision only the last of them; a sum has one more for every
# level of its tree.
ELEMENT_ULPS = {torch.float64: 4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}
SUM_ULPS = 8

# Normals of the stream, absolute, against the reference; a hardware logarithm and sine are allowed for in float32 only.
NOISE = {torch.float64: 1e-12, torch.float32: 1e-5}

# A sum of non-negative terms, relative, whatever its length; and the KL of one element, with the special-function unit as far
# off as is documented, up to a log-variance of 80 either way. 16 bits of it were rounded to far less; up to 8 they are nearer.
SUM_RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6}
KL_RELATIVE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 6.4e-6, torch.float16: 6.4e-6}
NARROW_KL_NEAR = 1.4e-6


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of ``dtype`` at ``value``'s magnitude, float64; constant among subnormals."""
    info = torch.finfo(dtype)
    magnitude = value.double().abs().clamp(min=info.smallest_normal, max=info.max)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def envelope(
    ours: Tensor, exact: Tensor, eager: Tensor, *, ulps: int | None = None, terms: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Errors of ``ours`` and the bound ``|eager - exact| + ulps``, element by element, float64.

    Args:
        ours: a result; its dtype is the one that units in the last place are counted in.
        exact: the same in float64.
        eager: the same by eager PyTorch in ``ours``' precision.
        ulps: default ``ELEMENT_ULPS``, for what is not a sum.
        terms: magnitude of the largest term where the formula adds terms of either sign: they may cancel, and what is left
            then carries their rounding.
    """
    ours64, exact, eager = ours.detach().double(), exact.double(), eager.detach().double()
    # A value beyond the dtype's range is right as an infinity.
    reachable = exact.to(ours.dtype).double()
    same = (ours64 == reachable) | (ours64.isnan() & exact.isnan())
    scale = exact.abs() if terms is None else torch.maximum(exact.abs(), terms.detach().double().abs())
    allowed = (eager - exact).abs().where(eager.isfinite(), torch.zeros_like(exact))
    bound = allowed + (ELEMENT_ULPS[ours.dtype] if ulps is None else ulps) * ulp(scale, ours.dtype)
    error = torch.nan_to_num((ours64 - exact).abs(), nan=torch.inf).masked_fill(same, 0.0)
    return error, bound
