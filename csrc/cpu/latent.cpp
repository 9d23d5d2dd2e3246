#include "noise.h"

namespace fused_elbo {
namespace {

template <class T>
MaybeTensor forward(const Tensor& mu, const Tensor& logvar, const Tensor* seed, const Tensor* eps, int64_t first_index,
                    int64_t offset, const Tensor* z, bool want_kl) {
  enum { MU, LOGVAR, EPS, Z };
  const Tiles<T, 4> tiles({&mu, &logvar, eps, z}, true);
  const Noise<T> noise(seed, tiles.rows.columns, first_index, offset);
  RowSums sums(want_kl ? tiles.grid : Grid(0, 1));
  prefer_large_pages(z);
  parallel(tiles.grid.count, tiles_worth(LATENT_GRAIN, tiles.grid), [&](int64_t i) {
    const Tile tile = tiles.grid[i];
    alignas(CACHE_LINE) T mu_buffer[TILE], logvar_buffer[TILE], eps_buffer[Noise<T>::SIZE], z_buffer[TILE], terms[TILE];
    const T* normals = noise ? noise(tile, eps_buffer) : tiles.read(EPS, tile, eps_buffer);
    const bool keep = want_kl && RowSums::wants_terms(tile);
    const double sum = kernels<T>().latent(tiles.read(MU, tile, mu_buffer), tiles.read(LOGVAR, tile, logvar_buffer), normals,
                                           tiles.target(Z, tile, z_buffer), keep ? terms : nullptr, want_kl, tile.count());
    tiles.finish(Z, tile, z_buffer);
    if (want_kl) sums.add(i, tile, sum, terms, kernels<T>());
  });
  if (!want_kl) return std::nullopt;
  const Tensor kl = empty<T>({tiles.rows.rows});
  T* out = static_cast<T*>(kl.data_ptr());
  for (int64_t row = 0; row < tiles.rows.rows; ++row) out[row] = static_cast<T>(0.5 * sums[row]);
  return kl;
}

template <class T>
void backward(const Tensor* g_z, const Tensor* g_kl, const Tensor& mu, const Tensor& logvar, const Tensor* seed,
              const Tensor* eps, int64_t first_index, int64_t offset, const Tensor* g_mu, const Tensor* g_logvar) {
  enum { MU, LOGVAR, EPS, G_Z, G_MU, G_LOGVAR };
  const Tiles<T, 6> tiles({&mu, &logvar, eps, g_z, g_mu, g_logvar}, true);
  const Noise<T> noise(g_z ? seed : nullptr, tiles.rows.columns, first_index, offset);
  const int64_t g_kl_stride = g_kl ? g_kl->strides()[0] : 0;
  prefer_large_pages(g_mu);
  prefer_large_pages(g_logvar);
  parallel(tiles.grid.count, tiles_worth(LATENT_GRAIN, tiles.grid), [&](int64_t i) {
    const Tile tile = tiles.grid[i];
    alignas(CACHE_LINE) T mu_buffer[TILE], logvar_buffer[TILE], eps_buffer[Noise<T>::SIZE], g_z_buffer[TILE], c[TILE],
        g_mu_buffer[TILE], g_logvar_buffer[TILE];
    const T* normals = noise ? noise(tile, eps_buffer) : tiles.read(EPS, tile, eps_buffer);
    if (g_kl)
      for (int64_t r = 0; r < tile.rows; ++r)
        std::fill_n(c + r * tile.columns, tile.columns, static_cast<T>(number_at(*g_kl, (tile.row + r) * g_kl_stride)));
    // A gradient that nobody asked for goes to its buffer and is left there.
    T* to_mu = g_mu ? tiles.target(G_MU, tile, g_mu_buffer) : g_mu_buffer;
    T* to_logvar = g_logvar ? tiles.target(G_LOGVAR, tile, g_logvar_buffer) : g_logvar_buffer;
    kernels<T>().latent_backward(tiles.read(MU, tile, mu_buffer), tiles.read(LOGVAR, tile, logvar_buffer), normals,
                                 tiles.read(G_Z, tile, g_z_buffer), g_kl ? c : nullptr, to_mu, to_logvar, tile.count());
    tiles.finish(G_MU, tile, g_mu_buffer);
    tiles.finish(G_LOGVAR, tile, g_logvar_buffer);
  });
}

}  // namespace

MaybeTensor rsample_kl(Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps, int64_t first_index, int64_t offset,
                       MaybeTensor z, bool want_kl) {
  const auto run = any_float64(&mu, &logvar) ? forward<double> : forward<float>;
  return run(mu, logvar, pointer(seed), pointer(eps), first_index, offset, pointer(z), want_kl);
}

void rsample_kl_backward(MaybeTensor g_z, MaybeTensor g_kl, Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps,
                         int64_t first_index, int64_t offset, MaybeTensor g_mu, MaybeTensor g_logvar) {
  const auto run = any_float64(&mu, &logvar) ? backward<double> : backward<float>;
  run(pointer(g_z), pointer(g_kl), mu, logvar, pointer(seed), pointer(eps), first_index, offset, pointer(g_mu),
      pointer(g_logvar));
}

}  // namespace fused_elbo
