// From tensors of any strides and dtypes to tiles of contiguous numbers, which is all that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <vector>

#include "../operations.h"
#include "../rows.h"
#include "kernels.h"

namespace fused_elbo {

// Numbers of a tile: a handful of such buffers stays in the first-level cache.
constexpr int64_t TILE = 1024;
constexpr std::size_t CACHE_LINE = 64;
// Numbers that are worth another thread.
constexpr int64_t LATENT_GRAIN = 4096, DATA_GRAIN = 16384;
// Outputs of so many bytes are given large pages: touching small ones for the first time costs more than the arithmetic.
constexpr int64_t LARGE_PAGES_FROM = int64_t{1} << 24;

struct Tile {
  int64_t row, rows, column, columns;
  int64_t count() const { return rows * columns; }
};

// How rows are shared out: whole rows to a tile, or several tiles to a row. A function of the shape alone, so that sums come
// out the same for any number of threads.
struct Grid {
  int64_t rows, columns, rows_per_tile, tiles_per_row, count;

  Grid(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        rows_per_tile(columns < TILE ? TILE / std::max<int64_t>(1, columns) : 1),
        tiles_per_row((columns + TILE - 1) / TILE),
        count(tiles_per_row > 1 ? rows * tiles_per_row : (rows + rows_per_tile - 1) / rows_per_tile) {}

  Tile operator[](int64_t i) const {
    if (tiles_per_row > 1) {
      const int64_t column = i % tiles_per_row * TILE;
      return {i / tiles_per_row, 1, column, std::min(TILE, columns - column)};
    }
    const int64_t row = i * rows_per_tile;
    return {row, std::min(rows_per_tile, rows - row), 0, columns};
  }
};

// Sums of rows from sums of tiles, added in the tiles' order.
class RowSums {
 public:
  explicit RowSums(const Grid& grid) : grid_(grid), sums_(grid.tiles_per_row > 1 ? grid.count : grid.rows) {}

  // Whether a tile's terms are to be kept, because it holds more rows than one.
  static bool wants_terms(const Tile& tile) { return tile.rows > 1; }

  template <class T>
  void add(int64_t index, const Tile& tile, double sum, const T* terms, const Kernels<T>& kernels) {
    if (!wants_terms(tile))
      sums_[grid_.tiles_per_row > 1 ? index : tile.row] = sum;
    else
      for (int64_t r = 0; r < tile.rows; ++r) sums_[tile.row + r] = kernels.sum(terms + r * tile.columns, tile.columns);
  }

  // A tile all of whose terms are kept.
  template <class T>
  void add(const Tile& tile, const T* terms, const Kernels<T>& kernels) {
    add(tile.row * grid_.tiles_per_row + tile.column / TILE, tile, wants_terms(tile) ? 0 : kernels.sum(terms, tile.columns),
        terms, kernels);
  }

  double operator[](int64_t row) const {
    if (grid_.tiles_per_row == 1) return sums_[row];
    double sum = 0;
    for (int64_t i = 0; i < grid_.tiles_per_row; ++i) sum += sums_[row * grid_.tiles_per_row + i];
    return sum;
  }

 private:
  Grid grid_;
  std::vector<double> sums_;
};

template <class T>
constexpr ScalarType DTYPE = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// Contiguous numbers of any dtype to T, and back.
void widen(ScalarType dtype, const void* from, float* to, int64_t n);
void widen(ScalarType dtype, const void* from, double* to, int64_t n);
void narrow(ScalarType dtype, const float* from, void* to, int64_t n);
void narrow(ScalarType dtype, const double* from, void* to, int64_t n);

// One number of a CPU tensor.
double number_at(const Tensor& tensor, int64_t offset = 0);

inline double number(const MaybeTensor& tensor, double otherwise) { return tensor ? number_at(*tensor) : otherwise; }

int64_t element_size(ScalarType dtype);

// K tensors of one shape, some absent, tile by tile.
template <class T, int K>
class Tiles {
 public:
  Tiles(const Tensor* const (&tensors)[K], bool keep_order) : rows(tensors, keep_order), grid(rows.rows, rows.columns) {
    for (int k = 0; k < K; ++k)
      if (tensors[k]) {
        data_[k] = static_cast<char*>(tensors[k]->data_ptr());
        dtype_[k] = tensors[k]->scalar_type();
        size_[k] = element_size(dtype_[k]);
      }
  }

  // The tile of tensor k: in place where it lies as it is wanted, else copied to the buffer. Null where it is absent.
  const T* read(int k, const Tile& tile, T* buffer) const {
    if (!data_[k]) return nullptr;
    if (in_place(k, tile)) return reinterpret_cast<const T*>(at(k, tile.row, tile.column));
    for (int64_t r = 0; r < tile.rows; ++r) read_row(k, tile.row + r, tile.column, tile.columns, buffer + r * tile.columns);
    return buffer;
  }

  // Where the tile of tensor k is to be written before it is finished.
  T* target(int k, const Tile& tile, T* buffer) const {
    if (!data_[k]) return nullptr;
    return in_place(k, tile) ? reinterpret_cast<T*>(at(k, tile.row, tile.column)) : buffer;
  }

  void finish(int k, const Tile& tile, const T* buffer) const {
    if (!data_[k] || in_place(k, tile)) return;
    for (int64_t r = 0; r < tile.rows; ++r) write_row(k, tile.row + r, tile.column, tile.columns, buffer + r * tile.columns);
  }

  const Rows<K> rows;
  const Grid grid;

 private:
  char* at(int k, int64_t row, int64_t column) const {
    return data_[k] + size_[k] * (row * rows.row_strides[k] + column * rows.strides[k][0]);
  }

  bool in_place(int k, const Tile& tile) const {
    return dtype_[k] == DTYPE<T> && rows.dense(k) && (tile.rows == 1 || rows.row_strides[k] == rows.columns);
  }

  void read_row(int k, int64_t row, int64_t column, int64_t n, T* to) const {
    if (rows.dense(k)) return widen(dtype_[k], at(k, row, column), to, n);
    alignas(CACHE_LINE) char gathered[TILE * sizeof(double)];
    for_runs(k, row, column, n, [&](char* from, int64_t i, int64_t count, int64_t step) {
      for (int64_t j = 0; j < count; ++j) std::memcpy(gathered + (i + j) * size_[k], from + j * step, size_[k]);
    });
    widen(dtype_[k], gathered, to, n);
  }

  void write_row(int k, int64_t row, int64_t column, int64_t n, const T* from) const {
    if (rows.dense(k)) return narrow(dtype_[k], from, at(k, row, column), n);
    alignas(CACHE_LINE) char scattered[TILE * sizeof(double)];
    narrow(dtype_[k], from, scattered, n);
    for_runs(k, row, column, n, [&](char* to, int64_t i, int64_t count, int64_t step) {
      for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * step, scattered + (i + j) * size_[k], size_[k]);
    });
  }

  // body(start, i, count, step) for the stretches of a row that one stride reaches.
  template <class Body>
  void for_runs(int k, int64_t row, int64_t column, int64_t n, Body body) const {
    const int last = rows.dims - 1;
    for (int64_t i = 0; i < n;) {
      int64_t rest = column + i, offset = row * rows.row_strides[k];
      const int64_t inner = rest % rows.sizes[last];
      for (int d = last; d >= 0; --d) {
        offset += rest % rows.sizes[d] * rows.strides[k][d];
        rest /= rows.sizes[d];
      }
      const int64_t count = std::min(n - i, rows.sizes[last] - inner);
      body(data_[k] + offset * size_[k], i, count, rows.strides[k][last] * size_[k]);
      i += count;
    }
  }

  char* data_[K] = {};
  ScalarType dtype_[K] = {};
  int64_t size_[K] = {};
};

template <class T>
const Kernels<T>& kernels() {
  if constexpr (std::is_same_v<T, double>)
    return instruction_set()->float64;
  else
    return instruction_set()->float32;
}

// body(i) for every i, on as many threads as the work is worth.
template <class Body>
void parallel(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

inline int64_t tiles_worth(int64_t grain, const Grid& grid) {
  return std::max<int64_t>(1, grain / std::max<int64_t>(1, grid.rows * grid.columns / std::max<int64_t>(1, grid.count)));
}

// Uninitialised and contiguous, of T, on the CPU.
template <class T>
Tensor empty(const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (std::size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(1, sizes[d])) strides[d] = stride;
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(),
                               std::is_same_v<T, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
                               aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// For a tensor that nobody has written to yet.
void prefer_large_pages(const Tensor* fresh);

}  // namespace fused_elbo
