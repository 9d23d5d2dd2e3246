// Sums in a fixed order: of a row's threads, of a block, and of what blocks leave for the last of them to arrive.
#pragma once

#include "launch.cuh"

namespace fused_elbo {

constexpr int WARPS = THREADS / WARP;
constexpr unsigned ALL = 0xFFFFFFFFu;

// The sum of each group of neighbouring threads, in all of them; `threads` is a power of two.
template <class S>
FE_DEVICE S warp_sum(S value, int threads = WARP) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    if (distance < threads) value += __shfl_xor_sync(ALL, value, distance);
  return value;
}

// For all threads of a block.
template <class S>
FE_DEVICE S block_sum(S value) {
  __shared__ S sums[WARPS];
  value = warp_sum(value);
  __syncthreads();
  if (threadIdx.x % WARP == 0) sums[threadIdx.x / WARP] = value;
  __syncthreads();
  value = sums[0];
#pragma unroll
  for (int w = 1; w < WARPS; ++w) value += sums[w];
  return value;
}

// Of the threads that share a row.
template <class S>
FE_DEVICE S row_sum(S value, const Plan& plan) {
  return plan.threads() > WARP ? block_sum(value) : warp_sum(value, plan.threads());
}

// True in the last block to get here, which then sees what thread 0 of all others has written.
FE_DEVICE bool arrive(const Ticket& ticket) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    // Wraps around, and so is left at zero.
    last = atomicInc(ticket.counter(), gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Sums of partials (rows, columns), row by row, with `shift` to out (or nowhere), and their total, in float64.
template <class S>
FE_DEVICE double combine(const S* partials, S* out, int64_t rows, int64_t columns, double shift) {
  // Slots are numbered by row and column of a tile that is as wide as a row needs. A thread loads SLOTS of them at once.
  constexpr int SLOTS = 8, TILE = SLOTS * THREADS;
  __shared__ double stretches[TILE / WARP];
  int width = 1;
  while (width < columns && width < TILE) width *= 2;
  const int height = TILE / width, thread = threadIdx.x;
  double total = 0;
  for (int64_t first = 0; first < rows; first += height) {
    double sums[SLOTS] = {};
    for (int64_t column = 0; column < columns; column += width) {
#pragma unroll
      for (int i = 0; i < SLOTS; ++i) {
        const int slot = i * THREADS + thread;
        const int64_t r = first + slot / width, c = column + slot % width;
        // Other blocks wrote these: they are in the L2, and must not come from this multiprocessor's own cache.
        if (r < rows && c < columns) sums[i] += __ldcg(partials + r * columns + c);
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SLOTS; ++i) {
      const double sum = warp_sum(sums[i], width);
      const int slot = i * THREADS + thread;
      if (width >= WARP) {
        if (thread % WARP == 0) stretches[slot / WARP] = sum;
      } else if (slot % width == 0 && first + slot / width < rows) {
        if (out) out[first + slot / width] = static_cast<S>(sum + shift);
        total += sum;
      }
    }
    __syncthreads();
    if (width >= WARP && thread < height && first + thread < rows) {
      double sum = 0;
      for (int i = 0; i < width / WARP; ++i) sum += stretches[thread * (width / WARP) + i];
      if (out) out[first + thread] = static_cast<S>(sum + shift);
      total += sum;
    }
  }
  return block_sum(total);
}

// Of values (count,).
FE_DEVICE double column_sum(const Column& values, int64_t count) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += THREADS) total += values.get<double>(i);
  return block_sum(total);
}

}  // namespace fused_elbo
