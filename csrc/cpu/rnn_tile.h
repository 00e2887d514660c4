// The inner loops of the recurrent kernels: a tile of rows x some vectors of columns, all of it in registers,
// and how rows are cut into tiles.
#pragma once

#include "rnn.h"
#include "simd.h"

namespace {

// The accumulators leave room for the smaller side of the tile and one vector of the other.
template <int Vectors>
constexpr int kTileRowsOf = (kVectorRegisters >= 32 ? 24 : 12) / Vectors;
constexpr int kTileRows = kTileRowsOf<4>;

template <typename T>
constexpr int kPanel = 4 * kLanesOf<T>;

// What a tile asks the second-level cache to fetch for tiles to come: a line at every depth, which costs
// nothing beside the multiplications. A step of 0 asks for the same line over and over.
struct Ahead {
  const char* line;
  int64_t step;
};

// acc[:, :] += a[:, k] * b[k, :]
template <typename T, int Rows, int V>
CNNRNN_INLINE void multiply_step(Vec<T> (&acc)[Rows][V], const T* const (&a)[Rows], int64_t k, const T* b) {
  constexpr int L = kLanesOf<T>;
  if constexpr (Rows < V) {
    Vec<T> values[Rows];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) values[r] = broadcast(a[r][k]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec<T> column = in_register(loadu(b + v * L));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) acc[r][v] += values[r] * column;
    }
  } else {
    Vec<T> columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = loadu(b + v * L);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> value = broadcast(a[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += value * columns[v];
    }
  }
}

// acc += A[Rows x depth] * panel[depth x V vectors]; a[r] points at row r.
template <typename T, int Rows, int V>
CNNRNN_INLINE void multiply_rows(Vec<T> (&acc)[Rows][V], const T* const (&a)[Rows], int64_t from, const T* b,
                                 int64_t depth, Ahead ahead) {
  constexpr int L = kLanesOf<T>;
#pragma GCC unroll 1
  for (int64_t k = from; k < from + depth; ++k, b += V * L, ahead.line += ahead.step) {
    __builtin_prefetch(ahead.line, 0, 2);
    multiply_step<T, Rows, V>(acc, a, k, b);
  }
}

// One row does not fill the FMA pipeline with one accumulator for each vector: two sets, even and odd depths.
template <typename T, int V>
CNNRNN_INLINE void multiply_one_row(Vec<T> (&acc)[1][V], const T* const (&a)[1], int64_t from, const T* b,
                                    int64_t depth) {
  constexpr int L = kLanesOf<T>;
  Vec<T> odd[V] = {};
  int64_t k = from;
  for (; k + 2 <= from + depth; k += 2, b += 2 * V * L) {
    const Vec<T> v0 = broadcast(a[0][k]), v1 = broadcast(a[0][k + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      acc[0][v] += v0 * loadu(b + v * L);
      odd[v] += v1 * loadu(b + (V + v) * L);
    }
  }
  for (; k < from + depth; ++k, b += V * L) multiply_step<T, 1, V>(acc, a, k, b);
  for (int v = 0; v < V; ++v) acc[0][v] += odd[v];
}

// product = A * panel, for an A that is contiguous by column, `stride` from depth to depth.
template <typename T, int Rows>
CNNRNN_APART void multiply_columns(Vec<T> (&product)[Rows][4], const T* a, int64_t stride, const T* b,
                                   int64_t depth) {
  constexpr int L = kLanesOf<T>;
  Vec<T> acc[Rows][4];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) acc[r][v] = Vec<T>{};
  for (int64_t k = 0; k < depth; ++k, a += stride, b += 4 * L) {
    Vec<T> values[Rows];
    if constexpr (Rows < 4) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) values[r] = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec<T> column = in_register(loadu(b + v * L));
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) acc[r][v] += values[r] * column;
      }
    } else {
      const Vec<T> b0 = loadu(b), b1 = loadu(b + L), b2 = loadu(b + 2 * L), b3 = loadu(b + 3 * L);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const Vec<T> value = broadcast(a[r]);
        acc[r][0] += value * b0;
        acc[r][1] += value * b1;
        acc[r][2] += value * b2;
        acc[r][3] += value * b3;
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) product[r][v] = acc[r][v];
}

// Tiles of nearly equal height, none above Most: a short last tile would run at half speed.
template <int Most = kTileRows>
CNNRNN_INLINE int64_t tiles_of(int64_t rows) {
  return (rows + Most - 1) / Most;
}

template <int Height, typename F>
CNNRNN_INLINE void run_height(int64_t height, int64_t begin, const F& f) {
  if (height == Height) return f.template run<Height>(begin);
  if constexpr (Height > 1) run_height<Height - 1>(height, begin, f);
}

// Calls f.template run<Rows>(first row) for each tile.
template <int Most = kTileRows, typename F>
CNNRNN_INLINE void for_tiles(int64_t rows, const F& f) {
  const int64_t tiles = tiles_of<Most>(rows), height = rows / tiles, higher = rows % tiles;
  for (int64_t tile = 0, begin = 0; tile < tiles; ++tile) {
    const int64_t now = height + (tile < higher);
    run_height<Most>(now, begin, f);
    begin += now;
  }
}

// An address past the end of a buffer is harmless to ask for.
CNNRNN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
CNNRNN_INLINE void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 2); }

// A band is some tiles that pass over a panel together, block by block of the depth: a block stays in the
// first-level cache for all of them. Blocks are also added up by themselves, which keeps the rounding error
// of long sums down.
constexpr int kBandTiles = 8;
constexpr int64_t kSumBlock = kVectorRegisters >= 32 ? 128 : 192;
template <int V>
constexpr int kBandRows = kBandTiles * kTileRowsOf<V>;

// Sums of a band: nothing is set to zero beforehand.
template <typename T, int V, int Rows = kBandRows<V>>
struct BandSums {
  static constexpr int kRows = Rows;
  Vec<T> of[Rows][V];
};
enum class Into { kSet, kAdd };

template <typename T, int V>
struct BandBlock {
  BandSums<T, V>& sums;
  const T* const* a;  // where each row of A begins
  const T* b;
  int64_t from, depth;
  bool add;

  template <int Rows>
  CNNRNN_APART void run(int64_t row, Ahead ahead) const {
    const T* rows[Rows];
    Vec<T> acc[Rows][V];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      rows[r] = a[row + r];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
    }
    if constexpr (Rows == 1)
      multiply_one_row<T, V>(acc, rows, from, b, depth);
    else
      multiply_rows<T, Rows, V>(acc, rows, from, b, depth, ahead);
    if (add) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums.of[row + r][v] += acc[r][v];
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums.of[row + r][v] = acc[r][v];
    }
  }
};

struct NoPrefetch {
  CNNRNN_INLINE void operator()(int64_t) const {}
};

template <typename T, int V, typename Prefetch>
struct BandTile {
  const BandBlock<T, V>& block;
  const Prefetch& prefetch_row;
  Ahead ahead;

  template <int Rows>
  CNNRNN_INLINE void run(int64_t row) const {
    if (block.from == 0)
      for (int r = 0; r < Rows; ++r) prefetch_row(row + r);
    block.template run<Rows>(row, {ahead.line + row / Rows * kSumBlock * ahead.step, ahead.step});
  }
};

// sums = A * panel, or sums += A * panel. prefetch_row(row) is called tile by tile, ahead of the product:
// what a row reads or writes besides it then arrives from main memory in time.
template <typename T, int V, typename Prefetch = NoPrefetch>
CNNRNN_INLINE void multiply_band(BandSums<T, V>& sums, int64_t rows, const T* const* a, const T* b,
                                 int64_t depth, Into into, const Prefetch& prefetch_row = {}) {
  // The share of one tile in the blocks to come; a single tile leaves them to the hardware, which sees the
  // panel as one stream.
  const bool foresee = rows > kTileRowsOf<V>;
  const int64_t line = foresee ? 64 : 0;
  for (int64_t k = 0; k == 0 || k < depth; k += kSumBlock) {
    const int64_t block = depth - k < kSumBlock ? depth - k : kSumBlock;
    const BandBlock<T, V> f = {sums, a, b + k * V * kLanesOf<T>, k, block, into == Into::kAdd || k > 0};
    for_tiles<kTileRowsOf<V>>(
        rows, BandTile<T, V, Prefetch>{
                  f,
                  prefetch_row,
                  {reinterpret_cast<const char*>(f.b + (foresee ? kSumBlock * V * kLanesOf<T> : 0)), line}});
  }
}

// Tasks of a step: panels x tiles of rows, panel by panel; few rows see many panels. Calls
// f(panel, first row, rows) for bands of tasks [first, last), in falling order if `downward`.
template <int Most, typename F>
CNNRNN_INLINE void for_bands_of_panels(int64_t rows, int64_t first, int64_t last, bool downward, const F& f) {
  if (first >= last) return;
  const int64_t tiles = tiles_of<Most>(rows), panels_begin = first / tiles, panels_last = (last - 1) / tiles;
  for (int64_t i = panels_begin; i <= panels_last; ++i) {
    const int64_t panel = downward ? panels_begin + panels_last - i : i;
    const int64_t begin = first > panel * tiles ? first - panel * tiles : 0;
    const int64_t end = last < (panel + 1) * tiles ? last - panel * tiles : tiles;
    const int64_t bands = (end - begin + kBandTiles - 1) / kBandTiles;
    for (int64_t j = 0; j < bands; ++j) {
      const int64_t band = downward ? bands - 1 - j : j;
      const int64_t row = rows * (begin + (end - begin) * band / bands) / tiles;
      f(panel, row, rows * (begin + (end - begin) * (band + 1) / bands) / tiles - row);
    }
  }
}

// Tasks of a large product: bands of rows x panels, band by band. A band's rows of A stay in the second-level
// cache; the panels come past in the order of their addresses, which the hardware foresees.
template <int V, typename F>
CNNRNN_INLINE void for_panels_of_bands(int64_t rows, int64_t panels, int64_t first, int64_t last,
                                       const F& f) {
  const int64_t bands = tiles_of<kBandRows<V>>(rows);
  for (int64_t task = first; task < last; ++task) {
    const int64_t band = task / panels, row = rows * band / bands;
    f(task % panels, row, rows * (band + 1) / bands - row);
  }
}

CNNRNN_INLINE int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// How many of `lanes` columns beginning at `column` exist.
CNNRNN_INLINE int64_t valid(int64_t columns, int64_t column, int64_t lanes) {
  const int64_t left = columns - column;
  return left < 0 ? 0 : left > lanes ? lanes : left;
}

template <typename T>
CNNRNN_INLINE bool is_reset(const cnnrnn::StateRows<T>& s, int64_t row) {
  return s.reset && row < s.flagged && s.reset[row];
}

template <typename T>
CNNRNN_INLINE const T* state_row(const cnnrnn::StateRows<T>& s, int64_t row) {
  if (is_reset(s, row)) return s.zeros;
  return row < s.carried ? s.before + row * s.before_stride : s.initial + row * s.initial_stride;
}

// Where consecutive rows find their states.
template <typename T>
CNNRNN_INLINE void state_rows(const cnnrnn::StateRows<T>& s, int64_t row, int64_t count, const T** rows) {
  if (!s.reset && row + count <= s.carried) {
    for (int64_t r = 0; r < count; ++r) rows[r] = s.before + (row + r) * s.before_stride;
  } else {
    for (int64_t r = 0; r < count; ++r) rows[r] = state_row(s, row + r);
  }
}

}  // namespace
