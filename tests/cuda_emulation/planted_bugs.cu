// Kernels with a bug each, and their sound twins: the emulator must report the first and pass the second.

#include "primitives_mma.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr unsigned kThreads = 96;

// Thread i reads what its neighbour wrote.
__global__ void rotate(int* data, bool barrier) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = data[blockIdx.x * kThreads + threadIdx.x];
  if (barrier) block_barrier();
  data[blockIdx.x * kThreads + threadIdx.x] = shared[(threadIdx.x + 1) % kThreads];
}

// A state kept once and not twice: without the second barrier a fast warp overwrites what a slow one reads.
__global__ void recur(int* data, bool both_barriers) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = data[threadIdx.x];
  block_barrier();
  for (int step = 0; step < 3; ++step) {
    const int next = shared[(threadIdx.x + 33) % kThreads] + 1;
    if (both_barriers) block_barrier();
    shared[threadIdx.x] = next;
    block_barrier();
  }
  data[threadIdx.x] = shared[threadIdx.x];
}

__global__ void half_a_block_waits(int*, bool sound) {
  if (sound || threadIdx.x < kThreads / 2) block_barrier();
}

__global__ void two_barriers(int*, bool sound) {
  if (sound || threadIdx.x % 2 == 0) {
    block_barrier();
  } else {
    block_barrier();
  }
}

__global__ void past_the_end(int* data, bool sound) {
  data[blockIdx.x * kThreads + threadIdx.x + (sound ? 0 : 1)] = 1;
}

__global__ void past_shared(int* data, bool sound) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = 1;
  if (!sound && threadIdx.x == kThreads - 1) shared[kThreads] = 1;
  data[threadIdx.x] = shared[threadIdx.x];
}

__global__ void never_written(int* data, bool sound) {
  int* shared = shared_memory<int>();
  if (sound || threadIdx.x != 5) shared[threadIdx.x] = 1;
  data[threadIdx.x] = shared[threadIdx.x];
}

// Two blocks add to one cell without an atomic.
__global__ void blocks_collide(int* data, bool sound) {
  if (threadIdx.x == 0) data[sound ? blockIdx.x : 0] += 1;
}

// Each of two blocks reads what the other left in its shared memory.
__device__ void swap_in_cluster(int* data, bool first_barrier, bool last_barrier) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = data[blockIdx.x * kThreads + threadIdx.x];
  if (first_barrier) cluster_barrier();
  data[blockIdx.x * kThreads + threadIdx.x] = *in_block_of_cluster(shared + threadIdx.x, 1 - blockIdx.x);
  if (last_barrier) cluster_barrier();
}

__global__ void cluster_swaps_early(int* data, bool sound) { swap_in_cluster(data, sound, true); }

__global__ void cluster_returns_early(int* data, bool sound) { swap_in_cluster(data, true, sound); }

__global__ void misaligned(int* data, bool sound) {
  if (threadIdx.x == 0) data[0] = pack_at<Pack<int, 4>>(data + (sound ? 4 : 1))->v[0];
}

// Copies that nobody waited for.
__global__ void read_in_flight(int* data, bool sound) {
  int* shared = shared_memory<int>();
  if (threadIdx.x % 4 == 0) async_copy(shared + threadIdx.x, data + threadIdx.x, true);
  async_commit();
  if (sound) async_wait<0>();
  block_barrier();
  data[threadIdx.x] = shared[threadIdx.x];
}

// A copy into a place that others may still be reading.
__global__ void overwrite_in_flight(int* data, bool sound) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = data[threadIdx.x];
  block_barrier();
  data[threadIdx.x] = shared[(threadIdx.x + 32) % kThreads];
  if (sound) block_barrier();
  if (threadIdx.x % 4 == 0) async_copy(shared + threadIdx.x, data, false);
  async_commit();
  async_wait<0>();
}

// A warp's instruction is no barrier: what another lane wrote before it is not yet seen.
__global__ void mma_orders_nothing(int* data, bool sound) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = data[threadIdx.x];
  if (sound) block_barrier();
  float d[4] = {};
  mma<Half>(d, {0, 0, 0, 0}, {0, 0});
  data[threadIdx.x] = shared[threadIdx.x ^ 1];
}

std::string report;

}  // namespace
}  // namespace cnnrnn::cuda

// Runs kernel `which` on data [2 * 96]; returns its report, "" if there was none.
extern "C" __attribute__((visibility("default"))) const char* run_planted(int which, int* data, bool sound) {
  using namespace cnnrnn::cuda;
  struct Case {
    void (*kernel)(int*, bool);
    unsigned blocks, cluster;
  };
  const Case cases[] = {{rotate, 2, 1},
                        {recur, 1, 1},
                        {half_a_block_waits, 1, 1},
                        {two_barriers, 1, 1},
                        {past_the_end, 2, 1},
                        {past_shared, 1, 1},
                        {never_written, 1, 1},
                        {blocks_collide, 2, 1},
                        {cluster_swaps_early, 2, 2},
                        {cluster_returns_early, 2, 2},
                        {misaligned, 1, 1},
                        {read_in_flight, 1, 1},
                        {overwrite_in_flight, 1, 1},
                        {mma_orders_nothing, 1, 1}};
  const Case& planted = cases[which];
  report.clear();
  emulator::announce_memory(data, 2 * kThreads * sizeof(int), sizeof(int));
  try {
    launch_clusters(planted.kernel, dim3(planted.blocks), planted.cluster, kThreads, kThreads * sizeof(int),
                    nullptr, data, sound);
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::forget_memory();
  return report.c_str();
}
