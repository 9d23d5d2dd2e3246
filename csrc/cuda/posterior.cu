// Samples of any diagonal Gaussian posterior with their terms, and their backward: parameters are read once for all samples.
#include "distributions.cuh"

namespace fused_elbo {
namespace {

enum { Z = SHARED, KL_ELEMENTS, FORWARD_TENSORS };

template <class S>
struct ForwardArguments {
  Operands<FORWARD_TENSORS> tensors;
  Plan plan;
  StreamArguments stream;
  Model<S> model;
  int64_t samples;                       // 0: none
  void *kl_rows, *log_ratio, *partials;  // (rows,), (samples, rows), (1 + samples, rows, chunks)
  Ticket ticket;
};

template <class T, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) posterior_kernel(const __grid_constant__ ForwardArguments<S> a) {
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

template <class S>
struct BackwardArguments {
  Operands<BACKWARD_TENSORS> tensors;
  Plan plan;
  StreamArguments stream;
  Model<S> model;
  int64_t samples;
  S posterior_share, prior_share;
  Upstream g_log_ratio, path_weight;
};

// Gradients of a unit, on their way to the parameters.
template <class S>
struct LatentGradients {
  S mu[SIZE] = {}, sigma[SIZE] = {}, logvar[SIZE] = {}, mean[SIZE] = {}, prior_logvar[SIZE] = {};

  FE_DEVICE void add_kl(const BackwardArguments<S>& a, const Distributions<S>& of, const S (&g_kl)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const Divergence<S> kl = of.kl(a.model, i);
      const S posterior = a.posterior_share * g_kl[i], prior = a.prior_share * g_kl[i];
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
      const SampleGradient<S> g = sample_gradient<true, RATIO, PATH>(g_z[i], g_ratio, path_weight, eps[i], of.sigma[i], z);
      mu[i] += g.z;
      sigma[i] = Real<S>::mad(g.z, eps[i], sigma[i]);
      if constexpr (RATIO) mean[i] += g.prior_mean, prior_logvar[i] += g.prior_logvar;
      if constexpr (RATIO && !PATH) logvar[i] = Real<S>::mad(S(0.5), g_ratio, logvar[i]);
    }
  }
};

template <class T, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S> - 1)
    posterior_backward_kernel(const __grid_constant__ BackwardArguments<S> a) {
  using Tensor = Cursor<T, S, SIZE>;
  const Shape& shape = a.tensors.shape;
  const Operand* const views = a.tensors.views;
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, SIZE);
    const Latents<T, S> latents(a.tensors, a.stream, place);
    const auto row_of = [&](int k) { return Tensor(shape, views[k], 0, latents.row, place.column); };
#pragma unroll 1
    for (int number = place.thread; number < place.units; number += a.plan.threads()) {
      const Unit<SIZE> unit(shape, place, number);
      S read[PARAMETERS][SIZE];
      latents.read(unit, read);
      const Distributions<S> of(a.model, latents.has_prior_std(), read);
      LatentGradients<S> gradients;
      if (views[G_KL].data) {
        S g_kl[SIZE];
        Latents<T, S>::read_sample(row_of(G_KL), 0, unit, g_kl);
        gradients.add_kl(a, of, g_kl);
      }
#pragma unroll 1
      for (int64_t k = 0; k < a.samples; ++k) {
        S eps[SIZE], g_z[SIZE] = {};
        latents.noise(k, unit, eps);
        if (views[G_Z].data) Latents<T, S>::read_sample(row_of(G_Z), k * views[G_Z].outer_stride, unit, g_z);
        const bool ratio = a.g_log_ratio.data, path = a.path_weight.data;
        const S g_ratio = ratio ? a.g_log_ratio.template get<S>(k, latents.row) : S(0);
        const S path_weight = path ? a.path_weight.template get<S>(k, latents.row) : S(0);
        if (ratio && path)
          gradients.template add_sample<true, true>(of, eps, g_z, g_ratio, path_weight);
        else if (ratio)
          gradients.template add_sample<true, false>(of, eps, g_z, g_ratio, path_weight);
        else if (path)
          gradients.template add_sample<false, true>(of, eps, g_z, g_ratio, path_weight);
        else
          gradients.template add_sample<false, false>(of, eps, g_z, g_ratio, path_weight);
      }
      const auto write = [&](int k, const S(&values)[SIZE]) {
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
            gradient[i] = through_clamp<decltype(clamp)::value>(gradient[i], raw[i], a.model.bounds);
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

template <class S>
Model<S> model_of(int64_t param, double min_std, int64_t clamp, double low, double high, std::optional<double> free_bits) {
  // Without free bits any KL is enough: none is negative.
  return {static_cast<Param>(param), static_cast<Clamp>(clamp), {S(low), S(high)}, S(min_std), S(free_bits.value_or(0.0))};
}

// float64 goes by the element: vectors of it would take more registers than there are.
template <class S, class Run>
void with_latents(ScalarType read_as, Run run) {
  if constexpr (std::is_same_v<S, double>)
    run(Any());
  else
    with_type_of<S>(read_as, run);
}

// What the two passes have in common: arguments with tensors, of which those from `outputs` on are written, a number of samples
// and a seed.
template <class S, class Arguments>
ScalarType prepare(Arguments& a, int outputs, const MaybeTensor& seed, int64_t first_index, int64_t offset) {
  auto& tensors = a.tensors;
  const bool per_row = seed && seed->dim() == 1;
  const int64_t rows = tensors.shape.rows, columns = tensors.shape.columns;
  const ScalarType mu = tensors.views[MU].dtype;
  const bool vectors =
      tensors.align(std::is_same_v<S, double> ? 0 : SIZE, outputs, a.samples > 1 ? a.samples : 1, 0, ScalarType::Float);
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
  const auto run = [&](auto scalar) {
    using S = decltype(scalar);
    ForwardArguments<S> a = {};
    a.tensors = Operands<FORWARD_TENSORS>(
        {&mu, &raw, pointer(prior_mean), pointer(prior_raw), pointer(eps), pointer(z), pointer(kl_elements)}, true,
        {1, 1, 1, 1, 2, 2, 1});
    a.model = model_of<S>(param, min_std, clamp, low, high, free_bits);
    a.samples = z ? z->sizes()[0] : 0;
    const ScalarType read_as = prepare<S>(a, Z, seed, first_index, offset);
    MaybeTensor partials, counter;
    if (kl_rows) a.kl_rows = kl_rows->mutable_data_ptr();
    if (log_ratio) a.log_ratio = log_ratio->mutable_data_ptr();
    if (a.plan.split() && (kl_rows || log_ratio)) {
      partials = launch.empty<S>(1, (1 + a.samples) * a.tensors.shape.rows * a.plan.chunks), a.ticket = launch.ticket(counter);
      a.partials = partials->mutable_data_ptr();
    }
    with_latents<S>(read_as, [&](auto type) { launch(posterior_kernel<decltype(type), S>, a.plan.grid, a); });
  };
  any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw)) ? run(double()) : run(float());
}

void posterior_backward(MaybeTensor g_z, MaybeTensor g_kl, MaybeTensor g_log_ratio, MaybeTensor path_weight, Tensor mu,
                        Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
                        int64_t first_index, int64_t offset, int64_t samples, int64_t param, double min_std, int64_t clamp,
                        double low, double high, std::optional<double> free_bits, double posterior_share, double prior_share,
                        MaybeTensor g_mu, MaybeTensor g_raw, MaybeTensor g_prior_mean, MaybeTensor g_prior_raw) {
  const Launcher launch(mu);
  const bool sampled = g_z || g_log_ratio;
  if (!sampled) seed = eps = std::nullopt;
  const auto run = [&](auto scalar) {
    using S = decltype(scalar);
    BackwardArguments<S> a = {};
    a.tensors =
        Operands<BACKWARD_TENSORS>({&mu, &raw, pointer(prior_mean), pointer(prior_raw), pointer(eps), pointer(g_z),
                                    pointer(g_kl), pointer(g_mu), pointer(g_raw), pointer(g_prior_mean), pointer(g_prior_raw)},
                                   true, {1, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1});
    a.model = model_of<S>(param, min_std, clamp, low, high, free_bits);
    a.samples = sampled ? samples : 0;
    a.posterior_share = S(posterior_share), a.prior_share = S(prior_share);
    a.g_log_ratio = Upstream(g_log_ratio), a.path_weight = Upstream(path_weight);
    const ScalarType read_as = prepare<S>(a, BACKWARD_INPUTS, seed, first_index, offset);
    with_latents<S>(read_as, [&](auto type) { launch(posterior_backward_kernel<decltype(type), S>, a.plan.grid, a); });
  };
  any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw)) ? run(double()) : run(float());
}

}  // namespace fused_elbo
