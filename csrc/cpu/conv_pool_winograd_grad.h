// Gradients of weight and bias of a convolution without a pool, by the adjoint of Winograd's F(2x2, 3x3):
// for each place, partial[output][channel] += sum over tiles of Y[output][tile] * V[tile][channel].
// (The gradient of x is a forward convolution with mirrored kernels.)
#pragma once

#include "conv_pool_winograd_product.h"

namespace {

constexpr int kGradPlaces = kPlacesOf<2>;
constexpr int64_t kGradTiles = 96;  // of a step: the depth of its products

// V is [place][panel of channels][tile][channel of the panel]. Y, of some outputs, is [place][output][tile]
// for NCHW and [place][tile][output] for channels last.
struct WinogradGradPlan {
  ConvPoolShape gradient;  // what cuts output gradients into tiles
  WinogradPlan<2> tiles;
  int64_t width;  // channels of a row of partial sums
  int64_t place;  // between places of a partial
  int64_t v_panel, v_stride, y_row, y_step, y_stride;

  explicit WinogradGradPlan(const ConvPoolShape& s) : gradient(s), tiles(s) {
    gradient.channels = s.outputs, gradient.input = s.conv, gradient.padding = {0, 0};
    width = round_up(s.channels, kPanelTiles);
    place = s.outputs * width;
    v_panel = kGradTiles * kPanelTiles;
    v_stride = width * kGradTiles + kLanes * kPanelTiles + kSpread;
    constexpr int64_t kOutputs = (OnVectors::kBlockOutputs + kLanes - 1) / kLanes * kLanes;
    y_row = s.channels_last ? 1 : kGradTiles, y_step = s.channels_last ? kOutputs : 1;
    y_stride = kOutputs * kGradTiles + kLanes + kSpread;
  }
};

// Sums of the 16 places, then of the bias.
inline int64_t winograd_partial_size(const ConvPoolShape& s) {
  return kGradPlaces * WinogradGradPlan(s).place + s.outputs;
}

inline int64_t winograd_grad_scratch_bytes(const ConvPoolShape& s) {
  const WinogradGradPlan plan(s);
  return carved_bytes(kGradPlaces * plan.v_stride, sizeof(float)) +
         carved_bytes(kGradPlaces * plan.y_stride, sizeof(float)) +
         carved_bytes(kGradTiles, sizeof(TileRun)) + 2 * carved_bytes(kGradTiles, sizeof(TileVector<2>)) +
         carved_bytes(kGradTiles * kGradPlaces, sizeof(int64_t)) +
         carved_bytes(kGradTiles * 4, sizeof(int64_t));
}

// V of NCHW images: kLanes channels of a vector of tiles at a time, transposed. The last lanes of a vector
// may belong to no tile of its run: what they write is written again by the next vector or panel, or lies in
// the gap between places.
inline void transform_planes_across(const ConvPoolShape& s, const WinogradGradPlan& plan, const float* x,
                                    const TileVector<2>* vectors, int64_t count, float* v) {
  const int64_t size = s.input.h * s.input.w;
  const float* end = x + s.batch * s.channels * size;
  float staged[kGradPlaces * kLanes * kLanes] = {};  // [place][channel][tile]
  for (int64_t c = 0; c < s.channels; c += kLanes) {
    float* of_panel = v + c / kPanelTiles * plan.v_panel + c % kPanelTiles;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t lane = 0; lane < smaller(kLanes, s.channels - c); ++lane) {
        vf d[4][4];
        load_tiles<2>(x, end, x + (vectors[i].image * s.channels + c + lane) * size, vectors[i], d);
        transform_input<2>(d, staged + lane * kLanes, kLanes * kLanes);
      }
      for (int64_t p = 0; p < kGradPlaces; ++p) {
        vf block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = loadu(staged + (p * kLanes + j) * kLanes);
        transpose<float>(block);
        float* to = of_panel + p * plan.v_stride + vectors[i].tile * kPanelTiles;
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) storeu(to + j * kPanelTiles, block[j]);
      }
    }
  }
}

// V of channels-last images; pixels: tile_pixels of s.
inline void transform_pixels_across(const ConvPoolShape& s, const WinogradGradPlan& plan, const float* x,
                                    const int64_t* pixels, int64_t count, float* v) {
  const float* last = x + s.batch * s.channels * s.input.h * s.input.w - kLanes;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      vf d[4][4];
      load_pixels<4>(x, last, pixels + t * kGradPlaces, c, smaller(kLanes, s.channels - c), d);
      transform_input<2>(d, v + c / kPanelTiles * plan.v_panel + t * kPanelTiles + c % kPanelTiles,
                         plan.v_stride);
    }
}

// Y of outputs [k0, k0 + outputs), and their sums over the tiles added to bias.
inline void transform_gradients(const ConvPoolShape& s, const WinogradGradPlan& plan, const float* grad,
                                const TileVector<2>* vectors, int64_t vectors_count, const int64_t* pixels,
                                int64_t tiles, int64_t k0, int64_t outputs, float* y, float* bias) {
  const int64_t size = s.conv.h * s.conv.w;
  const float* end = grad + s.batch * s.outputs * size;
  const float* sums = y + 5 * plan.y_stride;  // the place in the second row and column is the tile's sum
  if (s.channels_last) {
    for (int64_t k = 0; k < outputs; k += kLanes) {
      const int64_t n = smaller(kLanes, outputs - k);
      vf sum{};
      for (int64_t t = 0; t < tiles; ++t) {
        vf d[2][2];
        load_pixels<2>(grad, end - kLanes, pixels + 4 * t, k0 + k, n, d);
        transform_gradient(d, y + t * plan.y_step + k, plan.y_stride);
        sum += loadu(sums + t * plan.y_step + k);
      }
      for (int64_t lane = 0; lane < n; ++lane) bias[k0 + k + lane] += sum[lane];
    }
    return;
  }
  for (int64_t k = 0; k < outputs; ++k) {
    for (int64_t i = 0; i < vectors_count; ++i) {
      vf d[2][2];
      load_tiles<2>(grad, end, grad + (vectors[i].image * s.outputs + k0 + k) * size, vectors[i], d);
      transform_gradient(d, y + k * plan.y_row + vectors[i].tile, plan.y_stride);
    }
    float sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += sums[k * plan.y_row + t];
    bias[k0 + k] += sum;
  }
}

// Tiles of panels [begin, end) and outputs of output panels [out_begin, out_end), added to `partial`. x and
// grad in s's order.
inline void winograd_weight(const ConvPoolShape& s, const float* x, const float* grad, float* partial,
                            void* memory, int64_t begin, int64_t end, int64_t out_begin, int64_t out_end) {
  const WinogradGradPlan plan(s);
  const WinogradPlan<2>& tiles = plan.tiles;
  char* scratch = static_cast<char*>(memory);
  float* v = carve<float>(scratch, kGradPlaces * plan.v_stride);
  float* y = carve<float>(scratch, kGradPlaces * plan.y_stride);
  TileRun* runs = carve<TileRun>(scratch, kGradTiles);
  TileVector<2>* vectors = carve<TileVector<2>>(scratch, kGradTiles);
  TileVector<2>* grad_vectors = carve<TileVector<2>>(scratch, kGradTiles);
  int64_t* pixels = carve<int64_t>(scratch, kGradTiles * kGradPlaces);
  int64_t* grad_pixels = carve<int64_t>(scratch, kGradTiles * 4);
  __builtin_memset(v, 0, kGradPlaces * plan.v_stride * sizeof(float));  // channels that only fill up a panel

  const int64_t last = smaller(end * kPanelTiles, tiles.total);
  float* bias = partial + kGradPlaces * plan.place;
  for (int64_t first = begin * kPanelTiles; first < last; first += kGradTiles) {
    const int64_t count = smaller(kGradTiles, last - first);
    const int64_t of_runs = winograd_runs(tiles.tiles, first, count, runs);
    int64_t of_grad = 0;
    if (s.channels_last) {
      tile_pixels<2, 4>(s, runs, of_runs, pixels);
      tile_pixels<2, 2>(plan.gradient, runs, of_runs, grad_pixels);
      transform_pixels_across(s, plan, x, pixels, count, v);
    } else {
      transform_planes_across(s, plan, x, vectors, tile_vectors<2>(s, runs, of_runs, vectors), v);
      of_grad = tile_vectors<2>(plan.gradient, runs, of_runs, grad_vectors);
    }
    for (int64_t b = out_begin; b < out_end; b += tiles.block) {
      const int64_t b_end = smaller(b + tiles.block, out_end), k0 = tiles.first_output(s, b);
      const int64_t outputs = tiles.first_output(s, b_end) - k0;
      transform_gradients(s, plan, grad, grad_vectors, of_grad, grad_pixels, count, k0, outputs, y, bias);
      for (int64_t p = 0; p < kGradPlaces; ++p)
        for (int64_t c = 0; c < plan.width; c += kPanelTiles)
          for (int64_t panel = b; panel < b_end; ++panel) {
            const int64_t k = tiles.first_output(s, panel), rows = tiles.first_output(s, panel + 1) - k;
            multiply_panel<true, false>(rows, y + p * plan.y_stride + (k - k0) * plan.y_row, plan.y_row,
                                        plan.y_step, v + p * plan.v_stride + c / kPanelTiles * plan.v_panel,
                                        kPanelTiles, count, partial + p * plan.place + k * plan.width + c,
                                        plan.width);
          }
    }
  }
}

// The sum of `count` partials, one after another, of outputs [begin, end) -> grad_weight [K, C, 3, 3] and
// grad_bias [K]; either may be null. Whether all of it is finite.
inline bool winograd_weight_reduce(const ConvPoolShape& s, const float* partials, int64_t count,
                                   float* grad_weight, float* grad_bias, int64_t begin, int64_t end) {
  const WinogradGradPlan plan(s);
  const int64_t size = winograd_partial_size(s);
  vf sick{};
  for (int64_t k = begin; k < end; ++k) {
    for (int64_t c = 0; grad_weight && c < s.channels; c += kLanes) {
      vf u[kGradPlaces] = {}, g[9];
      for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 16
        for (int p = 0; p < kGradPlaces; ++p)
          u[p] += loadu(partials + i * size + p * plan.place + k * plan.width + c);
      transform_weight_gradient(u, g);
      vf sum{};
#pragma GCC unroll 9
      for (int tap = 0; tap < 9; ++tap) sum += g[tap];
      sick += sum * 0.0f;
      for (int64_t lane = 0; lane < smaller(kLanes, s.channels - c); ++lane)
        for (int64_t tap = 0; tap < 9; ++tap)
          grad_weight[(k * s.channels + c + lane) * 9 + tap] = g[tap][lane];
    }
    if (!grad_bias) continue;
    grad_bias[k] = 0;
    for (int64_t i = 0; i < count; ++i) grad_bias[k] += partials[i * size + kGradPlaces * plan.place + k];
    sick[0] += grad_bias[k] * 0.0f;
  }
  return is_zero(sick);
}

}  // namespace
