// Which instruction set the CPU kernels use on this machine. No torch here.
#pragma once

namespace cnnrnn {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);

// The widest set that this build holds and this machine runs.
Isa best_isa();

// best_isa(), or what CNNRNN_CPU_ISA (baseline, avx2, avx512, amx) asks for.
// Throws std::runtime_error for an unknown name or a set the machine lacks. Read once.
Isa active_isa();

}  // namespace cnnrnn

// The kernel table of a family for active_isa(): CNNRNN_ACTIVE_TABLE(conv_pool). Tile registers (kAmx) add to
// avx512 what a family has for them.
#if defined(__x86_64__)
#define CNNRNN_ACTIVE_TABLE(family)               \
  (active_isa() >= Isa::kAvx512 ? family##_avx512 \
   : active_isa() == Isa::kAvx2 ? family##_avx2   \
                                : family##_baseline)
#else
#define CNNRNN_ACTIVE_TABLE(family) (family##_baseline)
#endif
