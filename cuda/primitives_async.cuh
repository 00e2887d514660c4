// How blocks tell each other that something is there, without a barrier for all: barriers that count arriving
// bytes (clusters, sm_90), and flags in global memory. See primitives.cuh for the two halves.
#pragma once

#include "primitives.cuh"

namespace cnnrnn::cuda {

// A barrier in shared memory that is over when `count` threads have arrived and all announced bytes have been
// pushed; then it begins anew. Its phases have the parities 0, 1, 0, ...
using Arrivals = uint64_t;

#ifndef CNNRNN_EMULATE

// An address of shared memory as PTX's shared windows have it.
__device__ __forceinline__ uint32_t shared_address(const void* place) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// Other blocks may use the barrier after the cluster's next barrier.
__device__ __forceinline__ void arrivals_init(Arrivals* barrier, unsigned count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// One arrival, which announces bytes.
__device__ __forceinline__ void arrivals_expect(Arrivals* barrier, unsigned bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}

// Until the phase of this parity is over. What was pushed in it is seen after.
__device__ __forceinline__ void arrivals_wait(Arrivals* barrier, unsigned parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Writes to the same place in block `rank` of this cluster, and tells that block's barrier.
__device__ __forceinline__ void push(void* place, const Pack<uint32_t, 4>& value, Arrivals* barrier,
                                     unsigned rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 place, barrier;\n"
      "mapa.shared::cluster.u32 place, %0, %6;\n"
      "mapa.shared::cluster.u32 barrier, %1, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [place], {%2, %3, %4, %5}, "
      "[barrier];\n}" ::"r"(shared_address(place)),
      "r"(shared_address(barrier)), "r"(value.v[0]), "r"(value.v[1]), "r"(value.v[2]), "r"(value.v[3]),
      "r"(rank)
      : "memory");
#endif
}

// Adds one to a counter in global memory. What this block did before its last barrier is seen by whoever
// waits for the counter.
__device__ __forceinline__ void signal(unsigned* flag) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(flag) : "memory");
}

// Until the counter has reached `count`.
__device__ __forceinline__ void signals_wait(const unsigned* flag, unsigned count) {
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
  } while (seen < count);
}

// What another block wrote while this kernel runs: not from this block's own cache.
template <typename V>
__device__ __forceinline__ V load_shared_by_grid(const V* place) {
  static_assert(sizeof(V) == 16 || sizeof(V) == 8);
  V value;
  if constexpr (sizeof(V) == 16) {
    const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(place));
    memcpy(&value, &bits, sizeof value);
  } else {
    const uint2 bits = __ldcg(reinterpret_cast<const uint2*>(place));
    memcpy(&value, &bits, sizeof value);
  }
  return value;
}

#else  // ---- emulation on the host ----

inline void arrivals_init(Arrivals* barrier, unsigned count) { emulator::arrivals_init(barrier, count); }

inline void arrivals_expect(Arrivals* barrier, unsigned bytes) { emulator::arrivals_expect(barrier, bytes); }

inline void arrivals_wait(Arrivals* barrier, unsigned parity, const char* file = __builtin_FILE(),
                          int line = __builtin_LINE()) {
  emulator::arrivals_wait(barrier, parity, {file, line});
}

inline void push(void* place, const Pack<uint32_t, 4>& value, Arrivals* barrier, unsigned rank) {
  emulator::push(emulator::in_block_of_cluster(place, rank), &value, sizeof value,
                 emulator::in_block_of_cluster(barrier, rank));
}

inline void signal(unsigned* flag) { emulator::signal(flag); }

inline void signals_wait(const unsigned* flag, unsigned count, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  emulator::signals_wait(flag, count, {file, line});
}

template <typename V>
V load_shared_by_grid(const V* place) {
  return *place;
}

#endif

}  // namespace cnnrnn::cuda
