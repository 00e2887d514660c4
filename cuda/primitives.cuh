// The few things kernels need from a GPU, behind plain names: barriers, shared memory, launches, scalar
// types. Kernels use nothing else, so that tests/cuda_emulation can run their source on a CPU: with
// CNNRNN_EMULATE defined, the second half of this file takes the place of the first.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

#include "dtype.h"

#ifndef CNNRNN_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cnnrnn::cuda {

// ---- GPU ----
using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float widen(Half v) { return __half2float(v); }
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(v); }
template <typename T>
__device__ __forceinline__ T narrow_to(float v) {
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(v);
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(v);
  if constexpr (std::is_same_v<T, float>) return v;
}

// All threads of the block meet; what they wrote before is seen by all after.
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// The same for two neighbouring warps, 2 * i and 2 * i + 1, of a block of at most 30.
__device__ __forceinline__ void pair_barrier() {
  asm volatile("bar.sync %0, 64;" ::"r"(1 + threadIdx.x / 64) : "memory");
}

// The block's dynamic shared memory, 16-byte aligned. Kernels carve all they need from it.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_base[];
  return reinterpret_cast<T*>(shared_base);
}

// ---- clusters: blocks that run together and reach each other's shared memory (sm_90) ----
// All threads of the cluster meet; what they wrote before, to any block's shared memory, is seen by all
// after.
__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// The barrier of a cluster of kBlocks blocks, or of a block on its own.
template <int kBlocks>
__device__ __forceinline__ void group_barrier() {
  if constexpr (kBlocks == 1) block_barrier();
  if constexpr (kBlocks > 1) cluster_barrier();
}

// The same place of shared memory in block `rank` of this cluster.
template <typename V>
__device__ __forceinline__ V* in_block_of_cluster(V* place, unsigned rank) {
#if __CUDA_ARCH__ >= 900
  V* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(place), "r"(rank));
  return there;
#else
  return place;  // never run: clusters_fit() is false there
#endif
}

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + what + ": " + cudaGetErrorString(status));
}

// Shared memory one block may ask for on the current device, bytes.
inline size_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "shared memory limit");
  return bytes;
}

template <typename... Params>
void allow_shared_memory(void (*kernel)(Params...), size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "shared memory of a kernel");
}

struct LaunchConfig {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  LaunchConfig(dim3 grid, unsigned blocks, unsigned threads, size_t shared_bytes, void* stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = blocks > 1 ? 1 : 0;
  }
  void cooperate() {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    config.numAttrs = 1;
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

template <typename... Params>
void allow_large_clusters(void (*kernel)(Params...), unsigned blocks) {
  if (blocks <= 8) return;  // what every device with clusters has
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
             "cluster of more than 8 blocks");
}

// Whether the current device can run the kernel in clusters of so many blocks.
template <typename... Params>
bool clusters_fit(void (*kernel)(Params...), unsigned blocks, unsigned threads, size_t shared_bytes) {
  int device = 0, major = 0, clusters = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "compute capability");
  if (major < 9) return false;
  allow_shared_memory(kernel, shared_bytes);
  allow_large_clusters(kernel, blocks);
  const LaunchConfig launch(dim3(blocks), blocks, threads, shared_bytes, nullptr);
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
    cudaGetLastError();  // a size that the device does not know is one that does not fit
    return false;
  }
  return clusters > 0;
}

// Enqueues kernel(args...) on `stream` and returns at once. `blocks` neighbours of the grid's first
// dimension make a cluster.
template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), dim3 grid, unsigned blocks, unsigned threads,
                     size_t shared_bytes, void* stream, Args... args) {
  allow_shared_memory(kernel, shared_bytes);
  allow_large_clusters(kernel, blocks);
  const LaunchConfig launch(grid, blocks, threads, shared_bytes, stream);
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Params>(args)...), "kernel launch");
}

// How many blocks of the kernel the current device runs at once.
template <typename... Params>
unsigned blocks_at_once(void (*kernel)(Params...), unsigned threads, size_t shared_bytes) {
  int device = 0, processors = 0, blocks = 0;
  check_cuda(cudaGetDevice(&device), "current device");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "processor count");
  allow_shared_memory(kernel, shared_bytes);
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes),
             "occupancy of a block");
  return static_cast<unsigned>(blocks * processors);
}

// As launch(); all blocks run at once, so that they may wait for each other.
template <typename... Params, typename... Args>
void launch_together(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes,
                     void* stream, Args... args) {
  allow_shared_memory(kernel, shared_bytes);
  LaunchConfig launch(grid, 1, threads, shared_bytes, stream);
  launch.cooperate();
  check_cuda(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Params>(args)...), "kernel launch");
}

// The address of a Pack, in memory aligned for one wide access.
template <typename P, typename T>
__device__ __forceinline__ P* pack_at(T* first) {
  return reinterpret_cast<P*>(first);
}

}  // namespace cnnrnn::cuda

#else  // ---- emulation on the host ----

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (::emulator::current->thread)
#define blockIdx (::emulator::current->block)
#define blockDim (::emulator::block_size)
#define gridDim (::emulator::grid_size)

namespace cnnrnn::cuda {

using Half = c10::Half;
using BFloat16 = c10::BFloat16;

inline float widen(Half v) { return v; }
inline float widen(BFloat16 v) { return v; }
template <typename T>
T narrow_to(float v) {
  return static_cast<T>(v);
}

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline void block_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::rendezvous(emulator::kBlock, {file, line});
}

inline void pair_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::rendezvous(emulator::kPair, {file, line});
}

template <typename T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulator::current->shared);
}

using std::max;
using std::min;

inline void cluster_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::rendezvous(emulator::kCluster, {file, line});
}

template <int kBlocks>
void group_barrier(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulator::rendezvous(kBlocks == 1 ? emulator::kBlock : emulator::kCluster, {file, line});
}

template <typename V>
V* in_block_of_cluster(V* place, unsigned rank) {
  return static_cast<V*>(emulator::in_block_of_cluster(place, rank));
}

inline size_t shared_memory_limit() { return emulator::device.shared_bytes; }

template <typename Kernel>
bool clusters_fit(Kernel, unsigned blocks, unsigned, size_t) {
  return blocks <= emulator::device.cluster_blocks;
}

template <typename Kernel>
unsigned blocks_at_once(Kernel, unsigned, size_t) {
  return emulator::device.blocks;
}

template <typename... Params, typename... Args>
void launch_clusters(void (*kernel)(Params...), dim3 grid, unsigned blocks, unsigned threads,
                     size_t shared_bytes, void*, Args... args) {
  const emulator::Index size{grid.x, grid.y, grid.z};
  if (emulator::recorded(reinterpret_cast<const void*>(kernel), size, blocks, threads, shared_bytes)) return;
  const std::tuple<Params...> params(static_cast<Params>(args)...);
  emulator::run(size, blocks, false, threads, shared_bytes, [&] { std::apply(kernel, params); });
}

template <typename... Params, typename... Args>
void launch_together(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, void*,
                     Args... args) {
  const emulator::Index size{grid.x, grid.y, grid.z};
  if (emulator::recorded(reinterpret_cast<const void*>(kernel), size, 1, threads, shared_bytes)) return;
  const std::tuple<Params...> params(static_cast<Params>(args)...);
  emulator::run(size, 1, true, threads, shared_bytes, [&] { std::apply(kernel, params); });
}

template <typename P, typename T>
P* pack_at(T* first) {
  emulator::check_alignment(first, alignof(P));
  return reinterpret_cast<P*>(first);
}

}  // namespace cnnrnn::cuda

#endif  // ---- both ----

namespace cnnrnn::cuda {

__host__ __device__ __forceinline__ float widen(float v) { return v; }
__host__ __device__ __forceinline__ double widen(double v) { return v; }
template <typename T>
__host__ __device__ __forceinline__ T narrow_to(double v) {
  return static_cast<T>(v);
}

// What sums of T are kept in.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// A few scalars that move as one aligned load or store, or as few as their bytes allow.
template <typename T, int kCount>
constexpr size_t kPackAlignment = std::min<size_t>(16, sizeof(T) * kCount & ~(sizeof(T) * kCount - 1));
template <typename T, int kCount>
struct alignas(kPackAlignment<T, kCount>) Pack {
  T v[kCount];
};

template <typename T>
__host__ __device__ __forceinline__ T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

// Enqueues kernel(args...) on `stream` and returns at once.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, unsigned threads, size_t shared_bytes, void* stream,
            Args... args) {
  launch_clusters(kernel, grid, 1, threads, shared_bytes, stream, args...);
}

// Blocks in a grid's first dimension, the only one without a limit of 65535.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::runtime_error("too large for one kernel launch");
  return static_cast<unsigned>(blocks);
}

// Calls function(T{}) with the C++ type of dtype.
template <typename Function>
void with_type(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat:
      return function(float{});
    case DType::kDouble:
      return function(double{});
    case DType::kHalf:
      return function(Half{});
    case DType::kBFloat16:
      return function(BFloat16{});
  }
}

}  // namespace cnnrnn::cuda
