// Gradients of weight and bias of a convolution without a pool, by the adjoint of Winograd's F(2x2, 3x3):
// for each place, partial[output][channel] += sum over tiles of Y[output][tile] * V[tile][channel].
// (The gradient of x is a forward convolution with mirrored kernels.) x and the gradient in NCHW order.
#pragma once

#include "conv_pool_winograd_product.h"

namespace {

struct WinogradGradPlan {
  ConvPoolShape gradient;  // what cuts output gradients into tiles
  WinogradPlan tiles;
  int64_t width;  // channels of a row of partial sums and of V
  int64_t place;  // between places of a partial

  explicit WinogradGradPlan(const ConvPoolShape& s) : gradient(s), tiles(s) {
    gradient.channels = s.outputs, gradient.input = s.conv, gradient.padding = {0, 0};
    width = round_up(s.channels, kPanelTiles);
    place = s.outputs * width;
  }
  int64_t v_stride() const { return tiles.block * width + kSpread; }
};

// Sums of the 16 places, then of the bias.
inline int64_t winograd_partial_size(const ConvPoolShape& s) {
  return kPlaces * WinogradGradPlan(s).place + s.outputs;
}

inline int64_t winograd_grad_scratch_bytes(const ConvPoolShape& s) {
  const WinogradGradPlan plan(s);
  return carved_bytes(kPlaces * plan.tiles.v_stride, sizeof(float)) +
         carved_bytes(kPlaces * plan.v_stride(), sizeof(float)) +
         carved_bytes(kPlaces * plan.tiles.m_stride, sizeof(float)) +
         carved_bytes(plan.tiles.block, sizeof(TileRun)) +
         2 * carved_bytes(plan.tiles.block, sizeof(TileVector));
}

// Tiles of panels [begin, end), added to `partial`.
inline void winograd_weight(const ConvPoolShape& s, const float* x, const float* grad, float* partial,
                            void* memory, int64_t begin, int64_t end) {
  const WinogradGradPlan plan(s);
  const WinogradPlan& tiles = plan.tiles;
  char* scratch = static_cast<char*>(memory);
  float* by_channel = carve<float>(scratch, kPlaces * tiles.v_stride);
  float* v = carve<float>(scratch, kPlaces * plan.v_stride());
  float* y = carve<float>(scratch, kPlaces * tiles.m_stride);
  TileRun* runs = carve<TileRun>(scratch, tiles.block);
  TileVector* vectors = carve<TileVector>(scratch, tiles.block);
  TileVector* grad_vectors = carve<TileVector>(scratch, tiles.block);
  __builtin_memset(v, 0, kPlaces * plan.v_stride() * sizeof(float));  // channels that only fill up a panel

  const int64_t size = s.conv.h * s.conv.w, last = smaller(end * kPanelTiles, tiles.total);
  const float* grad_end = grad + s.batch * s.outputs * size;
  float* bias = partial + kPlaces * plan.place;
  for (int64_t first = begin * kPanelTiles; first < last; first += tiles.block) {
    const int64_t count = smaller(tiles.block, last - first);
    const int64_t of_runs = winograd_runs(tiles.tiles, first, count, runs);
    transform_planes(s, tiles, x, vectors, tile_vectors(s, runs, of_runs, vectors), by_channel);
    for (int64_t p = 0; p < kPlaces; ++p) {
      float* to = v + p * plan.v_stride();
      transpose(by_channel + p * tiles.v_stride, s.channels, count, tiles.block,
                [&](int64_t t, int64_t c, vf lanes, int64_t) { storeu(to + t * plan.width + c, lanes); });
    }
    const int64_t of_grad = tile_vectors(plan.gradient, runs, of_runs, grad_vectors);
    for (int64_t b = 0; b < tiles.output_blocks; ++b) {
      const int64_t k0 = tiles.first_output(s, b), outputs = tiles.first_output(s, b + 1) - k0;
      for (int64_t k = 0; k < outputs; ++k) {
        float* to = y + k * tiles.block;
        for (int64_t i = 0; i < of_grad; ++i) {
          vf d[2][2];
          load_tiles(grad, grad_end, grad + (grad_vectors[i].image * s.outputs + k0 + k) * size,
                     grad_vectors[i], d);
          transform_gradient(d, to + grad_vectors[i].tile, tiles.m_stride);
        }
        // The place in the second row and column is the sum of the tile.
        float sum = 0;
        for (int64_t t = 0; t < count; ++t) sum += to[5 * tiles.m_stride + t];
        bias[k0 + k] += sum;
      }
      for (int64_t p = 0; p < kPlaces; ++p)
        multiply_place<true>(y + p * tiles.m_stride, tiles.block, outputs, v + p * plan.v_stride(),
                             plan.width, plan.width, count, partial + p * plan.place + k0 * plan.width,
                             plan.width);
    }
  }
}

// The sum of `count` partials, one after another, of outputs [begin, end) -> grad_weight [K, C, 3, 3] and
// grad_bias [K]; either may be null.
inline void winograd_weight_reduce(const ConvPoolShape& s, const float* partials, int64_t count,
                                   float* grad_weight, float* grad_bias, int64_t begin, int64_t end) {
  const WinogradGradPlan plan(s);
  const int64_t size = winograd_partial_size(s);
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t c = 0; grad_weight && c < s.channels; c += kLanes) {
      vf u[kPlaces] = {}, g[9];
      for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 16
        for (int p = 0; p < kPlaces; ++p)
          u[p] += loadu(partials + i * size + p * plan.place + k * plan.width + c);
      transform_weight_gradient(u, g);
      for (int64_t lane = 0; lane < smaller(kLanes, s.channels - c); ++lane)
        for (int64_t tap = 0; tap < 9; ++tap)
          grad_weight[(k * s.channels + c + lane) * 9 + tap] = g[tap][lane];
    }
    if (!grad_bias) continue;
    grad_bias[k] = 0;
    for (int64_t i = 0; i < count; ++i) grad_bias[k] += partials[i * size + kPlaces * plan.place + k];
  }
}

}  // namespace
