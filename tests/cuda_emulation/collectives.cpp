// Asynchronous barriers, flags, and the collectives of a warp.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>
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

// Element `index` of a register of two halves, or of one float.
float element_of(Element element, uint32_t bits, unsigned index) {
  if (element == Element::kTf32) {
    bits &= ~uint32_t{0x1fff};  // the unit ignores these
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  const auto half = static_cast<uint16_t>(bits >> (16 * index));
  return element == Element::kHalf ? float(c10::Half(half, c10::Half::from_bits()))
                                   : float(c10::BFloat16(half, c10::BFloat16::from_bits()));
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

uint32_t shuffle(uint32_t value, unsigned lane) {
  uint32_t got = 0;
  with_registers(&value, nullptr, "shuffle", [&] { got = *registers_of(lane, 0); });
  return got;
}

// a: rows g and g + 8, where g = lane / 4, q = lane % 4: registers 0 and 1 hold the columns that start at q,
// registers 2 and 3 those at q + 4, counted in registers. b: column g, the rows likewise. Accumulators: rows
// g and g + 8, columns 2 * q and 2 * q + 1.
void mma(Element element, float* accumulators, const uint32_t* a, const uint32_t* b) {
  const unsigned g = own_lane() / 4, q = own_lane() % 4, each = element == Element::kTf32 ? 1 : 2;
  with_registers(a, b, "mma", [&] {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned column = 2 * q + i % 2;
      for (unsigned k = 0; k < 8 * each; ++k) {
        const unsigned at = k / each % 4, high = k / each / 4;  // lane within four, register
        const uint32_t row = registers_of(4 * g + at, 0)[i / 2 + 2 * high];
        const uint32_t col = registers_of(4 * column + at, 1)[high];
        accumulators[i] += element_of(element, row, k % each) * element_of(element, col, k % each);
      }
    }
  });
}

}  // namespace emulator
