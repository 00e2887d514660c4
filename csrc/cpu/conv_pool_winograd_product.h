// The products of the Winograd kernels: for one place of the tiles, a product of two small matrices.
#pragma once

#include "conv_pool_winograd_input.h"

namespace {

// Products added up in one go; the sums of such runs are added in turn. One long sum would lose digits: its
// error grows as the square root of its length.
constexpr int64_t kMostRun = 64;

// One term of multiply's sums.
template <int R>
CNNRNN_INLINE void multiply_step(const float* u, int64_t u_row, const float* v, vf (&acc)[R][kTileVectors]) {
  vf right[kTileVectors];
#pragma GCC unroll 4
  for (int j = 0; j < kTileVectors; ++j) right[j] = in_register(loadu(v + j * kLanes));
#pragma GCC unroll 6
  for (int i = 0; i < R; ++i) {
    const vf left = broadcast(u[i * u_row]);
#pragma GCC unroll 4
    for (int j = 0; j < kTileVectors; ++j) acc[i][j] += left * right[j];
  }
}

// m[R][kPanelTiles] = (kAdd: +=) u[R][depth] * v[depth][kPanelTiles]. Element (i, d) of u stands at
// u[i * u_row + d * u_step]; kPacked: at u[i + d * R], whatever the strides.
template <int R, bool kAdd, bool kPacked>
CNNRNN_APART void multiply(const float* u, int64_t u_row, int64_t u_step, const float* v, int64_t v_step,
                           int64_t depth, float* m, int64_t m_row) {
  if constexpr (kPacked) u_row = 1, u_step = R;
  for (bool add = kAdd; depth > 0; add = true) {
    vf acc[R][kTileVectors] = {};
    int64_t run = smaller(depth, kMostRun);
    depth -= run;
    for (; run >= 2; run -= 2, u += 2 * u_step, v += 2 * v_step) {  // two in one pass are 2 % faster
      multiply_step<R>(u, u_row, v, acc);
      multiply_step<R>(u + u_step, u_row, v + v_step, acc);
    }
    if (run) {
      multiply_step<R>(u, u_row, v, acc);
      u += u_step, v += v_step;
    }
#pragma GCC unroll 6
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kTileVectors; ++j) {
        float* at = m + i * m_row + j * kLanes;
        storeu(at, add ? loadu(at) + acc[i][j] : acc[i][j]);
      }
    }
  }
}

// multiply of `rows` rows, at most kPanelRows.
template <bool kAdd, bool kPacked>
CNNRNN_INLINE void multiply_panel(int64_t rows, const float* u, int64_t u_row, int64_t u_step, const float* v,
                                  int64_t v_step, int64_t depth, float* m, int64_t m_row) {
  static constexpr decltype(&multiply<1, kAdd, kPacked>) of_rows[] = {
      multiply<1, kAdd, kPacked>, multiply<2, kAdd, kPacked>, multiply<3, kAdd, kPacked>,
      multiply<4, kAdd, kPacked>, multiply<5, kAdd, kPacked>, multiply<6, kAdd, kPacked>};
  of_rows[rows - 1](u, u_row, u_step, v, v_step, depth, m, m_row);
}

}  // namespace
