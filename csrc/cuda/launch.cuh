// From tensors to launches: how much a block takes, and what a launch needs from torch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <map>
#include <mutex>
#include <tuple>

#include "tensors.cuh"

namespace fused_elbo {

constexpr int THREADS = 128, WARP = 32, WARP_LOG2 = 5;
// Elements that a thread takes at a time at most, and 16-byte loads that it has in flight.
constexpr int RUN = 16, LOADS_AHEAD = 8;

// What each block leaves is added up by the last alone, so from many blocks on each takes several shares. It adds up theirs one
// by one, so these are bounded.
constexpr int64_t MANY_BLOCKS = 8192, MOST_IN_TURN = 16;

// Blocks of a multiprocessor that the compiler has to leave registers for.
template <class S>
constexpr int BLOCKS = std::is_same_v<S, double> ? 2 : 4;

// How rows are shared out. A share is as many rows as a block has room for, each taken by neighbouring threads, or, of a row
// that takes whole blocks, `chunk` units. Block b of the grid takes shares b, b + grid, ...
struct Plan {
  int64_t chunk = 1, chunks = 1, shares = 0, grid = 0;
  int threads_log2 = 0;  // threads that take a row

  Plan() = default;

  // The one launch rule, a function of shape, dtype and alignment: results must not depend on the device. Small work is spread,
  // large work amortises.
  Plan(const Shape& shape, int unit, bool whole_warps = false) {
    const int64_t elements = shape.rows * shape.columns, run = RUN / unit;
    const int64_t units = std::max<int64_t>(1, (shape.columns + (shape.shifted ? unit - 1 : 0) + unit - 1) / unit);
    const int64_t runs = elements <= 1 << 20 ? 1 : elements <= 1 << 24 ? 2 : elements <= 1 << 28 ? 8 : 16;
    // A short row is taken by few threads: each adds up what it takes one by one, so that is bounded. Two threads read what the
    // memory delivers at the least.
    const int64_t most_units = run * std::min<int64_t>(runs, 2);
    threads_log2 = whole_warps ? WARP_LOG2 : units > 1;
    while (units > most_units << threads_log2 && threads() < THREADS) ++threads_log2;
    if (threads() > WARP)
      while (threads() < THREADS) ++threads_log2;
    const int64_t tile = run << threads_log2, tiles = (units + tile - 1) / tile;
    chunks = threads() == THREADS ? (tiles + runs - 1) / runs : 1;
    chunk = (tiles + chunks - 1) / chunks * tile;
    chunks = (units + chunk - 1) / chunk;
    const int64_t rows_in_share = THREADS >> threads_log2;
    shares = (shape.rows + rows_in_share - 1) / rows_in_share * chunks;
    const int64_t in_turn = split() ? 1 : std::clamp<int64_t>((shares + MANY_BLOCKS - 1) / MANY_BLOCKS, 1, MOST_IN_TURN);
    grid = (shares + in_turn - 1) / in_turn;
  }

  FE_FN int threads() const { return 1 << threads_log2; }
  FE_FN bool split() const { return chunks > 1; }
};

// Zero when the library is loaded, and left at zero by every kernel: nothing has to be allocated or zeroed, which a capture
// would repeat at each replay. Each source file has its own.
constexpr int TICKETS = 4096;
static __device__ unsigned tickets[TICKETS];

// The counter by which the blocks of a launch see who is last: one of `tickets`, or of memory of its own.
struct Ticket {
  int number = -1;  // none
  unsigned* memory = nullptr;

  FE_DEVICE explicit operator bool() const { return number >= 0; }
  FE_DEVICE unsigned* counter() const { return memory ? memory : tickets + number; }
};

// Makes a tensor's device current, as torch sees it, and knows the stream that torch is on there.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class Arguments>
  void operator()(void (*kernel)(Arguments), int64_t blocks, Arguments arguments, int kinds = 1) const {
    if (blocks == 0) return;
    STD_TORCH_CHECK(blocks < int64_t{1} << 31, "fused_elbo: ", blocks, " blocks are more than a CUDA grid holds");
    void* pointers[] = {&arguments};
    STD_CUDA_CHECK(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks), kinds), dim3(THREADS), pointers, 0, stream_));
  }

  // Uninitialised, with dims 0 or 1.
  Tensor empty(int dims, int64_t size, int32_t dtype) const {
    const int64_t stride = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, &size, &stride, dtype, aoti_torch_device_type_cuda(), device_, &handle));
    return Tensor(handle);
  }

  template <class S>
  Tensor empty(int dims, int64_t size) const {
    return empty(dims, size, std::is_same_v<S, double> ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

  // Launches on one stream follow one another and share a counter. So do those of one capture on one stream; another capture
  // gets another, since its graph may be replayed beside anything else. Where all are taken, `memory` gets one for this launch.
  Ticket ticket(MaybeTensor& memory) const {
    cudaStreamCaptureStatus status;
    unsigned long long capture = 0;  // what no capture is called
    STD_CUDA_CHECK(cudaStreamGetCaptureInfo(stream_, &status, &capture));
    static std::mutex mutex;
    static std::map<std::tuple<int32_t, cudaStream_t, unsigned long long>, int> taken;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const std::tuple key(device_, stream_, status == cudaStreamCaptureStatusNone ? 0 : capture);
      const auto found = taken.find(key);
      if (found != taken.end()) return {found->second, nullptr};
      const int number = static_cast<int>(taken.size());
      if (number < TICKETS) return {taken.emplace(key, number).first->second, nullptr};
    }
    memory = empty(0, 1, aoti_torch_dtype_int32());
    STD_CUDA_CHECK(cudaMemsetAsync(memory->mutable_data_ptr(), 0, sizeof(unsigned), stream_));
    return {0, static_cast<unsigned*>(memory->mutable_data_ptr())};
  }

 private:
  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline Column column_of(const MaybeTensor& tensor) {
  if (!tensor) return {};
  return {tensor->const_data_ptr(), dtype_of(*tensor), tensor->strides()[0]};
}

inline Number number_of(const MaybeTensor& tensor, double otherwise) {
  if (!tensor) return {otherwise, nullptr, ScalarType::Double};
  return {0, tensor->const_data_ptr(), dtype_of(*tensor)};
}

// run(element, scalar): how elements are read, and what is computed with.
template <class Run>
auto with_type(ScalarType read_as, bool float64, Run run) {
  switch (read_as) {
    case ScalarType::Double:
      return run(double(), double());
    case ScalarType::Float:
      return run(float(), float());
    case ScalarType::BFloat16:
      return run(bfloat16(), float());
    case ScalarType::Half:
      return run(float16(), float());
    default:
      return float64 ? run(Any(), double()) : run(Any(), float());
  }
}

}  // namespace fused_elbo
