"""Any likelihood: elements of several families, with an activation, weights and a mask, summed up for each row.

Sources: Kingma and Welling 2014 (arXiv:1312.6114), appendix C, for "gaussian" and "bernoulli"; Salimans, Karpathy, Chen and
Kingma 2017 (PixelCNN++, arXiv:1701.05517), section 2.1, for "discretized_logistic" with one component.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import LAST_LEVEL, DataGradients, Likelihood, compute_dtype, constant_of


def element_nll(x_hat: Tensor, x: Tensor, log_scale: Tensor, spec: Likelihood) -> Tensor:
    """``-ln p(x_i | z)`` of every element, in nats.

    With y = activation(x_hat) and s = exp(log_scale), gaussian: ``((x - y) / s)^2 / 2 + log_scale``; laplace:
    ``|x - y| / s + log_scale``; bernoulli, of logits y: ``softplus(y) - x y``. discretized_logistic: the logistic distribution
    with mean y and scale s gives a level the mass within half a level's width, the first and last level also the tail.

    Args:
        x_hat, x, log_scale: floats of one dtype; for discretized_logistic ``x`` holds the levels 0 to 255.
    """
    y = activated(x_hat, spec)
    if spec.family == "bernoulli":
        return -F.logsigmoid(-y) - x * y
    precision = torch.exp(-log_scale)
    if spec.family == "discretized_logistic":
        # ln(F(a) - F(b)) = ln F(a) + ln(1 - F(b)) + ln(1 - exp(b - a)), in which nothing cancels.
        width = spec.scale * precision
        centre = (spec.scale * x + spec.shift - y) * precision
        below = F.logsigmoid(centre + 0.5 * width)
        above = F.logsigmoid(0.5 * width - centre)
        inside = torch.log(-torch.expm1(-width))
        zero = torch.zeros_like(below)
        first, last = x == 0, x == LAST_LEVEL
        return -(torch.where(last, zero, below) + torch.where(first, zero, above) + torch.where(first | last, zero, inside))
    residual = (y - x) * precision
    value = residual.abs() if spec.family == "laplace" else 0.5 * residual * residual
    return value + log_scale + constant_of(spec.family, spec.full)


def element_gradients(x_hat: Tensor, x: Tensor, log_scale: Tensor, spec: Likelihood) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ``element_nll`` by x_hat, x and log_scale; that by a level is of no meaning."""
    y = activated(x_hat, spec)
    if spec.family == "bernoulli":
        return torch.sigmoid(y) - x, -y, torch.zeros_like(y)
    precision = torch.exp(-log_scale)
    if spec.family == "discretized_logistic":
        half = 0.5 * spec.scale * precision
        centre = (spec.scale * x + spec.shift - y) * precision
        zero = torch.zeros_like(centre)
        first, last = x == 0, x == LAST_LEVEL
        below = torch.where(last, zero, torch.sigmoid(-half - centre))
        above = torch.where(first, zero, torch.sigmoid(centre - half))
        inside = torch.where(first | last, zero, 2.0 * half / torch.expm1(2.0 * half))
        by_y = precision * (below - above)
        by_scale = below * (half + centre) + above * (half - centre) + inside
    else:
        residual = (y - x) * precision
        laplace = spec.family == "laplace"
        by_y = precision * (torch.sign(residual) if laplace else residual)
        by_scale = 1.0 - (residual.abs() if laplace else residual * residual)
    slope = {"identity": lambda: 1.0, "sigmoid": lambda: y * torch.sigmoid(-x_hat), "tanh": lambda: 1.0 - y * y}
    return by_y * slope[spec.activation](), -by_y, by_scale


def activated(x_hat: Tensor, spec: Likelihood) -> Tensor:
    return {"identity": lambda: x_hat, "sigmoid": x_hat.sigmoid, "tanh": x_hat.tanh}[spec.activation]()


def likelihood_nll(
    x_hat: Tensor, x: Tensor, log_scale: Tensor | None, weight: Tensor | None, mask: Tensor | None, spec: Likelihood
) -> Tensor:
    """Rows (A, B) of ``sum_i mask_i weight_i element_nll_i`` over the dimensions behind the first two; see ``likelihood``."""
    x_hat, target, scale = _seen(x_hat, x, log_scale, weight, mask, spec)
    return _weighed(element_nll(x_hat, target, scale, spec), weight, mask, rows=True)


def _seen(
    x_hat: Tensor, x: Tensor, log_scale: Tensor | None, weight: Tensor | None, mask: Tensor | None, spec: Likelihood
) -> tuple[Tensor, Tensor, Tensor]:
    """``x_hat, x, log_scale`` as the formulas take them."""
    dtype = compute_dtype(x_hat, x, log_scale, weight)
    target = x.to(dtype)
    if x.dtype == torch.uint8 and spec.family != "discretized_logistic":
        target = spec.scale * target + spec.shift
    x_hat = x_hat.to(dtype)
    scale = torch.full_like(x_hat, spec.log_scale) if log_scale is None else log_scale.to(dtype)
    if mask is not None:
        # Before the formula, since 0 times the NaN of what is missing would be NaN.
        x_hat, target, scale = (torch.where(mask, t, torch.zeros_like(t)) for t in (x_hat, target, scale))
    return x_hat, target, scale


def _weighed(value: Tensor, weight: Tensor | None, mask: Tensor | None, *, rows: bool) -> Tensor:
    """Elements by their weights, and their sums over a row."""
    if weight is not None:
        value = value * weight.to(value.dtype)
    if mask is not None:
        value = torch.where(mask, value, torch.zeros_like(value))
    return value.flatten(2).sum(2) if rows and value.dim() > 2 else value


def likelihood(
    x_hat: Tensor,
    x: Tensor,
    log_scale: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    spec: Likelihood,
    out: DataGradients,
    *,
    want_nll: bool = True,
    want_slope: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """The negative log-likelihood of rows, and gradients into ``out``, in one pass.

    Args:
        x_hat: (A, B, ...) rows of elements, the decoder's output.
        x, log_scale, weight, mask: of that shape, any strides, 0 included. ``x`` of floats or uint8 (discretized_logistic takes
            uint8 alone); ``log_scale`` and ``weight`` of floats or None; ``mask`` of bools or None: what is False counts for
            nothing, whatever the tensors hold there.
        upstream: (A, B) any strides, in the terms' dtype: weights of the rows in the gradients; None with an empty ``out``.
        spec: the family and its constants.
        out: buffers, which get ``upstream`` times the gradient of each element.
        want_nll, want_slope: which sums are returned.

    Returns:
        ``nll`` and ``slope``, (A, B): sums over a row of the negative log-likelihood and of its derivative by log_scale,
        neither multiplied by ``upstream``; float32, or float64 if any tensor of floats is float64.
    """
    nll = likelihood_nll(x_hat, x, log_scale, weight, mask, spec) if want_nll else None
    slope = None
    if want_slope or any(t is not None for t in out):
        found = element_gradients(*_seen(x_hat, x, log_scale, weight, mask, spec), spec)
        slope = _weighed(found[2], weight, mask, rows=True) if want_slope else None
        for buffer, gradient in zip(out, found, strict=True):
            if buffer is not None:
                per_row = upstream.to(gradient.dtype)[(..., *(None,) * (x_hat.dim() - 2))]
                buffer.copy_(_weighed(per_row * gradient, weight, mask, rows=False))
    return nll, slope
