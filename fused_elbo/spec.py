"""What an operation is asked to do, in the form that every backend takes. A leaf: it imports nothing of ours."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class Noise(NamedTuple):
    """Where the standard normals of a sample come from: a seed of the library's stream, or an explicit tensor.

    Attributes:
        seed: int64 key on the device of the latents, shape () or, one per sample, (N,). None with ``eps``.
        eps: standard normals of the shape of the latents, any strides. None with ``seed``.
        first_index: number of the first element in the stream (a shard of a larger tensor starts later).
        offset: 64-bit counter that separates streams of one seed.
    """

    seed: Tensor | None = None
    eps: Tensor | None = None
    first_index: int = 0
    offset: int = 0


def signed(offset: int) -> int:
    """64 bits as torch's int."""
    return offset if offset < 2**63 else offset - 2**64


class Gaussian(NamedTuple):
    """The decoder p(x|z) = N(x_hat, sigma^2 I) with a fixed ``sigma``; ``full`` keeps the constant D/2 ln 2 pi."""

    sigma: float = 1.0
    full: bool = False

    @property
    def precision(self) -> float:
        """1 / sigma^2."""
        return self.sigma**-2

    @property
    def log_normaliser(self) -> float:
        """The part of the negative log-likelihood of one element that does not depend on the data, in nats."""
        return math.log(self.sigma) + (LOG_SQRT_2PI if self.full else 0.0)


FAMILIES = ("gaussian", "laplace", "bernoulli", "discretized_logistic")
ACTIVATIONS = ("identity", "sigmoid", "tanh")
PARAMS = ("logvar", "log_std", "std", "var", "softplus")

# A uint8 target takes these values.
LAST_LEVEL = 255


class Likelihood(NamedTuple):
    """Any decoder p(x|z), a product over elements.

    Attributes:
        family: one of ``FAMILIES``.
        activation: one of ``ACTIVATIONS``; maps the decoder's output to the location x_hat.
        log_scale: logarithm of the scale (sigma; b of Laplace; s of the logistic), where no tensor gives it.
        full: keep the constant that does not depend on the scale (1/2 ln 2 pi; ln 2 of Laplace).
        scale, shift: a uint8 target u stands for x = scale u + shift. Of no meaning for a target of floats.
    """

    family: str = "gaussian"
    activation: str = "identity"
    log_scale: float = 0.0
    full: bool = False
    scale: float = 1.0
    shift: float = 0.0

    @property
    def constant(self) -> float:
        """What ``full`` adds to the negative log-likelihood of an element, in nats."""
        return constant_of(self.family, self.full)


def constant_of(family: str, full: bool) -> float:
    """``Likelihood.constant``: a function as well, since an older compiler follows no property of a tuple."""
    return {"gaussian": LOG_SQRT_2PI, "laplace": math.log(2.0)}.get(family, 0.0) if full else 0.0


class Posterior(NamedTuple):
    """How the posterior's second parameter, and the prior's, is to be read, and what becomes of an element's KL.

    Attributes:
        param: one of ``PARAMS``: what the raw parameter is; "softplus" says std = softplus(raw) + min_std.
        min_std: for "softplus" alone.
        clamp: bounds of the posterior's raw parameter, before anything else.
        soft: the bounds are approached, hi - softplus(hi - raw) and then lo + softplus(raw - lo), instead of cut.
        free_bits: an element's KL is at least this many nats, and has no gradient below.
        posterior_share, prior_share: factors of the KL's gradients (not of its value) for the two distributions.
    """

    param: str = "logvar"
    min_std: float = 0.0
    clamp: tuple[float, float] | None = None
    soft: bool = False
    free_bits: float | None = None
    posterior_share: float = 1.0
    prior_share: float = 1.0


class DataGradients(NamedTuple):
    """Buffers for gradients of ``likelihood``'s tensors, each of their one shape, any strides; None where not needed."""

    x_hat: Tensor | None = None
    x: Tensor | None = None
    log_scale: Tensor | None = None


class PosteriorGradients(NamedTuple):
    """Buffers for gradients of ``posterior``'s tensors, each of the mean's shape, any strides; None where not needed."""

    mu: Tensor | None = None
    raw: Tensor | None = None
    prior_mean: Tensor | None = None
    prior_raw: Tensor | None = None


class Gradients(NamedTuple):
    """Buffers that a forward pass fills with gradients; None where a gradient is not needed.

    ``x_hat``, ``x``, ``mu``, ``logvar`` have their input's shape and dtype, any strides; ``kl`` is a scalar, the weight
    of every sample's KL.
    """

    x_hat: Tensor | None = None
    x: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None
    kl: Tensor | None = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of terms and losses: float64 if any of the tensors is float64, float32 otherwise."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def elements_per_sample(t: Tensor) -> int:
    """Product of all dimensions but the first."""
    return math.prod(t.shape[1:])
