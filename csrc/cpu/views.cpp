#include "views.h"

namespace fused_elbo {
namespace {

bool is_byte(ScalarType dtype) { return dtype == ScalarType::Byte || dtype == ScalarType::Bool; }

int64_t stored_size(ScalarType dtype) { return is_byte(dtype) ? 1 : element_size(dtype); }

template <class T>
void convert(ScalarType dtype, const void* from, T* to, int64_t n) {
  if (is_byte(dtype))
    likelihood_kernels<T>().from_uint8(static_cast<const uint8_t*>(from), to, n);
  else
    widen(dtype, from, to, n);
}

// body(word) with a number of an element's size.
template <class Body>
void with_word(int64_t size, Body body) {
  switch (size) {
    case 1:
      return body(uint8_t{});
    case 2:
      return body(uint16_t{});
    case 4:
      return body(uint32_t{});
    default:
      return body(uint64_t{});
  }
}

}  // namespace

Columns::Columns(const Tensor& tensor, int leading, bool keep_order) {
  const auto shape = tensor.sizes(), strides = tensor.strides();
  for (int d = leading; d < tensor.dim(); ++d)
    if (shape[d] != 1) dims[count++] = d - leading;
  if (!keep_order)
    std::stable_sort(dims, dims + count, [&](int a, int b) { return strides[leading + a] > strides[leading + b]; });
  for (int i = 0; i < count; ++i) {
    sizes[i] = shape[leading + dims[i]];
    columns *= sizes[i];
  }
}

View::View(const Tensor* tensor, int leading, int64_t inner, const Columns& columns) {
  if (!tensor) return;
  const auto strides = tensor->strides();
  data_ = static_cast<char*>(tensor->data_ptr());
  dtype_ = tensor->scalar_type();
  size_ = stored_size(dtype_);
  inner_ = inner;
  outer_stride_ = leading > 1 ? strides[0] * size_ : 0;
  inner_stride_ = strides[leading - 1] * size_;
  columns_ = columns.columns;
  for (int i = 0; i < columns.count; ++i) {
    const int64_t stride = strides[leading + columns.dims[i]] * size_;
    if (dims_ > 0 && strides_[dims_ - 1] == stride * columns.sizes[i]) {
      sizes_[dims_ - 1] *= columns.sizes[i];
      strides_[dims_ - 1] = stride;
    } else {
      sizes_[dims_] = columns.sizes[i];
      strides_[dims_++] = stride;
    }
  }
  if (dims_ == 0) {
    sizes_[dims_] = 1;
    strides_[dims_++] = size_;
  }
  dense_ = dims_ == 1 && strides_[0] == size_;
}

bool View::packed(const Tile& tile) const {
  if (tile.rows == 1) return true;
  const int64_t row_bytes = columns_ * size_;
  const bool crosses = tile.row / inner_ != (tile.row + tile.rows - 1) / inner_;
  return (inner_ == 1 || inner_stride_ == row_bytes) && (!crosses || outer_stride_ == inner_ * row_bytes);
}

// body(start, i, count, step) for the stretches of a row that one stride reaches.
template <class Body>
void View::for_runs(int64_t row, int64_t column, int64_t n, Body body) const {
  const int last = dims_ - 1;
  char* const start = at(row);
  for (int64_t i = 0; i < n;) {
    int64_t rest = column + i, offset = 0;
    const int64_t inner = rest % sizes_[last];
    for (int d = last; d >= 0; --d) {
      offset += rest % sizes_[d] * strides_[d];
      rest /= sizes_[d];
    }
    const int64_t count = std::min(n - i, sizes_[last] - inner);
    body(start + offset, i, count, strides_[last]);
    i += count;
  }
}

template <class T>
void View::copy_in(const Tile& tile, T* buffer) const {
  if (dense_ && packed(tile)) return convert(dtype_, at(tile.row) + tile.column * size_, buffer, tile.count());
  for (int64_t r = 0; r < tile.rows; ++r, buffer += tile.columns) {
    const int64_t row = tile.row + r;
    if (dense_) {
      convert(dtype_, at(row) + tile.column * size_, buffer, tile.columns);
      continue;
    }
    alignas(CACHE_LINE) char gathered[TILE * sizeof(double)];
    with_word(size_, [&](auto word) {
      auto* const to = reinterpret_cast<decltype(word)*>(gathered);
      for_runs(row, tile.column, tile.columns, [&](const char* from, int64_t i, int64_t count, int64_t step) {
        for (int64_t j = 0; j < count; ++j) std::memcpy(to + i + j, from + j * step, sizeof word);
      });
    });
    convert(dtype_, gathered, buffer, tile.columns);
  }
}

template <class T>
void View::copy_out(const Tile& tile, const T* buffer) const {
  if (dense_ && packed(tile)) return narrow(dtype_, buffer, at(tile.row) + tile.column * size_, tile.count());
  for (int64_t r = 0; r < tile.rows; ++r, buffer += tile.columns) {
    const int64_t row = tile.row + r;
    if (dense_) {
      narrow(dtype_, buffer, at(row) + tile.column * size_, tile.columns);
      continue;
    }
    alignas(CACHE_LINE) char scattered[TILE * sizeof(double)];
    narrow(dtype_, buffer, scattered, tile.columns);
    with_word(size_, [&](auto word) {
      const auto* const from = reinterpret_cast<const decltype(word)*>(scattered);
      for_runs(row, tile.column, tile.columns, [&](char* to, int64_t i, int64_t count, int64_t step) {
        for (int64_t j = 0; j < count; ++j) std::memcpy(to + j * step, from + i + j, sizeof word);
      });
    });
  }
}

template void View::copy_in(const Tile&, float*) const;
template void View::copy_in(const Tile&, double*) const;
template void View::copy_out(const Tile&, const float*) const;
template void View::copy_out(const Tile&, const double*) const;

}  // namespace fused_elbo
