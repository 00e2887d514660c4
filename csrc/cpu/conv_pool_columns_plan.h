// conv_pool with pixels as the columns of tiles: how a call is cut up, and the weights as tiles
// (conv_pool_columns.h has the whole).
#pragma once

#include "conv_pool_tiles_pack.h"

namespace {

constexpr int64_t kColumnsPanel = 8;                // tiles of outputs that share the pixels' copies
constexpr int64_t kColumnsOutputs = 2 * kTileSide;  // that share a map
constexpr int64_t kColumnsBytes = 448 << 10;        // of a strip: its input, its map, its windows
constexpr int64_t kBlockTiles = 4;                  // tiles of pixels of a block, where it is not a strip

// A product of tiles: which of A of a tile of outputs, and how many halves of B after the first of a tile of
// pixels; -1: the one before.
struct TileProduct {
  int32_t a, b;
};

// How one call is cut up. Rows and columns of the map fall into the phases of the pool's step: a tile of
// pixels is 16 of one row and one phase, those at one position of windows side by side. What they meet at a
// tap lies side by side too, once the columns of the input are taken apart modulo step x stride. Padding and
// the pool's margin are stored as zeros.
template <int P>
struct ColumnsPlan {
  // A column of B: values under a row of the kernel, two by two, row after row. stacked: parts of a value are
  // in one column, smallest first; else each in a plane of its own.
  bool stacked;
  int64_t planes, entries, pairs;  // pairs: of entries, of a row
  int64_t steps;                   // tiles of a plane under the kernel
  int64_t modulus;
  Pair phases, reach;          // reach: of a window, in windows, beyond its own step
  int64_t of_row;              // tiles of a row of one phase of a strip
  int64_t in_width, in_count;  // of a row of the input modulo `modulus`: its pitch, and what of it is filled
  bool bordered;               // some window hangs over the map
  bool apart;                  // no window does, nor shares pixels with another
  int64_t panel;               // outputs
  int64_t rows, strips;        // pooled rows of a strip, strips one below the other
  int64_t columns, across;     // windows of a row of a strip, strips side by side: more than one of long rows
  int64_t map_rows, conv_rows;           // of a strip: rows of a phase, rows of the map that windows cover
  int64_t in_rows;                       // of a strip
  int64_t plane, column;                 // halves of B: of the pixels of a tile in all rows of a strip
  int64_t block_rows, block_columns;     // of a block of the map, of each phase: rows, tiles
  int64_t pitch, map_output, map_phase;  // of a block, in floats
  int64_t windows;                       // of a strip, and what a load reaches beyond

  explicit ColumnsPlan(const ConvPoolShape& s) {
    const int64_t taps = s.channels * s.kernel.w;
    stacked = P > 1 && s.kernel.h * ceil_div(P * taps, 2) <= kTileSide;
    planes = stacked ? 1 : P;
    entries = stacked ? P * taps : taps;
    pairs = ceil_div(entries, 2);
    steps = ceil_div(s.kernel.h * pairs, kTileSide);
    panel = round_up(ceil_div(s.outputs, ceil_div(s.outputs, kColumnsPanel * kTileSide)), kTileSide);
    modulus = s.step.w * s.stride.w;
    phases = {smaller(s.window.h, s.step.h), smaller(s.window.w, s.step.w)};
    reach = {(s.window.h - 1) / s.step.h, (s.window.w - 1) / s.step.w};
    bordered = s.margin.h > 0 || s.margin.w > 0 || (s.pooled.h - 1) * s.step.h + s.window.h > s.conv.h ||
               (s.pooled.w - 1) * s.step.w + s.window.w > s.conv.w;
    apart = reach.h == 0 && reach.w == 0 && !bordered;
    // As much of an image as stays in cache, cut evenly.
    const auto fits = [&](int64_t rows, int64_t columns) {
      take_strip(s, rows, columns);
      return larger(b_halves() * 2, larger(map_floats(), kColumnsOutputs * windows) * 4) <= kColumnsBytes;
    };
    strips = across = 1;
    while (!fits(1, ceil_div(s.pooled.w, across)) && columns > kTileSide) ++across;
    while (across == 1 && strips < s.pooled.h && !fits(ceil_div(s.pooled.h, strips), s.pooled.w)) ++strips;
    if (across > 1) strips = s.pooled.h;
    // A few strips more leave no thread idle for long.
    constexpr int64_t kFewUnits = 8;
    while (s.batch * strips < kFewUnits && across == 1 && 2 * strips <= s.pooled.h) strips *= 2;
    take_strip(s, ceil_div(s.pooled.h, strips), ceil_div(s.pooled.w, across));
    strips = ceil_div(s.pooled.h, rows);
    if (across == 1) return;
    columns = of_row * kTileSide - reach.w;  // whole tiles
    across = ceil_div(s.pooled.w, columns);
  }

  void take_strip(const ConvPoolShape& s, int64_t count, int64_t width) {
    rows = count, columns = width;
    of_row = ceil_div(columns + reach.w, kTileSide);
    const int64_t beyond = ((phases.w - 1) * s.stride.w + (s.kernel.w - 1) * s.dilation.w) / modulus;
    in_width = of_row * kTileSide + beyond;
    in_count = across > 1 ? in_width : columns + reach.w + beyond;
    map_rows = count + reach.h;
    conv_rows = (count - 1) * s.step.h + s.window.h;
    in_rows = (conv_rows - 1) * s.stride.h + s.kernel.h;
    plane = odd_lines((in_rows * pairs + kTileSide) * kTileDepth);
    column = planes * plane;
    block_rows = apart ? smaller(larger(kBlockTiles / (phases.h * phases.w), 1), count) : map_rows;
    block_columns = apart ? 1 : of_row;
    pitch = block_columns * kTileSide;
    map_output = apart ? block_rows * pitch : odd_lines(2 * block_rows * pitch) / 2;
    map_phase = kColumnsOutputs * map_output;
    windows = odd_lines(2 * (count * of_row * kTileSide + kTileSide)) / 2;
  }

  // At least so many halves, and an odd number of cache lines: what lies so far apart does not meet in a set.
  static int64_t odd_lines(int64_t halves) { return (ceil_div(halves, kTileDepth) | 1) * kTileDepth; }

  int64_t b_columns() const { return of_row * phases.w; }
  int64_t b_halves() const { return b_columns() * column; }
  int64_t map_floats() const { return phases.h * phases.w * map_phase + 2 * kTileSide; }
  int64_t units(const ConvPoolShape& s) const { return s.batch * strips * across; }
  int64_t a_tiles() const { return P * steps; }
  int64_t tile_size() const { return a_tiles() * kTileValues; }  // halves of the weights of a tile of outputs

  // The products of an output: small ones first.
  static constexpr int64_t most_products(int64_t steps) { return P * (P + 1) / 2 * steps; }
  int64_t fill_products(TileProduct* to) const {
    const TileProduct* const first = to;
    constexpr int64_t kSame = -1;
    const auto w = [&](int64_t group, int64_t step) { return group * steps + step; };
    const auto x = [&](int64_t part, int64_t step) { return part * plane + step * kTileValues; };
    const auto put = [&](int64_t a, int64_t b) {
      *to++ = {static_cast<int32_t>(a), static_cast<int32_t>(b)};
    };
    // Parts x2 x1 x0 one below the other meet w0 w1 w2, then 0 w0 w1, then 0 0 w0.
    for (int64_t shift = 0; stacked && shift < P; ++shift)
      for (int64_t i = 0; i < steps; ++i) put(w(shift, i), x(0, i));
    if (stacked) return to - first;
    for (int64_t i = 0; P == 3 && i < steps; ++i) {
      put(w(2, i), x(0, i)), put(w(1, i), kSame);
      put(kSame, x(1, i)), put(w(0, i), kSame);
      put(kSame, x(2, i));
    }
    for (int64_t i = 0; i < steps; ++i) put(w(0, i), x(0, i));
    return to - first;
  }
};

// weight [K, C, KH, KW] -> for panels [begin, end) of outputs: [tiles of outputs][tiles of A][16][32].
template <int P, typename T>
void columns_pack(const ConvPoolShape& s, const T* weight, bool, float* packed, int64_t begin, int64_t end) {
  const ColumnsPlan<P> plan(s);
  const int64_t of_panel = plan.panel / kTileSide, depth = s.channels * s.kernel.h * s.kernel.w;
  const int64_t taps = s.channels * s.kernel.w,
                last = smaller(end * of_panel, ceil_div(s.outputs, kTileSide));
  for (int64_t tile = begin * of_panel; tile < last; ++tile) {
    Half* const to = reinterpret_cast<Half*>(packed) + tile * plan.tile_size();
    __builtin_memset(to, 0, plan.tile_size() * sizeof(Half));
    for (int64_t k = tile * kTileSide; k < smaller((tile + 1) * kTileSide, s.outputs); ++k) {
      Half* const row = to + k % kTileSide * kTileDepth;
      const auto put = [&](int64_t group, int64_t at, uint32_t part) {  // group: of `steps` tiles
        row[(group * plan.steps + at / kTileDepth) * kTileValues + at % kTileDepth] =
            static_cast<Half>(part >> 16);
      };
      int64_t c = 0, ky = 0, kx = 0;
      for (int64_t d = 0; d < depth; d += kLanes) {
        const int64_t n = smaller(depth - d, kLanes);
        const Parts<P> parts = parts_of<P>(widened(weight + k * depth + d, n));
        for (int64_t i = 0; i < n; ++i) {
          const int64_t at = 2 * ky * plan.pairs + c * s.kernel.w + kx;
          for (int p = 0; p < P; ++p) {
            if (!plan.stacked) put(p, at, parts.of[p][i]);
            for (int shift = 0; plan.stacked && shift + p < P; ++shift)
              put(shift, at + (shift + p) * taps, parts.of[p][i]);
          }
          if (++kx == s.kernel.w) kx = 0, ++ky;
          if (ky == s.kernel.h) ky = 0, ++c;
        }
      }
    }
  }
}

template <int P>
int64_t columns_output_panels(const ConvPoolShape& s) {
  return ceil_div(s.outputs, ColumnsPlan<P>(s).panel);
}
template <int P>
int64_t columns_packed_size(const ConvPoolShape& s) {  // in floats
  return ceil_div(s.outputs, kTileSide) * ColumnsPlan<P>(s).tile_size() / 2;
}
template <int P>
int64_t columns_units(const ConvPoolShape& s) {
  return ColumnsPlan<P>(s).units(s);
}

}  // namespace
