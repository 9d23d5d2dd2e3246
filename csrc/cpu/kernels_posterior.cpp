#include "../posterior_math.h"
#include "kernels.h"
#include "loops.h"

namespace fused_elbo {
namespace FE_ISA {
namespace {

template <class T>
FE_FN Bounds<Vector<T>> bounds(const PosteriorOptions<T>& options) {
  using R = Real<Vector<T>>;
  return {R::of(options.low), R::of(options.high)};
}

template <class T>
void clamp(const T* raw, T* out, const PosteriorOptions<T>& options, int64_t n) {
  using V = Vector<T>;
  const auto b = bounds(options);
  if (options.clamp == Clamp::hard)
    for_elements<V>(n, [&](auto at) { at.store(out, clamped<Clamp::hard>(at.load(raw), b)); });
  else
    for_elements<V>(n, [&](auto at) { at.store(out, clamped<Clamp::soft>(at.load(raw), b)); });
}

template <class T>
void clamp_backward(const T* raw, T* gradient, const PosteriorOptions<T>& options, int64_t n) {
  using V = Vector<T>;
  const auto b = bounds(options);
  if (options.clamp == Clamp::hard)
    for_elements<V>(n, [&](auto at) { at.store(gradient, through_clamp<Clamp::hard>(at.load(gradient), at.load(raw), b)); });
  else
    for_elements<V>(n, [&](auto at) { at.store(gradient, through_clamp<Clamp::soft>(at.load(gradient), at.load(raw), b)); });
}

// A mean or a standard deviation that is absent is left out, instead of 0 taken off and 1 divided by.
template <class T, class At, class V>
FE_FN Standardised<V> in_prior(const PosteriorTile<T>& tile, const T* std, const At& at, V v) {
  const V zero = Real<V>::of(0), mean = tile.prior_mean ? at.load(tile.prior_mean) : zero;
  return std ? standardised<true, true>(v, mean, at.load(std)) : standardised<true, false>(v, mean, zero);
}

template <Param PARAM, class T>
void moments_of(const PosteriorTile<T>& tile, const MomentsTile<T>& out, T* kl, const PosteriorOptions<T>& options, int64_t n) {
  using V = Vector<T>;
  using R = Real<V>;
  const PosteriorTile<T> t = tile;
  const MomentsTile<T> to = out;
  const V min_std = R::of(options.min_std), free_bits = R::of(options.free_bits);
  for_elements<V>(n, [&](auto at) __attribute__((always_inline)) {
    const auto q = moments<PARAM>(at.load(t.raw), min_std);
    V d = q.logvar;
    if (t.prior_raw) {
      const auto p = moments<PARAM>(at.load(t.prior_raw), min_std);
      at.store(to.prior_std, p.sigma);
      d = d - p.logvar;
    }
    at.store(to.sigma, q.sigma);
    at.store(to.d, d);
    if (kl) at.store(kl, divergence(in_prior(t, t.prior_raw ? to.prior_std : nullptr, at, at.load(t.mu)), d, free_bits).value);
  });
}

template <class T>
void moments_by_param(const PosteriorTile<T>& tile, const MomentsTile<T>& out, T* kl, const PosteriorOptions<T>& options,
                      int64_t n) {
  switch (options.param) {
    case Param::logvar:
      return moments_of<Param::logvar>(tile, out, kl, options, n);
    case Param::log_std:
      return moments_of<Param::log_std>(tile, out, kl, options, n);
    case Param::std:
      return moments_of<Param::std>(tile, out, kl, options, n);
    case Param::var:
      return moments_of<Param::var>(tile, out, kl, options, n);
    case Param::softplus:
      return moments_of<Param::softplus>(tile, out, kl, options, n);
  }
}

template <class T>
void sample(const PosteriorTile<T>& tile, const MomentsTile<T>& moments, const T* eps, T* z, T* ratio, int64_t n) {
  using V = Vector<T>;
  const PosteriorTile<T> t = tile;
  const MomentsTile<T> m = moments;
  const T* const std = t.prior_raw ? m.prior_std : nullptr;
  for_elements<V>(n, [&](auto at) __attribute__((always_inline)) {
    const V e = at.load(eps), found = Real<V>::mad(e, at.load(m.sigma), at.load(t.mu));
    at.store(z, found);
    if (ratio) at.store(ratio, log_ratio(e, at.load(m.d), in_prior(t, std, at, found)));
  });
}

template <bool G_Z, bool RATIO, bool PATH, class T>
void sample_backward_of(const PosteriorTile<T>& tile, const MomentsTile<T>& moments, const T* eps,
                        const UpstreamTile<T>& upstream, const SampleSums<T>& sums, bool first, int64_t n) {
  using V = Vector<T>;
  using R = Real<V>;
  const PosteriorTile<T> t = tile;
  const MomentsTile<T> m = moments;
  const UpstreamTile<T> u = upstream;
  const SampleSums<T> to = sums;
  const T* const std = t.prior_raw ? m.prior_std : nullptr;
  for_elements<V>(n, [&](auto at) __attribute__((always_inline)) {
    const V zero = R::of(0), e = at.load(eps);
    V sigma = zero, g_z = zero, g_ratio = zero, path_weight = zero;
    Standardised<V> z = {zero, zero};
    if (G_Z) g_z = at.load(u.g_z);
    if (PATH) path_weight = at.load(u.path_weight);
    if (RATIO) {
      sigma = at.load(m.sigma);
      g_ratio = at.load(u.g_ratio);
      z = in_prior(t, std, at, R::mad(e, sigma, at.load(t.mu)));
    }
    const auto g = sample_gradient<G_Z, RATIO, PATH>(g_z, g_ratio, path_weight, e, sigma, z);
    const auto add = [&](T* sum, V v) __attribute__((always_inline)) { at.store(sum, first ? v : at.load(sum) + v); };
    add(to.mu, g.z);
    add(to.sigma, g.z * e);
    if (RATIO) {
      add(to.prior_mean, g.prior_mean);
      add(to.prior_logvar, g.prior_logvar);
    }
  });
}

template <class T>
void sample_backward(const PosteriorTile<T>& tile, const MomentsTile<T>& at, const T* eps, const UpstreamTile<T>& upstream,
                     const SampleSums<T>& sums, bool first, int64_t n) {
  const bool path = upstream.path_weight;
  const auto run =
      !upstream.g_ratio ? (path ? sample_backward_of<true, false, true, T> : sample_backward_of<true, false, false, T>)
      : upstream.g_z    ? (path ? sample_backward_of<true, true, true, T> : sample_backward_of<true, true, false, T>)
                        : (path ? sample_backward_of<false, true, true, T> : sample_backward_of<false, true, false, T>);
  run(tile, at, eps, upstream, sums, first, n);
}

template <Param PARAM, class T>
void finish_of(const PosteriorTile<T>& tile, const MomentsTile<T>& moments, const SampleSums<T>& sums, const T* by_logvar,
               const T* c, const PosteriorGradientTile<T>& out, const PosteriorOptions<T>& options, int64_t n) {
  using V = Vector<T>;
  using R = Real<V>;
  const PosteriorTile<T> t = tile;
  const MomentsTile<T> m = moments;
  const SampleSums<T> s = sums;
  const PosteriorGradientTile<T> to = out;
  const V free_bits = R::of(options.free_bits);
  const V posterior_share = R::of(options.posterior_share), prior_share = R::of(options.prior_share);
  const T* const std = t.prior_raw ? m.prior_std : nullptr;
  for_elements<V>(n, [&](auto at) __attribute__((always_inline)) {
    const V zero = R::of(0);
    const auto given = [&](const T* from) __attribute__((always_inline)) { return from ? at.load(from) : zero; };
    V mu = given(s.mu), sigma = given(s.sigma), logvar = given(by_logvar);
    V prior_mean = given(s.prior_mean), prior_logvar = given(s.prior_logvar);
    if (c) {
      const auto kl = divergence(in_prior(t, std, at, at.load(t.mu)), at.load(m.d), free_bits);
      const V upstream = at.load(c), of_posterior = posterior_share * upstream, of_prior = prior_share * upstream;
      mu = R::mad(of_posterior, kl.by_mean, mu);
      logvar = R::mad(of_posterior, kl.by_logvar, logvar);
      prior_mean = prior_mean - of_prior * kl.by_mean;
      prior_logvar = R::mad(of_prior, kl.by_prior_logvar, prior_logvar);
    }
    if (to.mu) at.store(to.mu, mu);
    if (to.raw) at.store(to.raw, through_moments<PARAM>(sigma, logvar, at.load(t.raw), at.load(m.sigma)));
    if (to.prior_mean) at.store(to.prior_mean, prior_mean);
    if (to.prior_raw)
      at.store(to.prior_raw, through_moments<PARAM>(zero, prior_logvar, at.load(t.prior_raw), at.load(m.prior_std)));
  });
}

template <class T>
void finish(const PosteriorTile<T>& tile, const MomentsTile<T>& at, const SampleSums<T>& sums, const T* by_logvar, const T* c,
            const PosteriorGradientTile<T>& out, const PosteriorOptions<T>& options, int64_t n) {
  switch (options.param) {
    case Param::logvar:
      return finish_of<Param::logvar>(tile, at, sums, by_logvar, c, out, options, n);
    case Param::log_std:
      return finish_of<Param::log_std>(tile, at, sums, by_logvar, c, out, options, n);
    case Param::std:
      return finish_of<Param::std>(tile, at, sums, by_logvar, c, out, options, n);
    case Param::var:
      return finish_of<Param::var>(tile, at, sums, by_logvar, c, out, options, n);
    case Param::softplus:
      return finish_of<Param::softplus>(tile, at, sums, by_logvar, c, out, options, n);
  }
}

template <class T>
constexpr PosteriorKernels<T> posterior_kernels() {
  return {clamp<T>, moments_by_param<T>, sample<T>, sample_backward<T>, finish<T>, clamp_backward<T>};
}

}  // namespace

extern const PosteriorTable posterior_table = {posterior_kernels<float>(), posterior_kernels<double>()};

}  // namespace FE_ISA
}  // namespace fused_elbo
