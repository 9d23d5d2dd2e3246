#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

#ifdef FE_X86
#include <cpuid.h>
#endif

namespace fused_elbo {
namespace {

#ifdef FE_X86
bool has_float16_conversions() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

// Best first.
const std::vector<const InstructionSet*>& available() {
  static const auto found = [] {
    std::vector<const InstructionSet*> sets;
#ifdef FE_X86
    const bool avx2_too = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_float16_conversions();
    if (avx2_too && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      sets.push_back(&avx512::instruction_set);
    if (avx2_too) sets.push_back(&avx2::instruction_set);
#endif
    sets.push_back(&portable::instruction_set);
    return sets;
  }();
  return found;
}

}  // namespace

const InstructionSet* instruction_set() {
  static const InstructionSet* const chosen = []() -> const InstructionSet* {
    const char* asked = std::getenv("FUSED_ELBO_CPU");
    if (!asked || !*asked) return available().front();
    for (const InstructionSet* set : available())
      if (!std::strcmp(set->name, asked)) return set;
    return nullptr;
  }();
  return chosen;
}

}  // namespace fused_elbo

// The instruction set in use, null where FUSED_ELBO_CPU names one that this processor does not have.
extern "C" __attribute__((visibility("default"))) const char* fused_elbo_capability() {
  const auto* set = fused_elbo::instruction_set();
  return set ? set->name : nullptr;
}

// All that this processor has, best first, separated by spaces.
extern "C" __attribute__((visibility("default"))) const char* fused_elbo_supported() {
  static const std::string names = [] {
    std::string joined;
    for (const auto* set : fused_elbo::available()) joined.append(joined.empty() ? "" : " ").append(set->name);
    return joined;
  }();
  return names.c_str();
}
