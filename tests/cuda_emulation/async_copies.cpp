// cp.async: copies that land as late as they may.

#include <array>
#include <cstring>
#include <map>
#include <vector>

#include "internal.h"

namespace emulator {
namespace {

// A copy that has not landed: what it will write.
struct PendingCopy {
  unsigned char* to;
  std::array<unsigned char, 16> data;
  size_t bytes;
  int group;  // committed with the copies of this number
};

struct Copies {
  std::vector<PendingCopy> pending;
  int groups = 0;  // committed so far
};

std::map<const Fiber*, Copies> copies;

}  // namespace

void forget_copies() { copies.clear(); }

void async_copy(void* to, const void* from, size_t bytes, bool zeros) {
  Copies& own = copies[current];
  PendingCopy copy{static_cast<unsigned char*>(to), {}, bytes, own.groups};
  check_alignment(to, bytes);
  if (!zeros) {
    check_alignment(from, bytes);
    check_read(from, bytes);
    std::memcpy(copy.data.data(), from, bytes);
  }
  check_write_begun(to, bytes);
  std::memset(to, 0xFF, bytes);
  own.pending.push_back(copy);
}

void async_commit() { ++copies[current].groups; }

void async_wait(int groups_left) {
  Copies& own = copies[current];
  std::vector<PendingCopy> left;
  for (const PendingCopy& copy : own.pending) {
    if (copy.group >= own.groups - groups_left) {
      left.push_back(copy);
      continue;
    }
    check_write(copy.to, copy.bytes);
    std::memcpy(copy.to, copy.data.data(), copy.bytes);
  }
  own.pending = left;
}

}  // namespace emulator
