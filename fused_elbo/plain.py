"""The plain objective: Gaussian decoder of fixed variance, standard normal prior, one sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import arguments, operators, ops, reference, routes, sampling
from .autograd import ELBO, Excess, GaussianNLL, PosteriorCall, RsampleKL, apply, halves
from .spec import Gaussian, Likelihood, Posterior, compute_dtype, signed

NOTHING = (False,) * 5
UNIT = Gaussian()


def elbo(
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
    """``loss``, ``nll`` and ``kl`` of ``fused_elbo.elbo_loss`` in its plain form, or without a KL at all."""
    x_hat, x, likelihood, weight, grad_scale = _data(x_hat, x, sigma, full, reduction, grad_scale, inplace)
    if mu is not None:
        mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
        if mu.shape[0] != x_hat.shape[0]:
            raise ValueError(f"mu: got a batch of {mu.shape[0]}, takes that of x_hat, {x_hat.shape[0]}")
        arguments.on_device("mu", mu, "x_hat", x_hat)
    if kl is not None:
        kl = arguments.per_sample("kl", kl, "x_hat", x_hat)
    # A compiler's symbol stands for a weight that changes: as a number it would be that of this call alone.
    if type(beta) is not float and not isinstance(beta, (torch.SymFloat, torch.SymInt)):
        beta = arguments.scalar("beta", beta, "x_hat", x_hat)
    if not routes.plainly(x_hat, x, mu, logvar, kl):
        return _composed(x_hat, x, mu, logvar, kl, chunk_dim, beta, likelihood, weight)
    if inplace:
        arguments.apart("x_hat", x_hat, x=x, mu=mu, logvar=logvar, kl=kl)
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
    return apply(ELBO, x_hat, x, mu, logvar, kl, beta, grad_scale, options)


def gaussian_nll(
    x_hat: Tensor, x: Tensor, sigma: float, full: bool, reduction: str, grad_scale: float | Tensor, inplace: bool
) -> Tensor:
    """``fused_elbo.gaussian_nll`` in its plain form."""
    if reduction == "none":
        return elbo(x_hat, x, None, None, None, None, 1.0, sigma, full, reduction, grad_scale, inplace)[0]
    x_hat, x, likelihood, weight, grad_scale = _data(x_hat, x, sigma, full, reduction, grad_scale, inplace)
    if not routes.plainly(x_hat, x):
        return _composed(x_hat, x, None, None, None, None, 1.0, likelihood, weight)[0]
    if inplace:
        arguments.apart("x_hat", x_hat, x=x)
    needs = NOTHING
    if torch.is_grad_enabled():
        needs = (x_hat.requires_grad, x.requires_grad, False, False, False)
    options = (None, likelihood, weight, needs, inplace and needs[0], ops.select(x_hat.device))
    return apply(GaussianNLL, x_hat, x, grad_scale, options)


def _data(
    x_hat: Tensor, x: Tensor, sigma: float, full: bool, reduction: str, grad_scale: float | Tensor, inplace: bool
) -> tuple[Tensor, Tensor, Gaussian, float | None, float | Tensor]:
    """Checks the data side: ``x_hat``, ``x``, the likelihood, the weight of a total, and ``grad_scale``."""
    x_hat = arguments.batched("x_hat", x_hat)
    x = arguments.like("x", x, "x_hat", x_hat)
    # The defaults need no check, and a check takes longer than to see that.
    if type(grad_scale) is not float or grad_scale != 1.0:
        grad_scale = arguments.grad_scale(grad_scale, x_hat)
    if type(sigma) is float and sigma == 1.0 and full is False:
        likelihood = UNIT
    else:
        likelihood = Gaussian(arguments.positive("sigma", sigma), bool(full))
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    if inplace:
        if reduction == "none":
            raise ValueError('inplace: got True with reduction "none", takes False there: its gradient comes in the backward')
        arguments.overwritable("x_hat", x_hat)
    return x_hat, x, likelihood, arguments.reduction_weight(reduction, x_hat.shape[0]), grad_scale


def _composed(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    chunk_dim: int | None,
    beta: float | Tensor,
    likelihood: Gaussian,
    weight: float | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same of operations that each stand for themselves."""
    if routes.left_to_compiler(x_hat, x):
        nll = reference.gaussian_nll(x_hat, x, likelihood)
    elif routes.compiled(x_hat, x):
        needs = [torch.is_grad_enabled() and t.requires_grad for t in (x_hat, x)]
        nll = operators.gaussian(x_hat, x, likelihood.sigma, likelihood.full, needs)[0]
    else:
        spec = Likelihood(log_scale=math.log(likelihood.sigma), full=likelihood.full)
        nll = routes.nll(x_hat.unsqueeze(1), x.unsqueeze(1), None, None, None, spec).squeeze(1)
    dtype = compute_dtype(x_hat, x, mu, logvar, kl)
    nll = nll.to(dtype)
    if mu is not None:
        kl = latent(mu, logvar, chunk_dim, want_kl=True)[1].to(dtype)
    terms = nll if kl is None else nll + beta * kl.to(dtype)
    return terms if weight is None else weight * terms.sum(), nll, kl


def sample(
    mu: Tensor,
    logvar: Tensor | None,
    chunk_dim: int | None,
    sample_: bool,
    source: sampling.Source,
    *,
    want_kl: bool,
) -> tuple[Tensor, Tensor | None]:
    """``z``, the mean itself where no sample is wanted, and the KL if it is."""
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    if sample_:
        mean = mu if source[2] is None else halves(mu, logvar, chunk_dim)[0]
        return latent(mu, logvar, chunk_dim, *sampling.noise(mu, mean, None, *source), want_kl=want_kl)
    mean, _ = halves(mu, logvar, chunk_dim)
    return mean, latent(mu, logvar, chunk_dim, want_kl=True)[1] if want_kl else None


def latent(
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
    """``z``, where there is noise, and the KL."""
    if not routes.plainly(mu, logvar, eps):
        return _latent_operator(mu, logvar, chunk_dim, seed, eps, first_index, offset, want_kl)
    return apply(RsampleKL, mu, logvar, seed, eps, (first_index, offset, chunk_dim, want_kl, ops.select(mu.device)))


def _latent_operator(
    mu: Tensor,
    logvar: Tensor | None,
    chunk_dim: int,
    seed: Tensor | None,
    eps: Tensor | None,
    first_index: int,
    offset: int,
    want_kl: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """``latent`` for whatever takes no Function."""
    if routes.left_to_compiler(mu, logvar, seed, eps):
        mu, logvar = halves(mu, logvar, chunk_dim)
        if seed is not None:
            wide = compute_dtype(mu, logvar) == torch.float64
            eps = operators.normals(seed, mu.shape, first_index, signed(offset), wide)
        z = None if eps is None else reference.reparameterize(mu, logvar, eps)
        return z, _exact_kl(mu, logvar) if want_kl else None
    if eps is not None and eps.requires_grad:
        # An operator takes eps for a constant.
        z = reference.reparameterize(*halves(mu, logvar, chunk_dim), eps)
        return z, _latent_operator(mu, logvar, chunk_dim, None, None, 0, 0, True)[1] if want_kl else None
    if routes.compiled(mu, logvar, seed, eps):
        z, kl = operators.latent(mu, logvar, seed, eps, chunk_dim, first_index, signed(offset), want_kl)
        return None if seed is None and eps is None else z, kl if want_kl else None
    eps = None if eps is None else eps.unsqueeze(0)
    call = PosteriorCall(Posterior(), None, chunk_dim, first_index, offset, want_kl="rows" if want_kl else None)
    z, kl, _ = routes.posterior(mu, logvar, None, None, seed, eps, call, _shard)
    return None if z is None else z.squeeze(0), kl


# Read by a compiler for which numbers are symbols, the second call of a Function in one graph is an error of its own.
@routes.unread()
def _exact_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return reference.kl_divergence(mu, logvar, Excess.apply)


def _shard(
    mu: Tensor, logvar: Tensor, prior_mean: None, prior_raw: None, seed: Tensor, eps: None, call: PosteriorCall
) -> tuple[Tensor, Tensor | None, None]:
    """``routes.posterior`` of a shard of a distributed tensor, with the bits of the undivided one."""
    place = (call.first_index, call.offset, call.chunk_dim, call.want_kl is not None, ops.select(mu.device))
    z, kl = apply(RsampleKL, mu, logvar, seed, eps, place)
    return z.unsqueeze(0), kl, None
