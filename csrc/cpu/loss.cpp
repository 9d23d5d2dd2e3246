#include "tiles.h"

namespace fused_elbo {
namespace {

enum { X_HAT, X, G_X_HAT, G_X };
enum { MU, LOGVAR, G_MU, G_LOGVAR };

struct Weights {
  double beta, grad_scale, precision, constant;
  std::optional<double> total;
};

template <class T>
std::tuple<MaybeTensor, Tensor, MaybeTensor> loss_and_gradients(const Tensor& x_hat, const Tensor& x, const Tensor* mu,
                                                                const Tensor* logvar, const Tensor* kl, const Weights& w,
                                                                const Tensor* g_x_hat, const Tensor* g_x, const Tensor* g_mu,
                                                                const Tensor* g_logvar, const Tensor* g_kl) {
  const Tiles<T, 4> data({&x_hat, &x, g_x_hat, g_x}, false);
  const Tensor* const latent_tensors[] = {mu, logvar, g_mu, g_logvar};
  std::optional<Tiles<T, 4>> latent;
  if (mu) latent.emplace(latent_tensors, false);
  const Grid no_latent(0, 1);
  const Grid& latent_grid = mu ? latent->grid : no_latent;
  RowSums errors(data.grid), divergences(latent_grid);
  // x_hat that is overwritten is not fresh.
  if (g_x_hat && g_x_hat->data_ptr() != x_hat.data_ptr()) prefer_large_pages(g_x_hat);
  prefer_large_pages(g_x);
  const double unit = w.total.value_or(0) * w.grad_scale;
  const T data_weight = static_cast<T>(unit * w.precision), latent_weight = static_cast<T>(unit * w.beta);

  const auto data_tile = [&](int64_t i) {
    const Tile tile = data.grid[i];
    alignas(CACHE_LINE) T x_hat_buffer[TILE], x_buffer[TILE], g_x_hat_buffer[TILE], g_x_buffer[TILE], terms[TILE];
    const double sum =
        kernels<T>().squared_error(data.read(X_HAT, tile, x_hat_buffer), data.read(X, tile, x_buffer), data_weight,
                                   data.target(G_X_HAT, tile, g_x_hat_buffer), data.target(G_X, tile, g_x_buffer),
                                   RowSums::wants_terms(tile) ? terms : nullptr, tile.count());
    data.finish(G_X_HAT, tile, g_x_hat_buffer);
    data.finish(G_X, tile, g_x_buffer);
    errors.add(i, tile, sum, terms, kernels<T>());
  };
  const auto latent_tile = [&](int64_t i) {
    const Tile tile = latent_grid[i];
    alignas(CACHE_LINE) T mu_buffer[TILE], logvar_buffer[TILE], g_mu_buffer[TILE], g_logvar_buffer[TILE], terms[TILE];
    T* const kept = RowSums::wants_terms(tile) ? terms : nullptr;
    const T *from_mu = latent->read(MU, tile, mu_buffer), *from_logvar = latent->read(LOGVAR, tile, logvar_buffer);
    double sum;
    if (g_mu || g_logvar) {
      T* const to_mu = g_mu ? latent->target(G_MU, tile, g_mu_buffer) : g_mu_buffer;
      T* const to_logvar = g_logvar ? latent->target(G_LOGVAR, tile, g_logvar_buffer) : g_logvar_buffer;
      sum = kernels<T>().kl_with_gradient(from_mu, from_logvar, latent_weight, to_mu, to_logvar, kept, tile.count());
      latent->finish(G_MU, tile, g_mu_buffer);
      latent->finish(G_LOGVAR, tile, g_logvar_buffer);
    } else {
      sum = kernels<T>().latent(from_mu, from_logvar, nullptr, nullptr, kept, true, tile.count());
    }
    divergences.add(i, tile, sum, terms, kernels<T>());
  };
  parallel(data.grid.count + latent_grid.count, tiles_worth(DATA_GRAIN, data.grid),
           [&](int64_t i) { i < data.grid.count ? data_tile(i) : latent_tile(i - data.grid.count); });

  const int64_t count = data.rows.rows;
  const Tensor nll = empty<T>({count});
  const MaybeTensor kl_out = mu ? MaybeTensor(empty<T>({count})) : std::nullopt;
  T* const to_nll = static_cast<T*>(nll.data_ptr());
  T* const to_kl = mu ? static_cast<T*>(kl_out->data_ptr()) : nullptr;
  double total = 0;
  for (int64_t row = 0; row < count; ++row) {
    const double error = 0.5 * w.precision * errors[row] + w.constant;
    to_nll[row] = static_cast<T>(error);
    total += error;
    if (mu) {
      const double divergence = 0.5 * divergences[row];
      to_kl[row] = static_cast<T>(divergence);
      total += w.beta * divergence;
    } else if (kl) {
      total += w.beta * number_at(*kl, row * kl->strides()[0]);
    }
  }
  if (g_kl) *static_cast<T*>(g_kl->data_ptr()) = latent_weight;
  if (!w.total) return {std::nullopt, nll, kl_out};
  const Tensor loss = empty<T>({});
  *static_cast<T*>(loss.data_ptr()) = static_cast<T>(*w.total * total);
  return {loss, nll, kl_out};
}

template <class T>
void error_gradients(const Tensor& g_nll, const Tensor& x_hat, const Tensor& x, double scale, const Tensor* g_x_hat,
                     const Tensor* g_x) {
  const Tiles<T, 4> data({&x_hat, &x, g_x_hat, g_x}, false);
  const int64_t stride = g_nll.strides()[0];
  prefer_large_pages(g_x_hat);
  prefer_large_pages(g_x);
  parallel(data.grid.count, tiles_worth(DATA_GRAIN, data.grid), [&](int64_t i) {
    const Tile tile = data.grid[i];
    alignas(CACHE_LINE) T x_hat_buffer[TILE], x_buffer[TILE], g_x_hat_buffer[TILE], g_x_buffer[TILE], c[TILE];
    for (int64_t r = 0; r < tile.rows; ++r)
      std::fill_n(c + r * tile.columns, tile.columns, static_cast<T>(number_at(g_nll, (tile.row + r) * stride) * scale));
    kernels<T>().squared_error_backward(data.read(X_HAT, tile, x_hat_buffer), data.read(X, tile, x_buffer), c,
                                        data.target(G_X_HAT, tile, g_x_hat_buffer), data.target(G_X, tile, g_x_buffer),
                                        tile.count());
    data.finish(G_X_HAT, tile, g_x_hat_buffer);
    data.finish(G_X, tile, g_x_buffer);
  });
}

// An upstream gradient over the expected one: 1 where they differ by no more than the rounding of the former.
double quotient(const Tensor& upstream, int64_t offset, double expected) {
  const double factor = number_at(upstream, offset) / expected;
  return upstream.scalar_type() == ScalarType::Double ? factor : static_cast<float>(factor);
}

template <class T>
void scale_in_place(const Tensor& tensor, double factor) {
  const Tiles<T, 1> tiles({&tensor}, false);
  parallel(tiles.grid.count, tiles_worth(DATA_GRAIN, tiles.grid), [&](int64_t i) {
    const Tile tile = tiles.grid[i];
    alignas(CACHE_LINE) T buffer[TILE];
    T* const values = const_cast<T*>(tiles.read(0, tile, buffer));
    kernels<T>().scale(values, static_cast<T>(factor), tile.count());
    tiles.finish(0, tile, buffer);
  });
}

}  // namespace

std::tuple<MaybeTensor, Tensor, MaybeTensor> elbo(Tensor x_hat, Tensor x, MaybeTensor mu, MaybeTensor logvar, MaybeTensor kl,
                                                  double beta, MaybeTensor beta_tensor, double grad_scale,
                                                  MaybeTensor grad_scale_tensor, std::optional<double> weight, double precision,
                                                  double constant, MaybeTensor g_x_hat, MaybeTensor g_x, MaybeTensor g_mu,
                                                  MaybeTensor g_logvar, MaybeTensor g_kl) {
  const Weights w = {number(beta_tensor, beta), number(grad_scale_tensor, grad_scale), precision, constant, weight};
  const auto run = any_float64(&x_hat, &x, pointer(mu), pointer(logvar), pointer(kl)) ? loss_and_gradients<double>
                                                                                      : loss_and_gradients<float>;
  return run(x_hat, x, pointer(mu), pointer(logvar), pointer(kl), w, pointer(g_x_hat), pointer(g_x), pointer(g_mu),
             pointer(g_logvar), pointer(g_kl));
}

void gaussian_nll_backward(Tensor g_nll, Tensor x_hat, Tensor x, double scale, std::optional<double> expected,
                           MaybeTensor expected_tensor, MaybeTensor g_x_hat, MaybeTensor g_x) {
  if (expected_tensor) expected = number_at(*expected_tensor);
  if (expected) {
    const int64_t stride = g_nll.strides()[0], distinct = stride == 0 ? 1 : g_nll.sizes()[0];
    int64_t row = 0;
    while (row < distinct && quotient(g_nll, row * stride, *expected) == 1) ++row;
    if (row == distinct) return;
  }
  const auto run = any_float64(&x_hat, &x) ? error_gradients<double> : error_gradients<float>;
  run(g_nll, x_hat, x, scale, pointer(g_x_hat), pointer(g_x));
}

void rescale_(std::vector<Tensor> gradients, Tensor upstream, double expected, MaybeTensor expected_tensor) {
  const double factor = quotient(upstream, 0, number(expected_tensor, expected));
  if (factor == 1) return;
  for (const Tensor& gradient : gradients)
    any_float64(&gradient) ? scale_in_place<double>(gradient, factor) : scale_in_place<float>(gradient, factor);
}

}  // namespace fused_elbo

FUSED_ELBO_REGISTER(CPU)
