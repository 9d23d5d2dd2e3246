"""Modules over the functions: the latent layer and the loss of a variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from . import functional
from .functional import ELBOTerms, LatentSample


class GaussianLatent(torch.nn.Module):
    """The stochastic layer between encoder and decoder: ``z, kl = latent(mu, logvar)``.

    In training mode it samples; in evaluation mode z is the mean. See ``fused_elbo.rsample_kl`` for the mathematics.

    Args:
        chunk_dim: for an encoder that returns packed moments: ``z, kl = latent(moments)``. Default None: two tensors.
        generator: source of the seeds. Default torch's own.
    """

    def __init__(self, *, chunk_dim: int | None = None, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.chunk_dim = chunk_dim
        self.generator = generator

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        eps: Tensor | None = None,
        first_index: int = 0,
        offset: int = 0,
    ) -> LatentSample:
        """Arguments, results and errors of ``fused_elbo.rsample_kl``."""
        return functional.rsample_kl(
            mu,
            logvar,
            chunk_dim=self.chunk_dim,
            sample=self.training,
            seed=seed,
            generator=self.generator if seed is None and eps is None else None,
            eps=eps,
            first_index=first_index,
            offset=offset,
        )

    def extra_repr(self) -> str:
        return f"chunk_dim={self.chunk_dim}"


class ELBOLoss(torch.nn.Module):
    """The negative ELBO: ``loss(x_hat, x, kl=kl).loss`` or ``loss(x_hat, x, mu, logvar).loss``.

    Args:
        beta, sigma, full, reduction, inplace: as for ``fused_elbo.elbo_loss``; ``beta`` may be set again at any time.
        chunk_dim: for packed moments: ``loss(x_hat, x, moments)``. Default None: two tensors.
    """

    def __init__(
        self,
        *,
        beta: float | Tensor = 1.0,
        sigma: float = 1.0,
        full: bool = False,
        reduction: str = "mean",
        inplace: bool = False,
        chunk_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.sigma = sigma
        self.full = full
        self.reduction = reduction
        self.inplace = inplace
        self.chunk_dim = chunk_dim

    def forward(
        self,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
    ) -> ELBOTerms:
        """Arguments, results and errors of ``fused_elbo.elbo_loss``."""
        return functional.elbo_loss(
            x_hat,
            x,
            mu,
            logvar,
            kl=kl,
            chunk_dim=self.chunk_dim if mu is not None else None,
            beta=self.beta,
            sigma=self.sigma,
            full=self.full,
            reduction=self.reduction,
            grad_scale=grad_scale,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        beta = "tensor" if isinstance(self.beta, Tensor) else self.beta
        return f"beta={beta}, sigma={self.sigma}, full={self.full}, reduction={self.reduction!r}"
