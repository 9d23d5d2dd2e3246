// Tensors of the general operations: rows under one more dimension, bytes beside floats, each read in a way of its own.
#pragma once

#include "pass.cuh"
#include "sums.cuh"

namespace fused_elbo {

// How a kernel that goes by units reads a row: as vectors of its own T, of what it computes with, or of bytes; or one value for
// all of it.
enum class Access { SAME, WIDE, BYTES, FLAT };

inline bool is_byte(ScalarType dtype) { return dtype == ScalarType::Byte || dtype == ScalarType::Bool; }

struct Operand : View {
  int64_t outer_stride;
  Access access;
  int bytes, column_bytes;  // of an element, and from one of a row to the next, 0 where it is flat

  // Where a row starts.
  FE_DEVICE int64_t start(int64_t outer, int64_t row) const { return outer * outer_stride + row * row_stride; }
};

// body(pointer) with the pointer's type that of a dtype, bytes included.
template <class Body>
FE_DEVICE void typed_or_bytes(void* data, ScalarType dtype, Body body) {
  if (dtype == ScalarType::Byte || dtype == ScalarType::Bool) return body(static_cast<uint8_t*>(data));
  typed(data, dtype, body);
}

// One number for each row under two dimensions, with any strides: what weights gradients.
struct Upstream {
  const void* data;  // null: absent
  ScalarType dtype;
  int64_t outer_stride, row_stride;

  Upstream() = default;
  explicit Upstream(const MaybeTensor& tensor) {
    data = tensor ? tensor->const_data_ptr() : nullptr;
    dtype = tensor ? dtype_of(*tensor) : ANY;
    outer_stride = tensor ? tensor->strides()[0] : 0, row_stride = tensor ? tensor->strides()[1] : 0;
  }

  template <class S>
  FE_DEVICE S get(int64_t outer, int64_t row) const {
    return element<S>(data, dtype, outer * outer_stride + row * row_stride);
  }
};

// Tensors (rows, ...), or (outer, rows, ...) where `leading` says 2. The first is of what rows are made of.
template <int K>
struct Operands {
  Shape shape;
  Operand views[K];

  Operands() = default;

  Operands(const Tensor* const (&tensors)[K], bool keep_order, const int (&leading)[K]) {
    const Rows<K> rows(tensors, keep_order, leading);
    STD_TORCH_CHECK(rows.dims <= ROW_DIMS, "fused_elbo: ", rows.dims,
                    " dimensions of a sample cannot be merged, a kernel takes ", ROW_DIMS);
    shape = {rows.rows, rows.columns, {}, rows.dims, 0, 0, false};
    std::copy_n(rows.sizes, rows.dims, shape.sizes);
    for (int k = 0; k < K; ++k) {
      Operand& view = views[k] = {};
      if (!tensors[k]) continue;
      view.data = tensors[k]->mutable_data_ptr();
      view.dtype = is_byte(tensors[k]->scalar_type()) ? tensors[k]->scalar_type() : dtype_of(*tensors[k]);
      view.bytes = view.column_bytes = is_byte(view.dtype) ? 1 : size_of(view.dtype);
      view.row_stride = rows.row_strides[k];
      view.outer_stride = leading[k] > 1 ? tensors[k]->strides()[0] : 0;
      std::copy_n(rows.strides[k], rows.dims, view.strides);
    }
  }

  // Chooses how each tensor is read beside the first, whose dtype is T. True if all rows start alike: in units of `unit`
  // elements (0: no) at boundaries of what is read at once, 16 bytes or a unit. Those from `outputs` on are written. `outer`
  // rows, of which one starts `outer_slope` elements after the other, are under the other dimension.
  bool align(int unit, int outputs, int64_t outer, int64_t outer_slope, ScalarType scalar) {
    const auto multiple = [](int64_t value, int64_t of) { return value % of == 0; };
    const auto start_of = [](const Operand& view) { return reinterpret_cast<intptr_t>(view.data) / view.bytes; };
    const int64_t origin = start_of(views[0]), slope = shape.rows > 1 ? views[0].row_stride : 0;
    bool aligned = unit > 0 && shape.dims == 1;
    for (int k = 0; k < K; ++k) {
      Operand& view = views[k];
      if (!view.data) continue;
      if (shape.columns > 1 && view.strides[0] == 0 && k > 0 && k < outputs) {
        view.access = Access::FLAT, view.column_bytes = 0;
        continue;
      }
      view.access = view.dtype == views[0].dtype ? Access::SAME : is_byte(view.dtype) ? Access::BYTES : Access::WIDE;
      const int64_t in_vector = is_byte(view.dtype) ? unit : std::min(unit, 16 / view.bytes);
      aligned = aligned && (view.access != Access::WIDE || view.dtype == scalar) &&
                (view.strides[0] == 1 || shape.columns == 1) && multiple(start_of(view) - origin, in_vector) &&
                (shape.rows == 1 || multiple(view.row_stride - slope, in_vector)) &&
                (outer == 1 || multiple(view.outer_stride - outer_slope, in_vector));
    }
    shift_by(aligned ? origin : 0, aligned ? slope : 0, aligned ? unit : LANES);
    return aligned;
  }

  // Units start at blocks of noise.
  void shift_as(const Numbers& numbers) { shift_by(numbers.first, shape.rows > 1 ? numbers.per_row : 0, LANES); }

 private:
  void shift_by(int64_t origin, int64_t slope, int64_t unit) {
    shape.origin = origin, shape.slope = slope;
    shape.shifted = origin % unit != 0 || slope % unit != 0;
  }
};

// SIZE elements of a row from `offset` on, counted from the column of the thread's place. Ends of the row leave those from
// `first` to `last`.
template <int SIZE>
struct Unit {
  int offset, first, last;

  FE_DEVICE Unit(const Shape& shape, const Place& place, int number) : offset(number * SIZE) {
    const int64_t column = place.column + offset, left = shape.columns - column;
    first = column < 0 ? static_cast<int>(-column) : 0;
    last = number >= place.units ? 0 : left < SIZE ? static_cast<int>(left) : SIZE;
  }

  FE_DEVICE bool whole() const { return first == 0 && last == SIZE; }
  FE_DEVICE bool holds(int i) const { return i >= first && i < last; }
};

// A thread's row of an operand from the column of its place on. To be fetched, then unpacked: all of a thread's fetches come
// before it waits for one. `more` elements further on there is another row.
// SURE: it is read as vectors of T.
template <class T, class S, int SIZE, bool SURE = false>
class Cursor {
 public:
  struct Bits {
    uint4 vectors[SIZE * sizeof(S) / 16];
  };

  Cursor() = default;
  FE_DEVICE Cursor(const Shape&, const Operand& view, int64_t outer, int64_t row, int64_t column) : view_(&view) {
    start_ = static_cast<char*>(view.data) + (view.start(outer, row) * view.bytes + column * view.column_bytes);
  }

  FE_DEVICE explicit operator bool() const { return view_->data; }
  FE_DEVICE bool is_flat() const { return is(Access::FLAT); }

  // The one value of a row.
  FE_DEVICE S flat() const {
    S value = 0;
    typed_or_bytes(start_, view_->dtype, [&](auto* p) { value = element<S>(p); });
    return value;
  }

  FE_DEVICE void fetch(const Unit<SIZE>& unit, Bits& bits, int64_t more = 0) const {
    if (is_flat() || !unit.whole()) return;
    accessed(start_, [&](auto* start) {
      const char* const from = reinterpret_cast<const char*>(start + (unit.offset + more));
      constexpr int BYTES = SIZE * sizeof(*start);
      if constexpr (BYTES == 4)
        bits.vectors[0].x = *reinterpret_cast<const uint32_t*>(from);
      else if constexpr (BYTES == 8) {
        const uint2 pair = *reinterpret_cast<const uint2*>(from);
        bits.vectors[0].x = pair.x, bits.vectors[0].y = pair.y;
      } else {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i) bits.vectors[i] = reinterpret_cast<const uint4*>(from)[i];
      }
    });
  }

  // What the row does not have is 0.
  FE_DEVICE void unpack(const Unit<SIZE>& unit, const Bits& bits, S (&values)[SIZE], int64_t more = 0) const {
    if (is_flat()) {
      const S value = flat();
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[i] = value;
    } else {
      accessed(start_, [&](auto* start) {
        if (unit.whole())
          unpack_as(bits, start, values);
        else
#pragma unroll
          for (int i = 0; i < SIZE; ++i) values[i] = unit.holds(i) ? element<S>(start + (unit.offset + more + i)) : S(0);
      });
    }
  }

  // Not bytes.
  FE_DEVICE void write(const Unit<SIZE>& unit, const S (&values)[SIZE], int64_t more = 0) const {
    const auto write_as = [&](auto* start) {
      using U = std::remove_pointer_t<decltype(start)>;
      auto* const to = start + (unit.offset + more);
      constexpr int IN_VECTOR = 16 / sizeof(U);
      if (unit.whole()) {
#pragma unroll
        for (int i = 0; i < SIZE; i += IN_VECTOR) {
          Two<S> pairs[IN_VECTOR / 2] = {};
#pragma unroll
          for (int j = 0; j < IN_VECTOR && i + j < SIZE; ++j) lane(pairs, j) = values[i + j];
          const uint4 vector = pack(pairs, U());
          if constexpr (SIZE < IN_VECTOR)
            *reinterpret_cast<uint2*>(to) = {vector.x, vector.y};
          else
            reinterpret_cast<uint4*>(to)[i / IN_VECTOR] = vector;
        }
      } else {
#pragma unroll
        for (int i = 0; i < SIZE; ++i)
          if (unit.holds(i)) put(to + i, values[i]);
      }
    };
    if (std::is_same_v<T, S> || is(Access::SAME))
      write_as(static_cast<T*>(start_));
    else
      write_as(static_cast<S*>(start_));
  }

 private:
  FE_DEVICE bool is(Access access) const { return SURE ? access == Access::SAME : view_->access == access; }

  template <class Body>
  FE_DEVICE void accessed(void* data, Body body) const {
    if (is(Access::BYTES))
      body(static_cast<uint8_t*>(data));
    else if (std::is_same_v<T, S> || is(Access::SAME))
      body(static_cast<T*>(data));
    else
      body(static_cast<S*>(data));
  }

  template <class U>
  static FE_DEVICE void unpack_as(const Bits& bits, const U*, S (&values)[SIZE]) {
    constexpr int IN_VECTOR = 16 / sizeof(U);
#pragma unroll
    for (int i = 0; i < SIZE; i += IN_VECTOR) {
      Two<S> pairs[IN_VECTOR / 2];
      fused_elbo::unpack(bits.vectors[i / IN_VECTOR], U(), pairs);
#pragma unroll
      for (int j = 0; j < IN_VECTOR && i + j < SIZE; ++j) values[i + j] = lane(pairs, j);
    }
  }

  static FE_DEVICE void unpack_as(const Bits& bits, const uint8_t*, S (&values)[SIZE]) {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      const uint32_t word = i < 4 ? bits.vectors[0].x : bits.vectors[0].y;
      values[i] = static_cast<S>((word >> i % 4 * 8) & 0xFFu);
    }
  }

  const Operand* view_;
  void* start_;
};

// By the element, for any dtypes and strides.
template <class S, int SIZE, bool SURE>
class Cursor<Any, S, SIZE, SURE> : Row<Any, S, SIZE> {
  using Base = Row<Any, S, SIZE>;

 public:
  struct Bits {};

  Cursor() = default;
  FE_DEVICE Cursor(const Shape& shape, const Operand& view, int64_t outer, int64_t row, int64_t column)
      : Base(shape, view, row, column) {
    Base::row_ = view.start(outer, row);
  }

  using Base::operator bool;
  FE_DEVICE bool is_flat() const { return false; }
  FE_DEVICE S flat() const { return 0; }

  FE_DEVICE void fetch(const Unit<SIZE>&, Bits&, int64_t = 0) const {}

  FE_DEVICE void unpack(const Unit<SIZE>& unit, const Bits&, S (&values)[SIZE], int64_t more = 0) const {
    int64_t places[SIZE];
    Base::find(unit.offset, unit.first, unit.last, places);
    typed_or_bytes(Base::view_->data, Base::view_->dtype, [&](auto* data) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) values[i] = unit.holds(i) ? element<S>(data + (places[i] + more)) : S(0);
    });
  }

  FE_DEVICE void write(const Unit<SIZE>& unit, const S (&values)[SIZE], int64_t more = 0) const {
    int64_t places[SIZE];
    Base::find(unit.offset, unit.first, unit.last, places);
    typed(Base::view_->data, Base::view_->dtype, [&](auto* data) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (unit.holds(i)) put(data + (places[i] + more), values[i]);
    });
  }
};

// run(element): how rows are read whose numbers are computed with as S.
template <class S, class Run>
void with_type_of(ScalarType read_as, Run run) {
  if constexpr (std::is_same_v<S, double>) {
    read_as == ScalarType::Double ? run(double()) : run(Any());
  } else {
    switch (read_as) {
      case ScalarType::Float:
        return run(float());
      case ScalarType::BFloat16:
        return run(bfloat16());
      case ScalarType::Half:
        return run(float16());
      default:
        return run(Any());
    }
  }
}

}  // namespace fused_elbo
