"""Every operation and option beside the lines that people write for it: what ``python -m fused_elbo check`` and the tests run.

The eager lines are independent of the library: PyTorch's own losses and distributions, or the published code's formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Laplace, Normal

from . import functional as fe
from . import iwae

SHAPE = (3, 5, 7)
SAMPLES = 2
BETA = 0.7
SIGMA = 0.6
# Squares of a few deviations.
LARGE = 16.0
BOUNDS = (-0.5, 0.5)
FLOOR = -0.3
NATS = 0.4

# How an input is drawn: its dimensions, as letters for samples K and the three of ``SHAPE``, and what becomes of normals.
KINDS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "real": ("abc", lambda t: t),
    "small": ("abc", lambda t: 0.3 * t),
    "unit": ("abc", torch.sigmoid),
    "positive": ("abc", lambda t: 0.5 * t.abs() + 0.7),
    "scalar": ("", lambda t: 0.3 * t),
    "channel": ("b1", lambda t: 0.3 * t),
    "narrow": ("b1", lambda t: 0.3 * t - 2),
    "row": ("a", torch.abs),
    "samples": ("Kabc", lambda t: t),
    "sample rows": ("Ka", lambda t: t),
    "levels": ("abc", lambda t: (128 + 90 * t).clamp(0, 255).round()),
    "mask": ("abc", lambda t: t > -0.5),
    "frames": ("ab", lambda t: t > -0.5),
}
DTYPES = {"levels": torch.uint8, "mask": torch.bool, "frames": torch.bool}
# Before a kind: the operation takes no gradient for it.
CONSTANT = "constant "


class Operation(NamedTuple):
    """``fused(*inputs)`` is the library's, ``eager`` the lines.

    Attributes:
        inputs: the kind of each, of ``KINDS``.
        sums: which outputs are sums.
        magnitude: of the numbers whose difference a result is, and whose rounding is then part of it; 0 for none.
        function: whether the gradient is that of the outputs, as gradcheck wants it (a balanced KL's is not).
    """

    fused: Callable[..., Any]
    eager: Callable[..., Any]
    inputs: tuple[str, ...]
    sums: tuple[bool, ...] = (True,)
    magnitude: float = 1.0
    function: bool = True


def draw(kind: str, generator: torch.Generator, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    """An input of a kind for data of ``shape``: float32 that requires grad, or a constant of its dtype; on the CPU."""
    name = kind.removeprefix(CONSTANT)
    letters, transform = KINDS[name]
    sizes = dict(zip("abc1K", (*shape, 1, SAMPLES), strict=True))
    values = transform(torch.randn([sizes[letter] for letter in letters], generator=generator))
    return values.to(DTYPES.get(name, torch.float32)).requires_grad_(name == kind and name not in DTYPES)


def rows(t: Tensor) -> Tensor:
    return t.flatten(1).sum(1)


def squares(x_hat: Tensor, x: Tensor) -> Tensor:
    return rows((x_hat - x) ** 2)


def nll(x_hat: Tensor, x: Tensor, sigma: float = SIGMA) -> Tensor:
    return squares(x_hat, x) / (2 * sigma**2) + x[0].numel() * math.log(sigma)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return rows(kl_elements(mu, logvar))


def kl_elements(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu**2 - logvar.exp())


def kl_of_stds(mu: Tensor, std: Tensor, mean: Tensor | float = 0.0, scale: Tensor | float = 1.0) -> Tensor:
    mean, scale = (torch.as_tensor(t, dtype=mu.dtype, device=mu.device) for t in (mean, scale))
    return torch.log(scale / std) + (std**2 + (mu - mean) ** 2) / (2 * scale**2) - 0.5


def sample(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + eps * torch.exp(0.5 * logvar)


def plain() -> dict[str, Operation]:
    """The plain objective's operations."""

    def pack(mu: Tensor, logvar: Tensor) -> Tensor:
        return torch.cat((mu, logvar), 1)

    def elbo(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        terms = nll(x_hat, x), kl(mu, logvar)
        return (terms[0] + BETA * terms[1]).mean(), *terms

    def staged(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        divergence = fe.kl_divergence(mu, logvar, reduction="none")
        return tuple(fe.elbo_loss(x_hat, x, kl=divergence, beta=BETA, sigma=SIGMA))

    def exact(*fields: Any) -> Operation:
        return Operation(*fields, magnitude=0.0)

    two, three, four = ("real",) * 2, ("real",) * 3, ("real",) * 4
    return {
        # The mean and the noise's share of a sample may cancel.
        "reparameterize": Operation(lambda m, v, e: fe.reparameterize(m, v, eps=e), sample, three, (False,)),
        "rsample_kl": Operation(
            lambda m, v, e: tuple(fe.rsample_kl(m, v, eps=e)),
            lambda m, v, e: (sample(m, v, e), kl(m, v)),
            three,
            (False, True),
        ),
        "rsample_kl, packed": Operation(
            lambda m, v, e: tuple(fe.rsample_kl(pack(m, v), chunk_dim=1, eps=e)),
            lambda m, v, e: (sample(m, v, e), kl(m, v)),
            three,
            (False, True),
        ),
        "kl_divergence": exact(fe.kl_divergence, lambda m, v: kl(m, v).mean(), two),
        **{
            f"gaussian_nll, {reduction}": exact(
                lambda a, b, reduction=reduction: fe.gaussian_nll(a, b, sigma=SIGMA, reduction=reduction),
                lambda a, b, weight=weight: nll(a, b) if weight is None else weight * nll(a, b).sum(),
                two,
            )
            for reduction, weight in (("mean", 1 / SHAPE[0]), ("sum", 1.0), ("none", None))
        },
        "elbo_loss": exact(
            lambda a, b, m, v: tuple(fe.elbo_loss(a, b, m, v, beta=BETA, sigma=SIGMA)), elbo, four, (True, True, True)
        ),
        "elbo_loss, kl=": exact(staged, elbo, four, (True, True, True)),
    }


def likelihoods() -> dict[str, Operation]:
    """The options of the data side."""

    def fused(**options: Any) -> Callable[..., Tensor]:
        return lambda a, b: fe.nll(a, b, **options)

    def learned(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return F.gaussian_nll_loss(a, b, torch.exp(2 * s).expand(a.shape), reduction="sum", eps=0) / SHAPE[0]

    def scaled(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return fe.nll(a, b, log_sigma=s)

    def soft(s: Tensor) -> Tensor:
        return FLOOR + F.softplus(s - FLOOR)

    def optimal(a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * a[0].numel() * (1 + torch.log(F.mse_loss(a, b)))

    def sigma_vae(a: Tensor, b: Tensor) -> Tensor:
        # The lines of sigma-VAE's optimal variant.
        log_sigma = soft(((a - b) ** 2).mean().sqrt().log())
        return (0.5 * torch.pow((b - a) / log_sigma.exp(), 2) + log_sigma).sum() / SHAPE[0]

    def weighted(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return (w * (0.5 * (a - b) ** 2)).sum() / SHAPE[0]

    def logistic(a: Tensor, levels: Tensor, s: Tensor) -> Tensor:
        # Levels on [-1, 1], 2/255 apart, as in PixelCNN++. The mass of c - h to c + h is sinh h / (cosh c + cosh h).
        x = levels.to(a.dtype) * (2 / 255) - 1
        c, h = (x - a) * torch.exp(-s), torch.exp(-s) / 255
        inner = torch.log(torch.cosh(c) + torch.cosh(h)) - torch.log(torch.sinh(h))
        return (
            torch.where(levels == 0, F.softplus(-c - h), torch.where(levels == 255, F.softplus(c - h), inner)).sum() / SHAPE[0]
        )

    pair = ("real", "real")
    return {
        "log_sigma, scalar": Operation(scaled, learned, (*pair, "scalar")),
        "log_sigma, channels": Operation(scaled, learned, (*pair, "channel")),
        "log_sigma, elements": Operation(scaled, learned, (*pair, "real"), magnitude=LARGE),
        "log_sigma, floor": Operation(
            lambda a, b, s: fe.nll(a, b, log_sigma=s, min_log_sigma=FLOOR),
            lambda a, b, s: learned(a, b, soft(s)),
            (*pair, "real"),
        ),
        "sigma optimal": Operation(fused(sigma="optimal"), optimal, pair),
        "sigma optimal, floor": Operation(fused(sigma="optimal", min_log_sigma=FLOOR), sigma_vae, pair),
        "sigmoid": Operation(fused(activation="sigmoid"), lambda a, b: 0.5 * squares(a.sigmoid(), b).mean(), ("real", "unit")),
        "tanh": Operation(fused(activation="tanh"), lambda a, b: 0.5 * squares(a.tanh(), b).mean(), pair),
        "uint8": Operation(
            fused(scale=2 / 255, shift=-1.0),
            lambda a, u: 0.5 * squares(a, u.to(a.dtype) * (2 / 255) - 1).mean(),
            ("real", "levels"),
        ),
        "weight, samples": Operation(
            lambda a, b, w: fe.nll(a, b, weight=w),
            lambda a, b, w: weighted(a, b, w[:, None, None]),
            (*pair, CONSTANT + "row"),
        ),
        "weight, elements": Operation(
            lambda a, b, w: fe.nll(a, b, weight=w), lambda a, b, w: weighted(a, b, w), (*pair, CONSTANT + "positive")
        ),
        "mask": Operation(lambda a, b, m: fe.nll(a, b, mask=m), lambda a, b, m: weighted(a, b, m.to(a.dtype)), (*pair, "mask")),
        "laplace": Operation(
            fused(likelihood="laplace", sigma=SIGMA, full=True),
            lambda a, b: -Laplace(a, SIGMA).log_prob(b).sum() / SHAPE[0],
            pair,
        ),
        "bernoulli": Operation(
            fused(likelihood="bernoulli"),
            lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction="sum") / SHAPE[0],
            ("real", "unit"),
        ),
        "discretized_logistic": Operation(
            lambda a, u, s: fe.nll(a, u, likelihood="discretized_logistic", scale=2 / 255, shift=-1.0, log_sigma=s),
            logistic,
            ("real", "levels", "narrow"),
            magnitude=LARGE,
        ),
        "batch_dims": Operation(fused(batch_dims=(0, 2), reduction="none"), lambda a, b: 0.5 * ((a - b) ** 2).sum(1), pair),
        "full": Operation(
            fused(activation="tanh", sigma=SIGMA, full=True),
            lambda a, b: -rows(Normal(a.tanh(), SIGMA).log_prob(b)).mean(),
            pair,
        ),
    }


def posteriors() -> dict[str, Operation]:
    """The options of the latent side."""

    def drawn(param: str, **options: Any) -> Callable[..., tuple[Tensor, ...]]:
        return lambda m, r, e: tuple(fe.rsample_kl(m, r, eps=e, param=param, **options))

    def lines(std: Callable[[Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda m, r, e: (m + e * std(r), rows(kl_of_stds(m, std(r))))

    def param(name: str, kind: str, std: Callable[[Tensor], Tensor], **options: Any) -> Operation:
        kinds = ("real", kind, CONSTANT + "real")
        return Operation(drawn(name, **options), lines(std), kinds, (False, True), magnitude=LARGE)

    def soft(v: Tensor) -> Tensor:
        # PETS: both bounds by a softplus.
        low, high = BOUNDS
        v = high - F.softplus(high - v)
        return low + F.softplus(v - low)

    def balanced(m: Tensor, r: Tensor, pm: Tensor, pr: Tensor) -> Tensor:
        # DreamerV2's mix of two divergences, one with a constant posterior and one with a constant prior.
        s, ps = F.softplus(r) + 0.1, F.softplus(pr) + 0.1
        to_prior = rows(kl_of_stds(m.detach(), s.detach(), pm, ps))
        return 0.8 * to_prior + 0.2 * rows(kl_of_stds(m, s, pm.detach(), ps.detach()))

    def weights(m: Tensor, v: Tensor, e: Tensor, pm: Tensor, pv: Tensor) -> tuple[Tensor, Tensor]:
        std, prior_std = torch.exp(0.5 * v), torch.exp(0.5 * pv)
        z = m + e * std
        ratio = 0.5 * (e**2 + v - pv - ((z - pm) / prior_std) ** 2)
        return z, ratio.flatten(2).sum(2)

    two = ("real", "real")
    return {
        "log_std": param("log_std", "small", torch.exp),
        "std": param("std", "positive", lambda r: r),
        "var": param("var", "positive", torch.sqrt),
        "softplus": param("softplus", "positive", lambda r: F.softplus(r) + 0.1, min_std=0.1),
        "clamp": Operation(
            drawn("logvar", clamp=BOUNDS),
            lambda m, v, e: (sample(m, v.clamp(*BOUNDS), e), kl(m, v.clamp(*BOUNDS))),
            (*two, CONSTANT + "real"),
            (False, True),
        ),
        "soft_clamp": Operation(
            drawn("logvar", soft_clamp=BOUNDS),
            lambda m, v, e: (sample(m, soft(v), e), kl(m, soft(v))),
            (*two, CONSTANT + "real"),
            (False, True),
        ),
        "prior": Operation(
            lambda m, s, pm, ps: fe.kl_divergence(m, s, param="std", prior=(pm, ps)),
            lambda m, s, pm, ps: rows(kl_of_stds(m, s, pm, ps)).mean(),
            ("real", "positive", "real", "positive"),
        ),
        "prior, broadcast": Operation(
            lambda m, v, pm: fe.kl_divergence(m, v, prior=(pm, None)), lambda m, v, pm: kl(m - pm, v).mean(), (*two, "channel")
        ),
        "kl_balance": Operation(
            lambda m, r, pm, pr: fe.kl_divergence(
                m, r, param="softplus", min_std=0.1, prior=(pm, pr), kl_balance=0.8, reduction="none"
            ),
            balanced,
            ("real", "positive", "real", "positive"),
            magnitude=LARGE,
            function=False,
        ),
        "free_bits, dim": Operation(
            lambda m, v: fe.kl_divergence(m, v, free_bits=NATS),
            lambda m, v: kl_elements(m, v).mean(0).clamp(min=NATS).sum(),
            two,
        ),
        "free_bits, sample": Operation(
            lambda m, v: fe.kl_divergence(m, v, free_bits=20 * NATS, free_bits_over="sample", reduction="none"),
            lambda m, v: kl(m, v).clamp(min=20 * NATS),
            two,
        ),
        "free_bits, element": Operation(
            lambda m, v: fe.kl_divergence(m, v, free_bits=NATS, free_bits_over="element"),
            lambda m, v: rows(kl_elements(m, v).clamp(min=NATS)).mean(),
            two,
        ),
        "kl mask": Operation(
            lambda m, v, f: fe.kl_divergence(m, v, mask=f),
            lambda m, v, f: kl(m * f[..., None], v * f[..., None]).mean(),
            (*two, "frames"),
        ),
        "kl batch_dims": Operation(
            lambda m, v: fe.kl_divergence(m, v, batch_dims=(0, 1), reduction="none"), lambda m, v: kl_elements(m, v).sum(2), two
        ),
        "kl_per_dim": Operation(fe.kl_per_dim, lambda m, v: kl_elements(m, v).mean(0), two),
        "num_samples": Operation(
            lambda m, v, e: tuple(fe.rsample_kl(m, v, eps=e, num_samples=SAMPLES)),
            lambda m, v, e: (sample(m, v, e), kl(m, v)),
            (*two, CONSTANT + "samples"),
            (False, True),
        ),
        "log_ratio": Operation(
            lambda m, v, e, pm, pv: tuple(iwae.rsample_log_ratio(m, v, eps=e, num_samples=SAMPLES, prior=(pm, pv))),
            lambda m, v, e, pm, pv: weights(m, v, e, pm, pv),
            (*two, CONSTANT + "samples", *two),
            (False, True),
            magnitude=LARGE,
        ),
    }


def objectives() -> dict[str, Operation]:
    """What takes both sides."""

    def elbo(x_hat: Tensor, x: Tensor, divergence: Tensor) -> Tensor:
        return (0.5 * squares(x_hat, x) + divergence).mean()

    def bound(x_hat: Tensor, x: Tensor, log_ratio: Tensor) -> Tensor:
        log_weight = log_ratio - 0.5 * ((x_hat - x) ** 2).flatten(2).sum(2)
        return -(torch.logsumexp(log_weight, 0) - math.log(SAMPLES)).mean()

    four = ("real",) * 4
    return {
        "beta, samples": Operation(
            lambda a, b, m, v, w: fe.elbo_loss(a, b, m, v, beta=w).loss,
            lambda a, b, m, v, w: elbo(a, b, w * kl(m, v)),
            (*four, "row"),
        ),
        "capacity": Operation(
            lambda a, b, m, v: fe.elbo_loss(a, b, m, v, beta=BETA, capacity=3.0).loss,
            lambda a, b, m, v: elbo(a, b, BETA * (kl(m, v).mean() - 3.0).abs()),
            four,
        ),
        "elbo, both sides": Operation(
            lambda a, b, m, r: (
                fe.elbo_loss(
                    a, b, m, r, beta=BETA, likelihood="bernoulli", param="log_std", free_bits=NATS, free_bits_over="element"
                ).loss
            ),
            lambda a, b, m, r: (
                rows(F.binary_cross_entropy_with_logits(a, b, reduction="none"))
                + BETA * rows(kl_of_stds(m, r.exp()).clamp(min=NATS))
            ).mean(),
            ("real", "unit", "real", "small"),
        ),
        "iwae_loss": Operation(lambda a, b, r: iwae.iwae_loss(a, b, r).loss, bound, ("samples", "real", "sample rows")),
    }


def operations() -> dict[str, Operation]:
    """All of them by name."""
    return {**plain(), **likelihoods(), **posteriors(), **objectives()}
