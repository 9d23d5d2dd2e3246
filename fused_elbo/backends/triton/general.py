"""The host's half of the general operations: any likelihood, any posterior and prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ... import reference
from ...spec import DataGradients, Likelihood, Noise, Posterior, PosteriorGradients, compute_dtype
from . import likelihood_kernels, posterior_kernels
from .launch import SMALLEST_BLOCK, TRITON_DTYPES, Stream, as_argument, as_rows, current, operation, options, plan, tickets

Strides = tuple[int, ...] | None

# Of this number the exponential is a finite double.
LARGEST_EXPONENT = 709.0


@operation
def likelihood(
    x_hat: Tensor,
    x: Tensor,
    log_scale: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    upstream: Tensor | None,
    spec: Likelihood,
    out: DataGradients,
    *,
    want_nll: bool = True,
    want_slope: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    if x_hat.numel() == 0:
        return reference.likelihood(
            x_hat, x, log_scale, weight, mask, upstream, spec, out, want_nll=want_nll, want_slope=want_slope
        )
    dtype, device = compute_dtype(x_hat, x, log_scale, weight), x_hat.device
    # Triton has no pointer to bools.
    keep = None if mask is None else mask.view(torch.uint8)
    rows = as_rows(x_hat, x, log_scale, weight, keep, *out, keep_order=False, leading=2)
    x_hat_strides, x_strides, *others = rows.strides
    others = [_per_row(strides, leading=2) for strides in others]
    upstream_strides = None if upstream is None else upstream.stride()
    inner, outer_strides, strides = _pairs(*x_hat.shape[:2], [x_hat_strides, x_strides, *others, upstream_strides])
    p = plan("narrow" if dtype == torch.float64 else "likelihood", rows.rows, rows.columns)
    terms = {"dtype": dtype, "device": device}
    nll, slope = (torch.empty(x_hat.shape[:2], **terms) if wanted else None for wanted in (want_nll, want_slope))
    split = p.split and (want_nll or want_slope)
    # A constant of every element is added once a row where every element counts, and counts alike.
    constant = spec.constant + (spec.log_scale if log_scale is None else 0.0)
    located = spec.family in ("gaussian", "laplace")
    alike = log_scale is None and weight is None and mask is None
    numbers = (
        # One scale's precision is the host's to compute: the kernel's exponential may be off by 2 ulp, and a gradient has its
        # square. As there the largest finite number stands for all beyond.
        min(math.exp(min(-spec.log_scale, LARGEST_EXPONENT)), torch.finfo(dtype).max),
        constant if located and not alike else 0.0,
        constant * rows.columns if located and alike else 0.0,
        spec.scale,
        spec.shift,
    )
    with current(device):
        likelihood_kernels.likelihood_kernel[(p.programs,)](
            x_hat, x, log_scale, weight, keep, upstream, *out, nll, slope,
            x_hat.new_empty((want_nll + want_slope) * rows.rows * p.chunks, dtype=dtype) if split else None,
            tickets.take(device) if split else None,
            *(as_argument(n, dtype, device) for n in numbers),
            rows.rows, inner, rows.columns, p.steps, p.chunks,
            rows.sizes, outer_strides, *strides,
            FAMILY=spec.family, ACTIVATION=spec.activation, LEVELS=x.dtype == torch.uint8,
            ROWS=p.row_block, BLOCK=p.block, EVEN=p.even, WIDE=rows.wide, SPLIT=split, WIDTH=p.width,
            COMPUTE=TRITON_DTYPES[dtype], **options("likelihood", dtype),
        )  # fmt: skip
    return nll, slope


@operation
def posterior(
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: Noise | None,
    spec: Posterior,
    *,
    samples: int = 1,
    want_kl: str | None = "rows",
    want_log_ratio: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if mu.numel() == 0:
        return reference.posterior(
            mu, raw, prior_mean, prior_raw, noise, spec, samples=samples, want_kl=want_kl, want_log_ratio=want_log_ratio
        )
    dtype, device = compute_dtype(mu, raw, prior_mean, prior_raw), mu.device
    eps = None if noise is None else noise.eps
    z = None if noise is None else reference.empty_samples(mu, samples)
    kl = mu.new_empty(mu.shape[0], dtype=dtype) if want_kl == "rows" else None
    elements = torch.empty_like(mu, dtype=dtype) if want_kl == "elements" else None
    log_ratio = mu.new_empty((samples, mu.shape[0]), dtype=dtype) if want_log_ratio and z is not None else None
    rows = as_rows(mu, raw, prior_mean, prior_raw, _first(eps), _first(z), elements, keep_order=True)
    mu_strides, raw_strides, prior_mean_strides, prior_raw_strides, *others = rows.strides
    stream = Stream(noise, rows, mu, samples)
    # The log ratios of a row's samples are as many sums, which no program keeps from one tile to the next.
    steps = None if log_ratio is None else 1
    p = plan("narrow" if dtype == torch.float64 else "posterior", rows.rows, rows.columns + stream.shift, steps)
    split = p.split and (kl is not None or log_ratio is not None)
    sums = rows.rows * ((kl is not None) + samples * (log_ratio is not None))
    with current(device):
        posterior_kernels.posterior_kernel[(p.programs,)](
            mu, raw, prior_mean, prior_raw, eps, z, kl, elements, log_ratio, stream.seed,
            mu.new_empty(sums * p.chunks, dtype=dtype) if split else None,
            tickets.take(device) if split else None,
            *_numbers(spec, dtype, device), *stream.numbers, _sample_stride(eps), _sample_stride(z),
            samples, rows.rows, rows.columns, p.steps, p.chunks,
            rows.sizes, mu_strides, raw_strides, _per_row(prior_mean_strides), _per_row(prior_raw_strides), *others,
            PARAM=spec.param, CLAMP=_clamp(spec), ROWS=p.row_block, BLOCK=p.block, EVEN=p.even and stream.shift == 0,
            WIDE=rows.wide, SINGLE=stream.single, SPLIT=split, WIDTH=p.width,
            COMPUTE=TRITON_DTYPES[dtype], **stream.constants, **options("posterior", dtype),
        )  # fmt: skip
    return z, elements if kl is None else kl, log_ratio


@operation
def posterior_backward(
    g_z: Tensor | None,
    g_kl: Tensor | None,
    g_log_ratio: Tensor | None,
    path_weight: Tensor | None,
    mu: Tensor,
    raw: Tensor,
    prior_mean: Tensor | None,
    prior_raw: Tensor | None,
    noise: Noise | None,
    spec: Posterior,
    out: PosteriorGradients,
    *,
    samples: int = 1,
) -> None:
    if mu.numel() == 0:
        return
    dtype, device = compute_dtype(mu, raw, prior_mean, prior_raw), mu.device
    eps = None if noise is None else noise.eps
    rows = as_rows(mu, raw, _first(eps), *out, prior_mean, prior_raw, _first(g_z), g_kl, keep_order=True)
    *strides, prior_mean_strides, prior_raw_strides, g_z_strides, g_kl_strides = rows.strides
    mu_strides, raw_strides, *others = strides
    stream = Stream(noise, rows, mu, samples)
    # Eight elements a thread only where they make 16-byte accesses, and not with a second path: registers are few.
    packed = (
        mu.element_size() == 2
        and dtype == torch.float32
        and stream.shift == 0
        and rows.sizes[-1] % SMALLEST_BLOCK == 0
        and path_weight is None
    )
    constants = stream.constants if packed else stream.constants | {"PACK": reference.LANES}
    p = plan("posterior" if packed else "narrow", rows.rows, rows.columns + stream.shift)
    with current(device):
        posterior_kernels.posterior_backward_kernel[(p.programs,)](
            g_z, g_kl, g_log_ratio, path_weight, mu, raw, prior_mean, prior_raw, eps, stream.seed, *out,
            *_numbers(spec, dtype, device),
            *(as_argument(share, dtype, device) for share in (spec.posterior_share, spec.prior_share)),
            *stream.numbers, _sample_stride(eps), _sample_stride(g_z),
            *(None if t is None else t.stride() for t in (g_log_ratio, path_weight)),
            samples, rows.rows, rows.columns, p.steps, p.chunks,
            rows.sizes, *map(_per_row, (g_z_strides, g_kl_strides)), mu_strides, raw_strides,
            *map(_per_row, (prior_mean_strides, prior_raw_strides)), *others,
            PARAM=spec.param, CLAMP=_clamp(spec), SAMPLED=noise is not None and (g_z is not None or g_log_ratio is not None),
            ROWS=p.row_block, BLOCK=p.block, EVEN=p.even and stream.shift == 0, WIDE=rows.wide, SINGLE=stream.single,
            COMPUTE=TRITON_DTYPES[dtype], **constants, **options("posterior_backward", dtype),
        )  # fmt: skip


def _pairs(outer: int, inner: int, strides: list[Strides]) -> tuple[int, tuple[int, ...], list[Strides]]:
    """Rows (a, b) whose first two strides are those of a and b: the number of b, the strides of a, and the strides from b on.

    Where one stride serves for all pairs, b is 0 throughout, and no kernel divides.
    """
    given = [s for s in strides if s is not None]
    if inner == 1:
        step = [None if s is None else s[0] for s in strides]
    elif outer == 1 or all(s[0] == s[1] * inner for s in given):
        step = [None if s is None else s[1] for s in strides]
    else:
        return inner, tuple(0 if s is None else s[0] for s in strides), [None if s is None else s[1:] for s in strides]
    return 1, tuple(s or 0 for s in step), [None if s is None else (0, *s[2:]) for s in strides]


def _per_row(strides: Strides, leading: int = 1) -> Strides:
    """The strides of the rows alone where a row holds one value."""
    return strides if strides is None or any(strides[leading:]) else strides[:leading]


def _first(samples: Tensor | None) -> Tensor | None:
    return None if samples is None else samples[0]


def _sample_stride(samples: Tensor | None) -> int:
    return 0 if samples is None else samples.stride(0)


def _clamp(spec: Posterior) -> str:
    if spec.clamp is None:
        return "none"
    return "soft" if spec.soft else "hard"


def _numbers(spec: Posterior, dtype: torch.dtype, device: torch.device) -> tuple[float | Tensor | None, ...]:
    given = (spec.min_std, *(spec.clamp or (0.0, 0.0)), spec.free_bits)
    return tuple(None if n is None else as_argument(n, dtype, device) for n in given)
