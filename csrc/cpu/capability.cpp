#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace cnnrnn {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  return names[static_cast<int>(isa)];
}

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

static Isa choose_isa() {
  const char* asked = std::getenv("CNNRNN_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best_isa();
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(asked) != isa_name(isa)) continue;
    if (isa > best_isa())
      throw std::runtime_error(std::string("CNNRNN_CPU_ISA=") + asked + ", but this machine runs at most " +
                               isa_name(best_isa()));
    return isa;
  }
  throw std::runtime_error(std::string("CNNRNN_CPU_ISA=") + asked + " is not one of baseline, avx2, avx512");
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace cnnrnn
