"""Fused losses for variational autoencoders: sampling, likelihood and KL, forward and backward in one pass each."""

from . import autograd, distributions, nn, schedules
from ._version import __version__
from .diagnostics import check_values
from .functional import (
    ELBOTerms,
    LatentSample,
    elbo_loss,
    gaussian_nll,
    kl_divergence,
    kl_per_dim,
    nll,
    reparameterize,
    rsample_kl,
)
from .iwae import IWAETerms, WeightedSamples, iwae_loss, log_likelihood, rsample_log_ratio
from .linear import linear_gaussian_nll
from .ops import backend

__all__ = [
    "ELBOTerms",
    "IWAETerms",
    "LatentSample",
    "WeightedSamples",
    "__version__",
    "autograd",
    "backend",
    "check_values",
    "distributions",
    "elbo_loss",
    "gaussian_nll",
    "iwae_loss",
    "kl_divergence",
    "kl_per_dim",
    "linear_gaussian_nll",
    "log_likelihood",
    "nll",
    "nn",
    "reparameterize",
    "rsample_kl",
    "rsample_log_ratio",
    "schedules",
]
