"""Device functions of any element: exponentials, logarithms and what is built of them, each with full relative accuracy.

Compiled, float32 uses the special-function unit for 2^v, 1/v and the logarithm of what is no normal number. Documented errors
(CUDA C++ Programming Guide, "Intrinsic Functions"): 2 ulp for 2^v, 1 ulp for 1/v. The unit's logarithm has no relative accuracy
near 1, so ours is a polynomial.
"""

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, ex2, fma, lg2, sigma_and_expm1

LOG2_E = tl.constexpr(1.4426950216293335)
# What float32 leaves of log2(e).
LOG2_E_REST = tl.constexpr(1.925963033500011e-08)
LN2 = tl.constexpr(0.6931471805599453)
# Between these exp(v) is a finite float32, or 0.
LOWEST = tl.constexpr(-104.0)
HIGHEST = tl.constexpr(88.72)
SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)
# Bits of the float32 next to sqrt(1/2), where a mantissa's range begins.
ROOT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def inverse(x):
    """1 / x, of float32 by the hardware's approximation."""
    if INTERPRETED or x.dtype == tl.float64:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x):
    """1 / x to half an ulp or little more, for what is squared or multiplied on."""
    r = inverse(x)
    if x.dtype == tl.float64:
        return r
    else:
        refined = fma(fma(-x, r, 1.0), r, r)
        # 0 and infinity have an inverse, but 0 times infinity is no correction.
        return tl.where(refined == refined, refined, r)


@triton.jit
def _exponential(v):
    """exp(v) of a float32 within bounds, which is told what the rounding of v log2(e) took."""
    power = v * LOG2_E
    rest = fma(v, LOG2_E_REST, fma(v, LOG2_E, -power))
    r = ex2(power)
    return fma(r, rest * LN2, r)


@triton.jit
def exponential(v):
    """exp(v); in float32 the largest finite number stands for all beyond."""
    if v.dtype == tl.float64:
        return tl.exp(v)
    else:
        low = tl.maximum(v, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        return _exponential(tl.minimum(low, HIGHEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def decay(a):
    """exp(-|a|)."""
    if a.dtype == tl.float64:
        return tl.exp(-tl.abs(a))
    else:
        return _exponential(-tl.minimum(tl.abs(a), -LOWEST, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def root_and_expm1(v):
    """exp(v / 2) and exp(v) - 1."""
    root, expm1 = sigma_and_expm1(v)
    if v.dtype == tl.float64:
        # Far from 0 the other form has subtracted v, and lost digits to it.
        return root, tl.where(tl.abs(v) < 1.0, expm1, tl.exp(v) - 1.0)
    else:
        return root, expm1


@triton.jit
def log1p(t):
    """ln(1 + t) for t in [-1/2, 1]."""
    if t.dtype == tl.float64:
        # What rounding did to 1 + t it did to both factors.
        w = 1.0 + t
        return tl.where(w == 1.0, t, tl.log(w) * (t / (w - 1.0)))
    else:
        # With s = t / (2 + t), 2 atanh(s) = t - s (t - R(s^2)): minimax of R, 5e-9 of the logarithm.
        s = t * inverse(2.0 + t)
        square = s * s
        r = 0.280244586450981235 * square + 0.279991411319554426
        r = r * square + 0.400216990541890864
        r = r * square + 0.666664131328513761
        return t - s * (t - square * r)


@triton.jit
def log_from_1(t):
    """ln(1 + t) for t >= 0; from 1 on the hardware's logarithm has relative accuracy."""
    if t.dtype == tl.float64:
        return tl.where(t <= 1.0, log1p(tl.where(t <= 1.0, t, 0.0)), tl.log(1.0 + t))
    else:
        return tl.where(t <= 1.0, log1p(t), lg2(1.0 + t) * LN2)


@triton.jit
def log_of(ratio, t):
    """ln(ratio), of which ``t`` is ratio - 1, exact also where the ratio is next to 1."""
    near = (t >= -0.5) & (t <= 1.0)
    if t.dtype == tl.float64:
        return tl.where(near, log1p(tl.where(near, t, 0.0)), tl.log(ratio))
    else:
        bits = ratio.to(tl.int32, bitcast=True)
        exponent = (bits - ROOT_HALF_BITS) >> 23
        mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
        value = fma(tl.where(near, 0.0, exponent.to(tl.float32)), LN2, log1p(tl.where(near, t, mantissa - 1.0)))
        return tl.where((ratio >= SMALLEST_NORMAL) & (ratio < float("inf")), value, lg2(ratio) * LN2)


@triton.jit
def logistic(a):
    """sigmoid(|a|), sigmoid(-|a|) and softplus(-|a|)."""
    e = decay(a)
    large = inverse(1.0 + e)
    return large, e * large, log1p(e)


@triton.jit
def sigmoid(a):
    large, small, _ = logistic(a)
    return tl.where(a >= 0, large, small)


@triton.jit
def softplus(a):
    return tl.maximum(a, 0.0) + logistic(a)[2]


@triton.jit
def tanh_and_slope(a):
    """tanh(a) and its derivative 1 / cosh(a)^2."""
    e, expm1 = root_and_expm1(-2.0 * tl.abs(a))
    q = inverse(2.0 + expm1)
    y = -expm1 * q
    return tl.where(a < 0, -y, y), 4.0 * (e * q) * (e * q)
