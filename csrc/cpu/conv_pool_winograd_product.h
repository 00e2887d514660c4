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

// Phase 1 of one panel of tiles. transform(begin, end, to, stride): of those channels, place p to
// to[p * stride ...]. staged: staged_size numbers, which belong to the slice, as all V do; prepare_v is
// called once before.
template <int E, typename Transform>
void fill_v(const WinogradPlan<E, OnVectors>& plan, const ConvPoolShape& s, int64_t tiles, float*,
            const Transform& transform, float* v) {
  // What follows the last tile takes part in the arithmetic, without effect: slowly, if it is subnormal.
  if (tiles < kPanelTiles) __builtin_memset(v, 0, plan.v_size() * sizeof(float));
  transform(0, s.channels, v, plan.v_stride);
}
template <int E>
int64_t staged_size(const WinogradPlan<E, OnVectors>&, const ConvPoolShape&) {
  return 0;
}
template <int E>
void prepare_v(const WinogradPlan<E, OnVectors>&, const ConvPoolShape&, float*, float*) {}

// Phase 2 of place p: m[outputs of the panel][kPanelTiles].
template <int E>
CNNRNN_INLINE void multiply_place(const WinogradPlan<E, OnVectors>& plan, const ConvPoolShape& s,
                                  const float* packed, int64_t panel, int64_t p, const float* v, float* m) {
  const int64_t k = plan.first_output(s, panel), of_panel = plan.first_output(s, panel + 1) - k;
  multiply_panel<false, true>(of_panel, packed + (kPlacesOf<E> * k + p * of_panel) * s.channels, 0, 0, v,
                              kPanelTiles, s.channels, m, kPanelTiles);
}

}  // namespace
