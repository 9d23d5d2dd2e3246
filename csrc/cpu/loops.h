// Loops whose tensors may be absent: whether one is does not change within a loop, so a test costs little beside exponentials.
#pragma once

#include "simd.h"

namespace fused_elbo {

// Elements i, i + 1, ... of tensors: a vector of them.
template <class V>
struct Whole {
  using T = typename Real<V>::Scalar;
  int64_t i;

  FE_FN V load(const T* from) const { return fused_elbo::load<V>(from + i); }
  FE_FN void store(T* to, V v) const { fused_elbo::store(to + i, v); }
};

// The last n of them, fewer than a vector has: what is beyond is 0.
template <class V>
struct Part {
  using T = typename Real<V>::Scalar;
  int64_t i, n;

  FE_FN V load(const T* from) const { return load_some<V>(from + i, n); }
  FE_FN void store(T* to, V v) const { store_some(to + i, v, n); }
};

// body(at) with a Whole or a Part for n elements.
template <class V, class Body>
FE_FN void for_elements(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + WIDTH<V> <= n; i += WIDTH<V>) body(Whole<V>{i});
  if (i < n) body(Part<V>{i, n - i});
}

}  // namespace fused_elbo
