// Tensors whose rows are counted over one or two leading dimensions, each with strides of its own, tile by tile.
#pragma once

#include "tiles.h"

namespace fused_elbo {

// The dimensions of a row, in the order in which the columns are counted.
struct Columns {
  int count = 0;
  int dims[MAX_DIMS];  // counted behind the leading ones
  int64_t sizes[MAX_DIMS];
  int64_t columns = 1;

  // keep_order: row-major, since the noise counts them; otherwise that of the tensor's memory.
  Columns(const Tensor& tensor, int leading, bool keep_order);
};

// A tensor, or none.
class View {
 public:
  // Of two leading dimensions, row r is element (r / inner, r % inner); with one, inner is its size.
  View(const Tensor* tensor, int leading, int64_t inner, const Columns& columns);

  explicit operator bool() const { return data_; }

  // The tile: in place where it lies as it is wanted, else copied to the buffer. Null where there is no tensor.
  template <class T>
  const T* read(const Tile& tile, T* buffer) const {
    if (!data_) return nullptr;
    if (in_place<T>(tile)) return reinterpret_cast<const T*>(at(tile.row) + tile.column * size_);
    copy_in(tile, buffer);
    return buffer;
  }

  // Where the tile is to be written before it is finished.
  template <class T>
  T* target(const Tile& tile, T* buffer) const {
    if (!data_) return nullptr;
    return in_place<T>(tile) ? reinterpret_cast<T*>(at(tile.row) + tile.column * size_) : buffer;
  }

  template <class T>
  void finish(const Tile& tile, const T* buffer) const {
    if (data_ && !in_place<T>(tile)) copy_out(tile, buffer);
  }

 private:
  template <class T>
  bool in_place(const Tile& tile) const {
    return dtype_ == DTYPE<T> && dense_ && packed(tile);
  }

  char* at(int64_t row) const { return data_ + row / inner_ * outer_stride_ + row % inner_ * inner_stride_; }

  // Whether the rows of a tile follow one another without gaps.
  bool packed(const Tile& tile) const;

  template <class T>
  void copy_in(const Tile& tile, T* buffer) const;
  template <class T>
  void copy_out(const Tile& tile, const T* buffer) const;
  template <class Body>
  void for_runs(int64_t row, int64_t column, int64_t n, Body body) const;

  char* data_ = nullptr;
  ScalarType dtype_;
  int64_t size_;
  // In bytes, like all strides here.
  int64_t inner_, outer_stride_, inner_stride_;
  bool dense_;
  int64_t columns_;
  int dims_ = 0;
  int64_t sizes_[MAX_DIMS], strides_[MAX_DIMS];
};

template <class T>
const LikelihoodKernels<T>& likelihood_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return instruction_set()->likelihood->float64;
  else
    return instruction_set()->likelihood->float32;
}

template <class T>
const PosteriorKernels<T>& posterior_kernels() {
  if constexpr (std::is_same_v<T, double>)
    return instruction_set()->posterior->float64;
  else
    return instruction_set()->posterior->float32;
}

// An element for each row of two leading dimensions, or of one: where it lies.
class RowElements {
 public:
  RowElements(const Tensor* tensor, int64_t inner) : tensor_(tensor), inner_(inner) {
    if (!tensor) return;
    const auto strides = tensor->strides();
    outer_stride_ = tensor->dim() > 1 ? strides[0] : 0;
    inner_stride_ = strides[tensor->dim() - 1];
  }

  explicit operator bool() const { return tensor_; }

  double operator[](int64_t row) const { return number_at(*tensor_, offset(row)); }

  // Each row's element throughout the row. Null where there is no tensor.
  template <class T>
  const T* read(const Tile& tile, T* buffer) const {
    if (!tensor_) return nullptr;
    for (int64_t r = 0; r < tile.rows; ++r)
      std::fill_n(buffer + r * tile.columns, tile.columns, static_cast<T>((*this)[tile.row + r]));
    return buffer;
  }

  // To a tensor of T.
  template <class T>
  void write(const RowSums& sums, int64_t rows) const {
    if (!tensor_) return;
    T* const to = static_cast<T*>(tensor_->data_ptr());
    for (int64_t row = 0; row < rows; ++row) to[offset(row)] = static_cast<T>(sums[row]);
  }

 private:
  int64_t offset(int64_t row) const { return row / inner_ * outer_stride_ + row % inner_ * inner_stride_; }

  const Tensor* tensor_;
  int64_t inner_, outer_stride_ = 0, inner_stride_ = 0;
};

}  // namespace fused_elbo
