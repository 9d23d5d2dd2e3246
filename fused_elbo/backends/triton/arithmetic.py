"""Device functions: the noise stream and the exponentials of the latent kernels, element by element.

Compiled, float32 uses the special-function unit's logarithm, root, sine and cosine. Their documented errors (CUDA C++
Programming Guide, "Intrinsic Functions": 2^-22 for __log2f near 1, 2^-21.4 for __sinf and 2^-21.2 for __cosf within pi) leave
the normals within 9e-6 of exact, under the 1e-5 that backends share. Triton's interpreter takes NumPy's.
"""

import triton
import triton.language as tl

TWO_PI = tl.constexpr(6.283185307179586)
PI = tl.constexpr(3.141592653589793)

# lg2.approx is off by at most 2^-22 near u = 1, 3.31e-7 of -2 ln u: this much less, it is a lower bound there.
LOG_MARGIN = tl.constexpr(3.4e-7)

# exp(v/2) = 2^(2m) exp(y/2) with m = rint(v / (4 ln 2)) and y = v - m 4 ln 2. Fused, y is off by what float32 leaves of
# 4 ln 2 alone: 8e-9 m, worth 2e-7 of exp(v) at |v| = 80.
STEP = tl.constexpr(2.772588722239781)
# Adding 1.5 2^23 rounds to an integer and leaves it in the low bits.
ROUNDER = tl.constexpr(12582912.0)
# Beyond, exp(v/2) is inf, or below 1.2e-38 and taken for 0; 2^(2m - 1) would leave the exponent's bits.
LOWEST = tl.constexpr(-174.6)
HIGHEST = tl.constexpr(178.0)
# m is 0 here, so exp(v) - 1 can be put together from parts that are small with v.
NEAR = tl.constexpr(1.38)
SERIES_TERMS = tl.constexpr(18)
MINUS_FOUR = tl.constexpr(-0x3F800000)  # the bits of -4.0


INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def lg2(x):
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def ex2(x):
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sqrt(x):
    if INTERPRETED:
        return tl.sqrt(x)
    else:
        return tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _sin(x):
    if INTERPRETED:
        return tl.sin(x)
    else:
        return tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _cos(x):
    if INTERPRETED:
        return tl.cos(x)
    else:
        return tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fma(a, b, c):
    """a b + c, rounded once. The interpreter would round twice."""
    if INTERPRETED:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 words; one widening multiply gives both halves of a product."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    return word.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def _box_muller(radius_word, angle_word, dtype: tl.constexpr):
    # The angle is centred, so that the argument of sine and cosine stays within pi: both then change sign.
    u = uniform(radius_word).to(dtype)
    if dtype == tl.float64:
        r = tl.sqrt(-2.0 * tl.log(u))
        sine, cosine = _half_angle((uniform(angle_word).to(dtype) - 0.5) * PI)
        return r * (2.0 * sine * sine - 1.0), -2.0 * r * sine * cosine
    else:
        # Near u = 1 the hardware's logarithm has no relative accuracy, but 2 (1 - u), a lower bound of -2 ln u, has. They
        # change over where they differ by the margin, near r = 0.04: r is off by 9e-6 at most there, by far less elsewhere.
        r = _sqrt(tl.maximum(2.0 - 2.0 * u, lg2(u) * -1.3862943611198906 - LOG_MARGIN))
        # pi - 2 pi u in one step: it spares the rounding of u, which is worth 2e-7 here.
        angle = angle_word.to(tl.float32) * (-TWO_PI * 2.0**-32) + (PI - TWO_PI * 2.0**-33)
        return -(r * _cos(angle)), r * _sin(angle)


@triton.jit
def _half_angle(a):
    """sin(a), cos(a) in float64 for |a| <= pi/2 by their series: the library's own reduce any argument, through memory."""
    square = a * a
    sine = tl.zeros_like(a)
    cosine = tl.zeros_like(a)
    for k in tl.static_range(12, 0, -1):
        sine = (1.0 - sine) * square / ((2 * k) * (2 * k + 1))
        cosine = (1.0 - cosine) * square / ((2 * k - 1) * (2 * k))
    return a * (1.0 - sine), 1.0 - cosine


@triton.jit
def _four(c0, c1, c2, c3, k0, k1, dtype: tl.constexpr):
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    n0, n1 = _box_muller(w0, w1, dtype)
    n2, n3 = _box_muller(w2, w3, dtype)
    return n0, n1, n2, n3


@triton.jit
def _counter(first, i, WIDE: tl.constexpr):
    """Low and high word of the block index ``first + i``; one word unless WIDE."""
    if WIDE:
        block = first + i
        return block.to(tl.uint32), (block >> 32).to(tl.uint32)
    low = first.to(tl.uint32) + i.to(tl.uint32)
    return low, tl.zeros_like(low)


@triton.jit
def normals(
    key, offset_low, offset_high, first, BLOCK: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr, dtype: tl.constexpr
):
    """Tile (ROWS, BLOCK) of normals; ``key`` and ``first``, the row's first block index, are (ROWS, 1) int64.

    PACK consecutive elements, 4 or 8, come from one thread: as many as its 16-byte accesses hold, so that nothing is exchanged.
    """
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c2 = offset_low.to(tl.uint32)
    c3 = offset_high.to(tl.uint32)
    if PACK == 8:
        i = 2 * tl.arange(0, BLOCK // 8)[None, :]
        low, high = _counter(first, i, WIDE)
        n0, n1, n2, n3 = _four(low, high, c2, c3, k0, k1, dtype)
        low, high = _counter(first, i + 1, WIDE)
        n4, n5, n6, n7 = _four(low, high, c2, c3, k0, k1, dtype)
        even = tl.join(tl.join(n0, n4), tl.join(n2, n6))
        odd = tl.join(tl.join(n1, n5), tl.join(n3, n7))
    else:
        low, high = _counter(first, tl.arange(0, BLOCK // 4)[None, :], WIDE)
        n0, n1, n2, n3 = _four(low, high, c2, c3, k0, k1, dtype)
        even = tl.join(n0, n2)
        odd = tl.join(n1, n3)
    return tl.reshape(tl.join(even, odd), [first.shape[0], BLOCK])


@triton.jit
def normal_at(key, offset_low, offset_high, index, dtype: tl.constexpr):
    """The normals of any element numbers, each from a block of its own: four times the work of ``normals``."""
    block = index >> 2
    w0, w1, w2, w3 = philox4x32(
        block.to(tl.uint32), (block >> 32).to(tl.uint32), offset_low.to(tl.uint32), offset_high.to(tl.uint32),
        key.to(tl.uint32), (key >> 32).to(tl.uint32),
    )  # fmt: skip
    second = (index & 2) != 0
    even, odd = _box_muller(tl.where(second, w2, w0), tl.where(second, w3, w1), dtype)
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def _half_exponential(v):
    """For float32 v: exp(v/2), and with G = 2 (exp(y/2) - 1) of the reduced argument, G and G - y."""
    clamped = tl.clamp(v, LOWEST, HIGHEST, propagate_nan=tl.PropagateNan.ALL)
    rounded = clamped * (1.0 / STEP) + ROUNDER
    m = rounded - ROUNDER
    y = fma(m, -STEP, clamped)
    # Weighted minimax for (exp(y/2) - 1 - y/2) 2 / y^2 on |y| <= 2 ln 2: 2.5e-7 of the tail, and 2.5e-8 of exp(y/2).
    p = 0.000196105010768426394 / 64 * y + 0.00140776732964131346 / 32
    p = p * y + 0.00833561180040253582 / 16
    p = p * y + 0.0416629778878842718 / 8
    p = p * y + 0.166666356976154361 / 4
    p = p * y + 0.500000117034940198 / 2
    tail = y * y * p
    g = y + tail
    half_power = ((rounded.to(tl.int32, bitcast=True) << 24) + 0x3F000000).to(tl.float32, bitcast=True)
    return half_power * (g + 2.0), g, tail


@triton.jit
def _excess64(v):
    """expm1(v) - v in float64."""
    # Not tl.clamp: in float64 it compiles to an instruction that there is not.
    near = tl.minimum(tl.maximum(v, -1.0), 1.0)
    series = tl.zeros_like(v)
    for k in tl.static_range(SERIES_TERMS + 1, 2, -1):
        series = (series + 1.0) * near / k
    return tl.where(tl.abs(v) < 1.0, 0.5 * near * near * (1.0 + series), (tl.exp(v) - 1.0) - v)


@triton.jit
def _rough_sigma_and_excess(v):
    """For a v that was rounded to 16 bits, to which these add nothing: the excess is within 1.4e-6 for |v| <= 8, 6.4e-6 for
    |v| <= 80, the hardware's power of two within 2 units in the last place."""
    sigma = ex2(0.7213475204444817 * v)
    # (exp(v) - 1 - v) / (v^2 exp(v/2)) for v in [-1, 3), minimax: 2.3e-7. Elsewhere the difference cancels little.
    p = 1.1021014804e-6 * v - 1.78035821997e-5
    p = p * v + 0.000260452237195
    p = p * v - 0.00208452004213
    p = p * v + 0.0208337527667
    p = p * v - 0.0833329600958
    p = p * v + 0.499999934416
    minus = -1.0 - v
    # One comparison for -4 < minus < 0: as integers, negative floats are the smallest, from -0 upwards.
    near = minus.to(tl.int32, bitcast=True) < MINUS_FOUR
    return sigma, tl.where(near, v * v * sigma * p, sigma * sigma + minus)


@triton.jit
def sigma_and_excess(v, NARROW: tl.constexpr = False):
    """exp(v/2) and expm1(v) - v for a log-variance v. NARROW: it has 16 bits."""
    if v.dtype == tl.float64:
        return tl.exp(0.5 * v), _excess64(v)
    elif NARROW:
        return _rough_sigma_and_excess(v)
    else:
        sigma, g, tail = _half_exponential(v)
        return sigma, tl.where(tl.abs(v) < NEAR, 0.25 * g * g + tail, (sigma * sigma - 1.0) - v)


@triton.jit
def sigma_and_expm1(v):
    """exp(v/2) and expm1(v) for a log-variance v."""
    if v.dtype == tl.float64:
        return tl.exp(0.5 * v), _excess64(v) + v
    else:
        sigma, g, _ = _half_exponential(v)
        return sigma, tl.where(tl.abs(v) < NEAR, 0.25 * g * g + g, sigma * sigma - 1.0)
