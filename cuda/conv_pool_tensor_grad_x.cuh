// conv_pool gradient of x on tensor cores: the core of the forward over the gradient of the map, whose chunks
// are made in shared memory from (grad, code); the map's gradient never touches memory. Weights are turned
// round.
#pragma once

#include "conv_pool_tensor_forward.cuh"

namespace cnnrnn::cuda {
namespace {

// The convolution of the map's gradient that makes grad_x: no pool, no activation.
inline ConvPoolShape gradient_shape(const ConvPoolShape& s) {
  ConvPoolShape t = s;
  t.c = s.k, t.k = s.c;
  t.in = s.conv;
  t.padding = {2 - s.padding.h, 2 - s.padding.w};
  t.conv = t.out = s.in;
  t.pool = t.pool_stride = {1, 1};
  t.activation = Activation::kNone;
  return t;
}

// One dimension of the windows over a position of the map.
struct WindowsOver {
  int first, last;
};
__device__ __forceinline__ WindowsOver windows_at(int position, int pool, int stride, int padding, int out) {
  const int reach = position + padding - pool;  // the last place that a window ends before
  return {reach < 0 ? 0 : reach / stride + 1, min(out - 1, (position + padding) / stride)};
}

// What a unit of 16 bytes of channels of the map's gradient at (y, x) is made of: the sum of grad over the
// windows whose code is this position. Both have adjacent channels in units.
template <typename T>
struct MapGradient {
  static constexpr int kOfUnit = kUnitBytes / sizeof(T);
  Map grad, code;
  Size2 conv, pool, pool_stride, pool_padding, out;
  bool side_by_side;  // at most one window over a position, no padding
  int channels;       // of a group

  // Adds grad of window (h, w) where `position` won.
  __device__ __forceinline__ void add(float (&sum)[kOfUnit], int64_t n, int c, int h, int w,
                                      int position) const {
    const auto values = *pack_at<const Pack<T, kOfUnit>>(at<const T>(grad, n, c, h, w));
    const auto codes = *pack_at<const Pack<uint8_t, kOfUnit>>(at<const uint8_t>(code, n, c, h, w));
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i) sum[i] += codes.v[i] == position ? float(widen(values.v[i])) : 0.0f;
  }

  // c: in its group, which begins at channel `group`.
  __device__ __forceinline__ Pack<T, kOfUnit> unit(int64_t n, int c, int group, int y, int x) const {
    Pack<T, kOfUnit> result;
    const bool inside = n >= 0 && y >= 0 && x >= 0 && y < conv.h && x < conv.w && c < channels;
    c += group;
    if (side_by_side) {
      const int h = y / pool.h, w = x / pool.w;
      if (!inside || h >= out.h || w >= out.w) {
#pragma unroll
        for (int i = 0; i < kOfUnit; ++i) result.v[i] = narrow_to<T>(0.0f);
        return result;
      }
      const int position = y % pool.h * pool.w + x % pool.w;
      const auto values = *pack_at<const Pack<T, kOfUnit>>(at<const T>(grad, n, c, h, w));
      const auto codes = *pack_at<const Pack<uint8_t, kOfUnit>>(at<const uint8_t>(code, n, c, h, w));
#pragma unroll
      for (int i = 0; i < kOfUnit; ++i)
        result.v[i] = codes.v[i] == position ? values.v[i] : narrow_to<T>(0.0f);
      return result;
    }
    float sum[kOfUnit] = {};
    if (inside) {
      const WindowsOver down = windows_at(y, pool.h, pool_stride.h, pool_padding.h, out.h);
      const WindowsOver across = windows_at(x, pool.w, pool_stride.w, pool_padding.w, out.w);
      for (int h = down.first; h <= down.last; ++h)
        for (int w = across.first; w <= across.last; ++w)
          add(sum, n, c, h, w,
              (y + pool_padding.h - h * pool_stride.h) * pool.w + x + pool_padding.w - w * pool_stride.w);
    }
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i) result.v[i] = narrow_to<T>(sum[i]);
    return result;
  }
};

// s: that of gradient_shape().
template <typename T, int kTiles, int kWide>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_grad_x(ConvPoolShape s, MapGradient<T> map, const unsigned char* packed, ConvPoolResults out) {
  using Tile = Halo<kWide>;
  auto* shared = shared_memory<unsigned char>();  // two stages
  const TensorGrid grid = tensor_grid<T, kTiles>(s.c, s.k);
  const TilePlace<kWide> place(blocks_of(s), grid.tiles_k);
  packed += int64_t(place.tile_k) * grid.chunks * kWeightBytes<kTiles>;
  const int map_y = 2 * place.block_y - s.padding.h, map_x = 2 * place.block_x - s.padding.w;
  const auto make_stage = [&](int chunk) {
    unsigned char* stage = shared + chunk % 2 * kStageBytes<kTiles, kWide>;
    copy_weights<kTiles>(stage + Tile::kBytes, packed + int64_t(chunk) * kWeightBytes<kTiles>);
    async_commit();
    for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols * kUnits; i += kTensorThreads) {
      const int unit = i % kUnits, col = i / kUnits % Tile::kCols, row = i / kUnits / Tile::kCols;
      const auto made = map.unit(place.n, (chunk * kUnits + unit) * map.kOfUnit, 0, map_y + row, map_x + col);
      *pack_at<Pack<T, MapGradient<T>::kOfUnit>>(reinterpret_cast<T*>(stage + Tile::offset(row, col, unit))) =
          made;
    }
  };

  BlockSums<kTiles> sum;
#pragma unroll
  for (int i = 0; i < 4 * kTiles * 4; ++i) sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.0f;
  make_stage(0);
  for (int chunk = 0; chunk < grid.chunks; ++chunk) {
    async_wait<0>();
    block_barrier();  // this stage has been made, and the one before has been read
    if (chunk + 1 < grid.chunks) make_stage(chunk + 1);
    const unsigned char* stage = shared + chunk % 2 * kStageBytes<kTiles, kWide>;
    multiply_chunk<T, kTiles, kWide>(sum, stage, stage + Tile::kBytes, threadIdx.x / 32, threadIdx.x % 32);
  }
  finish_tile<T, kTiles, kWide>(s, static_cast<const T*>(nullptr), sum, nullptr, place, out);
}

}  // namespace
}  // namespace cnnrnn::cuda
