// The transforms of Winograd's F(2x2, 3x3): a tile of 2x2 convolution outputs from 4x4 inputs by 16
// products instead of 36. With d a tile of input and g a kernel,
//   output = A' [(G g G') * (B' d B)] A,    * element by element, summed over the channels in between.
// Gradients go through the adjoints: that of g is G' [(A y A') * (B' d B)] G, summed over the tiles.
// The 16 places of a transformed tile are numbered 4 * row + column.
// A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
#pragma once

#include "conv_pool_common.h"

namespace {

constexpr int kPlaces = 16;

// G g G' of the kernels of `channels` input channels of one output: weight [channels, 3, 3], place p of
// channel c to u[p * stride + c]. Writes whole vectors.
inline void transform_weights(const float* weight, int64_t channels, float* u, int64_t stride) {
  float last[9 * kLanes] = {};
  for (int64_t c = 0; c < channels; c += kLanes) {
    const float* at = weight + 9 * c;
    if (channels - c < kLanes) {
      __builtin_memcpy(last, at, 9 * (channels - c) * sizeof(float));
      at = last;
    }
    vf g[3][3];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) {
      vf lanes{};
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = at[9 * lane + tap];
      g[tap / 3][tap % 3] = lanes;
    }
    const auto combine = [](vf a, vf b, vf c, vf(&row)[4]) {
      const vf outer = 0.5f * (a + c), inner = 0.5f * b;
      row[0] = a, row[1] = outer + inner, row[2] = outer - inner, row[3] = c;
    };
    vf rows[3][4];  // rows[j][i]: G g
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) combine(g[0][j], g[1][j], g[2][j], rows[j]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      vf places[4];
      combine(rows[0][i], rows[1][i], rows[2][i], places);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) storeu(u + (4 * i + j) * stride + c, places[j]);
    }
  }
}

// B' d B of kLanes tiles side by side: column j of tile t is d[row][j][t]; place p to v[p * stride ...].
CNNRNN_INLINE void transform_input(const vf (&d)[4][4], float* v, int64_t stride) {
  const auto combine = [](vf a, vf b, vf c, vf d, vf(&row)[4]) {
    row[0] = a - c, row[1] = b + c, row[2] = c - b, row[3] = b - d;
  };
  vf rows[4][4];  // d B
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) combine(d[i][0], d[i][1], d[i][2], d[i][3], rows[i]);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    vf places[4];
    combine(rows[0][j], rows[1][j], rows[2][j], rows[3][j], places);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) storeu(v + (4 * i + j) * stride, places[i]);
  }
}

// A' m A of kLanes tiles: y[2 * row + column] of each. Place p stands at m[p * stride].
CNNRNN_INLINE void transform_output(const float* m, int64_t stride, vf (&y)[4]) {
  vf columns[4][2];  // m A
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* at = m + 4 * i * stride;
    const vf b = loadu(at + stride), c = loadu(at + 2 * stride);
    columns[i][0] = loadu(at) + (b + c);
    columns[i][1] = (b - c) - loadu(at + 3 * stride);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    y[j] = columns[0][j] + (columns[1][j] + columns[2][j]);
    y[2 + j] = (columns[1][j] - columns[2][j]) - columns[3][j];
  }
}

// A y A' of kLanes tiles of output gradients, to places as transform_input: the adjoint of transform_output.
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

// G' u G of kLanes weights: g[3 * row + column] of each. The adjoint of transform_weights.
CNNRNN_INLINE void transform_weight_gradient(const vf (&u)[kPlaces], vf (&g)[9]) {
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
