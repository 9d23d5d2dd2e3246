"""Fused losses for variational autoencoders: sampling, Gaussian likelihood and KL, forward and backward in one pass each."""

from . import autograd, nn
from ._version import __version__
from .functional import (
    ELBOTerms,
    LatentSample,
    elbo_loss,
    gaussian_nll,
    kl_divergence,
    reparameterize,
    rsample_kl,
)
from .ops import backend

__all__ = [
    "ELBOTerms",
    "LatentSample",
    "__version__",
    "autograd",
    "backend",
    "elbo_loss",
    "gaussian_nll",
    "kl_divergence",
    "nn",
    "reparameterize",
    "rsample_kl",
]
