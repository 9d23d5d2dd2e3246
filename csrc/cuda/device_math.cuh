// What a GPU computes in its own way: pairs of numbers, float32 exponentials and normals by the special-function unit.
#pragma once

#include "../elbo_math.h"
#include "../philox.h"
#include "hardware.cuh"

namespace fused_elbo {

template <>
struct Real<double> {
  using Scalar = double;
  using Bits = uint64_t;
  static FE_DEVICE double of(double v) { return v; }
  static FE_DEVICE double mad(double a, double b, double c) { return __fma_rn(a, b, c); }
  static FE_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
  static FE_DEVICE double root(double v) { return __dsqrt_rn(v); }
  static FE_DEVICE double clamp(double v, double low, double high) { return v < low ? low : v > high ? high : v; }
  static FE_DEVICE Bits bits(double v) { return __double_as_longlong(v); }
  static FE_DEVICE double number(Bits b) { return __longlong_as_double(b); }
};

template <>
struct Word<uint32_t> {
  static FE_DEVICE uint64_t wide(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b; }
  static FE_DEVICE uint32_t high(uint64_t product) { return static_cast<uint32_t>(product >> 32); }
  static FE_DEVICE uint32_t low(uint64_t product) { return static_cast<uint32_t>(product); }
};

FE_DEVICE Two<float> operator+(Two<float> a, Two<float> b) { return hardware::sum(a, b); }
FE_DEVICE Two<float> operator-(Two<float> a, Two<float> b) { return hardware::difference(a, b); }
FE_DEVICE Two<float> operator*(Two<float> a, Two<float> b) { return hardware::product(a, b); }
FE_DEVICE Two<double> operator+(Two<double> a, Two<double> b) { return {a.a + b.a, a.b + b.b}; }
FE_DEVICE Two<double> operator-(Two<double> a, Two<double> b) { return {a.a - b.a, a.b - b.b}; }
FE_DEVICE Two<double> operator*(Two<double> a, Two<double> b) { return {a.a * b.a, a.b * b.b}; }

template <>
struct Real<Two<float>> {
  using Scalar = float;
  static FE_DEVICE Two<float> of(float v) { return {v, v}; }
  static FE_DEVICE Two<float> mad(Two<float> a, Two<float> b, Two<float> c) { return hardware::fused(a, b, c); }
};

template <>
struct Real<Two<double>> {
  using Scalar = double;
  static FE_DEVICE Two<double> of(double v) { return {v, v}; }
  static FE_DEVICE Two<double> mad(Two<double> a, Two<double> b, Two<double> c) {
    return {__fma_rn(a.a, b.a, c.a), __fma_rn(a.b, b.b, c.b)};
  }
};

template <bool NARROW = false>
FE_DEVICE Exponentials<Two<double>> exponentials(Two<double> logvar) {
  const Exponentials<double> a = fused_elbo::exponentials(logvar.a), b = fused_elbo::exponentials(logvar.b);
  return {{a.sigma, b.sigma}, {a.expm1, b.expm1}, {a.excess, b.excess}};
}

// The hardware's power of two is off by 2 units in the last place at most (CUDA C++ Programming Guide, exp2f). With these
// counted in full, sigma is within 5e-7 for |logvar| <= 80, relative.
FE_DEVICE Two<float> sigma(Two<float> logvar) {
  using R = Real<Two<float>>;
  // exp(v/2) = 2^p exp(rest/2), rest = v - 2 p ln 2, for any p near v / (2 ln 2): so the rounding of p, which would be worth
  // 1e-6, is made good. All rests are so close that a straight line is their exponential. p is a little too large, so that the
  // line stays within [0, 1], and clamping it costs nothing: the rest of -inf is NaN, its line 0, and sigma 0. inf stays inf.
  const Two<float> v = {hardware::minimum(logvar.a, 1000.0f), hardware::minimum(logvar.b, 1000.0f)};
  const Two<float> p = R::mad(v, R::of(0.7213475204444817f), R::of(0.093111053109169f));
  const Two<float> rest = R::mad(p, R::of(-1.3862943611198906f), v);
  const float slope = 0.468749463558197f, offset = 0.9980047941207886f;
  const Two<float> line = {hardware::fused_saturated(rest.a, slope, offset), hardware::fused_saturated(rest.b, slope, offset)};
  return Two<float>{hardware::exp2(p.a), hardware::exp2(p.b)} * line;
}

// The same with p as it is rounded: within 6e-7 for |logvar| <= 8, 3.2e-6 for |logvar| <= 80.
FE_DEVICE Two<float> rough_sigma(Two<float> logvar) {
  const Two<float> p = logvar * Real<Two<float>>::of(0.7213475204444817f);
  return {hardware::exp2(p.a), hardware::exp2(p.b)};
}

// expm1 and excess are within 9.6e-7 for |logvar| <= 80. NARROW: logvar has 16 bits, to whose rounding a rough sigma adds
// nothing: expm1 and excess are within 1.4e-6 for |logvar| <= 8, 6.4e-6 for |logvar| <= 80. A pass over 16 bits has the least
// time to compute in.
template <bool NARROW = false>
FE_DEVICE Exponentials<Two<float>> exponentials(Two<float> logvar) {
  using R = Real<Two<float>>;
  const Two<float> sigma = NARROW ? rough_sigma(logvar) : fused_elbo::sigma(logvar);

  // (exp(v) - 1 - v) / (v^2 exp(v/2)) for v in [-1, 3), minimax: 2.3e-7. Elsewhere the difference cancels little.
  const Two<float> series = polynomial(logvar, 1.1021014804e-6f, -1.78035821997e-5f, 0.000260452237195f, -0.00208452004213f,
                                       0.0208337527667f, -0.0833329600958f, 0.499999934416f);
  const Two<float> near = logvar * logvar * sigma * series;
  const Two<float> minus = R::of(-1.0f) - logvar;
  const Two<float> far = R::mad(sigma, sigma, minus), far_expm1 = R::mad(sigma, sigma, R::of(-1.0f));
  // One comparison for -4 < minus < 0: as integers, negative floats are the smallest, from -0 upwards.
  const int limit = __float_as_int(-4.0f);
  const bool a = __float_as_int(minus.a) < limit, b = __float_as_int(minus.b) < limit;
  const Two<float> near_expm1 = logvar + near;
  return {sigma, {a ? near_expm1.a : far_expm1.a, b ? near_expm1.b : far_expm1.b}, {a ? near.a : far.a, b ? near.b : far.b}};
}

// The normals of a block's elements 0 and 1, 2 and 3.
template <class S>
struct Four {
  Two<S> low, high;
};

FE_DEVICE Two<float> uniforms(uint32_t a, uint32_t b) {
  using R = Real<Two<float>>;
  return R::mad({__uint2float_rn(a), __uint2float_rn(b)}, R::of(0x1p-32f), R::of(0x1p-33f));
}

FE_DEVICE Four<double> normals(const Block<uint32_t>& words, double) {
  const Two<float> radii = uniforms(words.w0, words.w2), angles = uniforms(words.w1, words.w3);
  const Pair<double> low = box_muller<double>(radii.a, angles.a - 0.5), high = box_muller<double>(radii.b, angles.b - 0.5);
  return {{low.first, low.second}, {high.first, high.second}};
}

// Documented errors of the special-function unit (CUDA C++ Programming Guide, "Intrinsic Functions": 2^-22 for __log2f near
// 1, 2^-21.4 for __sinf and 2^-21.2 for __cosf within pi) leave the normals within 9e-6 of exact.
FE_DEVICE Four<float> normals(const Block<uint32_t>& words, float) {
  using R = Real<Two<float>>;
  const Two<float> u = uniforms(words.w0, words.w2);
  // Near u = 1 the hardware's logarithm has no relative accuracy, but 2 (1 - u), a lower bound of -2 ln u, has. Less its error
  // there, 3.31e-7 of -2 ln u, the logarithm is a lower bound too. They change over near r = 0.04: r is off by 9e-6 at most
  // there, by far less elsewhere.
  const Two<float> bound = R::mad(u, R::of(-2.0f), R::of(2.0f));
  const Two<float> logarithm = R::mad({hardware::log2(u.a), hardware::log2(u.b)}, R::of(-1.3862943611198906f), R::of(-3.4e-7f));
  const Two<float> r = {hardware::root(fmaxf(bound.a, logarithm.a)), hardware::root(fmaxf(bound.b, logarithm.b))};
  // pi - 2 pi u in one step: it spares the rounding of u, which is worth 2e-7 here. Within pi the hardware's sine is at its
  // best; sine and cosine both change sign.
  constexpr float turn = 6.283185307179586f;
  const Two<float> angle = R::mad({__uint2float_rn(words.w1), __uint2float_rn(words.w3)}, R::of(-turn * 0x1p-32f),
                                  R::of(turn / 2 - turn * 0x1p-33f));
  return {{-(r.a * hardware::cosine(angle.a)), r.a * hardware::sine(angle.a)},
          {-(r.b * hardware::cosine(angle.b)), r.b * hardware::sine(angle.b)}};
}

}  // namespace fused_elbo
