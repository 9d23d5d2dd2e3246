// What a compiler on a CPU leaves to operators: the seed that eager code would draw, and the normals of a seed. Their schemas
// stand in fused_elbo/backends/native/library.py; fused_elbo/operators.py has them for any device.
#include <functional>
#include <limits>
#include <numeric>

#include "noise.h"

namespace fused_elbo {
namespace {

template <class T>
Tensor normals_of(const Tensor& seed, const std::vector<int64_t>& shape, int64_t first_index, int64_t offset) {
  const Tensor out = empty<T>(shape);
  T* const values = static_cast<T*>(out.data_ptr());
  const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  if (count == 0) return out;
  // With one seed the elements are counted through.
  const int64_t rows = seed.dim() == 1 ? shape[0] : 1;
  const Grid grid(rows, count / rows);
  const Noise<T> noise(&seed, grid.columns, first_index, offset);
  prefer_large_pages(&out);
  parallel(grid.count, tiles_worth(LATENT_GRAIN, grid), [&](int64_t i) {
    const Tile tile = grid[i];
    alignas(CACHE_LINE) T buffer[Noise<T>::SIZE];
    std::memcpy(values + tile.row * grid.columns + tile.column, noise(tile, buffer), tile.count() * sizeof(T));
  });
  return out;
}

Tensor normals(Tensor seed, std::vector<int64_t> shape, int64_t first_index, int64_t offset, bool wide) {
  return (wide ? normals_of<double> : normals_of<float>)(seed, shape, first_index, offset);
}

// As torch.randint draws it, so that compiled and eager code have the same.
Tensor draw_seed(Tensor) {
  using torch::stable::detail::from;
  using Range = std::numeric_limits<int64_t>;
  constexpr int ARGUMENTS = 7;
  StableIValue stack[ARGUMENTS] = {from(Range::min()),
                                   from(Range::max()),
                                   from(std::vector<int64_t>()),
                                   from(std::optional(ScalarType::Long)),
                                   from(std::nullopt),
                                   from(std::nullopt),
                                   from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::randint", "low", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace
}  // namespace fused_elbo

STABLE_TORCH_LIBRARY_IMPL(fused_elbo, CPU, library) {
  library.impl("draw_seed", TORCH_BOX(&fused_elbo::draw_seed));
  library.impl("normals", TORCH_BOX(&fused_elbo::normals));
}
