"""One training loss, written twice: with the library, and in the classic lines. The same noise gives the same numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import reference
from ..functional import ELBOTerms, elbo_loss
from ..linear import linear_gaussian_nll
from ..sampling import draw_seed
from .model import MLPVAE, VAE


def fused(model: VAE, x: Tensor, *, beta: float, sigma: float, seed: Tensor | None = None, first_index: int = 0) -> ELBOTerms:
    """The negative ELBO of images ``x`` (N, 1, 28, 28), in nats, by the library.

    The noise is that of ``model.latent``, or of ``seed``, from number ``first_index`` on.
    """
    x_hat, _, kl = model(x, seed=seed, first_index=first_index)
    return elbo_loss(x_hat, x, kl=kl, beta=beta, sigma=sigma, full=True)


def fused_linear(
    model: MLPVAE, x: Tensor, *, beta: float, sigma: float, seed: Tensor | None = None, first_index: int = 0
) -> ELBOTerms:
    """``fused`` with the decoder's last layer in the loss; ``nll`` is the mean over the batch, ()."""
    z, kl = model.latent(model.encode(x), seed=seed, first_index=first_index)
    layer = model.last_layer
    nll = linear_gaussian_nll(
        model.features(z), layer.weight, layer.bias, x, sigma=sigma, full=True, activation=model.ACTIVATION
    )
    return ELBOTerms(nll + beta * kl.mean(), nll, kl)


def eager(model: VAE, x: Tensor, eps: Tensor, *, beta: float, sigma: float) -> ELBOTerms:
    """The same in plain PyTorch, as it is usually written, with the noise ``eps`` (N, d) given."""
    mu, logvar = torch.chunk(model.encode(x), 2, dim=1)
    std = torch.exp(0.5 * logvar)
    z = mu + eps * std
    x_hat = model.decode(z)
    squared_error = (x_hat - x).pow(2).flatten(1).sum(1)
    constant = x[0].numel() * (math.log(sigma) + 0.5 * math.log(2 * math.pi))
    nll = squared_error / (2 * sigma**2) + constant
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
    loss = (nll + beta * kl).mean()
    return ELBOTerms(loss, nll, kl)


def draw_eps(count: int, latent_dim: int, generator: torch.Generator) -> Tensor:
    """The noise (count, latent_dim) that the library would have made: the stream of one seed from ``generator``."""
    return reference.noise(draw_seed(generator.device, generator), (count, latent_dim))
