// What the scheduler and the memory checks of the emulation tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "emulator.h"

namespace emulator {

// When an access happened. Barriers of this library nest (a block's barrier is one of each of its warps
// too), so counting those passed at each scope decides exactly whether two accesses are ordered.
struct Epoch {
  uint32_t launch = 0, block = 0, thread = 0;
  uint32_t phase[kScopes] = {0, 0};

  bool ordered_before(const Epoch& later) const {
    if (launch != later.launch) return true;
    if (block != later.block) return false;
    if (thread == later.thread || phase[kBlock] < later.phase[kBlock]) return true;
    return thread / 32 == later.thread / 32 && phase[kWarp] < later.phase[kWarp];
  }
};

const Epoch& current_epoch();

// Records a violation and ends the launch; the calling fiber never runs again.
void fail(const std::string& message);

// Where the fibers' own threadIdx, blockIdx, ... are.
void set_fibers(const void* begin, size_t bytes);
void set_stack(const void* begin, size_t bytes);
void set_shared(const void* begin, size_t bytes);
// The arguments of a launch lie on the host's stack, between this frame and the stack's end.
void set_launch_frame(const void* frame);

}  // namespace emulator
