// A diagonal Gaussian posterior and prior, element by element: formulas as in reference/posterior.py. No torch in here.
#pragma once

#include "choices.h"
#include "transcendental.h"

namespace fused_elbo {

template <class V>
struct Bounds {
  V low, high;
};

template <class V>
struct SoftlyClamped {
  V value, slope;
};

// high - softplus(high - raw), and of that low + softplus(it - low): each written as the bound or what is bounded, whichever
// holds, and the little beyond, so that nothing large is rounded on the way.
template <class V>
FE_FN SoftlyClamped<V> softly_clamped(V raw, const Bounds<V>& bounds) {
  const auto upper = logistic(bounds.high - raw);
  const V below = (raw < bounds.high ? raw : bounds.high) - upper.beyond;
  const auto lower = logistic(below - bounds.low);
  return {(below > bounds.low ? below : bounds.low) + lower.beyond, upper.sigmoid * lower.sigmoid};
}

template <Clamp CLAMP, class V>
FE_FN V clamped(V raw, const Bounds<V>& bounds) {
  if constexpr (CLAMP == Clamp::hard) {
    const V raised = raw < bounds.low ? bounds.low : raw;
    return raised > bounds.high ? bounds.high : raised;
  } else if constexpr (CLAMP == Clamp::soft) {
    return softly_clamped(raw, bounds).value;
  } else {
    return raw;
  }
}

// The gradient of the raw parameter from that of the clamped one.
template <Clamp CLAMP, class V>
FE_FN V through_clamp(V gradient, V raw, const Bounds<V>& bounds) {
  if constexpr (CLAMP == Clamp::hard) {
    const V zero = Real<V>::of(0);
    return raw >= bounds.low ? (raw <= bounds.high ? gradient : zero) : zero;
  } else if constexpr (CLAMP == Clamp::soft) {
    return gradient * softly_clamped(raw, bounds).slope;
  } else {
    return gradient;
  }
}

template <class V>
struct Moments {
  V sigma, logvar;
};

// Each directly from what the raw parameter is, not by way of the other.
template <Param PARAM, class V>
FE_FN Moments<V> moments(V raw, V min_std) {
  using R = Real<V>;
  if constexpr (PARAM == Param::logvar) {
    return {exponential(R::of(0.5f) * raw), raw};
  } else if constexpr (PARAM == Param::log_std) {
    return {exponential(raw), raw + raw};
  } else if constexpr (PARAM == Param::var) {
    return {R::root(raw), logarithm(raw)};
  } else {
    const V sigma = PARAM == Param::std ? raw : logistic(raw).softplus + min_std;
    const V log_sigma = logarithm(sigma);
    return {sigma, log_sigma + log_sigma};
  }
}

// The raw parameter's gradient from those of sigma and, beside it, of the log-variance.
template <Param PARAM, class V>
FE_FN V through_moments(V by_sigma, V by_logvar, V raw, V sigma) {
  using R = Real<V>;
  const V half = R::of(0.5f);
  if constexpr (PARAM == Param::logvar) return R::mad(half * by_sigma, sigma, by_logvar);
  if constexpr (PARAM == Param::log_std) return R::mad(by_sigma, sigma, by_logvar + by_logvar);
  // A sample has a gradient also where sigma is 0 and its logarithm has none, as long as nobody asks for that.
  const auto absent = by_logvar == R::of(0);
  if constexpr (PARAM == Param::var) return R::mad(half, by_sigma / sigma, absent ? by_logvar : by_logvar / raw);
  const V by_std = by_sigma + (absent ? by_logvar : (by_logvar + by_logvar) / sigma);
  return PARAM == Param::std ? by_std : by_std * logistic(raw).sigmoid;
}

// Where a point lies in the prior N(m, s^2).
template <class V>
struct Standardised {
  V square;  // ((v - m) / s)^2
  V slope;   // (v - m) / s^2
};

template <bool MEAN, bool STD, class V>
FE_FN Standardised<V> standardised(V v, V mean, V std) {
  const V difference = MEAN ? v - mean : v;
  const V ratio = STD ? difference / std : difference;
  return {ratio * ratio, STD ? ratio / std : ratio};
}

// The KL of one element, no less than free_bits (0: any), and its gradients where it is not that; d is the difference of the
// log-variances.
template <class V>
struct Divergence {
  V value;
  V by_mean;    // of the posterior; the negative is the prior mean's
  V by_logvar;  // of the posterior
  V by_prior_logvar;
};

template <class V>
FE_FN Divergence<V> divergence(const Standardised<V>& mean, V d, V free_bits) {
  using R = Real<V>;
  const V zero = R::of(0), half = R::of(0.5f);
  const auto e = exponentials(d);
  const V value = half * (mean.square + e.excess);
  const auto cut = value < free_bits;
  return {cut ? free_bits : value, cut ? zero : mean.slope, cut ? zero : half * e.expm1,
          cut ? zero : -half * (mean.square + e.expm1)};
}

// An element's share of ln p(z) - ln q(z).
template <class V>
FE_FN V log_ratio(V eps, V d, const Standardised<V>& z) {
  return Real<V>::of(0.5f) * (Real<V>::mad(eps, eps, d) - z.square);
}

// For upstream gradients g_z of a sample z and g_ratio of its log_ratio, either of which may be absent: what reaches z, and
// what log_ratio gives the prior.
template <class V>
struct SampleGradient {
  V z, prior_mean, prior_logvar;
};

// PATH: log_ratio reaches the posterior through z alone, all that does is multiplied by path_weight.
template <bool G_Z, bool RATIO, bool PATH, class V>
FE_FN SampleGradient<V> sample_gradient(V g_z, V g_ratio, V path_weight, V eps, V sigma, const Standardised<V>& z) {
  using R = Real<V>;
  V g = G_Z ? g_z : R::of(0);
  if constexpr (!RATIO) return {PATH ? path_weight * g : g, R::of(0), R::of(0)};
  const V by_mean = g_ratio * z.slope;
  if constexpr (PATH) {
    const V by_z = g_ratio * (eps / sigma - z.slope);
    g = path_weight * (G_Z ? g + by_z : by_z);
  } else {
    g = G_Z ? g - by_mean : -by_mean;
  }
  return {g, by_mean, R::of(0.5f) * g_ratio * (z.square - R::of(1))};
}

}  // namespace fused_elbo
