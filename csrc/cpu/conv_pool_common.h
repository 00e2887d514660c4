// What the conv_pool kernels share: names, integer arithmetic, scratch memory.
#pragma once

#include "conv_pool.h"
#include "simd.h"

namespace {

using cnnrnn::ConvPoolShape;
using cnnrnn::kDead;
using cnnrnn::Pair;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// A part of a scratch area; parts begin at cache lines.
template <typename T>
T* carve(char*& scratch, int64_t count) {
  T* part = reinterpret_cast<T*>(scratch);
  scratch += round_up(count * sizeof(T), 64);
  return part;
}
inline int64_t carved_bytes(int64_t count, int64_t size) { return round_up(count * size, 64); }

// Whether all of it is 0. Sums of values times 0 tell so whether the values are finite.
CNNRNN_INLINE bool is_zero(vf v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, vf{}, _CMP_NEQ_UQ) == 0;
#else
  for (int l = 0; l < kLanes; ++l)
    if (v[l] != 0) return false;
  return true;
#endif
}

}  // namespace
