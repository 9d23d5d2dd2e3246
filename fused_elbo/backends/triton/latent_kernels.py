"""The latent pass and its backward. The noise depends on an element's number in its tensor, not on strides or tiles."""

import triton
import triton.language as tl

from .arithmetic import normals, sigma_and_excess, sigma_and_expm1
from .tiles import arrive, columns_of, combine, load, mask_of, share_of, store


@triton.jit
def first_element(row, columns, first_low, first_high, SEED_PER_SAMPLE: tl.constexpr):
    """Number in the noise stream of each row's first element."""
    first_index = (first_high.to(tl.int64) << 32) + first_low.to(tl.uint32).to(tl.int64)
    return row * 0 + first_index if SEED_PER_SAMPLE else row * columns + first_index


@triton.jit
def key_of(seed, seed_stride, row, row_mask, SEED_PER_SAMPLE: tl.constexpr):
    # One seed for all is loaded without an address a row: its key schedule then runs beside the vector instructions.
    return tl.load(seed + row * seed_stride, row_mask, other=0) if SEED_PER_SAMPLE else tl.load(seed + row * 0)


@triton.jit(do_not_specialize=["first_low", "first_high", "offset_low", "offset_high"])
def rsample_kl_kernel(
    mu, logvar, eps, z,  # (rows, columns)
    kl,  # (rows,) | None
    seed,  # () | (rows,) | None
    partials,  # (rows, chunks) | None
    ticket,  # () | None
    seed_stride, first_low, first_high, offset_low, offset_high,
    rows, columns, steps, chunks,
    sizes, mu_strides, logvar_strides, eps_strides, z_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """z = mu + noise exp(logvar / 2) and kl = sum 1/2 (mu^2 + expm1(logvar) - logvar), each if wanted."""
    chunk, row = share_of(tl.program_id(0), chunks, ROWS, WIDE)
    row_mask = row < rows
    element = first_element(row, columns, first_low, first_high, SEED_PER_SAMPLE)
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    if seed is not None:
        key = key_of(seed, seed_stride, row, row_mask, SEED_PER_SAMPLE)
    NARROW: tl.constexpr = mu.dtype.element_ty.primitive_bitwidth == 16 and logvar.dtype.element_ty.primitive_bitwidth == 16
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, shift, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, not ALIGNED, EVEN)
        m = load(mu, row, column, row_mask, mask, sizes, mu_strides, COMPUTE)
        lv = load(logvar, row, column, row_mask, mask, sizes, logvar_strides, COMPUTE)
        if z is not None:
            if eps is not None:
                noise = load(eps, row, column, row_mask, mask, sizes, eps_strides, COMPUTE)
            else:
                first = element // 4 + (chunk * steps + step).to(tl.int64) * (BLOCK // 4)
                noise = normals(key, offset_low, offset_high, first, BLOCK, PACK, WIDE_NOISE, COMPUTE)
        sigma, excess = sigma_and_excess(lv, NARROW)
        if z is not None:
            sample = m + noise * sigma
            store(z, row, column, mask, sizes, z_strides, sample)
        # Outside the mask both are 0, and so is their excess.
        total += m * m + excess
    if kl is not None:
        sums = 0.5 * tl.sum(total, 1)
        index = tl.reshape(row, [ROWS])
        if SPLIT:
            tl.store(partials + index * chunks + chunk, sums, index < rows)
            if arrive(ticket, tl.num_programs(0)):
                combine(partials, kl, rows, chunks, 0.0, WIDTH)
        else:
            tl.store(kl + index, sums.to(kl.dtype.element_ty), index < rows)


@triton.jit(do_not_specialize=["first_low", "first_high", "offset_low", "offset_high"])
def rsample_kl_backward_kernel(
    g_z,  # (rows, columns) | None
    g_kl,  # (rows,) | None
    mu, logvar, eps,  # (rows, columns)
    seed,  # () | (rows,) | None
    g_mu, g_logvar,  # (rows, columns) | None
    seed_stride, first_low, first_high, offset_low, offset_high, g_kl_stride,
    rows, columns, steps, chunks,
    sizes, g_z_strides, mu_strides, logvar_strides, eps_strides, g_mu_strides, g_logvar_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """g_mu = g_z + c mu and g_logvar = (g_z noise exp(logvar / 2) + c expm1(logvar)) / 2, with c the row's ``g_kl``."""
    chunk, row = share_of(tl.program_id(0), chunks, ROWS, WIDE)
    row_mask = row < rows
    element = first_element(row, columns, first_low, first_high, SEED_PER_SAMPLE)
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    if seed is not None:
        key = key_of(seed, seed_stride, row, row_mask, SEED_PER_SAMPLE)
    if g_kl is not None:
        c = tl.load(g_kl + row * g_kl_stride, row_mask, other=0.0).to(COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, shift, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, not ALIGNED, EVEN)
        if g_z is not None:
            upstream = load(g_z, row, column, row_mask, mask, sizes, g_z_strides, COMPUTE)
        if g_mu is not None:
            grad = tl.zeros([ROWS, BLOCK], COMPUTE)
            if g_kl is not None:
                grad += c * load(mu, row, column, row_mask, mask, sizes, mu_strides, COMPUTE)
            if g_z is not None:
                grad += upstream
            store(g_mu, row, column, mask, sizes, g_mu_strides, grad)
        if g_logvar is not None:
            lv = load(logvar, row, column, row_mask, mask, sizes, logvar_strides, COMPUTE)
            sigma, expm1 = sigma_and_expm1(lv)
            grad = tl.zeros([ROWS, BLOCK], COMPUTE)
            if g_kl is not None:
                grad += c * expm1
            if g_z is not None:
                if eps is not None:
                    noise = load(eps, row, column, row_mask, mask, sizes, eps_strides, COMPUTE)
                    grad += upstream * noise * sigma
                elif seed is not None:
                    first = element // 4 + (chunk * steps + step).to(tl.int64) * (BLOCK // 4)
                    noise = normals(key, offset_low, offset_high, first, BLOCK, PACK, WIDE_NOISE, COMPUTE)
                    grad += upstream * noise * sigma
            store(g_logvar, row, column, mask, sizes, g_logvar_strides, 0.5 * grad)
