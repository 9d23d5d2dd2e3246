"""Checks of what users pass. Each names the argument, what it got and what it takes, and looks at no tensor's values."""

from __future__ import annotations

import math
import sys
from numbers import Real

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")

# What a Gaussian multiplies by, 1 / sigma^2, is beyond a double's range somewhat below.
LEAST_SIGMA = 1e-154


def floating(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {kind(value)}, takes a tensor")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes one of {', '.join(str(d) for d in FLOATING)}")
    return value


def batched(name: str, value: object) -> Tensor:
    value = floating(name, value)
    if value.dim() == 0:
        raise ValueError(f"{name}: got a 0-dimensional tensor, takes (N, ...) with the batch first")
    return value


def like(name: str, value: object, other_name: str, other: Tensor) -> Tensor:
    return shaped(name, floating(name, value), other_name, other)


def shaped(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
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
    if not isinstance(chunk_dim, (int, torch.SymInt)) or not -mu.dim() <= chunk_dim < mu.dim() or chunk_dim % mu.dim() == 0:
        raise ValueError(
            f"chunk_dim: got {chunk_dim!r}, takes a dimension of the moments {tuple(mu.shape)} other than the batch's"
        )
    if mu.shape[chunk_dim] % 2:
        raise ValueError(
            f"mu: got packed moments of shape {tuple(mu.shape)}, takes an even size in dimension chunk_dim={chunk_dim}"
        )
    return mu, None, int(chunk_dim)


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


def per_term(name: str, value: object, shape: tuple[int, ...], other_name: str, other: Tensor) -> float | Tensor:
    """A number as of ``scalar``, or a tensor for the leading dimensions of ``shape``, with as many dimensions."""
    if isinstance(value, torch.SymFloat):
        # A compiler's symbol stands for a weight that changes: as a number it would be that of this call alone.
        return value
    if not isinstance(value, Tensor) or value.numel() == 1:
        return scalar(name, value, other_name, other)
    floating(name, value)
    on_device(name, value, other_name, other)
    if value.shape != shape[: value.dim()]:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, takes one element, or leading dimensions of the terms, {shape}"
        )
    return value[(..., *(None,) * (len(shape) - value.dim()))]


def grad_scale(value: object, x_hat: Tensor) -> float | Tensor:
    """As given, in the loss's dtype; 1 for 0 and what is near it, since no gradient can be scaled up from that."""
    if isinstance(value, torch.SymFloat):
        # No operator makes use of it.
        return 1.0
    value, dtype = scalar("grad_scale", value, "x_hat", x_hat), torch.promote_types(x_hat.dtype, torch.float32)
    if isinstance(value, float):
        known = torch.finfo(dtype)
        if not abs(value) <= known.max:
            raise ValueError(
                f"grad_scale: got {value}, takes a number up to {known.max:.2g}, where losses of {x_hat.dtype} end"
            )
        return value if abs(value) >= known.tiny else 1.0
    if value.requires_grad:
        raise ValueError("grad_scale: got a tensor that requires grad, takes a constant: it only says what backward will bring")
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    return torch.where(value.abs() < torch.finfo(dtype).tiny, 1.0, value)


def number(name: str, value: object) -> float:
    # To ask an abstract class takes 0.4 us.
    if type(value) is float:
        return value
    if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: got {kind(value)}, takes a float")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: got a number beyond {sys.float_info.max:.2g}, takes a float, which ends there") from None


def positive(name: str, value: object, least: float = LEAST_SIGMA) -> float:
    """A positive, finite float; by default one that a Gaussian takes for its sigma."""
    value = number(name, value)
    if not 0 < value < math.inf or value < least:
        bound = f" of at least {least:g}, where 1 / {name}^2 is finite too" if 0 < value < least else ""
        raise ValueError(f"{name}: got {value}, takes a positive, finite float{bound}")
    return value


def choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, takes one of {', '.join(map(repr, choices))}")
    return value


def reduction_weight(reduction: str, count: int) -> float | None:
    """What a total multiplies the sum of its terms by; None where there is no total."""
    return None if reduction == "none" else 1.0 if reduction == "sum" else 1.0 / count if count else math.nan


def index(name: str, value: object, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {kind(value)}, takes an int")
    if not 0 <= value < limit:
        raise ValueError(f"{name}: got {value}, takes an int in [0, 2^{limit.bit_length() - 1})")
    return value


def boolean(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {kind(value)}, takes a tensor of bools")
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: got dtype {value.dtype}, takes torch.bool")
    return value


def target(name: str, value: object) -> Tensor:
    """Floats, or levels in uint8."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8:
        return value
    return floating(name, value)


def broadcastable(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``value`` with as many dimensions as ``other``, to which it broadcasts."""
    on_device(name, value, other_name, other)
    missing = other.dim() - value.dim()
    if missing < 0 or any(size != 1 and size != full for size, full in zip(value.shape, other.shape[missing:], strict=True)):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, takes one that broadcasts to that of {other_name}, {tuple(other.shape)}"
        )
    if value.dim() == 0 and torch.compiler.is_compiling():
        # Inductor folds a parameter of no dimensions into its code, and cannot take a view of what it folded.
        return value + value.new_zeros((1,) * missing)
    return value[(None,) * missing] if missing else value


def broadcast(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``value`` expanded to the shape of ``other``."""
    return broadcastable(name, value, other_name, other).expand(other.shape)


def leading(name: str, value: Tensor, other_name: str, other: Tensor) -> Tensor:
    """``value``, for the leading dimensions of ``other`` or broadcastable to all of them, with as many dimensions."""
    on_device(name, value, other_name, other)
    if 0 < value.dim() <= other.dim():
        value = value[(..., *(None,) * (other.dim() - value.dim()))]
        if all(size == 1 or size == full for size, full in zip(value.shape, other.shape, strict=True)):
            return value
    raise ValueError(
        f"{name}: got shape {tuple(value.shape)}, takes leading dimensions of {other_name}, or all of them, each in full or 1: "
        f"{tuple(other.shape)}"
    )


def interval(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: got {value!r}, takes a pair (low, high)")
    low, high = (number(name, v) for v in value)
    if not low < high:
        raise ValueError(f"{name}: got {value!r}, takes low < high")
    return low, high


def batch_dims(value: object, other_name: str, other: Tensor) -> tuple[int, ...]:
    """Different dimensions of ``other`` in ascending order, the first of them 0."""
    dims = (value,) if isinstance(value, int) else value
    if not isinstance(dims, (tuple, list)) or not all(isinstance(d, int) and -other.dim() <= d < other.dim() for d in dims):
        raise ValueError(f"batch_dims: got {value!r}, takes dimensions of {other_name}, which has {other.dim()}")
    # A compiler compares its symbols with numbers, but does not sort them.
    found = tuple(k for k in range(other.dim()) if any(d % other.dim() == k for d in dims))
    if found[:1] != (0,) or len(found) < len(dims):
        raise ValueError(f"batch_dims: got {value!r}, takes different dimensions, with 0 among them")
    return found


def process_group(value: object) -> torch.distributed.ProcessGroup | None:
    # The value of torch.distributed.new_group for a process that is no member is not a group either.
    if value is None or (torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)):
        return value
    raise TypeError(f"process_group: got {kind(value)}, takes a torch.distributed.ProcessGroup that this process is in")


def overwritable(name: str, value: Tensor) -> None:
    """``value`` may be overwritten by its gradient: no leaf nor a view of one, and no two elements share memory."""
    if any(t is not None and t.requires_grad and t.is_leaf for t in (value, value._base)):
        raise ValueError(f"inplace: got True with a leaf {name} that requires grad, or a view of one, takes False there")
    # A compiler's symbols are not to be sorted, and what it traces is not overwritten.
    if torch.compiler.is_compiling():
        return
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ValueError(f"inplace: got True with {name} of which elements share memory, takes False there")
        reach += stride * (size - 1)


def apart(name: str, value: Tensor, **others: Tensor | None) -> None:
    """What is overwritten lies in no stretch of memory that is still to be read, be it with other elements."""
    for other_name, other in others.items():
        if other is not None and value.numel() and other.numel():
            (begin, end), (other_begin, other_end) = _stretch(value), _stretch(other)
            if begin < other_end and other_begin < end:
                raise ValueError(f"inplace: got True with {name} in the memory of {other_name}, takes False there")
    if value.is_neg():
        raise ValueError(f"inplace: got True with {name} that is a negated view, takes False there")


def _stretch(t: Tensor) -> tuple[int, int]:
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + t.element_size() * elements


def kind(value: object) -> str:
    return f"{value!r}" if isinstance(value, (int, float, str, type(None))) else f"a {type(value).__name__}"
