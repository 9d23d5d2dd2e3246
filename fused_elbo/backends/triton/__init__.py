"""The Triton backend: the host's half of the kernels. On a CPU it runs only under Triton's interpreter, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ... import reference
from ...spec import Gaussian, Gradients, Noise, compute_dtype, elements_per_sample
from . import latent_kernels, loss_kernels
from .general import likelihood, posterior, posterior_backward
from .launch import (
    RESCALE_BLOCK,
    RESCALE_PROGRAMS,
    TRITON_DTYPES,
    Plan,
    Rows,
    Stream,
    as_argument,
    as_rows,
    current,
    operation,
    options,
    plan,
    tickets,
)

__all__ = [
    "elbo",
    "gaussian_nll_backward",
    "likelihood",
    "posterior",
    "posterior_backward",
    "rescale_",
    "rsample_kl",
    "rsample_kl_backward",
    "unavailable",
]


def unavailable(device_type: str) -> str | None:
    """Why the kernels cannot run on ``device_type``; None if they can."""
    if triton.knobs.runtime.interpret:
        return None
    if device_type == "cuda":
        if torch.version.hip:
            return "the kernels hold PTX, which an AMD GPU does not run"
        return None if torch.cuda.is_available() else "torch sees no CUDA device"
    return f"Triton compiles for GPUs; on {device_type!r} it needs its interpreter (TRITON_INTERPRET=1 before import)"


@operation
def rsample_kl(mu: Tensor, logvar: Tensor, noise: Noise | None, *, want_kl: bool) -> tuple[Tensor | None, Tensor | None]:
    if mu.numel() == 0:
        return reference.rsample_kl(mu, logvar, noise, want_kl=want_kl)
    dtype = compute_dtype(mu, logvar)
    z = None if noise is None else torch.empty_like(mu)
    kl = mu.new_empty(mu.shape[0], dtype=dtype) if want_kl else None
    eps = None if noise is None else noise.eps
    rows = as_rows(mu, logvar, eps, z, keep_order=True)
    stream = Stream(noise, rows, mu)
    p = plan("latent", rows.rows, rows.columns + stream.shift)
    split = p.split and want_kl
    with current(mu.device):
        latent_kernels.rsample_kl_kernel[(p.programs,)](
            mu, logvar, eps, z, kl, stream.seed,
            mu.new_empty(rows.rows * p.chunks, dtype=dtype) if split else None,
            tickets.take(mu.device) if split else None,
            *stream.numbers,
            rows.rows, rows.columns, p.steps, p.chunks,
            rows.sizes, *rows.strides,
            ROWS=p.row_block, BLOCK=p.block, EVEN=p.even and stream.shift == 0, WIDE=rows.wide,
            SPLIT=split, WIDTH=p.width, COMPUTE=TRITON_DTYPES[dtype],
            **stream.constants, **options("rsample_kl", dtype),
        )  # fmt: skip
    return z, kl


@operation
def rsample_kl_backward(
    g_z: Tensor | None, g_kl: Tensor | None, mu: Tensor, logvar: Tensor, noise: Noise | None, out: Gradients
) -> None:
    if mu.numel() == 0:
        return
    dtype = compute_dtype(mu, logvar)
    eps = None if noise is None else noise.eps
    rows = as_rows(mu, logvar, g_z, eps, out.mu, out.logvar, keep_order=True)
    mu_strides, logvar_strides, g_z_strides, *other_strides = rows.strides
    stream = Stream(noise, rows, mu)
    p = plan("latent", rows.rows, rows.columns + stream.shift)
    with current(mu.device):
        latent_kernels.rsample_kl_backward_kernel[(p.programs,)](
            g_z, g_kl, mu, logvar, eps, stream.seed, out.mu, out.logvar,
            *stream.numbers, 0 if g_kl is None else g_kl.stride(0),
            rows.rows, rows.columns, p.steps, p.chunks,
            rows.sizes, g_z_strides, mu_strides, logvar_strides, *other_strides,
            ROWS=p.row_block, BLOCK=p.block, EVEN=p.even and stream.shift == 0, WIDE=rows.wide, COMPUTE=TRITON_DTYPES[dtype],
            **stream.constants, **options("rsample_kl_backward", dtype),
        )  # fmt: skip


@operation
def elbo(
    x_hat: Tensor,
    x: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    kl: Tensor | None,
    beta: float | Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float | None,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    if x_hat.numel() == 0 or (mu is not None and mu.numel() == 0):
        return reference.elbo(x_hat, x, mu, logvar, kl, beta, likelihood, out, weight=weight, grad_scale=grad_scale)
    dtype, device = compute_dtype(x_hat, x, mu, logvar, kl), x_hat.device
    data = as_rows(x_hat, x, out.x_hat, out.x, keep_order=False)
    data_plan = plan("data", data.rows, data.columns)
    if mu is None:
        latent, latent_plan = Rows(0, 0, (1,), (None,) * 4), Plan(1, 1, 1, 1, 0)
    else:
        latent = as_rows(mu, logvar, out.mu, out.logvar, keep_order=False)
        latent_plan = plan("latent", latent.rows, latent.columns)
    programs = data_plan.programs + latent_plan.programs
    nll = x_hat.new_empty(data.rows, dtype=dtype)
    kl_out = None if mu is None else torch.empty_like(nll)
    loss = None if weight is None else nll.new_empty(())
    constant = elements_per_sample(x_hat) * likelihood.log_normaliser
    numbers = (beta, grad_scale, 1.0 if weight is None else weight, likelihood.precision, constant)
    with current(device):
        loss_kernels.elbo_kernel[(programs,)](
            x_hat, x, out.x_hat, out.x, nll, mu, logvar, out.mu, out.logvar, kl_out, kl, out.kl, loss,
            nll.new_empty(programs), tickets.take(device),
            *(as_argument(n, dtype, device) for n in numbers), 0 if kl is None else kl.stride(0),
            data.rows, data.columns, data_plan.steps, data_plan.chunks, data_plan.programs,
            data.sizes, *data.strides,
            latent.columns, latent_plan.steps, latent_plan.chunks,
            latent.sizes, *latent.strides,
            ROWS=data_plan.row_block, BLOCK=data_plan.block, EVEN=data_plan.even, WIDE=data.wide,
            SPLIT=data_plan.split, WIDTH=data_plan.width,
            LATENT_ROWS=latent_plan.row_block, LATENT_BLOCK=latent_plan.block, LATENT_EVEN=latent_plan.even,
            LATENT_WIDE=latent.wide, LATENT_SPLIT=latent_plan.split, LATENT_WIDTH=latent_plan.width,
            COMPUTE=TRITON_DTYPES[dtype], **options("elbo", dtype),
        )  # fmt: skip
    return loss, nll, kl if mu is None else kl_out


@operation
def gaussian_nll_backward(
    g_nll: Tensor,
    x_hat: Tensor,
    x: Tensor,
    likelihood: Gaussian,
    out: Gradients,
    *,
    weight: float = 1.0,
    expected: float | Tensor | None = None,
) -> None:
    if x_hat.numel() == 0:
        return
    dtype, device = compute_dtype(x_hat, x), x_hat.device
    data = as_rows(x_hat, x, out.x_hat, out.x, keep_order=False)
    p = plan("data", data.rows, data.columns)
    with current(device):
        loss_kernels.gaussian_nll_backward_kernel[(p.programs,)](
            g_nll, x_hat, x, out.x_hat, out.x,
            None if expected is None else as_argument(expected, dtype, device),
            as_argument(weight * likelihood.precision, dtype, device), g_nll.stride(0),
            data.rows, data.columns, p.steps, p.chunks, data.sizes, *data.strides,
            ROWS=p.row_block, BLOCK=p.block, EVEN=p.even, WIDE=data.wide,
            COMPUTE=TRITON_DTYPES[dtype], **options("gaussian_nll_backward", dtype),
        )  # fmt: skip


@operation
def rescale_(gradients: Sequence[Tensor], upstream: Tensor, expected: float | Tensor) -> None:
    gradients = [g for g in gradients if g.numel()]
    # The kernel runs through memory. Only an activation overwritten in place may have holes, which are somebody else's.
    for gradient in gradients:
        if not _dense(gradient):
            gradient.mul_(upstream / expected)
    gradients = [g for g in gradients if _dense(g)]
    if not gradients:
        return
    counts = tuple(g.numel() for g in gradients)
    programs = min(-(-max(counts) // RESCALE_BLOCK), RESCALE_PROGRAMS)
    with current(upstream.device):
        loss_kernels.rescale_kernel[(programs, len(gradients))](
            tuple(gradients), counts, upstream, as_argument(expected, upstream.dtype, upstream.device),
            BLOCK=RESCALE_BLOCK, COMPUTE=TRITON_DTYPES[upstream.dtype], **options("rescale", upstream.dtype),
        )  # fmt: skip


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()
