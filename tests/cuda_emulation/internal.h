// What the scheduler and the memory checks of the emulation tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator.h"

namespace emulator {

// When an access happened. Barriers of this library nest (a block's barrier is also one of its warps, a
// cluster's one of its blocks), so counting those passed at each scope decides exactly whether two accesses
// are ordered.
struct Epoch {
  uint32_t launch = 0, cluster = 0, block = 0, thread = 0;
  uint32_t phase[kScopes] = {0, 0, 0};

  bool ordered_before(const Epoch& later) const {
    if (launch != later.launch) return true;
    if (cluster != later.cluster) return false;
    if (phase[kCluster] < later.phase[kCluster]) return true;
    if (block != later.block) return false;
    if (thread == later.thread || phase[kBlock] < later.phase[kBlock]) return true;
    return thread / 32 == later.thread / 32 && phase[kWarp] < later.phase[kWarp];
  }
};

const Epoch& current_epoch();

// Records a violation and ends the launch; the calling fiber never runs again.
void fail(const std::string& message);

// The checks of an access by the calling fiber that the compiler does not see. A write that has begun leaves
// its place as if never written.
void check_read(const void* place, size_t bytes);
void check_write(const void* place, size_t bytes);
void check_write_begun(const void* place, size_t bytes);

// Where the fibers' own threadIdx, blockIdx, ... are.
void set_fibers(const void* begin, size_t bytes);
void set_stack(const void* begin, size_t bytes);
// Shared memory of the running cluster: block `rank`, number `block` of the grid, has [begin + rank * stride,
// + bytes).
void set_shared(const void* begin, size_t bytes, size_t stride, uint32_t first_block, uint32_t blocks);

// Whether a block of the running cluster has begun, and has returned.
bool has_begun(uint32_t rank);
bool has_returned(uint32_t rank);
// The arguments of a launch lie on the host's stack, between this frame and the stack's end.
void set_launch_frame(const void* frame);

}  // namespace emulator
