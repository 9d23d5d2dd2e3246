"""``autograd.LinearNLL`` as compilers see it: an operator that returns a total's gradients along with it, and one that makes
the chunks again for upstream gradients of every sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import ops, spec
from .autograd import LinearCall
from .autograd import linear as rules
from .operators import register
from .spec import compute_dtype

_TENSORS = (
    "Tensor h, Tensor weight, Tensor? bias, Tensor x, Tensor? log_scale, Tensor? sample_weight, Tensor? mask,"
    " str family, str activation, float log_scale_number, bool full, float scale, float shift, ScalarType dtype,"
    " SymInt[]? chunk"
)
_COUNT = 7


def _call(args: tuple, by_rows: bool, needs: list[bool]) -> tuple[tuple[Tensor | None, ...], LinearCall]:
    tensors, (*likelihood, dtype, chunk) = args[:_COUNT], args[_COUNT:]
    chunk = None if chunk is None else tuple(chunk)
    return tensors, LinearCall(spec.Likelihood(*likelihood), None, dtype, chunk, by_rows, needs)


def _linear_nll(*args: Any) -> tuple[Tensor, ...]:
    *args, by_rows, needs = args
    tensors, call = _call(args, by_rows, needs)
    value, *gradients = rules.valued(tensors, call._replace(backend=ops.select(tensors[0].device)))
    return value, *_present(gradients, value)


def _fake_linear_nll(*args: Any) -> tuple[Tensor, ...]:
    *args, by_rows, needs = args
    tensors, call = _call(args, by_rows, [need and not by_rows for need in needs])
    h, _, _, x, log_scale, sample_weight, _ = tensors
    value = h.new_empty(x.shape[:1] if by_rows else (), dtype=compute_dtype(h, x, log_scale, sample_weight))
    return value, *_present(rules.buffers(tensors, call), value)


def _linear_nll_backward(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *args, needs = args
    tensors, call = _call(args, True, needs)
    call = call._replace(backend=ops.select(upstream.device))
    return _present(rules.passed(tensors, upstream, call, want_nll=False)[1], upstream)


def _fake_linear_nll_backward(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *args, needs = args
    return _present(rules.buffers(*_call(args, True, needs)), upstream)


def _present(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one for what is not needed."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def _context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *args, ctx.by_rows, ctx.needs = inputs
    ctx.dtypes = [None if t is None else t.dtype for t in args[:5]]
    ctx.options = args[_COUNT:]
    ctx.save_for_backward(*(args[:_COUNT] if ctx.by_rows else output[1:]))
    ctx.unknown, ctx.shape = rules.unknown_of(args[:_COUNT], ctx.options[-2]), args[3].shape


def _autograd(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.by_rows:
        needs = list(ctx.needs_input_grad[:5])
        found = linear_nll_backward(upstream, *ctx.saved_tensors, *ctx.options, needs)
        factor = 1.0
    else:
        found, needs = ctx.saved_tensors, ctx.needs
        likelihood = spec.Likelihood(*ctx.options[:-2])
        factor = rules.factor_of(upstream, likelihood, ctx.unknown, ctx.shape)
    gradients = ((g * factor).to(dtype) if need else None for g, dtype, need in zip(found, ctx.dtypes, needs, strict=True))
    return *gradients, *(None,) * (_COUNT - 5 + len(ctx.options) + 2)


linear_nll = register(
    "linear_nll",
    f"({_TENSORS}, bool by_rows, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_nll,
    _fake_linear_nll,
)
linear_nll_backward = register(
    "linear_nll_backward",
    f"(Tensor upstream, {_TENSORS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_nll_backward,
    _fake_linear_nll_backward,
)
torch.library.register_autograd("fused_elbo::linear_nll", _autograd, setup_context=_context)
