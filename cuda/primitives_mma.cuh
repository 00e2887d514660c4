// Tensor cores and asynchronous copies behind plain names: the part of primitives.cuh that kernels of many
// products need, with its own half for the host emulation.
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

// d += a b
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, Half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  if constexpr (std::is_same_v<T, BFloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  if constexpr (std::is_same_v<T, Tf32>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8x8 matrices of 16-bit elements (8x4 of 32-bit ones) from shared memory: lane l gives the address of
// row l % 8 of matrix l / 8, 16 bytes. Register m: word t of row g of matrix m. With rows 0-7 and 8-15 as
// matrices 0 and 1, and the second 16 bytes of both as 2 and 3, that is a fragment of A.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The same of the transposed matrices: register m holds rows 2t and 2t + 1 of column g. 16-bit elements only.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Begins a copy of 16 bytes from global to shared memory, of zeros if not `inside` (`from` is not read then).
// What has been begun since the last async_commit() is a group; after async_wait<n>() all groups but the last
// n have landed for the calling thread. Other threads see them after a barrier.
__device__ __forceinline__ void async_copy(void* to, const void* from, bool inside) {
  const auto address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(address), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
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

template <typename T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
         int line = __builtin_LINE()) {
  constexpr auto kElement = std::is_same_v<T, Half>       ? emulator::Element::kHalf
                            : std::is_same_v<T, BFloat16> ? emulator::Element::kBFloat16
                                                          : emulator::Element::kTf32;
  emulator::mma({file, line}, kElement, d, a, b);
}

inline void load_matrices(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulator::load_matrices({file, line}, r, row, false);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row, const char* file = __builtin_FILE(),
                                     int line = __builtin_LINE()) {
  emulator::load_matrices({file, line}, r, row, true);
}

inline void async_copy(void* to, const void* from, bool inside) {
  emulator::async_copy(to, from, 16, !inside);
}
inline void async_commit() { emulator::async_commit(); }
template <int kGroupsLeft>
void async_wait() {
  emulator::async_wait(kGroupsLeft);
}

#endif  // ---- both ----

template <typename To, typename From>
__host__ __device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cnnrnn::cuda
