// The likelihood of one element, its derivatives, and the activation before it: formulas as in reference/likelihood.py. No
// torch in here.
#pragma once

#include "choices.h"
#include "transcendental.h"

namespace fused_elbo {

// A uint8 target's.
constexpr int LAST_LEVEL = 255;

template <class V>
struct Activated {
  V value, slope;
};

template <Activation ACTIVATION, class V>
FE_FN Activated<V> activated(V a) {
  if constexpr (ACTIVATION == Activation::sigmoid) {
    const auto l = logistic(a);
    return {l.sigmoid, l.sigmoid * l.complement};
  } else if constexpr (ACTIVATION == Activation::tanh) {
    const auto t = hyperbolic_tangent(a);
    return {t.value, t.slope};
  } else {
    return {a, Real<V>::of(1)};
  }
}

// What an element's likelihood takes from its scale alone: once for all elements where there is one scale.
template <class V>
struct Scale {
  V precision;  // 1 / s
  V offset;     // the part of the negative log-likelihood that does not depend on the data
  V slope;      // its derivative by ln s
  V width;      // of a level, in s
};

// precision: exp(-log_scale). constant: of the family's density. level: the width of a level, for discretized_logistic alone.
template <Family FAMILY, class V>
FE_FN Scale<V> scale_of(V log_scale, V precision, V constant, V level) {
  using R = Real<V>;
  const V zero = R::of(0);
  if constexpr (FAMILY == Family::bernoulli) {
    return {zero, zero, zero, zero};
  } else {
    if constexpr (FAMILY == Family::discretized_logistic) {
      const V width = level * precision;
      // width / expm1(width) is the slope.
      const auto e = exponential_pair(-width);
      return {precision, -logarithm(-e.expm1), width * e.exp / -e.expm1, width};
    } else {
      return {precision, log_scale + constant, R::of(1), zero};
    }
  }
}

template <Family FAMILY, class V>
FE_FN Scale<V> scale_of(V log_scale, V constant, V level) {
  return scale_of<FAMILY>(log_scale, exponential(-log_scale), constant, level);
}

template <class V>
struct Element {
  V nll;
  V by_location, by_target, by_log_scale;
};

// y: the location. x: the target, and for discretized_logistic the level, which stands for `target`.
template <Family FAMILY, class V>
FE_FN Element<V> element(V y, V x, V target, const Scale<V>& scale) {
  using R = Real<V>;
  const V zero = R::of(0), one = R::of(1), half = R::of(0.5f);
  if constexpr (FAMILY == Family::bernoulli) {
    const auto l = logistic(y);
    return {l.softplus - x * y, l.sigmoid - x, -y, zero};
  } else if constexpr (FAMILY == Family::discretized_logistic) {
    // ln(F(a) - F(b)) = ln F(a) + ln(1 - F(b)) + ln(1 - exp(b - a)): the first level has no b, the last no a.
    const auto first = x == zero, last = x == R::of(LAST_LEVEL);
    const V centre = (target - y) * scale.precision;
    const V a = R::mad(half, scale.width, centre), b = R::mad(half, scale.width, -centre);
    const auto above = logistic(-a), below = logistic(-b);
    const V offset = first ? zero : (last ? zero : scale.offset), slope = first ? zero : (last ? zero : scale.slope);
    const V value_a = last ? zero : above.softplus, value_b = first ? zero : below.softplus;
    const V slope_a = last ? zero : above.sigmoid, slope_b = first ? zero : below.sigmoid;
    return {value_a + value_b + offset, scale.precision * (slope_a - slope_b), zero,
            R::mad(a, slope_a, R::mad(b, slope_b, slope))};
  } else {
    const V residual = (y - x) * scale.precision;
    if constexpr (FAMILY == Family::laplace) {
      const V sign = residual > zero ? one : (residual < zero ? -one : residual);
      const V size = sign * residual, slope = sign * scale.precision;
      return {size + scale.offset, slope, -slope, scale.slope - size};
    } else {
      const V square = residual * residual, slope = residual * scale.precision;
      return {R::mad(half * residual, residual, scale.offset), slope, -slope, scale.slope - square};
    }
  }
}

}  // namespace fused_elbo
