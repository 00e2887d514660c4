// The host side of primitives.cuh: CUDA kernels compiled as C++ and run on the CPU.
//
// One fiber per CUDA thread; a collective is a rendezvous; the blocks of a cluster run together, clusters one
// after the other. The order is adversarial: a block and a warp of it, drawn at random, run until stuck.
// Every load and store of the kernels (the compiler's -fsanitize=thread calls, answered by memory_checks.cpp
// instead of libtsan) is checked for
//   races           two accesses to a cell (an element, at most 4 bytes; of shared memory 2), one a write,
//                   of which neither happens before the other: lanes of a warp are ordered by barriers alone,
//                   warps also by what one released (a push, a signal) and the other waited for
//   bounds          only tensors that were announced, the cluster's shared memory and the thread's stack
//   uninitialised   shared memory read before any thread wrote it (it is also filled with 0xFF, a NaN)
//   lifetime        another block's shared memory before it has begun or after it has returned
//   alignment       of the wide accesses that go through pack_at()
// Asynchronous copies land as late as they may, and matrix instructions of a warp order nothing.
// Barriers are checked for deadlock, early exit and divergence (threads of one group at different barriers).
// Not modelled: warps in lockstep (more orders are tried than a GPU has), resource limits, memory fences
// weaker than a barrier, approximate instructions, the order of sums within a matrix instruction, timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum Scope { kWarp, kPair, kBlock, kCluster };  // a pair: warps 2 * i and 2 * i + 1 of a block

// What a kernel may ask about itself.
struct Fiber {
  Index thread, block;
  unsigned char* shared;
};

extern Fiber* current;

// The device that launchers believe to be on.
struct Device {
  size_t shared_bytes;
  unsigned cluster_blocks;  // the largest cluster, 0 if there are none
  unsigned blocks;          // that run at once
};

extern Device device;
extern Index grid_size, block_size;

struct Site {  // the place of a collective in the source
  const char* file;
  int line;
};

// All threads of the scope meet here.
void rendezvous(Scope scope, Site site);

// ---- the asynchronous barriers and flags of primitives_async.cuh ----
void arrivals_init(void* barrier, unsigned arrivals);
void arrivals_expect(void* barrier, unsigned bytes);  // also arrives
void arrivals_wait(void* barrier, unsigned parity, Site site);
void push(void* place, const void* value, size_t bytes, void* barrier);  // in any block of the cluster
void signal(unsigned* flag);
void signals_wait(const unsigned* flag, unsigned count, Site site);

// A warp's instruction: when all lanes are here, `action` gets what each of them passed, in lane order, and
// may write to it. Orders no memory accesses.
void exchange(Site site, void* operand, void (*action)(void* const* operands));

uint32_t shuffle(Site site, uint32_t value, unsigned lane);

// cp.async. The bytes land only when waited for; until then the place holds NaN and counts as never written.
void async_copy(void* to, const void* from, size_t bytes, bool zeros);
void async_commit();
void async_wait(int groups_left);  // all but the last so many committed groups have landed

// Matrix instructions, in tensor_cores.cpp. Operands in registers as the PTX manual lays them out.
enum class Element { kHalf, kBFloat16, kTf32 };
void mma(Site site, Element element, float* d, const uint32_t* a, const uint32_t* b);
void mma_sparse(Site site, Element element, float* d, const uint32_t* a, const uint32_t* b,
                uint32_t metadata);
void load_matrices(Site site, uint32_t* registers, const void* row, bool transposed);

// Tells the bounds check that kernels may touch [data, data + bytes), whose elements have `element` bytes.
// forget_memory() ends all of them.
void announce_memory(const void* data, size_t bytes, size_t element);
void forget_memory();

// The place of another block's shared memory that `place` is of this block's.
void* in_block_of_cluster(void* place, unsigned rank);

// Reports an address that is not a multiple of `alignment`.
void check_alignment(const void* address, size_t alignment);

// Runs body once for every thread of the grid, whose first dimension is cut into clusters of so many blocks.
// `together`: all blocks run at once, as in a cooperative launch. Throws std::runtime_error with the first
// violation.
void run(Index grid, unsigned cluster_blocks, bool together, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body);

// Puts a launch down if launches are to be recorded, which then are not run: see launches.cpp.
bool recorded(const void* kernel, Index grid, unsigned cluster_blocks, unsigned threads, size_t shared_bytes);

}  // namespace emulator
