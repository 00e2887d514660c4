// Kernels with a bug each, and their sound twins: the emulator must report the first and pass the second.

#include "primitives_async.cuh"
#include "primitives_mma.cuh"
#include "primitives_tiles.cuh"

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

// Warp 0 and warp 1 swap, as a pair.
__global__ void pair_swaps(int* data, bool sound) {
  int* shared = shared_memory<int>();
  if (threadIdx.x >= 64) return;
  shared[threadIdx.x] = data[threadIdx.x];
  if (sound) pair_barrier();
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

// Each of two blocks pushes 16 bytes to the other, whose every thread reads them.
__device__ void push_to_other(int* data, unsigned expected, bool wait) {
  auto* barrier = shared_memory<Arrivals>();
  auto* got = pack_at<Words4>(barrier + 2);
  if (threadIdx.x == 0) {
    arrivals_init(barrier, 1);
    arrivals_expect(barrier, expected);
  }
  cluster_barrier();
  if (threadIdx.x == 40) push(got, Words4{{1, 2, 3, 4}}, barrier, 1 - blockIdx.x);
  if (wait) arrivals_wait(barrier, 0);
  data[blockIdx.x * kThreads + threadIdx.x] = got->v[threadIdx.x % 4];
  cluster_barrier();
}

__global__ void push_is_not_awaited(int* data, bool sound) { push_to_other(data, 16, sound); }

__global__ void push_is_miscounted(int* data, bool sound) { push_to_other(data, sound ? 16 : 32, true); }

// Block 1 reads what all threads of block 0 wrote. The last cell is the flag.
__device__ void tell_by_flag(int* data, bool barrier, bool wait) {
  auto* flag = reinterpret_cast<unsigned*>(data + 2 * kThreads - 1);
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 7;
    if (barrier) block_barrier();
    if (threadIdx.x == 0) signal(flag);
  } else if (threadIdx.x < kThreads - 1) {
    if (wait) signals_wait(flag, 1);
    data[kThreads + threadIdx.x] = data[threadIdx.x];
  }
}

__global__ void flag_too_early(int* data, bool sound) { tell_by_flag(data, sound, true); }

__global__ void flag_is_not_awaited(int* data, bool sound) { tell_by_flag(data, true, sound); }

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
  mma<Half>(d, 0, 0, 0, 0, 0, 0);
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
    bool together = false;
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
                        {mma_orders_nothing, 1, 1},
                        {pair_swaps, 1, 1},
                        {push_is_not_awaited, 2, 2},
                        {push_is_miscounted, 2, 2},
                        {flag_too_early, 2, 1, true},
                        {flag_is_not_awaited, 2, 1, true}};
  const Case& planted = cases[which];
  report.clear();
  emulator::announce_memory(data, 2 * kThreads * sizeof(int), sizeof(int));
  try {
    if (planted.together)
      launch_together(planted.kernel, dim3(planted.blocks), kThreads, kThreads * sizeof(int), nullptr, data,
                      sound);
    else
      launch_clusters(planted.kernel, dim3(planted.blocks), planted.cluster, kThreads, kThreads * sizeof(int),
                      nullptr, data, sound);
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::forget_memory();
  return report.c_str();
}
