// The latent pass and its backward. The noise depends on an element's number in its tensor, not on strides or launches.
#include "pass.cuh"
#include "sums.cuh"

namespace fused_elbo {
namespace {

// Where a sample's normals come from.
enum class Source { NONE, SEED, EPS };

struct Seed {
  const int64_t* keys;
  int64_t stride, offset;
  Numbers numbers;
};

// The stream's normals for a thread's part of a row.
class Stream {
 public:
  // To be called by whole warps. The threads of one share a key: there is only one, or a row has whole warps.
  FE_DEVICE Stream(const Seed& seed, const Shape& shape, const Place& place)
      : block_((seed.numbers.first + place.row * seed.numbers.per_row + place.column) >> 2), offset_(seed.offset) {
    const uint64_t key = seed.keys[(place.row < shape.rows ? place.row : 0) * seed.stride];
    low_key_ = hardware::uniform(static_cast<uint32_t>(key));
    high_key_ = hardware::uniform(static_cast<uint32_t>(key >> 32));
  }

  // Whether all of the place's block numbers have one high word.
  FE_DEVICE bool near(const Place& place) const {
    return static_cast<uint32_t>(block_) <= ~0u - place.units * (UNIT<bfloat16> / LANES);
  }

  // Of the unit at the place's column + offset + ahead. NEAR: the place is.
  template <bool NEAR, class S, int PAIRS>
  FE_DEVICE void normals(int offset, int ahead, Two<S> (&values)[PAIRS]) const {
#pragma unroll
    for (int i = 0; i < PAIRS; i += 2) {
      const uint32_t blocks = static_cast<uint32_t>(offset) / LANES + (ahead / LANES + i / 2);
      const uint64_t number = NEAR ? block_ : block_ + blocks;
      const Block<uint32_t> counter = {static_cast<uint32_t>(number) + (NEAR ? blocks : 0), static_cast<uint32_t>(number >> 32),
                                       static_cast<uint32_t>(offset_), static_cast<uint32_t>(offset_ >> 32)};
      const Four<S> four = fused_elbo::normals(philox4x32(counter, low_key_, high_key_), S());
      values[i] = four.low, values[i + 1] = four.high;
    }
  }

 private:
  uint64_t block_, offset_;
  uint32_t low_key_, high_key_;
};

struct NoStream {
  FE_DEVICE NoStream(const Seed&, const Shape&, const Place&) {}
};

template <Source SOURCE>
using StreamOf = std::conditional_t<SOURCE == Source::SEED, Stream, NoStream>;

struct ForwardArguments {
  Tensors<4> tensors;  // mu, logvar, then eps and z, or z alone, or neither
  Plan plan;
  Seed seed;
  void *kl, *partials;  // (rows,), (rows, chunks)
  Ticket ticket;
};

// z = mu + eps sigma; sums up twice the KL.
template <class T, class S, Source SOURCE>
struct SampleAndKl {
  using Scalar = S;
  static constexpr int INPUTS = SOURCE == Source::EPS ? 3 : 2, OUTPUTS = SOURCE == Source::NONE ? 0 : 1;
  static constexpr bool OPTIONAL_INPUTS = false, OPTIONAL_OUTPUTS = false;

  StreamOf<SOURCE> stream;

  FE_DEVICE bool near(const Place& place) const {
    if constexpr (SOURCE == Source::SEED) return stream.near(place);
    return true;
  }

  template <bool NEAR, int IN, int OUT, int PAIRS>
  FE_DEVICE void apply(const Two<S> (&in)[IN][PAIRS], Two<S> (&out)[OUT][PAIRS], int offset, int ahead, Two<S>& sum) const {
    const Two<S>(&mu)[PAIRS] = in[0], (&logvar)[PAIRS] = in[1];
    Two<S> eps[PAIRS] = {};
    if constexpr (SOURCE == Source::SEED) stream.template normals<NEAR>(offset, ahead, eps);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Exponentials<Two<S>> e = exponentials<sizeof(T) == 2>(logvar[i]);
      if constexpr (SOURCE == Source::EPS) eps[i] = in[2][i];
      if constexpr (SOURCE != Source::NONE) out[0][i] = Real<Two<S>>::mad(eps[i], e.sigma, mu[i]);
      sum = sum + twice_kl(mu[i], e);
    }
  }
};

template <class T, class S, Source SOURCE>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) forward_kernel(const __grid_constant__ ForwardArguments a) {
  const Shape& shape = a.tensors.shape;
  using Sampling = Pass<T, T, SampleAndKl<T, S, SOURCE>>;
  S *const kl = static_cast<S*>(a.kl), *const partials = static_cast<S*>(a.partials);
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, Sampling::SIZE);
    const S sum = Sampling(shape, a.tensors.views, place, {{a.seed, shape, place}}).run(a.plan, place);
    if (!kl) continue;
    const S half = S(0.5) * row_sum(sum, a.plan);
    if (place.leads(shape)) (a.plan.split() ? partials : kl)[place.row * a.plan.chunks + place.chunk] = half;
  }
  if (kl && a.plan.split() && arrive(a.ticket)) combine(partials, kl, shape.rows, a.plan.chunks, 0.0);
}

struct BackwardArguments {
  Tensors<6> tensors;  // mu, logvar, g_z, eps, g_mu, g_logvar
  Plan plan;
  Seed seed;
  Column g_kl;
};

// Gradients for the upstream gradients g_z of z and c of the KL.
template <class T, class S, Source SOURCE>
struct LatentGradients {
  using Scalar = S;
  static constexpr int INPUTS = 4, OUTPUTS = 2;
  static constexpr bool OPTIONAL_INPUTS = true, OPTIONAL_OUTPUTS = true;

  StreamOf<SOURCE> stream;
  bool has_kl;
  S c;

  FE_DEVICE bool near(const Place& place) const {
    if constexpr (SOURCE == Source::SEED) return stream.near(place);
    return true;
  }

  template <bool NEAR, int IN, int OUT, int PAIRS>
  FE_DEVICE void apply(const Two<S> (&in)[IN][PAIRS], Two<S> (&out)[OUT][PAIRS], int offset, int ahead, Two<S>&) const {
    const Two<S>(&mu)[PAIRS] = in[0], (&logvar)[PAIRS] = in[1], (&g_z)[PAIRS] = in[2];
    const Two<S> weight = Real<Two<S>>::of(c);
    Two<S> eps[PAIRS] = {};
    if constexpr (SOURCE == Source::SEED) stream.template normals<NEAR>(offset, ahead, eps);
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Exponentials<Two<S>> e = exponentials<sizeof(T) == 2>(logvar[i]);
      if constexpr (SOURCE == Source::EPS) eps[i] = in[3][i];
      constexpr bool SAMPLE = SOURCE != Source::NONE;
      const LatentGradient<Two<S>> g = has_kl ? latent_gradient<SAMPLE, true>(mu[i], e, eps[i], g_z[i], weight)
                                              : latent_gradient<SAMPLE, false>(mu[i], e, eps[i], g_z[i], weight);
      // Without noise z is mu.
      out[0][i] = SAMPLE ? g.mu : g.mu + g_z[i];
      out[1][i] = g.logvar;
    }
  }
};

template <class T, class S, Source SOURCE>
__global__ void __launch_bounds__(THREADS, BLOCKS<S> - (sizeof(T) == 2 || SOURCE == Source::EPS))
    backward_kernel(const __grid_constant__ BackwardArguments a) {
  const Shape& shape = a.tensors.shape;
  using Gradients = Pass<T, T, LatentGradients<T, S, SOURCE>>;
  const bool has_kl = a.g_kl.data;
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, Gradients::SIZE);
    const S c = has_kl && place.row < shape.rows ? a.g_kl.template get<S>(place.row) : S(0);
    Gradients(shape, a.tensors.views, place, {{a.seed, shape, place}, has_kl, c}).run(a.plan, place);
  }
}

Seed seed_of(const MaybeTensor& seed, int64_t first_index, int64_t offset, int64_t columns) {
  if (!seed) return {};
  const bool per_row = seed->dim() == 1;
  return {static_cast<const int64_t*>(seed->const_data_ptr()),
          per_row ? seed->strides()[0] : 0,
          offset,
          {first_index, per_row ? 0 : columns}};
}

// What the two passes have in common: arguments with tensors and a seed. Chooses how they are read and shares out the rows.
template <class Arguments>
ScalarType prepare(Arguments& a, const MaybeTensor& seed, int64_t first_index, int64_t offset) {
  a.seed = seed_of(seed, first_index, offset, a.tensors.shape.columns);
  const ScalarType dtype = a.tensors.common_dtype();
  const bool vectors = a.tensors.align(dtype == ANY ? 0 : unit_of(dtype), seed ? &a.seed.numbers : nullptr);
  const ScalarType read_as = vectors ? dtype : ANY;
  a.plan = Plan(a.tensors.shape, unit_of(read_as), seed && seed->dim() == 1);
  return read_as;
}

}  // namespace

MaybeTensor rsample_kl(Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps, int64_t first_index, int64_t offset,
                       MaybeTensor z, bool want_kl) {
  const Launcher launch(mu);
  ForwardArguments a = {};
  a.tensors = Tensors<4>({&mu, &logvar, eps ? &*eps : pointer(z), eps ? pointer(z) : nullptr}, true);
  const ScalarType read_as = prepare(a, seed, first_index, offset);
  const auto run = [&](auto type, auto scalar) -> MaybeTensor {
    using T = decltype(type);
    using S = decltype(scalar);
    MaybeTensor kl, partials, counter;
    if (want_kl) {
      kl = launch.empty<S>(1, a.tensors.shape.rows);
      a.kl = kl->mutable_data_ptr();
      if (a.plan.split()) {
        partials = launch.empty<S>(1, a.plan.shares), a.ticket = launch.ticket(counter);
        a.partials = partials->mutable_data_ptr();
      }
    }
    launch(seed  ? forward_kernel<T, S, Source::SEED>
           : eps ? forward_kernel<T, S, Source::EPS>
                 : forward_kernel<T, S, Source::NONE>,
           a.plan.grid, a);
    return kl;
  };
  return with_type(read_as, any_float64(&mu, &logvar), run);
}

void rsample_kl_backward(MaybeTensor g_z, MaybeTensor g_kl, Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps,
                         int64_t first_index, int64_t offset, MaybeTensor g_mu, MaybeTensor g_logvar) {
  const Launcher launch(mu);
  BackwardArguments a = {};
  if (!g_z) seed = eps = std::nullopt;
  a.tensors = Tensors<6>({&mu, &logvar, pointer(g_z), pointer(eps), pointer(g_mu), pointer(g_logvar)}, true);
  a.g_kl = column_of(g_kl);
  const ScalarType read_as = prepare(a, seed, first_index, offset);
  const auto run = [&](auto type, auto scalar) {
    using T = decltype(type);
    using S = decltype(scalar);
    launch(seed  ? backward_kernel<T, S, Source::SEED>
           : eps ? backward_kernel<T, S, Source::EPS>
                 : backward_kernel<T, S, Source::NONE>,
           a.plan.grid, a);
  };
  with_type(read_as, any_float64(&mu, &logvar), run);
}

}  // namespace fused_elbo
