"""Every objective but the plain one: tensors are brought into the form of the general operations, and vectors of one number
for each sample are made of their terms."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import arguments, groups, ops, options, plain, reference, routes, sampling
from .autograd import NLL, PosteriorCall, apply, halves
from .options import LikelihoodChoice
from .spec import compute_dtype, constant_of


class Samples(NamedTuple):
    """``z`` (K, N, ...), or (N, ...) where no number of samples was given, ``kl`` and ``log_ratio`` (K, N)."""

    z: Tensor
    kl: Tensor | None
    log_ratio: Tensor | None


def sample(
    mu: Tensor,
    logvar: Tensor | None,
    chunk_dim: int | None,
    source: sampling.Source,
    given: dict[str, Any],
    *,
    sample_: bool = True,
    num_samples: int | None = None,
    want_kl: bool = True,
    want_log_ratio: bool = False,
    doubly: bool = False,
    mask: Tensor | None = None,
    batch_dims: tuple[int, ...] = (0,),
) -> Samples:
    """Samples of any posterior, and their terms; ``given`` are ``PosteriorOptions``."""
    options.known(given, options.POSTERIOR_NAMES)
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    mean, _ = halves(mu, logvar, chunk_dim)
    choice = options.posterior(given, mean)
    count = 1 if num_samples is None else arguments.index("num_samples", num_samples, 2**31)
    if count == 0:
        raise ValueError("num_samples: got 0, takes at least 1")
    batch_dims = arguments.batch_dims(batch_dims, "mu", mean)
    means = mean if num_samples is None else mean.expand(count, *mean.shape)
    if mask is not None and want_kl:
        kl = _masked_kl(mean, halves(mu, logvar, chunk_dim)[1], mask, given, choice, batch_dims)
        if not sample_:
            return Samples(means, kl, None)
        z = sample(mu, logvar, chunk_dim or None, source, given, num_samples=num_samples, want_kl=False).z
        return Samples(z, kl, None)
    by_dim = choice.free_bits is not None and choice.free_bits_over == "dim"
    if by_dim and batch_dims != (0,):
        raise ValueError('free_bits_over: got "dim" with batch_dims, takes "sample" or "element" there')
    by_element = by_dim or batch_dims != (0,)
    seed = eps = None
    first_index = offset = 0
    if sample_:
        seed, eps, first_index, offset = sampling.noise(mu, mean, num_samples, *source)
        if eps is not None and eps.requires_grad:
            raise ValueError("eps: got a tensor that requires grad, takes a constant with options beyond the plain ones")
        if eps is not None and num_samples is None:
            eps = eps[None]
    call = PosteriorCall(
        choice.spec, None, chunk_dim, first_index, offset, count,
        ("elements" if by_element else "rows") if want_kl else None, want_log_ratio, doubly,
    )  # fmt: skip
    z, kl, log_ratio = routes.posterior(mu, logvar, choice.prior_mean, choice.prior_raw, seed, eps, call)
    if not sample_:
        z = means
    elif num_samples is None:
        z = z[0]
    if kl is not None and by_dim:
        kl = groups.mean(kl, choice.group).clamp(min=choice.free_bits).sum().expand(kl.shape[:1])
    elif kl is not None:
        kl = _bounded(_kept(kl, batch_dims) if by_element else kl, choice.free_bits)
    return Samples(z, kl, log_ratio)


class Data(NamedTuple):
    """The checked arguments of the data side: ``dims`` are the batch's, ``shape`` their sizes."""

    x_hat: Tensor
    x: Tensor
    choice: LikelihoodChoice
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    weight: float | None
    grad_scale: float | Tensor


def checked(
    x_hat: Tensor,
    x: Tensor,
    sigma: float | str,
    full: bool,
    given: dict[str, Any],
    *,
    reduction: str,
    grad_scale: float | Tensor = 1.0,
) -> Data:
    """``given`` are ``LikelihoodOptions``."""
    options.known(given, options.LIKELIHOOD_NAMES)
    x_hat = arguments.batched("x_hat", x_hat)
    x = arguments.shaped("x", arguments.target("x", x), "x_hat", x_hat)
    choice = options.likelihood(given, sigma, full, x_hat, x)
    dims = arguments.batch_dims(given.get("batch_dims", (0,)), "x_hat", x_hat)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    shape = tuple(x_hat.shape[d] for d in dims)
    weight = arguments.reduction_weight(reduction, math.prod(shape))
    return Data(x_hat, x, choice, dims, shape, weight, arguments.grad_scale(grad_scale, x_hat))


def likelihood(data: Data) -> tuple[Tensor, Tensor]:
    """The reduced negative log-likelihood and its terms, of the batch's shape."""
    x_hat, x, choice, dims, _, weight, grad_scale = data
    if choice.optimal:
        nll = _optimal(x_hat, x, choice, dims)
        return nll if weight is None else weight * nll.sum(), nll
    total, nll = rows_nll(x_hat, x, choice, dims, weight, grad_scale)
    return nll if total is None else total, nll


def rows_nll(
    x_hat: Tensor,
    x: Tensor,
    choice: LikelihoodChoice,
    dims: tuple[int, ...],
    weight: float | None = None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor | None, Tensor]:
    """``weight`` times the sum of all terms (None without a weight), and the terms in the shape of dimensions ``dims``."""
    log_sigma = choice.log_sigma
    if log_sigma is not None and choice.min_log_sigma is not None:
        log_sigma = soft_floor(log_sigma, choice.min_log_sigma, compute_dtype(x_hat, x, log_sigma, choice.weight))
    order = (*dims, *(d for d in range(x_hat.dim()) if d not in dims))
    tensors = [None if t is None else t.permute(order) for t in (x_hat, x, log_sigma, choice.weight, choice.mask)]
    shape = tensors[0].shape[: len(dims)]
    # Rows have two dimensions. A scale that is one number for a row has its gradient from the row's sum, so channels are rows
    # too where they are what it depends on, unless a channel is a single element.
    channels = False
    if len(dims) == 1:
        sizes = () if log_sigma is None else tensors[2].shape[1:]
        channels = len(sizes) > 1 and sizes[0] > 1 and all(size == 1 for size in sizes[1:])
        if not channels:
            tensors = [None if t is None else t.unsqueeze(1) for t in tensors]
    elif len(dims) > 2:
        tensors = [
            None if t is None else t.expand(*shape[:-1], *t.shape[len(dims) - 1 :]).flatten(0, -2 + len(dims)) for t in tensors
        ]
    x_hat, x, log_sigma, row_weight, mask = tensors
    row_weight, mask = (None if t is None else t.expand(x_hat.shape) for t in (row_weight, mask))
    if not routes.plainly(x_hat, x, log_sigma, row_weight, mask):
        nll = routes.nll(x_hat, x, log_sigma, row_weight, mask, choice.spec)
        total = None if weight is None else weight * nll.sum()
        return total, (nll.sum(1) if channels else nll.reshape(shape))
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x_hat, x, log_sigma))
    call = (choice.spec, weight, needs, ops.select(x_hat.device))
    total, nll = apply(NLL, x_hat, x, log_sigma, row_weight, mask, grad_scale, call)[:2]
    return total, (nll.sum(1) if channels else nll.reshape(shape))


def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    chunk_dim: int | None,
    beta: float | Tensor,
    sigma: float | str,
    full: bool,
    reduction: str,
    grad_scale: float | Tensor,
    chosen: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """``loss``, ``nll`` and ``kl`` of ``fused_elbo.elbo_loss``: the sides one by one, and what a sample's KL counts for.

    ``chosen`` are ``ELBOOptions``.
    """
    options.known(chosen, options.ELBO_NAMES)
    given = {name: value for name, value in chosen.items() if name in options.LIKELIHOOD_NAMES}
    latent = {name: value for name, value in chosen.items() if name in options.POSTERIOR_NAMES}
    data = checked(x_hat, x, sigma, full, given, reduction=reduction, grad_scale=grad_scale)
    free_bits, over = options.free_bits_of(latent)
    group = data.choice.group
    if not data.choice.optimal:
        given.pop("process_group", None)
    beta = arguments.per_term("beta", beta, data.shape, "x_hat", x_hat)
    capacity = chosen.get("capacity")
    if capacity is not None:
        capacity = arguments.number("capacity", capacity)
        if reduction == "none":
            raise ValueError('capacity: got it with reduction "none", takes "mean" or "sum": it bounds the KL of a batch')
    if mu is not None:
        mask = given.get("mask")
        if mask is not None and mask.dim() < x_hat.dim():
            raise ValueError(
                "mask: got one of leading dimensions together with mu, takes kl=rsample_kl(..., mask=mask).kl there: what is "
                "padding for x may be padding for the latents"
            )
        if arguments.batched("mu", mu).shape[0] != x_hat.shape[0]:
            raise ValueError(f"mu: got a batch of {mu.shape[0]}, takes that of x_hat, {x_hat.shape[0]}")
        arguments.on_device("mu", mu, "x_hat", x_hat)
        kl = sample(mu, logvar, chunk_dim, sampling.NO_SOURCE, latent, sample_=False, batch_dims=data.dims).kl
        free_bits = None
    elif set(latent) - {"free_bits", "free_bits_over", "process_group"} or (free_bits is not None and over != "sample"):
        name = next((n for n in latent if not n.startswith(("free_bits", "process_group"))), "free_bits")
        raise ValueError(
            f'{name}: got it together with kl, takes it in the call that made kl; free_bits_over "sample" also here'
        )
    if arguments.floating("kl", kl).shape != data.shape:
        raise ValueError(f"kl: got shape {tuple(kl.shape)}, takes one value for each term of x_hat, {data.shape}")
    arguments.on_device("kl", kl, "x_hat", x_hat)
    counted = controlled(kl.to(compute_dtype(kl)), beta, free_bits, capacity, group)
    if not given and not data.choice.optimal:
        loss, nll, _ = plain.elbo(x_hat, x, None, None, counted, None, 1.0, sigma, full, reduction, grad_scale, False)
        return loss, nll, kl
    loss, nll = likelihood(data)
    return loss + (counted if data.weight is None else data.weight * counted.sum()), nll, kl


def soft_floor(log_sigma: Tensor, floor: float, dtype: torch.dtype) -> Tensor:
    """``floor + softplus(log_sigma - floor)``, in ``dtype`` (Rybkin, Daniilidis and Levine 2021, arXiv:2006.13202)."""
    return reference.softly_at_least(log_sigma.to(dtype), floor)


def controlled(
    kl: Tensor,
    beta: float | Tensor,
    free_bits: float | None,
    capacity: float | None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """What every sample's KL counts for in the loss."""
    kl = _bounded(kl, free_bits)
    if capacity is not None:
        kl = (groups.mean(kl.flatten(), group) - capacity).abs().expand(kl.shape)
    return kl * beta


def beyond(sigma: object, x: object, beta: object = 1.0) -> bool:
    """Whether arguments that are no options make an objective another than the plain one."""
    if isinstance(x, Tensor) and x.dtype is torch.uint8:
        return True
    return type(sigma) is str or (type(beta) is not float and isinstance(beta, Tensor) and beta.numel() != 1)


def _kept(terms: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Terms of elements, summed over all but the batch's dimensions."""
    others = [d for d in range(terms.dim()) if d not in dims]
    return terms.sum(others) if others else terms


def _bounded(kl: Tensor, free_bits: float | None) -> Tensor:
    return kl if free_bits is None else kl.clamp(min=free_bits)


def _masked_kl(
    mean: Tensor, raw: Tensor, mask: Tensor, given: dict[str, Any], choice: options.PosteriorChoice, dims: tuple[int, ...]
) -> Tensor:
    """The KL where the mask is True. What it hides is replaced before the pass: 0 times the gradient of a NaN is NaN."""
    mask = arguments.leading("mask", arguments.boolean("mask", mask), "mu", mean)
    if choice.free_bits is not None and choice.free_bits_over == "dim":
        raise ValueError('free_bits_over: got "dim" with a mask, takes "sample" or "element" there')

    def seen(t: Tensor | None, otherwise: float) -> Tensor | None:
        return None if t is None else torch.where(mask, t, torch.full_like(t, otherwise))

    harmless = 1.0 if choice.spec.param in ("std", "var") else 0.0
    prior = seen(choice.prior_mean, 0.0), seen(choice.prior_raw, harmless)
    by_element = {**given, "prior": prior}
    if choice.free_bits_over == "sample":
        by_element = {name: value for name, value in by_element.items() if not name.startswith("free_bits")}
    everything = tuple(range(mean.dim()))
    seen_mean, seen_raw = seen(mean, 0.0), seen(raw, harmless)
    kl = sample(seen_mean, seen_raw, None, sampling.NO_SOURCE, by_element, sample_=False, batch_dims=everything).kl
    return _bounded(_kept(torch.where(mask, kl, torch.zeros_like(kl)), dims), choice.free_bits)


def _optimal(x_hat: Tensor, x: Tensor, choice: LikelihoodChoice, dims: tuple[int, ...]) -> Tensor:
    """The terms with sigma^2 the batch's mean squared error, as a function of x_hat (sigma-VAE, arXiv:2006.13202, eq. 5)."""
    _, half_squares = rows_nll(x_hat, x, of_unit_sigma(choice), dims)
    return at_optimum(half_squares, _observed(x_hat, choice, dims, half_squares), choice)


def of_unit_sigma(choice: LikelihoodChoice) -> LikelihoodChoice:
    """What makes half the squared errors out of a choice whose sigma is optimal."""
    return choice._replace(spec=choice.spec._replace(full=False))


def at_optimum(half_squares: Tensor, count: Tensor, choice: LikelihoodChoice) -> Tensor:
    """The terms, of any shape, from halves of sums of squared errors of ``count`` elements."""
    sums = half_squares.sum(), count.sum()
    if choice.group is not None:
        sums = groups.total(torch.stack(sums), choice.group).unbind()
    log_sigma = 0.5 * torch.log(2.0 * sums[0] / sums[1])
    if choice.min_log_sigma is not None:
        log_sigma = soft_floor(log_sigma, choice.min_log_sigma, log_sigma.dtype)
    return half_squares * torch.exp(-2.0 * log_sigma) + count * (log_sigma + constant_of(choice.spec.family, choice.spec.full))


def _observed(x_hat: Tensor, choice: LikelihoodChoice, dims: tuple[int, ...], like: Tensor) -> Tensor:
    """How many elements each term is made of, by weight."""
    count = like.new_ones(())
    for factor in (choice.weight, choice.mask):
        count = count if factor is None else count * factor
    return _kept(count.to(like.dtype).expand(x_hat.shape), dims)
