"""What is timed: stages of a VAE's loss, forward and backward, by the library's backends and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_elbo as fe
from fused_elbo.spec import Gaussian, Gradients, Noise

Tensors = tuple[Tensor, ...]

# The backend that is timed, but not built for speed.
SPECIFICATION = "reference"

# Our operations called one after the other, to tell what they cost from what torch's autograd costs on top.
DIRECT = "operations alone"

SWEEP = tuple(2**k for k in range(6, 25))
SWEEP_ROW = 1024
COMPILE_MODES = {"compiled": None, "max-autotune": "max-autotune-no-cudagraphs"}

# What plain PyTorch keeps of a residual in float16 must neither overflow in a sum of 2^24 squares nor vanish in the mean.
RESIDUAL = 0.03


class Peer(NamedTuple):
    """One side of a comparison.

    Attributes:
        name: unique in its item.
        kind: "ours", "eager", "compiled" or "copy".
        run: one call of what is timed; returns values, then gradients.
        expected: the same in float64, from what ``run`` returned (which holds the noise that was drawn), and that noise.
        backend: of the library, which ``run`` is to be called under; None for other peers.
    """

    name: str
    kind: str
    run: Callable[[], Tensors]
    expected: Callable[[Tensors], tuple[Tensors, Tensor | None]]
    backend: str | None = None


class Stage(NamedTuple):
    """``ours`` and each of ``eager`` take the same inputs and return the same values.

    Attributes:
        inputs: from a shape and a dtype, what they take: leaves, of which some require grad.
        upstream: from those, the upstream gradients of the values.
        operations: the same forward and backward by a backend's operations, from inputs and upstream gradients.
        sample: which of the values is the sample; None where none is drawn. ``eager`` then takes the noise last.
    """

    inputs: Callable[[tuple[int, ...], torch.dtype], Tensors]
    upstream: Callable[[Tensors], Tensors]
    ours: Callable[..., Tensors]
    operations: Callable[[ModuleType, Tensors, Tensors], Tensors]
    eager: dict[str, Callable[..., Tensors]]
    sample: int | None = None


@dataclass(frozen=True)
class Item:
    """One line of the table. ``targets`` are ratios to (eager, compiled), or for "bandwidth" a percentage of a copy's; one of
    the ``sweep`` over sizes meets eager PyTorch alone."""

    name: str
    stage: str
    shape: tuple[int, ...]
    targets: tuple[float, ...] = ()
    sweep: bool = False


def items(sweep: bool) -> Iterator[Item]:
    """All that can be measured. The shape of "classic" is (N, data, latents), every other one (N, elements)."""
    for stage, shape, *targets in (
        ("latent", (8, 8)),
        ("latent", (128, 20)),
        ("latent", (128, 2048), 7.0, 15.0),
        ("latent", (4096, 4096), 8.0, 6.0),
        ("nll", (8, 8)),
        ("nll", (128, 784), 2.5, 3.5),
        ("nll", (128, 3072)),
        ("nll", (1024, 3072)),
        ("nll", (4096, 3072), 4.0, 3.0),
        ("classic", (128, 784, 20), 4.0, 3.5),
        ("bandwidth", (4096, 4096), 85.0),
        ("bandwidth", (4096, 3072), 85.0),
    ):
        yield Item(f"{stage} {'x'.join(map(str, shape))}", stage, shape, tuple(targets))
    for stage in ("latent", "nll") if sweep else ():
        for count in SWEEP:
            row = min(count, SWEEP_ROW)
            yield Item(f"sweep {stage} {count}", stage, (count // row, row), sweep=True)


def peers(item: Item, dtype: torch.dtype, backends: Sequence[str], *, compiled: bool) -> list[Peer]:
    """Everybody who does the work of ``item``, on the same inputs; ``compiled`` with torch.compile too."""
    torch.manual_seed(0)
    stage = STAGES["nll" if item.stage == "bandwidth" else item.stage]
    inputs = stage.inputs(item.shape, dtype)
    gradients = stage.upstream(inputs)

    def upstream(sample: torch.dtype, terms: torch.dtype) -> Tensors:
        return tuple(g.to(sample if index == stage.sample else terms) for index, g in enumerate(gradients))

    def expected(results: Tensors) -> tuple[Tensors, Tensor | None]:
        exact = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
        noise = ()
        if stage.sample is not None:
            mu, logvar = (t.detach() for t in exact[-2:])
            noise = ((results[stage.sample].detach().double() - mu) * torch.exp(-0.5 * logvar),)
        formula = next(iter(stage.eager.values()))
        run = step(lambda *given: formula(*given, *noise), exact, upstream(torch.float64, torch.float64))
        return run(), *(noise or (None,))

    def ours(forward: Callable[..., Tensors], given: Sequence[Tensor], backend: str) -> Peer:
        terms = torch.float64 if dtype == torch.float64 else torch.float32
        return Peer(backend, "ours", step(forward, given, upstream(dtype, terms)), expected, backend)

    def direct(backend: str) -> Peer:
        given = tuple(t.detach() for t in inputs)
        terms = torch.float64 if dtype == torch.float64 else torch.float32
        grads = upstream(dtype, terms)

        def run() -> Tensors:
            return stage.operations(fe.ops.select(given[0].device), given, grads)

        return Peer(f"{backend}, {DIRECT}", "ours", run, expected, backend)

    if item.stage == "bandwidth":
        x_hat, x = inputs
        copy = torch.empty_like(x)
        # A clone is no leaf, so that it may be overwritten, and serves every call: the gradient is asked for at the clone.
        return [
            *(ours(lambda a, b: (fe.gaussian_nll(a, b, inplace=True),), (x_hat.clone(), x), name) for name in backends),
            Peer("copy", "copy", lambda: (copy.copy_(x),), lambda _: ((x.double(),), None)),
        ]
    plain = [("eager", name, formula) for name, formula in stage.eager.items()]
    if compiled and not item.sweep:
        plain += [
            ("compiled", f"{name}, {how}", torch.compile(formula, dynamic=False, mode=mode))
            for name, formula in stage.eager.items()
            for how, mode in COMPILE_MODES.items()
        ]
    return [
        *(ours(stage.ours, inputs, name) for name in backends),
        *(direct(name) for name in backends if name != SPECIFICATION and not item.sweep),
        *(Peer(name, kind, step(formula, inputs, upstream(dtype, dtype)), expected) for kind, name, formula in plain),
    ]


def step(forward: Callable[..., Tensors], inputs: Sequence[Tensor], upstream: Tensors) -> Callable[[], Tensors]:
    """Forward and backward as one call that returns the values and the gradients of all inputs that require grad."""
    wanted = [t for t in inputs if t.requires_grad]

    def run() -> Tensors:
        values = forward(*inputs)
        return *values, *torch.autograd.grad(values, wanted, upstream)

    return run


def latent_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """``mu, logvar`` of a posterior around the prior."""
    return tuple((scale * torch.randn(shape)).to(dtype).requires_grad_() for scale in (1.0, 0.5))


def data_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensors:
    """``x_hat, x`` as of images in [0, 1]."""
    x = torch.rand(shape)
    return (x + RESIDUAL * torch.randn(shape)).to(dtype).requires_grad_(), x.to(dtype)


def latent(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensors:
    std = torch.exp(0.5 * logvar)
    z = mu + (torch.randn_like(std) if eps is None else eps) * std
    return z, -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), 1)


def nll_mse_loss(x_hat: Tensor, x: Tensor) -> Tensors:
    return (F.mse_loss(x_hat, x, reduction="sum") * (0.5 / len(x)),)


def nll_written_out(x_hat: Tensor, x: Tensor) -> Tensors:
    return (((x_hat - x) ** 2).sum() * (0.5 / len(x)),)


def classic(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensors:
    std = torch.exp(0.5 * logvar)
    z = mu + (torch.randn_like(std) if eps is None else eps) * std
    # The 1/2 that both terms have is taken out, which spares plain PyTorch two operations on scalars.
    squares = F.mse_loss(x_hat, x, reduction="sum")
    divergence = torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    return (squares - divergence) * (0.5 / len(x)), z


def our_classic(x_hat: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensors:
    z = fe.reparameterize(mu, logvar)
    return fe.elbo_loss(x_hat, x, mu, logvar).loss, z


def latent_operations(backend: ModuleType, inputs: Tensors, upstream: Tensors) -> Tensors:
    mu, logvar = inputs
    noise = Noise(seed=fe.sampling.draw_seed(mu.device))
    z, kl = backend.rsample_kl(mu, logvar, noise, want_kl=True)
    out = Gradients(mu=torch.empty_like(mu), logvar=torch.empty_like(logvar))
    backend.rsample_kl_backward(*upstream, mu, logvar, noise, out)
    return z, kl, out.mu, out.logvar


def nll_operations(backend: ModuleType, inputs: Tensors, upstream: Tensors) -> Tensors:
    x_hat, x = inputs
    out = Gradients(x_hat=torch.empty_like(x_hat))
    loss, *_ = backend.elbo(x_hat, x, None, None, None, 1.0, Gaussian(), out, weight=1 / len(x))
    backend.rescale_([out.x_hat], upstream[0], 1.0)
    return loss, out.x_hat


def classic_operations(backend: ModuleType, inputs: Tensors, upstream: Tensors) -> Tensors:
    x_hat, x, mu, logvar = inputs
    noise = Noise(seed=fe.sampling.draw_seed(mu.device))
    z, _ = backend.rsample_kl(mu, logvar, noise, want_kl=False)
    out = Gradients(x_hat=torch.empty_like(x_hat), mu=torch.empty_like(mu), logvar=torch.empty_like(logvar))
    loss, *_ = backend.elbo(x_hat, x, mu, logvar, None, 1.0, Gaussian(), out, weight=1 / len(x))
    backend.rescale_([out.x_hat, out.mu, out.logvar], upstream[0], 1.0)
    sampled = Gradients(mu=torch.empty_like(mu), logvar=torch.empty_like(logvar))
    backend.rsample_kl_backward(upstream[1], None, mu, logvar, noise, sampled)
    return loss, z, out.x_hat, out.mu.add_(sampled.mu), out.logvar.add_(sampled.logvar)


STAGES = {
    "latent": Stage(
        latent_inputs,
        lambda inputs: (torch.randn_like(inputs[0]).detach(), torch.ones(len(inputs[0]))),
        fe.rsample_kl,
        latent_operations,
        {"classic lines": latent},
        sample=0,
    ),
    "nll": Stage(
        data_inputs,
        lambda inputs: (torch.ones(()),),
        lambda x_hat, x: (fe.gaussian_nll(x_hat, x),),
        nll_operations,
        {"mse_loss": nll_mse_loss, "written out": nll_written_out},
    ),
    "classic": Stage(
        lambda shape, dtype: (*data_inputs(shape[:2], dtype), *latent_inputs((shape[0], shape[2]), dtype)),
        lambda inputs: (torch.ones(()), torch.randn_like(inputs[2]).detach()),
        our_classic,
        classic_operations,
        {"classic lines": classic},
        sample=1,
    ),
}
