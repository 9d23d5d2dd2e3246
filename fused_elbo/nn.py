"""Modules over the functions: the latent layer and the loss of a variational autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import functional
from .functional import ELBOTerms, LatentSample
from .options import ELBOOptions, PosteriorOptions


class GaussianLatent(torch.nn.Module):
    """The stochastic layer between encoder and decoder: ``z, kl = latent(mu, logvar)``.

    In training mode it samples; in evaluation mode z is the mean. See ``fused_elbo.rsample_kl`` for the mathematics.

    Args:
        chunk_dim: for an encoder that returns packed moments: ``z, kl = latent(moments)``. Default None: two tensors.
        generator: source of the seeds. Default torch's own.
        num_samples, batch_dims, **posterior: as for ``fused_elbo.rsample_kl``. A prior that is computed anew in each step,
            and a mask, go to the call.
    """

    def __init__(
        self,
        *,
        chunk_dim: int | None = None,
        generator: torch.Generator | None = None,
        num_samples: int | None = None,
        batch_dims: tuple[int, ...] = (0,),
        **posterior: Unpack[PosteriorOptions],
    ) -> None:
        super().__init__()
        self.chunk_dim = chunk_dim
        self.generator = generator
        self.num_samples = num_samples
        self.batch_dims = batch_dims
        self.posterior = posterior

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor | None = None,
        *,
        seed: int | Tensor | None = None,
        eps: Tensor | None = None,
        first_index: int = 0,
        offset: int = 0,
        mask: Tensor | None = None,
        **posterior: Unpack[PosteriorOptions],
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
            num_samples=self.num_samples,
            mask=mask,
            batch_dims=self.batch_dims,
            **{**self.posterior, **posterior},
        )

    def extra_repr(self) -> str:
        return ", ".join((f"chunk_dim={self.chunk_dim}", *_described(self.posterior)))


class ELBOLoss(torch.nn.Module):
    """The negative ELBO: ``loss(x_hat, x, kl=kl).loss`` or ``loss(x_hat, x, mu, logvar).loss``.

    Args:
        beta, sigma, full, reduction, inplace: as for ``fused_elbo.elbo_loss``; ``beta`` may be set again at any time.
        chunk_dim: for packed moments: ``loss(x_hat, x, moments)``. Default None: two tensors.
        log_sigma: a learned scale: a tensor or parameter, or a float to begin with, of which the module makes a parameter.
        **chosen: as for ``fused_elbo.elbo_loss``. What belongs to a batch (mask, weight, prior) goes to the call.
    """

    def __init__(
        self,
        *,
        beta: float | Tensor = 1.0,
        sigma: float | str = 1.0,
        full: bool = False,
        reduction: str = "mean",
        inplace: bool = False,
        chunk_dim: int | None = None,
        log_sigma: float | Tensor | None = None,
        **chosen: Unpack[ELBOOptions],
    ) -> None:
        super().__init__()
        self.beta = beta
        self.sigma = sigma
        self.full = full
        self.reduction = reduction
        self.inplace = inplace
        self.chunk_dim = chunk_dim
        self.chosen = chosen
        self.log_sigma = torch.nn.Parameter(torch.tensor(log_sigma)) if isinstance(log_sigma, float) else log_sigma

    def forward(
        self,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None = None,
        logvar: Tensor | None = None,
        *,
        kl: Tensor | None = None,
        grad_scale: float | Tensor = 1.0,
        **chosen: Unpack[ELBOOptions],
    ) -> ELBOTerms:
        """Arguments, results and errors of ``fused_elbo.elbo_loss``."""
        if self.log_sigma is not None:
            chosen = {"log_sigma": self.log_sigma, **chosen}
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
            **{**self.chosen, **chosen},
        )

    def extra_repr(self) -> str:
        beta = "tensor" if isinstance(self.beta, Tensor) else self.beta
        shown = f"beta={beta}", f"sigma={self.sigma!r}", f"full={self.full}", f"reduction={self.reduction!r}"
        return ", ".join((*shown, *_described(self.chosen)))


def _described(chosen: dict[str, object]) -> list[str]:
    return [f"{name}={'tensor' if isinstance(value, Tensor) else repr(value)}" for name, value in chosen.items()]
