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
