"""Whole training steps of small VAEs, with the fused loss and with the classic lines.

The loss is a small part of a step, so what is asked is whether the step is the worse for it: eager, and with the model and the
loss compiled together.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..vae.model import build
from . import work
from .checking import Comparison
from .items import MODELS, Item
from .work import Inputs, Tensors

LATENTS = MODELS["MNIST"][1][1]
HIDDEN = 16
DTYPE = torch.float32
# Error of the loss and of the gradients of a first step, as a share of the largest: TensorFloat-32 has 10 bits.
BOUND = 1e-2


class Narrow(nn.Module):
    """A VAE of flat data whose layers are so narrow that the loss is a fair part of the step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(size, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, size), nn.Sigmoid())


class Objective(nn.Module):
    """``forward(x)``, and the noise where it is given: the loss and the latent sample."""

    def __init__(self, vae: nn.Module, stage: Callable[..., Tensors]) -> None:
        super().__init__()
        self.vae, self.stage = vae, stage

    def forward(self, x: Tensor, **noise: Tensor) -> Tensors:
        return self.stage(self.vae.encoder(x), self.vae.decoder, x, **noise)


def fused(moments: Tensor, decoder: nn.Module, x: Tensor) -> Tensors:
    z, kl = work.fe.rsample_kl(moments, chunk_dim=1)
    return work.fe.elbo_loss(decoder(z), x, kl=kl).loss, z


def classic(moments: Tensor, decoder: nn.Module, x: Tensor, eps: Tensor | None = None) -> Tensors:
    z, kl = work.latent(moments, eps=eps)
    return work.nll_mse_loss(decoder(z), x)[0] + kl.mean(), z


def model(item: Item) -> nn.Module:
    """The same weights each time."""
    if item.model != "narrow":
        return build(item.model, latent_dim=LATENTS, seed=0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return Narrow(item.data[1])


def draw(item: Item, device: torch.device) -> Inputs:
    """A batch of images as the model takes them."""
    shape = item.data if item.model == "narrow" else (item.data[0], 1, 28, 28)
    return Inputs((torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device),), ())


class Side:
    """A training step with one loss: ``bind(inputs)`` makes a model and its optimiser.

    A step returns the loss, the sample and the gradients of all parameters.
    """

    def __init__(self, item: Item, device: torch.device, stage: Callable[..., Tensors], how: dict[str, Any] | None) -> None:
        self.initial = model(item).to(device)
        self.stage, self.how = stage, how

    def bind(self, inputs: Inputs) -> Callable[[], Tensors]:
        objective = Objective(copy.deepcopy(self.initial), self.stage)
        parameters = list(objective.parameters())
        optimizer = torch.optim.Adam(parameters, lr=1e-4)
        forward = objective if self.how is None else torch.compile(objective, fullgraph=True, dynamic=False, **self.how)

        def step() -> Tensors:
            optimizer.zero_grad()
            loss, z = forward(*inputs.leaves)
            loss.backward()
            optimizer.step()
            return loss.detach(), z.detach(), *(p.grad for p in parameters)

        return step


def sides(
    item: Item, device: torch.device, backends: Sequence[str], compile_modes: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, str, Side, str | None, str | None]]:
    """Name, kind, step, backend and mode of everybody."""
    make = functools.partial(Side, item, device)
    for name in backends:
        yield name, "ours", make(fused, None), name, None
    yield "classic lines", "eager", make(classic, None), None, None
    # A compiled model takes the backend that is the device's own. Of a whole model one mode is enough to wait for.
    for mode, how in list(compile_modes.items())[:1]:
        yield f"ours, {mode}", "ours", make(fused, how), None, f"{mode} step"
        yield f"classic lines, {mode}", "compiled", make(classic, how), None, f"{mode} step"


def fault(side: Side, inputs: Inputs, found: Sequence[Tensor]) -> str | None:
    """What is wrong with the results of a first step; None if nothing is."""
    loss, z, *gradients = found
    exact = Objective(copy.deepcopy(side.initial).double(), classic)
    (x,) = (t.double() for t in inputs.leaves)
    with torch.no_grad():
        mu, logvar = work.halves((exact.vae.encoder(x),))
        eps = (z.double() - mu) * torch.exp(-0.5 * logvar)
    right, _ = exact(x, eps=eps)
    right.backward()
    for what, ours, truth in (("the loss", [loss], [right]), ("a gradient", gradients, [p.grad for p in exact.parameters()])):
        comparison = Comparison()
        for pair in zip(ours, truth, strict=True):
            comparison.add(*pair)
        if said := comparison.fault(BOUND):
            return f"{what} {said}"
    return None
