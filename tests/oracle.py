"""What the results are compared with: formulas from the mathematics, and the envelope.

The formulas are the lines that everybody writes. In float64 they are the exact values; in a lower precision they are the
eager PyTorch that a result may not be worse than.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor

from fused_elbo import accuracy

MPMATH_DIGITS = 50


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: Any = None, scale: float = 1.0) -> Tensor:
    """The same normals on every device, by default torch's own default."""
    generator = torch.Generator("cpu").manual_seed(seed)
    normals = scale * torch.randn(shape, generator=generator, device="cpu")
    return normals.to(dtype).to(torch.get_default_device() if device is None else device)


def leaf(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def grads(outputs: Any, inputs: Sequence[Tensor], upstream: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(outputs, inputs, upstream, **options)


def row_sum(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1) if t.dim() > 1 else t


def gaussian_nll(x_hat: Tensor, x: Tensor, sigma: float = 1.0, full: bool = False) -> Tensor:
    constant = math.log(sigma) + (0.5 * math.log(2 * math.pi) if full else 0.0)
    return row_sum((x - x_hat) ** 2) / (2 * sigma**2) + math.prod(x.shape[1:]) * constant


def kl_divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * row_sum(1 + logvar - mu.pow(2) - logvar.exp())


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + eps * torch.exp(0.5 * logvar)


def reduce(terms: Tensor, reduction: str) -> Tensor:
    return terms if reduction == "none" else getattr(terms, reduction)()


def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    chunk_dim: int | None = None,
    beta: float | Tensor = 1.0,
    sigma: float = 1.0,
    full: bool = False,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor, Tensor]:
    if chunk_dim is not None:
        mu, logvar = mu.chunk(2, chunk_dim)
    nll = gaussian_nll(x_hat, x, sigma, full)
    kl = kl_divergence(mu, logvar) if kl is None else kl
    return reduce(nll + beta * kl, reduction), nll, kl


def with_gradients(
    formula: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None], dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of ``formula`` and gradients of all ``inputs``, computed in ``dtype`` (default: the inputs' own).

    ``upstream`` holds one tensor for each output, None where that output is not differentiated.
    """
    leaves = [leaf(t if dtype is None else t.to(dtype)) for t in inputs]
    outputs = formula(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if g is not None]
    found = grads([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    return [o.detach() for o in outputs], [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def assert_envelope(
    ours: Tensor, exact: Tensor, eager: Tensor, *, ulps: int | None = None, terms: Tensor | None = None, what: str = ""
) -> None:
    """``accuracy.envelope`` holds; ``what`` names the result in the message."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    error, bound = accuracy.envelope(ours, exact, eager, ulps=ulps, terms=terms)
    bad = ~(error <= bound)
    if bad.any():
        at = int(((error / bound) * bad).flatten().argmax())
        values = [f"{t.flatten()[at].item():.9g}" for t in (ours, exact, eager, error, bound)]
        labels = ("ours", "exact", "eager", "error", "bound")
        detail = ", ".join(f"{k} {v}" for k, v in zip(labels, values, strict=True))
        raise AssertionError(f"{what}: {int(bad.sum())} of {bad.numel()} beyond the envelope; element {at}: {detail}")


def assert_relative(ours: Tensor, exact: Tensor, bound: float, what: str = "") -> None:
    error = ((ours.detach().double() - exact.double()).abs() / exact.double().abs()).where(
        exact.double() != 0, ours.detach().double().abs()
    )
    worst = int(error.flatten().argmax())
    assert not error.isnan().any(), f"{what}: NaN"
    assert error.max() <= bound, (
        f"{what}: relative error {error.flatten()[worst]:.3g} > {bound}, element {worst}: "
        f"{ours.flatten()[worst].item()!r}, exact {exact.flatten()[worst].item()!r}"
    )


def kl_mpmath(mu: Sequence[float], logvar: Sequence[float]) -> Tensor:
    """KL of one-dimensional Gaussians, exactly rounded to float64."""
    with mpmath.workdps(MPMATH_DIGITS):
        half = mpmath.mpf(1) / 2
        values = [
            half * (mpmath.mpf(m) ** 2 + mpmath.expm1(mpmath.mpf(v)) - mpmath.mpf(v)) for m, v in zip(mu, logvar, strict=True)
        ]
        return torch.tensor([float(v) for v in values], dtype=torch.float64)


def round_to_float32(value: Any) -> float:
    """A ``fractions.Fraction`` in (2^-126, 2^127) rounded to nearest even."""
    exponent = 0
    while value * 2**-exponent >= 2:
        exponent += 1
    while value * 2 ** (-exponent) < 1:
        exponent -= 1
    steps = value / 2 ** (exponent - 23) if exponent >= 23 else value * 2 ** (23 - exponent)
    return float(np.float64(round(steps)) * np.float64(2.0) ** (exponent - 23))
