// One parallel region over equal slices of work, each with scratch memory of its own.
#pragma once

#include "tensor.h"

namespace cnnrnn {

inline char* aligned(void* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

// Cuts `units` into one contiguous slice per thread and runs body(slice, begin, end, scratch). The cut
// depends on the thread count alone, so results repeat bit by bit.
template <typename Body>
void in_slices(const Tensor& like, int64_t units, int64_t scratch_bytes, const Body& body) {
  const int64_t slices = std::min<int64_t>(units, torch::stable::get_num_threads());
  if (slices == 0) return;
  // Slices begin at cache lines, so that none writes to a line of another.
  const int64_t stride = (scratch_bytes + 63) / 64 * 64;
  Tensor memory = empty_like_of(like, {slices * stride + 64}, ScalarType::Byte);
  char* scratch = aligned(memory.mutable_data_ptr());
  torch::stable::parallel_for(0, slices, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i)
      body(i, units * i / slices, units * (i + 1) / slices, scratch + i * stride);
  });
}

}  // namespace cnnrnn
