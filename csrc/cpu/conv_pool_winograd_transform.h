// The transforms of Winograd's F(ExE, 3x3), E = 2 or 4: a tile of ExE convolution outputs from
// (E + 2)x(E + 2) inputs by as many products: 16 instead of 36, or 36 instead of 144. With d a tile of
// input and g a kernel,
//   output = A' [(G g G') * (B' d B)] A,    * element by element, summed over the channels in between.
// Gradients go through the adjoints: that of g is G' [(A y A') * (B' d B)] G, summed over the tiles.
// The places of a transformed tile are numbered (E + 2) * row + column.
// A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
//
// E = 2 evaluates polynomials at 0, 1, -1 and infinity; E = 4 at 0, +-kInner, +-kOuter and infinity, which
// lose fewer digits than whole numbers would.
#pragma once

#include "conv_pool_common.h"

namespace {

template <int E>
constexpr int kPlacesOf = (E + 2) * (E + 2);

constexpr float kInner = 0.625f, kOuter = 1.5f;
constexpr float kInner2 = kInner * kInner, kOuter2 = kOuter * kOuter;
// The product of the differences between a point and the other four.
constexpr float kOfZero = kInner2 * kOuter2, kOfInner = 2 * kInner2 * (kInner2 - kOuter2),
                kOfOuter = 2 * kOuter2 * (kOuter2 - kInner2);

// G, B' and A' applied to one column.
template <int E>
CNNRNN_INLINE void weight_points(vf a, vf b, vf c, vf (&t)[E + 2]) {
  if constexpr (E == 2) {
    const vf outer = 0.5f * (a + c), inner = 0.5f * b;
    t[0] = a, t[1] = outer + inner, t[2] = outer - inner, t[3] = c;
  } else {
    const vf near = (a + kInner2 * c) / kOfInner, near_odd = b * (kInner / kOfInner);
    const vf far = (a + kOuter2 * c) / kOfOuter, far_odd = b * (kOuter / kOfOuter);
    t[0] = a / kOfZero, t[1] = near + near_odd, t[2] = near - near_odd;
    t[3] = far + far_odd, t[4] = far - far_odd, t[5] = c;
  }
}

template <int E>
CNNRNN_INLINE void input_points(const vf (&d)[E + 2], vf (&t)[E + 2]) {
  if constexpr (E == 2) {
    t[0] = d[0] - d[2], t[1] = d[1] + d[2], t[2] = d[2] - d[1], t[3] = d[1] - d[3];
  } else {
    const vf near = d[4] - kOuter2 * d[2], near_odd = kInner * (d[3] - kOuter2 * d[1]);
    const vf far = d[4] - kInner2 * d[2], far_odd = kOuter * (d[3] - kInner2 * d[1]);
    t[0] = kOfZero * d[0] + (d[4] - (kInner2 + kOuter2) * d[2]);
    t[1] = near + near_odd, t[2] = near - near_odd, t[3] = far + far_odd, t[4] = far - far_odd;
    t[5] = kOfZero * d[1] + (d[5] - (kInner2 + kOuter2) * d[3]);
  }
}

template <int E>
CNNRNN_INLINE void output_points(const vf (&m)[E + 2], vf (&y)[E]) {
  if constexpr (E == 2) {
    y[0] = m[0] + (m[1] + m[2]), y[1] = (m[1] - m[2]) - m[3];
  } else {
    const vf near = m[1] + m[2], near_odd = m[1] - m[2], far = m[3] + m[4], far_odd = m[3] - m[4];
    y[0] = m[0] + (near + far), y[1] = kInner * near_odd + kOuter * far_odd;
    y[2] = kInner2 * near + kOuter2 * far;
    y[3] = m[5] + (kInner * kInner2 * near_odd + kOuter * kOuter2 * far_odd);
  }
}

// G g G' of kLanes kernels: place p to u[p * stride ...]. taps[3 * row + column] of each.
template <int E>
CNNRNN_INLINE void transform_weights(const vf (&taps)[9], float* u, int64_t stride) {
  vf rows[3][E + 2];  // rows[j][i]: G g
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) weight_points<E>(taps[j], taps[3 + j], taps[6 + j], rows[j]);
#pragma GCC unroll 6
  for (int i = 0; i < E + 2; ++i) {
    vf places[E + 2];
    weight_points<E>(rows[0][i], rows[1][i], rows[2][i], places);
#pragma GCC unroll 6
    for (int j = 0; j < E + 2; ++j) storeu(u + ((E + 2) * i + j) * stride, places[j]);
  }
}

// B' d B of kLanes tiles side by side: column j of tile t is d[row][j][t]; place p to v[p * stride ...].
template <int E>
CNNRNN_INLINE void transform_input(const vf (&d)[E + 2][E + 2], float* v, int64_t stride) {
  vf rows[E + 2][E + 2];  // d B
#pragma GCC unroll 6
  for (int i = 0; i < E + 2; ++i) input_points<E>(d[i], rows[i]);
#pragma GCC unroll 6
  for (int j = 0; j < E + 2; ++j) {
    vf column[E + 2], places[E + 2];
#pragma GCC unroll 6
    for (int i = 0; i < E + 2; ++i) column[i] = rows[i][j];
    input_points<E>(column, places);
#pragma GCC unroll 6
    for (int i = 0; i < E + 2; ++i) storeu(v + ((E + 2) * i + j) * stride, places[i]);
  }
}

// A' m A of kLanes tiles: y[row][column] of each. Place p stands at m[p * stride].
template <int E>
CNNRNN_INLINE void transform_output(const float* m, int64_t stride, vf (&y)[E][E]) {
  vf rows[E + 2][E];  // m A
#pragma GCC unroll 6
  for (int i = 0; i < E + 2; ++i) {
    vf places[E + 2];
#pragma GCC unroll 6
    for (int j = 0; j < E + 2; ++j) places[j] = loadu(m + ((E + 2) * i + j) * stride);
    output_points<E>(places, rows[i]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < E; ++j) {
    vf column[E + 2], outputs[E];
#pragma GCC unroll 6
    for (int i = 0; i < E + 2; ++i) column[i] = rows[i][j];
    output_points<E>(column, outputs);
#pragma GCC unroll 4
    for (int i = 0; i < E; ++i) y[i][j] = outputs[i];
  }
}

// A y A' of kLanes tiles of output gradients for E = 2, to places as transform_input: the adjoint of
// transform_output.
CNNRNN_INLINE void transform_gradient(const vf (&y)[2][2], float* to, int64_t stride) {
  const auto spread = [](vf a, vf b, vf(&four)[4]) {
    four[0] = a, four[1] = a + b, four[2] = a - b, four[3] = -b;
  };
  vf columns[2][4];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) spread(y[0][j], y[1][j], columns[j]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    vf places[4];
    spread(columns[0][i], columns[1][i], places);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) storeu(to + (4 * i + j) * stride, places[j]);
  }
}

// G' u G of kLanes weights for E = 2: g[3 * row + column] of each. The adjoint of transform_weights.
CNNRNN_INLINE void transform_weight_gradient(const vf (&u)[16], vf (&g)[9]) {
  const auto fold = [](vf a, vf b, vf c, vf d, vf(&three)[3]) {
    const vf sum = 0.5f * (b + c);
    three[0] = a + sum, three[1] = 0.5f * (b - c), three[2] = d + sum;
  };
  vf rows[4][3];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) fold(u[4 * i], u[4 * i + 1], u[4 * i + 2], u[4 * i + 3], rows[i]);
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    vf column[3];
    fold(rows[0][j], rows[1][j], rows[2][j], rows[3][j], column);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) g[3 * i + j] = column[i];
  }
}

}  // namespace
