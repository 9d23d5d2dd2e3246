"""Several samples for each datum: the importance-weighted bound and the log-likelihood.

Burda, Grosse and Salakhutdinov 2016 (arXiv:1509.00519). With w_k = p(x | z_k) p(z_k) / q(z_k | x), the bound of K samples is
``L_K = E ln (1/K) sum_k w_k <= ln p(x)`` (ibid., eq. 8), which does not decrease with K (ibid., theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import arguments, diagnostics, objective, options, sampling
from .options import ELBOOptions, LikelihoodOptions, PosteriorOptions

ESTIMATORS = ("iwae", "dreg")
KL_CONTROL = frozenset({"kl_balance", "free_bits", "free_bits_over", "process_group"})


class WeightedSamples(NamedTuple):
    """``z`` (K, N, ...) and ``log_ratio`` (K, N), ``ln p(z) - ln q(z | x)``, in nats."""

    z: Tensor
    log_ratio: Tensor


class IWAETerms(NamedTuple):
    """``loss`` (a scalar, or (N,) for reduction "none"), and (K, N), in nats: ``log_weight``, ln w_k, and ``nll``."""

    loss: Tensor
    log_weight: Tensor
    nll: Tensor


def rsample_log_ratio(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    num_samples: int,
    estimator: str = "iwae",
    chunk_dim: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    first_index: int = 0,
    offset: int = 0,
    **posterior: Unpack[PosteriorOptions],
) -> WeightedSamples:
    """K samples of the posterior and, of each, ``ln p(z) - ln q(z | x)``, in one pass over memory.

    Args:
        mu, logvar, chunk_dim, seed, generator, eps, first_index, offset: as for ``rsample_kl`` with ``num_samples``.
        num_samples: K.
        estimator: "iwae" (default): the gradient of the bound; or "dreg", the doubly reparameterised one (Tucker et al. 2019,
            arXiv:1810.04152, eq. 8), which has the same expectation and less variance. It changes the gradient of the
            posterior's parameters alone, and takes the weights from the upstream gradient of ``log_ratio``, so that both go
            into one ``iwae_loss``, with no other use of ``z``; a decoder must treat samples one by one (no batch norm).
        **posterior: ``PosteriorOptions`` without what controls a KL, and without process_group.

    Returns:
        ``z`` (K, N, ...) in ``mu``'s dtype, and ``log_ratio`` (K, N).

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
        RuntimeError: double backward with "dreg", which is no function's gradient.
    """
    arguments.choice("estimator", estimator, ESTIMATORS)
    options.known(posterior, options.POSTERIOR_NAMES - KL_CONTROL)
    if diagnostics.active:
        diagnostics.latent(mu, logvar, chunk_dim, posterior)
    source = (seed, generator, eps, first_index, offset)
    chosen = {"num_samples": num_samples, "want_kl": False, "want_log_ratio": True, "doubly": estimator == "dreg"}
    z, _, log_ratio = objective.sample(mu, logvar, chunk_dim, source, posterior, **chosen)
    return WeightedSamples(z, log_ratio)


def iwae_loss(
    x_hat: Tensor,
    x: Tensor,
    log_ratio: Tensor,
    *,
    sigma: float = 1.0,
    full: bool = False,
    reduction: str = "mean",
    **likelihood: Unpack[LikelihoodOptions],
) -> IWAETerms:
    """The negative importance-weighted bound, ``-ln (1/K) sum_k exp(log_ratio_k - nll_k)`` per sample (Burda et al., eq. 8).

    ``x`` is read once for all K. The weights are normalised by their largest, so that K may be any number. x_hat is read again
    by the backward, since what a sample weighs is known when all are there.

    Args:
        x_hat: (K, N, ...) the decoder's output for the samples of ``rsample_log_ratio``.
        x: (N, ...) the data.
        log_ratio: (K, N), of ``rsample_log_ratio``.
        sigma, full: as for ``nll``, but a float.
        reduction: "mean" over the batch (default), "sum", or "none" for (N,).
        **likelihood: ``LikelihoodOptions`` without batch_dims and process_group; what broadcasts to x holds for all samples,
            and a ``log_sigma`` may have x_hat's shape.

    Returns:
        ``loss``, and per sample ``log_weight`` and ``nll``.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    nll = samples_nll(x_hat, x, sigma, full, likelihood)
    log_ratio = arguments.shaped("log_ratio", arguments.floating("log_ratio", log_ratio), "nll", nll)
    log_weight = log_ratio - nll
    loss = math.log(len(nll)) - torch.logsumexp(log_weight, 0)
    return IWAETerms(loss if reduction == "none" else getattr(loss, reduction)(), log_weight, nll)


def samples_nll(x_hat: Tensor, x: Tensor, sigma: float, full: bool, likelihood: LikelihoodOptions) -> Tensor:
    """The negative log-likelihood (K, N) of x (N, ...) for each of K reconstructions (K, N, ...)."""
    options.known(likelihood, options.LIKELIHOOD_NAMES - {"batch_dims", "process_group"})
    x_hat, x = arguments.batched("x_hat", x_hat), arguments.target("x", x)
    if x_hat.dim() < 2 or x_hat.shape[1:] != x.shape:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes that of x_hat without the samples, {tuple(x_hat.shape[1:])}")
    arguments.on_device("x", x, "x_hat", x_hat)
    if diagnostics.active:
        diagnostics.likelihood(x_hat, x, likelihood)
    if isinstance(sigma, str):
        raise ValueError(f"sigma: got {sigma!r}, takes a float: samples are weighed by one decoder, not each by its own")
    # (N, K, ...): the samples of a datum one after the other, so that x comes from the cache.
    choice = options.likelihood(likelihood, sigma, full, x_hat, x)
    weight, mask = (None if t is None else t[None] for t in (choice.weight, choice.mask))
    choice = choice._replace(weight=weight, mask=mask)
    _, nll = objective.rows_nll(x_hat, x.expand(x_hat.shape), choice, (1, 0))
    return nll.transpose(0, 1)


@torch.no_grad()
def log_likelihood(
    decoder: Callable[[Tensor], Tensor],
    x: Tensor,
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    num_samples: int = 1000,
    samples_at_once: int = 50,
    chunk_dim: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    first_index: int = 0,
    offset: int = 0,
    sigma: float = 1.0,
    full: bool = True,
    progress: Callable[[int], object] | None = None,
    **chosen: Unpack[ELBOOptions],
) -> Tensor:
    """``ln p(x)`` of every datum by importance sampling, ``ln (1/K) sum_k w_k``: L_K, a lower bound on average.

    Burda et al. 2016, section 5 (there with K = 5000). Without gradients. The same for any ``samples_at_once``.

    Args:
        decoder: (M, ...) latents to (M, ...) reconstructions; it treats them one by one (a module in evaluation mode).
        x: (N, ...) the data.
        mu, logvar, chunk_dim, seed, generator, first_index, offset: as for ``rsample_kl``, the posterior of ``x``.
        num_samples: K. Default 1000.
        samples_at_once: how many of them are decoded at a time, which bounds the memory. Default 50.
        sigma: as for ``nll``, but a float. Default 1.
        full: keep the constants, so that the result is the logarithm of a density (or mass). Default True.
        progress: called with the number of samples that are done, after each part (``tqdm.update`` takes the differences).
        **chosen: ``LikelihoodOptions`` and ``PosteriorOptions``, as in ``iwae_loss`` and ``rsample_log_ratio``.

    Returns:
        (N,) in nats; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    count = arguments.index("num_samples", num_samples, 2**31)
    at_once = arguments.index("samples_at_once", samples_at_once, 2**31)
    if not count or not at_once:
        raise ValueError("num_samples, samples_at_once: got 0, takes at least 1")
    options.known(chosen, options.ELBO_NAMES - KL_CONTROL - {"batch_dims", "capacity"})
    data = {name: value for name, value in chosen.items() if name in options.LIKELIHOOD_NAMES}
    latent = {name: value for name, value in chosen.items() if name in options.POSTERIOR_NAMES}
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    seed = sampling.seed_of(mu, seed, generator)
    size = mu.numel() // 2 if logvar is None else mu.numel()
    size = size // len(mu) if seed.dim() and len(mu) else size
    total: Tensor | None = None
    for first in range(0, count, at_once):
        now = min(at_once, count - first)
        # The stream counts the elements of all samples, so a part of them starts where the last one ended.
        where = {"seed": seed, "first_index": first_index + first * size, "offset": offset}
        z, log_ratio = rsample_log_ratio(mu, logvar, num_samples=now, chunk_dim=chunk_dim or None, **where, **latent)
        x_hat = decoder(z.flatten(0, 1))
        nll = samples_nll(x_hat.unflatten(0, z.shape[:2]), x, sigma, full, data)
        part = torch.logsumexp((log_ratio - nll).double(), 0)
        total = part if total is None else torch.logaddexp(total, part)
        if progress is not None:
            progress(first + now)
    return (total - math.log(count)).to(nll.dtype)
