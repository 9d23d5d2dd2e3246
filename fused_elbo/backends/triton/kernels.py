"""The kernels. A tensor of N samples is seen as rows; a program takes ROWS rows or, of one row, ``steps`` tiles of BLOCK columns.

Strides come as tuples, the row's first; ``sizes`` are the sizes of a row's dimensions that could not be merged. The noise and
the sums do not depend on strides, and the grid depends on shapes alone: same inputs, same bits.
"""

import triton
import triton.language as tl

from .arithmetic import normals, sigma_and_excess, sigma_and_expm1


@triton.jit
def _number(value, dtype: tl.constexpr):
    """A float argument, or the element that a pointer argument points at."""
    value = tl.to_tensor(value)
    if value.dtype.is_ptr():
        return tl.load(value).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def _pointers(base, row, column, sizes, strides):
    """Pointers to columns (1 or ROWS, BLOCK) of rows (ROWS, 1)."""
    count: tl.constexpr = len(sizes)
    offset = column * 0
    for k in tl.static_range(count - 1, 0, -1):
        offset += (column % sizes[k]) * strides[k + 1]
        column = column // sizes[k]
    return base + row * strides[0] + (offset + column * strides[1])


@triton.jit
def _arrive(ticket, expected):
    """True in the last of ``expected`` programs to get here, which then sees what all others have written."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def _combine(partials, out, rows, columns, shift, WIDTH: tl.constexpr):
    """Total of ``partials`` (rows, columns), in float64 and in a fixed order; ``out`` gets each row's sum plus ``shift``."""
    HEIGHT: tl.constexpr = 1024 // WIDTH
    total = tl.zeros([HEIGHT], tl.float64)
    for first_row in range(0, rows, HEIGHT):
        row = first_row + tl.arange(0, HEIGHT)
        sums = tl.zeros([HEIGHT, WIDTH], tl.float64)
        for first_column in range(0, columns, WIDTH):
            column = first_column + tl.arange(0, WIDTH)
            mask = (row < rows)[:, None] & (column < columns)[None, :]
            # Other programs wrote these: they are in the L2, and must not come from this multiprocessor's own cache.
            values = tl.load(
                partials + row[:, None].to(tl.int64) * columns + column[None, :], mask, other=0.0, cache_modifier=".cg"
            )
            sums += values.to(tl.float64)
        row_sums = tl.sum(sums, 1)
        if out is not None:
            tl.store(out + row, (row_sums + shift).to(out.dtype.element_ty), row < rows)
        total += row_sums
    return tl.sum(total)


@triton.jit
def _columns(chunk, step, steps, shift, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Columns (1, BLOCK) of a program's tile; ``shift`` columns before a row's first, so that noise blocks are whole."""
    tile = chunk * steps + step
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK + tl.arange(0, BLOCK)[None, :] - shift


@triton.jit
def _mask(row, rows, column, columns, SHIFTED: tl.constexpr, EVEN: tl.constexpr):
    """Which of a tile's elements exist; EVEN says all do, which spares the loads a predicate and a default each."""
    if EVEN:
        return tl.full([row.shape[0], column.shape[1]], True, tl.int1)
    else:
        mask = (row < rows) & (column < columns)
        if SHIFTED:
            mask = mask & (column >= 0)
        return mask


@triton.jit
def _first_element(row, columns, first_index, SEED_PER_SAMPLE: tl.constexpr):
    """Number in the noise stream of each row's first element."""
    return row * 0 + first_index if SEED_PER_SAMPLE else row * columns + first_index


@triton.jit
def _key(seed, row, row_mask, SEED_PER_SAMPLE: tl.constexpr):
    return tl.load(seed + row, row_mask, other=0) if SEED_PER_SAMPLE else tl.load(seed + row * 0)


@triton.jit(do_not_specialize=["first_index", "offset"])
def rsample_kl_kernel(
    mu, logvar, eps, z,  # (rows, columns)
    kl,  # (rows,) | None
    seed,  # () | (rows,) | None
    partials,  # (rows, chunks) | None
    ticket,  # () | None
    first_index, offset,
    rows, columns, steps, chunks,
    sizes, mu_strides, logvar_strides, eps_strides, z_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """z = mu + noise exp(logvar / 2) and kl = sum 1/2 (mu^2 + expm1(logvar) - logvar), each if wanted."""
    chunk = tl.program_id(0) % chunks
    row = ((tl.program_id(0) // chunks) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    row_mask = row < rows
    element = _first_element(row, columns, first_index, SEED_PER_SAMPLE)
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    if seed is not None:
        key = _key(seed, row, row_mask, SEED_PER_SAMPLE)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = _columns(chunk, step, steps, shift, BLOCK, WIDE)
        mask = _mask(row, rows, column, columns, not ALIGNED, EVEN)
        m = tl.load(_pointers(mu, row, column, sizes, mu_strides), mask, other=0.0).to(COMPUTE)
        lv = tl.load(_pointers(logvar, row, column, sizes, logvar_strides), mask, other=0.0).to(COMPUTE)
        if z is not None:
            if eps is not None:
                noise = tl.load(_pointers(eps, row, column, sizes, eps_strides), mask, other=0.0).to(COMPUTE)
            else:
                first = element // 4 + (chunk * steps + step).to(tl.int64) * (BLOCK // 4)
                noise = normals(key, offset, first, BLOCK, PACK, WIDE_NOISE, COMPUTE)
        sigma, excess = sigma_and_excess(lv)
        if z is not None:
            sample = m + noise * sigma
            tl.store(_pointers(z, row, column, sizes, z_strides), sample.to(z.dtype.element_ty), mask)
        # Outside the mask both are 0, and so is their excess.
        total += m * m + excess
    if kl is not None:
        sums = 0.5 * tl.sum(total, 1)
        index = tl.reshape(row, [ROWS])
        if SPLIT:
            tl.store(partials + index * chunks + chunk, sums, index < rows)
            if _arrive(ticket, tl.num_programs(0)):
                _combine(partials, kl, rows, chunks, 0.0, WIDTH)
        else:
            tl.store(kl + index, sums.to(kl.dtype.element_ty), index < rows)


@triton.jit(do_not_specialize=["first_index", "offset"])
def rsample_kl_backward_kernel(
    g_z,  # (rows, columns) | None
    g_kl,  # (rows,) | None
    mu, logvar, eps,  # (rows, columns)
    seed,  # () | (rows,) | None
    g_mu, g_logvar,  # (rows, columns) | None
    first_index, offset, g_kl_stride,
    rows, columns, steps, chunks,
    sizes, g_z_strides, mu_strides, logvar_strides, eps_strides, g_mu_strides, g_logvar_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr,
    WIDE_NOISE: tl.constexpr, SEED_PER_SAMPLE: tl.constexpr, ALIGNED: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """g_mu = g_z + c mu and g_logvar = (g_z noise exp(logvar / 2) + c expm1(logvar)) / 2, with c the row's ``g_kl``."""
    chunk = tl.program_id(0) % chunks
    row = ((tl.program_id(0) // chunks) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    row_mask = row < rows
    element = _first_element(row, columns, first_index, SEED_PER_SAMPLE)
    shift = 0 if ALIGNED else (element % 4).to(tl.int32)
    if seed is not None:
        key = _key(seed, row, row_mask, SEED_PER_SAMPLE)
    if g_kl is not None:
        c = tl.load(g_kl + row * g_kl_stride, row_mask, other=0.0).to(COMPUTE)
    for step in range(steps):
        column = _columns(chunk, step, steps, shift, BLOCK, WIDE)
        mask = _mask(row, rows, column, columns, not ALIGNED, EVEN)
        if g_z is not None:
            upstream = tl.load(_pointers(g_z, row, column, sizes, g_z_strides), mask, other=0.0).to(COMPUTE)
        if g_mu is not None:
            grad = tl.zeros([ROWS, BLOCK], COMPUTE)
            if g_kl is not None:
                grad += c * tl.load(_pointers(mu, row, column, sizes, mu_strides), mask, other=0.0).to(COMPUTE)
            if g_z is not None:
                grad += upstream
            tl.store(_pointers(g_mu, row, column, sizes, g_mu_strides), grad.to(g_mu.dtype.element_ty), mask)
        if g_logvar is not None:
            lv = tl.load(_pointers(logvar, row, column, sizes, logvar_strides), mask, other=0.0).to(COMPUTE)
            sigma, expm1 = sigma_and_expm1(lv)
            grad = tl.zeros([ROWS, BLOCK], COMPUTE)
            if g_kl is not None:
                grad += c * expm1
            if g_z is not None:
                if eps is not None:
                    noise = tl.load(_pointers(eps, row, column, sizes, eps_strides), mask, other=0.0).to(COMPUTE)
                    grad += upstream * noise * sigma
                elif seed is not None:
                    first = element // 4 + (chunk * steps + step).to(tl.int64) * (BLOCK // 4)
                    noise = normals(key, offset, first, BLOCK, PACK, WIDE_NOISE, COMPUTE)
                    grad += upstream * noise * sigma
            tl.store(
                _pointers(g_logvar, row, column, sizes, g_logvar_strides), (0.5 * grad).to(g_logvar.dtype.element_ty), mask
            )


@triton.jit
def _residual(
    x_hat, x, g_x_hat, g_x, row, column, mask, c, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """x_hat - x of a tile; c times it goes to ``g_x_hat`` and its negative to ``g_x``, where there are such."""
    a = tl.load(_pointers(x_hat, row, column, sizes, x_hat_strides), mask, other=0.0).to(COMPUTE)
    b = tl.load(_pointers(x, row, column, sizes, x_strides), mask, other=0.0).to(COMPUTE)
    difference = a - b
    gradient = c * difference
    if g_x_hat is not None:
        tl.store(_pointers(g_x_hat, row, column, sizes, g_x_hat_strides), gradient.to(g_x_hat.dtype.element_ty), mask)
    if g_x is not None:
        tl.store(_pointers(g_x, row, column, sizes, g_x_strides), (-gradient).to(g_x.dtype.element_ty), mask)
    return difference


@triton.jit
def _nll_program(
    x_hat, x, g_x_hat, g_x, nll, kl_in, partials, pid, c, beta, precision, constant, kl_in_stride,
    rows, columns, steps, chunks, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """One program's share of the reconstruction: its part of a row's sum, or whole rows with the KL that goes with them."""
    chunk = pid % chunks
    row = ((pid // chunks) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = _columns(chunk, step, steps, 0, BLOCK, WIDE)
        mask = _mask(row, rows, column, columns, False, EVEN)
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
    chunk = pid % chunks
    row = ((pid // chunks) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = _columns(chunk, step, steps, 0, BLOCK, WIDE)
        mask = _mask(row, rows, column, columns, False, EVEN)
        m = tl.load(_pointers(mu, row, column, sizes, mu_strides), mask, other=0.0).to(COMPUTE)
        lv = tl.load(_pointers(logvar, row, column, sizes, logvar_strides), mask, other=0.0).to(COMPUTE)
        if g_mu is not None:
            tl.store(_pointers(g_mu, row, column, sizes, g_mu_strides), (c * m).to(g_mu.dtype.element_ty), mask)
        if g_logvar is not None:
            grad = 0.5 * c * sigma_and_expm1(lv)[1]
            tl.store(_pointers(g_logvar, row, column, sizes, g_logvar_strides), grad.to(g_logvar.dtype.element_ty), mask)
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
    LATENT_ROWS: tl.constexpr, LATENT_BLOCK: tl.constexpr, LATENT_EVEN: tl.constexpr, LATENT_WIDE: tl.constexpr, LATENT_SPLIT: tl.constexpr,
    LATENT_WIDTH: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """loss = weight sum_n (nll_n + beta kl_n) with its gradients: data programs first, then latent programs, then the last to
    arrive adds up what they left."""
    pid = tl.program_id(0)
    beta = _number(beta, COMPUTE)
    precision = _number(precision, COMPUTE)
    constant = _number(constant, COMPUTE)
    c = _number(weight, COMPUTE) * _number(grad_scale, COMPUTE)
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

    if _arrive(ticket, tl.num_programs(0)):
        if SPLIT:
            total = _combine(partials, nll, rows, chunks, constant, WIDTH)
            if kl_in is not None:
                total += beta * _strided_sum(kl_in, kl_in_stride, rows)
        else:
            total = _combine(partials, None, 1, programs, 0.0, 1024)
        if mu is not None:
            if LATENT_SPLIT:
                total += beta * _combine(partials + programs, kl, rows, latent_chunks, 0.0, LATENT_WIDTH)
            else:
                total += beta * _combine(partials + programs, None, 1, tl.num_programs(0) - programs, 0.0, 1024)
        if loss is not None:
            total += constant.to(tl.float64) * rows
            tl.store(loss, (_number(weight, tl.float64) * total).to(loss.dtype.element_ty))
        if g_kl is not None:
            tl.store(g_kl, (c * beta).to(g_kl.dtype.element_ty))


@triton.jit
def _strided_sum(values, stride, count):
    total = tl.zeros([1024], tl.float64)
    for first in range(0, count, 1024):
        index = first + tl.arange(0, 1024)
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
    """The gradient alone, for upstream gradients ``g_nll`` times ``factor``; with ``expected``, only where they are not that."""
    stale = True
    if expected is not None:
        stale = tl.load(g_nll).to(COMPUTE) != _number(expected, COMPUTE)
    if stale:
        chunk = tl.program_id(0) % chunks
        row = ((tl.program_id(0) // chunks) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        c = tl.load(g_nll + row * g_nll_stride, row < rows, other=0.0).to(COMPUTE) * _number(factor, COMPUTE)
        for step in range(steps):
            column = _columns(chunk, step, steps, 0, BLOCK, WIDE)
            mask = _mask(row, rows, column, columns, False, EVEN)
            _residual(
                x_hat, x, g_x_hat, g_x, row, column, mask, c, sizes, x_hat_strides, x_strides, g_x_hat_strides, g_x_strides, COMPUTE
            )


@triton.jit
def rescale_kernel(tensors, counts, upstream, expected, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """Tensor number program_id(1), dense, times upstream / expected: at once done where the two are equal."""
    g = tl.load(upstream).to(COMPUTE)
    e = _number(expected, COMPUTE)
    if g != e:
        factor = g / e
        for k in tl.static_range(len(tensors)):
            if tl.program_id(1) == k:
                for turn in range(tl.cdiv(counts[k], BLOCK * tl.num_programs(0))):
                    block = turn * tl.num_programs(0) + tl.program_id(0)
                    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                    mask = index < counts[k]
                    value = tl.load(tensors[k] + index, mask).to(COMPUTE) * factor
                    tl.store(tensors[k] + index, value.to(tensors[k].dtype.element_ty), mask)
