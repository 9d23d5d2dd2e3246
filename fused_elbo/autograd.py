"""The autograd Functions. They own the gradients' buffers and the rules of the backward pass; backends fill the buffers.

* A gradient is computed in the forward pass, for the upstream gradient that is expected (1, or ``grad_scale``). The
  backward scales it in place by a kernel that returns at once where the expectation held; the upstream gradient never
  leaves the device. float16 is recomputed instead: what underflowed in the forward cannot be scaled back.
* Where the graph is kept (``retain_graph``), the saved gradient is left as it is and a scaled copy returned.
* With ``reduction="none"`` the upstream gradient is a vector that nobody can foresee: the backward starts from the inputs.
* Double backward differentiates the reference formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .spec import Gaussian, Gradients, Noise, compute_dtype


def halves(moments: Tensor, logvar: Tensor | None, chunk_dim: int) -> tuple[Tensor, Tensor]:
    """``mu, logvar`` as given, or, where ``logvar`` is None, as views of the two halves of packed moments."""
    return (moments, logvar) if logvar is not None else tuple(moments.chunk(2, chunk_dim))


class RsampleKL(torch.autograd.Function):
    """``(z, kl)`` of a diagonal Gaussian posterior; the noise is regenerated in the backward, never stored.

    ``apply(mu, logvar, chunk_dim, noise, seed, eps, want_kl, backend)``: ``logvar`` is None where ``mu`` holds packed moments;
    ``noise`` (a ``spec.Noise`` without tensors) says where the stream starts, ``seed`` or ``eps`` where it comes from; with
    neither there is no sample. ``fused_elbo.rsample_kl`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        mu: Tensor,
        logvar: Tensor | None,
        chunk_dim: int,
        noise: Noise,
        seed: Tensor | None,
        eps: Tensor | None,
        want_kl: bool,
        backend: ModuleType,
    ) -> tuple[Tensor | None, Tensor | None]:
        return backend.rsample_kl(*halves(mu, logvar, chunk_dim), _with_source(noise, seed, eps), want_kl=want_kl)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        mu, logvar, ctx.chunk_dim, ctx.noise, seed, eps, _, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mu, logvar, seed, eps)

    @staticmethod
    def backward(ctx: Any, g_z: Tensor | None, g_kl: Tensor | None) -> tuple:
        mu, logvar, seed, eps = ctx.saved_tensors
        noise = _with_source(ctx.noise, seed, eps)
        need_mu, need_logvar, *_, need_eps = ctx.needs_input_grad[:6]
        if g_z is None and g_kl is None:
            return (None,) * 8

        if torch.is_grad_enabled():

            def formula(mu: Tensor, logvar: Tensor | None, eps: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
                m, lv = halves(mu, logvar, ctx.chunk_dim)
                normals = None if noise is None else reference.draw(m, noise._replace(eps=eps))
                z = None if noise is None else reference.reparameterize(m, lv, normals)
                return z, reference.kl_divergence(m, lv)

            g_mu, g_logvar, g_eps = _differentiable(formula, (mu, logvar, eps), (g_z, g_kl))
            return g_mu, g_logvar, None, None, None, g_eps, None, None

        latent, out = _latent_buffers(mu, logvar, ctx.chunk_dim, need_mu, need_logvar)
        m, lv = halves(mu, logvar, ctx.chunk_dim)
        if out.mu is not None or out.logvar is not None:
            ctx.backend.rsample_kl_backward(g_z, g_kl, m, lv, noise, out)
        g_eps = (g_z * torch.exp(0.5 * lv)).to(eps.dtype) if need_eps and g_z is not None else None
        return *latent, None, None, None, g_eps, None, None


class ELBO(torch.autograd.Function):
    """``(loss, nll, kl, *gradients)`` of the negative ELBO; the gradients are this Function's own and not differentiable.

    ``apply(x_hat, x, mu, logvar, kl, beta, grad_scale, chunk_dim, likelihood, weight, needs, inplace, backend)``: the KL is
    that of ``mu, logvar`` (``logvar`` None: packed moments), or ``kl`` (N,), or absent. ``weight`` is 1/N, 1 or None for
    reduction "mean", "sum", "none"; ``needs`` tells which of (x_hat, x, mu, logvar, kl) need a gradient.
    ``fused_elbo.elbo_loss`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        x_hat: Tensor,
        x: Tensor,
        mu: Tensor | None,
        logvar: Tensor | None,
        kl: Tensor | None,
        beta: float | Tensor,
        grad_scale: float | Tensor,
        chunk_dim: int,
        likelihood: Gaussian,
        weight: float | None,
        needs: tuple[bool, bool, bool, bool, bool],
        inplace: bool,
        backend: ModuleType,
    ) -> tuple[Tensor | None, ...]:
        latent, out = (None, None), Gradients()
        if weight is not None:
            if mu is not None:
                latent, out = _latent_buffers(mu, logvar, chunk_dim, needs[2], needs[3])
            g_kl = torch.empty((), dtype=compute_dtype(x_hat, x, kl), device=x_hat.device) if needs[4] else None
            g_x_hat = (x_hat if inplace else torch.empty_like(x_hat)) if needs[0] else None
            out = out._replace(x_hat=g_x_hat, x=torch.empty_like(x) if needs[1] else None, kl=g_kl)
        m, lv = (None, None) if mu is None else halves(mu, logvar, chunk_dim)
        loss, nll, kl_out = backend.elbo(x_hat, x, m, lv, kl, beta, likelihood, out, weight=weight, grad_scale=grad_scale)
        if loss is None:
            loss = reference.total(nll, kl_out, beta, None)
        if inplace and out.x_hat is not None:
            # Whoever saved x_hat must learn that it is gone. An output may not be an input too, so it is not returned.
            torch.autograd.graph.increment_version(x_hat)
            out = out._replace(x_hat=None)
        return loss, nll, kl_out if mu is not None else None, out.x_hat, out.x, *latent, out.kl

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x_hat, x, mu, logvar, kl, beta, grad_scale, *options = inputs
        ctx.chunk_dim, ctx.likelihood, ctx.weight, ctx.needs, inplace, ctx.backend = options
        _, _, kl_out, *gradients = output
        ctx.mark_non_differentiable(*(g for g in gradients if g is not None))
        ctx.set_materialize_grads(False)
        ctx.inplace = inplace and ctx.needs[0] and ctx.weight is not None
        if ctx.inplace:
            gradients[0] = x_hat.detach()
        ctx.beta, ctx.grad_scale = beta, grad_scale
        ctx.row_weight = 1.0 if ctx.weight is None else ctx.weight
        ctx.save_for_backward(
            None if ctx.inplace else x_hat,
            x,
            mu,
            logvar,
            kl_out if kl is None else kl,
            beta if isinstance(beta, Tensor) else None,
            grad_scale if isinstance(grad_scale, Tensor) else None,
            *gradients,
        )

    @staticmethod
    def backward(ctx: Any, g_loss: Tensor | None, g_nll: Tensor | None, g_kl: Tensor | None, *_: None) -> tuple:
        x_hat, x, mu, logvar, kl, beta, grad_scale, *baked = ctx.saved_tensors
        beta = ctx.beta if beta is None else beta
        grad_scale = ctx.grad_scale if grad_scale is None else grad_scale
        if g_loss is None and g_nll is None and g_kl is None:
            return (None,) * 13
        if torch.is_grad_enabled():
            return ELBO._double_backward(ctx, (x_hat, x, mu, logvar, kl, beta), (g_loss, g_nll, g_kl))

        g_beta = None
        if ctx.needs_input_grad[5] and g_loss is not None and kl is not None:
            g_beta = (g_loss * ctx.row_weight * kl).sum().reshape(beta.shape)

        foreseen = ctx.weight is not None and g_nll is None and g_kl is None
        kept = torch._C._autograd._get_current_graph_task_keep_graph()
        underflows = not ctx.inplace and any(g is not None and g.dtype == torch.float16 for g in baked)
        if foreseen and not underflows:
            if kept:
                factor = g_loss / grad_scale
                baked = [None if g is None else g * factor for g in baked]
            else:
                ctx.backend.rescale_([g for g in baked if g is not None], g_loss, grad_scale)
            *gradients, g_kl_in = baked
            gradients.append(None if g_kl_in is None else g_kl_in.expand(kl.shape))
        else:
            reuse = (baked, grad_scale) if foreseen and not kept else None
            gradients = ELBO._recomputed(ctx, (x_hat, x, mu, logvar), beta, (g_loss, g_nll, g_kl), reuse)
        return *gradients, g_beta, *(None,) * 7

    @staticmethod
    def _recomputed(
        ctx: Any,
        inputs: Sequence[Tensor | None],
        beta: float | Tensor,
        upstream: Sequence[Tensor | None],
        reuse: tuple[Sequence[Tensor | None], float | Tensor] | None,
    ) -> list[Tensor | None]:
        """Gradients of (x_hat, x, mu, logvar, kl) from the inputs.

        ``reuse`` holds buffers that were filled for an expected upstream gradient, and that gradient.
        """
        x_hat, x, mu, logvar = inputs
        g_loss, g_nll, g_kl = upstream
        if ctx.inplace:
            raise RuntimeError(
                "elbo_loss: inplace=True has overwritten x_hat with the gradient of loss, so out.nll and out.kl cannot be "
                "differentiated; call backward on out.loss alone, or leave inplace=False"
            )
        g_x_hat = g_x = g_mu = g_logvar = g_kl_in = None
        rows, weight = _rows(g_loss, ctx.row_weight, g_nll, x.shape[0])
        if rows is not None and (ctx.needs[0] or ctx.needs[1]):
            expected = None
            if reuse is not None:
                (g_x_hat, g_x, *_), expected = reuse
            else:
                g_x_hat = torch.empty_like(x_hat) if ctx.needs[0] else None
                g_x = torch.empty_like(x) if ctx.needs[1] else None
            ctx.backend.gaussian_nll_backward(
                rows, x_hat, x, ctx.likelihood, Gradients(g_x_hat, g_x), weight=weight, expected=expected
            )
        rows, weight = _rows(None if g_loss is None else g_loss * beta, ctx.row_weight, g_kl, x.shape[0])
        if rows is not None and any(ctx.needs[2:]):
            rows = rows * weight
            g_kl_in = rows if ctx.needs[4] else None
            if mu is not None:
                (g_mu, g_logvar), out = _latent_buffers(mu, logvar, ctx.chunk_dim, ctx.needs[2], ctx.needs[3])
                ctx.backend.rsample_kl_backward(None, rows, *halves(mu, logvar, ctx.chunk_dim), None, out)
        return [g_x_hat, g_x, g_mu, g_logvar, g_kl_in]

    @staticmethod
    def _double_backward(ctx: Any, inputs: Sequence[Any], upstream: Sequence[Tensor | None]) -> tuple:
        if ctx.inplace:
            raise RuntimeError("elbo_loss: inplace=True has overwritten x_hat, so there is no double backward; leave it False")

        def formula(
            x_hat: Tensor, x: Tensor, mu: Tensor | None, logvar: Tensor | None, kl: Tensor | None, beta: float | Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            nll = reference.gaussian_nll(x_hat, x, ctx.likelihood)
            if mu is not None:
                kl = reference.kl_divergence(*halves(mu, logvar, ctx.chunk_dim))
            return reference.total(nll, kl, beta, ctx.weight), nll, kl

        return *_differentiable(formula, inputs, upstream), *(None,) * 7


def _with_source(noise: Noise, seed: Tensor | None, eps: Tensor | None) -> Noise | None:
    return None if seed is None and eps is None else noise._replace(seed=seed, eps=eps)


def _latent_buffers(
    mu: Tensor, logvar: Tensor | None, chunk_dim: int, need_mu: bool, need_logvar: bool
) -> tuple[tuple[Tensor | None, Tensor | None], Gradients]:
    """Buffers for the gradients of the inputs ``mu, logvar``, and the same as the halves that a backend fills.

    Packed moments have one buffer and are needed whole.
    """
    if logvar is None:
        packed = torch.empty_like(mu) if need_mu else None
        m, lv = halves(packed, None, chunk_dim) if need_mu else (None, None)
        return (packed, None), Gradients(mu=m, logvar=lv)
    g_mu = torch.empty_like(mu) if need_mu else None
    g_logvar = torch.empty_like(logvar) if need_logvar else None
    return (g_mu, g_logvar), Gradients(mu=g_mu, logvar=g_logvar)


def _rows(g_loss: Tensor | None, weight: float, g_term: Tensor | None, count: int) -> tuple[Tensor | None, float]:
    """The upstream gradient of one per-sample term, (N,), and a factor that it still needs."""
    if g_loss is None:
        return g_term, 1.0
    if g_term is None:
        return g_loss.expand(count), weight
    return g_loss * weight + g_term, 1.0


def _differentiable(
    formula: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Any], upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of ``formula(*inputs)`` that are part of the graph, None for inputs that need none."""
    with torch.enable_grad():
        # One input may have been computed from another (x_hat from mu); an alias has no such past.
        inputs = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
        wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
        pairs = [(o, g) for o, g in zip(formula(*inputs), upstream, strict=True) if g is not None and o.requires_grad]
        if not pairs:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs, strict=True)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return [next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in inputs]
