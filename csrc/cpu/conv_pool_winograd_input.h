// Winograd forward: how a call is cut up, and phase 1, the input transform (conv_pool_winograd.h has the
// whole). E: outputs of the convolution along a tile's edge.
#pragma once

#include "conv_pool_common.h"
#include "conv_pool_winograd_transform.h"
#include "transpose.h"

namespace {

constexpr int kTileVectors = kVectorRegisters == 32 ? 4 : 2;
constexpr int kPanelRows = 6;                           // outputs of a register tile
constexpr int64_t kPanelTiles = kTileVectors * kLanes;  // tiles of a register tile
constexpr int64_t kSpread = 16;  // floats: places that are a power of 2 apart would share cache sets

// What the plan asks of whoever computes the products: here multiply-adds of vectors, in
// conv_pool_winograd_tiles.h tile registers.
struct OnVectors {
  using Value = float;                                  // of V
  struct Registers {};                                  // held while products are computed
  static constexpr int64_t kPanelOutputs = kPanelRows;  // at most, as even as can be
  static constexpr int64_t kBlockOutputs = 4 * kPanelOutputs;
  static int64_t first_output(int64_t outputs, int64_t panels, int64_t p) { return outputs * p / panels; }
  // Output panels of phase 2 at a time: their M stays in cache. Tiles that share a pass over U.
  static int64_t block_panels(int64_t) { return kBlockOutputs / kPanelOutputs; }
  static int64_t group_tiles(int64_t) { return 64; }
  // Values of V between places.
  static int64_t v_stride(int64_t channels) {
    return round_up(channels * kPanelTiles + kLanes, kSpread) + kSpread;
  }
};

template <int E, typename Product = OnVectors>
struct WinogradPlan {
  Pair outputs;                   // of one tile after the pool
  Pair tiles;                     // of an image
  bool hangs_right, hangs_below;  // the last windows of a row or column reach beyond the map (ceil_mode)
  int64_t total;                  // tiles of the batch
  int64_t panels;                 // of tiles in a group, each with a V and an M of its own
  int64_t output_panels;
  int64_t block;               // output panels of phase 2 at a time
  int64_t v_stride, m_stride;  // between places in V and M
  int64_t stage_stride;        // of a row of staged outputs

  explicit WinogradPlan(const ConvPoolShape& s) {
    outputs = {E / s.window.h, E / s.window.w};
    tiles = {ceil_div(s.pooled.h, outputs.h), ceil_div(s.pooled.w, outputs.w)};
    hangs_right = s.window.w * s.pooled.w > s.conv.w;
    hangs_below = s.window.h * s.pooled.h > s.conv.h;
    total = s.batch * tiles.h * tiles.w;
    panels = larger(1, smaller(Product::group_tiles(s.channels) / kPanelTiles, ceil_div(total, kPanelTiles)));
    output_panels = ceil_div(s.outputs, Product::kPanelOutputs);
    block = smaller(Product::block_panels(s.channels), output_panels);
    v_stride = Product::v_stride(s.channels);
    m_stride = block_outputs() * kPanelTiles + kSpread;
    stage_stride = outputs.w * group() + kLanes;
  }

  int64_t group() const { return panels * kPanelTiles; }
  int64_t block_outputs() const { return block * Product::kPanelOutputs; }
  // Outputs [first(p), first(p + 1)) are output panel p.
  int64_t first_output(const ConvPoolShape& s, int64_t p) const {
    return Product::first_output(s.outputs, output_panels, p);
  }
  int64_t v_size() const { return kPlacesOf<E> * v_stride; }  // of one panel
  int64_t m_size() const { return kPlacesOf<E> * m_stride; }
  int64_t stage_size() const { return block_outputs() * outputs.h * stage_stride; }
  // Channels last alone: pixels of a panel, and numbers under transposition on their way in and out.
  int64_t pixels(const ConvPoolShape& s) const { return s.channels_last ? kPanelTiles * kPlacesOf<E> : 0; }
  int64_t turned_size(const ConvPoolShape& s) const {
    return s.channels_last ? larger(kPlacesOf<E> * kLanes * kLanes, stage_stride * turned_stride()) : 0;
  }
  int64_t turned_stride() const { return round_up(block_outputs(), kLanes); }
};

// Neighbouring tiles in one row of tiles.
struct TileRun {
  int64_t image, row, column;  // of the first
  int64_t tile, count;         // where they stand in their panel or group
};

// Up to kLanes tiles of a run, as the input transform takes them from an image in NCHW order.
template <int E>
struct TileVector {
  int64_t tile, image;
  int64_t rows[E + 2];            // where the first tile's input rows begin in a plane; for `zero_rows`
  bool zero_rows[E + 2];          // above or below the image
  bool at_edge;                   // whether any column lies beside the image
  int32_t inside[E + 2][kLanes];  // bits to keep of each column of each tile
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
template <int E>
int64_t tile_vectors(const ConvPoolShape& s, const TileRun* runs, int64_t count, TileVector<E>* vectors) {
  int64_t found = 0;
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t t = 0; t < runs[r].count; t += kLanes) {
      TileVector<E>& vector = vectors[found++];
      vector.tile = runs[r].tile + t, vector.image = runs[r].image;
      const int64_t left = E * (runs[r].column + t) - s.padding.w, top = E * runs[r].row - s.padding.h;
      vector.at_edge = false;
      for (int64_t i = 0; i < E + 2; ++i) {
        vector.zero_rows[i] = top + i < 0 || top + i >= s.input.h;
        vector.rows[i] = (top + i) * s.input.w + left;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t column = left + E * lane + i;
          const bool inside = column >= 0 && column < s.input.w;
          vector.inside[i][lane] = inside ? -1 : 0;
          vector.at_edge |= !inside;
        }
      }
    }
  }
  return found;
}

// Columns 0 to E - 1 of kLanes tiles side by side in a row.
template <int E>
CNNRNN_INLINE void columns_of_tiles(const float* row, vf* columns) {
  const vf a = loadu(row), b = loadu(row + kLanes);
  const vf even = every_other<float, 0>(a, b), odd = every_other<float, 1>(a, b);
  if constexpr (E == 2) {
    columns[0] = even, columns[1] = odd;
  } else {
    const vf c = loadu(row + 2 * kLanes), d = loadu(row + 3 * kLanes);
    const vf even2 = every_other<float, 0>(c, d), odd2 = every_other<float, 1>(c, d);
    columns[0] = every_other<float, 0>(even, even2), columns[1] = every_other<float, 0>(odd, odd2);
    columns[2] = every_other<float, 1>(even, even2), columns[3] = every_other<float, 1>(odd, odd2);
  }
}

// The first R rows and C columns of a vector's tiles, from plane `plane` of x, which ends at `end`. What a
// row reads beside the image is masked; only beyond x itself must it not read.
template <int E, int R, int C>
CNNRNN_INLINE void load_tiles(const float* x, const float* end, const float* plane,
                              const TileVector<E>& vector, vf (&d)[R][C]) {
  constexpr int64_t kReads = E * (kLanes + 1);
  static constexpr float zeros[kReads] = {};
  float copy[kReads];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const float* row = vector.zero_rows[r] ? zeros : plane + vector.rows[r];
    if (!vector.zero_rows[r] && (row < x || row > end - kReads)) {
      for (int64_t j = 0; j < kReads; ++j) copy[j] = row + j >= x && row + j < end ? row[j] : 0;
      row = copy;
    }
    columns_of_tiles<E>(row, d[r]);
    if constexpr (C > E) {  // the first two columns of the tile to the right
      vf next[E];
      columns_of_tiles<E>(row + E, next);
      d[r][E] = next[0], d[r][E + 1] = next[1];
    }
  }
  if (!vector.at_edge) return;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 6
    for (int j = 0; j < C; ++j)
      d[r][j] = reinterpret_cast<vf>(reinterpret_cast<vi>(d[r][j]) & loadu(vector.inside[j]));
}

// Phase 1, NCHW, of channels [begin, end). The last lanes of a vector may belong to no tile of its run: what
// they write is written again later, by the next vector or channel, or lies in the gap between places.
template <int E>
void transform_planes(const ConvPoolShape& s, const float* x, const TileVector<E>* vectors, int64_t count,
                      int64_t begin, int64_t end, float* v, int64_t v_stride) {
  constexpr int64_t kAhead = 2;  // channels: their rows lie too far apart for the hardware to foresee
  const int64_t size = s.input.h * s.input.w;
  const float* x_end = x + s.batch * s.channels * size;
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const float* plane = x + (vectors[i].image * s.channels + c) * size;
      if (c + kAhead < s.channels) {
#pragma GCC unroll 6
        for (int r = 0; r < E + 2; ++r) __builtin_prefetch(plane + vectors[i].rows[r] + kAhead * size);
      }
      vf d[E + 2][E + 2];
      load_tiles<E>(x, x_end, plane, vectors[i], d);
      transform_input<E>(d, v + (c - begin) * kPanelTiles + vectors[i].tile, v_stride);
    }
  }
}

// Where the first RxR pixels of each tile of some runs stand in a channels-last x; -1 in the padding.
template <int E, int R>
void tile_pixels(const ConvPoolShape& s, const TileRun* runs, int64_t count, int64_t* pixels) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t t = 0; t < runs[r].count; ++t)
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = 0; j < R; ++j) {
          const int64_t row = E * runs[r].row - s.padding.h + i;
          const int64_t column = E * (runs[r].column + t) - s.padding.w + j;
          const bool inside = row >= 0 && row < s.input.h && column >= 0 && column < s.input.w;
          *pixels++ = inside ? ((runs[r].image * s.input.h + row) * s.input.w + column) * s.channels : -1;
        }
}

// RxR pixels, `channels` channels from c on. last: where a vector may begin.
template <int R>
CNNRNN_INLINE void load_pixels(const float* x, const float* last, const int64_t* pixels, int64_t c,
                               int64_t channels, vf (&d)[R][R]) {
  // The corners tell for all.
  if (pixels[0] >= 0 && pixels[R * R - 1] >= 0 && x + pixels[R * R - 1] + c <= last) {
#pragma GCC unroll 36
    for (int i = 0; i < R * R; ++i) d[i / R][i % R] = loadu(x + pixels[i] + c);
    return;
  }
#pragma GCC unroll 36
  for (int i = 0; i < R * R; ++i) {
    const float* at = x + pixels[i] + c;
    d[i / R][i % R] = pixels[i] < 0 ? vf{} : at <= last ? loadu(at) : load_n(at, channels);
  }
}

// Phase 1, channels last, of channels [begin, end): kLanes tiles at a time, one after another in vectors of
// channels, then transposed. What follows the last tile in its vector is what stood there before. staged:
// [places][kLanes][kLanes].
template <int E>
void transform_pixels(const ConvPoolShape& s, const float* x, const int64_t* pixels, int64_t count,
                      int64_t begin, int64_t end, float* staged, float* v, int64_t v_stride) {
  const float* last = x + s.batch * s.channels * s.input.h * s.input.w - kLanes;
  for (int64_t t = 0; t < count; t += kLanes) {
    for (int64_t c = begin; c < end; c += kLanes) {
      const int64_t channels = smaller(kLanes, end - c);
      for (int64_t lane = 0; lane < smaller(kLanes, count - t); ++lane) {
        const int64_t* of_tile = pixels + (t + lane) * kPlacesOf<E>;
        if (t + lane + kLanes < count) {  // the pixels that the next vector adds
#pragma GCC unroll 36
          for (int i = 0; i < kPlacesOf<E>; ++i)
            if (i % (E + 2) > 1) __builtin_prefetch(x + of_tile[kLanes * kPlacesOf<E> + i] + c);
        }
        vf d[E + 2][E + 2];
        load_pixels<E + 2>(x, last, of_tile, c, channels, d);
        transform_input<E>(d, staged + lane * kLanes, kLanes * kLanes);
      }
      for (int64_t p = 0; p < kPlacesOf<E>; ++p) {
        vf block[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) block[i] = loadu(staged + (p * kLanes + i) * kLanes);
        transpose<float>(block);
        float* to = v + p * v_stride + (c - begin) * kPanelTiles + t;
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < channels) storeu(to + i * kPanelTiles, block[i]);
      }
    }
  }
}

}  // namespace
