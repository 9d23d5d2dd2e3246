#include "kernels.h"

#include "simd.h"

namespace fused_elbo {
namespace FE_ISA {
namespace {

using Lanes = std::make_index_sequence<WIDTH<Float>>;

// Accumulators that one loop goes round, so that no addition waits for the last.
constexpr int CHAINS = 4;

template <class T>
struct Sums {
  Vector<T> chain[CHAINS] = {};

  FE_FN double total() const {
    const Vector<T> sums = (chain[0] + chain[1]) + (chain[2] + chain[3]);
    double lanes[WIDTH<Vector<T>>];
    for (int i = 0; i < WIDTH<Vector<T>>; ++i) lanes[i] = sums[i];
#pragma GCC unroll 4
    for (int half = WIDTH<Vector<T>> / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
  }
};

// body(in, out, k) for vectors of elements: in[IN] is loaded, out[OUT] stored, k counts round the accumulators. What a last
// vector has too many is 0 in, and thrown away.
template <class T, int IN, int OUT, class Body>
FE_FN void for_vectors(const T* const (&from)[IN], T* const (&to)[OUT], int64_t n, Body body) {
  using V = Vector<T>;
  constexpr int width = WIDTH<V>;
  V in[IN], out[OUT];
  int64_t i = 0;
  for (; i + CHAINS * width <= n; i += CHAINS * width) {
#pragma GCC unroll 4
    for (int k = 0; k < CHAINS; ++k) {
#pragma GCC unroll 8
      for (int a = 0; a < IN; ++a) in[a] = load<V>(from[a] + i + k * width);
      body(in, out, k);
#pragma GCC unroll 8
      for (int a = 0; a < OUT; ++a) store(to[a] + i + k * width, out[a]);
    }
  }
  for (; i + width <= n; i += width) {
    for (int a = 0; a < IN; ++a) in[a] = load<V>(from[a] + i);
    body(in, out, 0);
    for (int a = 0; a < OUT; ++a) store(to[a] + i, out[a]);
  }
  if (i < n) {
    for (int a = 0; a < IN; ++a) in[a] = load_some<V>(from[a] + i, n - i);
    body(in, out, 0);
    for (int a = 0; a < OUT; ++a) store_some(to[a] + i, out[a], n - i);
  }
}

// The same with nothing to store.
template <class T, int IN, class Body>
FE_FN void for_vectors(const T* const (&from)[IN], int64_t n, Body body) {
  using V = Vector<T>;
  constexpr int width = WIDTH<V>;
  V in[IN];
  int64_t i = 0;
  for (; i + CHAINS * width <= n; i += CHAINS * width) {
#pragma GCC unroll 4
    for (int k = 0; k < CHAINS; ++k) {
#pragma GCC unroll 8
      for (int a = 0; a < IN; ++a) in[a] = load<V>(from[a] + i + k * width);
      body(in, k);
    }
  }
  for (; i < n; i += width) {
    for (int a = 0; a < IN; ++a) in[a] = n - i < width ? load_some<V>(from[a] + i, n - i) : load<V>(from[a] + i);
    body(in, 0);
  }
}

// N vectors of blocks, whose high word of the index is high throughout: with that and the offset known to be the same for all,
// the compiler takes what they alone decide of the first two rounds out of a loop.
template <int N>
FE_FN Block<Several<N>> words(const Several<N>& block, uint64_t high, uint64_t seed, uint64_t offset) {
  Block<Several<N>> counter = {block, {}, {}, {}};
  for (int i = 0; i < N; ++i) {
    counter.w1.of[i] += high;
    counter.w2.of[i] += offset & 0xFFFFFFFFu;
    counter.w3.of[i] += offset >> 32;
  }
  return philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

FE_FN Bits32 interleaved(Bits64 even, Bits64 odd) { return reinterpret_cast<Bits32>((even & 0xFFFFFFFFu) | (odd << 32)); }

void normals(float* out, int64_t n, uint64_t first_block, uint64_t high, uint64_t seed, uint64_t offset) {
  // A vector's slot s = 4 l + p holds block (width / 4) p + l: then the normals of a block come to stand side by side, and
  // blocks in their order, without leaving their 128 bits.
  constexpr int width = WIDTH<Float>, quarter = width / 4, side_by_side = 2;
  Several<2 * side_by_side> block = {};
#pragma GCC unroll 8
  for (int j = 0; j < 2 * side_by_side; ++j) {
#pragma GCC unroll 8
    for (int i = 0; i < width / 2; ++i) block.of[j][i] = width * (j / 2) + quarter * ((2 * i + j % 2) % 4) + i / 2;
    block.of[j] += first_block;
  }
  // In loops of their own, a processor has several rounds of each of two long chains of instructions under way.
  constexpr int batches = 16;
  Block<Bits32> made[batches];
  while (n > 0) {
    const int64_t needed = (n + 4 * width - 1) / (4 * width), count = needed < batches ? needed : batches;
    for (int64_t i = 0; i < count; i += side_by_side) {
      const auto w = words(block, high, seed, offset);
      for (int j = 0; j < side_by_side; ++j)
        made[i + j] = {interleaved(w.w0.of[2 * j], w.w0.of[2 * j + 1]), interleaved(w.w1.of[2 * j], w.w1.of[2 * j + 1]),
                       interleaved(w.w2.of[2 * j], w.w2.of[2 * j + 1]), interleaved(w.w3.of[2 * j], w.w3.of[2 * j + 1])};
      for (int j = 0; j < 2 * side_by_side; ++j) block.of[j] += side_by_side * width;
    }
    for (int64_t i = 0; i < count; ++i, out += 4 * width) {
      const Pair<Float> first = normal_pair(made[i].w0, made[i].w1), second = normal_pair(made[i].w2, made[i].w3);
      const Float low0 = unpack_low(first.first, first.second, Lanes()),
                  low1 = unpack_low(second.first, second.second, Lanes());
      const Float high0 = unpack_high(first.first, first.second, Lanes()),
                  high1 = unpack_high(second.first, second.second, Lanes());
      store(out, join_low(low0, low1, Lanes()));
      store(out + width, join_high(low0, low1, Lanes()));
      store(out + 2 * width, join_low(high0, high1, Lanes()));
      store(out + 3 * width, join_high(high0, high1, Lanes()));
    }
    n -= 4 * width * count;
  }
}

void normals(double* out, int64_t n, uint64_t first_block, uint64_t high, uint64_t seed, uint64_t offset) {
  constexpr int width = WIDTH<Double>;
  Several<1> block = {};
  for (int i = 0; i < width; ++i) block.of[0][i] = first_block + i;
  for (int64_t i = 0; i < n; i += 4 * width, block.of[0] += width) {
    const auto w = words(block, high, seed, offset);
    const Pair<Double> first = normal_pair(w.w0.of[0], w.w1.of[0]), second = normal_pair(w.w2.of[0], w.w3.of[0]);
    for (int j = 0; j < width; ++j) {
      double* four = out + i + 4 * j;
      four[0] = first.first[j];
      four[1] = first.second[j];
      four[2] = second.first[j];
      four[3] = second.second[j];
    }
  }
}

template <class T>
void normals(T* out, int64_t n, uint64_t first_block, uint64_t seed, uint64_t offset) {
  const int64_t blocks_left = (uint64_t{1} << 32) - (first_block & 0xFFFFFFFFu);
  const int64_t here = n < LANES * blocks_left ? n : LANES * blocks_left;
  normals(out, here, first_block, first_block >> 32, seed, offset);
  if (here < n) normals(out + here, n - here, first_block + blocks_left, seed, offset);
}

template <class T>
double latent(const T* mu, const T* logvar, const T* eps, T* z, T* terms, bool want_kl, int64_t n) {
  using V = Vector<T>;
  using R = Real<V>;
  Sums<T> sums;
  const auto sample = [](const V* in, const Exponentials<V>& e) { return R::mad(in[2], e.sigma, in[0]); };
  if (!want_kl) {
    for_vectors<T, 3, 1>({mu, logvar, eps}, {z}, n,
                         [&](const V* in, V* out, int) { out[0] = sample(in, exponentials(in[1])); });
  } else if (eps && terms) {
    for_vectors<T, 3, 2>({mu, logvar, eps}, {z, terms}, n, [&](const V* in, V* out, int) {
      const auto e = exponentials(in[1]);
      out[0] = sample(in, e);
      out[1] = twice_kl(in[0], e);
    });
  } else if (eps) {
    for_vectors<T, 3, 1>({mu, logvar, eps}, {z}, n, [&](const V* in, V* out, int k) {
      const auto e = exponentials(in[1]);
      out[0] = sample(in, e);
      sums.chain[k] += twice_kl(in[0], e);
    });
  } else if (terms) {
    for_vectors<T, 2, 1>({mu, logvar}, {terms}, n,
                         [&](const V* in, V* out, int) { out[0] = twice_kl(in[0], exponentials(in[1])); });
  } else {
    for_vectors<T, 2>({mu, logvar}, n, [&](const V* in, int k) { sums.chain[k] += twice_kl(in[0], exponentials(in[1])); });
  }
  return sums.total();
}

template <class T>
void latent_backward(const T* mu, const T* logvar, const T* eps, const T* g_z, const T* c, T* g_mu, T* g_logvar, int64_t n) {
  using V = Vector<T>;
  if (g_z && c) {
    for_vectors<T, 5, 2>({mu, logvar, eps, g_z, c}, {g_mu, g_logvar}, n, [](const V* in, V* out, int) {
      const auto g = latent_gradient<true, true>(in[0], exponentials(in[1]), in[2], in[3], in[4]);
      out[0] = g.mu;
      out[1] = g.logvar;
    });
  } else if (g_z) {
    for_vectors<T, 3, 2>({logvar, eps, g_z}, {g_mu, g_logvar}, n, [](const V* in, V* out, int) {
      const auto g = latent_gradient<true, false>(V{}, exponentials(in[0]), in[1], in[2], V{});
      out[0] = g.mu;
      out[1] = g.logvar;
    });
  } else {
    for_vectors<T, 3, 2>({mu, logvar, c}, {g_mu, g_logvar}, n, [](const V* in, V* out, int) {
      const auto g = latent_gradient<false, true>(in[0], exponentials(in[1]), V{}, V{}, in[2]);
      out[0] = g.mu;
      out[1] = g.logvar;
    });
  }
}

template <class T>
double kl_with_gradient(const T* mu, const T* logvar, T c, T* g_mu, T* g_logvar, T* terms, int64_t n) {
  using V = Vector<T>;
  const V weight = Real<V>::of(c);
  Sums<T> sums;
  const auto both = [&](const V* in, V* out) {
    const auto e = exponentials(in[1]);
    const auto g = latent_gradient<false, true>(in[0], e, V{}, V{}, weight);
    out[0] = g.mu;
    out[1] = g.logvar;
    return twice_kl(in[0], e);
  };
  if (terms)
    for_vectors<T, 2, 3>({mu, logvar}, {g_mu, g_logvar, terms}, n, [&](const V* in, V* out, int) { out[2] = both(in, out); });
  else
    for_vectors<T, 2, 2>({mu, logvar}, {g_mu, g_logvar}, n,
                         [&](const V* in, V* out, int k) { sums.chain[k] += both(in, out); });
  return sums.total();
}

template <class T>
double squared_error(const T* x_hat, const T* x, T c, T* g_x_hat, T* g_x, T* terms, int64_t n) {
  using V = Vector<T>;
  const V weight = Real<V>::of(c);
  Sums<T> sums;
  const auto add = [&](V residual, int k) { sums.chain[k] = Real<V>::mad(residual, residual, sums.chain[k]); };
  if (terms) {
    for_vectors<T, 2, 1>({x_hat, x}, {terms}, n, [](const V* in, V* out, int) {
      const V residual = in[0] - in[1];
      out[0] = residual * residual;
    });
    if (g_x_hat || g_x) squared_error<T>(x_hat, x, c, g_x_hat, g_x, nullptr, n);
  } else if (g_x_hat && g_x) {
    for_vectors<T, 2, 2>({x_hat, x}, {g_x_hat, g_x}, n, [&](const V* in, V* out, int k) {
      const V residual = in[0] - in[1];
      add(residual, k);
      out[0] = weight * residual;
      out[1] = -out[0];
    });
  } else if (g_x_hat || g_x) {
    const V signed_weight = g_x_hat ? weight : -weight;
    for_vectors<T, 2, 1>({x_hat, x}, {g_x_hat ? g_x_hat : g_x}, n, [&](const V* in, V* out, int k) {
      const V residual = in[0] - in[1];
      add(residual, k);
      out[0] = signed_weight * residual;
    });
  } else {
    for_vectors<T, 2>({x_hat, x}, n, [&](const V* in, int k) { add(in[0] - in[1], k); });
  }
  return sums.total();
}

template <class T>
void squared_error_backward(const T* x_hat, const T* x, const T* c, T* g_x_hat, T* g_x, int64_t n) {
  using V = Vector<T>;
  if (g_x_hat && g_x)
    for_vectors<T, 3, 2>({x_hat, x, c}, {g_x_hat, g_x}, n, [](const V* in, V* out, int) {
      out[0] = in[2] * (in[0] - in[1]);
      out[1] = -out[0];
    });
  else if (g_x_hat)
    for_vectors<T, 3, 1>({x_hat, x, c}, {g_x_hat}, n, [](const V* in, V* out, int) { out[0] = in[2] * (in[0] - in[1]); });
  else
    for_vectors<T, 3, 1>({x_hat, x, c}, {g_x}, n, [](const V* in, V* out, int) { out[0] = in[2] * (in[1] - in[0]); });
}

template <class T>
double sum(const T* values, int64_t n) {
  Sums<T> sums;
  for_vectors<T, 1>({values}, n, [&](const Vector<T>* in, int k) { sums.chain[k] += in[0]; });
  return sums.total();
}

template <class T>
void scale(T* values, T factor, int64_t n) {
  using V = Vector<T>;
  const V by = Real<V>::of(factor);
  for_vectors<T, 1, 1>({values}, {values}, n, [&](const V* in, V* out, int) { out[0] = in[0] * by; });
}

using Packed16 = uint16_t __attribute__((vector_size(VECTOR_BYTES / 2)));

template <class Body>
FE_FN void for_packed(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + WIDTH<Float> <= n; i += WIDTH<Float>) body(i, WIDTH<Float>);
  if (i < n) body(i, n - i);
}

FE_FN Float widened_bfloat16(Packed16 v) { return reinterpret_cast<Float>(__builtin_convertvector(v, Bits32) << 16); }

FE_FN Packed16 narrowed_bfloat16(Float v) {
  const Bits32 bits = reinterpret_cast<Bits32>(v);
  const Bits32 rounded = (bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16;
  const Bits32 kept = v == v ? rounded : (bits >> 16 | 0x40u);
  return __builtin_convertvector(kept, Packed16);
}

FE_FN Float widened_float16(Packed16 v) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(v));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(v));
#else
  // The exponent's bias is put right by a multiplication, a subnormal number made normal by a subtraction.
  using R = Real<Float>;
  const Bits32 word = __builtin_convertvector(v, Bits32) << 16, twice = word + word;
  const Float normal = R::number((twice >> 4) + (0xE0u << 23)) * 0x1p-112f;
  const Float subnormal = R::number((twice >> 17) | (126u << 23)) - 0.5f;
  return R::number((word & 0x80000000u) | (twice < (1u << 27) ? R::bits(subnormal) : R::bits(normal)));
#endif
}

FE_FN Packed16 narrowed_float16(Float v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Packed16>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  return reinterpret_cast<Packed16>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  // Added to a power of two that is right for its exponent, a number is rounded to what float16 keeps of it.
  using R = Real<Float>;
  const Bits32 word = R::bits(v), twice = word + word, exponent = twice & 0xFF000000u;
  const Bits32 bias = exponent < 0x71000000u ? Bits32{} + 0x71000000u : exponent;
  const Float base = (R::number(word & 0x7FFFFFFFu) * 0x1p112f) * 0x1p-110f;
  const Bits32 bits = R::bits(R::number((bias >> 1) + 0x07800000u) + base);
  const Bits32 made = ((bits >> 13) & 0x7C00u) + (bits & 0x0FFFu);
  return __builtin_convertvector((word >> 16 & 0x8000u) | (twice > 0xFF000000u ? Bits32{} + 0x7E00u : made), Packed16);
#endif
}

template <Float (*WIDENED)(Packed16)>
void widen(const uint16_t* from, float* to, int64_t n) {
  for_packed(n, [&](int64_t i, int64_t count) {
    Packed16 packed = {};
    __builtin_memcpy(&packed, from + i, count * sizeof *from);
    const Float wide = WIDENED(packed);
    __builtin_memcpy(to + i, &wide, count * sizeof *to);
  });
}

template <Packed16 (*NARROWED)(Float)>
void narrow(const float* from, uint16_t* to, int64_t n) {
  for_packed(n, [&](int64_t i, int64_t count) {
    Float wide = {};
    __builtin_memcpy(&wide, from + i, count * sizeof *from);
    const Packed16 packed = NARROWED(wide);
    __builtin_memcpy(to + i, &packed, count * sizeof *to);
  });
}

template <class T>
constexpr Kernels<T> kernels() {
  return {normals<T>, latent<T>, latent_backward<T>, kl_with_gradient<T>, squared_error<T>, squared_error_backward<T>,
          sum<T>,     scale<T>};
}

#define FE_STRING(name) #name
#define FE_NAME(name) FE_STRING(name)

}  // namespace

extern const InstructionSet instruction_set = {
    FE_NAME(FE_ISA),   kernels<float>(),
    kernels<double>(), {widen<widened_bfloat16>, narrow<narrowed_bfloat16>, widen<widened_float16>, narrow<narrowed_float16>},
    &likelihood_table, &posterior_table};

}  // namespace FE_ISA
}  // namespace fused_elbo
