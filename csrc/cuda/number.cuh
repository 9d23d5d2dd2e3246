// Single numbers on a GPU, for formulas that gain nothing from pairs.
#pragma once

#include "../transcendental.h"
#include "device_math.cuh"

namespace fused_elbo {

template <>
struct Real<float> {
  using Scalar = float;
  using Bits = uint32_t;
  static FE_DEVICE float of(float v) { return v; }
  static FE_DEVICE float mad(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static FE_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static FE_DEVICE float root(float v) { return __fsqrt_rn(v); }
  static FE_DEVICE float clamp(float v, float low, float high) { return v < low ? low : v > high ? high : v; }
  static FE_DEVICE Bits bits(float v) { return __float_as_uint(v); }
  static FE_DEVICE float number(Bits b) { return __uint_as_float(b); }
};

// A step of Newton's makes the hardware's rounded but for 1 unit in the last place, without a division's branch for what is
// subnormal or infinite.
template <>
FE_FN float reciprocal(float v) {
#ifdef __CUDA_ARCH__
  const float near = hardware::reciprocal(v);
  return __fmaf_rn(__fmaf_rn(-v, near, 1.0f), near, near);
#else
  return 1 / v;
#endif
}

// CUDA's own takes less than half of the instructions; its error is 1 unit in the last place (CUDA C++ Programming Guide).
template <>
FE_FN float exponential(float v) {
  return expf(v);
}

}  // namespace fused_elbo
