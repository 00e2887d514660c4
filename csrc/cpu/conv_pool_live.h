// How the gradient of conv_pool's weight is cut into tiles, and the live outputs of a tile, by channel: their
// grad_y, and where their positions stand in the x under the tile.
//
// In vectors: kLanes windows of a row at a time, the live ones pushed together.
#pragma once

#include "conv_pool_footprint.h"
#include "transpose.h"

namespace {

constexpr int64_t kTileBytes = 32768;     // of one slab of x: stays in L1
constexpr int64_t kTileMaxWindows = 256;  // of the tiles whose lists exist at once
constexpr int64_t kListedOutputs = 64;    // output channels whose lists exist at once
constexpr int64_t kTileColumns = 64;      // long runs of one plane of grad_y and code

// A tile is a rectangle of pooled outputs of one image, small enough that a slab of the x under it stays in
// L1.
template <typename T>
struct WeightPlan {
  Footprint<T> footprint;
  int64_t rows, cols;        // pooled outputs of a tile
  int64_t in_rows, in_cols;  // of x under it
  int64_t down, across;      // tiles of an image
  int64_t tile_size;         // numbers of a slab of x under a tile
  int64_t batch;             // tiles whose lists exist at once
  int64_t chunk;             // output channels whose lists exist at once

  explicit WeightPlan(const ConvPoolShape& s) : footprint(s, false) {
    const int64_t limit = kTileBytes / sizeof(T) / footprint.slab;
    cols = smaller(s.pooled.w, kTileColumns);
    while (cols > 1 && extent(cols, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w) *
                               extent(1, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h) >
                           limit / 2)
      --cols;
    across = ceil_div(s.pooled.w, cols);
    cols = ceil_div(s.pooled.w, across);
    in_cols = extent(cols, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w);
    rows = 1;
    while (rows < s.pooled.h && (rows + 1) * cols <= kTileMaxWindows &&
           extent(rows + 1, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h) * in_cols <= limit)
      ++rows;
    down = ceil_div(s.pooled.h, rows);
    rows = ceil_div(s.pooled.h, down);
    in_rows = extent(rows, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h);
    // The last row of a footprint may be read up to a whole vector beyond its end.
    tile_size = round_up(in_rows * in_cols * footprint.slab + kLanesOf<T>, kLanesOf<T>);
    const int64_t tile_windows = rows * cols;
    batch = larger(1, smaller(kTileMaxWindows / tile_windows, kTileBytes / (tile_size * sizeof(T))));
    chunk = smaller(s.group_outputs(), kListedOutputs);
  }

  // A whole vector may be written behind the last entry.
  int64_t list_capacity() const { return round_up(batch * rows * cols + kLanesOf<T>, 16); }
  // Of one output channel: its footprint in every slab, then its bias.
  int64_t partial_stride() const { return footprint.slabs * footprint.dense_size() + kLanesOf<T>; }
};

// Pooled outputs [top, bottom) x [left, right) of image n.
struct Tile {
  int64_t n, top, bottom, left, right;
};

template <typename T>
Tile tile_of(const ConvPoolShape& s, const WeightPlan<T>& plan, int64_t unit) {
  const int64_t n = unit / (plan.down * plan.across), place = unit % (plan.down * plan.across);
  const int64_t top = place / plan.across * plan.rows, left = place % plan.across * plan.cols;
  return {n, top, smaller(top + plan.rows, s.pooled.h), left, smaller(left + plan.cols, s.pooled.w)};
}

// One list for each of some channels, `capacity` apart.
template <typename T>
struct LiveLists {
  T* values;
  int32_t* offsets;
  int64_t* counts;
  int64_t capacity;
};

// Calls row(at, from) for each row of a tile: where its first window of channel `first` stands in grad_y and
// code, and in the x under the tile, which begins at `base`.
template <typename T, typename Row>
CNNRNN_INLINE void for_each_row(const ConvPoolShape& s, const WeightPlan<T>& plan, const Tile& tile,
                                int64_t first, int64_t base, const Row& row) {
  const int64_t plane = tile.n * s.outputs * s.windows() + first * (s.channels_last ? 1 : s.windows());
  const int64_t down = s.step.h * s.stride.h * plan.in_cols * plan.footprint.slab;
  for (int64_t py = tile.top; py < tile.bottom; ++py)
    row(plane + (py * s.pooled.w + tile.left) * (s.channels_last ? s.outputs : 1),
        static_cast<int32_t>(base + (py - tile.top) * down));
}

#if defined(__AVX512F__)
// delta of so many positions fits one register.
constexpr int64_t kVectorPositions = kLanes;

inline void list_in_vectors(const ConvPoolShape& s, const WeightPlan<float>& plan, const Tile& tile,
                            int64_t first, int64_t outputs, int64_t base, const float* grad_y,
                            const uint8_t* code, const int32_t* delta, const LiveLists<float>& lists) {
  const int32_t right = static_cast<int32_t>(s.step.w * s.stride.w * plan.footprint.slab);
  const __m512i places = _mm512_loadu_si512(delta);
  const __m512i apart = _mm512_mullo_epi32(
      _mm512_set1_epi32(right), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  const __m512i positions = _mm512_set1_epi32(static_cast<int>(s.positions()));
  // n windows, the first at `from` in x.
  const auto append = [&](int64_t k, vf grad, vi codes, int64_t n, int32_t from) {
    const __m512i at = reinterpret_cast<__m512i>(codes);
    const __mmask16 exist = static_cast<__mmask16>((1u << n) - 1);
    const __mmask16 alive = _mm512_mask_cmplt_epi32_mask(exist, at, positions);
    const __m512i offset = _mm512_add_epi32(_mm512_add_epi32(_mm512_set1_epi32(from), apart),
                                            _mm512_permutexvar_epi32(at, places));
    const int64_t to = k * lists.capacity + lists.counts[k];
    storeu(lists.values + to, _mm512_maskz_compress_ps(alive, grad));
    _mm512_storeu_si512(lists.offsets + to, _mm512_maskz_compress_epi32(alive, offset));
    lists.counts[k] += __builtin_popcount(alive);
  };
  const int64_t width = tile.right - tile.left, total = s.batch * s.outputs * s.windows();
  const auto codes_at = [&](int64_t at, int64_t n) {  // what is read beyond n is not used
    alignas(16) uint8_t copy[kLanes] = {};
    const uint8_t* from = code + at;
    if (total - at < kLanes) from = static_cast<uint8_t*>(__builtin_memcpy(copy, from, n));
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(bytes));
  };
  if (!s.channels_last) {
    constexpr int64_t kAhead = 2;  // channels: they lie too far apart for the hardware to foresee
    for (int64_t k = 0; k < outputs; ++k)
      for_each_row(s, plan, tile, first + k, base, [&](int64_t row, int32_t from) {
        for (int64_t x = 0; x < width; x += kLanes) {
          const int64_t n = smaller(kLanes, width - x), at = row + x;
          __builtin_prefetch(grad_y + at + kAhead * s.windows());
          __builtin_prefetch(code + at + kAhead * s.windows());
          append(k, load_n(grad_y + at, n), codes_at(at, n), n, from + static_cast<int32_t>(x) * right);
        }
      });
    return;
  }
  for_each_row(s, plan, tile, first, base, [&](int64_t row, int32_t from) {
    for (int64_t x = 0; x < width; x += kLanes)
      for (int64_t k = 0; k < outputs; k += kLanes) {
        const int64_t n = smaller(kLanes, width - x), channels = smaller(kLanes, outputs - k);
        vf grads[kLanes], codes[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t at = row + (x + i) * s.outputs + k;
          grads[i] = i < n ? load_n(grad_y + at, channels) : vf{};
          codes[i] = i < n ? reinterpret_cast<vf>(codes_at(at, channels)) : vf{};
        }
        transpose<float>(grads), transpose<float>(codes);
        for (int64_t i = 0; i < channels; ++i)
          append(k + i, grads[i], reinterpret_cast<vi>(codes[i]), n, from + static_cast<int32_t>(x) * right);
      }
  });
}
#endif

// Adds a tile's to the lists of channels [first, first + outputs).
template <typename T>
void list_live(const ConvPoolShape& s, const WeightPlan<T>& plan, const Tile& tile, int64_t first,
               int64_t outputs, int64_t base, const T* grad_y, const uint8_t* code, const int32_t* delta,
               const LiveLists<T>& lists) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float))
    if (s.positions() <= kVectorPositions)
      return list_in_vectors(s, plan, tile, first, outputs, base, grad_y, code, delta, lists);
#endif
  const int64_t window_stride = s.channels_last ? s.outputs : 1;
  const int32_t right = static_cast<int32_t>(s.step.w * s.stride.w * plan.footprint.slab);
  for (int64_t k = 0; k < outputs; ++k) {
    T* value = lists.values + k * lists.capacity;
    int32_t* offset = lists.offsets + k * lists.capacity;
    int64_t live = lists.counts[k];
    for_each_row(s, plan, tile, first, base, [&](int64_t row, int32_t from) {
      int64_t at = row + k * (s.channels_last ? 1 : s.windows());
      for (int64_t px = tile.left; px < tile.right; ++px, at += window_stride, from += right) {
        value[live] = grad_y[at];
        offset[live] = from + delta[code[at]];
        live += code[at] < s.positions();
      }
    });
    lists.counts[k] = live;
  }
}

}  // namespace
