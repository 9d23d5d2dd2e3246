// The operations that each library registers for its device. Their schemas stand in fused_elbo/backends/native/library.py, what
// they compute in fused_elbo/reference/.
//
// Tensors are float64, float32, bfloat16 or float16 with any strides; terms are float64 if any tensor is, else float32. A float
// argument with a tensor of the same name beside it counts only where the tensor is absent.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "choices.h"

namespace fused_elbo {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// seed: int64, () or (N,). Without a seed and eps there is no sample. Returns kl (N,) where it is wanted.
MaybeTensor rsample_kl(Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps, int64_t first_index, int64_t offset,
                       MaybeTensor z, bool want_kl);

void rsample_kl_backward(MaybeTensor g_z, MaybeTensor g_kl, Tensor mu, Tensor logvar, MaybeTensor seed, MaybeTensor eps,
                         int64_t first_index, int64_t offset, MaybeTensor g_mu, MaybeTensor g_logvar);

// constant: what a sample's nll has beside its squared error. Without a weight there is no total. Returns (loss, nll, kl of mu
// and logvar).
std::tuple<MaybeTensor, Tensor, MaybeTensor> elbo(Tensor x_hat, Tensor x, MaybeTensor mu, MaybeTensor logvar, MaybeTensor kl,
                                                  double beta, MaybeTensor beta_tensor, double grad_scale,
                                                  MaybeTensor grad_scale_tensor, std::optional<double> weight, double precision,
                                                  double constant, MaybeTensor g_x_hat, MaybeTensor g_x, MaybeTensor g_mu,
                                                  MaybeTensor g_logvar, MaybeTensor g_kl);

// scale: weight / sigma^2. With an expected upstream gradient, g_x_hat and g_x already hold what it gives.
void gaussian_nll_backward(Tensor g_nll, Tensor x_hat, Tensor x, double scale, std::optional<double> expected,
                           MaybeTensor expected_tensor, MaybeTensor g_x_hat, MaybeTensor g_x);

void rescale_(std::vector<Tensor> gradients, Tensor upstream, double expected, MaybeTensor expected_tensor);

// x_hat is (A, B, ...); x (also uint8), log_scale_tensor, weight, mask (bool) and the gradients have its shape, upstream, nll
// and slope are (A, B). What is to be written is given; without upstream there are no gradients.
void likelihood(Tensor x_hat, Tensor x, MaybeTensor log_scale_tensor, MaybeTensor weight, MaybeTensor mask,
                MaybeTensor upstream, int64_t family, int64_t activation, double log_scale, double constant, double scale,
                double shift, MaybeTensor nll, MaybeTensor slope, MaybeTensor g_x_hat, MaybeTensor g_x,
                MaybeTensor g_log_scale);

// mu, raw, prior_mean, prior_raw and kl_elements are (N, ...), z and eps (K, N, ...), kl_rows (N,), log_ratio (K, N).
void posterior(Tensor mu, Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
               int64_t first_index, int64_t offset, int64_t param, double min_std, int64_t clamp, double low, double high,
               std::optional<double> free_bits, MaybeTensor z, MaybeTensor kl_rows, MaybeTensor kl_elements,
               MaybeTensor log_ratio);

// g_z is (K, N, ...), g_kl (N, ...), g_log_ratio and path_weight (K, N), K `samples`.
void posterior_backward(MaybeTensor g_z, MaybeTensor g_kl, MaybeTensor g_log_ratio, MaybeTensor path_weight, Tensor mu,
                        Tensor raw, MaybeTensor prior_mean, MaybeTensor prior_raw, MaybeTensor seed, MaybeTensor eps,
                        int64_t first_index, int64_t offset, int64_t samples, int64_t param, double min_std, int64_t clamp,
                        double low, double high, std::optional<double> free_bits, double posterior_share, double prior_share,
                        MaybeTensor g_mu, MaybeTensor g_raw, MaybeTensor g_prior_mean, MaybeTensor g_prior_raw);

inline const Tensor* pointer(const MaybeTensor& tensor) { return tensor ? &*tensor : nullptr; }

// Whether what is computed with is float64.
template <class... Given>
bool any_float64(const Given*... tensors) {
  return ((tensors && tensors->scalar_type() == torch::headeronly::ScalarType::Double) || ...);
}

}  // namespace fused_elbo

#define FUSED_ELBO_REGISTER(DISPATCH_KEY)                                                 \
  STABLE_TORCH_LIBRARY_IMPL(fused_elbo, DISPATCH_KEY, library) {                          \
    library.impl("rsample_kl", TORCH_BOX(&fused_elbo::rsample_kl));                       \
    library.impl("rsample_kl_backward", TORCH_BOX(&fused_elbo::rsample_kl_backward));     \
    library.impl("elbo", TORCH_BOX(&fused_elbo::elbo));                                   \
    library.impl("gaussian_nll_backward", TORCH_BOX(&fused_elbo::gaussian_nll_backward)); \
    library.impl("rescale_", TORCH_BOX(&fused_elbo::rescale_));                           \
    library.impl("likelihood", TORCH_BOX(&fused_elbo::likelihood));                       \
    library.impl("posterior", TORCH_BOX(&fused_elbo::posterior));                         \
    library.impl("posterior_backward", TORCH_BOX(&fused_elbo::posterior_backward));       \
  }
