// The gradient of the map from (grad_y, code): that of each window at its winner, 0 elsewhere. For dense
// kernels; the sparse ones never make the map.
#pragma once

#include "conv_pool_common.h"

namespace {

// Codes of up to kLanes outputs.
CNNRNN_INLINE vi load_codes(const uint8_t* p, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes bytes{};
  if (n >= kLanes)
    __builtin_memcpy(&bytes, p, kLanes);
  else
    for (int64_t i = 0; i < n; ++i) bytes[i] = p[i];
  return __builtin_convertvector(bytes, vi);
}

// Windows side by side and unpadded, at most two wide. Rows [begin, end) of the map: of planes, or of whole
// images if channels are last.
inline void unpool(const ConvPoolShape& s, const float* grad_y, const uint8_t* code, float* grad_map,
                   int64_t begin, int64_t end) {
  const int64_t unit = s.channels_last ? s.outputs : 1, row_size = s.conv.w * unit;
  const int64_t total = s.batch * s.outputs * s.windows();
  // What is read beyond the outputs asked for is not stored.
  const auto winners = [&](int64_t at, int64_t position) {
    const int64_t n = smaller(total - at, kLanes);
    const vf grad = n < kLanes ? load_n(grad_y + at, n) : loadu(grad_y + at);
    return load_codes(code + at, n) == static_cast<int32_t>(position) ? grad : vf{};
  };
  if (s.positions() == 1) {  // no pool: the rows are one stretch
    for (int64_t i = begin * row_size; i < end * row_size; i += kLanes)
      store_n(grad_map + i, winners(i, 0), end * row_size - i);
    return;
  }
  for (int64_t at = begin; at < end; ++at) {
    float* const row = grad_map + at * row_size;
    const int64_t cy = at % s.conv.h, py = cy / s.window.h, first = cy % s.window.h * s.window.w;
    const int64_t covered = py < s.pooled.h ? smaller(s.pooled.w * s.window.w, s.conv.w) : 0;
    __builtin_memset(row + covered * unit, 0, (s.conv.w - covered) * unit * sizeof(float));
    const int64_t from = (at / s.conv.h * s.pooled.h + py) * s.pooled.w * unit;
    if (unit > 1 || s.window.w == 1) {  // stretches of one position
      const int64_t stretch = unit > 1 ? unit : covered;
      for (int64_t x = 0; x < covered; x += unit > 1 ? 1 : covered)
        for (int64_t i = 0; i < stretch; i += kLanes)
          store_n(row + x * unit + i, winners(from + x / s.window.w * unit + i, first + x % s.window.w),
                  stretch - i);
      continue;
    }
    for (int64_t x = 0; x < covered; x += 2 * kLanes) {
      const int64_t left = covered - x;
      const vf even = winners(from + x / 2, first), odd = winners(from + x / 2, first + 1);
      store_n(row + x, interleave<float, 0>(even, odd), left);
      if (left > kLanes) store_n(row + x + kLanes, interleave<float, kLanes / 2>(even, odd), left - kLanes);
    }
  }
}

}  // namespace
