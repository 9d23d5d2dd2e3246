"""The Function of the data side: any likelihood, with its gradients in the forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import DataGradients, Likelihood, compute_dtype
from .common import composed, differentiable, placed, rescaled, underflow


class NLL(torch.autograd.Function):
    """``(total, nll, *gradients)``: ``nll`` (A, B) and, with a weight, ``total = weight sum nll``; the gradients are its own.

    ``apply(x_hat, x, log_scale, weight, mask, grad_scale, (spec, total_weight, needs, backend))``: tensors as for
    ``reference.likelihood``, but of ``log_scale`` any size may be 1. Its gradient is summed up by rows where a row has one
    scale, element by element elsewhere. ``total_weight`` is None where there is no total; ``needs`` tells which of (x_hat, x,
    log_scale) need a gradient. ``fused_elbo.nll`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        x_hat: Tensor,
        x: Tensor,
        log_scale: Tensor | None,
        weight: Tensor | None,
        mask: Tensor | None,
        grad_scale: float | Tensor,
        options: tuple[Likelihood, float | None, Sequence[bool], ModuleType],
    ) -> tuple[Tensor | None, ...]:
        _, total_weight, needs, _ = options
        upstream = None
        if total_weight is not None and any(needs):
            dtype = compute_dtype(x_hat, x, log_scale, weight)
            upstream = (total_weight * _one(grad_scale, dtype, x_hat.device)).expand(x_hat.shape[:2])
        nll, gradients = passed(x_hat, x, log_scale, weight, mask, upstream, options, want_nll=True)
        total = None if total_weight is None else total_weight * nll.sum()
        return total, nll, *(g for g in gradients if g is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, grad_scale, ctx.options = inputs
        gradients = output[2:]
        ctx.mark_non_differentiable(*gradients)
        ctx.set_materialize_grads(False)
        ctx.grad_scale = grad_scale
        ctx.save_for_backward(*tensors, grad_scale if isinstance(grad_scale, Tensor) else None, *gradients)

    @staticmethod
    def backward(ctx: Any, g_total: Tensor | None, g_nll: Tensor | None, *_: None) -> tuple:
        if g_total is None and g_nll is None:
            return (None,) * 7
        # Once: a checkpoint makes them anew for the first who asks, and for nobody else.
        saved = ctx.saved_tensors
        *tensors, grad_scale = saved[:6]
        baked = saved[6:]
        spec, total_weight, needs, backend = ctx.options
        grad_scale = ctx.grad_scale if grad_scale is None else grad_scale
        if composed():

            def formula(
                x_hat: Tensor, x: Tensor, log_scale: Tensor | None, *rest: Tensor | None
            ) -> tuple[Tensor | None, Tensor]:
                scale = None if log_scale is None else log_scale.expand(x_hat.shape)
                nll = reference.likelihood_nll(x_hat, x, scale, *rest, spec)
                return nll if total_weight is None else total_weight * nll.sum(), nll

            return *differentiable(formula, tensors, (g_total, g_nll)), None, None

        if g_nll is None and baked and not underflow(baked):
            return *placed(rescaled(baked, g_total, grad_scale, backend), needs), *(None,) * 4
        upstream = g_nll
        if g_total is not None:
            total = (g_total * total_weight).expand(tensors[0].shape[:2])
            upstream = total if g_nll is None else total + g_nll
        found = passed(*tensors, upstream, (spec, total_weight, ctx.needs_input_grad[:3], backend), want_nll=False)[1]
        return *found, *(None,) * 4


def passed(
    x_hat: Tensor,
    x: Tensor,
    log_scale: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    options: tuple[Likelihood, float | None, Sequence[bool], ModuleType],
    *,
    want_nll: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """``nll`` and, with upstream gradients of the rows, the gradients of (x_hat, x, log_scale) that are needed."""
    spec, _, needs, backend = options
    need_x_hat, need_x, need_scale = needs if upstream is not None else (False,) * 3
    # One scale for a row: its gradient is a sum over the row, which the pass makes on its way.
    by_rows = need_scale and all(size == 1 for size in log_scale.shape[2:])
    g_scale = None
    if need_scale and not by_rows:
        full = log_scale.shape == x_hat.shape
        g_scale = torch.empty_like(x_hat, dtype=log_scale.dtype if full else compute_dtype(x_hat, x, log_scale, weight))
    out = DataGradients(torch.empty_like(x_hat) if need_x_hat else None, torch.empty_like(x) if need_x else None, g_scale)
    scale = None if log_scale is None else log_scale.expand(x_hat.shape)
    nll, slope = backend.likelihood(x_hat, x, scale, weight, mask, upstream, spec, out, want_nll=want_nll, want_slope=by_rows)
    if by_rows:
        g_scale = (upstream * slope).reshape(slope.shape + (1,) * (x_hat.dim() - 2))
    if need_scale:
        g_scale = g_scale.sum_to_size(log_scale.shape).to(log_scale.dtype)
    return nll, [out.x_hat, out.x, g_scale]


def formula(
    x_hat: Tensor, x: Tensor, log_scale: Tensor | None, weight: Tensor | None, mask: Tensor | None, spec: Likelihood
) -> Tensor:
    """``nll`` (A, B) as a composition of PyTorch's own differentiable operations."""
    scale = None if log_scale is None else log_scale.expand(x_hat.shape)
    return reference.likelihood_nll(x_hat, x, scale, weight, mask, spec)


def _one(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
