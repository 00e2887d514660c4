// Products of a few rows of activations with rows of weights in float32, bfloat16 or int8, read from where
// they are.
//
// bfloat16 weights are widened on their way into a float32 product. Beside int8 weights the activations are
// rounded to int16, in units of their row's largest magnitude / 32767, and the sums are whole numbers:
// widening a byte to 16 bits and multiplying in pairs takes half of the instructions that float32 takes. The
// rounding adds at most sqrt(depth) / 258 of the error that int8 weights have, in the root of the mean
// square.
#pragma once

#include "bf16.h"

namespace {

CNNRNN_INLINE float value_of(int8_t w) { return static_cast<float>(w); }

constexpr int kStep = 2 * kLanes;  // weights are taken so many at a time
constexpr int kNarrowRows = 16;    // of activations that pass over the same weights in turn

constexpr int64_t padded_to_steps(int64_t depth) { return (depth + kStep - 1) / kStep * kStep; }

// Two vectors of x from k on, zeros from `depth` on.
struct StepOfRow {
  vf first, second;
  CNNRNN_INLINE StepOfRow(const float* x, int64_t k, int64_t depth)
      : first(load_n(x + k, depth - k)),
        second(depth - k > kLanes ? load_n(x + k + kLanes, depth - k - kLanes) : vf{}) {}
};

// What weights of type W need:
//   Activation, Sum, Wide      elements of a prepared row; what sums are kept in; a step of weights, widened
//   kSteps                     that one Sum can take
//   widen, only_first          a step of weights; without those from n on
//   load, add                  a step of activations; onto the sum, their product with a step of weights
//   prepare                    a row as `add` takes it, padded with zeros, and its scale; false if it cannot
//   be
template <typename W>
struct Narrow;

// What weights have in common that are multiplied in float32.
struct FloatSums {
  using Activation = float;
  using Sum = vf;
  struct Wide {
    vf first, second;
  };
  static constexpr int64_t kSteps = int64_t{1} << 40;

  static CNNRNN_INLINE Wide load(const Activation* x) { return {loadu(x), loadu(x + kLanes)}; }
  static CNNRNN_INLINE void add(Sum& sum, const Wide& w, const Wide& x) {
    sum += w.first * x.first;
    sum += w.second * x.second;
  }
  static CNNRNN_INLINE vf total(Sum sum) { return sum; }
};

template <>
struct Narrow<float> : FloatSums {
  static CNNRNN_INLINE Wide widen(const float* w) { return {loadu(w), loadu(w + kLanes)}; }
  static CNNRNN_INLINE Wide only_first(const Wide& w, int64_t n) {
    vi place{};
    for (int l = 0; l < kLanes; ++l) place[l] = l;
    const int32_t count = static_cast<int32_t>(n);
    return {place < count ? w.first : vf{}, place + kLanes < count ? w.second : vf{}};
  }

  static CNNRNN_INLINE bool prepare(const float* x, int64_t depth, Activation* to, float& scale) {
    for (int64_t k = 0; k < depth; k += kStep) {
      const StepOfRow v(x, k, depth);
      storeu(to + k, v.first);
      storeu(to + k + kLanes, v.second);
    }
    scale = 1;
    return true;
  }
};

// A vector of words holds two bfloat16 each: the upper half is a float with the lower one cleared, the lower
// half with a shift. So a step of weights becomes its even and its odd places, and x is parted the same way.
template <>
struct Narrow<Bf16> : FloatSums {
  static CNNRNN_INLINE Wide widen(const Bf16* w) {
    const vu words = reinterpret_cast<vu>(loadu(reinterpret_cast<const int32_t*>(w)));
    return {reinterpret_cast<vf>(words << 16), reinterpret_cast<vf>(words & 0xffff0000u)};
  }
  static CNNRNN_INLINE Wide only_first(const Wide& w, int64_t n) {
    vi place{};
    for (int l = 0; l < kLanes; ++l) place[l] = 2 * l;
    const int32_t count = static_cast<int32_t>(n);
    return {place < count ? w.first : vf{}, place + 1 < count ? w.second : vf{}};
  }

  static CNNRNN_INLINE bool prepare(const float* x, int64_t depth, Activation* to, float& scale) {
    for (int64_t k = 0; k < depth; k += kStep) {
      const StepOfRow v(x, k, depth);
      storeu(to + k, every_other<float, 0>(v.first, v.second));
      storeu(to + k + kLanes, every_other<float, 1>(v.first, v.second));
    }
    scale = 1;
    return true;
  }
};

template <>
struct Narrow<int8_t> {
  using Activation = int16_t;
  using Sum = vi;
  using Wide = vs;
  static constexpr int64_t kSteps = 255;  // each adds up to 2 * 128 * 32767 to a lane

  static CNNRNN_INLINE Wide widen(const int8_t* w) { return load_int16(w); }
  static CNNRNN_INLINE Wide only_first(const Wide& w, int64_t) { return w; }  // the activations are zeros
  static CNNRNN_INLINE Wide load(const Activation* x) { return loadu(x); }
  static CNNRNN_INLINE void add(Sum& sum, const Wide& w, const Wide& x) { sum += multiply_pairs(w, x); }
  static CNNRNN_INLINE vf total(Sum sum) { return to_float(sum); }

  static CNNRNN_INLINE bool prepare(const float* x, int64_t depth, Activation* to, float& scale) {
    // Magnitudes order as their bits do, infinity and NaN last.
    vi most{};
    for (int64_t k = 0; k < depth; k += kStep) {
      const StepOfRow v(x, k, depth);
      most = vmax(most, reinterpret_cast<vi>(v.first) & 0x7fffffff);
      most = vmax(most, reinterpret_cast<vi>(v.second) & 0x7fffffff);
    }
    int32_t bits = 0;
    for (int l = 0; l < kLanes; ++l) bits = vmax(bits, most[l]);
    const float largest = __builtin_bit_cast(float, bits);
    constexpr float kSmallest = 1e-30f;  // its reciprocal is finite by far
    if (largest != 0 && !(largest >= kSmallest && largest <= __FLT_MAX__)) return false;
    const vf unit = broadcast(largest == 0 ? 0.0f : 32767 / largest);
    for (int64_t k = 0; k < depth; k += kStep) {
      // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
      const StepOfRow v(x, k, depth);
      const vf first = v.first * unit + 12582912.0f, second = v.second * unit + 12582912.0f;
      storeu(to + k, every_other<int16_t, 0>(reinterpret_cast<vs>(first), reinterpret_cast<vs>(second)));
    }
    scale = largest / 32767;
    return true;
  }
};

// A tile is R rows of activations beside C = lanes / R rows of weights: lane r * C + c is the product of row
// r with row c; from row `last` of the weights on, with that one. Their memory reaches to `end`.
//
// The part of it from k on, beyond the last whole step.
template <typename W, int R>
CNNRNN_APART vf narrow_rest(const W* w, int64_t last, const W* end, const typename Narrow<W>::Activation* x,
                            int64_t k, int64_t depth) {
  using N = Narrow<W>;
  constexpr int C = kLanes / R;
  vf totals[kLanes];
  for (int c = 0; c < C; ++c) {
    // What stands beyond a row is the next one, but for the last.
    W copy[kStep] = {};
    const W* from = w + (c < last ? c : last) * depth + k;
    if (end - from < kStep) {
      for (int64_t i = 0; i < depth - k; ++i) copy[i] = from[i];
      from = copy;
    }
    const typename N::Wide wide = N::only_first(N::widen(from), depth - k);
    for (int r = 0; r < R; ++r) {
      typename N::Sum sum{};
      N::add(sum, wide, N::load(x + r * padded_to_steps(depth) + k));
      totals[r * C + c] = N::total(sum);
    }
  }
  return sum_each<float>(totals);
}

// The part in whole steps from `k` to `stop`, of which a Sum can take so many.
template <typename W, int R>
CNNRNN_APART vf narrow_steps(const W* w, int64_t last, const typename Narrow<W>::Activation* x, int64_t depth,
                             int64_t k, int64_t stop) {
  using N = Narrow<W>;
  constexpr int C = kLanes / R;
  const int64_t x_stride = padded_to_steps(depth);
  const W* rows[C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) rows[c] = w + c * depth;
  if (__builtin_expect(last < C - 1, 0))
#pragma GCC unroll 16
    for (int c = 1; c < C; ++c) rows[c] = c <= last ? rows[c] : rows[c - 1];
  typename N::Sum sums[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) sums[i] = typename N::Sum{};
  // The rows that follow are wanted next: from the third-level cache, int8 gains 7 % by it, bfloat16 nothing.
  const W* ahead = w + C * depth + C * k;
  for (; k < stop; k += kStep, ahead += C * kStep) {
    if constexpr (sizeof(W) != 2) {
#pragma GCC unroll 16
      for (int line = 0; line < C * kStep; line += 64 / sizeof(W)) __builtin_prefetch(ahead + line);
    }
    // Whichever are fewer, of weights or activations, wait in registers for the others.
    typename N::Wide held[C < R ? C : R];
#pragma GCC unroll 4
    for (int i = 0; i < (C < R ? C : R); ++i)
      held[i] = C < R ? N::widen(rows[i] + k) : N::load(x + i * x_stride + k);
#pragma GCC unroll 16
    for (int j = 0; j < (C < R ? R : C); ++j) {
      const typename N::Wide other = C < R ? N::load(x + j * x_stride + k) : N::widen(rows[j] + k);
#pragma GCC unroll 4
      for (int i = 0; i < (C < R ? C : R); ++i) {
        typename N::Sum& sum = sums[C < R ? j * C + i : i * C + j];
        N::add(sum, C < R ? held[i] : other, C < R ? other : held[i]);
        in_order(sum);
      }
    }
  }
  vf totals[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) totals[i] = N::total(sums[i]);
  return sum_each<float>(totals);
}

template <typename W, int R>
CNNRNN_INLINE vf narrow_tile(const W* w, int64_t last, const W* end, const typename Narrow<W>::Activation* x,
                             int64_t depth) {
  constexpr int64_t kMost = Narrow<W>::kSteps * kStep;
  const int64_t whole = depth / kStep * kStep;
  vf y{};
  for (int64_t k = 0; k < whole; k += kMost)
    y += narrow_steps<W, R>(w, last, x, depth, k, k + kMost < whole ? k + kMost : whole);
  return whole < depth ? y + narrow_rest<W, R>(w, last, end, x, whole, depth) : y;
}

// Some rows of activations, prepared once for many rows of weights.
template <typename W>
struct NarrowRows {
  using N = Narrow<W>;
  using Activation = typename N::Activation;
  int64_t rows, depth;
  const float* given[kNarrowRows];
  Activation* prepared;  // [rows, padded depth], or null where memory was short
  float scale[kNarrowRows];
  bool fits[kNarrowRows];

  static int64_t bytes(int64_t depth) { return padded_to_steps(depth) * sizeof(Activation); }

  CNNRNN_INLINE void take(int64_t r, const float* row) {
    given[r] = row;
    fits[r] = prepared && N::prepare(row, depth, prepared + r * padded_to_steps(depth), scale[r]);
  }

  // products[r] = row r times n rows of weights, their scales included.
  CNNRNN_INLINE void multiply(const W* w, const W* end, const float* scales, int64_t n,
                              vf (&products)[kNarrowRows]) const {
    if (prepared) {
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) tiles<4>(r, w, end, n, products);
      for (; r + 2 <= rows; r += 2) tiles<2>(r, w, end, n, products);
      for (; r < rows; ++r) tiles<1>(r, w, end, n, products);
    }
    for (int64_t r = 0; r < rows; ++r) {
      if (!fits[r]) {
        products[r] = plain(given[r], w, n);
        if (scales) products[r] = products[r] * load_n(scales, n);
      } else if (scales) {
        products[r] = products[r] * (load_n(scales, n) * scale[r]);
      }
    }
  }

 private:
  template <int R>
  CNNRNN_INLINE void tiles(int64_t row, const W* w, const W* end, int64_t n,
                           vf (&products)[kNarrowRows]) const {
    constexpr int C = kLanes / R;
    const Activation* x = prepared + row * padded_to_steps(depth);
    vf y[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
      y[i] = i * C < n ? narrow_tile<W, R>(w + i * C * depth, n - 1 - i * C, end, x, depth) : vf{};
    if constexpr (R == 1) {
      products[row] = y[0];
    } else if constexpr (R == 2) {
      products[row] = unpack<float, C, kLanes, 0>(y[0], y[1]);
      products[row + 1] = unpack<float, C, kLanes, 1>(y[0], y[1]);
    } else {
      const vf low[2] = {unpack<float, C, kLanes, 0>(y[0], y[1]), unpack<float, C, kLanes, 0>(y[2], y[3])};
      const vf high[2] = {unpack<float, C, kLanes, 1>(y[0], y[1]), unpack<float, C, kLanes, 1>(y[2], y[3])};
      products[row] = unpack<float, 2 * C, kLanes, 0>(low[0], low[1]);
      products[row + 1] = unpack<float, 2 * C, kLanes, 1>(low[0], low[1]);
      products[row + 2] = unpack<float, 2 * C, kLanes, 0>(high[0], high[1]);
      products[row + 3] = unpack<float, 2 * C, kLanes, 1>(high[0], high[1]);
    }
  }

  // Rows that hold infinity, NaN or nothing but denormals; and those too long for the memory.
  CNNRNN_APART vf plain(const float* x, const W* w, int64_t n) const {
    vf y{};
    for (int64_t i = 0; i < n; ++i, w += depth) {
      vf sum{};
      int64_t k = 0;
      for (; k + kLanes <= depth; k += kLanes) {
        vf wide{};
        for (int l = 0; l < kLanes; ++l) wide[l] = value_of(w[k + l]);
        sum += wide * loadu(x + k);
      }
      float rest = 0;
      for (; k < depth; ++k) rest += value_of(w[k]) * x[k];
      for (int l = 0; l < kLanes; ++l) rest += sum[l];
      y[i] = rest;
    }
    return y;
  }
};

}  // namespace
