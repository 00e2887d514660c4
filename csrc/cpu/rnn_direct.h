// One step of the scan for few rows, from weights as they come: each gate of a unit is the dot product of a
// row of weights, which is read once from wherever it is. No packing; weights may be narrow.
#pragma once

#include "rnn_step.h"

namespace {

struct Bf16 {
  uint16_t bits;
};

// L weights as vectors of T.
template <typename T>
CNNRNN_INLINE Vec<T> load_weights(const T* p) {
  return loadu(p);
}
CNNRNN_INLINE vf load_weights(const Bf16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  const vu wide = __builtin_convertvector(*reinterpret_cast<const Half*>(p), vu);
  return reinterpret_cast<vf>(wide << 16);
}
CNNRNN_INLINE vf load_weights(const int8_t* p) {
  typedef int8_t Quarter __attribute__((vector_size(kVectorBytes / 4), aligned(1), may_alias));
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const Quarter*>(p), vi), vf);
}

template <typename T>
CNNRNN_INLINE Vec<T> load_weights_n(const T* p, int64_t n) {
  return load_n(p, n);
}
CNNRNN_INLINE vf load_weights_n(const Bf16* p, int64_t n) {
  vf v{};
  for (int64_t i = 0; i < n; ++i) v[i] = __builtin_bit_cast(float, static_cast<uint32_t>(p[i].bits) << 16);
  return v;
}
CNNRNN_INLINE vf load_weights_n(const int8_t* p, int64_t n) {
  vf v{};
  for (int64_t i = 0; i < n; ++i) v[i] = static_cast<float>(p[i]);
  return v;
}

// sums[l] += w[l] * x over `depth`, the products of each lane apart. Rows of w past the n-th repeat it.
template <typename T, typename W>
CNNRNN_INLINE void add_dots(Vec<T> (&sums)[kLanesOf<T>], const W* w, int64_t n, const T* x, int64_t depth) {
  constexpr int L = kLanesOf<T>;
  const W* rows[L];
  for (int l = 0; l < L; ++l) rows[l] = w + (l < n ? l : n - 1) * depth;
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    const Vec<T> v = loadu(x + k);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sums[l] += v * load_weights(rows[l] + k);
  }
  if (k == depth) return;
  const Vec<T> v = load_n(x + k, depth - k);
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sums[l] += v * load_weights_n(rows[l] + k, depth - k);
}

// L units of one gate of a row: the dot products with n rows of weights, scaled.
template <typename T, typename W>
CNNRNN_INLINE Vec<T> dots(const W* w, const T* scale, int64_t n, const T* x, int64_t depth) {
  Vec<T> sums[kLanesOf<T>] = {};
  add_dots<T, W>(sums, w, n, x, depth);
  const Vec<T> total = sum_each<T>(sums);
  return scale ? total * load_n(scale, n) : total;
}

template <typename T, typename Cell, typename W>
CNNRNN_INLINE void direct_units(const RnnForwardStep<T>& s, int64_t row, int64_t rows, int64_t unit,
                                int64_t n) {
  constexpr int kRows = 4;  // a gate's weights of these units stay in cache for so many rows
  constexpr int kApart = Cell::kGates - Cell::kJoint;
  const W *w = static_cast<const W*>(s.w), *weights_h = static_cast<const W*>(s.r);
  Vec<T> a[kRows][Cell::kParts];
  for (int g = 0; g < Cell::kGates; ++g) {
    const int64_t at = g * s.hidden + unit;
    const bool joint = g < Cell::kJoint;
    Vec<T> bias_x{}, bias_h{};
    if (s.bias_ih) bias_x = load_n(s.bias_ih + at, n), bias_h = load_n(s.bias_hh + at, n);
    for (int64_t r = 0; r < rows; ++r) {
      Vec<T> x_part, h_part;
      if (s.projected)
        x_part = load_n(s.projection + (row + r) * s.projection_stride + at, n);
      else
        x_part = dots<T, W>(w + at * s.input, s.scale_ih ? s.scale_ih + at : nullptr, n,
                            s.x + (row + r) * s.x_stride, s.input);
      h_part = dots<T, W>(weights_h + at * s.hidden, s.scale_hh ? s.scale_hh + at : nullptr, n,
                          state_row(s.h, row + r), s.hidden);
      if (joint) {
        a[r][g] = x_part + h_part + (bias_x + bias_h);
      } else {
        a[r][g] = x_part + bias_x;
        a[r][g + kApart] = h_part + bias_h;
      }
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    Pack<T, 1> one[Cell::kParts];
    for (int p = 0; p < Cell::kParts; ++p) one[p].v[0] = a[r][p];
    Cell::template forward<T, 1>(s, Units<false, false>{row + r, unit, s.hidden}, one);
  }
}

template <typename T, typename Cell, typename W = T>
void forward_direct(const RnnForwardStep<T>& s, int64_t first, int64_t last) {
  constexpr int L = kLanesOf<T>;
  for (int64_t i = first; i < last; ++i) {
    const int64_t panel = s.downward ? first + last - 1 - i : i;
    for (int u = 0; u < Cell::kUnitVectors; ++u) {
      const int64_t unit = panel * kPanelUnits<T, Cell> + u * L, n = valid(s.hidden, unit, L);
      if (n == 0) break;
      for (int64_t row = 0; row < s.rows; row += 4)
        direct_units<T, Cell, W>(s, row, s.rows - row < 4 ? s.rows - row : 4, unit, n);
    }
  }
}

}  // namespace
