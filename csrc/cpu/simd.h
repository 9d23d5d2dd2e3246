// Vectors of numbers in the widest registers that this file is compiled for, and what the shared formulas ask of them.
//
// A name that two instruction sets share would be merged by the linker, and one processor would run the other's code:
// everything here is inlined, or depends on a vector's type, or stands in a namespace of its instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "../elbo_math.h"
#include "../philox.h"

#if defined(__SSE2__)
#pragma GCC diagnostic push
#ifndef __clang__
// GCC 12 warns about its own header: what an intrinsic leaves undefined is undefined on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#if defined(__clang__) || __GNUC__ >= 12
#define FE_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FE_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits32{__VA_ARGS__})
#endif

namespace fused_elbo {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#define FE_INTRINSIC(name) _mm512_##name
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#define FE_INTRINSIC(name) _mm256_##name
#else
constexpr int VECTOR_BYTES = 16;
#if defined(__SSE2__)
#define FE_INTRINSIC(name) _mm_##name
#endif
#endif

using Float = float __attribute__((vector_size(VECTOR_BYTES)));
using Double = double __attribute__((vector_size(VECTOR_BYTES)));
using HalfFloat = float __attribute__((vector_size(VECTOR_BYTES / 2)));
using Signed32 = int32_t __attribute__((vector_size(VECTOR_BYTES)));
using Bits32 = uint32_t __attribute__((vector_size(VECTOR_BYTES)));
using Bits64 = uint64_t __attribute__((vector_size(VECTOR_BYTES)));

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float;
};
template <>
struct VectorOf<double> {
  using type = Double;
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class V>
constexpr int WIDTH = VECTOR_BYTES / sizeof(typename Real<V>::Scalar);

template <>
struct Real<Float> {
  using Scalar = float;
  using Bits = Bits32;
  static FE_FN Float of(float a) { return a - Float{}; }
  static FE_FN Bits bits(Float v) { return reinterpret_cast<Bits>(v); }
  static FE_FN Float number(Bits b) { return reinterpret_cast<Float>(b); }
  static FE_FN Float from_signed(Bits b) { return __builtin_convertvector(reinterpret_cast<Signed32>(b), Float); }
#ifdef __FMA__
  static FE_FN Float mad(Float a, Float b, Float c) { return FE_INTRINSIC(fmadd_ps)(a, b, c); }
  static FE_FN Float fused(Float a, Float b, Float c) { return mad(a, b, c); }
#else
  static FE_FN Float mad(Float a, Float b, Float c) { return a * b + c; }
  static FE_FN Float fused(Float a, Float b, Float c) {
    // The product is exact in float64.
    using Wide = double __attribute__((vector_size(2 * VECTOR_BYTES)));
    return __builtin_convertvector(
        __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) + __builtin_convertvector(c, Wide), Float);
  }
#endif
#ifdef FE_INTRINSIC
  static FE_FN Float root(Float v) { return FE_INTRINSIC(sqrt_ps)(v); }
  // With a NaN among its operands the instruction returns the second.
  static FE_FN Float clamp(Float v, float low, float high) {
    return FE_INTRINSIC(min_ps)(of(high), FE_INTRINSIC(max_ps)(of(low), v));
  }
#else
  static FE_FN Float root(Float v) {
    for (int i = 0; i < WIDTH<Float>; ++i) v[i] = __builtin_sqrtf(v[i]);
    return v;
  }
  static FE_FN Float clamp(Float v, float low, float high) {
    const Float raised = v < of(low) ? of(low) : v;
    return raised > of(high) ? of(high) : raised;
  }
#endif
};

template <>
struct Real<Double> {
  using Scalar = double;
  using Bits = Bits64;
  static FE_FN Double of(double a) { return a - Double{}; }
  static FE_FN Bits bits(Double v) { return reinterpret_cast<Bits>(v); }
  static FE_FN Double number(Bits b) { return reinterpret_cast<Double>(b); }
#ifdef __FMA__
  static FE_FN Double mad(Double a, Double b, Double c) { return FE_INTRINSIC(fmadd_pd)(a, b, c); }
  static FE_FN Double fused(Double a, Double b, Double c) { return mad(a, b, c); }
#else
  static FE_FN Double mad(Double a, Double b, Double c) { return a * b + c; }
  static FE_FN Double fused(Double a, Double b, Double c) {
    for (int i = 0; i < WIDTH<Double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
    return c;
  }
#endif
#ifdef FE_INTRINSIC
  static FE_FN Double root(Double v) { return FE_INTRINSIC(sqrt_pd)(v); }
  static FE_FN Double clamp(Double v, double low, double high) {
    return FE_INTRINSIC(min_pd)(of(high), FE_INTRINSIC(max_pd)(of(low), v));
  }
#else
  static FE_FN Double root(Double v) {
    for (int i = 0; i < WIDTH<Double>; ++i) v[i] = __builtin_sqrt(v[i]);
    return v;
  }
  static FE_FN Double clamp(Double v, double low, double high) {
    const Double raised = v < of(low) ? of(low) : v;
    return raised > of(high) ? of(high) : raised;
  }
#endif
};

// One word in every 64 bits, so that its products need no shuffling.
template <>
struct Word<Bits64> {
  static FE_FN Bits64 wide(Bits64 a, uint32_t m) {
#if defined(__AVX512F__)
    return reinterpret_cast<Bits64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
    return reinterpret_cast<Bits64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(m)));
#elif defined(__SSE2__)
    return reinterpret_cast<Bits64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(m)));
#else
    return (a & 0xFFFFFFFFu) * uint64_t{m};
#endif
  }
  static FE_FN Bits64 high(Bits64 product) { return product >> 32; }
  static FE_FN Bits64 low(Bits64 product) { return product; }
};

// Several vectors of words that go through the same steps side by side, so that none waits for the last.
template <int N>
struct Several {
  Bits64 of[N];
};

template <int N>
FE_FN Several<N> operator^(Several<N> a, const Several<N>& b) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) a.of[i] ^= b.of[i];
  return a;
}

template <int N>
FE_FN Several<N> operator^(Several<N> a, uint32_t b) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) a.of[i] ^= b;
  return a;
}

template <int N>
struct Word<Several<N>> {
  static FE_FN Several<N> wide(Several<N> a, uint32_t m) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) a.of[i] = Word<Bits64>::wide(a.of[i], m);
    return a;
  }
  static FE_FN Several<N> high(Several<N> product) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) product.of[i] >>= 32;
    return product;
  }
  static FE_FN Several<N> low(Several<N> product) { return product; }
};

template <class V>
FE_FN V load(const typename Real<V>::Scalar* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
FE_FN void store(typename Real<V>::Scalar* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// The first n numbers of a vector, n < WIDTH; the rest is 0.
template <class V>
FE_FN V load_some(const typename Real<V>::Scalar* from, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(*from) == 4)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
  else
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from);
#else
  V v = {};
  for (int64_t i = 0; i < n; ++i) v[i] = from[i];
  return v;
#endif
}

template <class V>
FE_FN void store_some(typename Real<V>::Scalar* to, V v, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(*to) == 4)
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), v);
  else
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), v);
#else
  for (int64_t i = 0; i < n; ++i) to[i] = v[i];
#endif
}

// 32-bit words as numbers, rounded to nearest.
FE_FN Float converted(Bits32 w) {
#if defined(__AVX512F__)
  return _mm512_cvtepu32_ps(reinterpret_cast<__m512i>(w));
#else
  // Both halves are exact, and so is the product: only the sum is rounded.
  const Float high = Real<Float>::from_signed(w >> 16), low = Real<Float>::from_signed(w & 0xFFFFu);
  return Real<Float>::mad(high, Real<Float>::of(65536.0f), low);
#endif
}

// The normals of a block's two pairs of words. The uniforms are u = w 2^-32 + 2^-33, the conversion and the sum rounded to
// nearest; the angle, u - 1/2, is spared the rounding of its sum, which is worth 2e-7 of a turn.
FE_FN Pair<Float> normal_pair(Bits32 radius, Bits32 angle) {
  using R = Real<Float>;
  return box_muller(R::mad(converted(radius), R::of(0x1p-32f), R::of(0x1p-33f)),
                    R::mad(converted(angle), R::of(0x1p-32f), R::of(0x1p-33f - 0.5f)));
}

// float64 takes the float32 uniforms as they are.
FE_FN Double uniform(Bits64 w) {
  using R = Real<Double>;
  const Double exact = R::number((w & 0xFFFFFFFFu) | 0x4330000000000000u) - R::of(4503599627370496.0);
  const HalfFloat scaled = __builtin_convertvector(exact, HalfFloat) * 0x1p-32f;
  return __builtin_convertvector(scaled + 0x1p-33f, Double);
}

FE_FN Pair<Double> normal_pair(Bits64 radius, Bits64 angle) {
  return box_muller(uniform(radius), uniform(angle) - Real<Double>::of(0.5));
}

template <std::size_t... I>
FE_FN Float unpack_low(Float a, Float b, std::index_sequence<I...>) {
  return FE_SHUFFLE(a, b, ((I & ~std::size_t{3}) + (I & 3) / 2 + (I & 1) * sizeof...(I))...);
}

template <std::size_t... I>
FE_FN Float unpack_high(Float a, Float b, std::index_sequence<I...>) {
  return FE_SHUFFLE(a, b, ((I & ~std::size_t{3}) + 2 + (I & 3) / 2 + (I & 1) * sizeof...(I))...);
}

template <std::size_t... I>
FE_FN Float join_low(Float a, Float b, std::index_sequence<I...>) {
  return FE_SHUFFLE(a, b, ((I & ~std::size_t{3}) + (I & 1) + ((I & 2) != 0) * sizeof...(I))...);
}

template <std::size_t... I>
FE_FN Float join_high(Float a, Float b, std::index_sequence<I...>) {
  return FE_SHUFFLE(a, b, ((I & ~std::size_t{3}) + 2 + (I & 1) + ((I & 2) != 0) * sizeof...(I))...);
}

}  // namespace fused_elbo
