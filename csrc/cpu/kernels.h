// The loops over contiguous numbers, compiled once for every instruction set, and the table by which the operations find them.
#pragma once

#include <cstdint>

#include "../choices.h"

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

// Elements of a likelihood; the tensors that are absent and the results that are not wanted are null.
template <class T>
struct LikelihoodTile {
  const T *x_hat, *x, *log_scale, *weight;
  const T* mask;  // 1 or 0
  const T* upstream;
  T *nll, *slope;
  T *g_x_hat, *g_x, *g_log_scale;
};

template <class T>
struct LikelihoodOptions {
  Family family;
  Activation activation;
  bool levels;  // x holds those of a uint8 target
  T log_scale, constant, scale, shift;
};

// Elements of posterior and prior; raw is clamped.
template <class T>
struct PosteriorTile {
  const T *mu, *raw;
  const T *prior_mean, *prior_raw;  // null: absent
};

// What the parameters stand for: standard deviations and the difference d of the log-variances. prior_std stays as it is where
// there is no prior_raw.
template <class T>
struct MomentsTile {
  T *sigma, *d, *prior_std;
};

template <class T>
struct PosteriorOptions {
  Param param;
  Clamp clamp;
  T min_std, low, high;
  T free_bits;  // 0: none
  T posterior_share, prior_share;
};

// Upstream gradients of one sample, an element each; null: absent.
template <class T>
struct UpstreamTile {
  const T *g_z, *g_ratio, *path_weight;
};

// Sums over samples of the gradients by mu and sigma, the prior's mean and its log-variance. The last two are null where
// log_ratio has no gradient.
template <class T>
struct SampleSums {
  T *mu, *sigma, *prior_mean, *prior_logvar;
};

template <class T>
struct PosteriorGradientTile {
  T *mu, *raw, *prior_mean, *prior_raw;  // null: not wanted
};

template <class T>
struct LikelihoodKernels {
  void (*from_uint8)(const uint8_t* from, T* to, int64_t n);
  void (*likelihood)(const LikelihoodTile<T>& tile, const LikelihoodOptions<T>& options, int64_t n);
};

template <class T>
struct PosteriorKernels {
  void (*clamp)(const T* raw, T* clamped, const PosteriorOptions<T>& options, int64_t n);

  // The moments, and the KL where kl is not null.
  void (*moments)(const PosteriorTile<T>& tile, const MomentsTile<T>& out, T* kl, const PosteriorOptions<T>& options,
                  int64_t n);

  // z = mu + eps sigma, and its log_ratio where that is not null.
  void (*sample)(const PosteriorTile<T>& tile, const MomentsTile<T>& at, const T* eps, T* z, T* log_ratio, int64_t n);

  // The gradients that one sample gives: to the sums, or the first of them.
  void (*sample_backward)(const PosteriorTile<T>& tile, const MomentsTile<T>& at, const T* eps, const UpstreamTile<T>& upstream,
                          const SampleSums<T>& sums, bool first, int64_t n);

  // Those sums (null: no samples) and the KL's gradient, for its upstream gradient c (null: none), to the parameters. by_logvar
  // (null: none) is what the posterior's log-variance gets beside.
  void (*finish)(const PosteriorTile<T>& tile, const MomentsTile<T>& at, const SampleSums<T>& sums, const T* by_logvar,
                 const T* c, const PosteriorGradientTile<T>& out, const PosteriorOptions<T>& options, int64_t n);

  // The gradient of the raw parameter, in place, from that of the clamped one.
  void (*clamp_backward)(const T* raw, T* gradient, const PosteriorOptions<T>& options, int64_t n);
};

template <class Float32, class Float64>
struct Both {
  Float32 float32;
  Float64 float64;
};

using LikelihoodTable = Both<LikelihoodKernels<float>, LikelihoodKernels<double>>;
using PosteriorTable = Both<PosteriorKernels<float>, PosteriorKernels<double>>;

struct InstructionSet {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  Conversions conversions;
  const LikelihoodTable* likelihood;
  const PosteriorTable* posterior;
};

constexpr int64_t NORMALS_SLACK = 64;

#ifdef FE_ISA
namespace FE_ISA {
extern const LikelihoodTable likelihood_table;
extern const PosteriorTable posterior_table;
}  // namespace FE_ISA
#endif

namespace portable {
extern const InstructionSet instruction_set;
}  // namespace portable
#ifdef FE_X86
namespace avx2 {
extern const InstructionSet instruction_set;
}  // namespace avx2
namespace avx512 {
extern const InstructionSet instruction_set;
}  // namespace avx512
#endif

// The widest that the processor has, or the one that FUSED_ELBO_CPU names; null if it does not have that one.
const InstructionSet* instruction_set();

}  // namespace fused_elbo
