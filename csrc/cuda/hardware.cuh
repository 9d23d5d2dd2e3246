// Single instructions, where CUDA C++ has no name for one or its name may become several.
#pragma once

#include <cstdint>

#define FE_DEVICE __device__ __forceinline__

namespace fused_elbo {

// Two neighbouring elements: from sm_100 on, one instruction works on a pair of floats.
template <class S>
struct Two {
  S a, b;
};

namespace hardware {

// Of the special-function unit. Subnormal numbers are taken for 0.
FE_DEVICE float exp2(float v) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

FE_DEVICE float log2(float v) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

FE_DEVICE float root(float v) {
  asm("sqrt.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

FE_DEVICE float reciprocal(float v) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

FE_DEVICE float sine(float v) {
  asm("sin.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

FE_DEVICE float cosine(float v) {
  asm("cos.approx.ftz.f32 %0, %0;" : "+f"(v));
  return v;
}

// NaN stays NaN.
FE_DEVICE float minimum(float v, float bound) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(v) : "f"(bound));
  return v;
}

// a b + c rounded once and clamped to [0, 1]; NaN becomes 0.
FE_DEVICE float fused_saturated(float a, float b, float c) {
  float v;
  asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(v) : "f"(a), "f"(b), "f"(c));
  return v;
}

#if __CUDA_ARCH__ >= 1000
FE_DEVICE uint64_t packed(Two<float> v) {
  uint64_t pair;
  asm("mov.b64 %0, {%1, %2};" : "=l"(pair) : "f"(v.a), "f"(v.b));
  return pair;
}

FE_DEVICE Two<float> unpacked(uint64_t pair) {
  Two<float> v;
  asm("mov.b64 {%0, %1}, %2;" : "=f"(v.a), "=f"(v.b) : "l"(pair));
  return v;
}

FE_DEVICE Two<float> fused(Two<float> a, Two<float> b, Two<float> c) {
  uint64_t v;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
  return unpacked(v);
}

FE_DEVICE Two<float> product(Two<float> a, Two<float> b) {
  uint64_t v;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(v);
}

FE_DEVICE Two<float> sum(Two<float> a, Two<float> b) {
  uint64_t v;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(v);
}

FE_DEVICE Two<float> difference(Two<float> a, Two<float> b) {
  uint64_t v;
  asm("sub.rn.f32x2 %0, %1, %2;" : "=l"(v) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(v);
}
#else
FE_DEVICE Two<float> fused(Two<float> a, Two<float> b, Two<float> c) {
  return {__fmaf_rn(a.a, b.a, c.a), __fmaf_rn(a.b, b.b, c.b)};
}

FE_DEVICE Two<float> product(Two<float> a, Two<float> b) { return {a.a * b.a, a.b * b.b}; }

FE_DEVICE Two<float> sum(Two<float> a, Two<float> b) { return {a.a + b.a, a.b + b.b}; }

FE_DEVICE Two<float> difference(Two<float> a, Two<float> b) { return {a.a - b.a, a.b - b.b}; }
#endif

// Pairs of 16-bit floats in a word, the first in the low half.
FE_DEVICE uint32_t to_bfloat16(Two<float> v) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v.b), "f"(v.a));
  return word;
}

FE_DEVICE uint32_t to_float16(Two<float> v) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v.b), "f"(v.a));
  return word;
}

FE_DEVICE Two<float> from_bfloat16(uint32_t word) { return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)}; }

FE_DEVICE Two<float> from_float16(uint32_t word) {
  Two<float> v;
  asm("{.reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(v.a), "=f"(v.b)
      : "r"(word));
  return v;
}

// The same for every thread of a warp, and the compiler knows it: what depends on it alone costs a warp one register.
FE_DEVICE uint32_t uniform(uint32_t v) { return __reduce_or_sync(0xFFFFFFFFu, v); }

}  // namespace hardware
}  // namespace fused_elbo
