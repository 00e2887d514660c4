// Asynchronous barriers, flags and shuffles.

#include <map>

#include "internal.h"

namespace emulator {
namespace {

// An asynchronous barrier.
struct Arrivals {
  unsigned expected = 0, pending = 0, phase = 0;
  int64_t bytes = 0;     // announced, and not yet arrived
  Clock now, completed;  // of the phase that runs, of those that are over
};

std::map<const void*, Arrivals> arrivals;
std::map<const void*, Clock> flags;  // counters in global memory

Arrivals& arrivals_at(const void* barrier) {
  const auto found = arrivals.find(barrier);
  if (found == arrivals.end()) fail("an asynchronous barrier that nobody initialised");
  return found->second;
}

void complete_if_all_arrived(const void* barrier, Arrivals& a) {
  if (a.pending > 0 || a.bytes != 0) return;
  join(a.completed, a.now);
  a.pending = a.expected;
  ++a.phase;
  wake(barrier);
}

}  // namespace

void forget_objects() {
  arrivals.clear();
  flags.clear();
}

void arrivals_init(void* barrier, unsigned count) {
  Arrivals a;
  a.expected = a.pending = count;
  arrivals[barrier] = a;
}

void arrivals_expect(void* barrier, unsigned bytes) {
  Arrivals& a = arrivals_at(barrier);
  if (a.pending == 0) fail("more arrivals at an asynchronous barrier than it expects");
  a.bytes += bytes;
  --a.pending;
  release(a.now);
  complete_if_all_arrived(barrier, a);
}

void arrivals_wait(void* barrier, unsigned parity, Site place) {
  if (is_dropped(place)) return;
  wait_until(barrier, place, [&] { return arrivals_at(barrier).phase % 2 != parity; });
  acquire(arrivals_at(barrier).completed);
}

void push(void* place, const void* value, size_t bytes, void* barrier) {
  Arrivals& a = arrivals_at(barrier);
  write_by_push(place, value, bytes, a.now);
  a.bytes -= bytes;
  release(a.now);
  complete_if_all_arrived(barrier, a);
}

void signal(unsigned* flag) {
  ++*flag;
  release(flags[flag]);
  wake(flag);
}

void signals_wait(const unsigned* flag, unsigned count, Site place) {
  if (is_dropped(place)) return;
  wait_until(flag, place, [&] { return *flag >= count; });
  acquire(flags[flag]);
}

uint32_t shuffle(Site site, uint32_t value, unsigned lane) {
  struct Operand {
    uint32_t value, got;
    unsigned lane;
  } operand{value, 0, lane};
  exchange(site, &operand, [](void* const* operands) {
    for (int i = 0; i < 32; ++i) {
      auto& mine = *static_cast<Operand*>(operands[i]);
      mine.got = static_cast<const Operand*>(operands[mine.lane])->value;
    }
  });
  return operand.got;
}

}  // namespace emulator
