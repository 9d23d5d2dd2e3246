// The likelihood of any family: sums of rows with their gradients, in one pass.
#include <cmath>

#include "number.cuh"
// These take numbers as they are known by now.
#include "../likelihood_math.h"
#include "operands.cuh"

namespace fused_elbo {
namespace {

enum { X_HAT, X, LOG_SCALE, WEIGHT, MASK, INPUTS, G_X_HAT = INPUTS, G_X, G_LOG_SCALE, TENSORS };

template <class S>
struct LikelihoodArguments {
  Operands<TENSORS> tensors;
  Plan plan;
  int64_t inner;  // rows under one index of the first dimension; all, where that makes no difference
  Upstream upstream;
  Activation activation;
  S log_scale, precision, constant, scale, shift;
  bool levels;                   // in x
  void *nll, *slope, *partials;  // (rows,), (rows,), (2, rows, chunks)
  Ticket ticket;
};

struct Sums {
  double nll = 0, slope = 0;
};

// A thread's part of a row. Without EXTRAS elements have no scale of their own, no weight and no mask.
template <class T, class S, Family FAMILY, bool EXTRAS>
class LikelihoodPass {
 public:
  static constexpr int SIZE = UNIT<T>;

  FE_DEVICE LikelihoodPass(const LikelihoodArguments<S>& a, const Place& place) : a_(a) {
    const Shape& shape = a.tensors.shape;
    const int64_t row = place.row < shape.rows ? place.row : 0, outer = a.inner == shape.rows ? 0 : row / a.inner;
    const int64_t inner = row - outer * a.inner;
    x_hat_ = First(shape, a.tensors.views[X_HAT], outer, inner, place.column);
    g_x_hat_ = First(shape, a.tensors.views[G_X_HAT], outer, inner, place.column);
#pragma unroll
    for (int k = 0; k < TENSORS; ++k) tensors_[k] = Tensor(shape, a.tensors.views[k], outer, inner, place.column);
    upstream_ = a.upstream.data ? a.upstream.template get<S>(outer, inner) : S(0);
    const Tensor& log_scale = tensors_[LOG_SCALE];
    one_scale_ = !EXTRAS || !log_scale || log_scale.is_flat();
    if (one_scale_ && log_scale)
      scale_ = scale(log_scale.flat());
    else if (one_scale_)
      scale_ = scale_of<FAMILY>(a.log_scale, a.precision, a.constant, a.scale);
  }

  FE_DEVICE void add(const Unit<SIZE>& unit, Sums& sums) const {
    typename First::Bits x_hat_bits;
    typename Tensor::Bits bits[INPUTS];
    x_hat_.fetch(unit, x_hat_bits);
#pragma unroll
    for (int k = X; k < INPUTS; ++k)
      if (has(k)) tensors_[k].fetch(unit, bits[k]);

    S y[SIZE], activation_slope[SIZE], x[SIZE], log_scale[SIZE] = {}, weight[SIZE], mask[SIZE];
    x_hat_.unpack(unit, x_hat_bits, y);
    activate(y, activation_slope);
    tensors_[X].unpack(unit, bits[X], x);
    if (!one_scale_) tensors_[LOG_SCALE].unpack(unit, bits[LOG_SCALE], log_scale);
    unpack_or_one(WEIGHT, unit, bits, weight);
    unpack_or_one(MASK, unit, bits, mask);

    S nll = 0, slope = 0, by_x_hat[SIZE], by_x[SIZE], by_log_scale[SIZE];
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const S target = a_.levels ? Real<S>::mad(a_.scale, x[i], a_.shift) : x[i];
      const S level_or_target = FAMILY == Family::discretized_logistic ? x[i] : target;
      Scale<S> one = scale_;
      if (!one_scale_) one = scale(log_scale[i]);
      const Element<S> e = element<FAMILY>(y[i], level_or_target, target, one);
      // What does not count may be NaN: it is not multiplied by 0 but left out. What is not of the row is not written.
      const bool counts = !EXTRAS || mask[i] != S(0), adds = counts && unit.holds(i);
      nll += adds ? weight[i] * e.nll : S(0);
      slope += adds ? weight[i] * e.by_log_scale : S(0);
      const S factor = upstream_ * weight[i];
      by_x_hat[i] = counts ? factor * (e.by_location * activation_slope[i]) : S(0);
      by_x[i] = counts ? factor * e.by_target : S(0);
      by_log_scale[i] = counts ? factor * e.by_log_scale : S(0);
    }
    sums.nll += nll, sums.slope += slope;
    if (g_x_hat_) g_x_hat_.write(unit, by_x_hat);
    if (has(G_X)) tensors_[G_X].write(unit, by_x);
    if (has(G_LOG_SCALE)) tensors_[G_LOG_SCALE].write(unit, by_log_scale);
  }

 private:
  using First = Cursor<T, S, SIZE, true>;
  using Tensor = Cursor<T, S, SIZE>;

  FE_DEVICE bool has(int k) const { return (EXTRAS || k == X || k == G_X) && tensors_[k]; }

  FE_DEVICE Scale<S> scale(S log_scale) const { return scale_of<FAMILY>(log_scale, a_.constant, a_.scale); }

  FE_DEVICE void activate(S (&values)[SIZE], S (&slopes)[SIZE]) const {
    switch (a_.activation) {
      case Activation::sigmoid:
        return activate_by<Activation::sigmoid>(values, slopes);
      case Activation::tanh:
        return activate_by<Activation::tanh>(values, slopes);
      default:
        return activate_by<Activation::identity>(values, slopes);
    }
  }

  template <Activation ACTIVATION>
  static FE_DEVICE void activate_by(S (&values)[SIZE], S (&slopes)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const Activated<S> activated = fused_elbo::activated<ACTIVATION>(values[i]);
      values[i] = activated.value, slopes[i] = activated.slope;
    }
  }

  FE_DEVICE void unpack_or_one(int k, const Unit<SIZE>& unit, const typename Tensor::Bits (&bits)[INPUTS],
                               S (&values)[SIZE]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) values[i] = 1;
    if (has(k)) tensors_[k].unpack(unit, bits[k], values);
  }

  const LikelihoodArguments<S>& a_;
  First x_hat_, g_x_hat_;
  Tensor tensors_[TENSORS];
  S upstream_;
  bool one_scale_;
  Scale<S> scale_;
};

template <class T, class S, Family FAMILY, bool EXTRAS>
__global__ void __launch_bounds__(THREADS, BLOCKS<S> - (EXTRAS && sizeof(T) == 2))
    likelihood_kernel(const __grid_constant__ LikelihoodArguments<S> a) {
  using Pass = LikelihoodPass<T, S, FAMILY, EXTRAS>;
  const Shape& shape = a.tensors.shape;
  const int64_t partial_sums = shape.rows * a.plan.chunks;
  S *const nll = static_cast<S*>(a.nll), *const slope = static_cast<S*>(a.slope), *const partials = static_cast<S*>(a.partials);
  for (int64_t share = blockIdx.x; share < a.plan.shares; share += a.plan.grid) {
    const Place place(a.plan, shape, share, Pass::SIZE);
    const Pass pass(a, place);
    Sums sums;
#pragma unroll 1
    for (int number = place.thread; number < place.units; number += a.plan.threads())
      pass.add(Unit<Pass::SIZE>(shape, place, number), sums);
    const int64_t at = place.row * a.plan.chunks + place.chunk;
    if (nll) {
      const double sum = row_sum(sums.nll, a.plan);
      if (place.leads(shape)) (a.plan.split() ? partials : nll)[at] = static_cast<S>(sum);
    }
    if (slope) {
      const double sum = row_sum(sums.slope, a.plan);
      if (place.leads(shape)) (a.plan.split() ? partials + partial_sums : slope)[at] = static_cast<S>(sum);
    }
  }
  if (!a.ticket || !arrive(a.ticket)) return;
  if (nll) combine(partials, nll, shape.rows, a.plan.chunks, 0.0);
  if (slope) combine(partials + partial_sums, slope, shape.rows, a.plan.chunks, 0.0);
}

// Makes one level of rows of two where their memory allows, and chooses how they are read.
template <class S>
ScalarType prepare(LikelihoodArguments<S>& a, int64_t outer) {
  constexpr bool float64 = std::is_same_v<S, double>;
  Operands<TENSORS>& tensors = a.tensors;
  const int64_t rows = tensors.shape.rows;
  bool one_level = outer == 1 || rows == 1 || a.upstream.outer_stride == rows * a.upstream.row_stride;
  for (const Operand& view : tensors.views)
    one_level = one_level && (outer == 1 || rows == 1 || view.outer_stride == rows * view.row_stride);
  if (one_level && rows == 1) {
    a.upstream.row_stride = a.upstream.outer_stride;
    for (Operand& view : tensors.views) view.row_stride = view.outer_stride;
  }
  a.inner = one_level ? rows * outer : rows;
  const ScalarType x_hat = tensors.views[X_HAT].dtype;
  const bool possible = float64 == (x_hat == ScalarType::Double);
  if (one_level) tensors.shape.rows = a.inner;
  const bool vectors = tensors.align(possible ? unit_of(x_hat) : 0, INPUTS, one_level ? 1 : outer,
                                     rows * tensors.views[X_HAT].row_stride, float64 ? ScalarType::Double : ScalarType::Float);
  tensors.shape.rows = rows * outer;
  const ScalarType read_as = vectors ? x_hat : ANY;
  a.plan = Plan(tensors.shape, unit_of(read_as));
  return read_as;
}

bool has_extras(const Operand (&views)[TENSORS]) {
  const Operand& log_scale = views[LOG_SCALE];
  return (log_scale.data && log_scale.access != Access::FLAT) || views[WEIGHT].data || views[MASK].data ||
         views[G_LOG_SCALE].data;
}

template <class T, class S, Family FAMILY>
auto kernel_of(bool extras) {
  if constexpr (!std::is_same_v<T, Any>)
    if (!extras) return likelihood_kernel<T, S, FAMILY, false>;
  return likelihood_kernel<T, S, FAMILY, true>;
}

template <class T, class S>
auto kernel_of(Family family, bool extras) {
  switch (family) {
    case Family::laplace:
      return kernel_of<T, S, Family::laplace>(extras);
    case Family::bernoulli:
      return kernel_of<T, S, Family::bernoulli>(extras);
    case Family::discretized_logistic:
      return kernel_of<T, S, Family::discretized_logistic>(extras);
    default:
      return kernel_of<T, S, Family::gaussian>(extras);
  }
}

template <class S>
void run(const Tensor* const (&tensors)[TENSORS], const MaybeTensor& upstream, Family family, LikelihoodArguments<S> a,
         const MaybeTensor& nll, const MaybeTensor& slope) {
  const Launcher launch(*tensors[X_HAT]);
  a.tensors = Operands<TENSORS>(tensors, false, {2, 2, 2, 2, 2, 2, 2, 2});
  a.upstream = Upstream(upstream);
  const ScalarType read_as = prepare(a, tensors[X_HAT]->sizes()[0]);
  MaybeTensor partials, counter;
  if (nll) a.nll = nll->mutable_data_ptr();
  if (slope) a.slope = slope->mutable_data_ptr();
  if (a.plan.split() && (nll || slope)) {
    partials = launch.empty<S>(1, 2 * a.plan.shares), a.ticket = launch.ticket(counter);
    a.partials = partials->mutable_data_ptr();
  }
  with_type_of<S>(
      read_as, [&](auto type) { launch(kernel_of<decltype(type), S>(family, has_extras(a.tensors.views)), a.plan.grid, a); });
}

}  // namespace

void likelihood(Tensor x_hat, Tensor x, MaybeTensor log_scale_tensor, MaybeTensor weight, MaybeTensor mask,
                MaybeTensor upstream, int64_t family, int64_t activation, double log_scale, double constant, double scale,
                double shift, MaybeTensor nll, MaybeTensor slope, MaybeTensor g_x_hat, MaybeTensor g_x,
                MaybeTensor g_log_scale) {
  const Tensor* const tensors[TENSORS] = {
      &x_hat,           &x,           pointer(log_scale_tensor), pointer(weight), pointer(mask),
      pointer(g_x_hat), pointer(g_x), pointer(g_log_scale)};
  const auto run_with = [&](auto scalar) {
    using S = decltype(scalar);
    LikelihoodArguments<S> a = {};
    a.activation = static_cast<Activation>(activation);
    a.log_scale = S(log_scale), a.constant = S(constant), a.scale = S(scale), a.shift = S(shift);
    // Rounded once, where the device's exponential may be off by more, and a gradient has its square.
    a.precision = S(std::exp(-log_scale));
    a.levels = is_byte(x.scalar_type());
    run(tensors, upstream, static_cast<Family>(family), a, nll, slope);
  };
  any_float64(&x_hat, &x, pointer(log_scale_tensor), pointer(weight)) ? run_with(double()) : run_with(float());
}

}  // namespace fused_elbo
