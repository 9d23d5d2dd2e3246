"""Every operation in plain PyTorch: the specification, the fallback backend and the oracle of all others.

``stream`` is the noise; ``plain`` the objective that most people train (Gaussian decoder of fixed variance, standard normal
prior); ``likelihood`` and ``posterior`` are the two sides of every other. Each module holds the mathematics, differentiable by
autograd, and then the backend interface: passes that write gradients into buffers that the caller owns.
"""

from .likelihood import element_nll, likelihood, likelihood_nll
from .plain import (
    SERIES_LIMIT,
    elbo,
    excess,
    gaussian_nll,
    gaussian_nll_backward,
    kl_divergence,
    reparameterize,
    rescale_,
    rsample_kl,
    rsample_kl_backward,
    total,
    unavailable,
)
from .posterior import (
    PosteriorTerms,
    clamped,
    draw_samples,
    empty_samples,
    moments,
    posterior,
    posterior_backward,
    posterior_terms,
    softly_at_least,
)
from .stream import LANES, draw, noise, noise_words, philox4x32, uniforms

__all__ = [
    "LANES",
    "SERIES_LIMIT",
    "PosteriorTerms",
    "clamped",
    "draw",
    "draw_samples",
    "elbo",
    "element_nll",
    "empty_samples",
    "excess",
    "gaussian_nll",
    "gaussian_nll_backward",
    "kl_divergence",
    "likelihood",
    "likelihood_nll",
    "moments",
    "noise",
    "noise_words",
    "philox4x32",
    "posterior",
    "posterior_backward",
    "posterior_terms",
    "reparameterize",
    "rescale_",
    "rsample_kl",
    "rsample_kl_backward",
    "softly_at_least",
    "total",
    "unavailable",
    "uniforms",
]
