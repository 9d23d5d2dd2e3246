// What the general latent kernels have in common: several samples' noise, parameterisations, a unit's distributions.
#pragma once

#include "number.cuh"
// These take numbers as they are known by now.
#include "../posterior_math.h"
#include "operands.cuh"

namespace fused_elbo {

struct StreamArguments {
  const int64_t* keys;  // null: the noise is given, or there is none
  int64_t key_stride, offset;
  Numbers numbers;
  int64_t per_sample;
  bool whole_blocks;  // units start at blocks in every sample
};

// A thread's units are blocks of noise, whatever the dtype: arithmetic outweighs the memory here.
constexpr int SIZE = LANES;

// The stream's normals for a thread's part of a row.
template <class S>
class SampleStream {
 public:
  // To be called by whole warps, whose threads share a key: there is only one, or a row has whole warps.
  FE_DEVICE SampleStream(const StreamArguments& a, const Place& place, int64_t row) : a_(a) {
    if (!a.keys) return;
    const uint64_t key = a.keys[row * a.key_stride];
    low_key_ = hardware::uniform(static_cast<uint32_t>(key));
    high_key_ = hardware::uniform(static_cast<uint32_t>(key >> 32));
    first_ = a.numbers.first + row * a.numbers.per_row + place.column;
  }

  FE_DEVICE void normals(int64_t sample, const Unit<SIZE>& unit, S (&values)[SIZE]) const {
    const int64_t number = first_ + sample * a_.per_sample + unit.offset, block = number >> 2;
    S drawn[SIZE + LANES];
#pragma unroll
    for (int i = 0; i < SIZE; i += LANES) draw(block + i / LANES, drawn + i);
    if (!a_.whole_blocks) {
      draw(block + SIZE / LANES, drawn + SIZE);
      drop<2>(number, drawn);
      drop<1>(number, drawn);
    }
#pragma unroll
    for (int i = 0; i < SIZE; ++i) values[i] = drawn[i];
  }

 private:
  FE_DEVICE void draw(int64_t block, S* to) const {
    const Block<uint32_t> counter = {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                     static_cast<uint32_t>(a_.offset), static_cast<uint32_t>(a_.offset >> 32)};
    const Four<S> four = fused_elbo::normals(philox4x32(counter, low_key_, high_key_), S());
    to[0] = four.low.a, to[1] = four.low.b, to[2] = four.high.a, to[3] = four.high.b;
  }

  // The first COUNT, where the number has that bit. An index that is not known here would put the array into memory.
  template <int COUNT>
  static FE_DEVICE void drop(int64_t number, S (&drawn)[SIZE + LANES]) {
    const bool wanted = number & COUNT;
#pragma unroll
    for (int i = 0; i < SIZE + LANES - COUNT; ++i) drawn[i] = wanted ? drawn[i + COUNT] : drawn[i];
  }

  const StreamArguments& a_;
  int64_t first_;
  uint32_t low_key_, high_key_;
};

enum { MU, RAW, PRIOR_MEAN, PRIOR_RAW, PARAMETERS, EPS = PARAMETERS, SHARED };

// What is known of the distributions before any tensor is read.
template <class S>
struct Model {
  Param param;
  Clamp clamp;
  Bounds<S> bounds;
  S min_std, free_bits;
};

// body(number) with the number known to the compiler.
template <class Body>
FE_DEVICE void with_param(Param param, Body body) {
  switch (param) {
    case Param::log_std:
      return body(std::integral_constant<Param, Param::log_std>());
    case Param::std:
      return body(std::integral_constant<Param, Param::std>());
    case Param::var:
      return body(std::integral_constant<Param, Param::var>());
    case Param::softplus:
      return body(std::integral_constant<Param, Param::softplus>());
    default:
      return body(std::integral_constant<Param, Param::logvar>());
  }
}

template <class Body>
FE_DEVICE void with_clamp(Clamp clamp, Body body) {
  switch (clamp) {
    case Clamp::hard:
      return body(std::integral_constant<Clamp, Clamp::hard>());
    case Clamp::soft:
      return body(std::integral_constant<Clamp, Clamp::soft>());
    default:
      return body(std::integral_constant<Clamp, Clamp::none>());
  }
}

template <class S>
FE_DEVICE void clamp(const Model<S>& model, const S (&raw)[SIZE], S (&within)[SIZE]) {
  with_clamp(model.clamp, [&](auto clamp) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) within[i] = clamped<decltype(clamp)::value>(raw[i], model.bounds);
  });
}

template <class S>
FE_DEVICE void find_moments(const Model<S>& model, const S (&raw)[SIZE], S (&sigma)[SIZE], S (&logvar)[SIZE]) {
  with_param(model.param, [&](auto param) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const Moments<S> found = moments<decltype(param)::value>(raw[i], model.min_std);
      sigma[i] = found.sigma, logvar[i] = found.logvar;
    }
  });
}

// The raw parameter's gradient. Where no sample is there sigma has no gradient, which an infinite sigma must not multiply.
template <class S>
FE_DEVICE void through_parameter(const Model<S>& model, bool sampled, const S (&by_sigma)[SIZE], const S (&by_logvar)[SIZE],
                                 const S (&raw)[SIZE], const S (&sigma)[SIZE], S (&gradient)[SIZE]) {
  with_param(model.param, [&](auto param) {
    constexpr Param PARAM = decltype(param)::value;
    constexpr bool LOGARITHMIC = PARAM != Param::std && PARAM != Param::softplus;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      gradient[i] =
          through_moments<decltype(param)::value>(by_sigma[i], by_logvar[i], raw[i], LOGARITHMIC && !sampled ? S(1) : sigma[i]);
  });
}

// The distributions of a unit. An absent prior has mean 0 and a standard deviation of 1.
template <class S>
struct Distributions {
  S mu[SIZE], sigma[SIZE], mean[SIZE], std[SIZE], d[SIZE];  // d: the difference of the log-variances
  bool has_std;

  // From the unit's parameters.
  FE_DEVICE Distributions(const Model<S>& model, bool has_std, const S (&read)[PARAMETERS][SIZE]) : has_std(has_std) {
    S raw[SIZE];
    clamp(model, read[RAW], raw);
    find_moments(model, raw, sigma, d);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) mu[i] = read[MU][i], mean[i] = read[PRIOR_MEAN][i], std[i] = 1;
    if (!has_std) return;
    S prior_logvar[SIZE];
    find_moments(model, read[PRIOR_RAW], std, prior_logvar);
#pragma unroll
    for (int i = 0; i < SIZE; ++i) d[i] -= prior_logvar[i];
  }

  FE_DEVICE Standardised<S> in_prior(int i, S value) const {
    return has_std ? standardised<true, true>(value, mean[i], std[i]) : standardised<true, false>(value, mean[i], std[i]);
  }

  FE_DEVICE Divergence<S> kl(const Model<S>& model, int i) const {
    return divergence(in_prior(i, mu[i]), d[i], model.free_bits);
  }
};

// A thread's rows of the parameters and the noise.
template <class T, class S>
class Latents {
 public:
  using Tensor = Cursor<T, S, SIZE>;

  template <int K>
  FE_DEVICE Latents(const Operands<K>& tensors, const StreamArguments& stream, const Place& place)
      : row(place.row < tensors.shape.rows ? place.row : 0), stream_(stream, place, row), seeded_(stream.keys) {
#pragma unroll
    for (int k = 0; k < SHARED; ++k) tensors_[k] = Tensor(tensors.shape, tensors.views[k], 0, row, place.column);
    eps_stride_ = tensors.views[EPS].outer_stride;
  }

  FE_DEVICE void read(const Unit<SIZE>& unit, S (&values)[PARAMETERS][SIZE]) const {
    typename Tensor::Bits bits[PARAMETERS];
#pragma unroll
    for (int k = 0; k < PARAMETERS; ++k)
      if (tensors_[k]) tensors_[k].fetch(unit, bits[k]);
#pragma unroll
    for (int k = 0; k < PARAMETERS; ++k) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[k][i] = 0;
      if (tensors_[k]) tensors_[k].unpack(unit, bits[k], values[k]);
    }
  }

  FE_DEVICE bool has_prior_std() const { return static_cast<bool>(tensors_[PRIOR_RAW]); }

  FE_DEVICE void noise(int64_t sample, const Unit<SIZE>& unit, S (&values)[SIZE]) const {
    if (seeded_) return stream_.normals(sample, unit, values);
    read_sample(tensors_[EPS], sample * eps_stride_, unit, values);
  }

  // Again: the cache has it, and a register less is taken meanwhile.
  FE_DEVICE void reread(int k, const Unit<SIZE>& unit, S (&values)[SIZE]) const { read_sample(tensors_[k], 0, unit, values); }

  static FE_DEVICE void read_sample(const Tensor& tensor, int64_t start, const Unit<SIZE>& unit, S (&values)[SIZE]) {
    typename Tensor::Bits bits;
    tensor.fetch(unit, bits, start);
    tensor.unpack(unit, bits, values, start);
  }

  const int64_t row;

 private:
  const SampleStream<S> stream_;
  const bool seeded_;
  Tensor tensors_[SHARED];
  int64_t eps_stride_;
};

}  // namespace fused_elbo
