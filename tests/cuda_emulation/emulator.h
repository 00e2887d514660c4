// The host side of primitives.cuh: CUDA kernels compiled as C++ and run on the CPU.
//
// One fiber per CUDA thread; a collective is a rendezvous. The order is adversarial: a warp drawn at random
// runs until it is stuck. Every load and store of the kernels (the compiler's -fsanitize=thread calls,
// answered by emulator.cpp instead of libtsan) is checked for
//   races           two accesses to a cell (an element, at most 4 bytes), one a write, with no barrier of a
//                   common scope between them
//   bounds          only tensors that were announced, the block's own shared memory and the thread's stack
//   uninitialised   shared memory read before any thread wrote it (it is also filled with 0xFF, a NaN)
// and barriers for deadlock, early exit and divergence (threads of one block at different barriers).
// Not modelled: warps in lockstep (more orders are tried than a GPU has), alignment, resource limits,
// approximate instructions, timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <tuple>

namespace emulator {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

enum Scope { kWarp = 0, kBlock = 1, kScopes = 2 };

// What a kernel may ask about itself.
struct Fiber {
  Index thread, block;
  unsigned char* shared;
};

extern Fiber* current;
extern Index grid_size, block_size;

struct Site {  // the place of a collective in the source
  const char* file;
  int line;
};

// All threads of the scope meet here.
void rendezvous(Scope scope, Site site);

// Tells the bounds check that kernels may touch [data, data + bytes), whose elements have `element` bytes.
// forget_memory() ends all of them.
void announce_memory(const void* data, size_t bytes, size_t element);
void forget_memory();

// Runs body once for every thread of the grid. Throws std::runtime_error with the first violation.
void run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body);

}  // namespace emulator
