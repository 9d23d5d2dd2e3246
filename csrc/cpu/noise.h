// The noise of a tile.
#pragma once

#include "../philox.h"
#include "tiles.h"

namespace fused_elbo {

// The normals of a tile, explicit or from the stream.
template <class T>
class Noise {
 public:
  Noise(const Tensor* seed, int64_t columns, int64_t first_index, int64_t offset)
      : columns_(columns), first_index_(first_index), offset_(offset) {
    if (!seed) return;
    seeds_ = static_cast<const int64_t*>(seed->data_ptr());
    per_row_ = seed->dim() == 1;
    stride_ = per_row_ ? seed->strides()[0] : 0;
  }

  explicit operator bool() const { return seeds_; }

  const T* operator()(const Tile& tile, T* buffer) const {
    if (!per_row_ || tile.rows == 1) return stretch(tile.row, tile.column, tile.count(), buffer);
    for (int64_t r = 0; r < tile.rows; ++r) {
      alignas(CACHE_LINE) T one[SIZE];
      std::memcpy(buffer + r * tile.columns, stretch(tile.row + r, 0, tile.columns, one), tile.columns * sizeof(T));
    }
    return buffer;
  }

  // That of sample k, of several samples of so many rows each.
  Noise sample(int64_t k, int64_t rows) const {
    Noise shifted = *this;
    shifted.first_index_ += k * columns_ * (per_row_ ? 1 : rows);
    return shifted;
  }

  // A tile may start anywhere in its first block, and is made in whole vectors.
  static constexpr int64_t SIZE = TILE + LANES + NORMALS_SLACK;

 private:
  const T* stretch(int64_t row, int64_t column, int64_t n, T* buffer) const {
    const uint64_t index = first_index_ + (per_row_ ? 0 : row * columns_) + column;
    kernels<T>().normals(buffer, n + index % LANES, index / LANES, seeds_[row * stride_], offset_);
    return buffer + index % LANES;
  }

  const int64_t* seeds_ = nullptr;
  bool per_row_ = false;
  int64_t stride_ = 0, columns_;
  uint64_t first_index_, offset_;
};

}  // namespace fused_elbo
