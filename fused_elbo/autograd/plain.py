"""The Functions of the plain objective: Gaussian decoder of fixed variance, standard normal prior."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..spec import Gaussian, Gradients, compute_dtype
from .common import composed, differentiable, halves, noise_of, placed, rescaled, rows_of, underflow


class Excess(torch.autograd.Function):
    """``reference.excess`` with its derivative ``expm1``, which a compiler would make of the series' instead."""

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return reference.excess(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors
        # A compiler's expm1(v) may be exp(v) - 1, which near 0 is nothing but rounding errors.
        near = v.abs() < reference.SERIES_LIMIT
        return upstream * torch.where(near, reference.excess(v) + v, torch.expm1(v))


class RsampleKL(torch.autograd.Function):
    """``(z, kl)`` of a diagonal Gaussian posterior; the noise is regenerated in the backward, never stored.

    ``apply(mu, logvar, seed, eps, (first_index, offset, chunk_dim, want_kl, backend))``: ``mu`` holds packed moments where
    ``chunk_dim`` is not 0; the noise is that of ``seed`` from ``first_index`` and ``offset`` on, or ``eps``, and with neither
    there is no sample. ``fused_elbo.rsample_kl`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        mu: Tensor,
        logvar: Tensor | None,
        seed: Tensor | None,
        eps: Tensor | None,
        options: tuple[int, int, int, bool, ModuleType],
    ) -> tuple[Tensor | None, Tensor | None]:
        first_index, offset, chunk_dim, want_kl, backend = options
        m, lv = halves(mu, logvar, chunk_dim)
        return backend.rsample_kl(m, lv, noise_of(seed, eps, first_index, offset), want_kl=want_kl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g_z: Tensor | None, g_kl: Tensor | None) -> tuple:
        if g_z is None and g_kl is None:
            return (None,) * 5
        mu, logvar, seed, eps = ctx.saved_tensors
        first_index, offset, chunk_dim, _, backend = ctx.options
        noise = noise_of(seed, eps, first_index, offset)

        if composed():

            def formula(mu: Tensor, logvar: Tensor | None, eps: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
                m, lv = halves(mu, logvar, chunk_dim)
                normals = None if noise is None else reference.draw(m, noise._replace(eps=eps))
                z = None if noise is None else reference.reparameterize(m, lv, normals)
                return z, reference.kl_divergence(m, lv)

            g_mu, g_logvar, g_eps = differentiable(formula, (mu, logvar, eps), (g_z, g_kl))
            return g_mu, g_logvar, None, g_eps, None

        need_mu, need_logvar, _, need_eps, _ = ctx.needs_input_grad
        g_mu = torch.empty_like(mu) if need_mu else None
        g_logvar = torch.empty_like(logvar) if need_logvar else None
        m, lv = halves(mu, logvar, chunk_dim)
        if need_mu or need_logvar:
            out = Gradients(None, None, *halves(g_mu, g_logvar, chunk_dim))
            backend.rsample_kl_backward(g_z, g_kl, m, lv, noise, out)
        g_eps = (g_z * torch.exp(0.5 * lv)).to(eps.dtype) if need_eps and g_z is not None else None
        return g_mu, g_logvar, None, g_eps, None


class ELBO(torch.autograd.Function):
    """``(loss, nll, kl)`` of the negative ELBO.

    ``apply(x_hat, x, mu, logvar, kl, beta, grad_scale, (chunk_dim, likelihood, weight, needs, inplace, backend))``: the KL is
    that of ``mu, logvar`` (packed moments in ``mu`` where ``chunk_dim`` is neither 0 nor None), or ``kl`` (N,), or absent.
    ``weight`` is 1/N, 1 or None for reduction "mean", "sum", "none"; ``needs`` tells which of (x_hat, x, mu, logvar, kl) need a
    gradient; ``inplace`` takes a weight and an x_hat that needs one. ``fused_elbo.elbo_loss`` checks its arguments, this does
    not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl: Tensor | None,
        beta: float | Tensor,
        grad_scale: float | Tensor,
        options: tuple[int | None, Gaussian, float | None, Sequence[bool], bool, ModuleType],
    ) -> tuple[Tensor | None, ...]:
        chunk_dim, likelihood, weight, needs, inplace, backend = options
        g_x_hat = g_x = g_mu = g_logvar = g_kl = None
        if weight is not None:
            need_x_hat, need_x, need_mu, need_logvar, need_kl = needs
            g_x_hat = x_hat if inplace else torch.empty_like(x_hat) if need_x_hat else None
            g_x = torch.empty_like(x) if need_x else None
            g_mu = torch.empty_like(mu) if need_mu else None
            g_logvar = torch.empty_like(logvar) if need_logvar else None
            g_kl = torch.empty((), dtype=compute_dtype(x_hat, x, kl), device=x_hat.device) if need_kl else None
        m, lv = halves(mu, logvar, chunk_dim)
        out = Gradients(g_x_hat, g_x, *halves(g_mu, g_logvar, chunk_dim), g_kl)
        loss, nll, kl_out = backend.elbo(x_hat, x, m, lv, kl, beta, likelihood, out, weight=weight, grad_scale=grad_scale)
        if loss is None:
            loss = reference.total(nll, kl_out, beta, None)
        if inplace:
            g_x_hat = _given_up(x_hat)
        ctx.set_materialize_grads(False)
        ctx.beta, ctx.grad_scale, ctx.options = beta, grad_scale, options
        ctx.save_for_backward(
            None if inplace else x_hat,
            x,
            mu,
            logvar,
            kl_out,
            beta if isinstance(beta, Tensor) else None,
            grad_scale if isinstance(grad_scale, Tensor) else None,
            *(g for g in (g_x_hat, g_x, g_mu, g_logvar, g_kl) if g is not None),
        )
        return loss, nll, None if mu is None else kl_out

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_nll: Tensor | None, g_kl: Tensor | None) -> tuple:
        if g_loss is None and g_nll is None and g_kl is None:
            return (None,) * 8
        x_hat, x, mu, logvar, kl, beta, grad_scale, *baked = ctx.saved_tensors
        _, _, weight, needs, inplace, backend = ctx.options
        beta = ctx.beta if beta is None else beta
        grad_scale = ctx.grad_scale if grad_scale is None else grad_scale
        if composed():
            return ELBO._double_backward(ctx.options, (x_hat, x, mu, logvar, kl, beta), (g_loss, g_nll, g_kl))

        g_beta = None
        if ctx.needs_input_grad[5] and g_loss is not None and kl is not None:
            rows, factor = rows_of(g_loss, weight, None, kl.shape[0])
            g_beta = (rows * factor * kl).sum().reshape(beta.shape)

        foreseen = weight is not None and g_nll is None and g_kl is None
        if foreseen and (inplace or not underflow(baked)):
            gradients = placed(rescaled(baked, g_loss, grad_scale, backend), needs)
            if needs[4]:
                gradients[4] = gradients[4].expand_as(kl)
        else:
            reuse = (baked, grad_scale) if foreseen else None
            gradients = ELBO._recomputed(ctx.options, (x_hat, x, mu, logvar), beta, (g_loss, g_nll, g_kl), reuse)
        return *gradients, g_beta, None, None

    @staticmethod
    def _recomputed(
        options: tuple,
        inputs: Sequence[Tensor | None],
        beta: float | Tensor,
        upstream: Sequence[Tensor | None],
        reuse: tuple[Sequence[Tensor], float | Tensor] | None,
    ) -> list[Tensor | None]:
        """Gradients of (x_hat, x, mu, logvar, kl) from the inputs.

        ``reuse`` holds what was computed for an expected upstream gradient, to be written over where the graph is not kept, and
        that gradient.
        """
        chunk_dim, likelihood, loss_weight, needs, inplace, backend = options
        x_hat, x, mu, logvar = inputs
        g_loss, g_nll, g_kl = upstream
        if inplace:
            raise RuntimeError(
                "elbo_loss: inplace=True has overwritten x_hat with the gradient of loss, so out.nll and out.kl cannot be "
                "differentiated; call backward on out.loss alone, or leave inplace=False"
            )
        g_x_hat = g_x = g_mu = g_logvar = g_kl_in = None
        rows, weight = rows_of(g_loss, loss_weight, g_nll, x.shape[0])
        if rows is not None and (needs[0] or needs[1]):
            expected = None
            if reuse is not None and not torch._C._autograd._get_current_graph_task_keep_graph():
                (g_x_hat, g_x, *_), expected = placed(reuse[0], needs), reuse[1]
            else:
                g_x_hat = torch.empty_like(x_hat) if needs[0] else None
                g_x = torch.empty_like(x) if needs[1] else None
            out = Gradients(g_x_hat, g_x)
            backend.gaussian_nll_backward(rows, x_hat, x, likelihood, out, weight=weight, expected=expected)
        rows, weight = rows_of(None if g_loss is None else g_loss * beta, loss_weight, g_kl, x.shape[0])
        if rows is not None and any(needs[2:]):
            rows = rows * weight
            g_kl_in = rows if needs[4] else None
            if mu is not None:
                g_mu = torch.empty_like(mu) if needs[2] else None
                g_logvar = torch.empty_like(logvar) if needs[3] else None
                m, lv = halves(mu, logvar, chunk_dim)
                out = Gradients(None, None, *halves(g_mu, g_logvar, chunk_dim))
                backend.rsample_kl_backward(None, rows, m, lv, None, out)
        return [g_x_hat, g_x, g_mu, g_logvar, g_kl_in]

    @staticmethod
    def _double_backward(options: tuple, inputs: Sequence[Any], upstream: Sequence[Tensor | None]) -> tuple:
        chunk_dim, likelihood, weight, _, inplace, _ = options
        if inplace:
            raise RuntimeError("elbo_loss: inplace=True has overwritten x_hat, so there is no double backward; leave it False")

        def formula(
            x_hat: Tensor, x: Tensor, mu: Tensor | None, logvar: Tensor | None, kl: Tensor | None, beta: float | Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            nll = reference.gaussian_nll(x_hat, x, likelihood)
            if mu is not None:
                kl = reference.kl_divergence(*halves(mu, logvar, chunk_dim))
            return reference.total(nll, kl, beta, weight), nll, kl

        return *differentiable(formula, inputs, upstream), None, None


class GaussianNLL(torch.autograd.Function):
    """``loss`` of an ``ELBO`` without a KL, and nothing else: autograd takes less time over it.

    ``apply(x_hat, x, grad_scale, options)``: as for ``ELBO``; ``weight`` is a number.
    """

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, x: Tensor, grad_scale: float | Tensor, options: tuple) -> Tensor:
        _, likelihood, weight, (need_x_hat, need_x, *_), inplace, backend = options
        g_x_hat = x_hat if inplace else torch.empty_like(x_hat) if need_x_hat else None
        g_x = torch.empty_like(x) if need_x else None
        out = Gradients(g_x_hat, g_x)
        loss = backend.elbo(x_hat, x, None, None, None, 1.0, likelihood, out, weight=weight, grad_scale=grad_scale)[0]
        if inplace:
            g_x_hat = _given_up(x_hat)
        ctx.call = grad_scale, options
        scale = grad_scale if isinstance(grad_scale, Tensor) else None
        ctx.save_for_backward(None if inplace else x_hat, x, scale, *(g for g in (g_x_hat, g_x) if g is not None))
        return loss

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor) -> tuple:
        x_hat, x, grad_scale, *baked = ctx.saved_tensors
        expected, options = ctx.call
        _, _, _, needs, inplace, backend = options
        upstream = (g_loss, None, None)
        if composed():
            return *ELBO._double_backward(options, (x_hat, x, None, None, None, 1.0), upstream)[:2], None, None
        expected = expected if grad_scale is None else grad_scale
        if inplace or not underflow(baked):
            return *placed(rescaled(baked, g_loss, expected, backend), needs[:2]), None, None
        return *ELBO._recomputed(options, (x_hat, x, None, None), 1.0, upstream, (baked, expected))[:2], None, None


def _given_up(x_hat: Tensor) -> Tensor:
    """``x_hat``, which holds its gradient now."""
    # Whoever saved x_hat must learn that it is gone.
    torch.autograd.graph.increment_version(x_hat)
    return x_hat.detach()
