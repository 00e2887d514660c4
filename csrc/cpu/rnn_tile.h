// The one inner loop of the recurrent kernels: a tile of rows x 4 vectors of columns, all of it in
// registers, and how rows are cut into tiles.
#pragma once

#include "rnn.h"
#include "simd.h"

namespace {

// 4 vectors of B and one broadcast of A stand beside the accumulators.
constexpr int kTileRows = kVectorRegisters >= 32 ? 6 : 3;

template <typename T>
constexpr int kPanel = 4 * kLanesOf<T>;

// acc += A[Rows x depth] * panel[depth x 4 vectors].
// kByRow: a row of A is contiguous (`stride` from row to row); otherwise a column is (`stride` per depth).
template <typename T, int Rows, bool kByRow>
CNNRNN_INLINE void multiply_tile(Vec<T> (&acc)[Rows][4], const T* a, int64_t stride, const T* b,
                                 int64_t depth) {
  constexpr int L = kLanesOf<T>;
  const T* a_row[Rows];
  if constexpr (kByRow) {
    for (int r = 0; r < Rows; ++r) a_row[r] = a + r * stride;
  }
  for (int64_t k = 0; k < depth; ++k) {
    const Vec<T> b0 = loadu(b), b1 = loadu(b + L), b2 = loadu(b + 2 * L), b3 = loadu(b + 3 * L);
#pragma GCC unroll 6
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> value = broadcast(kByRow ? a_row[r][k] : a[r]);
      acc[r][0] += value * b0;
      acc[r][1] += value * b1;
      acc[r][2] += value * b2;
      acc[r][3] += value * b3;
    }
    b += 4 * L;
    if constexpr (!kByRow) a += stride;
  }
}

// Few rows do not fill the FMA pipeline with one accumulator each: two sets, even and odd depths.
template <typename T, int Rows>
CNNRNN_INLINE void multiply_few_rows(Vec<T> (&acc)[Rows][4], const T* a, int64_t stride, const T* b,
                                     int64_t depth) {
  constexpr int L = kLanesOf<T>;
  Vec<T> odd[Rows][4] = {};
  int64_t k = 0;
  for (; k + 2 <= depth; k += 2, b += 8 * L) {
#pragma GCC unroll 2
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> v0 = broadcast(a[r * stride + k]), v1 = broadcast(a[r * stride + k + 1]);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        acc[r][g] += v0 * loadu(b + g * L);
        odd[r][g] += v1 * loadu(b + (4 + g) * L);
      }
    }
  }
  multiply_tile<T, Rows, true>(acc, a + k, stride, b, depth - k);
  for (int r = 0; r < Rows; ++r)
    for (int g = 0; g < 4; ++g) acc[r][g] += odd[r][g];
}

// Sums of this length are added up by themselves, which keeps the rounding error of long ones down.
constexpr int64_t kSumBlock = 256;

// sum += A * panel, for rows of A that are contiguous.
template <typename T, int Rows>
CNNRNN_INLINE void add_product(Vec<T> (&sum)[Rows][4], const T* a, int64_t stride, const T* b,
                               int64_t depth) {
  for (int64_t k = 0; k < depth; k += kSumBlock) {
    const int64_t block = depth - k < kSumBlock ? depth - k : kSumBlock;
    Vec<T> acc[Rows][4] = {};
    if constexpr (Rows > 2)
      multiply_tile<T, Rows, true>(acc, a + k, stride, b + k * kPanel<T>, block);
    else
      multiply_few_rows<T, Rows>(acc, a + k, stride, b + k * kPanel<T>, block);
    for (int r = 0; r < Rows; ++r)
      for (int g = 0; g < 4; ++g) sum[r][g] += acc[r][g];
  }
}

// Tiles of nearly equal height, none above kTileRows: a short last tile would run at half speed.
CNNRNN_INLINE int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Calls f.template run<Rows>(first row) with Rows = the height of tile number `tile`.
template <typename F>
CNNRNN_INLINE void dispatch_tile(int64_t rows, int64_t tile, const F& f) {
  const int64_t tiles = tiles_of(rows);
  const int64_t begin = rows * tile / tiles;
  const int64_t height = rows * (tile + 1) / tiles - begin;
  if constexpr (kTileRows > 3) {
    if (height == 6) return f.template run<6>(begin);
    if (height == 5) return f.template run<5>(begin);
    if (height == 4) return f.template run<4>(begin);
  }
  if (height == 3) return f.template run<3>(begin);
  if (height == 2) return f.template run<2>(begin);
  f.template run<1>(begin);
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

}  // namespace
