"""The reconstruction, alone or with the KL and the total, and what its backward needs: gradients are made with the sums."""

import triton
import triton.language as tl

from .arithmetic import sigma_and_excess, sigma_and_expm1
from .tiles import COMBINE_TILE, arrive, columns_of, combine, load, mask_of, number, share_of, store


@triton.jit
def _residual(
    x_hat, x, g_x_hat, g_x, row, column, mask, c, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """x_hat - x of a tile; c times it goes to ``g_x_hat`` and its negative to ``g_x``, where there are such."""
    a = load(x_hat, row, column, None, mask, sizes, x_hat_strides, COMPUTE)
    b = load(x, row, column, None, mask, sizes, x_strides, COMPUTE)
    difference = a - b
    gradient = c * difference
    if g_x_hat is not None:
        store(g_x_hat, row, column, mask, sizes, g_x_hat_strides, gradient)
    if g_x is not None:
        store(g_x, row, column, mask, sizes, g_x_strides, -gradient)
    return difference


@triton.jit
def _nll_program(
    x_hat, x, g_x_hat, g_x, nll, kl_in, partials, pid, c, beta, precision, constant, kl_in_stride,
    rows, columns, steps, chunks, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program's share of the reconstruction: its part of a row's sum, or whole rows with the KL that goes with them."""
    chunk, row = share_of(pid, chunks, ROWS, WIDE)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, 0, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, False, EVEN)
        difference = _residual(
            x_hat, x, g_x_hat, g_x, row, column, mask, c * precision,
            sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides, COMPUTE,
        )  # fmt: skip
        total += difference * difference
    sums = 0.5 * precision * tl.sum(total, 1)
    index = tl.reshape(row, [ROWS])
    if SPLIT:
        tl.store(partials + index * chunks + chunk, sums, index < rows)
    else:
        tl.store(nll + index, (sums + constant).to(nll.dtype.element_ty), index < rows)
        if kl_in is not None:
            sums += beta * tl.load(kl_in + index * kl_in_stride, index < rows, other=0.0).to(COMPUTE)
        tl.store(partials + pid, tl.sum(sums))


@triton.jit
def _kl_program(
    mu, logvar, g_mu, g_logvar, kl, partials, pid, c,
    rows, columns, steps, chunks, sizes, mu_strides, logvar_strides, g_mu_strides, g_logvar_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program's share of the KL and of its gradient, c times that of the sum."""
    chunk, row = share_of(pid, chunks, ROWS, WIDE)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, 0, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, False, EVEN)
        m = load(mu, row, column, None, mask, sizes, mu_strides, COMPUTE)
        lv = load(logvar, row, column, None, mask, sizes, logvar_strides, COMPUTE)
        if g_mu is not None:
            store(g_mu, row, column, mask, sizes, g_mu_strides, c * m)
        if g_logvar is not None:
            grad = 0.5 * c * sigma_and_expm1(lv)[1]
            store(g_logvar, row, column, mask, sizes, g_logvar_strides, grad)
        total += m * m + sigma_and_excess(lv)[1]
    sums = 0.5 * tl.sum(total, 1)
    index = tl.reshape(row, [ROWS])
    if SPLIT:
        tl.store(partials + index * chunks + chunk, sums, index < rows)
    else:
        tl.store(kl + index, sums.to(kl.dtype.element_ty), index < rows)
        tl.store(partials + pid, tl.sum(sums))


@triton.jit
def elbo_kernel(
    x_hat, x, g_x_hat, g_x,  # (rows, columns)
    nll,  # (rows,)
    mu, logvar, g_mu, g_logvar,  # (rows, latent_columns) | None
    kl,  # (rows,), the KL of mu and logvar | None
    kl_in,  # (rows,), a given KL | None
    g_kl,  # () | None
    loss,  # () | None
    partials,  # (data programs + latent programs,)
    ticket,  # ()
    beta, grad_scale, weight, precision, constant, kl_in_stride,
    rows, columns, steps, chunks, programs,
    sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    latent_columns, latent_steps, latent_chunks,
    latent_sizes, mu_strides, logvar_strides, g_mu_strides, g_logvar_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    LATENT_ROWS: tl.constexpr, LATENT_BLOCK: tl.constexpr, LATENT_EVEN: tl.constexpr, LATENT_WIDE: tl.constexpr,
    LATENT_SPLIT: tl.constexpr, LATENT_WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """loss = weight sum_n (nll_n + beta kl_n) with its gradients: data programs first, then latent programs, then the last to
    arrive adds up what they left."""
    pid = tl.program_id(0)
    beta = number(beta, COMPUTE)
    precision = number(precision, COMPUTE)
    constant = number(constant, COMPUTE)
    c = number(weight, COMPUTE) * number(grad_scale, COMPUTE)
    if pid < programs:
        _nll_program(
            x_hat, x, g_x_hat, g_x, nll, kl_in, partials, pid, c, beta, precision, constant, kl_in_stride,
            rows, columns, steps, chunks, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
            ROWS, BLOCK, EVEN, WIDE, SPLIT, COMPUTE,
        )  # fmt: skip
    elif mu is not None:
        _kl_program(
            mu, logvar, g_mu, g_logvar, kl, partials + programs, pid - programs, c * beta,
            rows, latent_columns, latent_steps, latent_chunks,
            latent_sizes, mu_strides, logvar_strides, g_mu_strides, g_logvar_strides,
            LATENT_ROWS, LATENT_BLOCK, LATENT_EVEN, LATENT_WIDE, LATENT_SPLIT, COMPUTE,
        )  # fmt: skip

    if arrive(ticket, tl.num_programs(0)):
        if SPLIT:
            total = combine(partials, nll, rows, chunks, constant, WIDTH)
            if kl_in is not None:
                total += beta * _strided_sum(kl_in, kl_in_stride, rows)
        else:
            total = combine(partials, None, 1, programs, 0.0, COMBINE_TILE)
        if mu is not None:
            if LATENT_SPLIT:
                total += beta * combine(partials + programs, kl, rows, latent_chunks, 0.0, LATENT_WIDTH)
            else:
                total += beta * combine(partials + programs, None, 1, tl.num_programs(0) - programs, 0.0, COMBINE_TILE)
        if loss is not None:
            total += constant.to(tl.float64) * rows
            tl.store(loss, (number(weight, tl.float64) * total).to(loss.dtype.element_ty))
        if g_kl is not None:
            tl.store(g_kl, (c * beta).to(g_kl.dtype.element_ty))


@triton.jit
def _strided_sum(values, stride, count):
    total = tl.zeros([COMBINE_TILE], tl.float64)
    for first in range(0, count, COMBINE_TILE):
        index = first + tl.arange(0, COMBINE_TILE)
        total += tl.load(values + index.to(tl.int64) * stride, index < count, other=0.0).to(tl.float64)
    return tl.sum(total)


@triton.jit
def gaussian_nll_backward_kernel(
    g_nll,  # (rows,)
    x_hat, x, g_x_hat, g_x,  # (rows, columns)
    expected, factor, g_nll_stride,
    rows, columns, steps, chunks,
    sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The gradient alone, for upstream gradients ``g_nll`` times ``factor``; with ``expected``, only if they are not that."""
    stale = True
    if expected is not None:
        stale = tl.load(g_nll).to(COMPUTE) != number(expected, COMPUTE)
    if stale:
        chunk, row = share_of(tl.program_id(0), chunks, ROWS, WIDE)
        c = tl.load(g_nll + row * g_nll_stride, row < rows, other=0.0).to(COMPUTE) * number(factor, COMPUTE)
        for step in range(steps):
            column = columns_of(chunk, step, steps, 0, BLOCK, WIDE)
            mask = mask_of(row, rows, column, columns, False, EVEN)
            _residual(
                x_hat, x, g_x_hat, g_x, row, column, mask, c,
                sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides, COMPUTE,
            )  # fmt: skip


@triton.jit
def rescale_kernel(tensors, counts, upstream, expected, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Tensor number program_id(1), dense, times upstream / expected: at once done where the two are equal."""
    g = tl.load(upstream).to(COMPUTE)
    e = number(expected, COMPUTE)
    if g != e:
        factor = g / e
        for k in tl.static_range(len(tensors)):
            if tl.program_id(1) == k:
                for turn in range((counts[k] - 1) // (BLOCK * tl.num_programs(0)) + 1):
                    block = turn * tl.num_programs(0) + tl.program_id(0)
                    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    mask = index < counts[k]
                    value = tl.load(tensors[k] + index, mask).to(COMPUTE) * factor
                    tl.store(tensors[k] + index, value.to(tensors[k].dtype.element_ty), mask)
