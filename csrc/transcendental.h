// Exponential and logarithm, and what follows from them, over the whole range of numbers: for what elbo_math.h's own, which are
// made for one formula each, do not reach.
//
// A function's error is stated in units in the last place, the worst of millions of arguments over its whole range against
// 80-bit arithmetic: of float32, and in parentheses of float64. NaN stays NaN.
#pragma once

#include "elbo_math.h"

namespace fused_elbo {

template <class Scalar>
struct Elementary;

template <>
struct Elementary<float> {
  // Adding 1.5 2^23 rounds to an integer and leaves it in the low bits; 2^23 makes a number of an integer in them.
  static constexpr float rounder = 12582912.0f, integers = 8388608.0f;
  static constexpr uint32_t integers_bits = 0x4B000000;
  // ln 2 in two parts, the first of so few bits that its product with an exponent is exact.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, per_ln2 = 1.44269504088896341f;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr uint32_t one = 0x3F800000, half = 0x3F000000, root_half = 0x3F3504F3, fraction = 0x007FFFFF;
  // Beyond, exp(v) is 0 or inf; below the third, exp(v) - 1 is -1.
  static constexpr float lowest = -104.0f, highest = 89.0f, lowest_expm1 = -87.0f;
  static constexpr float smallest_normal = 0x1p-126f, subnormal_scale = 0x1p24f, subnormal_exponent = 24.0f;

  // (exp(r) - 1 - r) / r^2, minimax: 1.4e-8 of exp(r) - 1.
  template <class V>
  static FE_FN V expm1_tail(V r) {
    return polynomial(r, 0.00139467826156f, 0.00836677615039f, 0.041666277586f, 0.16666541563f, 0.5000000063f);
  }

  // ln(1 + f) - f + f^2/2, minimax: 6e-9 of ln(1 + f).
  template <class V>
  static FE_FN V log_tail(V f, V square) {
    return square * f *
           polynomial(f, -0.0785966638266f, 0.128816194042f, -0.131287199788f, 0.141811948674f, -0.166245583087f,
                      0.20002286203f, -0.250008102616f, 0.333333167269f);
  }

  // ln(1 + t) for t in [0, 1], minimax: 5e-9.
  template <class V>
  static FE_FN V log1p(V t) {
    const V tail = polynomial(t, -0.0034148331836f, 0.0206352129834f, -0.0584647518698f, 0.107605336276f, -0.154017696846f,
                              0.197110752739f, -0.249615204152f, 0.333307770409f, -0.499999410128f);
    return Real<V>::mad(t * t, tail, t);
  }
};

template <>
struct Elementary<double> {
  static constexpr double rounder = 6755399441055744.0, integers = 4503599627370496.0;
  static constexpr uint64_t integers_bits = 0x4330000000000000;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double per_ln2 = 1.44269504088896341;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr uint64_t one = 0x3FF0000000000000, half = 0x3FE0000000000000, root_half = 0x3FE6A09E667F3BCD,
                            fraction = 0x000FFFFFFFFFFFFF;
  static constexpr double lowest = -746.0, highest = 710.0, lowest_expm1 = -708.0;
  static constexpr double smallest_normal = 0x1p-1022, subnormal_scale = 0x1p54, subnormal_exponent = 54.0;

  // The Taylor series: its first term left out is 5e-18 of exp(r) - 1.
  template <class V>
  static FE_FN V expm1_tail(V r) {
    return polynomial(r, 1 / 87178291200.0, 1 / 6227020800.0, 1 / 479001600.0, 1 / 39916800.0, 1 / 3628800.0, 1 / 362880.0,
                      1 / 40320.0, 1 / 5040.0, 1 / 720.0, 1 / 120.0, 1 / 24.0, 1 / 6.0, 1 / 2.0);
  }

  // With s = f / (2 + f), |s| < 0.172, ln(1 + f) = 2 artanh(s), which is f - f^2/2 + s (f^2/2 + 2 (artanh(s) - s) / s).
  template <class V>
  static FE_FN V log_tail(V f, V square) {
    using R = Real<V>;
    const V s = f / (R::of(2.0) + f), s2 = s * s;
    const V rest = s2 * polynomial(s2, 2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7,
                                   2.0 / 5, 2.0 / 3);
    return s * R::mad(R::of(0.5), square, rest);
  }

  // The same series, with s in [0, 1/3].
  template <class V>
  static FE_FN V log1p(V t) {
    using R = Real<V>;
    const V s = t / (R::of(2.0) + t), s2 = s * s;
    const V rest = s2 * polynomial(s2, 2.0 / 33, 2.0 / 31, 2.0 / 29, 2.0 / 27, 2.0 / 25, 2.0 / 23, 2.0 / 21, 2.0 / 19, 2.0 / 17,
                                   2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3);
    return R::mad(s, rest, s + s);
  }
};

// v = n ln 2 + r with |r| <= ln(2) / 2: expm1 is exp(r) - 1, and `rounded` holds n in its low bits.
template <class V>
struct ReducedExponential {
  V expm1, rounded;
};

template <class V>
FE_FN ReducedExponential<V> reduced_exponential(V v) {
  using R = Real<V>;
  using E = Elementary<typename R::Scalar>;
  const V rounded = R::mad(v, R::of(E::per_ln2), R::of(E::rounder));
  const V n = rounded - R::of(E::rounder);
  const V r = R::mad(n, R::of(-E::ln2_low), R::mad(n, R::of(-E::ln2_high), v));
  return {R::mad(r * r, E::expm1_tail(r), r), rounded};
}

// exp(v), subnormal results included: 1.1 (1.0).
template <class V>
FE_FN V exponential(V v) {
  using R = Real<V>;
  using E = Elementary<typename R::Scalar>;
  const auto e = reduced_exponential(R::clamp(v, E::lowest, E::highest));
  // 2^n in two factors, since n reaches beyond the exponents of normal numbers.
  const auto n = R::bits(e.rounded), half = n >> 1;
  const V first = R::number((half << E::mantissa) + E::one), second = R::number(((n - half) << E::mantissa) + E::one);
  return (e.expm1 + R::of(1)) * first * second;
}

template <class V>
struct ExponentialPair {
  V exp;    // 0 for v below lowest_expm1
  V expm1;  // 1.8 (1.9)
};

// exp(v) and exp(v) - 1.
template <class V>
FE_FN ExponentialPair<V> exponential_pair(V v) {
  using R = Real<V>;
  using E = Elementary<typename R::Scalar>;
  const auto e = reduced_exponential(R::clamp(v, E::lowest_expm1, E::highest));
  // Half of both, since 2^n may be beyond the largest number where they are not.
  const V half_power = R::number((R::bits(e.rounded) << E::mantissa) + E::half);
  const V exp = half_power * (e.expm1 + R::of(1)), expm1 = R::mad(half_power, e.expm1, half_power - R::of(0.5f));
  return {v < R::of(E::lowest_expm1) ? R::of(0) : exp + exp, expm1 + expm1};
}

// ln v, to full relative accuracy near 1 too: 0.9 (0.9). -inf for 0, NaN below.
template <class V>
FE_FN V logarithm(V v) {
  using R = Real<V>;
  using E = Elementary<typename R::Scalar>;
  const auto subnormal = v < R::of(E::smallest_normal);
  const V normal = subnormal ? v * R::of(E::subnormal_scale) : v;
  // v = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const auto shifted = R::bits(normal) + (E::one - E::root_half);
  const V biased = R::number((shifted >> E::mantissa) | E::integers_bits) - R::of(E::integers + E::bias);
  const V e = subnormal ? biased - R::of(E::subnormal_exponent) : biased;
  const V f = R::number((shifted & E::fraction) + E::root_half) - R::of(1);
  const V square = f * f;
  const V rest = R::mad(e, R::of(E::ln2_low), E::log_tail(f, square)) - R::of(0.5f) * square;
  const V found = R::mad(e, R::of(E::ln2_high), f + rest);
  const V infinity = R::of(static_cast<typename R::Scalar>(__builtin_inf()));
  const V nan = R::of(static_cast<typename R::Scalar>(__builtin_nan("")));
  const V outside = v == R::of(0) ? -infinity : (v == infinity ? v : nan);
  return v > R::of(0) ? (v < infinity ? found : outside) : outside;
}

// Of a number in [1, 2].
template <class V>
FE_FN V reciprocal(V v) {
  return Real<V>::of(1) / v;
}

template <class V>
struct Logistic {
  V softplus;    // ln(1 + exp(a)): 2.3 (2.6)
  V sigmoid;     // of a: 2.9 (2.8)
  V complement;  // sigmoid(-a)
  V beyond;      // softplus - max(a, 0), the same for -a
};

template <class V>
FE_FN Logistic<V> logistic(V a) {
  using R = Real<V>;
  using E = Elementary<typename R::Scalar>;
  const auto negative = a < R::of(0);
  const V t = exponential(negative ? a : -a);
  const V larger = reciprocal(R::of(1) + t), smaller = t * larger;
  const V log1p = E::log1p(t);
  return {negative ? log1p : a + log1p, negative ? smaller : larger, negative ? larger : smaller, log1p};
}

template <class V>
struct HyperbolicTangent {
  V value;  // 3.0 (3.2)
  V slope;  // 1 - value^2: 5.9 (5.4)
};

template <class V>
FE_FN HyperbolicTangent<V> hyperbolic_tangent(V a) {
  using R = Real<V>;
  const auto negative = a < R::of(0);
  const V twice = a + a;
  // tanh |a| = (1 - t) / (1 + t) and its slope 4 t / (1 + t)^2 with t = exp(-2 |a|).
  const auto t = exponential_pair(negative ? twice : -twice);
  const V q = reciprocal(R::of(2) + t.expm1);
  const V value = t.expm1 * q;
  return {negative ? value : -value, R::of(4) * t.exp * q * q};
}

}  // namespace fused_elbo
