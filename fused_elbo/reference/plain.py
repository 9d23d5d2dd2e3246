"""The operations of the plain objective: a Gaussian with fixed variance, a standard normal prior.

Read it beside the formulas. ``x_hat``, ``x`` and ``mu``, ``logvar`` are (N, ...); every sum runs over all dimensions
but the first; results are in nats. Terms are computed in float32 for half-precision inputs, else in the inputs' own
precision.

The first half is the mathematics, differentiable by autograd. The second half is the backend interface: the same
forward passes with their gradients written out, into buffers that the caller owns.

Source: Kingma and Welling 2014 (arXiv:1312.6114), eq. 10 and appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..spec import Gaussian, Gradients, Noise, compute_dtype, elements_per_sample
from .stream import draw

# expm1(v) - v loses its leading digits near 0: within this distance it is summed as a series, to full precision.
SERIES_LIMIT = 1.0
SERIES_TERMS = {torch.float32: 10, torch.float64: 18}


def excess(v: Tensor) -> Tensor:
    """``expm1(v) - v``, non-negative and to full relative accuracy also near 0, where it is v^2/2 + v^3/6 + ..."""
    near = v.clamp(-SERIES_LIMIT, SERIES_LIMIT)
    # Factors, not divisions: of these a compiled loop on a CPU would make its slowest instructions.
    series = torch.zeros_like(near)
    for k in range(SERIES_TERMS[v.dtype] + 1, 1, -1):
        series = series * near + 1.0 / math.factorial(k)
    return torch.where(v.abs() < SERIES_LIMIT, near * near * series, torch.expm1(v) - v)


def kl_divergence(mu: Tensor, logvar: Tensor, excess: Callable[[Tensor], Tensor] = excess) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(0, I)) = sum_j 1/2 (mu_j^2 + expm1(lv_j) - lv_j)`` per sample, (N,), in nats."""
    dtype = compute_dtype(mu, logvar)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    return 0.5 * _row_sum(mu * mu + excess(logvar))


def reparameterize(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """``z = mu + eps exp(logvar / 2)``, shape and dtype of ``mu``."""
    dtype = compute_dtype(mu, logvar)
    return (mu.to(dtype) + eps.to(dtype) * torch.exp(0.5 * logvar.to(dtype))).to(mu.dtype)


def gaussian_nll(x_hat: Tensor, x: Tensor, likelihood: Gaussian) -> Tensor:
    """``sum_i (x_i - x_hat_i)^2 / (2 sigma^2) + D (ln sigma [+ 1/2 ln 2 pi])`` per sample, (N,), in nats."""
    dtype = compute_dtype(x_hat, x)
    residual = x_hat.to(dtype) - x.to(dtype)
    constant = elements_per_sample(x_hat) * likelihood.log_normaliser
    return 0.5 * likelihood.precision * _row_sum(residual * residual) + constant


def total(nll: Tensor, kl: Tensor | None, beta: float | Tensor, weight: float | None) -> Tensor:
    """``weight sum_n (nll_n + beta kl_n)``, or the (N,) terms of that sum with ``weight=None``."""
    terms = nll if kl is None else nll + beta * kl.to(nll.dtype)
    return terms if weight is None else weight * terms.sum()


def unavailable(device_type: str) -> str | None:
    """None: plain PyTorch runs on every device."""
    return None


def rsample_kl(mu: Tensor, logvar: Tensor, noise_: Noise | None, *, want_kl: bool) -> tuple[Tensor | None, Tensor | None]:
    """A sample ``z`` like ``mu`` (None with no noise) and the KL per sample (N,) (None where it is not wanted)."""
    z = None if noise_ is None else torch.empty_like(mu).copy_(reparameterize(mu, logvar, draw(mu, noise_)))
    return z, kl_divergence(mu, logvar) if want_kl else None


def rsample_kl_backward(
    g_z: Tensor | None,
    g_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    noise_: Noise | None,
    out: Gradients,
) -> None:
    """Write the latent gradients into ``out.mu`` and ``out.logvar``.

    With c_n = ``g_kl``[n]: d/dmu = g_z + c_n mu and d/dlogvar = g_z eps sigma / 2 + c_n expm1(logvar) / 2.
    ``g_z`` is like ``mu`` and ``g_kl`` (N,), each with any strides.
    """
    dtype = compute_dtype(mu, logvar)
    mu, logvar = mu.to(dtype), logvar.to(dtype)
    grad_mu, grad_logvar = torch.zeros_like(mu), torch.zeros_like(logvar)
    if g_kl is not None:
        c = _per_row(g_kl.to(dtype), mu)
        grad_mu += c * mu
        grad_logvar += 0.5 * c * torch.expm1(logvar)
    if g_z is not None:
        grad_mu += g_z
        if noise_ is not None:
            grad_logvar += 0.5 * g_z * draw(mu, noise_) * torch.exp(0.5 * logvar)
    if out.mu is not None:
        out.mu.copy_(grad_mu)
    if out.logvar is not None:
        out.logvar.copy_(grad_logvar)


def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: float | Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float | None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """``loss = weight sum_n (nll_n + beta kl_n)``, the per-sample terms, and the gradients into ``out``.

    The KL is that of ``mu, logvar``, or the given ``kl`` (N,), or absent. With ``weight=None`` there is no total.
    Gradients are those of ``grad_scale * loss``.
    """
    dtype = compute_dtype(x_hat, x, mu, logvar, kl)
    nll = gaussian_nll(x_hat, x, likelihood).to(dtype)
    if mu is not None:
        kl = kl_divergence(mu, logvar).to(dtype)
    if weight is None:
        return None, nll, kl
    scale = grad_scale if isinstance(grad_scale, Tensor) else torch.full((), grad_scale, dtype=dtype, device=x_hat.device)
    scale = scale.to(dtype)
    rows = scale.expand(x_hat.shape[0])
    if out.x_hat is not None or out.x is not None:
        gaussian_nll_backward(rows, x_hat, x, likelihood, out, weight=weight)
    if out.mu is not None or out.logvar is not None:
        rsample_kl_backward(None, rows * weight * beta, mu, logvar, None, out)
    if out.kl is not None:
        out.kl.copy_(scale * weight * beta)
    return total(nll, kl, beta, weight), nll, kl


def gaussian_nll_backward(
    g_nll: Tensor,
    x_hat: Tensor,
    x: Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float = 1.0,
    expected: float | Tensor | None = None,
) -> None:
    """Write c_n (x_hat - x) / sigma^2 with c_n = ``g_nll``[n] ``weight`` into ``out.x_hat``, its negative into ``out.x``.

    ``g_nll`` is (N,) with any stride. ``expected``: ``out`` already holds the gradients for a ``g_nll`` that is this number
    throughout, so a backend may return at once where it is.
    """
    dtype = compute_dtype(x_hat, x)
    c = _per_row(g_nll.to(dtype) * (weight * likelihood.precision), x_hat)
    gradient = c * (x_hat.to(dtype) - x.to(dtype))
    if out.x_hat is not None:
        out.x_hat.copy_(gradient)
    if out.x is not None:
        out.x.copy_(-gradient)


def rescale_(gradients: Sequence[Tensor], upstream: Tensor, expected: float | Tensor) -> None:
    """Multiply each tensor in place by ``upstream / expected`` (0-dimensional), without a look at the value."""
    factor = upstream / expected
    for gradient in gradients:
        gradient.mul_(factor)


def _row_sum(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1) if t.dim() > 1 else t


def _per_row(weight: Tensor, like: Tensor) -> Tensor:
    return weight.reshape(weight.shape + (1,) * (like.dim() - 1))
