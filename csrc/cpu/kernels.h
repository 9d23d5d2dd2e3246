// The loops over contiguous numbers, compiled once for every instruction set, and the table by which the operations find them.
#pragma once

#include <cstdint>

namespace fused_elbo {

// T is float or double. Every loop takes n elements, any n; a pointer may be null where it says so.
template <class T>
struct Kernels {
  // Standard normals of blocks first, first + 1, ...: at least n of them, and up to NORMALS_SLACK more are written.
  void (*normals)(T* out, int64_t n, uint64_t first_block, uint64_t seed, uint64_t offset);

  // z = mu + eps sigma (eps and z null: no sample), and twice the KL: to terms, or, where that is null, summed up. Without
  // want_kl there is none.
  double (*latent)(const T* mu, const T* logvar, const T* eps, T* z, T* terms, bool want_kl, int64_t n);

  // Gradients for the upstream gradients g_z and c, an element each (null: absent).
  void (*latent_backward)(const T* mu, const T* logvar, const T* eps, const T* g_z, const T* c, T* g_mu, T* g_logvar,
                          int64_t n);

  // The KL with its gradient for an upstream gradient c of every sample.
  double (*kl_with_gradient)(const T* mu, const T* logvar, T c, T* g_mu, T* g_logvar, T* terms, int64_t n);

  // (x_hat - x)^2, to terms or summed up, with c (x_hat - x) to g_x_hat and its negative to g_x (either null).
  double (*squared_error)(const T* x_hat, const T* x, T c, T* g_x_hat, T* g_x, T* terms, int64_t n);

  // c (x_hat - x) and its negative, c an element each.
  void (*squared_error_backward)(const T* x_hat, const T* x, const T* c, T* g_x_hat, T* g_x, int64_t n);

  double (*sum)(const T* values, int64_t n);
  void (*scale)(T* values, T factor, int64_t n);
};

struct Conversions {
  void (*from_bfloat16)(const uint16_t* from, float* to, int64_t n);
  void (*to_bfloat16)(const float* from, uint16_t* to, int64_t n);
  void (*from_float16)(const uint16_t* from, float* to, int64_t n);
  void (*to_float16)(const float* from, uint16_t* to, int64_t n);
};

struct InstructionSet {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  Conversions conversions;
};

constexpr int64_t NORMALS_SLACK = 64;

namespace portable {
extern const InstructionSet instruction_set;
}
#ifdef FE_X86
namespace avx2 {
extern const InstructionSet instruction_set;
}
namespace avx512 {
extern const InstructionSet instruction_set;
}
#endif

// The widest that the processor has, or the one that FUSED_ELBO_CPU names; null if it does not have that one.
const InstructionSet* instruction_set();

}  // namespace fused_elbo
