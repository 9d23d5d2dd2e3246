"""The public functions: arguments, checks and defaults over ``autograd``.

Shapes: N samples, any number of trailing dimensions; every sum runs over all of them, and only the batch is averaged.
Tensors are float64, float32, bfloat16 or float16, with any strides, on one device; they are read in place. Terms and losses
are float32 (float64 for float64 inputs) and in nats; gradients have the dtype and layout of their tensor. Everything stays on
the device: nothing waits for it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import arguments, ops
from .autograd import ELBO, RsampleKL, apply, halves
from .spec import Gaussian

NOTHING = (False,) * 5


class LatentSample(NamedTuple):
    """``z`` like mu, and ``kl`` (N,), the KL divergence from the prior per sample, in nats."""

    z: Tensor
    kl: Tensor


class ELBOTerms(NamedTuple):
    """``loss`` (a scalar, or (N,) for reduction "none") and its terms per sample, ``nll`` (N,) and ``kl`` (N,), in nats."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


def rsample_kl(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    chunk_dim: int | None = None,
    sample: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    first_index: int = 0,
    offset: int = 0,
) -> LatentSample:
    """Sample the posterior N(mu, exp(logvar)) and measure its KL from N(0, I), in one pass over memory.

    ``z = mu + eps exp(logvar / 2)`` (Kingma and Welling 2014, arXiv:1312.6114, section 2.4) and, per sample,
    ``kl = sum_j 1/2 (mu_j^2 + exp(logvar_j) - logvar_j - 1)`` (ibid., appendix B). The noise is made in the pass and made
    again by the backward: it is never stored.

    Args:
        mu: (N, ...) posterior mean; or packed moments, mean and log-variance side by side, with ``chunk_dim``.
        logvar: like ``mu``, the log-variance. None with ``chunk_dim``.
        chunk_dim: dimension of packed moments, as for ``torch.chunk(moments, 2, chunk_dim)``. Their gradient is packed too.
        sample: False gives z = mu (evaluation) and the same KL.
        seed: key of the noise: an int (64 bits), an int64 tensor of shape (), or of shape (N,): one per sample, whose noise
            then does not depend on its batch. None draws one from ``generator``.
        generator: of ``mu``'s device; default torch's own, as for ``torch.randn``.
        eps: like ``mu``, explicit noise in place of the stream.
        first_index: number of ``mu``'s first element in the stream, for a shard of a larger batch. Default 0.
        offset: 64-bit counter that separates several samples under one seed. Default 0.

    Returns:
        ``z`` with ``mu``'s shape, dtype and layout, and ``kl`` (N,) in nats.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    source = (seed, generator, eps, first_index, offset)
    return LatentSample(*_sample(mu, logvar, chunk_dim, sample, source, want_kl=True))


def reparameterize(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    chunk_dim: int | None = None,
    sample: bool = True,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    eps: Tensor | None = None,
    first_index: int = 0,
    offset: int = 0,
) -> Tensor:
    """The sample ``z`` of ``rsample_kl`` without the KL; arguments and errors are the same."""
    source = (seed, generator, eps, first_index, offset)
    return _sample(mu, logvar, chunk_dim, sample, source, want_kl=False)[0]


def kl_divergence(mu: Tensor, logvar: Tensor | None = None, *, chunk_dim: int | None = None, reduction: str = "mean") -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(0, I))`` in nats, summed over all dimensions but the batch's.

    Kingma and Welling 2014 (arXiv:1312.6114), appendix B. Evaluated as ``1/2 (mu^2 + expm1(logvar) - logvar)`` with a series
    near 0: relative error under 1e-6 in float32, never negative.

    Args:
        mu, logvar, chunk_dim: as for ``rsample_kl``.
        reduction: "mean" over the batch (default), "sum", or "none" for (N,).

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    kl = _latent(mu, logvar, chunk_dim, want_kl=True)[1]
    return kl if reduction == "none" else getattr(kl, reduction)()


def gaussian_nll(
    x_hat: Tensor,
    x: Tensor,
    *,
    sigma: float = 1.0,
    full: bool = False,
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
) -> Tensor:
    """``-ln N(x; x_hat, sigma^2 I)``, with its gradient in the same pass over memory.

    Per sample ``sum_i (x_i - x_hat_i)^2 / (2 sigma^2) + D ln sigma``, D the number of elements of a sample; Kingma and Welling
    2014 (arXiv:1312.6114), appendix C.2, with a fixed variance.

    Args:
        x_hat: (N, ...) the decoder's mean.
        x: like ``x_hat``, the data; its dtype may differ.
        sigma: standard deviation of the decoder, positive. ``C sum (x - x_hat)^2`` is ``sigma = sqrt(1 / (2 C))``. Default 1.
        full: keep the constant ``D/2 ln 2 pi``. Default False.
        reduction: "mean" over the batch (default), "sum", or "none" for (N,). With "none" the gradient is computed in the
            backward, from the upstream gradient of every sample.
        grad_scale: the upstream gradient to expect (1 / accumulation steps, a GradScaler's scale), a float or one element on
            the device. The gradient is computed for it at once; another upstream gradient is right too, only slower. Default 1.
        inplace: write the gradient over ``x_hat``, which must not be used again. Default False.

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    return _elbo(x_hat, x, None, None, None, None, 1.0, sigma, full, reduction, grad_scale, inplace)[0]


def elbo_loss(
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
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
) -> ELBOTerms:
    """The negative ELBO, ``mean_n (nll_n + beta kl_n)``, and all its gradients in one pass over memory.

    Kingma and Welling 2014 (arXiv:1312.6114), eq. 10; ``beta`` as in Higgins et al. 2017 (beta-VAE), eq. 4. Either pass the
    posterior, ``elbo_loss(x_hat, x, mu, logvar)``, or the KL that ``rsample_kl`` returned, ``elbo_loss(x_hat, x, kl=kl)``.

    Args:
        x_hat, x, sigma, full, reduction, grad_scale, inplace: as for ``gaussian_nll``.
        mu, logvar, chunk_dim: as for ``rsample_kl``.
        kl: (N,) the KL per sample, in place of ``mu`` and ``logvar``.
        beta: weight of the KL, a float or one element on the device. Annealing it never waits for the device; under
            ``torch.compile`` anneal a tensor, since each new float is a new graph. Default 1.

    Returns:
        ``loss``, ``nll`` (N,) and ``kl`` (N,); the terms may be differentiated as well.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if (mu is None) == (kl is None):
        got = "neither" if mu is None else "both"
        raise ValueError(f"kl: got {got} of mu and kl, takes the posterior (mu, logvar) or kl=, the KL per sample")
    if mu is None and (logvar is not None or chunk_dim is not None):
        raise ValueError("mu: got None with logvar or chunk_dim, takes the posterior's mean or packed moments")
    loss, nll, kl_out = _elbo(x_hat, x, mu, logvar, kl, chunk_dim, beta, sigma, full, reduction, grad_scale, inplace)
    return ELBOTerms(loss, nll, kl if mu is None else kl_out)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """The seed that a sample takes where none is given: one int64 draw, shape (), from a generator of ``device``.

    Raises:
        ValueError: the generator is of another kind of device.
    """
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator: got one of device {generator.device}, takes one of {device}")
    return torch.randint(-(2**63), 2**63 - 1, (), device=device, generator=generator)


def _elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    chunk_dim: int | None,
    beta: float | Tensor,
    sigma: float,
    full: bool,
    reduction: str,
    grad_scale: float | Tensor,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    x_hat = arguments.batched("x_hat", x_hat)
    x = arguments.like("x", x, "x_hat", x_hat)
    count = x_hat.shape[0]
    if mu is not None:
        mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
        if mu.shape[0] != count:
            raise ValueError(f"mu: got a batch of {mu.shape[0]}, takes that of x_hat, {count}")
        arguments.on_device("mu", mu, "x_hat", x_hat)
    if kl is not None:
        kl = arguments.per_sample("kl", kl, "x_hat", x_hat)
    beta = arguments.scalar("beta", beta, "x_hat", x_hat)
    grad_scale = arguments.scalar("grad_scale", grad_scale, "x_hat", x_hat)
    if not isinstance(grad_scale, float) and grad_scale.requires_grad:
        raise ValueError("grad_scale: got a tensor that requires grad, takes a constant: it only says what backward will bring")
    likelihood = Gaussian(arguments.positive("sigma", sigma), bool(full))
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    if inplace:
        if reduction == "none":
            raise ValueError('inplace: got True with reduction "none", takes False there: its gradient comes in the backward')
        arguments.overwritable("x_hat", x_hat)
    weight = None if reduction == "none" else 1.0 if reduction == "sum" else 1.0 / count if count else math.nan
    needs = NOTHING
    if torch.is_grad_enabled():
        needs = (
            x_hat.requires_grad,
            x.requires_grad,
            mu is not None and mu.requires_grad,
            logvar is not None and logvar.requires_grad,
            kl is not None and kl.requires_grad,
        )
    options = (chunk_dim, likelihood, weight, needs, inplace and needs[0], ops.select(x_hat.device))
    return apply(ELBO, x_hat, x, mu, logvar, kl, beta, grad_scale, options)[:3]


def _sample(
    mu: Tensor,
    logvar: Tensor | None,
    chunk_dim: int | None,
    sample: bool,
    source: tuple[int | Tensor | None, torch.Generator | None, Tensor | None, int, int],
    *,
    want_kl: bool,
) -> tuple[Tensor, Tensor | None]:
    """``z``, the mean itself where no sample is wanted, and the KL if it is."""
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    if sample:
        return _latent(mu, logvar, chunk_dim, *_noise(mu, chunk_dim, *source), want_kl=want_kl)
    mean, _ = halves(mu, logvar, chunk_dim)
    return mean, _latent(mu, logvar, chunk_dim, want_kl=True)[1] if want_kl else None


def _latent(
    mu: Tensor,
    logvar: Tensor | None,
    chunk_dim: int,
    seed: Tensor | None = None,
    eps: Tensor | None = None,
    first_index: int = 0,
    offset: int = 0,
    *,
    want_kl: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return apply(RsampleKL, mu, logvar, seed, eps, (first_index, offset, chunk_dim, want_kl, ops.select(mu.device)))


def _noise(
    mu: Tensor,
    chunk_dim: int,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    eps: Tensor | None,
    first_index: int,
    offset: int,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    """``seed, eps, first_index, offset`` as tensors and ints that fit ``mu``."""
    if (seed is not None) + (generator is not None) + (eps is not None) > 1:
        first, second, *_ = (name for name, v in (("seed", seed), ("generator", generator), ("eps", eps)) if v is not None)
        raise ValueError(f"{second}: got it together with {first}, takes at most one of seed, generator and eps")
    arguments.index("first_index", first_index, 2**62)
    arguments.index("offset", offset, 2**64)
    if eps is not None:
        return None, arguments.like("eps", eps, "mu", halves(mu, None, chunk_dim)[0]), first_index, offset
    return _seed(mu, seed, generator), None, first_index, offset


def _seed(mu: Tensor, seed: int | Tensor | None, generator: torch.Generator | None) -> Tensor:
    if seed is None:
        return draw_seed(mu.device, generator)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(f"seed: got dtype {seed.dtype}, takes torch.int64")
        if seed.shape not in ((), mu.shape[:1]):
            raise ValueError(f"seed: got shape {tuple(seed.shape)}, takes () or, one per sample, {tuple(mu.shape[:1])}")
        arguments.on_device("seed", seed, "mu", mu)
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed: got {seed!r}, takes an int or an int64 tensor")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: got {seed}, takes 64 bits")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), signed, dtype=torch.int64, device=mu.device)
