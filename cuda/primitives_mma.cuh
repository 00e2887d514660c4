// Products of a warp on tensor cores. See primitives.cuh for the two halves.
//
// A fragment is what a warp's lanes hold of a matrix; lane (g, t) = (lane / 4, lane % 4). A row of A and a
// column of B are 32 bytes, 8 words: 16 elements of a 16-bit type or 8 of TF32, so the layouts in words are
// the same for all:
//   A [16, 32 bytes]   register r: word t + 4 * (r / 2) of row g + 8 * (r % 2)
//   B [32 bytes, 8]    register r: word t + 4 * r of column g
//   D [16, 8] float    register r: row g + 8 * (r / 2), column 2 * t + r % 2
#pragma once

#include <string.h>

#include "primitives.cuh"

namespace cnnrnn::cuda {

// A float whose last 13 bits the tensor cores ignore; to_tf32() rounds to the nearest such number.
struct Tf32 {
  float value;
};

// Four words, which move as one: 8 elements of a 16-bit type or 4 floats.
using Words4 = Pack<uint32_t, 4>;

#ifndef CNNRNN_EMULATE

// ---- GPU ----
// The value of another lane of the warp.
__device__ __forceinline__ uint32_t shuffle(uint32_t value, unsigned lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

__device__ __forceinline__ uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

// The same value, but what follows from it is not computed ahead, in more registers than there are.
__device__ __forceinline__ uint32_t not_ahead(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// d += a b
template <typename Element>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
#define CNNRNN_MMA(shape, type)                               \
  asm("mma.sync.aligned." shape ".row.col.f32." type "." type \
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "                   \
      "{%8,%9}, {%0,%1,%2,%3};"                               \
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])        \
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<Element, Half>) CNNRNN_MMA("m16n8k16", "f16");
  if constexpr (std::is_same_v<Element, BFloat16>) CNNRNN_MMA("m16n8k16", "bf16");
  if constexpr (std::is_same_v<Element, Tf32>) CNNRNN_MMA("m16n8k8", "tf32");
#undef CNNRNN_MMA
}

#else  // ---- emulation on the host ----

inline uint32_t shuffle(uint32_t value, unsigned lane, const char* file = __builtin_FILE(),
                        int line = __builtin_LINE()) {
  return emulator::shuffle({file, line}, value, lane);
}

inline uint32_t to_tf32(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return v != v ? bits : (bits + 0x1000u) & 0xFFFFE000u;  // to nearest, ties away from zero
}

inline uint32_t not_ahead(uint32_t value) { return value; }

template <typename Element>
void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
         const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  constexpr auto kElement = std::is_same_v<Element, Half>       ? emulator::Element::kHalf
                            : std::is_same_v<Element, BFloat16> ? emulator::Element::kBFloat16
                                                                : emulator::Element::kTf32;
  const uint32_t a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  emulator::mma({file, line}, kElement, d, a, b);
}

#endif  // ---- both ----

template <typename To, typename From>
__host__ __device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// The nearest TF32 number of a float's bits; a NaN may get lost.
__host__ __device__ __forceinline__ uint32_t high_part(uint32_t bits) {
  return (bits + 0x1000u) & 0xFFFFE000u;
}

// A float as two TF32 numbers: the product of two such floats is, to 2^-22 or so, the sum of three products
// of TF32. An infinity, and what is rounded to one, gives NaN.
struct FloatParts {
  uint32_t high, low;
};
__host__ __device__ __forceinline__ FloatParts float_parts(uint32_t bits) {
  const uint32_t high = high_part(bits);
  // The tensor cores cut off the bits beyond TF32; half a unit more, and on the average they round.
  const float low = (bits_as<float>(bits) - bits_as<float>(high)) * (1 + 0x1p-11f);
  return {high, bits_as<uint32_t>(low)};
}

}  // namespace cnnrnn::cuda
