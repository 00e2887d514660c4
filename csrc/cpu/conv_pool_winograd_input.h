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
    stage_stride = outputs.w * block + kLanes;
  }

  // Outputs [first(b), first(b + 1)) are block b.
  int64_t first_output(const ConvPoolShape& s, int64_t b) const { return s.outputs * b / output_blocks; }
  int64_t stage_size() const { return kBlockOutputs * outputs.h * stage_stride; }
  // Channels last alone: pixels of a block, and numbers under transposition on their way in and out.
  int64_t pixels(const ConvPoolShape& s) const { return s.channels_last ? block * kPlaces : 0; }
  int64_t turned_size(const ConvPoolShape& s) const {
    return s.channels_last ? larger(kPlaces * kLanes * kLanes, stage_stride * turned_stride()) : 0;
  }
  static int64_t turned_stride() { return round_up(kBlockOutputs, kLanes); }
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

// Where the 16 input pixels of each tile of some runs stand in a channels-last x; -1 in the padding.
inline void tile_pixels(const ConvPoolShape& s, const TileRun* runs, int64_t count, int64_t* pixels) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t)
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          const int64_t row = 2 * runs[r].row - s.padding.h + i;
          const int64_t column = 2 * (runs[r].column + t) - s.padding.w + j;
          const bool inside = row >= 0 && row < s.input.h && column >= 0 && column < s.input.w;
          *pixels++ = inside ? ((runs[r].image * s.input.h + row) * s.input.w + column) * s.channels : -1;
        }
}

// Phase 1, channels last: kLanes tiles at a time, one after another in vectors of channels, then transposed.
// What follows the last tile in its vector is what stood there before. staged: [places][kLanes][kLanes].
inline void transform_pixels(const ConvPoolShape& s, const WinogradPlan& plan, const float* x,
                             const int64_t* pixels, int64_t count, float* staged, float* v) {
  const float* last = x + s.batch * s.channels * s.input.h * s.input.w - kLanes;  // where a vector may begin
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    const int64_t channels = smaller(kLanes, s.channels - c);
    for (int64_t t = 0; t < count; t += kLanes) {
      for (int64_t lane = 0; lane < smaller(kLanes, count - t); ++lane) {
        vf d[4][4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const int64_t pixel = pixels[(t + lane) * kPlaces + 4 * i + j];
            const float* at = x + pixel + c;
            d[i][j] = pixel < 0 ? vf{} : at <= last ? loadu(at) : load_n(at, channels);
          }
        transform_input(d, staged + lane * kLanes, kLanes * kLanes);
      }
      for (int64_t p = 0; p < kPlaces; ++p) {
        vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = loadu(staged + (p * kLanes + i) * kLanes);
        transpose<float>(block);
        float* to = v + p * plan.v_stride + c * plan.block + t;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < channels) storeu(to + i * plan.block, block[i]);
      }
    }
  }
}

}  // namespace
