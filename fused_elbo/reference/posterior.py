"""Any diagonal Gaussian posterior and prior: parameterisations, clamps, several samples, free bits, importance weights.

Sources: Kingma and Welling 2014 (arXiv:1312.6114), appendix B, for the KL; Kingma et al. 2016 (arXiv:1606.04934), eq. 15, for
free bits; Hafner et al. 2021 (DreamerV2, arXiv:2010.02193), section 2.2, for KL balancing; Chua et al. 2018 (PETS,
arXiv:1805.12114), appendix A.1, for the soft clamp; Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519), eq. 8, for the
importance weights; Tucker et al. 2019 (DReG, arXiv:1810.04152), eq. 8, for their doubly reparameterised gradient.
"""

from __future__ import annotations

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
        return raw.clamp(low, high)
    # softplus(v) = -ln sigmoid(-v)
    below = high + F.logsigmoid(raw - high)
    return low - F.logsigmoid(low - below)


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
    shared = [_shared(t, spec.posterior_share) for t in q]
    prior = [_shared(t, spec.prior_share) for t in p]
    kl = 0.5 * (_standardised(shared[0], prior[0], prior[1]) ** 2 + excess(_minus(shared[1], prior[2])))
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
    eps = draw_samples(mu, noise_, samples, dtype)
    tensors = (mu, raw, prior_mean, prior_raw)
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().to(dtype).clone().requires_grad_() for t in tensors]
        terms = posterior_terms(*leaves, eps, spec)
        prior_grads = (None, None)
        if path_weight is not None:
            z = terms.z.detach().requires_grad_()
            sigma, logvar = moments(clamped(leaves[1].detach(), spec), spec)
            prior = (leaves[2], *(moments(leaves[3], spec) if prior_raw is not None else (None, None)))
            ratio = _log_ratio(z, (z - leaves[0].detach()) / sigma, logvar, prior)
            g_path, *prior_grads = _gradients([ratio], [g_log_ratio], [z, *leaves[2:]])
            g_z = path_weight.reshape(path_weight.shape + (1,) * (mu.dim() - 1)) * (g_path if g_z is None else g_path + g_z)
            terms, g_log_ratio = terms._replace(log_ratio=None), None
        found = _gradients(terms, [g_z, g_kl, g_log_ratio], leaves)
    for buffer, gradient, extra in zip(out, found, (None, None, *prior_grads), strict=True):
        if buffer is not None:
            buffer.copy_(gradient if extra is None else gradient + extra)


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
    return torch.empty_like(mu)[None] if samples == 1 else mu.new_empty((samples, *mu.shape))


def _shared(t: Tensor | None, share: float) -> Tensor | None:
    """``t`` with ``share`` of its gradient."""
    return t if t is None or share == 1.0 else t.detach() + share * (t - t.detach())


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


def _gradients(outputs, upstream, inputs):
    """One for each input, zeros where nothing reaches it, None for None."""
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o is not None and g is not None]
    wanted = [t for t in inputs if t is not None]
    found = [None] * len(wanted)
    if pairs:
        outputs, upstream = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, wanted, upstream, retain_graph=True, allow_unused=True)
    found = iter(torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True))
    return [None if t is None else next(found) for t in inputs]
