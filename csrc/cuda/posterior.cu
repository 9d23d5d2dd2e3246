// Samples of any diagonal Gaussian posterior with their terms, and their backward: parameters are read once for all samples.
#include "number.cuh"
// These take numbers as they are known by now.
#include "../posterior_math.h"
#include "operands.cuh"

namespace fused_elbo {
namespace {

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
struct Model {
  Param param;
  Clamp clamp;
  double min_std, low, high, free_bits;
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
FE_DEVICE Bounds<S> bounds_of(const Model& model) {
  return {S(model.low), S(model.high)};
}

template <class S>
FE_DEVICE void clamp(const Model& model, const S (&raw)[SIZE], S (&within)[SIZE]) {
  with_clamp(model.clamp, [&](auto clamp) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) within[i] = clamped<decltype(clamp)::value>(raw[i], bounds_of<S>(model));
  });
}

template <class S>
FE_DEVICE void find_moments(const Model& model, const S (&raw)[SIZE], S (&sigma)[SIZE], S (&logvar)[SIZE]) {
  with_param(model.param, [&](auto param) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const Moments<S> found = moments<decltype(param)::value>(raw[i], S(model.min_std));
      sigma[i] = found.sigma, logvar[i] = found.logvar;
    }
  });
}

// The raw parameter's gradient. Where no sample is there sigma has no gradient, which an infinite sigma must not multiply.
template <class S>
FE_DEVICE void through_parameter(const Model& model, bool sampled, const S (&by_sigma)[SIZE], const S (&by_logvar)[SIZE],
                                 const S (&raw)[SIZE], const S (&sigma)[SIZE], S (&gradient)[SIZE]) {
  with_param(model.param, [&](auto param) {
    constexpr Param PARAM = decltype(param)::value;
    constexpr bool LOGARITHMIC = PARAM != Param::std && PARAM != Param::softplus;
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      gradient[i] = through_moments<decltype(param)::value>(by_sigma[i], by_logvar[i], raw[i], LOGARITHMIC && !sampled ? S(1) : sigma[i]);
  });
}

// The distributions of a unit. An absent prior has mean 0 and a standard deviation of 1.
template <class S>
struct Distributions {
  S mu[SIZE], sigma[SIZE], mean[SIZE], std[SIZE], d[SIZE];  // d: the difference of the log-variances
  bool has_std;

  // From the unit's parameters.
  FE_DEVICE Distributions(const Model& model, bool has_std, const S (&read)[PARAMETERS][SIZE]) : has_std(has_std) {
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

  FE_DEVICE Divergence<S> kl(const Model& model, int i) const {
    return divergence(in_prior(i, mu[i]), d[i], S(model.free_bits));
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

enum { Z = SHARED, KL_ELEMENTS, FORWARD_TENSORS };

struct ForwardArguments {
  Operands<FORWARD_TENSORS> tensors;
  Plan plan;
  StreamArguments stream;
  Model model;
  int64_t samples;                         // 0: none
  void *kl_rows, *log_ratio, *partials;    // (rows,), (samples, rows), (1 + samples, rows, chunks)
  unsigned* ticket;
};

template <class T, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) posterior_kernel(const __grid_constant__ ForwardArguments a) {
  using Tensor = Cursor<T, S, SIZE>;
  const Shape& shape = a.tensors.shape;
  const Operand &z_view = a.tensors.views[Z], &kl_view = a.tensors.views[KL_ELEMENTS];
  const int64_t chunks = a.plan.chunks, sums = shape.rows * chunks;
  S *const kl_rows = static_cast<S*>(a.kl_rows), *const log_ratio = static_cast<S*>(a.log_ratio);
  S *const partials = static_cast<S*>(a.partials), *const partial_ratios = partials + sums;
  S* const ratios = a.plan.split() ? partial_ratios : log_ratio;
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, SIZE);
    const Latents<T, S> latents(a.tensors, a.stream, place);
    const Tensor z_row(shape, z_view, 0, latents.row, place.column), kl_row(shape, kl_view, 0, latents.row, place.column);
    const int64_t at = place.row * chunks + place.chunk;
    double kl_sum = 0;
    // The threads of a row add up a sample's ratio together, so all of them go through all units there.
    const int64_t units = log_ratio ? a.plan.chunk : place.units;
#pragma unroll 1
    for (int number = place.thread; number < units; number += a.plan.threads()) {
      const Unit<SIZE> unit(shape, place, number);
      S read[PARAMETERS][SIZE];
      latents.read(unit, read);
      const Distributions<S> of(a.model, latents.has_prior_std(), read);
      if (kl_rows || kl_view.data) {
        S kl[SIZE], sum = 0;
#pragma unroll
        for (int i = 0; i < SIZE; ++i) {
          kl[i] = of.kl(a.model, i).value;
          sum += unit.holds(i) ? kl[i] : S(0);
        }
        kl_sum += sum;
        if (kl_row) kl_row.write(unit, kl);
      }
#pragma unroll 1
      for (int64_t k = 0; k < a.samples; ++k) {
        S eps[SIZE], z[SIZE];
        latents.noise(k, unit, eps);
#pragma unroll
        for (int i = 0; i < SIZE; ++i) z[i] = Real<S>::mad(eps[i], of.sigma[i], of.mu[i]);
        if (z_row) z_row.write(unit, z, k * z_view.outer_stride);
        if (!log_ratio) continue;
        S sum = 0;
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
          sum += unit.holds(i) ? fused_elbo::log_ratio(eps[i], of.d[i], of.in_prior(i, z[i])) : S(0);
        sum = row_sum(sum, a.plan);
        if (!place.leads(shape)) continue;
        // The same thread for all of the place's units.
        S& total = ratios[k * sums + at];
        total = number == 0 ? sum : total + sum;
      }
    }
    if (!kl_rows) continue;
    const double sum = row_sum(kl_sum, a.plan);
    if (place.leads(shape)) (a.plan.split() ? partials : kl_rows)[at] = static_cast<S>(sum);
  }
  if (!a.ticket || !arrive(a.ticket)) return;
  if (kl_rows) combine(partials, kl_rows, shape.rows, chunks, 0.0);
  if (log_ratio) combine(partial_ratios, log_ratio, a.samples * shape.rows, chunks, 0.0);
}

enum { G_Z = SHARED, G_KL, BACKWARD_INPUTS, G_MU = BACKWARD_INPUTS, G_RAW, G_PRIOR_MEAN, G_PRIOR_RAW, BACKWARD_TENSORS };

struct BackwardArguments {
  Operands<BACKWARD_TENSORS> tensors;
  Plan plan;
  StreamArguments stream;
  Model model;
  int64_t samples;
  double posterior_share, prior_share;
  Upstream g_log_ratio, path_weight;
};

// Gradients of a unit, on their way to the parameters.
template <class S>
struct LatentGradients {
  S mu[SIZE] = {}, sigma[SIZE] = {}, logvar[SIZE] = {}, mean[SIZE] = {}, prior_logvar[SIZE] = {};

  FE_DEVICE void add_kl(const BackwardArguments& a, const Distributions<S>& of, const S (&g_kl)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const Divergence<S> kl = of.kl(a.model, i);
      const S posterior = S(a.posterior_share) * g_kl[i], prior = S(a.prior_share) * g_kl[i];
      mu[i] = posterior * kl.by_mean, logvar[i] = posterior * kl.by_logvar;
      mean[i] = -(prior * kl.by_mean), prior_logvar[i] = prior * kl.by_prior_logvar;
    }
  }

  template <bool RATIO, bool PATH>
  FE_DEVICE void add_sample(const Distributions<S>& of, const S (&eps)[SIZE], const S (&g_z)[SIZE], S g_ratio, S path_weight) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      Standardised<S> z = {};
      if constexpr (RATIO) z = of.in_prior(i, Real<S>::mad(eps[i], of.sigma[i], of.mu[i]));
      const SampleGradient<S> g =
          sample_gradient<true, RATIO, PATH>(g_z[i], g_ratio, path_weight, eps[i], of.sigma[i], z);
      mu[i] += g.z;
      sigma[i] = Real<S>::mad(g.z, eps[i], sigma[i]);
      if constexpr (RATIO) mean[i] += g.prior_mean, prior_logvar[i] += g.prior_logvar;
      if constexpr (RATIO && !PATH) logvar[i] = Real<S>::mad(S(0.5), g_ratio, logvar[i]);
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S> - 1) posterior_backward_kernel(const __grid_constant__ BackwardArguments a) {
  using Tensor = Cursor<T, S, SIZE>;
  const Shape& shape = a.tensors.shape;
  const Operand* const views = a.tensors.views;
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, SIZE);
    const Latents<T, S> latents(a.tensors, a.stream, place);
    const auto row_of = [&](int k) { return Tensor(shape, views[k], 0, latents.row, place.column); };
    const Tensor g_z_row = row_of(G_Z), g_kl_row = row_of(G_KL);
#pragma unroll 1
    for (int number = place.thread; number < place.units; number += a.plan.threads()) {
      const Unit<SIZE> unit(shape, place, number);
      S read[PARAMETERS][SIZE];
      latents.read(unit, read);
      const Distributions<S> of(a.model, latents.has_prior_std(), read);
      LatentGradients<S> gradients;
      if (g_kl_row) {
        S g_kl[SIZE];
        Latents<T, S>::read_sample(g_kl_row, 0, unit, g_kl);
        gradients.add_kl(a, of, g_kl);
      }
#pragma unroll 1
      for (int64_t k = 0; k < a.samples; ++k) {
        S eps[SIZE], g_z[SIZE] = {};
        if (g_z_row) Latents<T, S>::read_sample(g_z_row, k * views[G_Z].outer_stride, unit, g_z);
        latents.noise(k, unit, eps);
        const bool ratio = a.g_log_ratio.data, path = a.path_weight.data;
        const S g_ratio = ratio ? a.g_log_ratio.get<S>(k, latents.row) : S(0);
        const S path_weight = path ? a.path_weight.get<S>(k, latents.row) : S(0);
        if (ratio && path)
          gradients.template add_sample<true, true>(of, eps, g_z, g_ratio, path_weight);
        else if (ratio)
          gradients.template add_sample<true, false>(of, eps, g_z, g_ratio, path_weight);
        else if (path)
          gradients.template add_sample<false, true>(of, eps, g_z, g_ratio, path_weight);
        else
          gradients.template add_sample<false, false>(of, eps, g_z, g_ratio, path_weight);
      }
      const auto write = [&](int k, const S (&values)[SIZE]) {
        if (views[k].data) row_of(k).write(unit, values);
      };
      write(G_MU, gradients.mu);
      write(G_PRIOR_MEAN, gradients.mean);
      S raw[SIZE], within[SIZE], gradient[SIZE];
      if (views[G_RAW].data) {
        latents.reread(RAW, unit, raw);
        clamp(a.model, raw, within);
        through_parameter(a.model, a.samples > 0, gradients.sigma, gradients.logvar, within, of.sigma, gradient);
        with_clamp(a.model.clamp, [&](auto clamp) {
#pragma unroll
          for (int i = 0; i < SIZE; ++i)
            gradient[i] = through_clamp<decltype(clamp)::value>(gradient[i], raw[i], bounds_of<S>(a.model));
        });
        write(G_RAW, gradient);
      }
      if (views[G_PRIOR_RAW].data) {
        latents.reread(PRIOR_RAW, unit, raw);
        const S none[SIZE] = {};
        through_parameter(a.model, false, none, gradients.prior_logvar, raw, of.std, gradient);
        write(G_PRIOR_RAW, gradient);
      }
    }
  }
}

Model model_of(int64_t param, double min_std, int64_t clamp, double low, double high, std::optional<double> free_bits) {
  // Without free bits any KL is enough: none is negative.
  return {static_cast<Param>(param), static_cast<Clamp>(clamp), min_std, low, high, free_bits.value_or(0.0)};
}

// What the two passes have in common: arguments with tensors, of which those from `outputs` on are written, a number of samples
// and a seed.
template <class Arguments>
ScalarType prepare(Arguments& a, int outputs, bool float64, const MaybeTensor& seed, int64_t first_index, int64_t offset) {
  auto& tensors = a.tensors;
  const bool per_row = seed && seed->dim() == 1;
  const int64_t rows = tensors.shape.rows, columns = tensors.shape.columns;
  const ScalarType mu = tensors.views[MU].dtype;
  const bool vectors = tensors.align(float64 == (mu == ScalarType::Double) ? SIZE : 0, outputs, a.samples > 1 ? a.samples : 1,
                                     0, float64 ? ScalarType::Double : ScalarType::Float);
  if (seed) {
    StreamArguments& stream = a.stream;
    stream.keys = static_cast<const int64_t*>(seed->const_data_ptr());
    stream.key_stride = per_row ? seed->strides()[0] : 0, stream.offset = offset;
    stream.numbers = {first_index, per_row ? 0 : columns};
    stream.per_sample = per_row ? columns : rows * columns;
    if (!vectors) tensors.shift_as(stream.numbers);
    const auto whole = [](int64_t value) { return value % LANES == 0; };
    stream.whole_blocks = whole(first_index - tensors.shape.origin) && (a.samples <= 1 || whole(stream.per_sample)) &&
                          (rows == 1 || whole(stream.numbers.per_row - tensors.shape.slope));
  }
  a.plan = Plan(tensors.shape, SIZE, per_row);
  return vectors ? mu : ANY;
}

}  // namespace

void posterior(Tensor mu, Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
               int64_t first_index, int64_t offset, int64_t param, double min_std, int64_t clamp, double low, double high,
               std::optional<double> free_bits, MaybeTensor z, MaybeTensor kl_rows, MaybeTensor kl_elements,
               MaybeTensor log_ratio) {
  const Launcher launch(mu);
  ForwardArguments a = {};
  a.tensors = Operands<FORWARD_TENSORS>({&mu, &raw, pointer(prior_mean), pointer(prior_raw), pointer(eps), pointer(z),
                                         pointer(kl_elements)},
                                        true, {1, 1, 1, 1, 2, 2, 1});
  a.model = model_of(param, min_std, clamp, low, high, free_bits);
  a.samples = z ? z->sizes()[0] : 0;
  const bool float64 = any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw));
  const ScalarType read_as = prepare(a, Z, float64, seed, first_index, offset);
  with_type(read_as, float64, [&](auto type, auto scalar) {
    using S = decltype(scalar);
    MaybeTensor partials, ticket;
    if (kl_rows) a.kl_rows = kl_rows->mutable_data_ptr();
    if (log_ratio) a.log_ratio = log_ratio->mutable_data_ptr();
    if (a.plan.split() && (kl_rows || log_ratio)) {
      partials = launch.empty<S>(1, (1 + a.samples) * a.tensors.shape.rows * a.plan.chunks), ticket = launch.ticket();
      a.partials = partials->mutable_data_ptr(), a.ticket = static_cast<unsigned*>(ticket->mutable_data_ptr());
    }
    launch(posterior_kernel<decltype(type), S>, a.plan.grid, a);
  });
}

void posterior_backward(MaybeTensor g_z, MaybeTensor g_kl, MaybeTensor g_log_ratio, MaybeTensor path_weight, Tensor mu,
                        Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
                        int64_t first_index, int64_t offset, int64_t samples, int64_t param, double min_std, int64_t clamp,
                        double low, double high, std::optional<double> free_bits, double posterior_share, double prior_share,
                        MaybeTensor g_mu, MaybeTensor g_raw, MaybeTensor g_prior_mean, MaybeTensor g_prior_raw) {
  const Launcher launch(mu);
  BackwardArguments a = {};
  const bool sampled = g_z || g_log_ratio;
  if (!sampled) seed = eps = std::nullopt;
  a.tensors = Operands<BACKWARD_TENSORS>(
      {&mu, &raw, pointer(prior_mean), pointer(prior_raw), pointer(eps), pointer(g_z), pointer(g_kl), pointer(g_mu),
       pointer(g_raw), pointer(g_prior_mean), pointer(g_prior_raw)},
      true, {1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1});
  a.model = model_of(param, min_std, clamp, low, high, free_bits);
  a.samples = sampled ? samples : 0;
  a.posterior_share = posterior_share, a.prior_share = prior_share;
  a.g_log_ratio = Upstream(g_log_ratio), a.path_weight = Upstream(path_weight);
  const bool float64 = any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw));
  const ScalarType read_as = prepare(a, BACKWARD_INPUTS, float64, seed, first_index, offset);
  with_type(read_as, float64, [&](auto type, auto scalar) {
    launch(posterior_backward_kernel<decltype(type), decltype(scalar)>, a.plan.grid, a);
  });
}

}  // namespace fused_elbo
