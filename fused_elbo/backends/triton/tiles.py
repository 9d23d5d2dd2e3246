"""What the kernels share: which elements a program's tile holds, and the sums that programs leave for the last to arrive.

A tensor of N samples is seen as rows; a program takes ROWS rows or, of one row, ``steps`` tiles of BLOCK columns. Strides come
as tuples, the row's first; ``sizes`` are the sizes of a row's dimensions that could not be merged. The grid depends on shapes
alone: same inputs, same bits.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED

# Elements of the tile in which partial sums are added up.
COMBINE_TILE = tl.constexpr(1024)


@triton.jit
def number(value, dtype: tl.constexpr):
    """A float argument, or the element that a pointer argument points at."""
    if isinstance(value, float):
        # In the interpreter alone a float argument stays Python's.
        return tl.full([], value, dtype)
    elif value.dtype.is_ptr():
        return tl.load(value).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def pointers(base, row, column, sizes, strides):
    """Pointers to columns (1 or ROWS, BLOCK) of rows (ROWS, 1)."""
    count: tl.constexpr = len(sizes)
    offset = column * 0
    for k in tl.static_range(count - 1, 0, -1):
        offset += (column % sizes[k]) * strides[k + 1]
        column = column // sizes[k]
    return base + row * strides[0] + (offset + column * strides[1])


@triton.jit
def _converted(value, dtype: tl.constexpr):
    """The value in ``dtype``, between float64 and 16 bits by way of float32: the interpreter knows no other."""
    if value.dtype.primitive_bitwidth * dtype.primitive_bitwidth == 64 * 16:
        return value.to(tl.float32).to(dtype)
    else:
        return value.to(dtype)


@triton.jit
def load(base, row, column, row_mask, mask, sizes, strides, dtype: tl.constexpr):
    """A tile in ``dtype``, (ROWS, BLOCK); (ROWS, 1) where ``strides`` is the row's alone, that is one value a row."""
    if len(strides) == 1:
        return _converted(tl.load(base + row * strides[0], row_mask, other=0), dtype)
    else:
        return _converted(tl.load(pointers(base, row, column, sizes, strides), mask, other=0), dtype)


@triton.jit
def store(base, row, column, mask, sizes, strides, value):
    """A tile into memory of any dtype."""
    where = pointers(base, row, column, sizes, strides)
    if INTERPRETED and where.dtype.element_ty == tl.bfloat16:
        # The interpreter cuts off what hardware rounds: half of the last place is added first, towards even.
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        value = tl.where(value == value, rounded, value.to(tl.float32))
    tl.store(where, _converted(value, where.dtype.element_ty), mask)


@triton.jit
def share_of(pid, chunks, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Which part of a row, and which rows (ROWS, 1), are program ``pid``'s."""
    group = pid // chunks
    if WIDE:
        group = group.to(tl.int64)
    return pid % chunks, (group * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)


@triton.jit
def columns_of(chunk, step, steps, shift, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Columns (1, BLOCK) of a program's tile; ``shift`` columns before a row's first, so that noise blocks are whole."""
    tile = chunk * steps + step
    if WIDE:
        tile = tile.to(tl.int64)
    return tile * BLOCK + tl.arange(0, BLOCK)[None, :] - shift


@triton.jit
def mask_of(row, rows, column, columns, SHIFTED: tl.constexpr, EVEN: tl.constexpr):
    """Which of a tile's elements exist; EVEN says all do, which spares the loads a predicate and a default each."""
    if EVEN:
        return tl.full([row.shape[0], column.shape[1]], True, tl.int1)
    else:
        mask = (row < rows) & (column < columns)
        if SHIFTED:
            mask = mask & (column >= 0)
        return mask


@triton.jit
def arrive(ticket, expected):
    """True in the last of ``expected`` programs to get here, which then sees what all others have written."""
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def combine(partials, out, rows, columns, shift, WIDTH: tl.constexpr):
    """Total of ``partials`` (rows, columns), in float64 and in a fixed order; ``out`` gets each row's sum plus ``shift``."""
    HEIGHT: tl.constexpr = COMBINE_TILE // WIDTH
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
