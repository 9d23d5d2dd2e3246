// The one loop of all kernels: an operation is a function of units, and this finds a thread's units, reads, calls and writes.
#pragma once

#include "launch.cuh"

namespace fused_elbo {

// A thread's part of a share: units of one row, counted from the share's first in it, which starts at `column` (before the row,
// where that does not start with a whole unit).
struct Place {
  int64_t row, chunk, column;
  int thread;                   // number among those of the row
  int units, whole, end_whole;  // all, and those of them that no end of the row cuts

  FE_DEVICE Place(const Plan& plan, const Shape& shape, int64_t share, int size) {
    const int64_t group = plan.split() ? static_cast<uint32_t>(share) / static_cast<uint32_t>(plan.chunks) : share;
    row = group * (THREADS >> plan.threads_log2) + (threadIdx.x >> plan.threads_log2);
    chunk = plan.split() ? share - group * plan.chunks : 0;
    thread = threadIdx.x & (plan.threads() - 1);
    const int shift = shape.shift(row, size);
    const int64_t begin = chunk * plan.chunk, reach = shape.columns + shift - begin * size;
    column = begin * size - shift;
    units = row < shape.rows ? at_most(plan.chunk, (reach + size - 1) / size) : 0;
    whole = shift > 0 && chunk == 0;
    end_whole = at_most(units, reach / size);
  }

  // Offset behind the last element.
  FE_DEVICE int end(const Shape& shape, int size) const { return at_most(units * size, shape.columns - column); }

  // The one thread of a row that writes what there is one of.
  FE_DEVICE bool leads(const Shape& shape) const { return thread == 0 && row < shape.rows; }

 private:
  static FE_DEVICE int at_most(int64_t most, int64_t value) { return static_cast<int>(value < most ? value : most); }
};

// Function has Scalar, INPUTS, OUTPUTS, OPTIONAL_INPUTS (they may be absent, and are then 0), OPTIONAL_OUTPUTS and
//   void apply<NEAR>(in[INPUTS][pairs], out[OUTPUTS][pairs], offset, ahead, Two<Scalar>& sum)
//     for the unit at the place's column + offset + ahead, adding to a sum
//   bool near(place): whether it may be called with NEAR there
// Tensor 0 of the inputs and of the outputs has dtype T, the others U.
template <class T, class U, class Function>
class Pass {
 public:
  using S = typename Function::Scalar;
  static constexpr int SIZE = UNIT<T> > UNIT<U> ? UNIT<T> : UNIT<U>;

  FE_DEVICE Pass(const Shape& shape, const View* views, const Place& place, const Function& function)
      : function_(function), starts_(place.column < 0 ? static_cast<int>(-place.column) : 0), ends_(place.end(shape, SIZE)) {
    first_in_ = FirstRow(shape, views[0], place.row, place.column);
#pragma unroll
    for (int i = 1; i < IN; ++i) in_[i - 1] = OtherRow(shape, views[i], place.row, place.column);
    if constexpr (OUT > 0) first_out_ = FirstRow(shape, views[IN], place.row, place.column);
#pragma unroll
    for (int i = 1; i < OUT; ++i) out_[i - 1] = OtherRow(shape, views[IN + i], place.row, place.column);
  }

  // Sum over the units of the place. A warp's units are neighbours, and so are its turns at full speed, TURNS units each.
  FE_DEVICE S run(const Plan& plan, const Place& place) {
    const int warp_log2 = plan.threads_log2 < WARP_LOG2 ? plan.threads_log2 : WARP_LOG2, stride = 1 << warp_log2;
    const int step = TURNS << plan.threads_log2;
    const bool fast = warp_log2 == WARP_LOG2 && function_.near(place);
    Two<S> sum = {};
#pragma unroll 1
    for (int first = (place.thread >> warp_log2) * (TURNS << warp_log2) + (place.thread & (stride - 1)); first < place.units;
         first += step) {
      if constexpr (VECTORS)
        if (fast && first >= place.whole && first + (TURNS - 1) * WARP < place.end_whole) {
          sum = sum + full<TURNS>(first * SIZE);
          continue;
        }
#pragma unroll 1
      for (int unit = first; unit < place.units && unit < first + (TURNS << warp_log2); unit += stride) {
        if constexpr (VECTORS)
          if (unit >= place.whole && unit < place.end_whole) {
            sum = sum + full<1>(unit * SIZE);
            continue;
          }
        sum = sum + part(unit * SIZE);
      }
    }
    return sum.a + sum.b;
  }

 private:
  static constexpr int IN = Function::INPUTS, OUT = Function::OUTPUTS;
  static constexpr bool SURE_IN = !Function::OPTIONAL_INPUTS, SURE_OUT = !Function::OPTIONAL_OUTPUTS;
  using FirstRow = Row<T, S, SIZE>;
  using OtherRow = Row<U, S, SIZE>;
  static constexpr bool VECTORS = FirstRow::VECTORS;
  static constexpr int LOADS = FirstRow::VECTORS_IN_UNIT + (IN - 1) * OtherRow::VECTORS_IN_UNIT;
  static constexpr int TURNS = LOADS_AHEAD / LOADS < RUN / SIZE ? LOADS_AHEAD / LOADS : RUN / SIZE;

  // Without room for nothing: an array of none would not be C++.
  template <class X, int N>
  using Array = X[N > 0 ? N : 1];

  // N whole units, WARP apart.
  template <int N>
  FE_DEVICE Two<S> full(int offset) {
    typename FirstRow::Bits first_bits[N];
    Array<typename OtherRow::Bits, IN - 1> bits[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (SURE_IN || first_in_) first_in_.fetch(offset, n * WARP * SIZE, first_bits[n]);
#pragma unroll
      for (int i = 0; i < IN - 1; ++i)
        if (SURE_IN || in_[i]) in_[i].fetch(offset, n * WARP * SIZE, bits[n][i]);
    }
    Two<S> sum = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Two<S> in[IN][SIZE / 2] = {};
      Array<Two<S>[SIZE / 2], OUT> out;
      if (SURE_IN || first_in_) FirstRow::unpack(first_bits[n], in[0]);
#pragma unroll
      for (int i = 0; i < IN - 1; ++i)
        if (SURE_IN || in_[i]) OtherRow::unpack(bits[n][i], in[i + 1]);
      function_.template apply<(N > 1)>(in, out, offset, n * WARP * SIZE, sum);
      if constexpr (OUT > 0)
        if (SURE_OUT || first_out_) first_out_.store(offset, n * WARP * SIZE, out[0]);
#pragma unroll
      for (int i = 0; i < OUT - 1; ++i)
        if (SURE_OUT || out_[i]) out_[i].store(offset, n * WARP * SIZE, out[i + 1]);
    }
    return sum;
  }

  // A unit that an end of the row may cut. What is not in the row is 0.
  FE_DEVICE Two<S> part(int offset) {
    const int first = starts_ > offset ? starts_ - offset : 0, last = ends_ - offset < SIZE ? ends_ - offset : SIZE;
    Two<S> in[IN][SIZE / 2] = {};
    Array<Two<S>[SIZE / 2], OUT> out;
    if (SURE_IN || first_in_) first_in_.gather(offset, first, last, in[0]);
#pragma unroll
    for (int i = 0; i < IN - 1; ++i)
      if (SURE_IN || in_[i]) in_[i].gather(offset, first, last, in[i + 1]);
    Two<S> sum = {};
    function_.template apply<false>(in, out, offset, 0, sum);
    if constexpr (OUT > 0)
      if (SURE_OUT || first_out_) first_out_.scatter(offset, first, last, out[0]);
#pragma unroll
    for (int i = 0; i < OUT - 1; ++i)
      if (SURE_OUT || out_[i]) out_[i].scatter(offset, first, last, out[i + 1]);
    return sum;
  }

  const Function function_;
  const int starts_, ends_;  // the row's part, as offsets
  FirstRow first_in_, first_out_;
  Array<OtherRow, IN - 1> in_;
  Array<OtherRow, OUT - 1> out_;
};

}  // namespace fused_elbo
