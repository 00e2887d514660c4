// conv_pool backward from (grad_y, code): at most one position of each pooling window has a gradient, so both
// gradients visit pooled outputs only. With 2x2 windows that is a quarter of a dense backward's products.
//
// Both are sums of the same form, held in registers and computed by one kernel, `accumulate`:
//   grad_weight[k][footprint] = sum over live outputs o of k:    grad_y[o] * x[position of o][footprint]
//   grad_x[position][footprint] = sum over the k alive there:    grad_y[o] * weight[k][footprint]
// A footprint is KH rows of KW * C contiguous numbers; x, weight and grad_x are laid out channels-last in
// slabs of kSlab channels for it.
#pragma once

#include "conv_pool_common.h"

namespace {

constexpr int kMaxRows = 3;                                  // footprint rows held in registers at once
constexpr int kMaxVectors = kVectorRegisters == 32 ? 8 : 4;  // vectors of each row
constexpr int64_t kSlab = 32;                                // channels of a slab

// target[r][v] += sum over i < n of g[i] * source[offset[i]][r][v], rows at source_row[r] and target_row[r].
template <typename T, int R, int V>
void accumulate(const T* source, const int64_t* source_row, const int32_t* offset, const T* g, int64_t n,
                T* target, const int64_t* target_row) {
  constexpr int L = kLanesOf<T>;
  constexpr int U = R * V >= 7 ? 1 : R * V >= 4 ? 2 : 4;  // enough independent sums to hide an FMA's latency
  Vec<T> acc[U][R][V] = {};
  int64_t i = 0;
  for (; i + U <= n; i += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const T* at = source + offset[i + u];
      const Vec<T> factor = broadcast(g[i + u]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T* row = at + source_row[r];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[u][r][v] += factor * loadu(row + v * L);
      }
    }
  }
  for (; i < n; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        acc[0][r][v] += broadcast(g[i]) * loadu(source + offset[i] + source_row[r] + v * L);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec<T> sum = acc[0][r][v];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum += acc[u][r][v];
      T* at = target + target_row[r] + v * L;
      storeu(at, loadu(at) + sum);
    }
  }
}

template <typename T>
using Accumulate = void (*)(const T*, const int64_t*, const int32_t*, const T*, int64_t, T*, const int64_t*);

template <typename T, int R>
Accumulate<T> accumulate_of(int64_t vectors) {
  static const Accumulate<T> table[] = {
      accumulate<T, R, 1>, accumulate<T, R, 2>, accumulate<T, R, 3>, accumulate<T, R, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
      accumulate<T, R, 5>, accumulate<T, R, 6>, accumulate<T, R, 7>, accumulate<T, R, 8>,
#endif
  };
  return table[vectors - 1];
}

// A part of a footprint that fits the registers.
template <typename T>
struct Part {
  Accumulate<T> run;
  int64_t source_row[kMaxRows], target_row[kMaxRows];
};

// The footprint of one slab: `rows` rows (kernel rows, or taps where the kernel is dilated along x), each
// `length` contiguous numbers in `vectors` vectors.
template <typename T>
struct Footprint {
  int64_t slab, slabs;            // channels of a slab (a multiple of the lanes if so asked), their number
  int64_t rows, length, vectors;  // length and vectors of one row
  bool by_taps;

  Footprint(const ConvPoolShape& s, bool whole_vectors) {
    const int64_t channels = s.group_channels();
    slab = smaller(channels, kSlab);
    if (whole_vectors || slab >= kLanesOf<T>) slab = round_up(slab, kLanesOf<T>);
    slabs = ceil_div(channels, slab);
    by_taps = s.dilation.w > 1;
    rows = by_taps ? s.kernel.h * s.kernel.w : s.kernel.h;
    length = by_taps ? slab : s.kernel.w * slab;
    vectors = ceil_div(length, kLanesOf<T>);
  }

  // In weights: one row after another.
  int64_t dense_row(int64_t row) const { return row * vectors * kLanesOf<T>; }
  int64_t dense_size() const { return dense_row(rows); }
  // In an image of `width` pixels of a slab.
  int64_t image_row(const ConvPoolShape& s, int64_t row, int64_t width) const {
    if (!by_taps) return row * s.dilation.h * width * slab;
    return (row / s.kernel.w * s.dilation.h * width + row % s.kernel.w * s.dilation.w) * slab;
  }

  // Calls run(part) for each part; the image is read (dense is the target) or written.
  template <typename Run>
  CNNRNN_INLINE void for_each_part(const ConvPoolShape& s, int64_t width, bool image_is_source,
                                   int64_t max_rows, const Run& run) const {
    for (int64_t r = 0; r < rows; r += max_rows) {
      const int64_t height = smaller(max_rows, rows - r);
      for (int64_t v = 0; v < vectors; v += kMaxVectors) {
        const int64_t count = smaller(kMaxVectors, vectors - v);
        Part<T> part;
        part.run = height == 3   ? accumulate_of<T, 3>(count)
                   : height == 2 ? accumulate_of<T, 2>(count)
                                 : accumulate_of<T, 1>(count);
        for (int64_t i = 0; i < height; ++i) {
          const int64_t image = image_row(s, r + i, width) + v * kLanesOf<T>;
          const int64_t dense = dense_row(r + i) + v * kLanesOf<T>;
          part.source_row[i] = image_is_source ? image : dense;
          part.target_row[i] = image_is_source ? dense : image;
        }
        run(part);
      }
    }
  }

  // The place of weight element (c, ky, kx) of one output channel.
  int64_t place(const ConvPoolShape& s, int64_t c, int64_t ky, int64_t kx) const {
    const int64_t row = by_taps ? ky * s.kernel.w + kx : ky, column = by_taps ? 0 : kx * slab;
    return c / slab * dense_size() + dense_row(row) + column + c % slab;
  }
};

// Where a window's positions stand in an image of `width` pixels of a slab, relative to the window itself.
// Codes beyond the window count as dead.
inline void fill_positions(const ConvPoolShape& s, int64_t slab, int64_t width, int32_t* delta) {
  for (int64_t q = 0; q < 256; ++q) {
    const int64_t at = q / s.window.w * s.stride.h * width + q % s.window.w * s.stride.w;
    delta[q] = q < s.positions() ? static_cast<int32_t>(at * slab) : 0;
  }
}

// Length of input under `count` windows along one dimension.
inline int64_t extent(int64_t count, int64_t step, int64_t window, int64_t stride, int64_t kernel,
                      int64_t dilation) {
  return ((count - 1) * step + window - 1) * stride + (kernel - 1) * dilation + 1;
}

}  // namespace
