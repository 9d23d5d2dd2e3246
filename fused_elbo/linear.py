"""The decoder's last linear layer together with the likelihood, in chunks: x_hat, the largest tensor of a wide model's training
step, and its gradient never exist. Arguments, checks and reductions over ``autograd.LinearNLL``."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from . import arguments, diagnostics, linear_operator, objective, ops, options, routes
from .autograd import LinearCall, LinearNLL, apply
from .options import LikelihoodChoice, LikelihoodOptions
from .spec import compute_dtype

# Of weights and masks that are multiplied at a time.
ROWS = 64


def linear_gaussian_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    /,
    *,
    sigma: float | str = 1.0,
    full: bool = False,
    reduction: str = "mean",
    chunk_size: int | tuple[int, int] | None = None,
    **likelihood: Unpack[LikelihoodOptions],
) -> Tensor:
    """``gaussian_nll(linear(h, weight, bias), x)``, and any other likelihood, without the linear layer's output.

    x_hat = h W^T + b is made, compared with x and overwritten by its gradient chunk by chunk, and each chunk's gradient goes
    into those of h, W and b at once (for language models: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024,
    arXiv:2410.10989). Memory beyond inputs and gradients is a chunk and a number for each row of one, in place of 2 N D. The
    likelihood is that of ``gaussian_nll``; under autocast the products are made in its dtype. There is no ``grad_scale``: what
    the upstream gradient multiplies is no larger than h, W and b.

    Args:
        h: (N, H) what the last linear layer is given.
        weight: (D, H), as of torch.nn.Linear, of h's dtype unless autocast brings both to its own.
        bias: (D,) or None.
        x: (N, ...) the data, D elements a sample, floats or uint8 as for ``nll``; dimensions that cannot be merged in memory
            cost a copy. Or torch.sparse_csr (N, D), whose rows are expanded a chunk at a time; it gets no gradient.
        sigma, full: as for ``gaussian_nll``; "optimal" takes no second pass here, except with reduction "none".
        reduction: "mean" over the batch (default), "sum", or "none" for (N,). With "none" the gradient needs every sample's
            upstream gradient: the backward makes the chunks again.
        chunk_size: rows of a chunk, with all output features; or a pair of rows and features. Default: a square of a size that
            was measured to be quick, 4 MiB on a CPU.
        **likelihood: as for ``nll``, also ``weight=``, that of samples or elements: the layer's goes by position. Shapes are as
            for x; ``batch_dims`` beyond (0,) with "mean" and "sum" alone. A scale, weight or mask that depends on the sample
            and on some other dimensions, but not on all, costs a copy of x's size.

    Returns:
        A scalar, or (N,) for "none"; float32, or float64 for float64 inputs. Low precisions sum the weight's gradient up in
        float32.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which, what it got and what it takes.
    """
    h, weight, bias, dtype = _layer(h, weight, bias)
    x = _data(x, h, weight)
    options.known(likelihood, options.LIKELIHOOD_NAMES)
    if diagnostics.active:
        diagnostics.linear(h, weight, bias, x, likelihood)
    choice = options.likelihood(likelihood, sigma, full, x, x)
    arguments.choice("reduction", reduction, arguments.REDUCTIONS)
    dims = arguments.batch_dims(likelihood.get("batch_dims", (0,)), "x", x)
    if reduction == "none" and dims != (0,):
        raise ValueError(f'batch_dims: got {dims} with reduction "none", takes (0,) there')
    chunk = _chunk(chunk_size, weight.shape[0])
    if not _chunked(h, weight, bias, x, choice):
        if x.layout is torch.sparse_csr:
            raise TypeError(
                "x: got torch.sparse_csr under a function transform or beside a tensor subclass, takes a dense tensor there"
            )
        x_hat = F.linear(h, weight, bias).reshape(x.shape)
        return objective.likelihood(objective.checked(x_hat, x, sigma, full, likelihood, reduction=reduction))[0]
    count = math.prod([x.shape[d] for d in dims])
    share = arguments.reduction_weight(reduction, count)
    value = _optimal if choice.optimal else _value
    found = value((h, weight, bias, x), choice, dtype, chunk, by_rows=share is None)
    if reduction == "mean" and count == 0:
        # A mean over nothing is NaN, which may not go into gradients that other processes have a part in.
        return 0.0 * found + math.nan
    return found if share is None else share * found


def _value(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    choice: LikelihoodChoice,
    dtype: torch.dtype,
    chunk: tuple[int, int] | None,
    *,
    by_rows: bool,
) -> Tensor:
    """The terms (N,), or their total ()."""
    *layer, x = tensors
    size = (x.shape[0], layer[1].shape[0])
    log_sigma = choice.log_sigma
    if log_sigma is not None and choice.min_log_sigma is not None:
        terms = compute_dtype(layer[0], x, log_sigma, choice.weight)
        log_sigma = objective.soft_floor(log_sigma, choice.min_log_sigma, terms)
    rest = (_flat(t, x.shape, size) for t in (log_sigma, choice.weight, choice.mask))
    given = (*layer, x if x.layout is torch.sparse_csr else x.reshape(size), *rest)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in given[:5])
    if torch.compiler.is_compiling():
        return linear_operator.linear_nll(*given, *choice.spec, dtype, chunk, by_rows, needs)[0]
    call = LinearCall(choice.spec, ops.select(x.device), dtype, chunk, by_rows, needs)
    return apply(LinearNLL, *given, call)[0]


def _optimal(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor],
    choice: LikelihoodChoice,
    dtype: torch.dtype,
    chunk: tuple[int, int] | None,
    *,
    by_rows: bool,
) -> Tensor:
    """``_value`` with sigma^2 the batch's mean squared error: a function of the total, whose gradient is therefore that of the
    halved squares times one number."""
    x = tensors[-1]
    half_squares = _value(tensors, objective.of_unit_sigma(choice), dtype, chunk, by_rows=by_rows)
    count = _observed(x, choice, half_squares.dtype)
    return objective.at_optimum(half_squares, count if by_rows else count.sum(), choice)


def _observed(x: Tensor, choice: LikelihoodChoice, dtype: torch.dtype) -> Tensor:
    """How many elements each sample's term is made of, by weight (N,)."""
    count, features = x.shape[0], math.prod(x.shape[1:])
    factors = [_flat(t, x.shape, (count, features)) for t in (choice.weight, choice.mask) if t is not None]
    if not factors:
        return torch.full((count,), features, dtype=dtype, device=x.device)
    first, *others = sorted(factors, key=lambda t: t.shape[1])
    if not others:
        return (first.sum(1, dtype=dtype) * (features // max(1, first.shape[1]))).expand(count)
    (second,) = others
    if first.shape[1] == 1:
        return (first[:, 0].to(dtype) * second.sum(1, dtype=dtype) * (features // max(1, second.shape[1]))).expand(count)
    # By parts: the whole product is of the batch's size.
    pairs = zip(*(t.expand(count, features).split(ROWS) for t in (first, second)), strict=True)
    return torch.cat([(a.to(dtype) * b.to(dtype)).sum(1) for a, b in pairs])


def _layer(h: object, weight: object, bias: object) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """The checked layer and the dtype of its output."""
    h, weight = arguments.batched("h", h), arguments.floating("weight", weight)
    if h.dim() != 2:
        raise ValueError(f"h: got shape {tuple(h.shape)}, takes (N, H), one row for each sample")
    if weight.dim() != 2 or weight.shape[1] != h.shape[1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, takes (D, {h.shape[1]}) for h of shape {tuple(h.shape)}")
    arguments.on_device("weight", weight, "h", h)
    if bias is not None:
        bias = arguments.floating("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"bias: got shape {tuple(bias.shape)}, takes {tuple(weight.shape[:1])}, one for each row of weight"
            )
        arguments.on_device("bias", bias, "h", h)
    dtype = h.dtype
    if torch.is_autocast_enabled(h.device.type) and dtype != torch.float64:
        return h, weight, bias, torch.get_autocast_dtype(h.device.type)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != dtype:
            raise TypeError(f"{name}: got dtype {t.dtype}, takes that of h, {dtype}")
    return h, weight, bias, dtype


def _data(x: object, h: Tensor, weight: Tensor) -> Tensor:
    x = arguments.target("x", x)
    shape = (h.shape[0], weight.shape[0])
    if x.layout is torch.sparse_csr:
        if x.requires_grad:
            raise ValueError("x: got a sparse tensor that requires grad, takes a constant, or a dense tensor")
        if x.shape != shape:
            raise ValueError(f"x: got shape {tuple(x.shape)}, takes {shape} of a sparse tensor, (N, D)")
    elif x.layout is not torch.strided:
        raise TypeError(f"x: got layout {x.layout}, takes torch.strided or torch.sparse_csr")
    elif x.dim() == 0 or x.shape[0] != shape[0] or math.prod(x.shape[1:]) != shape[1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes h's {shape[0]} samples of weight's {shape[1]} elements")
    arguments.on_device("x", x, "h", h)
    return x


def _chunk(chunk_size: object, features: int) -> tuple[int, int] | None:
    if chunk_size is None:
        return None
    pair = chunk_size if isinstance(chunk_size, (tuple, list)) else (chunk_size, max(1, features))
    if len(pair) != 2 or any(arguments.index("chunk_size", size, 2**63) == 0 for size in pair):
        raise ValueError(f"chunk_size: got {chunk_size!r}, takes rows, or a pair of rows and output features, each at least 1")
    return tuple(pair)


def _chunked(h: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, choice: LikelihoodChoice) -> bool:
    """Whether the pass in chunks may be taken: not by a transform, which takes formulas apart, nor by a tensor subclass."""
    tensors = (h, weight, bias, x, choice.log_sigma, choice.weight, choice.mask)
    if torch.compiler.is_compiling():
        return routes.compiled(*[t for t in tensors if t is not None])
    return routes.plainly(*tensors)


def _flat(t: Tensor | None, shape: torch.Size, size: tuple[int, int]) -> Tensor | None:
    """What broadcasts to ``shape``, dimension by dimension, as (1 or N, 1 or D)."""
    if t is None:
        return None
    trailing = 1 if all(n == 1 for n in t.shape[1:]) else size[1]
    if trailing > 1:
        t = t.expand(t.shape[0], *shape[1:])
    return t.reshape(t.shape[0], trailing)


def reconstruction(h: Tensor, weight: Tensor, bias: Tensor | None, chosen: dict[str, Any]) -> Tensor:
    """The mean of p(x | z), or its location, (N, D), of ``LikelihoodOptions``."""
    bernoulli = chosen.get("likelihood") == "bernoulli"
    activation = "sigmoid" if bernoulli else chosen.get("activation", "identity")
    x_hat = F.linear(h, weight, bias)
    return x_hat if activation == "identity" else getattr(torch, activation)(x_hat)
