// conv_pool with pixels as the columns of tiles: the input of a strip as tiles of B (conv_pool_columns.h has
// the whole).
#pragma once

#include "conv_pool_columns_plan.h"

namespace {

// Values at[0], at[step], ...
CNNRNN_INLINE vf load_apart(const float* at, int64_t step) {
  if (step == 1) return loadu(at);
  const auto of_two = [&](const float* from) {
    return every_other<float, 0>(loadu(from), loadu(from + kLanes));
  };
  if (step == 2) return of_two(at);
  if (step == 4) return every_other<float, 0>(of_two(at), of_two(at + 2 * kLanes));
  vf v{};
  for (int l = 0; l < kLanes; ++l) v[l] = at[l * step];
  return v;
}

// The input of a strip, row by row.
template <int P>
struct ColumnsInput {
  const ConvPoolShape& s;
  const ColumnsPlan<P>& plan;
  float* padded;    // a row of one channel, padded
  uint32_t* words;  // a row: [P][C][modulus][in_width], a value's part in the upper half of each
  int64_t* taps;    // [phases.w][2 pairs]: from the first word of a row

  static int64_t padded_size(const ColumnsPlan<P>& plan) {
    return (round_up(plan.in_width, kTileSide) + kTileSide) * plan.modulus;
  }
  static int64_t part(const ConvPoolShape& s, const ColumnsPlan<P>& plan) {
    return round_up(s.channels * plan.modulus * plan.in_width + kTileSide, kTileSide);
  }
  static int64_t tap_count(const ColumnsPlan<P>& plan) { return plan.phases.w * 2 * plan.pairs; }

  // Fills taps, and zeros what is around the rows.
  void start() const {
    __builtin_memset(padded, 0, padded_size(plan) * sizeof(float));
    __builtin_memset(words, 0, P * part(s, plan) * sizeof(uint32_t));
    int64_t* to = taps;
    for (int64_t phase = 0; phase < plan.phases.w; ++phase) {
      for (int part_of = 0; part_of < (plan.stacked ? P : 1); ++part_of)  // smallest first
        for (int64_t c = 0; c < s.channels; ++c)
          for (int64_t kx = 0; kx < s.kernel.w; ++kx) {
            const int64_t x = phase * s.stride.w + kx * s.dilation.w;
            const int64_t base = plan.stacked ? (P - 1 - part_of) * part(s, plan) : 0;
            *to++ = base + (c * plan.modulus + x % plan.modulus) * plan.in_width + x / plan.modulus;
          }
      // The second of the last pair meets weights of 0.
      if (plan.entries % 2) to[0] = to[-1], ++to;
    }
  }

  // Row y of an image, from column `left` on, to row i of B; beyond the image are zeros.
  template <typename T>
  void fill_row(const T* image, int64_t y, int64_t left, int64_t i, Half* b) const {
    Half* const to = b + i * plan.pairs * kTileDepth;
    if (y < 0 || y >= s.input.h) {
      for (int64_t p = 0; p < plan.b_columns() * plan.planes; ++p)
        __builtin_memset(to + p * plan.plane, 0, plan.pairs * kTileDepth * sizeof(Half));
      return;
    }
    part_row(image, y, left);
    for (int64_t column = 0; column < plan.b_columns(); ++column) {
      const int64_t* const tap = taps + column % plan.phases.w * 2 * plan.pairs;
      const uint32_t* const from = words + column / plan.phases.w * kTileSide;
      copy_row(from, tap, to + column * plan.column);
    }
  }

 private:
  template <typename T>
  void part_row(const T* image, int64_t y, int64_t left) const {
    const int64_t m = plan.modulus, size = plan.in_count * m, apart = part(s, plan);
    const int64_t begin = smaller(larger(-left, 0), size);
    const int64_t end = larger(smaller(s.input.w - left, size), begin);
    for (int64_t c = 0; c < s.channels; ++c) {
      // Strips side by side have other columns beyond the image.
      if (plan.across > 1) __builtin_memset(padded, 0, padded_size(plan) * sizeof(float));
      if (s.channels_last) {
        const T* const from = image + (y * s.input.w + left) * s.channels + c;
        for (int64_t x = begin; x < end; ++x) padded[x] = widened(from + x * s.channels, 1)[0];
      } else {
        const T* const from = image + (c * s.input.h + y) * s.input.w + left;
        for (int64_t x = begin; x < end; x += kLanes)
          store_n(padded + x, widened(from + x, smaller(end - x, kLanes)), end - x);
      }
      // Each store reaches into the row behind, which comes later, or what is read for no window.
      uint32_t* to = words + c * m * plan.in_width;
      for (int64_t phase = 0; phase < m; ++phase, to += plan.in_width)
        for (int64_t x = 0; x < plan.in_count; x += kLanes) {
          const Parts<P> parts = parts_of<P>(load_apart(padded + x * m + phase, m));
#pragma GCC unroll 3
          for (int p = 0; p < P; ++p)
            storeu(reinterpret_cast<int32_t*>(to + p * apart + x), reinterpret_cast<vi>(parts.of[p]));
        }
    }
  }
  CNNRNN_INLINE void copy_row(const uint32_t* from, const int64_t* tap, Half* to) const {
    plan.planes == 1 ? copy_planes<1>(from, tap, to) : copy_planes<P>(from, tap, to);
  }
  template <int planes>
  CNNRNN_INLINE void copy_planes(const uint32_t* from, const int64_t* tap, Half* to) const {
    const auto word = [&](int64_t tap) {
      return reinterpret_cast<vu>(loadu(reinterpret_cast<const int32_t*>(from + tap)));
    };
    const int64_t next = part(s, plan), plane = plan.plane;
    for (const int64_t* const end = tap + 2 * plan.pairs; tap < end; tap += 2, to += kTileDepth) {
      const int64_t first = tap[0], second = tap[1];
#pragma GCC unroll 3
      for (int p = 0; p < planes; ++p)
        store_words(to + p * plane, word(first + p * next) >> 16 | word(second + p * next));
    }
  }
};

}  // namespace
