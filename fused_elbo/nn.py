"""Modules over the functions: the latent layer, the loss of a variational autoencoder, and a last layer with its loss."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import arguments, functional, linear
from .functional import ELBOTerms, LatentSample
from .options import ELBOOptions, LikelihoodOptions, PosteriorOptions


class GaussianLatent(torch.nn.Module):
    """The stochastic layer between encoder and decoder: ``z, kl = latent(mu, logvar)``.

    In training mode it samples; in evaluation mode z is the mean. See ``fused_elbo.rsample_kl`` for the mathematics.

    Args:
        chunk_dim: for an encoder that returns packed moments: ``z, kl = latent(moments)``. Default None: two tensors.
        generator: source of the seeds. Default torch's own.
        num_samples, batch_dims, **posterior: as for ``fused_elbo.rsample_kl``. The tensors of a prior become the module's
            ``prior_mean`` and ``prior_raw``: parameters if they are that, else buffers that are not in its state. A prior
            that is computed anew in each step, and a mask, go to the call.
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
        prior = posterior.get("prior")
        # Whatever else it may be is refused by the call, which names it.
        self.has_prior = type(prior) in (tuple, list) and [t is None or isinstance(t, Tensor) for t in prior] == [True, True]
        if self.has_prior:
            # What a dictionary holds is not trained, moved or saved with a module.
            for name, t in zip(("prior_mean", "prior_raw"), posterior.pop("prior"), strict=True):
                if isinstance(t, torch.nn.Parameter):
                    self.register_parameter(name, t)
                else:
                    self.register_buffer(name, t, persistent=False)

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
        if self.has_prior:
            posterior = {"prior": (self.prior_mean, self.prior_raw), **posterior}
        chosen = {
            "seed": seed,
            "generator": self.generator if seed is None and eps is None else None,
            "eps": eps,
            "first_index": first_index or None,
            "offset": offset or None,
            "num_samples": self.num_samples,
            "mask": mask,
            "batch_dims": None if self.batch_dims == (0,) else self.batch_dims,
        }
        # A compiler takes a call with little to read unread, see routes.unread.
        chosen = {name: value for name, value in chosen.items() if value is not None}
        options = {"chunk_dim": self.chunk_dim, "sample": self.training, **chosen, **self.posterior, **posterior}
        return functional.rsample_kl(mu, logvar, **options)

    def extra_repr(self) -> str:
        prior = ("prior=tensors",) if self.has_prior else ()
        return ", ".join((f"chunk_dim={self.chunk_dim}", *prior, *_described(self.posterior)))


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
        self.log_sigma = _parameter(log_sigma)

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
        return ", ".join((f"beta={beta}", *_reduced(self)))


class LinearGaussianHead(torch.nn.Module):
    """A decoder's last linear layer and the loss behind it, without the layer's output: ``head(h, x)`` is the nll.

    Its parameters are those of ``torch.nn.Linear(in_features, out_features)``, ``weight`` and ``bias``, named and initialised
    alike, so that a state dict of the one fits the other. See ``fused_elbo.linear_gaussian_nll``.

    Args:
        in_features, out_features: H, and D, the number of elements of a sample.
        bias: whether there is one. Default True.
        sigma, full, reduction, chunk_size: as for ``fused_elbo.linear_gaussian_nll``.
        log_sigma: a learned scale: a tensor or parameter, or a float to begin with, of which the module makes a parameter.
        device, dtype: of the parameters.
        **likelihood: as for ``fused_elbo.nll``. What belongs to a batch (mask, weight) goes to the call.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        sigma: float | str = 1.0,
        full: bool = False,
        reduction: str = "mean",
        chunk_size: int | tuple[int, int] | None = None,
        log_sigma: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **likelihood: Unpack[LikelihoodOptions],
    ) -> None:
        super().__init__()
        layer = torch.nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.in_features = in_features
        self.out_features = out_features
        self.weight = layer.weight
        self.register_parameter("bias", layer.bias)
        self.sigma = sigma
        self.full = full
        self.reduction = reduction
        self.chunk_size = chunk_size
        self.chosen = likelihood
        self.log_sigma = _parameter(log_sigma, layer.weight)

    def reset_parameters(self) -> None:
        """Draw weight and bias anew, as torch.nn.Linear does."""
        torch.nn.Linear.reset_parameters(self)

    def forward(self, h: Tensor, x: Tensor, **likelihood: Unpack[LikelihoodOptions]) -> Tensor:
        """Arguments, results and errors of ``fused_elbo.linear_gaussian_nll``."""
        if self.log_sigma is not None:
            likelihood = {"log_sigma": self.log_sigma, **likelihood}
        return linear.linear_gaussian_nll(
            h,
            self.weight,
            self.bias,
            x,
            sigma=self.sigma,
            full=self.full,
            reduction=self.reduction,
            chunk_size=self.chunk_size,
            **{**self.chosen, **likelihood},
        )

    def reconstruct(self, h: Tensor) -> Tensor:
        """The decoder's output (N, D) for h (N, H), behind the activation; for "bernoulli" probabilities, not logits."""
        return linear.reconstruction(h, self.weight, self.bias, self.chosen)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}", f"out_features={self.out_features}", f"bias={self.bias is not None}"
        return ", ".join((*shown, *_reduced(self)))


def _parameter(log_sigma: float | Tensor | None, like: Tensor | None = None) -> Tensor | None:
    """``log_sigma``, or where it is a number, a parameter of the device and dtype of ``like``."""
    if not isinstance(log_sigma, (int, float)):
        return log_sigma
    kind = {} if like is None else {"device": like.device, "dtype": like.dtype}
    return torch.nn.Parameter(torch.tensor(arguments.number("log_sigma", log_sigma), **kind))


def _reduced(loss: ELBOLoss | LinearGaussianHead) -> tuple[str, ...]:
    shown = f"sigma={loss.sigma!r}", f"full={loss.full}", f"reduction={loss.reduction!r}"
    return (*shown, *_described(loss.chosen))


def _described(chosen: dict[str, object]) -> list[str]:
    return [f"{name}={'tensor' if isinstance(value, Tensor) else repr(value)}" for name, value in chosen.items()]
