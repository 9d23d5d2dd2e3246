"""What is timed: stages of a VAE's loss, by the library's functions, by a backend's operations and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fused_elbo as fe

from ..spec import LOG_SQRT_2PI, Gaussian, Gradients, Noise, elements_per_sample
from .items import Item

Tensors = tuple[Tensor, ...]

# What plain PyTorch keeps of a residual in float16 must neither overflow in a sum of 2^24 squares nor vanish in the mean.
RESIDUAL = 0.03

# A scalar upstream gradient of 1 is foreseen, and the gradient is left as it was made; after any other it is scaled.
UPSTREAMS = (1.0, 1 / 3)


class Way(NamedTuple):
    """How somebody computes a stage: ``forward(inputs)`` gives values and what the backward needs of them,
    ``backward(inputs, kept, upstream, again)`` the gradients; with ``again`` it is called more than once."""

    forward: Callable[[Tensors], tuple[Tensors, Any]]
    backward: Callable[[Tensors, Any, Tensors, bool], Tensors]


class Operations(NamedTuple):
    """A ``Way`` over a backend, which each of the two takes first."""

    forward: Callable[[ModuleType, Tensors], tuple[Tensors, Any]]
    backward: Callable[[ModuleType, Tensors, Any, Tensors], Tensors]


class Stage(NamedTuple):
    """``ours`` and each of ``eager`` take the same inputs and return the same values.

    Attributes:
        values: what these are: "sample" (like the latents), "rows" ((N,)) or "mean" (over the batch, a scalar).
        ours: the library's public functions.
        operations: the same by a backend's operations.
        eager: plain PyTorch, by name. With a sample, the noise may be given last.
        distributions: the same by ``torch.distributions``, whose mean has the constant D/2 ln 2 pi besides.
        passes: over the latents and over the data, each once for every tensor that must be read or written.
        part: "all", or the "forward" or "backward" alone.
    """

    values: tuple[str, ...]
    ours: Callable[..., Tensors]
    operations: Operations
    eager: dict[str, Callable[..., Tensors]]
    distributions: Callable[..., Tensors]
    passes: tuple[int, int]
    part: str = "all"

    @property
    def upstreams(self) -> tuple[float, ...]:
        """The upstream gradients that make a difference to somebody: those of a sample and of rows are never foreseen."""
        return UPSTREAMS if "mean" in self.values else UPSTREAMS[:1]


class Inputs(NamedTuple):
    """``leaves``: x_hat, x, then mu, logvar or the packed moments; ``upstream``: gradients of the values, the terms' of 1."""

    leaves: Tensors
    upstream: Tensors

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (*self.leaves, *self.upstream))


def draw(item: Item, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    """Images in [0, 1] and their reconstructions, and posteriors around the prior; the leaves are those that training has."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    leaves = ()
    if item.data:
        x = torch.rand(item.data, generator=generator, device=device)
        leaves += (x + RESIDUAL * normal(item.data)).to(dtype).requires_grad_(), x.to(dtype)
    if item.latents:
        latents = [(scale * normal(item.latents)).to(dtype) for scale in (1.0, 0.5)]
        leaves += tuple(t.requires_grad_() for t in ([torch.cat(latents, 1)] if item.packed else latents))
    count = len(leaves[0])
    terms = torch.float64 if dtype == torch.float64 else torch.float32
    made = {
        "sample": lambda: normal(item.latents).to(dtype),
        "rows": lambda: torch.ones(count, dtype=terms, device=device),
        "mean": lambda: torch.ones((), dtype=terms, device=device),
    }
    return Inputs(leaves, tuple(made[value]() for value in STAGES[item.stage].values))


def bind(way: Way, part: str, inputs: Inputs, upstream: Tensors) -> Callable[[], Tensors]:
    """One call of what is timed: it returns the values and, but for a forward alone, the gradients of the leaves."""
    leaves = inputs.leaves
    if part == "forward":
        return lambda: way.forward(leaves)[0]
    if part == "backward":
        made = []

        def backward() -> Tensors:
            if not made:
                made.append(way.forward(leaves))
            values, kept = made[0]
            return *values, *way.backward(leaves, kept, upstream, True)

        return backward

    def run() -> Tensors:
        values, kept = way.forward(leaves)
        return *values, *way.backward(leaves, kept, upstream, False)

    return run


def by_autograd(function: Callable[..., Tensors]) -> Way:
    """``function`` of the leaves, differentiated by torch."""

    def forward(leaves: Tensors) -> tuple[Tensors, Tensors]:
        values = function(*leaves)
        return values, values

    def backward(leaves: Tensors, values: Tensors, upstream: Tensors, again: bool) -> Tensors:
        return torch.autograd.grad(values, [t for t in leaves if t.requires_grad], upstream, retain_graph=again)

    return Way(forward, backward)


def by_operations(operations: Operations, select: Callable[[], ModuleType]) -> Way:
    """A backend's operations, with neither autograd nor the checks of the public functions."""

    def forward(leaves: Tensors) -> tuple[Tensors, Any]:
        return operations.forward(select(), tuple(t.detach() for t in leaves))

    def backward(leaves: Tensors, kept: Any, upstream: Tensors, again: bool) -> Tensors:
        return operations.backward(select(), tuple(t.detach() for t in leaves), kept, upstream)

    return Way(forward, backward)


def halves(latents: Tensors) -> Tensors:
    """mu and logvar."""
    return latents if len(latents) == 2 else latents[0].chunk(2, 1)


def _trailing(t: Tensor) -> tuple[int, ...]:
    return tuple(range(1, t.dim()))


def latent(*latents: Tensor, eps: Tensor | None = None) -> Tensors:
    mu, logvar = halves(latents)
    std = torch.exp(0.5 * logvar)
    z = mu + (torch.randn_like(std) if eps is None else eps) * std
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), _trailing(mu))


def latent_distributions(*latents: Tensor) -> Tensors:
    mu, logvar = halves(latents)
    # Arguments are not validated: that would wait for the device.
    posterior = Normal(mu, torch.exp(0.5 * logvar), validate_args=False)
    prior = Normal(mu.new_zeros(()), mu.new_ones(()), validate_args=False)
    return posterior.rsample(), kl_divergence(posterior, prior).sum(_trailing(mu))


def nll_mse_loss(x_hat: Tensor, x: Tensor) -> Tensors:
    return (F.mse_loss(x_hat, x, reduction="sum") * (0.5 / len(x)),)


def nll_written_out(x_hat: Tensor, x: Tensor) -> Tensors:
    return (((x_hat - x) ** 2).sum() * (0.5 / len(x)),)


def nll_distributions(x_hat: Tensor, x: Tensor) -> Tensors:
    return (-Normal(x_hat, x_hat.new_ones(()), validate_args=False).log_prob(x).sum() / len(x),)


def classic(x_hat: Tensor, x: Tensor, *latents: Tensor, eps: Tensor | None = None) -> Tensors:
    mu, logvar = halves(latents)
    std = torch.exp(0.5 * logvar)
    z = mu + (torch.randn_like(std) if eps is None else eps) * std
    # The 1/2 that both terms have is taken out, which spares plain PyTorch two operations on scalars.
    squares = F.mse_loss(x_hat, x, reduction="sum")
    divergence = torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (squares - divergence) * (0.5 / len(x)), z


def classic_distributions(x_hat: Tensor, x: Tensor, *latents: Tensor) -> Tensors:
    z, kl = latent_distributions(*latents)
    return nll_distributions(x_hat, x)[0] + kl.sum() / len(x), z


def constant(stage: Stage, leaves: Tensors) -> float:
    """What ``stage.distributions`` has in a mean besides, in nats."""
    return elements_per_sample(leaves[0]) * LOG_SQRT_2PI if "mean" in stage.values else 0.0


def _chunk(latents: Tensors) -> dict[str, int]:
    return {"chunk_dim": 1} if len(latents) == 1 else {}


def our_latent(*latents: Tensor) -> Tensors:
    return fe.rsample_kl(*latents, **_chunk(latents))


def our_classic(x_hat: Tensor, x: Tensor, *latents: Tensor) -> Tensors:
    z = fe.reparameterize(*latents, **_chunk(latents))
    return fe.elbo_loss(x_hat, x, *latents, **_chunk(latents)).loss, z


def our_both(x_hat: Tensor, x: Tensor, *latents: Tensor) -> Tensors:
    z, kl = fe.rsample_kl(*latents, **_chunk(latents))
    return fe.elbo_loss(x_hat, x, kl=kl).loss, z


def _buffers(latents: Tensors) -> tuple[Tensors, Gradients]:
    """Gradients of the latents as their leaves have them, and as a backend writes them."""
    made = tuple(torch.empty_like(t) for t in latents)
    mu, logvar = halves(made)
    return made, Gradients(mu=mu, logvar=logvar)


def latent_operation(backend: ModuleType, latents: Tensors, *, want_kl: bool = True) -> tuple[Tensors, Noise]:
    mu, logvar = halves(latents)
    noise = Noise(seed=fe.sampling.draw_seed(mu.device))
    return backend.rsample_kl(mu, logvar, noise, want_kl=want_kl), noise


def latent_operation_backward(backend: ModuleType, latents: Tensors, noise: Noise, upstream: Tensors) -> Tensors:
    made, out = _buffers(latents)
    backend.rsample_kl_backward(*upstream, *halves(latents), noise, out)
    return made


def nll_operation(backend: ModuleType, leaves: Tensors) -> tuple[Tensors, Tensor]:
    x_hat, x = leaves
    out = Gradients(x_hat=torch.empty_like(x_hat))
    loss, *_ = backend.elbo(x_hat, x, None, None, None, 1.0, Gaussian(), out, weight=1 / len(x))
    return (loss,), out.x_hat


def nll_operation_backward(backend: ModuleType, leaves: Tensors, gradient: Tensor, upstream: Tensors) -> Tensors:
    backend.rescale_([gradient], upstream[0], 1.0)
    return (gradient,)


def classic_operation(backend: ModuleType, leaves: Tensors) -> tuple[Tensors, Any]:
    x_hat, x, *latents = leaves
    (z, _), noise = latent_operation(backend, tuple(latents), want_kl=False)
    made, out = _buffers(tuple(latents))
    out = out._replace(x_hat=torch.empty_like(x_hat))
    loss, *_ = backend.elbo(x_hat, x, *halves(tuple(latents)), None, 1.0, Gaussian(), out, weight=1 / len(x))
    return (loss, z), (noise, (out.x_hat, *made))


def classic_operation_backward(backend: ModuleType, leaves: Tensors, kept: Any, upstream: Tensors) -> Tensors:
    noise, baked = kept
    backend.rescale_(baked, upstream[0], 1.0)
    sampled = latent_operation_backward(backend, leaves[2:], noise, (upstream[1], None))
    return baked[0], *(mine.add_(theirs) for mine, theirs in zip(baked[1:], sampled, strict=True))


def both_operation(backend: ModuleType, leaves: Tensors) -> tuple[Tensors, Any]:
    x_hat, x, *latents = leaves
    (z, kl), noise = latent_operation(backend, tuple(latents))
    out = Gradients(x_hat=torch.empty_like(x_hat), kl=torch.empty((), dtype=kl.dtype, device=kl.device))
    loss, *_ = backend.elbo(x_hat, x, None, None, kl, 1.0, Gaussian(), out, weight=1 / len(x))
    return (loss, z), (noise, out)


def both_operation_backward(backend: ModuleType, leaves: Tensors, kept: Any, upstream: Tensors) -> Tensors:
    noise, out = kept
    backend.rescale_([out.x_hat, out.kl], upstream[0], 1.0)
    rows = out.kl.expand(len(leaves[0]))
    return out.x_hat, *latent_operation_backward(backend, leaves[2:], noise, (upstream[1], rows))


_LATENT = Stage(
    ("sample", "rows"),
    our_latent,
    Operations(latent_operation, latent_operation_backward),
    {"classic lines": latent},
    latent_distributions,
    (8, 0),
)
_NLL = Stage(
    ("mean",),
    lambda x_hat, x: (fe.gaussian_nll(x_hat, x),),
    Operations(nll_operation, nll_operation_backward),
    {"mse_loss": nll_mse_loss, "written out": nll_written_out},
    nll_distributions,
    (0, 3),
)
_CLASSIC = Stage(
    ("mean", "sample"),
    our_classic,
    Operations(classic_operation, classic_operation_backward),
    {"classic lines": classic},
    classic_distributions,
    (8, 3),
)
STAGES = {
    "latent forward": _LATENT._replace(passes=(3, 0), part="forward"),
    "latent backward": _LATENT._replace(passes=(5, 0), part="backward"),
    "latent": _LATENT,
    "nll": _NLL,
    # In place there is no third tensor, but there is a third pass.
    "bandwidth": _NLL._replace(ours=lambda x_hat, x: (fe.gaussian_nll(x_hat, x, inplace=True),)),
    "classic": _CLASSIC,
    "both": _CLASSIC._replace(ours=our_both, operations=Operations(both_operation, both_operation_backward)),
}
