"""A look at the values that people pass, on request: what they say, and what to write instead."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import arguments

# Read by every public function: outside of ``check_values`` that is all that it costs them.
active = False
_blocks, _lock = 0, threading.Lock()

# Latent diffusion clamps log-variances at -30 (Rombach et al. 2022); nothing that was trained lies far beyond.
FARTHEST_LOGVAR = 30.0
# The least weight that a KL in nats commonly has beside a likelihood in nats.
LEAST_BETA = 0.01
# So many values of one sign, or all in [0, 1], are no accident.
ENOUGH = 32


@contextlib.contextmanager
def check_values() -> Iterator[None]:
    """Look at the values that each call gets in a ``with`` block, in every thread.

    All functions that take tensors, and the modules over them, raise a ValueError for what cannot be right (NaN, inf, a
    negative deviation, a target outside of a likelihood's support) and warn of what is likely a mistake (a variance passed as
    log-variance, probabilities as logits, a weight of the KL that belongs to a mean); docs/messages.md has them all. This waits
    for the device in each call. Compiled code, functions under a transform and tensor subclasses are not looked into.
    """
    _enter(1)
    try:
        yield
    finally:
        _enter(-1)


def _enter(by: int) -> None:
    """So many blocks more: threads' may overlap."""
    global active, _blocks
    with _lock:
        _blocks += by
        active = _blocks > 0


def latent(
    mu: Tensor, logvar: Tensor | None, chunk_dim: int | None, options: dict[str, Any], mask: Tensor | None = None
) -> None:
    """The arguments of ``fused_elbo.rsample_kl``; ``options`` are its ``PosteriorOptions``."""
    _warn(_latent(mu, logvar, chunk_dim, options, mask))


def likelihood(x_hat: Tensor, x: Tensor, options: dict[str, Any]) -> None:
    """The arguments of ``fused_elbo.nll``; ``options`` are its ``LikelihoodOptions``."""
    _warn(_likelihood(x_hat, x, options))


def linear(h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, options: dict[str, Any]) -> None:
    """The arguments of ``fused_elbo.linear_gaussian_nll``; ``options`` are its ``LikelihoodOptions``."""
    mask = options.get("mask")
    if _readable(h, weight, bias, x, mask):
        for name, t in (("h", h), ("weight", weight), ("bias", bias)):
            if t is not None:
                _finite(name, t)
        _target(x, _over(mask, x), options)


def objective(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    chunk_dim: int | None,
    beta: float | Tensor,
    sigma: float | str,
    options: dict[str, Any],
) -> None:
    """The arguments of ``fused_elbo.elbo_loss``; ``options`` are its ``ELBOOptions``."""
    found = _likelihood(x_hat, x, options)
    if mu is not None:
        found += _latent(mu, logvar, chunk_dim, options, None)
    elif kl is not None and _readable(kl):
        _finite("kl", kl)
    if type(beta) is float and 0 < beta < LEAST_BETA and sigma == 1.0 and "log_sigma" not in options:
        dims = arguments.batch_dims(options.get("batch_dims", (0,)), "x_hat", arguments.batched("x_hat", x_hat))
        count = math.prod(size for d, size in enumerate(x_hat.shape) if d not in dims)
        found.append(
            f"beta: got {beta:g} beside a likelihood that is summed over {count} elements. If it was the weight of a KL beside "
            f"a mean squared error, take beta={beta * count / 2:g}; if beside a sum of squares, take beta={beta / 2:g}"
        )
    _warn(found)


def _latent(
    mu: Tensor, logvar: Tensor | None, chunk_dim: int | None, options: dict[str, Any], mask: Tensor | None
) -> list[str]:
    mu, logvar, chunk_dim = arguments.latent(mu, logvar, chunk_dim)
    if not _readable(mu, logvar, mask):
        return []
    mean, raw = mu.chunk(2, chunk_dim) if logvar is None else (mu, logvar)
    if mask is not None:
        mask = arguments.leading("mask", arguments.boolean("mask", mask), "mu", mean)
    for name, t in (("mu", mean), ("logvar", raw)):
        _finite(name, t, mask)
    seen = raw if mask is None else raw[mask.expand(raw.shape)]
    if seen.numel() == 0:
        return []
    param = options.get("param", "logvar")
    low, high = (float(v) for v in seen.detach().aminmax())
    if param in ("std", "var") and low <= 0:
        raise ValueError(f'logvar: got {low:g} with param="{param}", takes positive numbers, as softplus or exp give them')
    if param != "logvar":
        return []
    found = []
    if low > 0 and seen.numel() >= ENOUGH and options.get("prior") is None:
        found.append(
            f"logvar: got nothing but positive numbers, {low:g} to {high:g}. If they are variances or standard deviations, "
            'take param="var" or param="std"; as log-variances they make every latent wider than the prior'
        )
    bounded = options.get("clamp") is not None or options.get("soft_clamp") is not None
    # Where the deviation alone leaves the sample's dtype.
    highest = min(FARTHEST_LOGVAR, 2 * math.log(torch.finfo(mean.dtype).max))
    for value in dict.fromkeys((low, high)):
        if not bounded and not -FARTHEST_LOGVAR <= value <= highest:
            found.append(
                f"logvar: got {value:g}, a standard deviation of {math.exp(min(value / 2, 700.0)):.2g} in a sample of "
                f"{mean.dtype}. Take clamp=(-30.0, 20.0), or a log-variance that starts near 0"
            )
    return found


def _likelihood(x_hat: Tensor, x: Tensor, options: dict[str, Any]) -> list[str]:
    mask = options.get("mask")
    if not _readable(x_hat, x, mask):
        return []
    mask = _over(mask, x)
    _finite("x_hat", x_hat, mask)
    _target(x, mask, options)
    if options.get("likelihood") != "bernoulli" or x_hat.numel() == 0:
        return []
    low, high = (float(v) for v in x_hat.detach().aminmax())
    if x_hat.numel() >= ENOUGH and low >= 0 and high <= 1 and options.get("activation", "identity") == "identity":
        return [
            f'x_hat: got nothing but numbers in [0, 1] with likelihood="bernoulli", {low:g} to {high:g}, takes logits. If they '
            "are probabilities, leave out the decoder's last sigmoid"
        ]
    return []


def _target(x: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    if x.layout is torch.sparse_csr:
        # What is not stored is 0, which is finite and in every support.
        x, mask = x.values(), None
    _finite("x", x, mask)
    if options.get("likelihood") == "bernoulli" and x.is_floating_point():
        outside = _shown((x < 0) | (x > 1), mask)
        if outside.any():
            raise ValueError(
                f'x: got {float(x.detach()[outside][0]):g} with likelihood="bernoulli", takes numbers in [0, 1]; or bytes, as '
                "uint8 with scale=1 / 255"
            )


def _over(mask: Tensor | None, x: Tensor) -> Tensor | None:
    return None if mask is None else arguments.leading("mask", arguments.boolean("mask", mask), "x", x)


def _finite(name: str, t: Tensor, mask: Tensor | None = None) -> None:
    if not t.is_floating_point():
        return
    bad = _shown(~t.isfinite(), mask)
    if not bad.any():
        return
    first = tuple(bad.nonzero()[0].tolist())
    ends = ""
    if t.dtype == torch.float16 and t[first].isinf():
        ends = f". float16 ends at {torch.finfo(t.dtype).max:g}: let what makes it run in bfloat16 or float32"
    raise ValueError(
        f"{name}: got {float(t.detach()[first])} at {first}, and {int(bad.sum())} of {t.numel()} elements are NaN or infinite, "
        f"takes finite numbers{ends}"
    )


def _shown(bad: Tensor, mask: Tensor | None) -> Tensor:
    return bad if mask is None else bad & mask


def _readable(*tensors: Tensor | None) -> bool:
    """Whether values can be had; what is no tensor at all is said by the checks that every call makes."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return all(t is None or (type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta) for t in tensors)


def _warn(messages: list[str]) -> None:
    for message in messages:
        warnings.warn(message, UserWarning, stacklevel=_users_level())


def _users_level() -> int:
    """The ``stacklevel``, for the caller, of the line that is neither the library's nor of PyTorch, which calls modules."""
    # ``skip_file_prefixes`` of ``warnings.warn`` comes with Python 3.12.
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "torch"):
        level, frame = level + 1, frame.f_back
    return level
