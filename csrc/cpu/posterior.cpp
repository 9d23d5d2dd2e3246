#include "noise.h"
#include "views.h"

namespace fused_elbo {
namespace {

struct Parameters {
  const Tensor &mu, &raw;
  const Tensor *prior_mean, *prior_raw;
  const Tensor *seed, *eps;
  int64_t first_index, offset;
};

struct Upstream {
  const Tensor *g_z, *g_kl, *g_log_ratio, *path_weight;
};

struct Numbers {
  Param param;
  Clamp clamp;
  double min_std, low, high;
  std::optional<double> free_bits;
  double posterior_share, prior_share;
};

template <class T>
PosteriorOptions<T> options_of(const Numbers& n) {
  return {n.param,
          n.clamp,
          static_cast<T>(n.min_std),
          static_cast<T>(n.low),
          static_cast<T>(n.high),
          static_cast<T>(n.free_bits.value_or(0)),
          static_cast<T>(n.posterior_share),
          static_cast<T>(n.prior_share)};
}

// The parameters of a tile, read once for all samples, and what they stand for.
template <class T>
struct Buffers {
  alignas(CACHE_LINE) T mu[TILE], raw[TILE], clamped[TILE], prior_mean[TILE], prior_raw[TILE];
  alignas(CACHE_LINE) T sigma[TILE], d[TILE], prior_std[TILE];
  alignas(CACHE_LINE) T eps[Noise<T>::SIZE];

  MomentsTile<T> moments() { return {sigma, d, prior_std}; }
};

template <class T>
class Source {
 public:
  Source(const Parameters& p, const Numbers& numbers)
      : options(options_of<T>(numbers)),
        rows(p.mu.sizes()[0]),
        columns(p.mu, 1, true),
        grid(rows, columns.columns),
        mu_(view(&p.mu, 1)),
        raw_(view(&p.raw, 1)),
        prior_mean_(view(p.prior_mean, 1)),
        prior_raw_(view(p.prior_raw, 1)),
        eps_(view(p.eps, 2)),
        noise_(p.seed, columns.columns, p.first_index, p.offset) {}

  View view(const Tensor* tensor, int leading) const { return View(tensor, leading, rows, columns); }

  bool has_noise() const { return noise_ || eps_; }

  // The clamped parameters; the raw one is kept, in place or in its buffer, for the clamp's gradient.
  PosteriorTile<T> read(const Tile& tile, Buffers<T>& b, const T** unclamped = nullptr) const {
    const T* raw = raw_.read(tile, b.raw);
    if (unclamped) *unclamped = raw;
    if (options.clamp != Clamp::none) {
      posterior_kernels<T>().clamp(raw, b.clamped, options, tile.count());
      raw = b.clamped;
    }
    return {mu_.read(tile, b.mu), raw, prior_mean_.read(tile, b.prior_mean), prior_raw_.read(tile, b.prior_raw)};
  }

  // The same tile of sample k.
  Tile of_sample(Tile tile, int64_t k) const {
    tile.row += k * rows;
    return tile;
  }

  const T* normals(const Tile& tile, int64_t k, Buffers<T>& b) const {
    return noise_ ? noise_.sample(k, rows)(tile, b.eps) : eps_.read(of_sample(tile, k), b.eps);
  }

  int64_t tiles_a_thread(int64_t samples) const {
    return std::max<int64_t>(1, tiles_worth(LATENT_GRAIN, grid) / std::max<int64_t>(1, samples));
  }

  const PosteriorOptions<T> options;
  const int64_t rows;
  const Columns columns;
  const Grid grid;

 private:
  const View mu_, raw_, prior_mean_, prior_raw_, eps_;
  const Noise<T> noise_;
};

template <class T>
void forward(const Parameters& parameters, const Numbers& numbers, const Tensor* z, const Tensor* kl_rows,
             const Tensor* kl_elements, const Tensor* log_ratio) {
  const Source<T> source(parameters, numbers);
  const Grid &grid = source.grid, none(0, 1);
  const Tensor* const of_samples = z ? z : log_ratio;
  const int64_t samples = source.has_noise() && of_samples ? of_samples->sizes()[0] : 0;
  const View to_z = source.view(z, 2), to_elements = source.view(kl_elements, 1);
  RowSums divergences(kl_rows ? grid : none), ratios(log_ratio ? Grid(samples * source.rows, grid.columns) : none);
  prefer_large_pages(z);
  prefer_large_pages(kl_elements);
  const bool want_kl = kl_rows || kl_elements;
  parallel(grid.count, source.tiles_a_thread(samples), [&](int64_t i) {
    const Tile tile = grid[i];
    const int64_t n = tile.count();
    Buffers<T> b;
    alignas(CACHE_LINE) T z_buffer[TILE], terms[TILE];
    const PosteriorTile<T> from = source.read(tile, b);
    T* const kl = kl_elements ? to_elements.target(tile, terms) : want_kl ? terms : nullptr;
    posterior_kernels<T>().moments(from, b.moments(), kl, source.options, n);
    to_elements.finish(tile, terms);
    if (kl_rows) divergences.add(tile, terms, kernels<T>());
    for (int64_t k = 0; k < samples; ++k) {
      const Tile of_sample = source.of_sample(tile, k);
      T* const sample = z ? to_z.target(of_sample, z_buffer) : z_buffer;
      posterior_kernels<T>().sample(from, b.moments(), source.normals(tile, k, b), sample, log_ratio ? terms : nullptr, n);
      to_z.finish(of_sample, z_buffer);
      if (log_ratio) ratios.add(of_sample, terms, kernels<T>());
    }
  });
  RowElements(kl_rows, source.rows).write<T>(divergences, source.rows);
  RowElements(log_ratio, source.rows).write<T>(ratios, samples * source.rows);
}

template <class T>
void backward(const Parameters& parameters, const Numbers& numbers, const Upstream& upstream, int64_t samples,
              const Tensor* g_mu, const Tensor* g_raw, const Tensor* g_prior_mean, const Tensor* g_prior_raw) {
  const Source<T> source(parameters, numbers);
  const View g_z = source.view(upstream.g_z, 2), g_kl = source.view(upstream.g_kl, 1);
  const RowElements g_ratio(upstream.g_log_ratio, source.rows), path_weight(upstream.path_weight, source.rows);
  const View to_mu = source.view(g_mu, 1), to_raw = source.view(g_raw, 1);
  const View to_prior_mean = source.view(g_prior_mean, 1), to_prior_raw = source.view(g_prior_raw, 1);
  for (const Tensor* fresh : {g_mu, g_raw, g_prior_mean, g_prior_raw}) prefer_large_pages(fresh);
  const bool sampled = source.has_noise() && (g_z || g_ratio);
  // Of log_ratio, the posterior's log-variance gets half the gradient beside what z passes on.
  const bool direct = sampled && g_ratio && !path_weight;
  parallel(source.grid.count, source.tiles_a_thread(sampled ? samples : 0), [&](int64_t i) {
    const Tile tile = source.grid[i];
    const int64_t n = tile.count();
    Buffers<T> b;
    alignas(CACHE_LINE) T upstreams[4][TILE], sums[5][TILE], gradients[4][TILE];
    const T* unclamped;
    const PosteriorTile<T> from = source.read(tile, b, &unclamped);
    posterior_kernels<T>().moments(from, b.moments(), nullptr, source.options, n);
    const SampleSums<T> added = {sampled ? sums[0] : nullptr, sampled ? sums[1] : nullptr,
                                 sampled && g_ratio ? sums[2] : nullptr, sampled && g_ratio ? sums[3] : nullptr};
    if (sampled)
      for (int64_t k = 0; k < samples; ++k) {
        const Tile of_sample = source.of_sample(tile, k);
        const UpstreamTile<T> given = {g_z.read(of_sample, upstreams[0]), g_ratio.read(of_sample, upstreams[1]),
                                       path_weight.read(of_sample, upstreams[2])};
        posterior_kernels<T>().sample_backward(from, b.moments(), source.normals(tile, k, b), given, added, k == 0, n);
      }
    if (direct)
      for (int64_t r = 0; r < tile.rows; ++r) {
        double sum = 0;
        for (int64_t k = 0; k < samples; ++k) sum += g_ratio[k * source.rows + tile.row + r];
        std::fill_n(sums[4] + r * tile.columns, tile.columns, static_cast<T>(0.5 * sum));
      }
    const PosteriorGradientTile<T> out = {to_mu.target(tile, gradients[0]), to_raw.target(tile, gradients[1]),
                                          to_prior_mean.target(tile, gradients[2]), to_prior_raw.target(tile, gradients[3])};
    posterior_kernels<T>().finish(from, b.moments(), added, direct ? sums[4] : nullptr, g_kl.read(tile, upstreams[3]), out,
                                  source.options, n);
    if (out.raw && source.options.clamp != Clamp::none)
      posterior_kernels<T>().clamp_backward(unclamped, out.raw, source.options, n);
    to_mu.finish(tile, gradients[0]);
    to_raw.finish(tile, gradients[1]);
    to_prior_mean.finish(tile, gradients[2]);
    to_prior_raw.finish(tile, gradients[3]);
  });
}

}  // namespace

void posterior(Tensor mu, Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
               int64_t first_index, int64_t offset, int64_t param, double min_std, int64_t clamp, double low, double high,
               std::optional<double> free_bits, MaybeTensor z, MaybeTensor kl_rows, MaybeTensor kl_elements,
               MaybeTensor log_ratio) {
  const bool wide = any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw));
  const Parameters parameters = {mu,          raw,   pointer(prior_mean), pointer(prior_raw), pointer(seed), pointer(eps),
                                 first_index, offset};
  const Numbers numbers = {static_cast<Param>(param), static_cast<Clamp>(clamp), min_std, low, high, free_bits, 1, 1};
  (wide ? forward<double> : forward<float>)(parameters, numbers, pointer(z), pointer(kl_rows), pointer(kl_elements),
                                            pointer(log_ratio));
}

void posterior_backward(MaybeTensor g_z, MaybeTensor g_kl, MaybeTensor g_log_ratio, MaybeTensor path_weight, Tensor mu,
                        Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
                        int64_t first_index, int64_t offset, int64_t samples, int64_t param, double min_std, int64_t clamp,
                        double low, double high, std::optional<double> free_bits, double posterior_share, double prior_share,
                        MaybeTensor g_mu, MaybeTensor g_raw, MaybeTensor g_prior_mean, MaybeTensor g_prior_raw) {
  const bool wide = any_float64(&mu, &raw, pointer(prior_mean), pointer(prior_raw));
  const Parameters parameters = {mu,          raw,   pointer(prior_mean), pointer(prior_raw), pointer(seed), pointer(eps),
                                 first_index, offset};
  const Numbers numbers = {
      static_cast<Param>(param), static_cast<Clamp>(clamp), min_std, low, high, free_bits, posterior_share, prior_share};
  const Upstream upstream = {pointer(g_z), pointer(g_kl), pointer(g_log_ratio), pointer(path_weight)};
  (wide ? backward<double> : backward<float>)(parameters, numbers, upstream, samples, pointer(g_mu), pointer(g_raw),
                                              pointer(g_prior_mean), pointer(g_prior_raw));
}

}  // namespace fused_elbo
