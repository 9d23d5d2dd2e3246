"""The public functions: arguments, checks and defaults over ``autograd``.

Shapes: N samples, any number of trailing dimensions; every sum runs over all of them, and only the batch is averaged.
Tensors are float64, float32, bfloat16 or float16, with any strides, on one device; they are read in place. Terms and losses
are float32 (float64 for float64 inputs) and in nats; gradients have the dtype and layout of their tensor. Everything stays on
the device: nothing waits for it.

What is not the plain objective is chosen by the keyword arguments of ``fused_elbo.options``: ``PosteriorOptions``,
``LikelihoodOptions`` and, for both, ``ELBOOptions``.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import arguments, diagnostics, objective, options, plain, routes, sampling
from .options import ELBOOptions, LikelihoodOptions, PosteriorOptions


class LatentSample(NamedTuple):
    """``z`` like mu, and ``kl`` (N,), the KL divergence from the prior per sample, in nats."""

    z: Tensor
    kl: Tensor


class ELBOTerms(NamedTuple):
    """``loss`` (a scalar, or (N,) for reduction "none") and its terms per sample, ``nll`` (N,) and ``kl`` (N,), in nats."""

    loss: Tensor
    nll: Tensor
    kl: Tensor

    def backward(self, *_: object, **__: object) -> NoReturn:
        """Says where to call it: these are three tensors."""
        scalar = "out.loss.backward()"
        if self.loss.dim():
            scalar = 'one number: out.loss.mean().backward(), or reduction="mean"'
        raise TypeError(f"backward: got loss {tuple(self.loss.shape)}, nll and kl of elbo_loss, takes {scalar}")


@routes.unread("chunk_dim", "sample", "eps")
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
    num_samples: int | None = None,
    mask: Tensor | None = None,
    batch_dims: tuple[int, ...] = (0,),
    **posterior: Unpack[PosteriorOptions],
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
        num_samples: K samples in one pass, z of shape (K, N, ...), whose elements the stream counts in that order (with one
            seed per sample of the batch: all K of it, then the next); ``eps`` has that shape too. Default None: one, (N, ...).
        mask: bool, of leading dimensions of ``mu`` or broadcastable to it: where it is False the KL is not counted.
        batch_dims: the dimensions that ``kl`` keeps, with 0 among them; it is summed over the others. Default (0,).
        **posterior: ``PosteriorOptions``: param, min_std, clamp, soft_clamp, prior, kl_balance, free_bits, free_bits_over,
            process_group.

    Returns:
        ``z`` with ``mu``'s shape, dtype and layout, and ``kl`` (N,) in nats.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.latent(mu, logvar, chunk_dim, posterior, mask)
    source = (seed, generator, eps, first_index, offset)
    if num_samples is not None or mask is not None or batch_dims != (0,) or posterior:
        chosen = {"num_samples": num_samples, "mask": mask, "batch_dims": batch_dims}
        return LatentSample(*objective.sample(mu, logvar, chunk_dim, source, posterior, sample_=sample, **chosen)[:2])
    return LatentSample(*plain.sample(mu, logvar, chunk_dim, sample, source, want_kl=True))


@routes.unread("chunk_dim", "sample", "eps")
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
    num_samples: int | None = None,
    **posterior: Unpack[PosteriorOptions],
) -> Tensor:
    """The sample ``z`` of ``rsample_kl`` without the KL; arguments and errors are the same."""
    if diagnostics.active:
        diagnostics.latent(mu, logvar, chunk_dim, posterior)
    source = (seed, generator, eps, first_index, offset)
    if num_samples is not None or posterior:
        chosen = {"sample_": sample, "num_samples": num_samples, "want_kl": False}
        return objective.sample(mu, logvar, chunk_dim, source, posterior, **chosen).z
    return plain.sample(mu, logvar, chunk_dim, sample, source, want_kl=False)[0]


@routes.unread("chunk_dim", "reduction")
def kl_divergence(
    mu: Tensor,
    logvar: Tensor | None = None,
    *,
    chunk_dim: int | None = None,
    reduction: str = "mean",
    mask: Tensor | None = None,
    batch_dims: tuple[int, ...] = (0,),
    **posterior: Unpack[PosteriorOptions],
) -> Tensor:
    """``KL(N(mu, exp(logvar)) || N(0, I))`` in nats, summed over all dimensions but the batch's.

    Kingma and Welling 2014 (arXiv:1312.6114), appendix B. Evaluated as ``1/2 (mu^2 + expm1(logvar) - logvar)`` with a series
    near 0: relative error under 1e-6 in float32, never negative.

    Args:
        mu, logvar, chunk_dim, mask, batch_dims, **posterior: as for ``rsample_kl``.
        reduction: "mean" over the batch (default), "sum", or "none" for (N,).

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.latent(mu, logvar, chunk_dim, posterior, mask)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    if mask is not None or batch_dims != (0,) or posterior:
        chosen = {"sample_": False, "mask": mask, "batch_dims": batch_dims}
        kl = objective.sample(mu, logvar, chunk_dim, sampling.NO_SOURCE, posterior, **chosen).kl
    else:
        kl = plain.sample(mu, logvar, chunk_dim, False, sampling.NO_SOURCE, want_kl=True)[1]
    return kl if reduction == "none" else getattr(kl, reduction)()


@routes.unread("chunk_dim")
def kl_per_dim(
    mu: Tensor, logvar: Tensor | None = None, *, chunk_dim: int | None = None, **posterior: Unpack[PosteriorOptions]
) -> Tensor:
    """The KL of each latent dimension, averaged over the batch, in nats: what tells used dimensions from collapsed ones.

    Args:
        mu, logvar, chunk_dim, **posterior: as for ``rsample_kl``; ``free_bits`` and ``process_group`` are not for a monitor.

    Returns:
        A tensor of ``mu``'s shape without the batch dimension; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.latent(mu, logvar, chunk_dim, posterior)
    options.known(posterior, options.POSTERIOR_NAMES - {"free_bits", "free_bits_over", "process_group"})
    everything = tuple(range(arguments.batched("mu", mu).dim()))
    chosen = {"sample_": False, "batch_dims": everything}
    return objective.sample(mu, logvar, chunk_dim, sampling.NO_SOURCE, posterior, **chosen).kl.mean(0)


@routes.unread("sigma", "full", "reduction", "grad_scale")
def nll(
    x_hat: Tensor,
    x: Tensor,
    *,
    sigma: float | str = 1.0,
    full: bool = False,
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    **likelihood: Unpack[LikelihoodOptions],
) -> Tensor:
    """``-ln p(x | z)`` of any likelihood, with its gradient in the same pass over memory.

    With y = activation(x_hat) and scale s: "gaussian" ``(x - y)^2 / (2 s^2) + ln s``; "laplace" ``|x - y| / s + ln s``;
    "bernoulli" ``softplus(y) - x y``; "discretized_logistic" ``-ln(F((x + d/2 - y) / s) - F((x - d/2 - y) / s))`` with F the
    logistic function and d the distance of two levels, the first and last of which have the tails too. Summed over all but
    the batch.

    Args:
        x_hat, x, full, reduction, grad_scale: as for ``gaussian_nll``; x may be uint8. ``full`` adds ln 2 for "laplace".
        sigma: the scale s, or "optimal" for the maximum likelihood of the batch, ``sigma^2 = mean (x - y)^2`` over all
            (weighted, observed) elements (sigma-VAE, arXiv:2006.13202, eq. 5), part of the function that is differentiated. It
            takes a second reading of x_hat and x, in the backward, and has no value where the error is 0. Default 1.
        **likelihood: ``LikelihoodOptions``: likelihood, log_sigma, min_log_sigma, activation, scale, shift, weight, mask,
            batch_dims, process_group.

    Returns:
        A scalar, or for "none" the terms, (N,) or of the shape of ``batch_dims``; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.likelihood(x_hat, x, likelihood)
    return objective.likelihood(
        objective.checked(x_hat, x, sigma, full, likelihood, reduction=reduction, grad_scale=grad_scale)
    )[0]


@routes.unread("sigma", "full", "reduction", "grad_scale", "inplace")
def gaussian_nll(
    x_hat: Tensor,
    x: Tensor,
    *,
    sigma: float | str = 1.0,
    full: bool = False,
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
    **likelihood: Unpack[LikelihoodOptions],
) -> Tensor:
    """``-ln N(x; x_hat, sigma^2 I)``, with its gradient in the same pass over memory.

    Per sample ``sum_i (x_i - x_hat_i)^2 / (2 sigma^2) + D ln sigma``, D the number of elements of a sample; Kingma and Welling
    2014 (arXiv:1312.6114), appendix C.2, with a fixed variance.

    Args:
        x_hat: (N, ...) the decoder's mean.
        x: like ``x_hat``, the data; its dtype may differ.
        sigma: standard deviation of the decoder, positive. ``C sum (x - x_hat)^2`` is ``sigma = sqrt(1 / (2 C))``. Default 1.
            Or "optimal", as for ``nll``.
        full: keep the constant ``D/2 ln 2 pi``. Default False.
        reduction: "mean" over the batch (default), "sum", or "none" for (N,). With "none" the gradient is computed in the
            backward, from the upstream gradient of every sample.
        grad_scale: the upstream gradient to expect (1 / accumulation steps, a GradScaler's scale), a float or one element on
            the device. The gradient is computed for it at once; another upstream gradient is right too, only slower. Default 1.
        inplace: write the gradient over ``x_hat``, which must not be used again, and shares no memory with another argument.
            For the plain objective. In float16 tell ``grad_scale``: with x_hat gone, another upstream gradient multiplies what
            was rounded. Default False.
        **likelihood: as for ``nll``.

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 inputs.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.likelihood(x_hat, x, likelihood)
    if likelihood or objective.beyond(sigma, x):
        _not_inplace(inplace)
        return objective.likelihood(
            objective.checked(x_hat, x, sigma, full, likelihood, reduction=reduction, grad_scale=grad_scale)
        )[0]
    return plain.gaussian_nll(x_hat, x, sigma, full, reduction, grad_scale, inplace)


@routes.unread("kl", "chunk_dim", "beta", "sigma", "full", "reduction", "grad_scale", "inplace")
def elbo_loss(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    kl: Tensor | None = None,
    chunk_dim: int | None = None,
    beta: float | Tensor = 1.0,
    sigma: float | str = 1.0,
    full: bool = False,
    reduction: str = "mean",
    grad_scale: float | Tensor = 1.0,
    inplace: bool = False,
    **chosen: Unpack[ELBOOptions],
) -> ELBOTerms:
    """The negative ELBO, ``mean_n (nll_n + beta kl_n)``, and all its gradients in one pass over memory.

    Kingma and Welling 2014 (arXiv:1312.6114), eq. 10; ``beta`` as in Higgins et al. 2017 (beta-VAE), eq. 4. Either pass the
    posterior, ``elbo_loss(x_hat, x, mu, logvar)``, or the KL that ``rsample_kl`` returned, ``elbo_loss(x_hat, x, kl=kl)``.

    Args:
        x_hat, x, sigma, full, reduction, grad_scale, inplace: as for ``gaussian_nll``.
        mu, logvar, chunk_dim: as for ``rsample_kl``.
        kl: (N,) the KL per sample, in place of ``mu`` and ``logvar``; with ``batch_dims``, of their shape.
        beta: weight of the KL: a float, one element on the device, or (N,), one weight per sample. Annealing it never waits for
            the device. Under ``torch.compile`` anneal a tensor, or a float with ``dynamic=True``: by itself the compiler makes
            a new graph for a new float. Default 1.
        **chosen: ``ELBOOptions``: those of ``nll``, those of ``rsample_kl`` for ``mu`` and ``logvar``, and capacity. With
            ``kl`` given, ``free_bits`` takes ``free_bits_over="sample"``; the others belong to the call that made it.

    Returns:
        ``loss``, ``nll`` (N,) and ``kl`` (N,), before ``beta`` and what else controls it; the terms may be differentiated as
        well.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    if diagnostics.active:
        diagnostics.objective(x_hat, x, mu, logvar, kl, chunk_dim, beta, sigma, chosen)
    if (mu is None) == (kl is None):
        got = "neither" if mu is None else "both"
        raise ValueError(f"kl: got {got} of mu and kl, takes the posterior (mu, logvar) or kl=, the KL per sample")
    if mu is None and (logvar is not None or chunk_dim is not None):
        raise ValueError("mu: got None with logvar or chunk_dim, takes the posterior's mean or packed moments")
    if chosen or objective.beyond(sigma, x, beta):
        _not_inplace(inplace)
        return ELBOTerms(*objective.elbo(x_hat, x, mu, logvar, kl, chunk_dim, beta, sigma, full, reduction, grad_scale, chosen))
    loss, nll, kl_out = plain.elbo(x_hat, x, mu, logvar, kl, chunk_dim, beta, sigma, full, reduction, grad_scale, inplace)
    return ELBOTerms(loss, nll, kl if mu is None else kl_out)


def _not_inplace(inplace: bool) -> None:
    if inplace:
        raise ValueError("inplace: got True with options beyond the plain objective's, takes False there")
