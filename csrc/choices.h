// The numbers by which an operation is told what to compute: those of spec.py's FAMILIES, ACTIVATIONS and PARAMS.
#pragma once

#include <cstdint>

namespace fused_elbo {

enum class Family : int64_t { gaussian, laplace, bernoulli, discretized_logistic };
enum class Activation : int64_t { identity, sigmoid, tanh };
enum class Param : int64_t { logvar, log_std, std, var, softplus };
enum class Clamp : int64_t { none, hard, soft };

}  // namespace fused_elbo
