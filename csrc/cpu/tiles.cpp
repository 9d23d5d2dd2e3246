#include "tiles.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fused_elbo {
namespace {

constexpr int64_t PAGE = int64_t{1} << 21;

// float16 and bfloat16 reach float64 by way of float32.
template <class Body>
void by_pieces(int64_t n, Body body) {
  float piece[256];
  for (int64_t i = 0; i < n; i += 256) body(i, std::min<int64_t>(256, n - i), piece);
}

}  // namespace

int64_t element_size(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return 8;
    case ScalarType::Float:
      return 4;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    default:
      STD_TORCH_CHECK(false, "fused_elbo takes float64, float32, bfloat16 and float16");
  }
}

void widen(ScalarType dtype, const void* from, float* to, int64_t n) {
  if (dtype == ScalarType::Float)
    std::memcpy(to, from, n * sizeof *to);
  else if (dtype == ScalarType::Double)
    std::copy_n(static_cast<const double*>(from), n, to);
  else if (dtype == ScalarType::BFloat16)
    instruction_set()->conversions.from_bfloat16(static_cast<const uint16_t*>(from), to, n);
  else
    instruction_set()->conversions.from_float16(static_cast<const uint16_t*>(from), to, n);
}

void narrow(ScalarType dtype, const float* from, void* to, int64_t n) {
  if (dtype == ScalarType::Float)
    std::memcpy(to, from, n * sizeof *from);
  else if (dtype == ScalarType::Double)
    std::copy_n(from, n, static_cast<double*>(to));
  else if (dtype == ScalarType::BFloat16)
    instruction_set()->conversions.to_bfloat16(from, static_cast<uint16_t*>(to), n);
  else
    instruction_set()->conversions.to_float16(from, static_cast<uint16_t*>(to), n);
}

void widen(ScalarType dtype, const void* from, double* to, int64_t n) {
  if (dtype == ScalarType::Double) {
    std::memcpy(to, from, n * sizeof *to);
    return;
  }
  by_pieces(n, [&](int64_t i, int64_t count, float* piece) {
    widen(dtype, static_cast<const char*>(from) + i * element_size(dtype), piece, count);
    for (int64_t j = 0; j < count; ++j) to[i + j] = piece[j];
  });
}

void narrow(ScalarType dtype, const double* from, void* to, int64_t n) {
  if (dtype == ScalarType::Double) {
    std::memcpy(to, from, n * sizeof *from);
    return;
  }
  by_pieces(n, [&](int64_t i, int64_t count, float* piece) {
    for (int64_t j = 0; j < count; ++j) piece[j] = static_cast<float>(from[i + j]);
    narrow(dtype, piece, static_cast<char*>(to) + i * element_size(dtype), count);
  });
}

double number_at(const Tensor& tensor, int64_t offset) {
  const ScalarType dtype = tensor.scalar_type();
  const void* const data = tensor.const_data_ptr();
  if (dtype == ScalarType::Double) return static_cast<const double*>(data)[offset];
  float value;
  widen(dtype, static_cast<const char*>(data) + offset * element_size(dtype), &value, 1);
  return value;
}

void prefer_large_pages([[maybe_unused]] const Tensor* fresh) {
#ifdef MADV_HUGEPAGE
  if (!fresh) return;
  const int64_t bytes = fresh->numel() * element_size(fresh->scalar_type());
  if (bytes < LARGE_PAGES_FROM) return;
  const auto begin = reinterpret_cast<uintptr_t>(fresh->data_ptr());
  const uintptr_t first = (begin + PAGE - 1) & -PAGE, last = (begin + bytes) & -PAGE;
  // A refusal costs speed alone.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fused_elbo
