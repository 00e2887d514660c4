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

// acc += A[Rows x depth] * panel[depth x V vectors]; a[r] points at row r.
template <typename T, int Rows, int V>
CNNRNN_INLINE void multiply_rows(Vec<T> (&acc)[Rows][V], const T* const (&a)[Rows], int64_t from, const T* b,
                                 int64_t depth) {
  constexpr int L = kLanesOf<T>;
  for (int64_t k = from; k < from + depth; ++k, b += V * L) {
    if constexpr (Rows < V) {
      Vec<T> values[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) values[r] = broadcast(a[r][k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Vec<T> column = loadu(b + v * L);
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
  multiply_rows<T, 1, V>(acc, a, k, b, from + depth - k);
  for (int v = 0; v < V; ++v) acc[0][v] += odd[v];
}

// The same as multiply_rows, for an A that is contiguous by column, `stride` from depth to depth.
template <typename T, int Rows>
CNNRNN_INLINE void multiply_columns(Vec<T> (&acc)[Rows][4], const T* a, int64_t stride, const T* b,
                                    int64_t depth) {
  constexpr int L = kLanesOf<T>;
  for (int64_t k = 0; k < depth; ++k, a += stride, b += 4 * L) {
    Vec<T> values[Rows];
    if constexpr (Rows < 4) {
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) values[r] = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const Vec<T> column = loadu(b + v * L);
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
}

// Sums of this length are added up by themselves, which keeps the rounding error of long ones down.
constexpr int64_t kSumBlock = 256;

// sum = A * panel, or sum += A * panel, for rows of A that are contiguous. Nothing is set to zero beforehand:
// clearing an array of accumulators in memory takes longer than a short product.
enum class Into { kSet, kAdd };
template <typename T, int Rows, int V, Into into>
CNNRNN_INLINE void product(Vec<T> (&sum)[Rows][V], const T* const (&a)[Rows], const T* b, int64_t depth) {
  for (int64_t k = 0; k == 0 || k < depth; k += kSumBlock) {
    const int64_t block = depth - k < kSumBlock ? depth - k : kSumBlock;
    Vec<T> acc[Rows][V];
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = Vec<T>{};
    if constexpr (Rows == 1)
      multiply_one_row<T, V>(acc, a, k, b + k * V * kLanesOf<T>, block);
    else
      multiply_rows<T, Rows, V>(acc, a, k, b + k * V * kLanesOf<T>, block);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = into == Into::kAdd || k > 0 ? sum[r][v] + acc[r][v] : acc[r][v];
  }
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

// Calls f.template run<Rows>(first row) with Rows = the height of tile number `tile`.
template <int Most = kTileRows, typename F>
CNNRNN_INLINE void dispatch_tile(int64_t rows, int64_t tile, const F& f) {
  const int64_t tiles = tiles_of<Most>(rows);
  const int64_t begin = rows * tile / tiles;
  run_height<Most>(rows * (tile + 1) / tiles - begin, begin, f);
}

// What a tile reads or writes besides its product is asked for before the product, which takes long enough
// for it to arrive from main memory. An address past the end of a buffer is harmless to ask for.
CNNRNN_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }
CNNRNN_INLINE void prefetch_to_write(void* p) { __builtin_prefetch(p, 1, 2); }

// How many of `lanes` columns beginning at `column` exist.
CNNRNN_INLINE int64_t valid(int64_t columns, int64_t column, int lanes) {
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
template <typename T, int Rows>
CNNRNN_INLINE void state_rows(const cnnrnn::StateRows<T>& s, int64_t row, const T* (&rows)[Rows]) {
  if (!s.reset && row + Rows <= s.carried) {
    for (int r = 0; r < Rows; ++r) rows[r] = s.before + (row + r) * s.before_stride;
  } else {
    for (int r = 0; r < Rows; ++r) rows[r] = state_row(s, row + r);
  }
}

}  // namespace
