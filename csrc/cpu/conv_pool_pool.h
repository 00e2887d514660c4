// The max pool of the conv_pool kernels, in registers or through a map in cache.
//
// Activations that never fall (all but gelu and silu) are applied to the winner alone: it is the same one.
// Two positions that differ before such an activation may tie after it, where it is flat in float32 (relu6
// from 6 on, sigmoid and tanh saturated, elu below -17); torch then takes the first and this the larger one.
// The derivative there is nought or less than the rounding of 1, so no gradient tells them apart. Where the
// activation falls somewhere, the positions compete by their activated values (s.keyed).
#pragma once

#include "conv_pool_common.h"

namespace {

constexpr int kPixels = kVectorRegisters == 32 ? 12 : 4;  // convolution outputs of a tile in registers

template <typename T>
using Code = typename Simd<T>::I;

template <typename T>
CNNRNN_INLINE Code<T> code_of(int64_t position) {
  return Code<T>{} + static_cast<decltype(Code<T>{}[0] + 0)>(position);
}

// torch's rule: a later value wins if greater, or if it is NaN.
template <typename T>
CNNRNN_INLINE Code<T> compete(Vec<T> value, Code<T> position, Vec<T>& best, Code<T>& code) {
  const Code<T> wins = (value > best) | (value != value);
  best = wins ? value : best;
  code = wins ? position : code;
  return wins;
}

// ReLU of the pooled value (max and ReLU commute) and the codes of windows that pass no gradient.
template <typename T, bool kCodes>
CNNRNN_INLINE void finish(bool relu, Vec<T> best, Code<T> code, T* y, T* codes) {
  if (relu) {
    const Code<T> dead = best <= Vec<T>{};
    best = dead ? Vec<T>{} : best;
    code = dead ? code_of<T>(kDead) : code;
  }
  storeu(y, best);
  if constexpr (kCodes) storeu(codes, reinterpret_cast<Vec<T>>(code));
}

// One tile made of whole windows of Q positions: the pool is between registers. Inference needs no codes.
template <typename T, int V, int Q, bool kCodes>
CNNRNN_INLINE void pool_in_registers(bool relu, const Vec<T> (&acc)[kPixels][V], T* y, T* codes) {
  constexpr int L = kLanesOf<T>;
#pragma GCC unroll 16
  for (int window = 0; window < kPixels / Q; ++window) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Vec<T> best = acc[window * Q][v];
      Code<T> code{};
#pragma GCC unroll 4
      for (int q = 1; q < Q; ++q) compete<T>(acc[window * Q + q][v], code_of<T>(q), best, code);
      finish<T, kCodes>(relu, best, code, y + (window * V + v) * L, codes + (window * V + v) * L);
    }
  }
}

// A run of pooled rows of one image, and the part of the map before the pool that they come from.
struct Strip {
  int64_t image;
  int64_t first;      // row of the map
  int64_t row, rows;  // pooled
  int64_t pitch;      // pixels from one row of the map to the next
};

// Pools the map [rows of the map, pitch, V * L] of a strip. kKeyed: the positions compete by what stands in
// `keys` at their place, and the winner's value is the map's.
template <typename T, int V, bool kKeyed>
void pool_map(const ConvPoolShape& s, const Strip& strip, const T* map, const T* keys, T* y, T* codes) {
  constexpr int L = kLanesOf<T>;
  for (int64_t py = strip.row; py < strip.row + strip.rows; ++py) {
    for (int64_t px = 0; px < s.pooled.w; ++px) {
      const int64_t y0 = py * s.step.h - s.margin.h, x0 = px * s.step.w - s.margin.w;
      const int64_t top = larger(y0, 0), bottom = smaller(y0 + s.window.h, s.conv.h);
      const int64_t left = larger(x0, 0), right = smaller(x0 + s.window.w, s.conv.w);
      for (int v = 0; v < V; ++v, y += L, codes += L) {
        const auto place = [&](int64_t cy, int64_t cx) {
          return ((cy - strip.first) * strip.pitch + cx) * V * L + v * L;
        };
        const T* const competing = kKeyed ? keys : map;
        Vec<T> best = loadu(competing + place(top, left)), value = loadu(map + place(top, left));
        Code<T> code = code_of<T>((top - y0) * s.window.w + left - x0);
        const bool of_two = s.window.h == 2 && s.window.w == 2 && bottom - top == 2 && right - left == 2;
        if (!kKeyed && of_two) {  // the usual one, unrolled
#pragma GCC unroll 4
          for (int q = 1; q < 4; ++q)
            compete<T>(loadu(map + place(top + q / 2, left + q % 2)), code_of<T>(q), best, code);
        } else {
          for (int64_t cy = top; cy < bottom; ++cy) {
            for (int64_t cx = left; cx < right; ++cx) {
              const Code<T> wins = compete<T>(loadu(competing + place(cy, cx)),
                                              code_of<T>((cy - y0) * s.window.w + cx - x0), best, code);
              if constexpr (kKeyed) value = wins ? loadu(map + place(cy, cx)) : value;
            }
          }
        }
        finish<T, true>(s.relu, kKeyed ? value : best, code, y, codes);
      }
    }
  }
}

}  // namespace
