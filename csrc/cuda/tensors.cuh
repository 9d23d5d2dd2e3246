// Tensors as kernels see them: rows of one dtype, read and written 16 bytes at a time, or any dtypes and strides, one by one.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include "../operations.h"
#include "../rows.h"
#include "device_math.cuh"

namespace fused_elbo {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
// One of the four dtypes, known when the kernel runs.
struct Any {};

// Elements that one thread takes together: whole blocks of noise, and at least 16 bytes.
template <class T>
constexpr int UNIT = sizeof(T) == 2 ? 8 : LANES;
template <>
constexpr int UNIT<Any> = LANES;

constexpr int ROW_DIMS = 8;

// Stands for Any where a dtype is asked for.
constexpr ScalarType ANY = ScalarType::Undefined;

inline int size_of(ScalarType dtype) { return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2; }

inline int unit_of(ScalarType dtype) { return dtype == ANY || size_of(dtype) > 2 ? LANES : UNIT<bfloat16>; }

inline ScalarType dtype_of(const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
      "fused_elbo: takes float64, float32, bfloat16 or float16");
  return dtype;
}

struct View {
  void* data;  // null: absent
  ScalarType dtype;
  int64_t row_stride, strides[ROW_DIMS];
};

struct Shape {
  int64_t rows, columns, sizes[ROW_DIMS];
  int dims;
  // A row starts (origin + row slope) % size elements into its first unit.
  int64_t origin, slope;
  bool shifted;  // for some row that is not 0

  FE_DEVICE int shift(int64_t row, int size) const { return static_cast<int>(origin + row * slope) & (size - 1); }
};

// The noise's count of elements: a row's first is number `first + row per_row`.
struct Numbers {
  int64_t first, per_row;
};

template <int K>
struct Tensors {
  Shape shape;
  View views[K];

  Tensors() = default;

  Tensors(const Tensor* const (&tensors)[K], bool keep_order) {
    const Rows<K> rows(tensors, keep_order);
    STD_TORCH_CHECK(rows.dims <= ROW_DIMS, "fused_elbo: ", rows.dims,
                    " dimensions of a sample cannot be merged, a kernel takes ", ROW_DIMS);
    shape = {rows.rows, rows.columns, {}, rows.dims, 0, 0, false};
    std::copy_n(rows.sizes, rows.dims, shape.sizes);
    for (int k = 0; k < K; ++k) {
      views[k] = {};
      if (!tensors[k]) continue;
      views[k].data = tensors[k]->mutable_data_ptr();
      views[k].dtype = dtype_of(*tensors[k]);
      views[k].row_stride = rows.row_strides[k];
      std::copy_n(rows.strides[k], rows.dims, views[k].strides);
    }
  }

  // Rows that follow one another without gaps are one.
  void merge_rows() {
    for (const View& view : views)
      if (view.data && (shape.dims > 1 || view.row_stride != shape.columns || (view.strides[0] != 1 && shape.columns != 1)))
        return;
    shape.columns *= shape.rows, shape.rows = std::min<int64_t>(shape.rows, 1), shape.sizes[0] = shape.columns;
    for (View& view : views) view.strides[0] = 1;
  }

  // Of tensors first, first + step, ... that are given; ANY if they differ.
  ScalarType common_dtype(int first = 0, int step = 1) const {
    const ScalarType dtype = views[first].dtype;
    for (int k = first; k < K; k += step)
      if (views[k].data && views[k].dtype != dtype) return ANY;
    return dtype;
  }

  // Whether every row can be taken in units of `unit` elements (0: no) that start at 16-byte boundaries in all tensors and,
  // where the rows are numbered, at whole blocks of noise. Units of any other tensors start at blocks of noise alone.
  bool align(int unit, const Numbers* numbers) {
    const auto multiple = [](int64_t value, int64_t of) { return value % of == 0; };
    const auto start_of = [](const View& view) { return reinterpret_cast<intptr_t>(view.data) / size_of(view.dtype); };
    const bool one_row = shape.rows == 1;
    const int64_t origin = start_of(views[0]), slope = views[0].row_stride;
    bool aligned = unit > 0 && shape.dims == 1;
    for (const View& view : views) {
      if (!view.data) continue;
      const int64_t in_vector = 16 / size_of(view.dtype), start = start_of(view);
      aligned = aligned && (view.strides[0] == 1 || shape.columns == 1) && multiple(start - origin, in_vector) &&
                (one_row || multiple(view.row_stride - slope, in_vector));
    }
    if (numbers)
      aligned = aligned && multiple(numbers->first - origin, LANES) && (one_row || multiple(numbers->per_row - slope, LANES));
    shape.origin = aligned ? origin : numbers ? numbers->first : 0;
    shape.slope = one_row ? 0 : aligned ? slope : numbers ? numbers->per_row : 0;
    const int64_t taken = aligned ? unit : LANES;
    shape.shifted = !multiple(shape.origin, taken) || !multiple(shape.slope, taken);
    return aligned;
  }
};

template <class S, class T>
FE_DEVICE S element(const T* at) {
  return static_cast<S>(*at);
}
template <class S>
FE_DEVICE S element(const bfloat16* at) {
  return hardware::from_bfloat16(at->bits).a;
}
template <class S>
FE_DEVICE S element(const float16* at) {
  return hardware::from_float16(at->bits).a;
}

template <class T, class S>
FE_DEVICE void put(T* at, S value) {
  *at = static_cast<T>(value);
}
// A float64 is rounded to float32 on its way, as torch does.
template <class S>
FE_DEVICE void put(bfloat16* at, S value) {
  at->bits = static_cast<uint16_t>(hardware::to_bfloat16({static_cast<float>(value), 0.0f}));
}
template <class S>
FE_DEVICE void put(float16* at, S value) {
  at->bits = static_cast<uint16_t>(hardware::to_float16({static_cast<float>(value), 0.0f}));
}

// body(pointer) with the pointer's type that of a dtype.
template <class Body>
FE_DEVICE void typed(void* data, ScalarType dtype, Body body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(static_cast<double*>(data));
    case ScalarType::BFloat16:
      return body(static_cast<bfloat16*>(data));
    case ScalarType::Half:
      return body(static_cast<float16*>(data));
    default:
      return body(static_cast<float*>(data));
  }
}

template <class S>
FE_DEVICE S element(const void* data, ScalarType dtype, int64_t index) {
  S value = 0;
  typed(const_cast<void*>(data), dtype, [&](auto* p) { value = element<S>(p + index); });
  return value;
}

// A float argument, or the element of a tensor.
struct Number {
  double value;
  const void* data;
  ScalarType dtype;

  template <class S>
  FE_DEVICE S get() const {
    return data ? element<S>(data, dtype, 0) : static_cast<S>(value);
  }
};

// A tensor (N,) with any stride, or absent.
struct Column {
  const void* data;
  ScalarType dtype;
  int64_t stride;

  template <class S>
  FE_DEVICE S get(int64_t row) const {
    return element<S>(data, dtype, row * stride);
  }
};

template <class S, int N>
FE_DEVICE S& lane(Two<S> (&values)[N], int i) {
  return i % 2 ? values[i / 2].b : values[i / 2].a;
}

template <class S, int N>
FE_DEVICE const S& lane(const Two<S> (&values)[N], int i) {
  return i % 2 ? values[i / 2].b : values[i / 2].a;
}

FE_DEVICE void unpack(uint4 v, float, Two<float>* to) {
  to[0] = {__uint_as_float(v.x), __uint_as_float(v.y)};
  to[1] = {__uint_as_float(v.z), __uint_as_float(v.w)};
}
FE_DEVICE void unpack(uint4 v, double, Two<double>* to) { to[0] = {__hiloint2double(v.y, v.x), __hiloint2double(v.w, v.z)}; }
FE_DEVICE void unpack(uint4 v, bfloat16, Two<float>* to) {
  to[0] = hardware::from_bfloat16(v.x), to[1] = hardware::from_bfloat16(v.y);
  to[2] = hardware::from_bfloat16(v.z), to[3] = hardware::from_bfloat16(v.w);
}
FE_DEVICE void unpack(uint4 v, float16, Two<float>* to) {
  to[0] = hardware::from_float16(v.x), to[1] = hardware::from_float16(v.y);
  to[2] = hardware::from_float16(v.z), to[3] = hardware::from_float16(v.w);
}

FE_DEVICE uint4 pack(const Two<float>* from, float) {
  return {__float_as_uint(from[0].a), __float_as_uint(from[0].b), __float_as_uint(from[1].a), __float_as_uint(from[1].b)};
}
FE_DEVICE uint4 pack(const Two<double>* from, double) {
  return {static_cast<unsigned>(__double2loint(from[0].a)), static_cast<unsigned>(__double2hiint(from[0].a)),
          static_cast<unsigned>(__double2loint(from[0].b)), static_cast<unsigned>(__double2hiint(from[0].b))};
}
FE_DEVICE uint4 pack(const Two<float>* from, bfloat16) {
  return {hardware::to_bfloat16(from[0]), hardware::to_bfloat16(from[1]), hardware::to_bfloat16(from[2]),
          hardware::to_bfloat16(from[3])};
}
FE_DEVICE uint4 pack(const Two<float>* from, float16) {
  return {hardware::to_float16(from[0]), hardware::to_float16(from[1]), hardware::to_float16(from[2]),
          hardware::to_float16(from[3])};
}

// A thread's row of a tensor from the column of its place on, in units of SIZE elements, of which `first` to `last` exist where
// an end of the row cuts one. Offsets are counted from that column.
template <class T, class S, int SIZE>
class Row {
 public:
  static constexpr bool VECTORS = true;
  static constexpr int VECTORS_IN_UNIT = SIZE * sizeof(T) / 16;
  struct Bits {
    uint4 vectors[VECTORS_IN_UNIT];
  };

  Row() = default;
  FE_DEVICE Row(const Shape&, const View& view, int64_t row, int64_t column)
      : start_(view.data ? static_cast<T*>(view.data) + (row * view.row_stride + column) : nullptr) {}

  FE_DEVICE explicit operator bool() const { return start_; }

  FE_DEVICE void fetch(int offset, int ahead, Bits& bits) const {
    const uint4* const from = reinterpret_cast<const uint4*>(start_ + offset + ahead);
#pragma unroll
    for (int i = 0; i < VECTORS_IN_UNIT; ++i) bits.vectors[i] = from[i];
  }

  static FE_DEVICE void unpack(const Bits& bits, Two<S> (&values)[SIZE / 2]) {
#pragma unroll
    for (int i = 0; i < VECTORS_IN_UNIT; ++i) fused_elbo::unpack(bits.vectors[i], T(), values + i * PAIRS_IN_VECTOR);
  }

  FE_DEVICE void store(int offset, int ahead, const Two<S> (&values)[SIZE / 2]) const {
    uint4* const to = reinterpret_cast<uint4*>(start_ + offset + ahead);
#pragma unroll
    for (int i = 0; i < VECTORS_IN_UNIT; ++i) to[i] = pack(values + i * PAIRS_IN_VECTOR, T());
  }

  FE_DEVICE void gather(int offset, int first, int last, Two<S> (&values)[SIZE / 2]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) lane(values, i) = i >= first && i < last ? element<S>(start_ + offset + i) : S(0);
  }

  FE_DEVICE void scatter(int offset, int first, int last, const Two<S> (&values)[SIZE / 2]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i)
      if (i >= first && i < last) put(start_ + offset + i, lane(values, i));
  }

 private:
  static constexpr int PAIRS_IN_VECTOR = 8 / sizeof(T);

  T* start_ = nullptr;
};

template <class S, int SIZE>
class Row<Any, S, SIZE> {
 public:
  static constexpr bool VECTORS = false;
  static constexpr int VECTORS_IN_UNIT = 1;

  Row() = default;
  FE_DEVICE Row(const Shape& shape, const View& view, int64_t row, int64_t column)
      : shape_(&shape), view_(&view), row_(row * view.row_stride), column_(column) {}

  FE_DEVICE explicit operator bool() const { return view_->data; }

  FE_DEVICE void gather(int offset, int first, int last, Two<S> (&values)[SIZE / 2]) const {
    int64_t places[SIZE];
    find(offset, first, last, places);
    typed(view_->data, view_->dtype, [&](auto* data) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i) lane(values, i) = i >= first && i < last ? element<S>(data + places[i]) : S(0);
    });
  }

  FE_DEVICE void scatter(int offset, int first, int last, const Two<S> (&values)[SIZE / 2]) const {
    int64_t places[SIZE];
    find(offset, first, last, places);
    typed(view_->data, view_->dtype, [&](auto* data) {
#pragma unroll
      for (int i = 0; i < SIZE; ++i)
        if (i >= first && i < last) put(data + places[i], lane(values, i));
    });
  }

 protected:
  FE_DEVICE void find(int offset, int first, int last, int64_t (&places)[SIZE]) const {
#pragma unroll
    for (int i = 0; i < SIZE; ++i) {
      uint64_t rest = i >= first && i < last ? column_ + offset + i : 0;
      places[i] = row_;
#pragma unroll 1
      for (int d = shape_->dims - 1; d > 0; --d) {
        const uint64_t size = shape_->sizes[d], next = rest / size;
        places[i] += static_cast<int64_t>(rest - next * size) * view_->strides[d];
        rest = next;
      }
      places[i] += static_cast<int64_t>(rest) * view_->strides[0];
    }
  }

  const Shape* shape_;
  const View* view_;
  int64_t row_, column_;
};

}  // namespace fused_elbo
