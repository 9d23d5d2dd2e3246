"""What instructions compute: values of the operands' types to the result's, as the PTX ISA says, rounding included."""

from __future__ import annotations

import enum
from collections.abc import Callable

import numpy as np

Values = np.ndarray

TYPES = {f"{kind}{bits}": np.dtype(f"{name}{bits}") for kind, name in (("u", "uint"), ("s", "int"), ("b", "uint"))
         for bits in (8, 16, 32, 64)} | {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"),
                                         "pred": np.dtype(bool)}  # fmt: skip
UNSIGNED = {8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
SIGNED = {8: np.dtype("i1"), 16: np.dtype("i2"), 32: np.dtype("i4"), 64: np.dtype("i8")}


# Two numbers in a register, of types that NumPy has.
PAIRS = {"f32x2": np.dtype("f4"), "s16x2": np.dtype("i2"), "u16x2": np.dtype("u2")}


class Error(enum.IntEnum):
    """Where the special-function unit's results lie: exact, or as far above or below as is documented."""

    NONE = 0
    ABOVE = 1
    BELOW = -1


def bits_of(values: Values) -> Values:
    """Values as unsigned integers of as many bits."""
    return values if values.dtype == bool else values.view(UNSIGNED[8 * values.itemsize])


def fused(a: Values, b: Values, c: Values) -> Values:
    """a b + c, rounded once."""
    if a.dtype == np.float32:
        return (a.astype("f8") * b + c).astype("f4")
    # The product's error, by halves of 26 bits (Dekker 1971), and the sum's (Knuth): then what is lost is below the rounding.
    product, total = a * b, a * b + c
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    other = total - product
    rest = (product - (total - other)) + (c - other)
    exact = total + (rest + lost)
    return np.where(np.isfinite(exact), exact, total)


def fused_down(a: Values, b: Values, c: Values) -> Values:
    """a b + c of float32, rounded down."""
    exact = a.astype("f8") * b + c
    found = exact.astype("f4")
    return np.where(found > exact, np.nextafter(found, np.float32(-np.inf)), found)


def saturated(a: Values) -> Values:
    """``.sat``: within [0, 1]; NaN is 0."""
    return np.where(np.isnan(a), 0, np.clip(a, 0, 1)).astype(a.dtype)


def _halves(a: Values) -> tuple[Values, Values]:
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def flushed(values: Values) -> Values:
    """``.ftz``: subnormals are zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(values.dtype).tiny, values * 0, values)


def to_bfloat16(values: Values) -> Values:
    """The upper half of float32, rounded to nearest even; NaN is 0x7fff."""
    word = values.view("u4").astype("u8")
    rounded = (word + 0x7FFF + ((word >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype("u2")


def from_bfloat16(words: Values) -> Values:
    return (words.astype("u4") << np.uint32(16)).view("f4")


def parts(words: Values, kind: str) -> list[Values]:
    """The numbers of words of several, the lowest first; bfloat16 as float32."""
    if kind in PAIRS:
        return list(np.ascontiguousarray(words.view(PAIRS[kind]).reshape(-1, 2).T))
    halves = words.view("u2").reshape(len(words), -1).T
    return [from_bfloat16(h) if kind.startswith("bf16") else np.ascontiguousarray(h).view("f2") for h in halves]


def joined(numbers: list[Values], kind: str) -> Values:
    """Words of such numbers."""
    if kind in PAIRS:
        pairs = np.ascontiguousarray(np.stack(numbers, axis=1))
        return pairs.view(UNSIGNED[16 * pairs.itemsize])[:, 0]
    halves = [to_bfloat16(n) if kind.startswith("bf16") else n.astype("f2").view("u2") for n in numbers]
    return np.ascontiguousarray(np.stack(halves, axis=1)).view(UNSIGNED[16 * len(halves)])[:, 0]


def _lg2(x: Values, error: Error) -> Values:
    exact = np.log2(x.astype("f8"))
    near = (x > 0.5) & (x < 2)
    return exact + error * 2.0**-22 * np.where(near, 1, np.where(np.isfinite(exact), np.abs(exact), 0))


def _ulps(exact: Values, count: int) -> Values:
    ulp = np.spacing(np.abs(exact).astype("f4")).astype("f8")
    return np.where(np.isfinite(ulp), exact + count * ulp, exact)


# The documented errors: CUDA C++ Programming Guide, "Mathematical Functions" (exp2f, 2 ulp; 1 / x, 1 ulp) and, for sine and
# cosine within pi, "Intrinsic Functions"; for the root, PTX ISA 8.7.
APPROXIMATE: dict[str, Callable[[Values, Error], Values]] = {
    "lg2": _lg2,
    "ex2": lambda x, error: _ulps(np.exp2(x.astype("f8")), 2 * error),
    "sqrt": lambda x, error: np.sqrt(x.astype("f8")) * (1 + error * 2.0**-23),
    "rcp": lambda x, error: _ulps(1 / x.astype("f8"), error),
    "sin": lambda x, error: np.sin(x.astype("f8")) + error * 2.0**-21.4,
    "cos": lambda x, error: np.cos(x.astype("f8")) + error * 2.0**-21.2,
}


def approximate(name: str, x: Values, error: Error) -> Values:
    if x.dtype == np.float64:
        # rcp.approx.ftz.f64 has the upper half of a result alone.
        return ((1 / x).view("u8") & np.uint64(0xFFFFFFFF00000000)).view("f8")
    return flushed(APPROXIMATE[name](flushed(x), error).astype("f4"))


def shift(name: str, a: Values, by: Values) -> Values:
    """Shifts by as much as the width or more empty the register, but for the sign of an arithmetic one."""
    width = 8 * a.itemsize
    amount = np.minimum(by, width - 1).astype(a.dtype)
    shifted = a << amount if name == "shl" else a >> amount
    return shifted if a.dtype.kind == "i" else np.where(by >= width, 0, shifted).astype(a.dtype)


def field(a: Values, start: Values, length: Values) -> Values:
    """``bfe``: ``length`` bits from ``start`` on, signed where ``a`` is."""
    width = 8 * a.itemsize
    start, length = (np.minimum(v & 0xFF, width).astype("u8") for v in (start, length))
    left = np.maximum(width - (start + length).astype("i8"), 0)
    length = np.minimum(length, width - start)
    moved = shift("shl", a, left.astype("u4"))
    return shift("shr", moved, (width - length).astype("u4"))


def permuted(a: Values, b: Values, selector: Values) -> Values:
    """``prmt``: four bytes of the eight of ``b`` and ``a``, or their signs."""
    both = a.astype("u8") | b.astype("u8") << np.uint64(32)
    found = np.zeros_like(a)
    for k in range(4):
        chosen = (selector >> np.uint32(4 * k)) & np.uint32(15)
        byte = (both >> ((chosen & np.uint32(7)).astype("u8") * np.uint64(8)) & np.uint64(0xFF)).astype("u4")
        byte = np.where(chosen & 8, np.where(byte & 0x80, 0xFF, 0), byte).astype("u4")
        found |= byte << np.uint32(8 * k)
    return found


def compared(how: str, a: Values, b: Values) -> Values:
    """``setp``: ordered comparisons are false with a NaN, those that end in u true."""
    if how in ("num", "nan"):
        unordered = np.isnan(a) | np.isnan(b)
        return unordered if how == "nan" else ~unordered
    names = {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
    found = getattr(np, names[how[:2]])(a, b)
    if a.dtype.kind != "f":
        return found
    unordered = np.isnan(a) | np.isnan(b)
    return found | unordered if how[2:] == "u" else found & ~unordered


def _remainder(a: Values, b: Values) -> Values:
    return a - _divided(a, b) * b


def _divided(a: Values, b: Values) -> Values:
    if a.dtype.kind == "f":
        return a / b
    # Towards zero; Python's goes down.
    quotient = np.abs(a.astype("f8") if a.itemsize < 8 else a) // np.abs(b.astype("f8") if b.itemsize < 8 else b)
    signs = np.sign(a.astype("f8")) * np.sign(b.astype("f8")) if a.dtype.kind == "i" else 1
    return (quotient * signs).astype(a.dtype) if a.itemsize < 8 else quotient.astype(a.dtype) * np.asarray(signs, a.dtype)


COMPUTED: dict[str, Callable[..., Values]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": fused, "div": _divided, "rem": _remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
    "abs": np.abs, "neg": np.negative, "sqrt": np.sqrt, "rcp": np.reciprocal,
    # A NaN gives way to a number, unless it is asked for.
    "min": np.fmin, "max": np.fmax,
}  # fmt: skip
DOWN = {"fma": fused_down}
NAN = {"min": np.minimum, "max": np.maximum}
