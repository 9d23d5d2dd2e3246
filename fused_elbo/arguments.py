"""Checks of what users pass. Each names the argument, what it got and what it takes, and looks at no tensor's values."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")


def floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {_kind(value)}, takes a tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes one of {', '.join(str(d) for d in FLOATING)}")
    return value


def batched(name: str, value: object) -> Tensor:
    value = floating(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: got a 0-dimensional tensor, takes (N, ...) with the batch first")
    return value


def like(name: str, value: object, other_name: str, other: Tensor) -> Tensor:
    value = floating(name, value)
    if value.shape != other.shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes that of {other_name}, {tuple(other.shape)}")
    on_device(name, value, other_name, other)
    return value


def on_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: got device {value.device}, takes that of {other_name}, {other.device}")


def per_sample(name: str, value: object, other_name: str, other: Tensor) -> Tensor:
    value = floating(name, value)
    if value.shape != other.shape[:1]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, takes one value per sample of {other_name}, {tuple(other.shape[:1])}"
        )
    on_device(name, value, other_name, other)
    return value


def latent(mu: object, logvar: object, chunk_dim: object) -> tuple[Tensor, Tensor | None, int]:
    """``mu, logvar`` and 0, or packed ``moments``, None and the dimension that they are packed on."""
    mu = batched("mu", mu)
    if logvar is not None:
        if chunk_dim is not None:
            raise ValueError("chunk_dim: got it together with logvar, takes packed moments as mu and no logvar")
        return mu, like("logvar", logvar, "mu", mu), 0
    if chunk_dim is None:
        raise ValueError("logvar: got None, takes a tensor like mu; or pass packed moments as mu and chunk_dim=")
    if not isinstance(chunk_dim, int) or not -mu.dim() <= chunk_dim < mu.dim() or chunk_dim % mu.dim() == 0:
        raise ValueError(
            f"chunk_dim: got {chunk_dim!r}, takes a dimension of the moments {tuple(mu.shape)} other than the batch's"
        )
    if mu.shape[chunk_dim] % 2:
        raise ValueError(
            f"mu: got packed moments of shape {tuple(mu.shape)}, takes an even size in dimension chunk_dim={chunk_dim}"
        )
    return mu, None, chunk_dim


def scalar(name: str, value: object, other_name: str, other: Tensor) -> float | Tensor:
    """A float, or a tensor of one element on ``other``'s device, as a 0-dimensional tensor."""
    if isinstance(value, Tensor):
        floating(name, value)
        if value.numel() != 1:
            raise ValueError(f"{name}: got a tensor of shape {tuple(value.shape)}, takes a float or one element")
        if value.device.type == "cpu" and other.device.type != "cpu" and not value.requires_grad:
            return float(value)
        on_device(name, value, other_name, other)
        return value.reshape(())
    return number(name, value)


def number(name: str, value: object) -> float:
    # To ask an abstract class takes 0.4 us.
    if type(value) is float:
        return value
    if not isinstance(value, Real):
        raise TypeError(f"{name}: got {_kind(value)}, takes a float")
    return float(value)


def positive(name: str, value: object) -> float:
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: got {value}, takes a positive, finite float")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")
    return value


def index(name: str, value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {_kind(value)}, takes an int")
    if not 0 <= value < limit:
        raise ValueError(f"{name}: got {value}, takes an int in [0, 2^{limit.bit_length() - 1})")
    return value


def overwritable(name: str, value: Tensor) -> None:
    """``value`` may be overwritten by its gradient: no leaf nor a view of one, and no two elements share memory."""
    if any(t is not None and t.requires_grad and t.is_leaf for t in (value, value._base)):
        raise ValueError(f"inplace: got True with a leaf {name} that requires grad, or a view of one, takes False there")
    if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
        raise ValueError(f"inplace: got True with an expanded {name} (stride 0), takes False there")


def _kind(value: object) -> str:
    return f"{value!r}" if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"
