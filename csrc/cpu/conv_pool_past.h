// Stores that pass the caches. An ordinary store first reads the line that it writes to; of a tensor that no
// cache can keep, that read is half of the traffic.
//
// Such stores are ordered by no later one: whoever hands the tensor on to another thread must have called
// stores_past_done.
#pragma once

#include "conv_pool_common.h"

namespace {

// Whether a tensor of so many values is written that way.
template <typename T>
bool passes_cache(int64_t count) {
  constexpr int64_t kMostBytes = 16 << 20;
  return count * static_cast<int64_t>(sizeof(T)) > kMostBytes;
}

// Whether v was stored: n values at `to` are a whole line.
template <typename T, typename V>
CNNRNN_INLINE bool store_past([[maybe_unused]] T* to, [[maybe_unused]] V v, [[maybe_unused]] int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4 && sizeof(V) == 64)
    if (n >= kLanes && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      _mm512_stream_ps(to, v);
      return true;
    }
#endif
  return false;
}

CNNRNN_INLINE void stores_past_done() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace
