// conv_pool forward: convolution, bias, ReLU, max and the winner's code, without the map before the pool.
//
// One vector runs over output channels; a tile is kPixels convolution outputs of up to kBlockVectors
// vectors, held in registers over all taps. Where windows of 2 or 4 positions do not overlap, the tile is
// made of whole windows and the pool is an elementwise maximum between its registers; where there is no pool
// (windows of one position) the tile is the output. Other pools go through a buffer that stays in cache.
#pragma once

#include "conv_pool_write.h"

namespace {

constexpr int kBlockVectors = 2;
constexpr int64_t kChain = 32;         // products added up in one go: the sums of such runs are added in turn
constexpr int64_t kTileWindows = 96;   // windows of a strip: y and codes of a block stay in L1
constexpr int64_t kTileSingles = 192;  // the same where a window is one position
constexpr int64_t kStripPixels = 2048;  // convolution outputs of a strip that goes through the buffer

// How one call is cut up. A strip is a run of pooled rows of one image.
template <typename T>
struct ForwardPlan {
  int64_t taps, vectors;                             // of one group
  bool in_registers;                                 // whole windows in one tile
  bool padded;                                       // x is copied into a zero-padded strip first
  int64_t rows, strips;                              // pooled rows of a strip, strips of an image
  int64_t conv_rows;                                 // convolution rows that a strip needs at most
  int64_t in_rows, in_cols;                          // of the padded strip
  int64_t row_stride, pixel_stride, channel_stride;  // of what the taps read

  explicit ForwardPlan(const ConvPoolShape& s) {
    taps = s.group_channels() * s.kernel.h * s.kernel.w;
    vectors = ceil_div(s.group_outputs(), kLanesOf<T>);
    const bool disjoint = s.step.h >= s.window.h && s.step.w >= s.window.w && s.margin.h + s.margin.w == 0;
    in_registers = disjoint && !s.keyed && (s.positions() <= 2 || s.positions() == 4);
    rows = in_registers ? (s.positions() == 1 ? kTileSingles : kTileWindows) / s.pooled.w
                        : kStripPixels / (s.conv.w * s.step.h);
    rows = smaller(larger(rows, 1), s.pooled.h);
    strips = ceil_div(s.pooled.h, rows);
    rows = ceil_div(s.pooled.h, strips);  // even strips
    strips = ceil_div(s.pooled.h, rows);
    conv_rows = (rows - 1) * s.step.h + s.window.h;
    padded = s.padding.h + s.padding.w > 0;
    in_rows = (conv_rows - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1;
    in_cols = s.input.w + 2 * s.padding.w;
    const int64_t height = padded ? in_rows : s.input.h, width = padded ? in_cols : s.input.w;
    pixel_stride = s.channels_last ? s.channels : 1;
    row_stride = width * pixel_stride;
    channel_stride = s.channels_last ? 1 : height * width;
  }

  int64_t packed_vectors() const { return vectors * (taps + 1); }  // of one group: bias, then taps
  int64_t tile_pixels(const ConvPoolShape& s) const {              // offsets of a strip's tiles
    const int64_t count = in_registers ? rows * s.pooled.w * s.positions() : conv_rows * s.conv.w;
    return round_up(count, kPixels) + kPixels;
  }
  int64_t input_size(const ConvPoolShape& s) const { return padded ? s.channels * in_rows * in_cols : 0; }
  int64_t block_lanes() const { return kBlockVectors * kLanesOf<T>; }
  int64_t map_size(const ConvPoolShape& s) const { return in_registers ? 0 : tile_pixels(s) * block_lanes(); }
  int64_t keys_size(const ConvPoolShape& s) const { return s.keyed ? map_size(s) : 0; }
  int64_t out_size(const ConvPoolShape& s) const { return (rows * s.pooled.w + kPixels) * block_lanes(); }
};

template <typename T>
int64_t forward_packed_size(const ConvPoolShape& s) {
  return s.groups * ForwardPlan<T>(s).packed_vectors() * kLanesOf<T>;
}

template <typename T>
int64_t forward_units(const ConvPoolShape& s) {
  return s.batch * ForwardPlan<T>(s).strips;
}

template <typename T>
int64_t forward_scratch_bytes(const ConvPoolShape& s) {
  const ForwardPlan<T> plan(s);
  return carved_bytes(plan.taps, sizeof(int64_t)) + 2 * carved_bytes(plan.tile_pixels(s), sizeof(int64_t)) +
         carved_bytes(plan.input_size(s), sizeof(T)) + carved_bytes(plan.map_size(s), sizeof(T)) +
         carved_bytes(plan.keys_size(s), sizeof(T)) + 2 * carved_bytes(plan.out_size(s), sizeof(T));
}

// weight [K, C/G, KH, KW], bias [K] or null -> per group and block of vectors: bias, then one row a tap.
template <typename T>
void forward_pack(const ConvPoolShape& s, const T* weight, const T* bias, T* packed) {
  const ForwardPlan<T> plan(s);
  const int64_t outputs = s.group_outputs();
  for (int64_t g = 0; g < s.groups; ++g) {
    for (int64_t v = 0; v < plan.vectors; v += kBlockVectors) {
      const int64_t lanes = smaller(kBlockVectors, plan.vectors - v) * kLanesOf<T>;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const int64_t k = v * kLanesOf<T> + lane;
        const bool real = k < outputs;
        const int64_t row = g * outputs + k;
        packed[lane] = real && bias ? bias[row] : T(0);
        const T* w = weight + row * plan.taps;
        for (int64_t t = 0; t < plan.taps; ++t) packed[(t + 1) * lanes + lane] = real ? w[t] : T(0);
      }
      packed += lanes * (plan.taps + 1);
    }
  }
}

// Where tap (c, ky, kx) stands relative to a pixel, in the order of the weights.
template <typename T>
void fill_taps(const ConvPoolShape& s, const ForwardPlan<T>& plan, int64_t* taps) {
  for (int64_t c = 0; c < s.group_channels(); ++c)
    for (int64_t ky = 0; ky < s.kernel.h; ++ky)
      for (int64_t kx = 0; kx < s.kernel.w; ++kx)
        *taps++ = c * plan.channel_stride + ky * s.dilation.h * plan.row_stride +
                  kx * s.dilation.w * plan.pixel_stride;
}

// Where each pixel of a strip's tiles stands, relative to the strip's first convolution row; the first row
// itself is `first` of the map. Returns their count; fills up the last tile.
template <typename T>
int64_t fill_pixels(const ConvPoolShape& s, const ForwardPlan<T>& plan, int64_t first, int64_t pooled_rows,
                    int64_t conv_rows, int64_t* pixels) {
  const int64_t down = s.stride.h * plan.row_stride, right = s.stride.w * plan.pixel_stride;
  int64_t count = 0;
  if (plan.in_registers) {
    for (int64_t py = 0; py < pooled_rows; ++py)
      for (int64_t px = 0; px < s.pooled.w; ++px)
        for (int64_t dy = 0; dy < s.window.h; ++dy)
          for (int64_t dx = 0; dx < s.window.w; ++dx) {
            int64_t y = py * s.step.h + dy, x = px * s.step.w + dx;
            // Beyond the map (ceil_mode) stands the window's first pixel again: a copy never wins.
            if (first + y >= s.conv.h || x >= s.conv.w) y = py * s.step.h, x = px * s.step.w;
            pixels[count++] = y * down + x * right;
          }
  } else {
    for (int64_t y = 0; y < conv_rows; ++y)
      for (int64_t x = 0; x < s.conv.w; ++x) pixels[count++] = y * down + x * right;
  }
  for (int64_t i = 0; i < kPixels; ++i) pixels[count + i] = 0;
  return count;
}

// Copies input rows [first, first + rows) of one image into the strip, zeros where the padding is.
template <typename T>
void pad_input(const ConvPoolShape& s, const ForwardPlan<T>& plan, const T* image, int64_t first,
               int64_t rows, T* strip) {
  const int64_t planes = s.channels_last ? 1 : s.channels, unit = plan.pixel_stride;
  const int64_t left = s.padding.w * unit, middle = s.input.w * unit;
  for (int64_t p = 0; p < planes; ++p) {
    for (int64_t r = 0; r < rows; ++r) {
      T* row = strip + p * plan.channel_stride + r * plan.row_stride;
      const int64_t y = first + r;
      if (y < 0 || y >= s.input.h) {
        __builtin_memset(row, 0, plan.row_stride * sizeof(T));
        continue;
      }
      __builtin_memset(row, 0, left * sizeof(T));
      __builtin_memcpy(row + left, image + (p * s.input.h + y) * middle, middle * sizeof(T));
      __builtin_memset(row + left + middle, 0, left * sizeof(T));
    }
  }
}

// The convolution of kPixels pixels for V vectors of output channels. packed: bias, then one row a tap.
template <typename T, int V>
CNNRNN_INLINE void convolve(const T* base, const int64_t* pixels, const int64_t* taps, int64_t count,
                            const T* packed, Vec<T> (&acc)[kPixels][V]) {
  constexpr int L = kLanesOf<T>;
  const T* at[kPixels];
  Vec<T> total[kPixels][V];  // of the runs so far: a long sum in one chain would lose digits
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) {
    at[p] = base + pixels[p];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[p][v] = loadu(packed + v * L);
  }
  for (int64_t begin = 0;;) {
    const int64_t end = smaller(begin + kChain, count);
    for (int64_t t = begin; t < end; ++t) {
      packed += V * L;
      const int64_t offset = taps[t];
      Vec<T> w[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) w[v] = loadu(packed + v * L);
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p) {
        const Vec<T> x = broadcast(at[p][offset]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[p][v] += x * w[v];
      }
    }
    if (begin > 0) {
#pragma GCC unroll 16
      for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[p][v] += total[p][v];
    }
    if (end == count) return;
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        total[p][v] = acc[p][v];
        acc[p][v] = Vec<T>{};
      }
    }
    begin = end;
  }
}

// One block of V vectors of output channels over a strip: ys and codes [windows, V * L].
template <typename T, int V, bool kCodes>
void forward_block(const ConvPoolShape& s, const ForwardPlan<T>& plan, const T* base, const int64_t* pixels,
                   int64_t count, const int64_t* taps, const T* packed, T* map, T* ys, T* codes) {
  constexpr int L = kLanesOf<T>;
  for (int64_t p = 0; p < count; p += kPixels) {
    Vec<T> acc[kPixels][V];
    convolve<T, V>(base, pixels + p, taps, plan.taps, packed, acc);
    if (!plan.in_registers) {
#pragma GCC unroll 16
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) storeu(map + ((p + i) * V + v) * L, acc[i][v]);
    } else if (s.positions() == 4) {
      pool_in_registers<T, V, 4, kCodes>(s.relu, acc, ys + p / 4 * V * L, codes + p / 4 * V * L);
    } else if (s.positions() == 2) {
      pool_in_registers<T, V, 2, kCodes>(s.relu, acc, ys + p / 2 * V * L, codes + p / 2 * V * L);
    } else {
      pool_in_registers<T, V, 1, kCodes>(s.relu, acc, ys + p * V * L, codes + p * V * L);
    }
  }
}

template <typename T>
void forward(const ConvPoolShape& s, const T* x, const T* packed, T* y, uint8_t* code, T* kept, void* memory,
             int64_t begin, int64_t end) {
  constexpr int L = kLanesOf<T>;
  const ForwardPlan<T> plan(s);
  char* scratch = static_cast<char*>(memory);
  int64_t* taps = carve<int64_t>(scratch, plan.taps);
  int64_t* pixels = carve<int64_t>(scratch, plan.tile_pixels(s));
  T* strip_input = carve<T>(scratch, plan.input_size(s));
  T* map = carve<T>(scratch, plan.map_size(s));
  T* keys = carve<T>(scratch, plan.keys_size(s));
  T* ys = carve<T>(scratch, plan.out_size(s));
  T* codes = carve<T>(scratch, plan.out_size(s));
  fill_taps(s, plan, taps);

  int64_t filled_first = -1, filled_last = -1, count = 0;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t n = unit / plan.strips, row = unit % plan.strips * plan.rows;
    const int64_t rows = smaller(plan.rows, s.pooled.h - row);
    const int64_t first = larger(row * s.step.h - s.margin.h, 0);
    const int64_t last = smaller((row + rows - 1) * s.step.h - s.margin.h + s.window.h, s.conv.h);
    // Strips whose windows all begin in the pool's padding share `first`, not `last`.
    if (first != filled_first || last != filled_last)
      count = fill_pixels(s, plan, first, rows, last - first, pixels);
    filled_first = first, filled_last = last;

    const T* image = x + n * s.channels * s.input.h * s.input.w;
    const T* base = image + first * s.stride.h * plan.row_stride;
    if (plan.padded) {
      const int64_t in_rows =
          smaller((last - first - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1, plan.in_rows);
      pad_input(s, plan, image, first * s.stride.h - s.padding.h, in_rows, strip_input);
      base = strip_input;
    }
    const Strip strip = {n, first, row, rows, s.conv.w};
    const T* weights = packed;
    for (int64_t g = 0; g < s.groups; ++g) {
      const T* group_base = base + g * s.group_channels() * plan.channel_stride;
      for (int64_t v = 0; v < plan.vectors; v += kBlockVectors) {
        const int64_t wide = smaller(kBlockVectors, plan.vectors - v);
        const auto block = code ? (wide == 2 ? forward_block<T, 2, true> : forward_block<T, 1, true>)
                                : (wide == 2 ? forward_block<T, 2, false> : forward_block<T, 1, false>);
        block(s, plan, group_base, pixels, count, taps, weights, map, ys, codes);
        if (!plan.in_registers)
          (wide == 2 ? pool_strip<T, 2> : pool_strip<T, 1>)(s, strip, map, keys, count, ys, codes);
        weights += wide * L * (plan.taps + 1);
        const int64_t k0 = g * s.group_outputs() + v * L;
        const int64_t channels = smaller(wide * L, s.group_outputs() - v * L);
        write_strip(s, strip, ys, codes, wide * L, k0, channels, y, code, kept);
      }
    }
  }
  stores_past_done();
}

}  // namespace
