// Collectives of a warp: tensor-core products and shuffles. See primitives.cuh for the two halves.
#pragma once

#include "primitives.cuh"

namespace cnnrnn::cuda {

// Four registers of 32 bits, which move as one: 8 halves or 4 floats.
using Words4 = Pack<uint32_t, 4>;

// A float of which products see the upper 10 bits of the mantissa.
struct Tf32 {};

#ifndef CNNRNN_EMULATE

// acc (16 x 8) += a (16 x K) * b (K x 8), K = 16 halves or 8 Tf32: PTX mma.m16n8k16 and m16n8k8. Lane l
// holds, with g = l / 4 and q = l % 4: of a the rows g (a0, a2) and g + 8 (a1, a3), of b the column g, each
// two registers: the q-th and the (q + 4)-th of a row or column; of acc the rows g (0, 1) and g + 8 (2, 3),
// columns 2 * q and 2 * q + 1.
template <typename Element>
__device__ __forceinline__ void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
#define CNNRNN_MMA(shape, type)                                \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type  \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "              \
      "{%8, %9}, {%0, %1, %2, %3};"                            \
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Element, Half>) CNNRNN_MMA("m16n8k16", "f16");
  if constexpr (std::is_same_v<Element, BFloat16>) CNNRNN_MMA("m16n8k16", "bf16");
  if constexpr (std::is_same_v<Element, Tf32>) CNNRNN_MMA("m16n8k8", "tf32");
#undef CNNRNN_MMA
}

// The value of another lane of the warp.
__device__ __forceinline__ uint32_t shuffle(uint32_t value, unsigned lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// Rounded to what a Tf32 product sees; still a float.
__device__ __forceinline__ float round_to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

template <typename To, typename From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

#else  // ---- emulation on the host ----

template <typename Element>
void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulator::mma(std::is_same_v<Element, Half>       ? emulator::Element::kHalf
                : std::is_same_v<Element, BFloat16> ? emulator::Element::kBFloat16
                                                    : emulator::Element::kTf32,
                acc, a, b);
}

inline uint32_t shuffle(uint32_t value, unsigned lane) { return emulator::shuffle(value, lane); }

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float round_to_tf32(float value) {
  return bits_as<float>((bits_as<uint32_t>(value) + 0x1000) & ~uint32_t{0x1fff});
}

#endif

}  // namespace cnnrnn::cuda
