// Average pooling of the map that a convolution without a pool leaves, and the gradient of that map.
//
// Both go row by row; a row is W pixels of `unit` numbers: of one channel of an NCHW plane, or of all
// channels of an NHWC image. The divisor is torch's, which counts the pool's padding and no more (ceil_mode
// may let a window hang further over).
#pragma once

#include "activations.h"

namespace {

// The windows over one dimension.
struct Windows {
  int64_t size, window, step, margin;

  int64_t begin(int64_t p) const { return larger(p * step - margin, 0); }
  int64_t end(int64_t p) const { return smaller(p * step - margin + window, size); }
  int64_t counted(int64_t p) const { return smaller(window, size + 2 * margin - p * step); }
  // Of `count` windows, those over position x: [first, last).
  int64_t first(int64_t x) const { return ceil_div(larger(x + margin - window + 1, 0), step); }
  int64_t last(int64_t x, int64_t count) const { return smaller((x + margin) / step + 1, count); }
  // Every window is two positions, whole and beside the next.
  bool pairs(int64_t count) const {
    return window == 2 && step == 2 && margin == 0 && counted(count - 1) == 2;
  }
};

inline Windows windows_down(const ConvPoolShape& s) { return {s.conv.h, s.window.h, s.step.h, s.margin.h}; }
inline Windows windows_across(const ConvPoolShape& s) { return {s.conv.w, s.window.w, s.step.w, s.margin.w}; }

// One image is so many planes of rows, whose pixels are so many numbers.
inline int64_t row_unit(const ConvPoolShape& s) { return s.channels_last ? s.outputs : 1; }
inline int64_t planes(const ConvPoolShape& s) { return s.batch * (s.channels_last ? 1 : s.outputs); }

// A unit is one row of pooled outputs.
inline int64_t average_units(const ConvPoolShape& s) { return planes(s) * s.pooled.h; }
// A unit is one row of the map.
inline int64_t spread_units(const ConvPoolShape& s) { return planes(s) * s.conv.h; }

template <typename T>
int64_t average_scratch_bytes(const ConvPoolShape& s) {
  return 2 * carved_bytes(s.conv.w * row_unit(s), sizeof(T));
}

// to[i] += from[i]
template <typename T>
CNNRNN_INLINE void add_row(const T* from, T* to, int64_t n) {
  constexpr int L = kLanesOf<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) storeu(to + i, loadu(to + i) + loadu(from + i));
  for (; i < n; ++i) to[i] += from[i];
}

// to[i] += factor * from[i], to[i] = factor * from[i] if `first`.
template <typename T>
CNNRNN_INLINE void add_scaled(const T* from, T factor, T* to, int64_t n, bool first) {
  constexpr int L = kLanesOf<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<T> product = broadcast(factor) * loadu(from + i);
    storeu(to + i, first ? product : loadu(to + i) + product);
  }
  for (; i < n; ++i) to[i] = first ? factor * from[i] : to[i] + factor * from[i];
}

// Sums of pairs of one channel's pixels, times factor.
template <typename T>
CNNRNN_INLINE void sum_pairs_of_row(const T* row, T factor, T* y, int64_t count) {
  constexpr int L = kLanesOf<T>;
  int64_t p = 0;
  for (; p + L <= count; p += L) {
    const Vec<T> a = loadu(row + 2 * p), b = loadu(row + 2 * p + L);
    storeu(y + p, (every_other<T, 0>(a, b) + every_other<T, 1>(a, b)) * broadcast(factor));
  }
  for (; p < count; ++p) y[p] = (row[2 * p] + row[2 * p + 1]) * factor;
}

template <typename T>
void average(const ConvPoolShape& s, int activation, const T* map, T* y, void* memory, int64_t begin,
             int64_t end) {
  const Windows down = windows_down(s), across = windows_across(s);
  const int64_t unit = row_unit(s), row_size = s.conv.w * unit;
  const bool pairs = unit == 1 && across.pairs(s.pooled.w);
  char* scratch = static_cast<char*>(memory);
  T* sums = carve<T>(scratch, row_size);
  T* activated = carve<T>(scratch, row_size);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t plane = at / s.pooled.h, py = at % s.pooled.h;
    const T* rows = map + plane * s.conv.h * row_size;
    T* out = y + at * s.pooled.w * unit;
    const int64_t top = down.begin(py), bottom = down.end(py);
    for (int64_t cy = top; cy < bottom; ++cy) {
      const T* row = rows + cy * row_size;
      if (activation != cnnrnn::kNoActivation) {
        kActivations<T>[activation].value(row, activated, row_size);
        row = activated;
      }
      if (cy == top)
        __builtin_memcpy(sums, row, row_size * sizeof(T));
      else
        add_row(row, sums, row_size);
    }
    const int64_t tall = down.counted(py);
    if (pairs) {
      sum_pairs_of_row(sums, T(1) / (2 * tall), out, s.pooled.w);
      continue;
    }
    for (int64_t px = 0; px < s.pooled.w; ++px) {
      const T factor = T(1) / (tall * across.counted(px));
      const int64_t left = across.begin(px), right = across.end(px);
      if (unit == 1) {
        T sum = 0;
        for (int64_t cx = left; cx < right; ++cx) sum += sums[cx];
        out[px] = sum * factor;
        continue;
      }
      T* pixel = out + px * unit;
      for (int64_t cx = left; cx < right; ++cx) add_scaled(sums + cx * unit, factor, pixel, unit, cx == left);
    }
  }
}

// Each of one channel's gradients, times factor, to two pixels.
template <typename T>
CNNRNN_INLINE void add_to_pairs(const T* grad, T factor, T* row, int64_t count) {
  constexpr int L = kLanesOf<T>;
  int64_t p = 0;
  for (; p + L <= count; p += L) {
    const Vec<T> g = loadu(grad + p) * broadcast(factor);
    storeu(row + 2 * p, loadu(row + 2 * p) + interleave<T, 0>(g, g));
    storeu(row + 2 * p + L, loadu(row + 2 * p + L) + interleave<T, L / 2>(g, g));
  }
  for (; p < count; ++p) row[2 * p] += grad[p] * factor, row[2 * p + 1] += grad[p] * factor;
}

// kept: what the gradient of row `activation` wants, of the map's shape.
template <typename T>
void spread(const ConvPoolShape& s, int activation, const T* kept, const T* grad_y, T* grad_map,
            int64_t begin, int64_t end) {
  const Windows down = windows_down(s), across = windows_across(s);
  const int64_t unit = row_unit(s), row_size = s.conv.w * unit, out_size = s.pooled.w * unit;
  const bool pairs = unit == 1 && across.pairs(s.pooled.w);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t plane = at / s.conv.h, cy = at % s.conv.h;
    T* row = grad_map + at * row_size;
    __builtin_memset(row, 0, row_size * sizeof(T));
    for (int64_t py = down.first(cy); py < down.last(cy, s.pooled.h); ++py) {
      const T* grad = grad_y + (plane * s.pooled.h + py) * out_size;
      const int64_t tall = down.counted(py);
      if (pairs) {
        add_to_pairs(grad, T(1) / (2 * tall), row, s.pooled.w);
        continue;
      }
      for (int64_t px = 0; px < s.pooled.w; ++px) {
        const T factor = T(1) / (tall * across.counted(px));
        for (int64_t cx = across.begin(px); cx < across.end(px); ++cx) {
          if (unit == 1)
            row[cx] += grad[px] * factor;
          else
            add_scaled(grad + px * unit, factor, row + cx * unit, unit, false);
        }
      }
    }
    if (activation != cnnrnn::kNoActivation)
      kActivations<T>[activation].gradient(kept + at * row_size, row, row, row_size);
  }
}

}  // namespace
