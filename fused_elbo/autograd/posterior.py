"""The Function of the latent side: any diagonal Gaussian posterior and prior, and several samples."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference, spec
from ..spec import PosteriorGradients, compute_dtype
from .common import composed, differentiable, halves, noise_of


class PosteriorCall(NamedTuple):
    """Of ``Posterior``: where its noise starts, how many samples, which terms, and how log_ratio is differentiated.

    ``want_kl`` and ``want_log_ratio`` are those of ``reference.posterior``; ``doubly`` asks for the doubly reparameterised
    gradient of the posterior's parameters.
    """

    spec: spec.Posterior
    backend: ModuleType | None
    chunk_dim: int = 0
    first_index: int = 0
    offset: int = 0
    samples: int = 1
    want_kl: str | None = "rows"
    want_log_ratio: bool = False
    doubly: bool = False


class Posterior(torch.autograd.Function):
    """``(z, kl, log_ratio)`` as of ``reference.posterior``; the noise is regenerated in the backward, never stored.

    ``apply(mu, raw, prior_mean, prior_raw, seed, eps, options)``: ``mu`` holds packed moments where ``options.chunk_dim`` is
    not 0; prior tensors have the mean's shape. ``fused_elbo.rsample_kl`` checks its arguments, this does not.
    """

    @staticmethod
    def forward(
        mu: Tensor,
        raw: Tensor | None,
        prior_mean: Tensor | None,
        prior_raw: Tensor | None,
        seed: Tensor | None,
        eps: Tensor | None,
        options: PosteriorCall,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return options.backend.posterior(
            *halves(mu, raw, options.chunk_dim),
            prior_mean,
            prior_raw,
            noise_of(seed, eps, options.first_index, options.offset),
            options.spec,
            samples=options.samples,
            want_kl=options.want_kl,
            want_log_ratio=options.want_log_ratio,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, g_z: Tensor | None, g_kl: Tensor | None, g_log_ratio: Tensor | None) -> tuple:
        if g_z is None and g_kl is None and g_log_ratio is None:
            return (None,) * 7
        mu, raw, prior_mean, prior_raw, seed, eps = ctx.saved_tensors
        options: PosteriorCall = ctx.options
        noise = noise_of(seed, eps, options.first_index, options.offset)
        if composed():
            return (
                *double_backward((mu, raw, prior_mean, prior_raw), noise, options, (g_z, g_kl, g_log_ratio)),
                None,
                None,
                None,
            )

        found = gradients(mu, raw, prior_mean, prior_raw, noise, options, (g_z, g_kl, g_log_ratio), ctx.needs_input_grad[:4])
        return *found, None, None, None


def gradients(
    mu: Tensor,
    raw: Tensor | None,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: spec.Noise | None,
    options: PosteriorCall,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Those of (mu, raw, prior_mean, prior_raw) that are needed, for upstream gradients of (z, kl, log_ratio)."""
    g_z, g_kl, g_log_ratio = upstream
    m, second = halves(mu, raw, options.chunk_dim)
    path_weight = None
    if options.doubly and g_log_ratio is not None:
        # The bound's derivative by a log-weight is the normalised weight, up to what the sample's bound counts for.
        total = g_log_ratio.sum(0)
        path_weight = torch.where(total == 0, total, g_log_ratio / total)
    if g_kl is not None and options.want_kl == "rows":
        g_kl = g_kl.reshape(g_kl.shape + (1,) * (m.dim() - 1)).expand(m.shape)
    tensors = (mu, raw, prior_mean, prior_raw)
    found = tuple(torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True))
    g_mu, g_raw, g_prior_mean, g_prior_raw = found
    out = PosteriorGradients(*halves(g_mu, g_raw, options.chunk_dim), g_prior_mean, g_prior_raw)
    options.backend.posterior_backward(
        g_z, g_kl, g_log_ratio, path_weight, m, second, prior_mean, prior_raw, noise, options.spec, out, samples=options.samples
    )
    return found


def double_backward(
    tensors: Sequence[Tensor | None], noise: spec.Noise | None, options: PosteriorCall, upstream: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of (mu, raw, prior_mean, prior_raw) that are part of the graph."""
    if options.doubly:
        raise RuntimeError('rsample_log_ratio: estimator="dreg" is a gradient, not a function: it has no double backward')

    def differentiated(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return formula(*tensors, noise, options)

    return differentiable(differentiated, tensors, upstream)


def formula(
    mu: Tensor,
    raw: Tensor | None,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: spec.Noise | None,
    options: PosteriorCall,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What ``Posterior`` returns, as a composition of PyTorch's own differentiable operations."""
    m, second = halves(mu, raw, options.chunk_dim)
    dtype = compute_dtype(m, second, prior_mean, prior_raw)
    eps = reference.draw_samples(m, noise, options.samples, dtype)
    wide = (None if t is None else t.to(dtype) for t in (m, second, prior_mean, prior_raw))
    z, kl, log_ratio = reference.posterior_terms(*wide, eps, options.spec)
    if options.want_kl == "rows":
        kl = kl.flatten(1).sum(1) if kl.dim() > 1 else kl
    z = None if z is None else z.to(m.dtype)
    return z, kl if options.want_kl else None, log_ratio if options.want_log_ratio else None
