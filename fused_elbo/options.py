"""The keyword arguments that choose a likelihood and a posterior, each stated once; and what they become for a backend."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import arguments
from .spec import ACTIVATIONS, FAMILIES, PARAMS, Likelihood, Posterior

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FREE_BITS_OVER = ("dim", "sample", "element")

# Terms are float32 or wider.
MOST_NATS = torch.finfo(torch.float32).max


class LikelihoodOptions(TypedDict, total=False):
    """Keyword arguments of the data side.

    Attributes:
        likelihood: "gaussian" (default), "laplace", "bernoulli" (x_hat holds logits, x is in [0, 1]) or
            "discretized_logistic" (x is uint8; Salimans et al. 2017, arXiv:1701.05517, section 2.1). ``sigma`` is the scale of
            all but "bernoulli".
        log_sigma: logarithm of the scale, a tensor that broadcasts to x_hat (a scalar, (C, 1, 1) for channels, or like x_hat),
            in place of ``sigma``; it gets its gradient in the same pass (Nix and Weigend 1994; Kendall and Gal 2017,
            arXiv:1703.04977, eq. 5).
        min_log_sigma: soft floor of log_sigma, ``m + softplus(log_sigma - m)`` (sigma-VAE, arXiv:2006.13202). It lies above
            log_sigma always: by 0.69 at the floor, by exp(m - log_sigma) far above it. For ``log_sigma`` and "optimal".
        activation: "identity" (default), "sigmoid" or "tanh": x_hat holds what comes before it, and gets the gradient for that.
        scale, shift: a uint8 x stands for ``scale x + shift``, in [0, 1] for scale 1/255. Default: none, and 0.
        weight: (N,), or any leading dimensions of x, or broadcastable to x: a factor of each element's nll. A constant.
        mask: bool, shaped as ``weight`` may be. What is False counts for nothing, whatever is there: the nll is the sum over
            observed elements, and is not divided by their number.
        batch_dims: the dimensions that are not summed over but averaged over, with 0 among them, for example (0, 2) for every
            frame of a video (N, C, T, H, W). Default (0,).
        process_group: of torch.distributed, whose processes hold shards of one batch. What is a number of the whole batch is
            then that of the whole group, here sigma="optimal"; loss and terms stay those of the process's own samples. The
            sum over the group is differentiated: where every process calls backward, each gets its share of the gradient of
            the sum of their losses. With means and shards of equal size, the average that DistributedDataParallel takes is
            the gradient of the undivided batch. Default None: each process for itself.
    """

    likelihood: str
    log_sigma: Tensor
    min_log_sigma: float
    activation: str
    scale: float
    shift: float
    weight: Tensor
    mask: Tensor
    batch_dims: tuple[int, ...]
    process_group: ProcessGroup


class PosteriorOptions(TypedDict, total=False):
    """Keyword arguments of the latent side.

    Attributes:
        param: what the posterior's second tensor holds: "logvar" (default), "log_std", "std", "var", or "softplus" for
            ``std = softplus(raw) + min_std``.
        min_std: for "softplus". Default 0.
        clamp: (low, high) for the second tensor, with torch.clamp's gradient.
        soft_clamp: the same with a smooth approach to the bounds (Chua et al. 2018, arXiv:1805.12114, appendix A.1).
        prior: (mean, second), either None: p(z) = N(m, s^2) in place of N(0, I), of tensors that broadcast to the mean;
            ``param`` and ``min_std`` hold for it too. Both get gradients.
        kl_balance: share a of the KL's gradient that goes to the prior, 1 - a goes to the posterior (DreamerV2,
            arXiv:2010.02193, section 2.2; there 0.8). Takes a prior.
        free_bits: nats below which the KL has no gradient and counts for no less (Kingma et al. 2016, arXiv:1606.04934,
            appendix C.8).
        free_bits_over: what they are counted over: "dim" (default: the batch mean of each latent dimension; ``kl`` is then one
            number for the whole batch, repeated), "sample" (the sum of a sample) or "element".
        process_group: as for the data side, here for free_bits over "dim". Where no number is of the whole batch, it changes
            nothing.
    """

    param: str
    min_std: float
    clamp: tuple[float, float]
    soft_clamp: tuple[float, float]
    prior: tuple[Tensor | None, Tensor | None]
    kl_balance: float
    free_bits: float
    free_bits_over: str
    process_group: ProcessGroup


class ELBOOptions(LikelihoodOptions, PosteriorOptions, total=False):
    """Keyword arguments of the whole objective: both sides', and

    Attributes:
        capacity: C in nats: the KL's term is ``beta |C - mean_n kl_n|`` (Burgess et al. 2018, arXiv:1804.03599, eq. 8). With
            process_group the mean is the group's.
    """

    capacity: float


LIKELIHOOD_NAMES = frozenset(LikelihoodOptions.__annotations__)
POSTERIOR_NAMES = frozenset(PosteriorOptions.__annotations__)
ELBO_NAMES = frozenset(ELBOOptions.__annotations__)


class PosteriorChoice(NamedTuple):
    """What ``posterior`` makes of its options: tensors of the prior have the mean's shape."""

    spec: Posterior
    prior_mean: Tensor | None
    prior_raw: Tensor | None
    free_bits: float | None
    free_bits_over: str
    group: ProcessGroup | None


class LikelihoodChoice(NamedTuple):
    """What ``likelihood`` makes of its options: tensors broadcast to x_hat, dimension by dimension."""

    spec: Likelihood
    log_sigma: Tensor | None
    weight: Tensor | None
    mask: Tensor | None
    min_log_sigma: float | None
    optimal: bool
    group: ProcessGroup | None


def known(given: dict[str, Any], names: frozenset[str]) -> None:
    for name in given:
        if name not in names:
            raise TypeError(f"{name}: is no argument here, which takes also {', '.join(sorted(names))}")


def posterior(options: dict[str, Any], mean: Tensor) -> PosteriorChoice:
    """The options of the latent side, checked against the posterior's mean."""
    param = arguments.choice("param", options.get("param", "logvar"), PARAMS)
    min_std = arguments.number("min_std", options.get("min_std", 0.0))
    if min_std < 0 or (min_std and param != "softplus"):
        raise ValueError(f'min_std: got {min_std} with param {param!r}, takes a float >= 0, and param "softplus"')
    clamps = [name for name in ("clamp", "soft_clamp") if options.get(name) is not None]
    if len(clamps) == 2:
        raise ValueError("soft_clamp: got it together with clamp, takes one of the two")
    bounds = arguments.interval(clamps[0], options[clamps[0]]) if clamps else None
    prior = options.get("prior", (None, None))
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(f"prior: got {arguments.kind(prior)}, takes a pair (mean, second parameter), either None")
    prior_mean, prior_raw = (
        None if t is None else arguments.broadcast(f"prior[{k}]", arguments.floating(f"prior[{k}]", t), "mu", mean)
        for k, t in enumerate(prior)
    )
    posterior_share = prior_share = 1.0
    balance = options.get("kl_balance")
    if balance is not None:
        prior_share = arguments.number("kl_balance", balance)
        if not 0 <= prior_share <= 1:
            raise ValueError(f"kl_balance: got {balance}, takes the prior's share of the gradient, in [0, 1]")
        if prior_mean is None and prior_raw is None:
            raise ValueError("kl_balance: got it without a prior, takes prior=(mean, second): N(0, I) has no gradient to share")
        posterior_share = 1.0 - prior_share
    free_bits, over = free_bits_of(options)
    element = free_bits if over == "element" else None
    spec = Posterior(param, min_std, bounds, clamps == ["soft_clamp"], element, posterior_share, prior_share)
    group = arguments.process_group(options.get("process_group"))
    return PosteriorChoice(spec, prior_mean, prior_raw, None if over == "element" else free_bits, over, group)


def free_bits_of(options: dict[str, Any]) -> tuple[float | None, str]:
    over = arguments.choice("free_bits_over", options.get("free_bits_over", "dim"), FREE_BITS_OVER)
    free_bits = options.get("free_bits")
    if free_bits is None:
        if "free_bits_over" in options:
            raise ValueError("free_bits_over: got it without free_bits, takes both")
        return None, over
    free_bits = arguments.number("free_bits", free_bits)
    if not 0 <= free_bits <= MOST_NATS:
        raise ValueError(f"free_bits: got {free_bits}, takes nats, >= 0 and no more than float32 holds, {MOST_NATS:.2g}")
    return free_bits, over


def likelihood(options: dict[str, Any], sigma: float | str, full: bool, x_hat: Tensor, x: Tensor) -> LikelihoodChoice:
    """The options of the data side, checked against x_hat and x, which has its trailing dimensions."""
    family = arguments.choice("likelihood", options.get("likelihood", "gaussian"), FAMILIES)
    activation = arguments.choice("activation", options.get("activation", "identity"), ACTIVATIONS)
    optimal = isinstance(sigma, str)
    log_sigma, floor = options.get("log_sigma"), options.get("min_log_sigma")
    if optimal and (sigma != "optimal" or family != "gaussian"):
        raise ValueError(f'sigma: got {sigma!r} with likelihood {family!r}, takes a float, or "optimal" for "gaussian"')
    if family == "bernoulli":
        if activation != "identity":
            raise ValueError(
                f'activation: got {activation!r} with likelihood "bernoulli", whose x_hat holds logits: leave it out'
            )
        if log_sigma is not None or sigma != 1.0:
            raise ValueError('sigma: got it or log_sigma with likelihood "bernoulli", which has no scale: leave it out')
    if log_sigma is not None:
        if optimal or sigma != 1.0:
            raise ValueError("log_sigma: got it together with sigma, takes one of the two")
        log_sigma = arguments.broadcastable("log_sigma", arguments.floating("log_sigma", log_sigma), "x_hat", x_hat)
    elif floor is not None and not optimal:
        raise ValueError('min_log_sigma: got it with a fixed sigma, takes log_sigma= or sigma="optimal"')
    floor = None if floor is None else arguments.number("min_log_sigma", floor)
    levels = x.dtype == torch.uint8
    if levels and "scale" not in options:
        raise TypeError(
            "x: got dtype torch.uint8, takes floats (torch.float32), or levels together with scale=, for x = scale u + shift: "
            "1/255 brings it to [0, 1]"
        )
    if not levels and ("scale" in options or "shift" in options):
        raise ValueError(f"scale: got it or shift with x of {x.dtype}, takes a uint8 x, which they turn into numbers")
    if family == "discretized_logistic" and not levels:
        raise TypeError(f'x: got dtype {x.dtype} with likelihood "discretized_logistic", takes torch.uint8, its 256 levels')
    weight, mask = options.get("weight"), options.get("mask")
    if weight is not None:
        weight = arguments.leading("weight", arguments.floating("weight", weight), "x", x)
        if weight.requires_grad:
            raise ValueError("weight: got a tensor that requires grad, takes a constant")
    if mask is not None:
        mask = arguments.leading("mask", arguments.boolean("mask", mask), "x", x)
    least = arguments.LEAST_SIGMA if family == "gaussian" else 0.0
    spec = Likelihood(
        family,
        activation,
        0.0 if optimal or family == "bernoulli" else math.log(arguments.positive("sigma", sigma, least)),
        bool(full),
        arguments.positive("scale", options.get("scale", 1.0), least=0.0),
        arguments.number("shift", options.get("shift", 0.0)),
    )
    group = arguments.process_group(options.get("process_group"))
    return LikelihoodChoice(spec, log_sigma, weight, mask, floor, optimal, group)
