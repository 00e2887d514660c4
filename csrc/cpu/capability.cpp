#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cnnrnn {

const char* isa_name(Isa isa) {
  static const char* const names[] = {"baseline", "avx2", "avx512", "amx"};
  return names[static_cast<int>(isa)];
}

// Whether the processor has tile registers for bfloat16 and the system lets this process use them. Linux
// hands them out on request, for the whole process and its children.
static bool grant_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of leaf 7's edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    static const bool tiles = grant_tiles();
    return tiles ? Isa::kAmx : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

static Isa choose_isa() {
  const char* asked = std::getenv("CNNRNN_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return best_isa();
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
    if (std::string(asked) != isa_name(isa)) continue;
    if (isa > best_isa())
      throw std::runtime_error(std::string("CNNRNN_CPU_ISA=") + asked + ", but this machine runs at most " +
                               isa_name(best_isa()));
    return isa;
  }
  throw std::runtime_error(std::string("CNNRNN_CPU_ISA=") + asked +
                           " is not one of baseline, avx2, avx512, amx");
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace cnnrnn
