// Tiles of shared memory: asynchronous copies into them, and the loads that make fragments of them
// (primitives_mma.cuh). See primitives.cuh for the two halves.
#pragma once

#include "primitives.cuh"

namespace cnnrnn::cuda {

#ifndef CNNRNN_EMULATE

// ---- GPU ----
__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }

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

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
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

#endif

}  // namespace cnnrnn::cuda
