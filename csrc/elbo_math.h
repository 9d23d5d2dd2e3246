// The formulas of the loss, once: for single numbers on a GPU, for vectors of them on a CPU. No torch in here.
//
// Everything is a template over V, a number or a vector of numbers, and asks Real<V> for what the hardware does differently.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FE_FN __host__ __device__ __forceinline__
#else
#define FE_FN inline __attribute__((always_inline))
#endif

namespace fused_elbo {

// A specialisation gives
//   Scalar, Bits           the number, and an unsigned integer or vector of integers of V's size
//   of(Scalar)             V with that number throughout
//   mad(a, b, c)           a b + c, rounded once or twice
//   fused(a, b, c)         a b + c, rounded once
//   root(v)                square root
//   clamp(v, low, high)    NaN stays NaN
//   bits(v), number(b)     the same bits as the other type
//   from_signed(b)         a float from the value of b as a signed integer
template <class V>
struct Real;

template <class V>
FE_FN V horner(V, V sum) {
  return sum;
}

template <class V, class... More>
FE_FN V horner(V x, V sum, typename Real<V>::Scalar next, More... more) {
  return horner(x, Real<V>::mad(sum, x, Real<V>::of(next)), more...);
}

// Coefficients from the highest power down.
template <class V, class... More>
FE_FN V polynomial(V x, typename Real<V>::Scalar highest, More... more) {
  return horner(x, Real<V>::of(highest), more...);
}

// exp(v/2) = 2^(2m) exp(y/2) with m = rint(v / step), step = 4 ln 2 and y = v - m step, so |y| <= 2 ln 2.
template <class Scalar>
struct Exponential;

template <>
struct Exponential<float> {
  // float32 leaves 8e-9 of 4 ln 2 over, worth 2e-7 of exp(v) at |v| = 80.
  static constexpr float step = 2.772588722239781f, step_rest = 0.0f;
  // Adding 1.5 2^23 rounds to an integer and leaves it in the low bits.
  static constexpr float rounder = 12582912.0f;
  // Beyond, exp(v/2) is inf, or below 1.2e-38 and taken for 0; 2^(2m - 1) would leave the exponent's bits.
  static constexpr float lowest = -174.6f, highest = 178.0f;
  static constexpr int shift = 24;
  static constexpr uint32_t half = 0x3F000000;

  // (exp(y/2) - 1 - y/2) 2 / y^2, weighted minimax: 2.5e-7 of the tail, and 2.5e-8 of exp(y/2).
  template <class V>
  static FE_FN V tail(V y) {
    return polynomial(y, 0.000196105010768426394f / 64, 0.00140776732964131346f / 32, 0.00833561180040253582f / 16,
                      0.0416629778878842718f / 8, 0.166666356976154361f / 4, 0.500000117034940198f / 2);
  }
};

template <>
struct Exponential<double> {
  static constexpr double step = 2.772588722239781, step_rest = 9.276187255385198e-17;
  static constexpr double rounder = 6755399441055744.0;
  // m stays within [-511, 512], and so 2^(2m - 1) within the exponent's bits.
  static constexpr double lowest = -1418.0, highest = 1420.0;
  static constexpr int shift = 53;
  static constexpr uint64_t half = 0x3FE0000000000000;

  // The Taylor series of the same: its first term left out is 1e-17 of the sum.
  template <class V>
  static FE_FN V tail(V y) {
    return polynomial(y, 0x1p-17 / 6402373705728000.0, 0x1p-16 / 355687428096000.0, 0x1p-15 / 20922789888000.0,
                      0x1p-14 / 1307674368000.0, 0x1p-13 / 87178291200.0, 0x1p-12 / 6227020800.0, 0x1p-11 / 479001600.0,
                      0x1p-10 / 39916800.0, 0x1p-9 / 3628800.0, 0x1p-8 / 362880.0, 0x1p-7 / 40320.0, 0x1p-6 / 5040.0,
                      0x1p-5 / 720.0, 0x1p-4 / 120.0, 0x1p-3 / 24.0, 0x1p-2 / 6.0, 0x1p-1 / 2.0);
  }
};

template <class V>
struct HalfExponential {
  V sigma;  // exp(v/2)
  V g;      // 2 (exp(y/2) - 1)
  V tail;   // g - y
  V m;
};

template <class V>
FE_FN HalfExponential<V> half_exponential(V v) {
  using R = Real<V>;
  using E = Exponential<typename R::Scalar>;
  const V clamped = R::clamp(v, E::lowest, E::highest);
  const V rounded = R::mad(clamped, R::of(1 / E::step), R::of(E::rounder));
  const V m = rounded - R::of(E::rounder);
  V y = R::fused(m, R::of(-E::step), clamped);
  if (E::step_rest != 0) y = R::fused(m, R::of(-E::step_rest), y);
  const V tail = y * y * E::tail(y);
  const V g = y + tail;
  const V half_power = R::number((R::bits(rounded) << E::shift) + E::half);
  return {half_power * (g + R::of(2)), g, tail, m};
}

template <class V>
struct Exponentials {
  V sigma;   // exp(v/2)
  V expm1;   // exp(v) - 1
  V excess;  // exp(v) - 1 - v, non-negative and to full relative accuracy also near 0
};

template <class V>
FE_FN Exponentials<V> exponentials(V logvar) {
  using R = Real<V>;
  const HalfExponential<V> e = half_exponential(logvar);
  // There y is logvar itself, so exp(logvar) - 1 can be put together from parts that are small with it.
  const auto near = e.m == R::of(0);
  const V quarter = R::of(0.25f) * e.g;
  const V far = R::fused(e.sigma, e.sigma, R::of(-1));
  return {e.sigma, near ? R::mad(quarter, e.g, e.g) : far, near ? R::mad(quarter, e.g, e.tail) : far - logvar};
}

// Twice one element's share of KL(N(mu, exp(logvar)) || N(0, 1)). Kingma and Welling 2014, appendix B.
template <class V>
FE_FN V twice_kl(V mu, const Exponentials<V>& e) {
  return Real<V>::mad(mu, mu, e.excess);
}

template <class V>
struct LatentGradient {
  V mu, logvar;
};

// For an upstream gradient g_z of z = mu + eps sigma and c of the sample's KL, either of which may be absent: what is absent
// must not be multiplied by 0 either, since sigma may be inf.
template <bool SAMPLE, bool KL, class V>
FE_FN LatentGradient<V> latent_gradient(V mu, const Exponentials<V>& e, V eps, V g_z, V c) {
  using R = Real<V>;
  const V half = R::of(0.5f);
  if (SAMPLE && KL) return {R::mad(c, mu, g_z), half * R::mad(g_z * eps, e.sigma, c * e.expm1)};
  if (SAMPLE) return {g_z, half * (g_z * eps * e.sigma)};
  if (KL) return {c * mu, half * (c * e.expm1)};
  return {R::of(0), R::of(0)};
}

// -2 ln u for u in [2^-33, 1], to full relative accuracy near 1 too: u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), the
// lower end of which has the bits that are taken off.
template <class V>
FE_FN V minus_two_log(V u, float) {
  using R = Real<V>;
  const auto bits = R::bits(u);
  const auto power = (bits - 0x3F3504F3u) & 0xFF800000u;
  const V f = R::number(bits - power) - R::of(1.0f);
  // (-2 ln(1 + f) + 2 f - f^2) / f^3, minimax: 1.6e-6 of ln(1 + f).
  const V p = polynomial(f, -0.2356380385f, 0.368143805546f, -0.408843737388f, 0.498876654254f, -0.666417218514f);
  const V square = f * f;
  const V log1p = R::mad(square * f, p, R::mad(R::of(-2.0f), f, square));
  return R::mad(R::from_signed(power), R::of(-1.3862943611198906f * 0x1p-23f), log1p);
}

template <class V>
FE_FN V minus_two_log(V u, double) {
  using R = Real<V>;
  const auto shifted = R::bits(u) + (0x3FF0000000000000u - 0x3FE6A09E667F3BCDu);
  const V e = R::number((shifted >> 52) | 0x4330000000000000u) - R::of(4503599627370496.0 + 1023.0);
  const V f = R::number((shifted & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu) - R::of(1.0);
  // ln(1 + f) = 2 artanh(f / (2 + f)), whose argument is below 0.172.
  const V s = f / (R::of(2.0) + f);
  const V p =
      polynomial(s * s, 1.0 / 21, 1.0 / 19, 1.0 / 17, 1.0 / 15, 1.0 / 13, 1.0 / 11, 1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3, 1.0);
  return R::mad(e, R::of(-1.3862943611198906), R::of(-4.0) * s * p);
}

// sqrt(2) sin(pi f) and -sqrt(2) cos(pi f) for |f| <= 1/2. Float: minimax, within 5e-9 and 7e-8.
template <class V>
FE_FN V root_two_sine(V f, V square, float) {
  return f * polynomial(square, 0.109208749887f, -0.84576540006f, 3.60628933083f, -7.30824118462f, 4.44288283489f);
}

template <class V>
FE_FN V minus_root_two_cosine(V square, float) {
  return polynomial(square, -0.31069819293f, 1.88356298782f, -5.73946117075f, 6.97885098824f, -1.41421349657f);
}

// Double: the Taylor series in pi f, their first term left out below 1e-16.
constexpr double PI = 3.141592653589793, ROOT_TWO = 1.4142135623730951;

template <class V>
FE_FN V root_two_sine(V f, V square, double) {
  using R = Real<V>;
  const V x = R::of(PI * PI) * square;
  return R::of(ROOT_TWO * PI) * f *
         polynomial(x, 1 / 51090942171709440000.0, -1 / 121645100408832000.0, 1 / 355687428096000.0, -1 / 1307674368000.0,
                    1 / 6227020800.0, -1 / 39916800.0, 1 / 362880.0, -1 / 5040.0, 1 / 120.0, -1 / 6.0, 1.0);
}

template <class V>
FE_FN V minus_root_two_cosine(V square, double) {
  using R = Real<V>;
  const V x = R::of(PI * PI) * square;
  return R::of(-ROOT_TWO) * polynomial(x, -1 / 1124000727777607680000.0, 1 / 2432902008176640000.0, -1 / 6402373705728000.0,
                                       1 / 20922789888000.0, -1 / 87178291200.0, 1 / 479001600.0, -1 / 3628800.0, 1 / 40320.0,
                                       -1 / 720.0, 1 / 24.0, -1 / 2.0, 1.0);
}

template <class V>
struct Pair {
  V first, second;
};

// Two standard normals from two uniforms (Box and Muller 1958): r cos(2 pi t) and r sin(2 pi t) with r = sqrt(-2 ln u).
// f is t - 1/2: of half the angle, sine and cosine need no reduction.
template <class V>
FE_FN Pair<V> box_muller(V u, V f) {
  using R = Real<V>;
  using Scalar = typename R::Scalar;
  const V r = R::root(minus_two_log(u, Scalar()));
  const V square = f * f;
  const V sine = root_two_sine(f, square, Scalar()), minus_cosine = minus_root_two_cosine(square, Scalar());
  return {r * R::mad(sine, sine, R::of(-1)), r * (sine * minus_cosine)};
}

}  // namespace fused_elbo
