"""Any likelihood: the elements' terms by family, their sums over each row and their gradients, in one pass.

A row is a pair (a, b): ``outer_strides`` are those of a, one a tensor, and the first of a tensor's own strides is that of b.
"""

import triton
import triton.language as tl

from .functions import decay, exponential, inverse, log_from_1, logistic, root_and_expm1, tanh_and_slope
from .tiles import arrive, columns_of, combine, load, mask_of, number, store

LAST_LEVEL = tl.constexpr(255)


@triton.jit
def _activated(a, ACTIVATION: tl.constexpr):
    """activation(a) and its derivative."""
    if ACTIVATION == "sigmoid":
        large, small, _ = logistic(a)
        return tl.where(a >= 0, large, small), large * small
    elif ACTIVATION == "tanh":
        return tanh_and_slope(a)
    else:
        return a, 1.0


@triton.jit
def _bernoulli(a, x):
    _, small, rest = logistic(a)
    # For x = 1 and a large logit, softplus(a) - a and sigmoid(a) - 1 in the form that keeps what is left of them.
    value = (tl.maximum(a, 0.0) - x * a) + rest
    return value, tl.where(a >= 0, (1.0 - x) - small, small - x), tl.zeros_like(a)


@triton.jit
def _discretized_logistic(y, level, precision, scale, shift):
    width = scale * precision
    centre = (scale * level + shift - y) * precision
    first = level == 0
    last = level == LAST_LEVEL
    edge = first | last
    # Of the first and last level, the side that is open is infinitely far.
    upper = tl.where(last, float("inf"), centre + 0.5 * width)
    lower = tl.where(first, float("inf"), 0.5 * width - centre)
    upper_decay = decay(upper)
    lower_decay = decay(lower)
    root, expm1 = root_and_expm1(-width)
    width_decay = tl.where(edge, 0.0, root * root)
    inside = tl.where(edge, 1.0, inverse(-expm1))
    # softplus(-upper) + softplus(-lower) - ln(1 - exp(-width)), of which one logarithm takes what is not linear: that of
    # (1 + upper_decay) (1 + lower_decay) / (1 - width_decay), which is 1 + t, and t a sum of what is positive.
    t = (upper_decay + lower_decay * (1.0 + upper_decay) + width_decay) * inside
    value = tl.maximum(-upper, 0.0) + tl.maximum(-lower, 0.0) + log_from_1(t)
    large = inverse(1.0 + upper_decay)
    beyond = tl.where(upper >= 0, upper_decay * large, large)
    large = inverse(1.0 + lower_decay)
    before = tl.where(lower >= 0, lower_decay * large, large)
    by_centre = before - beyond
    by_width = -0.5 * (before + beyond) - width_decay * inside
    return value, -by_centre * precision, -(by_centre * centre + by_width * width)


@triton.jit
def _terms(y, x, precision, scale, shift, FAMILY: tl.constexpr):
    """Of each element, precision = exp(-log_scale): the negative log-likelihood, of a gaussian or laplace without what does
    not depend on the data, and its derivatives by y and log_scale."""
    if FAMILY == "bernoulli":
        return _bernoulli(y, x)
    elif FAMILY == "discretized_logistic":
        return _discretized_logistic(y, x, precision, scale, shift)
    elif FAMILY == "gaussian":
        residual = (y - x) * precision
        square = residual * residual
        return 0.5 * square, residual * precision, 1.0 - square
    else:
        difference = y - x
        value = tl.abs(difference) * precision
        # Where neither holds it is 0, or NaN.
        sign = tl.where(difference > 0, precision, tl.where(difference < 0, -precision, value))
        return value, sign, 1.0 - value


@triton.jit
def likelihood_kernel(
    x_hat, x, log_scale, weight, keep,  # (A, B, columns); the last three | None
    upstream,  # (A, B) | None
    g_x_hat, g_x, g_log_scale,  # (A, B, columns) | None
    nll, slope,  # (A, B) | None
    partials,  # (sums wanted, A B, chunks) | None
    ticket,  # () | None
    given_precision, constant, row_constant, scale, shift,
    rows, inner, columns, steps, chunks,
    sizes, outer_strides, x_hat_strides, x_strides, log_scale_strides, weight_strides, keep_strides,
    g_x_hat_strides, g_x_strides, g_log_scale_strides, upstream_strides,
    FAMILY: tl.constexpr, ACTIVATION: tl.constexpr, LEVELS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """nll = sum of the elements' weighted terms, slope = that of their derivatives by log_scale, and upstream times the
    gradients. ``constant`` belongs to each element, ``row_constant`` to a row; ``keep`` holds 0 where an element is masked."""
    pid = tl.program_id(0)
    if ROWS == 1:
        # All b of one part of a row follow one another: what does not depend on b comes from the cache.
        group = pid // inner
        chunk = group % chunks
        a = group // chunks + tl.arange(0, 1)[:, None]
        b = pid % inner + tl.arange(0, 1)[:, None]
    else:
        chunk = 0
        if WIDE:
            pid = pid.to(tl.int64)
        pair = pid * ROWS + tl.arange(0, ROWS)[:, None]
        a = pair // inner
        b = pair % inner
    a = a.to(tl.int64)
    b = b.to(tl.int64)
    row = a * inner + b
    row_mask = row < rows
    given_precision = number(given_precision, COMPUTE)
    constant = number(constant, COMPUTE)
    scale = number(scale, COMPUTE)
    shift = number(shift, COMPUTE)
    if upstream is not None:
        row_factor = tl.load(upstream + a * outer_strides[8] + b * upstream_strides[0], row_mask, other=0.0).to(COMPUTE)
    total = tl.zeros([ROWS, BLOCK], COMPUTE)
    slope_total = tl.zeros([ROWS, BLOCK], COMPUTE)
    for step in range(steps):
        column = columns_of(chunk, step, steps, 0, BLOCK, WIDE)
        mask = mask_of(row, rows, column, columns, False, EVEN)
        raw = load(x_hat + a * outer_strides[0], b, column, row_mask, mask, sizes, x_hat_strides, COMPUTE)
        target = load(x + a * outer_strides[1], b, column, row_mask, mask, sizes, x_strides, COMPUTE)
        if LEVELS and FAMILY != "discretized_logistic":
            target = scale * target + shift
        if log_scale is not None:
            ls = load(log_scale + a * outer_strides[2], b, column, row_mask, mask, sizes, log_scale_strides, COMPUTE)
            precision = exponential(-ls)
        else:
            precision = given_precision
        y, derivative = _activated(raw, ACTIVATION)
        value, g_y, g_scale = _terms(y, target, precision, scale, shift, FAMILY)
        if FAMILY == "gaussian" or FAMILY == "laplace":
            if log_scale is not None:
                value += ls
            value += constant
        present = mask
        if keep is not None:
            kept = load(keep + a * outer_strides[4], b, column, row_mask, mask, sizes, keep_strides, tl.int32) != 0
            present = present & kept
        if weight is not None:
            w = load(weight + a * outer_strides[3], b, column, row_mask, mask, sizes, weight_strides, COMPUTE)
            value *= w
        if nll is not None:
            total += value if EVEN and keep is None else tl.where(present, value, 0.0)
        if slope is not None:
            weighted = g_scale if weight is None else g_scale * w
            slope_total += weighted if EVEN and keep is None else tl.where(present, weighted, 0.0)
        if upstream is not None:
            factor = row_factor if weight is None else row_factor * w
            if g_x_hat is not None:
                g = factor * g_y if ACTIVATION == "identity" else factor * g_y * derivative
                g = g if keep is None else tl.where(kept, g, 0.0)
                store(g_x_hat + a * outer_strides[5], b, column, mask, sizes, g_x_hat_strides, g)
            if g_x is not None:
                g = factor * (-y if FAMILY == "bernoulli" else -g_y)
                g = g if keep is None else tl.where(kept, g, 0.0)
                store(g_x + a * outer_strides[6], b, column, mask, sizes, g_x_strides, g)
            if g_log_scale is not None:
                g = factor * g_scale
                g = g if keep is None else tl.where(kept, g, 0.0)
                store(g_log_scale + a * outer_strides[7], b, column, mask, sizes, g_log_scale_strides, g)
    index = tl.reshape(row, [ROWS])
    if SPLIT:
        slope_partials = partials
        if nll is not None:
            tl.store(partials + index * chunks + chunk, tl.sum(total, 1), index < rows)
            slope_partials += rows.to(tl.int64) * chunks
        if slope is not None:
            tl.store(slope_partials + index * chunks + chunk, tl.sum(slope_total, 1), index < rows)
        if arrive(ticket, tl.num_programs(0)):
            if nll is not None:
                combine(partials, nll, rows, chunks, number(row_constant, tl.float64), WIDTH)
            if slope is not None:
                combine(slope_partials, slope, rows, chunks, 0.0, WIDTH)
    else:
        if nll is not None:
            tl.store(nll + index, (tl.sum(total, 1) + number(row_constant, COMPUTE)).to(nll.dtype.element_ty), index < rows)
        if slope is not None:
            tl.store(slope + index, tl.sum(slope_total, 1).to(slope.dtype.element_ty), index < rows)
