// What the scheduler and the memory checks of the emulation tell each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

// When an access happened. Warps have vector clocks: `clock` is the own time of the warp at the access.
// Within a warp, barriers passed are counted.
struct Epoch {
  uint32_t launch = 0, gang = 0, block = 0, thread = 0;
  uint32_t warp = 0;  // among those of the gang, the blocks that run together
  uint32_t clock = 0, barriers = 0;
};

Epoch current_epoch();
bool happened_before_now(const Epoch& earlier);  // this moment being the running thread's

// The times that a warp, or an object that is waited for, knows to be over: of each warp of the gang, and
// behind them of what each warp has pushed, which is not ordered with what the warp itself does.
using Clock = std::vector<uint32_t>;
void join(Clock& into, const Clock& from);
void release(Clock& to);          // what the running warp has done is over for whoever acquires `to`
void acquire(const Clock& from);  // by the running warp

// Writes, checked, and joins the write's time into `to`.
void write_by_push(void* place, const void* value, size_t bytes, Clock& to);
// Waits until done() for an object that others change, and then wake().
void wait_until(const void* object, Site place, const std::function<bool()>& done);
void wake(const void* object);
// Whether the collective at this place is to do nothing.
bool is_dropped(Site place);
void forget_objects();  // the barriers and flags of the last gang
void forget_copies();   // those that its threads have begun

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
