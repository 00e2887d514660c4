// Winograd forward: how a call is cut up, and phase 1, the input transform (conv_pool_winograd.h has the
// whole).
#pragma once

#include "conv_pool_common.h"
#include "conv_pool_winograd_transform.h"
#include "transpose.h"

namespace {

constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kPanelRows = 6;                           // outputs of a register tile
constexpr int64_t kPanelTiles = kTileVectors * kLanes;  // tiles of a register tile
constexpr int64_t kBlockOutputs = 4 * kPanelRows;       // outputs of phase 2: M stays in L2 beside V
constexpr int64_t kBlockTiles = 48;                     // at most, and at least one panel
constexpr int64_t kTransformedBytes = 384 * 1024;       // of V, where a panel leaves the choice
constexpr int64_t kSpread = 16;  // floats: places that are a power of 2 apart would share cache sets

struct WinogradPlan {
  Pair outputs;                   // of one tile after the pool
  Pair tiles;                     // of an image
  bool hangs_right, hangs_below;  // the last windows of a row or column reach beyond the map (ceil_mode)
  int64_t total;                  // tiles of the batch
  int64_t block;                  // tiles of a block
  int64_t output_blocks;
  int64_t weight_stride;       // between outputs in U
  int64_t v_stride, m_stride;  // between places in V and M
  int64_t row_stride;          // of gathered input
  int64_t stage_stride;        // of a row of staged outputs

  explicit WinogradPlan(const ConvPoolShape& s) {
    outputs = {2 / s.window.h, 2 / s.window.w};
    tiles = {ceil_div(s.pooled.h, outputs.h), ceil_div(s.pooled.w, outputs.w)};
    hangs_right = s.window.w == 2 && 2 * s.pooled.w > s.conv.w;
    hangs_below = s.window.h == 2 && 2 * s.pooled.h > s.conv.h;
    total = s.batch * tiles.h * tiles.w;
    const int64_t fits = kTransformedBytes / (kPlaces * s.channels * static_cast<int64_t>(sizeof(float)));
    block = larger(smaller(fits, kBlockTiles) / kPanelTiles, 1) * kPanelTiles;
    output_blocks = ceil_div(s.outputs, kBlockOutputs);
    weight_stride = round_up(s.channels, kLanes);
    v_stride = round_up(s.channels * block + kLanes, kSpread) + kSpread;
    m_stride = kBlockOutputs * block + kSpread;
    row_stride = 2 * (round_up(smaller(block, tiles.w) + 1, kLanes) + kLanes);
    stage_stride = outputs.w * block + kLanes;
  }

  // Outputs [first(b), first(b + 1)) are block b.
  int64_t first_output(const ConvPoolShape& s, int64_t b) const { return s.outputs * b / output_blocks; }
  int64_t stage_size() const { return kBlockOutputs * outputs.h * stage_stride; }
  int64_t gathered_size(const ConvPoolShape& s) const {
    return s.channels_last ? kLanes * block * 4 * row_stride : 0;
  }
  // Vectors in a block: in the worst case one a tile.
  int64_t vectors(const ConvPoolShape& s) const { return s.channels_last ? 0 : block; }
};

// Neighbouring tiles in one row of tiles.
struct TileRun {
  int64_t image, row, column;  // of the first
  int64_t tile, count;         // where they stand in their block
};

// Up to kLanes tiles of a run, as the input transform takes them from an image in NCHW order.
struct TileVector {
  int64_t tile, image;
  int64_t rows[4];            // where the first tile's input rows begin in a plane; for those in `zero_rows`
  bool zero_rows[4];          // above or below the image
  bool at_edge;               // whether any column lies beside the image
  int32_t inside[4][kLanes];  // bits to keep of columns 0 to 3 of each tile
};

// Cuts tiles [first, first + count) of the batch, `tiles` an image, into runs; returns their number.
inline int64_t winograd_runs(Pair tiles, int64_t first, int64_t count, TileRun* runs) {
  const int64_t of_image = tiles.h * tiles.w;
  int64_t found = 0;
  for (int64_t tile = 0; tile < count; ++found) {
    const int64_t image = (first + tile) / of_image, place = (first + tile) % of_image;
    const int64_t row = place / tiles.w, column = place % tiles.w;
    const int64_t length = smaller(tiles.w - column, count - tile);
    runs[found] = {image, row, column, tile, length};
    tile += length;
  }
  return found;
}

// Cuts runs into vectors; returns their number.
inline int64_t tile_vectors(const ConvPoolShape& s, const TileRun* runs, int64_t count, TileVector* vectors) {
  int64_t found = 0;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t t = 0; t < runs[r].count; t += kLanes) {
      TileVector& vector = vectors[found++];
      vector.tile = runs[r].tile + t, vector.image = runs[r].image;
      const int64_t left = 2 * (runs[r].column + t) - s.padding.w, top = 2 * runs[r].row - s.padding.h;
      vector.at_edge = false;
      for (int64_t i = 0; i < 4; ++i) {
        vector.zero_rows[i] = top + i < 0 || top + i >= s.input.h;
        vector.rows[i] = (top + i) * s.input.w + left;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t column = left + 2 * lane + i;
          const bool inside = column >= 0 && column < s.input.w;
          vector.inside[i][lane] = inside ? -1 : 0;
          vector.at_edge |= !inside;
        }
      }
    }
  }
  return found;
}

// The first R rows and C columns of a vector's tiles, from plane `plane` of x, which ends at `end`. What a
// row reads beside the image is masked; only beyond x itself must it not read.
template <int R, int C>
CNNRNN_INLINE void load_tiles(const float* x, const float* end, const float* plane, const TileVector& vector,
                              vf (&d)[R][C]) {
  constexpr int64_t kReads = 2 * kLanes + 2;
  static constexpr float zeros[kReads] = {};
  float copy[kReads];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const float* row = vector.zero_rows[r] ? zeros : plane + vector.rows[r];
    if (!vector.zero_rows[r] && (row < x || row > end - kReads)) {
      for (int64_t j = 0; j < kReads; ++j) copy[j] = row + j >= x && row + j < end ? row[j] : 0;
      row = copy;
    }
    const vf a = loadu(row), b = loadu(row + kLanes);
    d[r][0] = every_other<float, 0>(a, b), d[r][1] = every_other<float, 1>(a, b);
    if constexpr (C == 4) {
      const vf e = loadu(row + 2), f = loadu(row + 2 + kLanes);
      d[r][2] = every_other<float, 0>(e, f), d[r][3] = every_other<float, 1>(e, f);
    }
  }
  if (!vector.at_edge) return;
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < C; ++j)
      d[r][j] = reinterpret_cast<vf>(reinterpret_cast<vi>(d[r][j]) & loadu(vector.inside[j]));
}

// Phase 1, NCHW. The last lanes of a vector may belong to no tile of its run: what they write is written
// again later, by the next vector or channel, or lies in the gap between places.
inline void transform_planes(const ConvPoolShape& s, const WinogradPlan& plan, const float* x,
                             const TileVector* vectors, int64_t count, float* v) {
  constexpr int64_t kAhead = 2;  // channels: their rows lie too far apart for the hardware to foresee
  const int64_t size = s.input.h * s.input.w;
  const float* end = x + s.batch * s.channels * size;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const float* plane = x + (vectors[i].image * s.channels + c) * size;
      if (c + kAhead < s.channels) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) __builtin_prefetch(plane + vectors[i].rows[r] + kAhead * size);
      }
      vf d[4][4];
      load_tiles(x, end, plane, vectors[i], d);
      transform_input(d, v + c * plan.block + vectors[i].tile, plan.v_stride);
    }
  }
}

// Input rows of a run of a channels-last image, zeros where the padding is: channels [c, c + kLanes) to
// [channel][4][row_stride], even and odd columns apart; channels `distance` apart.
inline void gather_input(const ConvPoolShape& s, const WinogradPlan& plan, const float* x, const TileRun& run,
                         int64_t c, float* to, int64_t distance) {
  const int64_t width = 2 * run.count + 2, left = 2 * run.column - s.padding.w;
  const int64_t from = smaller(larger(-left, 0), width);
  const int64_t until = larger(smaller(s.input.w - left, width), from);
  const int64_t channels = smaller(kLanes, s.channels - c);
  for (int64_t i = 0; i < 4; ++i, to += plan.row_stride) {
    const int64_t y = 2 * run.row - s.padding.h + i;
    const bool outside = y < 0 || y >= s.input.h;
    const int64_t begin = outside ? width : from, end = outside ? width : until;
    for (int64_t parity = 0; parity < 2; ++parity) {
      float* half = to + parity * (plan.row_stride / 2);
      const int64_t first = (begin + 1 - parity) / 2, last = (end + 1 - parity) / 2;
      for (int64_t k = 0; k < channels; ++k) {
        for (int64_t j = 0; j < first; ++j) half[k * distance + j] = 0;
        for (int64_t j = last; j < width / 2; ++j) half[k * distance + j] = 0;
      }
      if (first >= last) continue;
      const int64_t pixel = (run.image * s.input.h + y) * s.input.w + left + 2 * first + parity;
      transpose(
          x + pixel * s.channels + c, last - first, channels, 2 * s.channels,
          [&](int64_t k, int64_t j, vf v, int64_t n) { store_n(half + k * distance + first + j, v, n); });
    }
  }
}

// Phase 1, channels last: as transform_planes.
inline void transform_pixels(const ConvPoolShape& s, const WinogradPlan& plan, const float* x,
                             const TileRun* runs, int64_t count, float* gathered, float* v) {
  const int64_t of_run = 4 * plan.row_stride, distance = count * of_run;
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    for (int64_t r = 0; r < count; ++r) gather_input(s, plan, x, runs[r], c, gathered + r * of_run, distance);
    for (int64_t k = 0; k < smaller(kLanes, s.channels - c); ++k) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t t = 0; t < runs[r].count; t += kLanes) {
          const float* even = gathered + k * distance + r * of_run + t;
          vf d[4][4];
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            const float *row = even + i * plan.row_stride, *odd = row + plan.row_stride / 2;
            d[i][0] = loadu(row), d[i][1] = loadu(odd), d[i][2] = loadu(row + 1), d[i][3] = loadu(odd + 1);
          }
          transform_input(d, v + (c + k) * plan.block + runs[r].tile + t, plan.v_stride);
        }
      }
    }
  }
}

}  // namespace
