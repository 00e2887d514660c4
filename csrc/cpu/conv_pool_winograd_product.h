// The products of the Winograd kernels: for one place of the tiles, a product of two small matrices.
#pragma once

#include "conv_pool_winograd_input.h"

namespace {

// m[R][kPanelTiles] = (kAdd: +=) u[R][depth] * v[depth][kPanelTiles].
template <int R, bool kAdd>
CNNRNN_APART void multiply(const float* u, int64_t u_stride, const float* v, int64_t v_stride, int64_t depth,
                           float* m, int64_t m_stride) {
  vf acc[R][kTileVectors] = {};
  for (int64_t d = 0; d < depth; ++d, v += v_stride) {
    vf right[kTileVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) right[j] = in_register(loadu(v + j * kLanes));
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
      const vf left = broadcast(u[i * u_stride + d]);
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) acc[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) {
      float* at = m + i * m_stride + j * kLanes;
      storeu(at, kAdd ? loadu(at) + acc[i][j] : acc[i][j]);
    }
  }
}

// m[rows][columns] = (kAdd: +=) u[rows][depth] * v[depth][columns], columns a multiple of kPanelTiles; in
// panels of rows as even as can be.
template <bool kAdd>
void multiply_place(const float* u, int64_t u_stride, int64_t rows, const float* v, int64_t v_stride,
                    int64_t columns, int64_t depth, float* m, int64_t m_stride) {
  static constexpr decltype(&multiply<1, kAdd>) of_rows[] = {multiply<1, kAdd>, multiply<2, kAdd>,
                                                             multiply<3, kAdd>, multiply<4, kAdd>,
                                                             multiply<5, kAdd>, multiply<6, kAdd>};
  const int64_t panels = ceil_div(rows, kPanelRows);
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = rows * p / panels, count = rows * (p + 1) / panels - first;
    for (int64_t t = 0; t < columns; t += kPanelTiles)
      of_rows[count - 1](u + first * u_stride, u_stride, v + t, v_stride, depth, m + first * m_stride + t,
                         m_stride);
  }
}

}  // namespace
