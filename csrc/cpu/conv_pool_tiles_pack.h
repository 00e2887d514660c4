// conv_pool on tile registers: how a call is cut up, and the weights as tiles (conv_pool_tiles.h has the
// whole).
#pragma once

#include "conv_pool_common.h"
#include "split.h"

namespace {

constexpr int kTilePanel = 2;  // tiles of outputs that pass over the pixels together
constexpr int64_t kPanelOutputs = kTilePanel * kTileSide;
constexpr int64_t kStripMapBytes = 96 << 10, kStripInputBytes = 768 << 10;      // of the second-level cache
constexpr int64_t kAcrossMapBytes = 192 << 10, kAcrossInputBytes = 2560 << 10;  // of 16 images
constexpr int64_t kMostTaps = 64;                                               // of a kernel
constexpr int64_t kMostSteps = 16;  // of bfloat16: so many of a panel of B stay in the first-level cache

// How one call is cut up. Values under one row of the kernel make a run, or under one tap if it is dilated.
// A unit of work is a strip of one image, or with s.across the maps of 16 images.
template <int P>
struct TilePlan {
  int64_t runs, depth, steps;  // of a run: values, and products of 32 of them
  bool by_channels;            // steps go over 32 channels at all taps, then the next; else over runs
  int64_t chunk;               // steps that pass over the pixels together
  int64_t images;              // of a unit
  bool flat;                   // tiles go on from one row of the strip to the next
  int64_t pitch;               // pixels from one row of the map to the next
  int64_t rows, strips;        // pooled rows of a strip, strips of an image
  int64_t conv_rows;           // rows of the map that a strip needs at most
  // Halves of a unit's input: all; from one row, pixel, 32 channels, part to the next; from one row of a tile
  // of A to the next.
  int64_t size, row, pixel, block, part, tile_row;
  int64_t map_tile, map_row;  // floats from one tile of the map to the next, and from one row of it
  int64_t map_size;           // of an image or strip
  int64_t group;              // units that share a pass over the weights

  explicit TilePlan(const ConvPoolShape& s) {
    const bool whole_rows = s.dilation.w == 1;
    const int64_t taps = s.kernel.h * s.kernel.w;
    runs = s.kernel.h * (whole_rows ? 1 : s.kernel.w);
    depth = s.channels * (whole_rows ? s.kernel.w : 1);
    steps = tile_steps(depth);
    by_channels = s.channels % kTileDepth == 0 && taps <= kMostSteps;
    chunk = by_channels ? kMostSteps / taps * taps : kMostSteps;
    if (s.across)
      take_images(s);
    else
      take_strips(s);
  }

  // A tile is one pixel of 16 images: its values lie side by side, 32 channels after 32, and the padding is
  // left out.
  void take_images(const ConvPoolShape& s) {
    images = kTileSide, flat = false, pitch = s.conv.w;
    rows = s.pooled.h, strips = 1;
    conv_rows = smaller(conv_rows_of(s, rows) - s.margin.h, s.conv.h);
    tile_row = kTileDepth, part = kTileValues, pixel = P * part;
    row = s.input.w * pixel, block = s.input.h * row;
    size = tile_steps(s.channels) * block;
    map_tile = kPanelOutputs, map_row = map_size = conv_rows * pitch * kPanelOutputs + kTileSide;
    group = larger(1, smaller(kAcrossInputBytes / (size * 2), 4));
  }

  // A tile is 16 pixels of one image, padded, channels innermost.
  void take_strips(const ConvPoolShape& s) {
    images = 1;
    const int64_t columns = s.input.w + 2 * s.padding.w, apart = round_up(s.conv.w, kTileSide);
    flat = s.stride.h == 1 && s.stride.w == 1 && columns <= apart;
    pitch = flat ? columns : apart;
    pixel = s.channels, row = columns * pixel, block = kTileDepth, tile_row = s.stride.w * pixel;
    const auto in_rows_of = [&](int64_t count) {
      return (conv_rows_of(s, count) - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1;
    };
    const auto fits = [&](int64_t count) {
      return conv_rows_of(s, count) * pitch * kPanelOutputs * 4 <= kStripMapBytes &&
             in_rows_of(count) * row * P * 2 <= kStripInputBytes;
    };
    rows = 1;
    while (rows < s.pooled.h && fits(rows + 1)) ++rows;
    strips = ceil_div(s.pooled.h, rows);
    rows = ceil_div(s.pooled.h, strips);  // even strips
    strips = ceil_div(s.pooled.h, rows);
    conv_rows = conv_rows_of(s, rows);
    // What tiles read beyond the last pixel, and what the last store of a row reaches.
    part = round_up(in_rows_of(rows) * row + 2 * kTileSide * tile_row + depth + 2 * kTileDepth, 32);
    size = P * part;
    map_row = kPanelOutputs, map_tile = kTileSide * map_row, map_size = (tiles(conv_rows) + 1) * map_tile;
    group = larger(1, smaller(kStripInputBytes / (size * 2), 4));
  }

  static int64_t conv_rows_of(const ConvPoolShape& s, int64_t rows) {
    return (rows - 1) * s.step.h + s.window.h;
  }
  int64_t tiles(int64_t conv_rows) const { return ceil_div(conv_rows * pitch * images, kTileSide); }
  int64_t units(const ConvPoolShape& s) const { return ceil_div(s.batch, images) * strips; }
  int64_t out_size(const ConvPoolShape& s) const { return rows * s.pooled.w * kPanelOutputs + kPanelOutputs; }
  static constexpr int64_t step_size() { return P * kTilePanel * kTileValues; }  // halves of B
  int64_t all_steps() const { return runs * steps; }
  int64_t panel_size() const { return all_steps() * step_size(); }
};

template <int P>
int64_t tiles_packed_size(const ConvPoolShape& s) {  // in floats
  const TilePlan<P> plan(s);
  return ceil_div(s.outputs, kPanelOutputs) * plan.panel_size() / 2;
}

// Bits of float32.
CNNRNN_INLINE vf widened(const float* p, int64_t n) { return load_n(p, n); }
CNNRNN_INLINE vf widened(const Half* p, int64_t n) {
  typedef Half Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves{};
  if (n >= kLanes)
    __builtin_memcpy(&halves, p, sizeof(halves));
  else
    for (int64_t i = 0; i < n; ++i) halves[i] = p[i];
  return reinterpret_cast<vf>(__builtin_convertvector(halves, vu) << 16);
}

// The first n columns of `rows` rows that lie `stride` apart, zeros in other lanes; kWhole: 16 by 16. A
// function of its own, as its rows take all registers. Rows of weights are too far apart for the processor to
// foresee what comes `ahead`.
template <bool kWhole, typename T>
__attribute__((noinline)) void turn_block(const T* from, int64_t stride, int64_t ahead, int64_t rows,
                                          int64_t n, float (*to)[kTileSide]) {
  vf block[kLanes];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i, from += stride) {
    block[i] = kWhole ? widened(from, kLanes) : i < rows ? widened(from, n) : vf{};
    __builtin_prefetch(from + ahead);
  }
  transpose<float>(block);
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i)
    if (kWhole || i < n) storeu(to[i], block[i]);
}

// Weights of 16 outputs and up to 32 channels, one vector of outputs for each channel and tap: that of
// channel c and tap t, as they lie in weight, to staged[c * taps + t]. from: the first weight; outputs and
// channels lie of_output and of_channel apart.
template <typename T>
CNNRNN_INLINE void stage_weights(const T* from, int64_t of_output, int64_t of_channel, int64_t outputs,
                                 int64_t channels, int64_t taps, float (*staged)[kTileSide]) {
  // Of one output, weights of all channels lie side by side, unless it is outputs that do within a channel.
  const bool whole = of_channel == taps && of_output != 1;
  const int64_t run = whole ? channels * taps : taps, runs = whole ? 1 : channels;
  for (int64_t r = 0; r < runs; ++r, from += of_channel, staged += run)
    for (int64_t f = 0; f < run; f += kLanes) {
      const int64_t n = smaller(run - f, kLanes);
      if (of_output == 1) {
        storeu(staged[f], widened(from, outputs));
        continue;
      }
      const bool square = n == kLanes && outputs == kLanes;
      (square ? turn_block<true, T> : turn_block<false, T>)(from + f, of_output, run, outputs, n, staged + f);
    }
}

// Pairs of channels, `taps` vectors of 16 outputs apart, to pairs side by side. A function of its own: its
// constants stay in registers.
template <int P>
__attribute__((noinline)) void pair_channels(const float (*staged)[kTileSide], int64_t taps, int64_t channels,
                                             Half* to) {
  for (int64_t c = 0; c < channels; c += 2, staged += 2 * taps, to += kTileDepth) {
    const Parts<P> even = parts_of<P>(loadu(staged[0])), odd = parts_of<P>(loadu(staged[taps]));
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store_words(to + p * kTilePanel * kTileValues, even.of[p] >> 16 | odd.of[p]);
  }
}

// Channels [c0, c0 + 32) of one panel; to_panel: where its first step stands, or would.
template <int P, typename T>
void pack_channels(const ConvPoolShape& s, const TilePlan<P>& plan, const T* weight, bool mirrored,
                   int64_t panel, int64_t c0, Half* to_panel) {
  const int64_t taps = s.kernel.h * s.kernel.w, of_run = taps / plan.runs;
  const int64_t of_output = taps * (mirrored ? 1 : s.channels),
                of_channel = taps * (mirrored ? s.outputs : 1);
  const int64_t channels = smaller(kTileDepth, s.channels - c0);
  alignas(64) float staged[kTileDepth * kMostTaps][kTileSide];
  for (int64_t k = panel * kPanelOutputs; k < smaller((panel + 1) * kPanelOutputs, s.outputs);
       k += kTileSide) {
    const int64_t outputs = smaller(kTileSide, s.outputs - k);
    stage_weights(weight + k * of_output + c0 * of_channel, of_output, of_channel, outputs, channels, taps,
                  staged);
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t tap = mirrored ? taps - 1 - t : t;
      // The run of steps that has the tap, and the depth of channel c0 there.
      const int64_t run = plan.by_channels ? c0 / kTileDepth * taps + tap : tap / of_run * plan.steps;
      const int64_t first = plan.by_channels ? 0 : tap % of_run * s.channels + c0;
      Half* const to_run = to_panel + run * plan.step_size() + k % kPanelOutputs / kTileSide * kTileValues;
      const auto place = [&](uint64_t d) {  // of depth d, for output 0
        return to_run + d / kTileDepth * plan.step_size() + d % kTileDepth / 2 * kTileDepth + d % 2;
      };
      if (s.channels % 2 == 0) {
        for (int64_t c = 0, n; c < channels; c += n) {
          n = smaller(kTileDepth - (first + c) % kTileDepth, channels - c);
          pair_channels<P>(staged + c * taps + t, taps, n, place(first + c));
        }
        continue;
      }
      // Pairs of a run are not pairs of channels: each half goes by itself.
      for (int64_t c = 0; c < channels; ++c) {
        const Parts<P> parts = parts_of<P>(loadu(staged[c * taps + t]));
        for (int p = 0; p < P; ++p)
          for (int64_t i = 0; i < outputs; ++i)
            place(first + c)[p * kTilePanel * kTileValues + 2 * i] = static_cast<Half>(parts.of[p][i] >> 16);
      }
    }
  }
}

// weight [K, C, KH, KW] -> for panels [begin, end) of outputs: [step][P][2][16 pairs][16 outputs][2].
// mirrored: weight is [C, K, KH, KW] and each kernel turned by half a turn.
template <int P, typename T>
void tiles_pack(const ConvPoolShape& s, const T* weight, bool mirrored, float* packed, int64_t begin,
                int64_t end) {
  const TilePlan<P> plan(s);
  for (int64_t panel = begin; panel < end; ++panel) {
    Half* const to_panel = reinterpret_cast<Half*>(packed) + panel * plan.panel_size();
    if ((panel + 1) * kPanelOutputs > s.outputs || plan.depth % kTileDepth)
      __builtin_memset(to_panel, 0, plan.panel_size() * sizeof(Half));
    for (int64_t c0 = 0; c0 < s.channels; c0 += kTileDepth)
      pack_channels<P>(s, plan, weight, mirrored, panel, c0, to_panel);
  }
}

}  // namespace
