// Tensors of one shape (N, ...) seen as N rows, a single number as one. Host only.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <utility>

namespace fused_elbo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int MAX_DIMS = 64;  // torch's own limit

// Which dimensions of K tensors merge in memory, and the strides of what is left. A tensor may be absent.
template <int K>
struct Rows {
  int64_t rows, columns;
  int dims = 0;  // dimensions of a row that could not be merged, outermost first; at least 1
  int64_t sizes[MAX_DIMS];
  int64_t row_strides[K], strides[K][MAX_DIMS];

  // keep_order: columns run in row-major order, since the noise counts them; otherwise in that of the first tensor's memory.
  // leading: how many dimensions tensor k has before those of a row, of which the last counts the rows; 1 each by default.
  Rows(const Tensor* const (&tensors)[K], bool keep_order, const int* leading = nullptr) {
    const Tensor& first = *tensors[0];
    const auto shape = first.sizes();
    const int start = leading ? leading[0] : 1;
    // Numbered as the first tensor's dimensions are.
    const int64_t* all_strides[K];
    for (int k = 0; k < K; ++k) {
      all_strides[k] = tensors[k] ? tensors[k]->strides().data() + (leading ? leading[k] - start : 0) : nullptr;
      row_strides[k] = tensors[k] && first.dim() > 0 ? all_strides[k][start - 1] : 0;
    }
    int order[MAX_DIMS], count = 0;
    for (int d = start; d < first.dim(); ++d)
      if (shape[d] != 1) order[count++] = d;
    if (!keep_order)
      std::stable_sort(order, order + count, [&](int a, int b) { return all_strides[0][a] > all_strides[0][b]; });
    rows = first.dim() > 0 ? shape[start - 1] : 1;
    columns = 1;
    for (int i = 0; i < count; ++i) {
      const int d = order[i];
      columns *= shape[d];
      bool merges = dims > 0;
      for (int k = 0; merges && k < K; ++k) merges = !tensors[k] || strides[k][dims - 1] == all_strides[k][d] * shape[d];
      if (merges)
        sizes[dims - 1] *= shape[d];
      else
        sizes[dims++] = shape[d];
      for (int k = 0; k < K; ++k) strides[k][dims - 1] = tensors[k] ? all_strides[k][d] : 0;
    }
    if (dims == 0) {
      sizes[dims++] = 1;
      for (int k = 0; k < K; ++k) strides[k][0] = 1;
    }
  }

  // Whether a row of tensor k lies in memory without gaps.
  bool dense(int k) const { return dims == 1 && (strides[k][0] == 1 || columns == 1); }
};

}  // namespace fused_elbo
