"""The operations as torch sees them: schemas, fakes and autograd formulas, for whatever looks at operators.

Eager code calls the autograd Functions, which take a fraction of an operator's host time. A compiler, an exporter and a tensor
subclass need operators. ``sample`` and ``nll`` are any objective's; their backward starts from the inputs.
``latent`` and ``gaussian`` are the plain one's, with few arguments, since an operator takes some microseconds for each ten of
them; ``gaussian`` returns the terms' gradients as well, which a compiler multiplies by the upstream gradient in the kernel of
whatever comes next. A gradient that is to be differentiated again is that of the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import ops, reference, sampling, spec
from .autograd import PosteriorCall, halves
from .autograd import likelihood as likelihood_rules
from .autograd.common import differentiable, noise_of
from .autograd.posterior import double_backward, gradients
from .backends.native import library
from .spec import DataGradients, Gradients, compute_dtype

_TENSORS = "Tensor mu, Tensor? raw, Tensor? prior_mean, Tensor? prior_raw, Tensor? seed, Tensor? eps"
_CALL = (
    "int chunk_dim, SymInt first_index, SymInt offset, SymInt samples, str? want_kl, bool want_log_ratio, bool doubly,"
    " str param, float min_std, float[]? clamp, bool soft, float? free_bits, float posterior_share, float prior_share"
)
_DATA = "Tensor x_hat, Tensor x, Tensor? log_scale, Tensor? weight, Tensor? mask"
_LIKELIHOOD = "str family, str activation, float log_scale_number, bool full, float scale, float shift"

_library = torch.library.Library("fused_elbo", "FRAGMENT")


def register(name: str, schema: str, run: Callable, fake: Callable, *tags: torch.Tag) -> Callable:
    # Layouts are part of what an operation returns, so a compiler must hand over the strides that it was shown.
    _library.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order, *tags))
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fused_elbo::{name}", fake, lib=_library)
    return getattr(torch.ops.fused_elbo, name).default


def _draw_seed(like: Tensor) -> Tensor:
    return sampling.draw_seed(like.device)


def _fake_seed(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def rows_of_normals(seed: Tensor, shape: list[int], first_index: int, offset: int, wide: bool) -> Tensor:
    # Elements are counted through where there is one seed, and one long row is quicker than many short ones.
    rows = shape if seed.dim() else (1, math.prod(shape))
    zero = torch.zeros(rows, dtype=torch.float64 if wide else torch.float32, device=seed.device)
    noise = noise_of(seed, None, first_index, offset % 2**64)
    # A sample of N(0, I) is its noise.
    return ops.select(seed.device).rsample_kl(zero, zero, noise, want_kl=False)[0].view(shape)


def _fake_normals(seed: Tensor, shape: list[int], first_index: int, offset: int, wide: bool) -> Tensor:
    return seed.new_empty(shape, dtype=torch.float64 if wide else torch.float32)


def _call(args: tuple) -> tuple[spec.Noise | None, PosteriorCall]:
    seed, eps, chunk_dim, first_index, offset, samples, want_kl, want_log_ratio, doubly, *rest = args
    param, min_std, clamp, *others = rest
    chosen = spec.Posterior(param, min_std, None if clamp is None else tuple(clamp), *others)
    call = PosteriorCall(chosen, None, chunk_dim, first_index, offset, samples, want_kl, want_log_ratio, doubly)
    return noise_of(seed, eps, first_index, offset % 2**64), call


def _sample(
    mu: Tensor, raw: Tensor | None, prior_mean: Tensor | None, prior_raw: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    noise, call = _call(args)
    wants = {"samples": call.samples, "want_kl": call.want_kl, "want_log_ratio": call.want_log_ratio}
    halved = halves(mu, raw, call.chunk_dim)
    found = ops.select(mu.device).posterior(*halved, prior_mean, prior_raw, noise, call.spec, **wants)
    return _laid_out(found, _fake_sample(mu, raw, prior_mean, prior_raw, *args))


def _fake_sample(
    mu: Tensor, raw: Tensor | None, prior_mean: Tensor | None, prior_raw: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    seed, eps, chunk_dim, _, _, samples, want_kl, want_log_ratio, *_ = args
    mean, second = halves(mu, raw, chunk_dim)
    dtype = compute_dtype(mean, second, prior_mean, prior_raw)
    return (
        mean.new_empty(0) if seed is None and eps is None else reference.empty_samples(mean, samples),
        torch.empty_like(mean, dtype=dtype)
        if want_kl == "elements"
        else mean.new_empty(mean.shape[:1] if want_kl else (0,), dtype=dtype),
        mean.new_empty((samples, mean.shape[0]) if want_log_ratio else (0,), dtype=dtype),
    )


def _sample_backward(*args: Any) -> tuple[Tensor, ...]:
    g_z, g_kl, g_log_ratio, mu, raw, prior_mean, prior_raw, *rest, needs = args
    noise, call = _call(rest)
    call = call._replace(backend=ops.select(mu.device))
    tensors = (mu, raw, prior_mean, prior_raw)
    found = gradients(*tensors, noise, call, (g_z, g_kl, g_log_ratio), needs)
    return tuple(mu.new_empty(0) if g is None else g for g in found)


def _fake_sample_backward(*args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return _likes(args[3:7], needs)


def _sample_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6])
    ctx.call = inputs[6:]


def _sample_autograd(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (2 + len(ctx.call))
    # A compiler has gradients for all outputs, of which those that were not wanted are empty.
    upstream = tuple(g if g is not None and g.numel() else None for g in upstream)
    needs = list(ctx.needs_input_grad[:4])
    if all(g is None for g in upstream) or not any(needs):
        return (None,) * 4 + nothing
    if torch.is_grad_enabled():
        *tensors, seed, eps = ctx.saved_tensors
        noise, call = _call((seed, eps, *ctx.call))
        return *double_backward(tensors, noise, call, upstream), *nothing
    found = sample_backward(*upstream, *ctx.saved_tensors, *ctx.call, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *nothing


def _nll(x_hat: Tensor, x: Tensor, *args: Any) -> Tensor:
    log_scale, weight, mask, *options = args
    scale = None if log_scale is None else log_scale.expand(x_hat.shape)
    backend = ops.select(x_hat.device)
    found, _ = backend.likelihood(x_hat, x, scale, weight, mask, None, spec.Likelihood(*options), DataGradients())
    return _laid_out((found,), (_fake_nll(x_hat, x, *args),))[0]


def _fake_nll(x_hat: Tensor, x: Tensor, log_scale: Tensor | None, weight: Tensor | None, *_: Any) -> Tensor:
    return x_hat.new_empty(x_hat.shape[:2], dtype=compute_dtype(x_hat, x, log_scale, weight))


def _nll_backward(upstream: Tensor, x_hat: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    log_scale, weight, mask, *options, needs = args
    call = (spec.Likelihood(*options), None, needs, ops.select(x_hat.device))
    *found, g_scale = likelihood_rules.passed(x_hat, x, log_scale, weight, mask, upstream, call, want_nll=False)[1]
    if g_scale is not None:
        # Summed up from another shape, it may have come out in another layout.
        (g_scale,) = _laid_out((g_scale,), (torch.empty_like(log_scale),))
    return tuple(x_hat.new_empty(0) if g is None else g for g in (*found, g_scale))


def _fake_nll_backward(upstream: Tensor, x_hat: Tensor, x: Tensor, log_scale: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *_, needs = args
    return _likes((x_hat, x, log_scale), needs)


def _nll_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _nll_autograd(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        chosen = spec.Likelihood(*ctx.options)
        found = differentiable(lambda *tensors: (likelihood_rules.formula(*tensors, chosen),), ctx.saved_tensors, (upstream,))
        return *found, *(None,) * len(ctx.options)
    needs = list(ctx.needs_input_grad[:3])
    found = nll_backward(upstream, *ctx.saved_tensors, *ctx.options, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * (2 + len(ctx.options))


def _likes(tensors: tuple, needs: list[bool]) -> tuple[Tensor, ...]:
    """A buffer for each gradient; an empty one where it is not needed, since an operator returns tensors."""
    return tuple(torch.empty_like(t) if need else tensors[0].new_empty(0) for t, need in zip(tensors, needs, strict=True))


def _laid_out(found: Any, promised: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a backend returned, with the strides that the fake has promised."""
    return tuple(
        empty if t is None else t if t.stride() == empty.stride() else empty.copy_(t)
        for t, empty in zip(found, promised, strict=True)
    )


def _latent(mu: Tensor, logvar: Tensor | None, seed: Tensor | None, eps: Tensor | None, *place: Any) -> tuple[Tensor, Tensor]:
    chunk_dim, first_index, offset, want_kl = place
    mean, second = halves(mu, logvar, chunk_dim)
    z, kl = ops.select(mu.device).rsample_kl(mean, second, noise_of(seed, eps, first_index, offset % 2**64), want_kl=want_kl)
    return mu.new_empty(0) if z is None else z, mu.new_empty(0) if kl is None else kl


def _fake_latent(
    mu: Tensor, logvar: Tensor | None, seed: Tensor | None, eps: Tensor | None, *place: Any
) -> tuple[Tensor, Tensor]:
    chunk_dim, _, _, want_kl = place
    mean, second = halves(mu, logvar, chunk_dim)
    sampled = seed is not None or eps is not None
    return (
        torch.empty_like(mean) if sampled else mu.new_empty(0),
        mean.new_empty(mean.shape[:1], dtype=compute_dtype(mean, second)) if want_kl else mu.new_empty(0),
    )


def _latent_backward(
    g_z: Tensor | None, g_kl: Tensor | None, mu: Tensor, logvar: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    seed, eps, chunk_dim, first_index, offset, _, needs = rest
    found = _likes((mu, logvar), needs)
    g_mu, g_logvar = (g if need else None for g, need in zip(found, needs, strict=True))
    out = Gradients(None, None, *halves(g_mu, g_logvar, chunk_dim))
    noise = noise_of(seed, eps, first_index, offset % 2**64)
    ops.select(mu.device).rsample_kl_backward(g_z, g_kl, *halves(mu, logvar, chunk_dim), noise, out)
    return found


def _fake_latent_backward(
    g_z: Tensor | None, g_kl: Tensor | None, mu: Tensor, logvar: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    return _likes((mu, logvar), rest[-1])


def _latent_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.place = inputs[4:]


def _latent_autograd(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = tuple(g if g is not None and g.numel() else None for g in upstream)
    needs = list(ctx.needs_input_grad[:2])
    if all(g is None for g in upstream) or not any(needs):
        return (None,) * 8
    found = latent_backward(*upstream, *ctx.saved_tensors, *ctx.place, needs)
    return *(g if need else None for g, need in zip(found, needs, strict=True)), *(None,) * 6


def _gaussian(x_hat: Tensor, x: Tensor, sigma: float, full: bool, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    found = _likes((x_hat, x), needs)
    out = Gradients(*(g if need else None for g, need in zip(found, needs, strict=True)))
    likelihood, weight = spec.Gaussian(sigma, full), 1.0 if any(needs) else None
    nll = ops.select(x_hat.device).elbo(x_hat, x, None, None, None, 1.0, likelihood, out, weight=weight)[1]
    return nll, *found


def _fake_gaussian(x_hat: Tensor, x: Tensor, sigma: float, full: bool, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    return x_hat.new_empty(x_hat.shape[:1], dtype=compute_dtype(x_hat, x)), *_likes((x_hat, x), needs)


def _gaussian_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*output[1:])


def _gaussian_autograd(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    # A compiler writes this into the kernel of whatever comes next.
    found = (
        (g * upstream.reshape(-1, *(1,) * (g.dim() - 1))).to(g.dtype) if need else None
        for g, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
    )
    return *found, None, None, None


draw_seed = register("draw_seed", library.DRAW_SEED, _draw_seed, _fake_seed, torch.Tag.nondeterministic_seeded)
normals = register("normals", library.NORMALS, rows_of_normals, _fake_normals)
sample = register("sample", f"({_TENSORS}, {_CALL}) -> (Tensor, Tensor, Tensor)", _sample, _fake_sample)
sample_backward = register(
    "sample_backward",
    f"(Tensor? g_z, Tensor? g_kl, Tensor? g_log_ratio, {_TENSORS}, {_CALL}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _sample_backward,
    _fake_sample_backward,
)
nll = register("nll", f"({_DATA}, {_LIKELIHOOD}) -> Tensor", _nll, _fake_nll)
nll_backward = register(
    "nll_backward",
    f"(Tensor upstream, {_DATA}, {_LIKELIHOOD}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _nll_backward,
    _fake_nll_backward,
)
_LATENT = "Tensor mu, Tensor? logvar, Tensor? seed, Tensor? eps, int chunk_dim, SymInt first_index, SymInt offset, bool want_kl"
latent = register("latent", f"({_LATENT}) -> (Tensor, Tensor)", _latent, _fake_latent)
latent_backward = register(
    "latent_backward",
    f"(Tensor? g_z, Tensor? g_kl, {_LATENT}, bool[] needs) -> (Tensor, Tensor)",
    _latent_backward,
    _fake_latent_backward,
)
gaussian = register(
    "gaussian",
    "(Tensor x_hat, Tensor x, float sigma, bool full, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _gaussian,
    _fake_gaussian,
)
torch.library.register_autograd("fused_elbo::latent", _latent_autograd, setup_context=_latent_context, lib=_library)
torch.library.register_autograd("fused_elbo::gaussian", _gaussian_autograd, setup_context=_gaussian_context, lib=_library)
torch.library.register_autograd("fused_elbo::sample", _sample_autograd, setup_context=_sample_context, lib=_library)
torch.library.register_autograd("fused_elbo::nll", _nll_autograd, setup_context=_nll_context, lib=_library)
