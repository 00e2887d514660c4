// One step of the scan for few rows, from weights as they come: each gate of a unit is the dot product of a
// row of weights, which is read once from wherever it is. No packing; weights may be narrow.
#pragma once

#include "rnn_step.h"

namespace {

struct Bf16 {
  uint16_t bits;
};

// sums[l] += w[l] * x from `from` on, for L rows of weights, `depth` long; returns where whole vectors end.
template <typename T>
CNNRNN_INLINE int64_t add_dots(Vec<T> (&sums)[kLanesOf<T>], const T* const (&w)[kLanesOf<T>], const T* x,
                               int64_t depth) {
  constexpr int L = kLanesOf<T>;
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    const Vec<T> v = loadu(x + k);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sums[l] += v * loadu(w[l] + k);
  }
  return k;
}

// A vector of words holds two bfloat16 each: the upper half is a float with the lower one cleared, the lower
// half with a shift. So weights come two vectors at a time, of even and of odd places, and x is parted the
// same way.
CNNRNN_INLINE int64_t add_dots(vf (&sums)[kLanes], const Bf16* const (&w)[kLanes], const float* x,
                               int64_t depth) {
  int64_t k = 0;
  for (; k + 2 * kLanes <= depth; k += 2 * kLanes) {
    const vf a = loadu(x + k), b = loadu(x + k + kLanes);
    const vf even = every_other<float, 0>(a, b), odd = every_other<float, 1>(a, b);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) {
      const vu words = reinterpret_cast<vu>(loadu(reinterpret_cast<const int32_t*>(w[l] + k)));
      sums[l] += even * reinterpret_cast<vf>(words << 16);
      sums[l] += odd * reinterpret_cast<vf>(words & 0xffff0000u);
    }
  }
  return k;
}

CNNRNN_INLINE int64_t add_dots(vf (&sums)[kLanes], const int8_t* const (&w)[kLanes], const float* x,
                               int64_t depth) {
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    const vf v = loadu(x + k);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) sums[l] += v * load_int8(w[l] + k);
  }
  return k;
}

CNNRNN_INLINE float value_of(float w) { return w; }
CNNRNN_INLINE double value_of(double w) { return w; }
CNNRNN_INLINE float value_of(int8_t w) { return static_cast<float>(w); }
CNNRNN_INLINE float value_of(Bf16 w) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(w.bits) << 16);
}

// L units of one gate: the dot products of x with n rows of weights, scaled.
template <typename T, typename W>
CNNRNN_APART Vec<T> dots(const W* w, const T* scale, int64_t n, const T* x, int64_t depth) {
  constexpr int L = kLanesOf<T>;
  const W* rows[L];
  for (int l = 0; l < L; ++l) rows[l] = w + (l < n ? l : n - 1) * depth;
  Vec<T> sums[L];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sums[l] = Vec<T>{};
  int64_t k = add_dots(sums, rows, x, depth);
  Vec<T> total = sum_each<T>(sums);
  for (; k < depth; ++k) {
    Vec<T> column{};
    for (int l = 0; l < L; ++l) column[l] = value_of(rows[l][k]);
    total += column * broadcast(x[k]);
  }
  return scale ? total * load_n(scale, n) : total;
}

// Up to kBeside vectors of units at a time: their activations hide each other's latency.
constexpr int kBeside = 4;
constexpr int kDirectRows = 4;  // a gate's weights of some units stay in cache for so many rows

template <typename T, typename Cell, typename W>
struct DirectUnits {
  static constexpr int L = kLanesOf<T>, kApart = Cell::kGates - Cell::kJoint;
  const RnnForwardStep<T>& s;

  // Units [unit, end) of `rows` rows.
  CNNRNN_INLINE void run(int64_t row, int64_t rows, int64_t unit, int64_t end) const {
    Pack<T, kBeside> a[kDirectRows][Cell::kParts];
    for (int v = 0; v < kBeside && unit + v * L < end; ++v)
      for (int g = 0; g < Cell::kGates; ++g)
        gate(row, rows, g, unit + v * L, valid(end, unit + v * L, L), v, a);
    for (int64_t r = 0; r < rows; ++r) {
      if (unit + kBeside * L <= end)
        Cell::forward(s, Units<true, true>{row + r, unit, end}, a[r]);
      else
        Cell::forward(s, Units<true, false>{row + r, unit, end}, a[r]);
    }
  }

  CNNRNN_INLINE void gate(int64_t row, int64_t rows, int g, int64_t unit, int64_t n, int v,
                          Pack<T, kBeside> (&a)[kDirectRows][Cell::kParts]) const {
    const int64_t at = g * s.hidden + unit;
    const W *w = static_cast<const W*>(s.w), *weights_h = static_cast<const W*>(s.r);
    Vec<T> bias_x{}, bias_h{};
    if (s.bias_ih) bias_x = load_n(s.bias_ih + at, n), bias_h = load_n(s.bias_hh + at, n);
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<T> x_part = s.projected ? load_n(s.projection + (row + r) * s.projection_stride + at, n)
                                        : dots<T, W>(w + at * s.input, s.scale_ih ? s.scale_ih + at : nullptr,
                                                     n, s.x + (row + r) * s.x_stride, s.input);
      const Vec<T> h_part = dots<T, W>(weights_h + at * s.hidden, s.scale_hh ? s.scale_hh + at : nullptr, n,
                                       state_row(s.h, row + r), s.hidden);
      if (g < Cell::kJoint) {
        a[r][g].v[v] = x_part + h_part + (bias_x + bias_h);
      } else {
        a[r][g].v[v] = x_part + bias_x;
        a[r][g + kApart].v[v] = h_part + bias_h;
      }
    }
  }
};

template <typename T, typename Cell, typename W = T>
void forward_direct(const RnnForwardStep<T>& s, int64_t first, int64_t last) {
  constexpr int64_t kUnits = kBeside * kLanesOf<T>;
  const int64_t begin = first * kPanelUnits<T, Cell>, end = valid(s.hidden, 0, last * kPanelUnits<T, Cell>);
  const int64_t groups = (end - begin + kUnits - 1) / kUnits;
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t unit = begin + (s.downward ? groups - 1 - i : i) * kUnits;
    for (int64_t row = 0; row < s.rows; row += kDirectRows)
      DirectUnits<T, Cell, W>{s}.run(row, s.rows - row < kDirectRows ? s.rows - row : kDirectRows, unit,
                                     unit + kUnits < end ? unit + kUnits : end);
  }
}

}  // namespace
