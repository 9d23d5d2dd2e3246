#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fused_elbo {
namespace {

// Best first.
const InstructionSet* const* available() {
  static const InstructionSet* found[4] = {};
  if (!found[0]) {
    int count = 0;
#ifdef FE_X86
    const bool avx2_too = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2_too && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      found[count++] = &avx512::instruction_set;
    if (avx2_too) found[count++] = &avx2::instruction_set;
#endif
    found[count] = &portable::instruction_set;
  }
  return found;
}

}  // namespace

const InstructionSet* instruction_set() {
  static const InstructionSet* const chosen = []() -> const InstructionSet* {
    const char* asked = std::getenv("FUSED_ELBO_CPU");
    if (!asked || !*asked) return *available();
    for (auto set = available(); *set; ++set)
      if (!std::strcmp((*set)->name, asked)) return *set;
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
  static char names[64] = "";
  if (!*names)
    for (auto set = fused_elbo::available(); *set; ++set) {
      if (*names) std::strcat(names, " ");
      std::strcat(names, (*set)->name);
    }
  return names;
}
