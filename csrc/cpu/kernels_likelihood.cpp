#include "../likelihood_math.h"
#include "kernels.h"
#include "loops.h"

namespace fused_elbo {
namespace FE_ISA {
namespace {

template <Family FAMILY, Activation ACTIVATION, class T>
void likelihood(const LikelihoodTile<T>& tile, const LikelihoodOptions<T>& options, int64_t n) {
  using V = Vector<T>;
  using R = Real<V>;
  const LikelihoodTile<T> t = tile;
  const V zero = R::of(0), constant = R::of(options.constant), scale = R::of(options.scale), shift = R::of(options.shift);
  const auto one_scale = scale_of<FAMILY>(R::of(options.log_scale), constant, scale);
  const bool levels = options.levels;
  for_elements<V>(n, [&](auto at) __attribute__((always_inline)) {
    V x_hat = at.load(t.x_hat), x = at.load(t.x), mask = zero, weight = R::of(1);
    V log_scale = zero;
    if (t.log_scale) log_scale = at.load(t.log_scale);
    if (t.weight) weight = at.load(t.weight);
    if (t.mask) {
      mask = at.load(t.mask);
      x_hat = mask > zero ? x_hat : zero;
      x = mask > zero ? x : zero;
      log_scale = mask > zero ? log_scale : zero;
    }
    const auto write = [&](T* to, V v) __attribute__((always_inline)) {
      if (!to) return;
      if (t.mask) v = mask > zero ? v : zero;
      at.store(to, v);
    };
    const V target = levels ? R::mad(scale, x, shift) : x;
    const auto a = activated<ACTIVATION>(x_hat);
    const auto from = [&](const Scale<V>& s) __attribute__((always_inline)) {
      return element<FAMILY>(a.value, FAMILY == Family::discretized_logistic ? x : target, target, s);
    };
    const auto e = t.log_scale ? from(scale_of<FAMILY>(log_scale, constant, scale)) : from(one_scale);
    write(t.nll, weight * e.nll);
    write(t.slope, weight * e.by_log_scale);
    if (!t.upstream) return;
    const V factor = weight * at.load(t.upstream);
    write(t.g_x_hat, factor * e.by_location * a.slope);
    write(t.g_x, factor * e.by_target);
    write(t.g_log_scale, factor * e.by_log_scale);
  });
}

template <Family FAMILY, class T>
void by_activation(const LikelihoodTile<T>& tile, const LikelihoodOptions<T>& options, int64_t n) {
  switch (options.activation) {
    case Activation::identity:
      return likelihood<FAMILY, Activation::identity>(tile, options, n);
    case Activation::sigmoid:
      return likelihood<FAMILY, Activation::sigmoid>(tile, options, n);
    case Activation::tanh:
      return likelihood<FAMILY, Activation::tanh>(tile, options, n);
  }
}

template <class T>
void by_family(const LikelihoodTile<T>& tile, const LikelihoodOptions<T>& options, int64_t n) {
  switch (options.family) {
    case Family::gaussian:
      return by_activation<Family::gaussian>(tile, options, n);
    case Family::laplace:
      return by_activation<Family::laplace>(tile, options, n);
    case Family::bernoulli:
      return likelihood<Family::bernoulli, Activation::identity>(tile, options, n);
    case Family::discretized_logistic:
      return by_activation<Family::discretized_logistic>(tile, options, n);
  }
}

template <class T>
void from_uint8(const uint8_t* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

}  // namespace

extern const LikelihoodTable likelihood_table = {{from_uint8<float>, by_family<float>},
                                                 {from_uint8<double>, by_family<double>}};

}  // namespace FE_ISA
}  // namespace fused_elbo
