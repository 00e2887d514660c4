// conv_pool on tile registers: the map from the input of a unit and the weights, both as tiles
// (conv_pool_tiles.h has the whole).
#pragma once

#include "conv_pool_tiles_pack.h"

namespace {

// Halves from where a tile of pixels stands in the input to its tile of A, and from the first tile of B of a
// chunk to that of the step.
struct Step {
  int64_t a, b;
};
// Where a tile of pixels stands: halves of the input, floats of the map.
struct Place {
  int64_t input, map;
};
// Tiles [begin, end) take the same steps: those of the kernel's taps [first, last).
struct Bundle {
  int64_t begin, end;
  Pair first, last;
};
// The tiles of a unit's map.
struct MapTiles {
  const Place* places;
  const Bundle* bundles;
  int64_t bundle_count;
};
// Steps that pass over all pixels, and the first of their tiles of B.
struct Chunk {
  const Step* steps;
  int64_t count;
  const Half* b;
};

// c = row + a b over `steps`, of R x C tiles: pixels, outputs. Tiles of A begin at `first` and `second`,
// their rows lie a_bytes apart, parts a_part halves; those of the sums at c and c_next, rows c_bytes apart.
// row: 16 C values for all pixels; null: what c holds.
template <int P, int R, int C>
void multiply_steps(const Half* first, const Half* second, int64_t a_bytes, int64_t a_part, const Step* at,
                    int64_t steps, const Half* b, const float* row, float* c, float* c_next,
                    int64_t c_bytes) {
  const float* const from = row ? row : c;
  const float* const from_next = row ? row : c_next;
  const int64_t from_bytes = row ? 0 : c_bytes;
  tile_load<0>(from, from_bytes);
  if constexpr (C > 1) tile_load<1>(from + kTileSide, from_bytes);
  if constexpr (R > 1) tile_load<2>(from_next, from_bytes);
  if constexpr (R > 1 && C > 1) tile_load<3>(from_next + kTileSide, from_bytes);
  const auto load_a = [&](const Step& step, int part) {
    tile_load<4>(first + step.a + part * a_part, a_bytes);
    if constexpr (R > 1) tile_load<5>(second + step.a + part * a_part, a_bytes);
  };
  const auto load_b = [&](const Step& step, int part) {
    const Half* from = b + step.b + part * kTilePanel * kTileValues;
    tile_load<6>(from, kTileBytes);
    if constexpr (C > 1) tile_load<7>(from + kTileValues, kTileBytes);
  };
  const auto multiply = [] {
    tile_multiply<0, 4, 6>();
    if constexpr (C > 1) tile_multiply<1, 4, 7>();
    if constexpr (R > 1) tile_multiply<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tile_multiply<3, 5, 7>();
  };
  // Small products first: what is added to a small sum errs little.
  for (const Step* step = at; P == 3 && step < at + steps; ++step) {
    load_a(*step, P - 1), load_b(*step, 0), multiply();
    load_a(*step, 1), multiply();
    load_b(*step, 1), multiply();
    load_a(*step, 0), multiply();
    load_b(*step, P - 1), multiply();
    if ((step - at) % 4 == 3) tiles_stay_awake<4>();
  }
  for (const Step* step = at; step < at + steps; ++step) load_a(*step, 0), load_b(*step, 0), multiply();
  tile_store<0>(c, c_bytes);
  if constexpr (C > 1) tile_store<1>(c + kTileSide, c_bytes);
  if constexpr (R > 1) tile_store<2>(c_next, c_bytes);
  if constexpr (R > 1 && C > 1) tile_store<3>(c_next + kTileSide, c_bytes);
}

// All steps of a panel.
template <int P>
void fill_steps(const ConvPoolShape& s, const TilePlan<P>& plan, Step* steps) {
  const int64_t down = s.dilation.h * plan.row, right = s.dilation.w * plan.pixel;
  int64_t step = 0;
  const auto put = [&](int64_t a) {
    steps[step] = {a, step % plan.chunk * plan.step_size()};
    ++step;
  };
  if (plan.by_channels) {
    for (int64_t block = 0; block < s.channels / kTileDepth; ++block)
      for (int64_t ky = 0; ky < s.kernel.h; ++ky)
        for (int64_t kx = 0; kx < s.kernel.w; ++kx) put(ky * down + kx * right + block * plan.block);
    return;
  }
  const int64_t of_row = plan.runs / s.kernel.h;
  for (int64_t run = 0; run < plan.runs; ++run)
    for (int64_t i = 0; i < plan.steps; ++i) put(run / of_row * down + run % of_row * right + i * kTileDepth);
}

// Along one dimension, the taps [begin, end) that meet the input, not its padding, at one position of the
// map.
struct Taps {
  int64_t begin, end;
  bool operator==(const Taps& other) const { return begin == other.begin && end == other.end; }
};
struct Dimension {
  int64_t input, kernel, stride, padding, dilation, conv, window, step, margin, pooled;

  Taps taps(int64_t at) const {
    const int64_t from = at * stride - padding;
    const int64_t end = smaller(ceil_div(larger(input - from, 0), dilation), kernel);
    return {smaller(ceil_div(larger(-from, 0), dilation), end), end};
  }
  // Whether at each position that a window covers there is such a tap, and for each tap such a position.
  bool all_meet() const {
    uint64_t met = 0;
    for (int64_t i = 0; i < pooled; ++i)
      for (int64_t at = larger(i * step - margin, 0); at < smaller(i * step - margin + window, conv); ++at) {
        const Taps t = taps(at);
        if (t.begin == t.end) return false;
        for (int64_t tap = t.begin; tap < t.end; ++tap) met |= uint64_t{1} << tap;
      }
    return met == (uint64_t{1} << kernel) - 1;
  }
};
inline Dimension vertical(const ConvPoolShape& s) {
  return {s.input.h, s.kernel.h, s.stride.h, s.padding.h, s.dilation.h,
          s.conv.h,  s.window.h, s.step.h,   s.margin.h,  s.pooled.h};
}
inline Dimension horizontal(const ConvPoolShape& s) {
  return {s.input.w, s.kernel.w, s.stride.w, s.padding.w, s.dilation.w,
          s.conv.w,  s.window.w, s.step.w,   s.margin.w,  s.pooled.w};
}

// Room for as many bundles as places.
template <int P>
MapTiles map_tiles(const ConvPoolShape& s, const TilePlan<P>& plan, Place* places, Bundle* bundles) {
  if (plan.images == 1) {
    const int64_t count = plan.tiles(plan.conv_rows), of_row = plan.pitch / kTileSide;
    for (int64_t t = 0; t < count; ++t) {
      const int64_t x = plan.flat ? t : t % of_row, y = plan.flat ? 0 : t / of_row;
      places[t] = {x * kTileSide * plan.tile_row + y * s.stride.h * plan.row, t * plan.map_tile};
    }
    bundles[0] = {0, count, {0, 0}, s.kernel};
    return {places, bundles, 1};
  }
  // Rows and columns go together where the same taps meet the input.
  const Dimension down = vertical(s), right = horizontal(s);
  const auto end_of = [](const Dimension& d, int64_t begin, int64_t count) {
    int64_t end = begin + 1;
    while (end < count && d.taps(end) == d.taps(begin)) ++end;
    return end;
  };
  Place* place = places;
  Bundle* bundle = bundles;
  for (int64_t top = 0, bottom; top < plan.conv_rows; top = bottom) {
    bottom = end_of(down, top, plan.conv_rows);
    for (int64_t left = 0, end; left < s.conv.w; left = end) {
      end = end_of(right, left, s.conv.w);
      const int64_t begin = place - places;
      for (int64_t y = top; y < bottom; ++y)
        for (int64_t x = left; x < end; ++x)
          *place++ = {(y * s.stride.h - s.padding.h) * plan.row + (x * s.stride.w - s.padding.w) * plan.pixel,
                      (y * plan.pitch + x) * plan.map_tile};
      const Taps rows = down.taps(top), columns = right.taps(left);
      *bundle++ = {begin, place - places, {rows.begin, columns.begin}, {rows.end, columns.end}};
    }
  }
  return {places, bundles, bundle - bundles};
}

// The steps of a chunk that a bundle takes.
inline int64_t steps_of(const ConvPoolShape& s, const Chunk& chunk, const Bundle& bundle, Step* to) {
  const Step* const first = to;
  for (const Step* block = chunk.steps; block < chunk.steps + chunk.count; block += s.kernel.h * s.kernel.w)
    for (int64_t ky = bundle.first.h; ky < bundle.last.h; ++ky)
      for (int64_t kx = bundle.first.w; kx < bundle.last.w; ++kx) *to++ = block[ky * s.kernel.w + kx];
  return to - first;
}

// A chunk of steps of the map of a unit, for C tiles of outputs and the first `count` of its pixels. bias:
// null if the map holds the sum of steps before. Of parts each such sum begins at nought and is added
// afterwards: one long sum would lose digits.
template <int P, int C>
void map_steps(const ConvPoolShape& s, const TilePlan<P>& plan, const Half* input, const MapTiles& tiles,
               int64_t count, const Chunk& chunk, const float* bias, float* map) {
  constexpr int64_t kTileMap = kTileSide * kPanelOutputs;
  alignas(64) static constexpr float kZeros[kPanelOutputs] = {};
  alignas(64) float sums[2 * kTileMap];
  const bool apart = P > 1 && !bias;
  const float* const row = apart ? kZeros : bias;
  Step some[kMostSteps];
  for (const Bundle* bundle = tiles.bundles; bundle < tiles.bundles + tiles.bundle_count; ++bundle) {
    // All tiles of a strip take all steps.
    const int64_t steps = plan.images == 1 ? chunk.count : steps_of(s, chunk, *bundle, some);
    const Step* const at = plan.images == 1 ? chunk.steps : some;
    const int64_t end = smaller(bundle->end, count);
    for (int64_t t = bundle->begin; t < end; t += 2) {
      const int64_t now = smaller(end - t, 2);
      const Place first = tiles.places[t], second = tiles.places[t + now - 1];
      float* const to[2] = {map + first.map, map + second.map};
      (now == 2 ? multiply_steps<P, 2, C>
                : multiply_steps<P, 1, C>)(input + first.input, input + second.input, plan.tile_row * 2,
                                           plan.part, at, steps, chunk.b, row, apart ? sums : to[0],
                                           apart ? sums + kTileMap : to[1],
                                           (apart ? kPanelOutputs : plan.map_row) * 4);
      for (int64_t i = 0; apart && i < now * kTileSide; ++i)
        for (int64_t j = 0; j < C * kLanes; j += kLanes) {
          float* const sum = to[i / kTileSide] + i % kTileSide * plan.map_row + j;
          storeu(sum, loadu(sum) + loadu(sums + i * kPanelOutputs + j));
        }
    }
  }
}

}  // namespace
