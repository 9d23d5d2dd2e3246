"""Any diagonal Gaussian posterior and prior: parameterisations, clamps, several samples, free bits, importance weights.

Sources: Kingma and Welling 2014 (arXiv:1312.6114), appendix B, for the KL; Kingma et al. 2016 (arXiv:1606.04934), eq. 15, for
free bits; Hafner et al. 2021 (DreamerV2, arXiv:2010.02193), section 2.2, for KL balancing; Chua et al. 2018 (PETS,
arXiv:1805.12114), appendix A.1, for the soft clamp; Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), eq. 8, for the
importance weights; Tucker et al. 2019 (DReG, arXiv:1810.04152), eq. 8, for their doubly reparameterised gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import Noise, Posterior, PosteriorGradients, compute_dtype
from .plain import excess
from .stream import noise


class PosteriorTerms(NamedTuple):
    """``z`` (K, N, ...), ``kl`` (N, ...) of every element, ``log_ratio`` (K, N); None where not asked for."""

    z: Tensor | None
    kl: Tensor
    log_ratio: Tensor | None


def moments(raw: Tensor, spec: Posterior) -> tuple[Tensor, Tensor]:
    """Standard deviation and log-variance that a raw parameter stands for; clamps are not of its concern."""
    match spec.param:
        case "logvar":
            return torch.exp(0.5 * raw), raw
        case "log_std":
            return torch.exp(raw), 2.0 * raw
        case "var":
            return torch.sqrt(raw), torch.log(raw)
    sigma = raw if spec.param == "std" else spec.min_std - F.logsigmoid(-raw)
    return sigma, 2.0 * torch.log(sigma)


def clamped(raw: Tensor, spec: Posterior) -> Tensor:
    if spec.clamp is None:
        return raw
    low, high = spec.clamp
    if not spec.soft:
        # torch refuses a number beyond the dtype's range, which says that there is no bound.
        most = torch.finfo(raw.dtype).max
        return raw.clamp(*(math.copysign(math.inf, bound) if abs(bound) > most else bound for bound in (low, high)))
    return softly_at_least(_softly_at_most(raw, high), low)


def softly_at_least(v: Tensor, least: float) -> Tensor:
    """``least + softplus(v - least)``."""
    return -_softly_at_most(-v, -least)


def _softly_at_most(v: Tensor, most: float) -> Tensor:
    """``v - softplus(v - most)``, without a difference of large numbers where either is far beyond the other."""
    return torch.where(v <= most, v - F.softplus(v - most), most - F.softplus(most - v))


def posterior_terms(
    mu: Tensor, raw: Tensor, prior_mean: Tensor | None, prior_raw: Tensor | None, eps: Tensor | None, spec: Posterior
) -> PosteriorTerms:
    """The mathematics: q = N(mu, sigma^2), p = N(m, s^2), z_k = mu + eps_k sigma; all tensors in the compute dtype.

    ``kl = ((mu - m)^2 / s^2 + expm1(d) - d) / 2`` with d = ln sigma^2 - ln s^2, at least ``free_bits``; and
    ``log_ratio_k = ln p(z_k) - ln q(z_k) = sum_j (eps^2 + d - (z - m)^2 / s^2) / 2``.

    Args:
        mu, raw: (N, ...).
        prior_mean, prior_raw: like ``mu``, or None for m = 0 and s = 1.
        eps: (K, N, ...), or None for no samples.
    """
    sigma, logvar = moments(clamped(raw, spec), spec)
    q, p = [mu, logvar], [None, None, None]
    if prior_mean is not None:
        p[0] = prior_mean
    if prior_raw is not None:
        p[1], p[2] = moments(prior_raw, spec)
    kl = _element_kl(q, p)
    if (spec.posterior_share, spec.prior_share) != (1.0, 1.0):
        # Each side with its share of the gradient, and of the value what that leaves over.
        fixed_q, fixed_p = ([None if t is None else t.detach() for t in side] for side in (q, p))
        over = 1.0 - spec.posterior_share - spec.prior_share
        kl = spec.posterior_share * _element_kl(q, fixed_p) + spec.prior_share * _element_kl(fixed_q, p) + over * kl.detach()
    if spec.free_bits is not None:
        kl = kl.clamp(min=spec.free_bits)
    if eps is None:
        return PosteriorTerms(None, kl, None)
    z = mu + eps * sigma
    return PosteriorTerms(z, kl, _log_ratio(z, eps, logvar, p))


def posterior(
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise_: Noise | None,
    spec: Posterior,
    *,
    samples: int = 1,
    want_kl: str | None = "rows",
    want_log_ratio: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Samples and their terms, in one pass.

    Args:
        mu, raw: (N, ...) any strides and dtypes, the posterior's mean and second parameter.
        prior_mean, prior_raw: like ``mu`` (stride 0 where they are broadcast), or None for 0 and a variance of 1.
        noise_: a seed, or ``eps`` (K, N, ...); elements of the stream are counted in z, with a seed for each sample within
            what is that sample's in the order (K, ...). None: no sample.
        samples: K.
        want_kl: "rows" for sums (N,), "elements" for (N, ...), None for neither.

    Returns:
        ``z`` (K, N, ...) in ``mu``'s dtype, ``kl``, ``log_ratio`` (K, N); None where not wanted. Terms are float32, or float64
        if any tensor is float64.
    """
    dtype = compute_dtype(mu, raw, prior_mean, prior_raw)
    wide = [None if t is None else t.to(dtype) for t in (mu, raw, prior_mean, prior_raw)]
    terms = posterior_terms(*wide, draw_samples(mu, noise_, samples, dtype), spec)
    kl = {"rows": lambda: _row_sum(terms.kl, 1), "elements": lambda: terms.kl, None: lambda: None}[want_kl]()
    z = None if terms.z is None else empty_samples(mu, samples).copy_(terms.z)
    return z, kl, terms.log_ratio if want_log_ratio else None


def posterior_backward(
    g_z: Tensor | None,
    g_kl: Tensor | None,
    g_log_ratio: Tensor | None,
    path_weight: Tensor | None,
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise_: Noise | None,
    spec: Posterior,
    out: PosteriorGradients,
    *,
    samples: int = 1,
) -> None:
    """Write the gradients of ``posterior``'s tensors into ``out``.

    Args:
        g_z: (K, N, ...) any strides. None, like all that follow: absent.
        g_kl: (N, ...) like ``mu``, stride 0 where it is one weight a row.
        g_log_ratio: (K, N) any strides.
        path_weight: (K, N) any strides. With it the posterior gets the doubly reparameterised gradient: of log_ratio what
            reaches it through z alone, and all that reaches it through z times ``path_weight``; the prior gets the plain one.
    """
    dtype = compute_dtype(mu, raw, prior_mean, prior_raw)
    mu, raw, prior_mean, prior_raw = (None if t is None else t.to(dtype) for t in (mu, raw, prior_mean, prior_raw))
    bounded = clamped(raw, spec)
    sigma, logvar = moments(bounded, spec)
    std, prior_logvar = (None, None) if prior_raw is None else moments(prior_raw, spec)
    # By mu and ln sigma^2, and by the prior's.
    found = [torch.zeros_like(mu) for _ in range(4)]
    through_sigma = 0.0
    if g_kl is not None:
        distance, difference = _standardised(mu, prior_mean, std), _minus(logvar, prior_logvar)
        c = g_kl.to(dtype)
        if spec.free_bits is not None:
            value = 0.5 * (distance**2 + excess(difference))
            c = torch.where(value < spec.free_bits, torch.zeros_like(c), c)
        by_mu, growth = c * _over(distance, std), c * torch.expm1(difference)
        found[0] += spec.posterior_share * by_mu
        found[1] += 0.5 * spec.posterior_share * growth
        found[2] -= spec.prior_share * by_mu
        found[3] -= 0.5 * spec.prior_share * (c * distance**2 + growth)
    if g_z is not None or g_log_ratio is not None:
        eps = draw_samples(mu, noise_, samples, dtype)
        rows = (..., *(None,) * (mu.dim() - 1))
        path = torch.zeros_like(eps) if g_z is None else g_z.to(dtype)
        if g_log_ratio is not None:
            g_ratio = g_log_ratio.to(dtype)[rows]
            distance = _standardised(mu + eps * sigma, prior_mean, std)
            pull = g_ratio * _over(distance, std)
            found[2] += pull.sum(0)
            found[3] += (0.5 * g_ratio * (distance**2 - 1.0)).sum(0)
            path = path - pull
            if path_weight is None:
                found[1] += 0.5 * g_ratio.sum(0)
            else:
                path = path_weight.to(dtype)[rows] * (path + g_ratio * eps / sigma)
        found[0] += path.sum(0)
        if noise_ is not None:
            # Not by its logarithm: sigma may be 0.
            through_sigma = (path * eps).sum(0) * _deviation_slope(bounded, sigma, spec)
    by_mu, by_logvar, by_prior_mean, by_prior_logvar = found
    by_raw = through_sigma + _through_logarithm(by_logvar, bounded, sigma, spec)
    by_prior_raw = None if std is None else _through_logarithm(by_prior_logvar, prior_raw, std, spec)
    gradients = (by_mu, _through_clamp(by_raw, raw, spec), by_prior_mean, by_prior_raw)
    for buffer, gradient in zip(out, gradients, strict=True):
        if buffer is not None:
            buffer.copy_(gradient)


def draw_samples(mu: Tensor, noise_: Noise | None, samples: int, dtype: torch.dtype) -> Tensor | None:
    """The normals for ``samples`` samples of ``mu``'s shape, (K, N, ...)."""
    if noise_ is None:
        return None
    if noise_.eps is not None:
        return noise_.eps.to(dtype)
    where = {"dtype": dtype, "first_index": noise_.first_index, "offset": noise_.offset}
    if noise_.seed.dim() == 0:
        return noise(noise_.seed, (samples, *mu.shape), **where)
    return noise(noise_.seed, (mu.shape[0], samples, *mu.shape[1:]), **where).transpose(0, 1)


def empty_samples(mu: Tensor, samples: int) -> Tensor:
    """Uninitialised (K, N, ...); one sample alone is laid out as ``mu`` is."""
    if samples != 1:
        return mu.new_empty((samples, *mu.shape))
    # No view, which autograd would not let its user overwrite.
    return mu.new_empty_strided((1, *mu.shape), (mu.numel(), *torch.empty_like(mu, device="meta").stride()))


def _element_kl(q: Sequence[Tensor], p: Sequence[Tensor | None]) -> Tensor:
    return 0.5 * (_standardised(q[0], p[0], p[1]) ** 2 + excess(_minus(q[1], p[2])))


def _minus(a: Tensor, b: Tensor | None) -> Tensor:
    return a if b is None else a - b


def _standardised(value: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    difference = _minus(value, mean)
    return difference if std is None else difference / std


def _log_ratio(z: Tensor, eps: Tensor, logvar: Tensor, prior: tuple[Tensor | None, ...]) -> Tensor:
    prior_mean, prior_std, prior_logvar = prior
    return 0.5 * _row_sum(eps * eps + _minus(logvar, prior_logvar) - _standardised(z, prior_mean, prior_std) ** 2, 2)


def _row_sum(t: Tensor, rows: int) -> Tensor:
    return t.flatten(rows).sum(rows) if t.dim() > rows else t


def _over(value: Tensor, std: Tensor | None) -> Tensor:
    return value if std is None else value / std


def _deviation_slope(bounded: Tensor, sigma: Tensor, spec: Posterior) -> Tensor | float:
    """Derivative of sigma by the raw parameter, once that is clamped."""
    match spec.param:
        case "logvar":
            return 0.5 * sigma
        case "log_std":
            return sigma
        case "var":
            return 0.5 / sigma
    return 1.0 if spec.param == "std" else torch.sigmoid(bounded)


def _through_logarithm(by_logvar: Tensor, bounded: Tensor, sigma: Tensor, spec: Posterior) -> Tensor:
    """The raw parameter's gradient from that of ln sigma^2; where there is none, also where ln sigma^2 is infinite."""
    slope = {
        "logvar": lambda: 1.0,
        "log_std": lambda: 2.0,
        "std": lambda: 2.0 / bounded,
        "var": lambda: 1.0 / bounded,
        "softplus": lambda: 2.0 * torch.sigmoid(bounded) / sigma,
    }[spec.param]()
    return torch.where(by_logvar == 0, by_logvar, by_logvar * slope)


def _through_clamp(gradient: Tensor, raw: Tensor, spec: Posterior) -> Tensor:
    if spec.clamp is None:
        return gradient
    low, high = spec.clamp
    if not spec.soft:
        return torch.where((raw >= low) & (raw <= high), gradient, 0.0)
    return gradient * torch.sigmoid(high - raw) * torch.sigmoid(_softly_at_most(raw, high) - low)
