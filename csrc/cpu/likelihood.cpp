#include "views.h"

namespace fused_elbo {
namespace {

struct Inputs {
  const Tensor &x_hat, &x;
  const Tensor *log_scale, *weight, *mask, *upstream;
};

struct Outputs {
  const Tensor *nll, *slope, *g_x_hat, *g_x, *g_log_scale;
};

struct Numbers {
  Family family;
  Activation activation;
  double log_scale, constant, scale, shift;
};

// Tile i. Of rows that are longer than a tile, the inner dimension runs before the columns: what is expanded over it comes from
// the cache.
Tile tile_of(const Grid& grid, int64_t inner, int64_t i) {
  if (grid.tiles_per_row == 1) return grid[i];
  const int64_t group = inner * grid.tiles_per_row, within = i % group;
  return grid[(i / group * inner + within % inner) * grid.tiles_per_row + within / inner];
}

template <class T>
void run(const Inputs& in, const Numbers& numbers, const Outputs& out) {
  const int64_t inner = in.x_hat.sizes()[1];
  const Columns columns(in.x_hat, 2, false);
  const auto view = [&](const Tensor* tensor) { return View(tensor, 2, inner, columns); };
  const View x_hat = view(&in.x_hat), x = view(&in.x), log_scale = view(in.log_scale), weight = view(in.weight);
  const View mask = view(in.mask), g_x_hat = view(out.g_x_hat), g_x = view(out.g_x), g_log_scale = view(out.g_log_scale);
  const Grid grid(in.x_hat.sizes()[0] * inner, columns.columns);
  RowSums nll(out.nll ? grid : Grid(0, 1)), slope(out.slope ? grid : Grid(0, 1));
  const LikelihoodOptions<T> options = {numbers.family,
                                        numbers.activation,
                                        in.x.scalar_type() == ScalarType::Byte,
                                        static_cast<T>(numbers.log_scale),
                                        static_cast<T>(numbers.constant),
                                        static_cast<T>(numbers.scale),
                                        static_cast<T>(numbers.shift)};
  const RowElements upstream(in.upstream, inner), to_nll(out.nll, inner), to_slope(out.slope, inner);
  // x_hat that is overwritten is not fresh.
  if (out.g_x_hat && out.g_x_hat->data_ptr() != in.x_hat.data_ptr()) prefer_large_pages(out.g_x_hat);
  prefer_large_pages(out.g_x);
  prefer_large_pages(out.g_log_scale);
  parallel(grid.count, tiles_worth(DATA_GRAIN, grid), [&](int64_t i) {
    const Tile tile = tile_of(grid, inner, i);
    alignas(CACHE_LINE) T inputs[6][TILE], sums[2][TILE], gradients[3][TILE];
    const LikelihoodTile<T> elements = {x_hat.read(tile, inputs[0]),
                                        x.read(tile, inputs[1]),
                                        log_scale.read(tile, inputs[2]),
                                        weight.read(tile, inputs[3]),
                                        mask.read(tile, inputs[4]),
                                        upstream.read(tile, inputs[5]),
                                        out.nll ? sums[0] : nullptr,
                                        out.slope ? sums[1] : nullptr,
                                        g_x_hat.target(tile, gradients[0]),
                                        g_x.target(tile, gradients[1]),
                                        g_log_scale.target(tile, gradients[2])};
    likelihood_kernels<T>().likelihood(elements, options, tile.count());
    g_x_hat.finish(tile, gradients[0]);
    g_x.finish(tile, gradients[1]);
    g_log_scale.finish(tile, gradients[2]);
    if (out.nll) nll.add(tile, sums[0], kernels<T>());
    if (out.slope) slope.add(tile, sums[1], kernels<T>());
  });
  to_nll.write<T>(nll, grid.rows);
  to_slope.write<T>(slope, grid.rows);
}

}  // namespace

void likelihood(Tensor x_hat, Tensor x, MaybeTensor log_scale_tensor, MaybeTensor weight, MaybeTensor mask,
                MaybeTensor upstream, int64_t family, int64_t activation, double log_scale, double constant, double scale,
                double shift, MaybeTensor nll, MaybeTensor slope, MaybeTensor g_x_hat, MaybeTensor g_x,
                MaybeTensor g_log_scale) {
  const bool wide = any_float64(&x_hat, &x, pointer(log_scale_tensor), pointer(weight));
  const Inputs in = {x_hat, x, pointer(log_scale_tensor), pointer(weight), pointer(mask), pointer(upstream)};
  const Outputs out = {pointer(nll), pointer(slope), pointer(g_x_hat), pointer(g_x), pointer(g_log_scale)};
  (wide ? run<double>
        : run<float>)(in, {static_cast<Family>(family), static_cast<Activation>(activation), log_scale, constant, scale, shift},
                      out);
}

}  // namespace fused_elbo
