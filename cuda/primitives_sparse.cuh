// Products of a warp on tensor cores whose A has at most two elements of every four: an experiment, see
// conv_pool_tensor_grad_weight_sparse.cuh. The layouts are those of the PTX manual, and of
// primitives_mma.cuh:
//   A [16, 32], stored half   register r: the two elements of chunk t + 4 * (r / 2), row g + 8 * (r % 2); a
//                             chunk is 4 neighbours of a row
//   metadata                  of lanes with t = 0 and 1: chunks 4t..4t+3 of row g, 4 bits each, and above
//                             those of row g + 8; the places of the two elements in their chunk, 2 bits each
//   B [32, 8]                 register r: rows 8r + 2t and 8r + 2t + 1 of column g
//   D [16, 8] float           as ever
#pragma once

#include "primitives_mma.cuh"

namespace cnnrnn::cuda {

// Two elements at places 0 and 1, or 2 and 3, of a chunk.
constexpr uint32_t kFirstPlaces = 0x4, kLastPlaces = 0xE;

#ifndef CNNRNN_EMULATE

// d += a b, of 16-bit elements
template <typename Element>
__device__ __forceinline__ void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t metadata) {
#define CNNRNN_MMA_SPARSE(type)                                                                 \
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type               \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0x0;"            \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), \
        "r"(metadata))
  if constexpr (std::is_same_v<Element, Half>) CNNRNN_MMA_SPARSE("f16");
  if constexpr (std::is_same_v<Element, BFloat16>) CNNRNN_MMA_SPARSE("bf16");
#undef CNNRNN_MMA_SPARSE
}

#else  // ---- emulation on the host ----

template <typename Element>
void mma_sparse(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr auto kElement =
      std::is_same_v<Element, Half> ? emulator::Element::kHalf : emulator::Element::kBFloat16;
  emulator::mma_sparse({file, line}, kElement, d, a, b, metadata);
}

#endif

}  // namespace cnnrnn::cuda
