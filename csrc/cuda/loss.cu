// The reconstruction, alone or with the KL and the total, and what its backward needs: gradients are made with the sums.
#include "pass.cuh"
#include "sums.cuh"

namespace fused_elbo {
namespace {

// Of x_hat and x. c (x_hat - x) and its negative are written, (x_hat - x)^2 is summed up.
template <class S>
struct SquaredError {
  using Scalar = S;
  static constexpr int INPUTS = 2, OUTPUTS = 2;
  static constexpr bool OPTIONAL_INPUTS = false, OPTIONAL_OUTPUTS = true;

  S c;

  FE_DEVICE bool near(const Place&) const { return true; }

  template <bool NEAR, int PAIRS>
  FE_DEVICE void apply(const Two<S> (&in)[2][PAIRS], Two<S> (&out)[2][PAIRS], int, int, Two<S>& sum) const {
    using R = Real<Two<S>>;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Two<S> difference = in[0][i] - in[1][i];
      out[0][i] = R::of(c) * difference;
      out[1][i] = R::of(-c) * difference;
      sum = R::mad(difference, difference, sum);
    }
  }
};

// Of mu and logvar: gradients for an upstream gradient c of every KL, and twice the KL to be summed up.
template <class S>
struct KlAndGradients {
  using Scalar = S;
  static constexpr int INPUTS = 2, OUTPUTS = 2;
  static constexpr bool OPTIONAL_INPUTS = false, OPTIONAL_OUTPUTS = true;

  S c;

  FE_DEVICE bool near(const Place&) const { return true; }

  template <bool NEAR, int PAIRS>
  FE_DEVICE void apply(const Two<S> (&in)[2][PAIRS], Two<S> (&out)[2][PAIRS], int, int, Two<S>& sum) const {
    using R = Real<Two<S>>;
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) {
      const Exponentials<Two<S>> e = exponentials(in[1][i]);
      const LatentGradient<Two<S>> g = latent_gradient<false, true>(in[0][i], e, R::of(0), R::of(0), R::of(c));
      out[0][i] = g.mu, out[1][i] = g.logvar;
      sum = sum + twice_kl(in[0][i], e);
    }
  }
};

struct ElboArguments {
  Tensors<4> data, latent;  // x_hat, x, g_x_hat, g_x; mu, logvar, g_mu, g_logvar
  Plan data_plan, latent_plan;
  Column given_kl;
  Number beta, grad_scale;
  double weight, precision, constant;
  void *nll, *kl, *loss, *g_kl;  // (rows,), (rows,), (), ()
  ScalarType g_kl_dtype;
  void* partials;  // (data blocks + latent blocks,)
  Ticket ticket;   // none: there is nothing to add up
};

// loss = weight sum_n (nll_n + beta kl_n) with its gradients: data blocks first, then latent blocks, then the last to arrive
// adds up what they left.
template <class T, class U, class L, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) elbo_kernel(const __grid_constant__ ElboArguments a) {
  const S beta = a.beta.get<S>(), c = S(a.weight) * a.grad_scale.get<S>();
  S *const nll = static_cast<S*>(a.nll), *const kl = static_cast<S*>(a.kl), *const partials = static_cast<S*>(a.partials);
  const Shape &data = a.data.shape, &latent = a.latent.shape;
  const Plan &data_plan = a.data_plan, &latent_plan = a.latent_plan;
  S term = 0;
  if (blockIdx.x < data_plan.grid) {
    using Reconstruction = Pass<T, U, SquaredError<S>>;
    for (int64_t share = blockIdx.x; share < data_plan.shares; share += data_plan.grid) {
      const Place place(data_plan, data, share, Reconstruction::SIZE);
      S sum = Reconstruction(data, a.data.views, place, {c * S(a.precision)}).run(data_plan, place);
      sum = S(0.5) * S(a.precision) * row_sum(sum, data_plan);
      if (!place.leads(data)) continue;
      term += sum;
      if (data_plan.split()) continue;
      nll[place.row] = sum + S(a.constant);
      if (a.given_kl.data) term += beta * a.given_kl.get<S>(place.row);
    }
  } else {
    using Divergence = Pass<L, L, KlAndGradients<S>>;
    for (int64_t share = blockIdx.x - data_plan.grid; share < latent_plan.shares; share += latent_plan.grid) {
      const Place place(latent_plan, latent, share, Divergence::SIZE);
      S sum = Divergence(latent, a.latent.views, place, {c * beta}).run(latent_plan, place);
      sum = S(0.5) * row_sum(sum, latent_plan);
      if (!place.leads(latent)) continue;
      term += sum;
      if (!latent_plan.split()) kl[place.row] = sum;
    }
  }
  if (!a.ticket) return;
  term = block_sum(term);
  if (threadIdx.x == 0) partials[blockIdx.x] = term;
  if (!arrive(a.ticket)) return;

  S *const nowhere = nullptr, *const latent_partials = partials + data_plan.grid;
  double total;
  if (data_plan.split()) {
    total = combine(partials, nll, data.rows, data_plan.chunks, static_cast<double>(S(a.constant)));
    if (a.given_kl.data) total += beta * column_sum(a.given_kl, data.rows);
  } else {
    total = combine(partials, nowhere, 1, data_plan.grid, 0.0);
  }
  if (latent_plan.split())
    total += beta * combine(latent_partials, kl, latent.rows, latent_plan.chunks, 0.0);
  else if (latent_plan.grid > 0)
    total += beta * combine(latent_partials, nowhere, 1, latent_plan.grid, 0.0);
  if (threadIdx.x > 0) return;
  if (a.loss) *static_cast<S*>(a.loss) = static_cast<S>(a.weight * (total + a.constant * data.rows));
  if (a.g_kl) typed(a.g_kl, a.g_kl_dtype, [&](auto* g_kl) { put(g_kl, c * beta); });
}

struct NllBackwardArguments {
  Tensors<4> data;
  Plan plan;
  Column g_nll;
  double scale;
  bool has_expected;
  Number expected;
};

// With an expected upstream gradient, only where the gradients that are there are not those of g_nll.
template <class T, class U, class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) nll_backward_kernel(const __grid_constant__ NllBackwardArguments a) {
  if (a.has_expected && a.g_nll.get<S>(0) == a.expected.get<S>()) return;
  using Gradients = Pass<T, U, SquaredError<S>>;
  const Shape& shape = a.data.shape;
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, Gradients::SIZE);
    const S c = place.row < shape.rows ? a.g_nll.get<S>(place.row) * S(a.scale) : S(0);
    Gradients(shape, a.data.views, place, {c}).run(a.plan, place);
  }
}

template <class S>
struct Scaled {
  using Scalar = S;
  static constexpr int INPUTS = 1, OUTPUTS = 1;
  static constexpr bool OPTIONAL_INPUTS = false, OPTIONAL_OUTPUTS = false;

  S factor;

  FE_DEVICE bool near(const Place&) const { return true; }

  template <bool NEAR, int PAIRS>
  FE_DEVICE void apply(const Two<S> (&in)[1][PAIRS], Two<S> (&out)[1][PAIRS], int, int, Two<S>&) const {
#pragma unroll
    for (int i = 0; i < PAIRS; ++i) out[0][i] = Real<Two<S>>::of(factor) * in[0][i];
  }
};

constexpr int RESCALED = 5;
constexpr int64_t RESCALE_BLOCKS = 1024;

struct RescaleArguments {
  Tensors<2> tensors[RESCALED];  // each twice: read and written
  Plan plans[RESCALED];
  ScalarType read_as[RESCALED];
  Number upstream, expected;
};

// Tensor blockIdx.y times upstream / expected: at once done where the two are equal.
template <class S>
__global__ void __launch_bounds__(THREADS, BLOCKS<S>) rescale_kernel(const __grid_constant__ RescaleArguments a) {
  const S upstream = a.upstream.get<S>(), expected = a.expected.get<S>();
  if (upstream == expected) return;
  const Tensors<2>& tensors = a.tensors[blockIdx.y];
  const Plan& plan = a.plans[blockIdx.y];
  const auto run = [&](auto type) {
    using Scaling = Pass<decltype(type), decltype(type), Scaled<S>>;
    for (int64_t share = blockIdx.x; share < plan.shares; share += gridDim.x) {
      const Place place(plan, tensors.shape, share, Scaling::SIZE);
      Scaling(tensors.shape, tensors.views, place, {upstream / expected}).run(plan, place);
    }
  };
  if constexpr (std::is_same_v<S, double>) {
    if (a.read_as[blockIdx.y] == ScalarType::Double) return run(double());
  } else {
    switch (a.read_as[blockIdx.y]) {
      case ScalarType::Float:
        return run(float());
      case ScalarType::BFloat16:
        return run(bfloat16());
      case ScalarType::Half:
        return run(float16());
      default:
        break;
    }
  }
  run(Any());
}

bool is_16_bit(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// How x_hat and x with their gradients are read: at full speed where they share a dtype or x is float32 and x_hat is narrower.
struct DataTypes {
  ScalarType x_hat = ANY, x = ANY;
};

DataTypes prepare(Tensors<4>& data, Plan& plan, bool float64) {
  const ScalarType x_hat = data.common_dtype(0, 2), x = data.common_dtype(1, 2);
  const bool pair = x_hat == x || (is_16_bit(x_hat) && x == ScalarType::Float);
  const bool possible = x_hat != ANY && x != ANY && pair && float64 == (x_hat == ScalarType::Double);
  const bool vectors = data.align(possible ? unit_of(x_hat) : 0, nullptr);
  plan = Plan(data.shape, vectors ? unit_of(x_hat) : LANES);
  return vectors ? DataTypes{x_hat, x} : DataTypes{};
}

// run(x_hat, x, scalar)
template <class Run>
void with_types(const DataTypes& types, bool float64, Run run) {
  with_type(types.x_hat, float64, [&](auto x_hat, auto scalar) {
    if constexpr (std::is_same_v<decltype(x_hat), bfloat16> || std::is_same_v<decltype(x_hat), float16>)
      if (types.x == ScalarType::Float) return run(x_hat, float(), scalar);
    run(x_hat, x_hat, scalar);
  });
}

}  // namespace

std::tuple<MaybeTensor, Tensor, MaybeTensor> elbo(Tensor x_hat, Tensor x, MaybeTensor mu, MaybeTensor logvar, MaybeTensor kl,
                                                  double beta, MaybeTensor beta_tensor, double grad_scale,
                                                  MaybeTensor grad_scale_tensor, std::optional<double> weight, double precision,
                                                  double constant, MaybeTensor g_x_hat, MaybeTensor g_x, MaybeTensor g_mu,
                                                  MaybeTensor g_logvar, MaybeTensor g_kl) {
  const Launcher launch(x_hat);
  const bool float64 = any_float64(&x_hat, &x, pointer(mu), pointer(logvar), pointer(kl));
  ElboArguments a = {};
  a.data = Tensors<4>({&x_hat, &x, pointer(g_x_hat), pointer(g_x)}, false);
  const DataTypes types = prepare(a.data, a.data_plan, float64);
  bool latent_vectors = false;
  if (mu) {
    a.latent = Tensors<4>({&*mu, &*logvar, pointer(g_mu), pointer(g_logvar)}, false);
    // At full speed where they share the dtype of x_hat, for which there is a kernel.
    latent_vectors =
        a.latent.align(types.x_hat != ANY && a.latent.common_dtype() == types.x_hat ? unit_of(types.x_hat) : 0, nullptr);
    a.latent_plan = Plan(a.latent.shape, latent_vectors ? unit_of(types.x_hat) : LANES);
  } else {
    a.given_kl = column_of(kl);
  }
  a.beta = number_of(beta_tensor, beta), a.grad_scale = number_of(grad_scale_tensor, grad_scale);
  a.weight = weight.value_or(1.0), a.precision = precision, a.constant = constant;
  const int64_t blocks = std::max<int64_t>(1, a.data_plan.grid + a.latent_plan.grid);

  std::optional<Tensor> nll, kl_out, loss, partials, counter;
  with_types(types, float64, [&](auto first, auto second, auto scalar) {
    using S = decltype(scalar);
    nll = launch.empty<S>(1, a.data.shape.rows);
    a.nll = nll->mutable_data_ptr();
    if (mu) {
      kl_out = launch.empty<S>(1, a.data.shape.rows);
      a.kl = kl_out->mutable_data_ptr();
    }
    if (weight) {
      loss = launch.empty<S>(0, 1);
      a.loss = loss->mutable_data_ptr();
    }
    if (g_kl) a.g_kl = g_kl->mutable_data_ptr(), a.g_kl_dtype = dtype_of(*g_kl);
    if (a.loss || a.g_kl || a.data_plan.split() || a.latent_plan.split()) {
      partials = launch.empty<S>(1, blocks), a.ticket = launch.ticket(counter);
      a.partials = partials->mutable_data_ptr();
    }
    using T = decltype(first);
    using U = decltype(second);
    launch(latent_vectors ? elbo_kernel<T, U, T, S> : elbo_kernel<T, U, Any, S>, blocks, a);
  });
  return {loss, *nll, kl_out};
}

void gaussian_nll_backward(Tensor g_nll, Tensor x_hat, Tensor x, double scale, std::optional<double> expected,
                           MaybeTensor expected_tensor, MaybeTensor g_x_hat, MaybeTensor g_x) {
  const Launcher launch(x_hat);
  const bool float64 = any_float64(&x_hat, &x);
  NllBackwardArguments a = {};
  a.data = Tensors<4>({&x_hat, &x, pointer(g_x_hat), pointer(g_x)}, false);
  const DataTypes types = prepare(a.data, a.plan, float64);
  a.g_nll = column_of(g_nll);
  a.scale = scale;
  // A look at one number can tell only where there is one.
  a.has_expected = (expected || expected_tensor) && (a.g_nll.stride == 0 || a.data.shape.rows == 1);
  a.expected = number_of(expected_tensor, expected.value_or(0));
  with_types(types, float64, [&](auto first, auto second, auto scalar) {
    launch(nll_backward_kernel<decltype(first), decltype(second), decltype(scalar)>, a.plan.grid, a);
  });
}

void rescale_(std::vector<Tensor> gradients, Tensor upstream, double expected, MaybeTensor expected_tensor) {
  const Launcher launch(upstream);
  bool float64 = any_float64(&upstream);
  for (const Tensor& gradient : gradients) float64 = float64 || any_float64(&gradient);
  RescaleArguments a = {};
  a.upstream = number_of(upstream, 0), a.expected = number_of(expected_tensor, expected);
  int count = 0;
  int64_t blocks = 0;
  const auto flush = [&] {
    launch(float64 ? rescale_kernel<double> : rescale_kernel<float>, blocks, a, count);
    count = 0, blocks = 0;
  };
  for (const Tensor& gradient : gradients) {
    Tensors<2>& tensors = a.tensors[count] = Tensors<2>({&gradient, &gradient}, false);
    tensors.merge_rows();
    const ScalarType dtype = tensors.common_dtype();
    const bool vectors = tensors.align(float64 == (dtype == ScalarType::Double) ? unit_of(dtype) : 0, nullptr);
    a.read_as[count] = vectors ? dtype : ANY;
    a.plans[count] = Plan(tensors.shape, unit_of(a.read_as[count]));
    // As a rule there is nothing to do.
    blocks = std::max(blocks, std::min(a.plans[count].shares, RESCALE_BLOCKS));
    if (++count == RESCALED) flush();
  }
  if (count > 0) flush();
}

}  // namespace fused_elbo

FUSED_ELBO_REGISTER(CUDA)
