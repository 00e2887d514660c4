// conv_pool forward by direct convolution: one accumulator per window position, the pool in registers.
#pragma once

#include "conv_pool_direct.cuh"

namespace cnnrnn::cuda {
namespace {

// ---- 3x3, stride 1, windows in 2x2 blocks ----
// A block of 128 threads makes a tile of 2x2 blocks, kPairs threads wide; a thread makes two of them side by
// side in kOut channels: kOut * 2 * 4 accumulators, one for each convolution output.
constexpr int kTileChannels = 4;  // input channels staged at a time

template <int kPairs>
struct Tile {
  static constexpr int kRows = kTileThreads / kPairs, kCols = 2 * kPairs;  // 2x2 blocks
  static constexpr int kInRows = 2 * kRows + 2, kInCols = 2 * kCols + 2;   // input, halo included
  static constexpr int kRowStride = 2 * kCols + 4;                         // keeps rows 16-byte aligned
  static constexpr int kInputs = kTileChannels * kInRows * kRowStride;
};

template <typename A, int kPairs>
constexpr size_t tile_shared_bytes(Activation activation) {
  constexpr int kOperands = Tile<kPairs>::kInputs + kTileChannels * 9 * kTileOut<A>;
  return sizeof(A) * (has_keys(activation) ? std::max(kOperands, kTileOut<A> * 8 * kTileThreads) : kOperands);
}

template <typename T, int kPairs>
__global__ void __launch_bounds__(kTileThreads, sizeof(T) == 4 ? 4 : 2)
    conv3x3_forward(ConvPoolShape s, Map x, const T* weight, const T* bias, ConvPoolResults out) {
  using A = Accumulator<T>;
  using Tile = Tile<kPairs>;
  constexpr int kOut = kTileOut<A>;
  A* inputs = shared_memory<A>();       // [kTileChannels][kInRows][kRowStride]
  A* weights = inputs + Tile::kInputs;  // [kTileChannels][9][kOut]

  const int tid = threadIdx.x;
  const int tiles_x = ceil_div(blocks_of(s).w, Tile::kCols), tiles_y = ceil_div(blocks_of(s).h, Tile::kRows);
  const int tile_x = blockIdx.x % tiles_x, tile_y = blockIdx.x / tiles_x % tiles_y;
  const int64_t n = blockIdx.x / tiles_x / tiles_y;
  const int channels = s.c / s.groups, outputs = s.k / s.groups;
  const int tiles_k = ceil_div(outputs, kOut);
  const int group = blockIdx.y / tiles_k;
  const int k_begin = group * outputs + static_cast<int>(blockIdx.y) % tiles_k * kOut;
  const int k_count = min(kOut, (group + 1) * outputs - k_begin);
  const int in_y = 2 * tile_y * Tile::kRows - s.padding.h, in_x = 2 * tile_x * Tile::kCols - s.padding.w;
  const int row = tid / kPairs, pair = tid % kPairs;

  A sum[kOut * 8];  // [channel][dy][column of the two blocks]
#pragma unroll
  for (int i = 0; i < kOut * 8; ++i) sum[i] = A(0);

  for (int c_begin = 0; c_begin < channels; c_begin += kTileChannels) {
    const int c_count = min(kTileChannels, channels - c_begin);
    block_barrier();  // the last chunk has been read
    for (int i = tid; i < c_count * Tile::kInRows * Tile::kInCols; i += kTileThreads) {
      const int col = i % Tile::kInCols, line = i / Tile::kInCols;  // line = (channel, row)
      const int h = in_y + line % Tile::kInRows, w = in_x + col, c = line / Tile::kInRows;
      const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w;
      inputs[line * Tile::kRowStride + col] =
          inside ? widen(*at<const T>(x, n, group * channels + c_begin + c, h, w)) : A(0);
    }
    for (int i = tid; i < c_count * 9 * kOut; i += kTileThreads) {
      const int k = i % kOut, element = i / kOut;  // element = (channel, tap)
      weights[i] =
          k < k_count ? widen(weight[(int64_t(k_begin + k) * channels + c_begin) * 9 + element]) : A(0);
    }
    block_barrier();
    for (int c = 0; c < c_count; ++c) {
      A in[4][6];
      const A* corner = inputs + (c * Tile::kInRows + 2 * row) * Tile::kRowStride + 4 * pair;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const auto left = *pack_at<const Pack<A, 4>>(corner + i * Tile::kRowStride);
        const auto right = *pack_at<const Pack<A, 2>>(corner + i * Tile::kRowStride + 4);
#pragma unroll
        for (int j = 0; j < 6; ++j) in[i][j] = j < 4 ? left.v[j % 4] : right.v[j % 2];
      }
#pragma unroll
      for (int tap = 0; tap < 9; ++tap) {
        const auto w = *pack_at<const Pack<A, kOut>>(weights + (c * 9 + tap) * kOut);
#pragma unroll
        for (int k = 0; k < kOut; ++k)
#pragma unroll
          for (int i = 0; i < 8; ++i) sum[k * 8 + i] += w.v[k] * in[i / 4 + tap / 3][i % 4 + tap % 3];
      }
    }
  }

  add_bias<kOut>(sum, bias, k_begin, k_count);
  A* keys = shared_memory<A>() + tid;
  if (has_keys(s.activation)) block_barrier();  // the operands have been read
  store_blocks<T, kOut>(
      s, sum, keys, kTileThreads, n, k_begin, k_count, tile_y * Tile::kRows + row,
      [&](int block) { return tile_x * Tile::kCols + 2 * pair + block; }, out);
}

// ---- any shape, from memory ----
// A thread makes one pooled position in kOut channels, one window position after the other.
constexpr int kGeneralThreads = 128, kGeneralOut = 4;

template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, 4)
    conv_pool_forward_general(ConvPoolShape s, Map x, const T* weight, const T* bias, ConvPoolResults out) {
  using A = Accumulator<T>;
  constexpr int kOut = kGeneralOut;
  const int64_t index = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  const int64_t out_size = int64_t(s.out.h) * s.out.w;
  if (index >= s.n * out_size) return;
  const int64_t n = index / out_size;
  const int out_h = static_cast<int>(index % out_size / s.out.w), out_w = static_cast<int>(index % s.out.w);
  const int channels = s.c / s.groups, outputs = s.k / s.groups;
  const int tiles_k = ceil_div(outputs, kOut);
  const int group = blockIdx.y / tiles_k;
  const int k_begin = group * outputs + static_cast<int>(blockIdx.y) % tiles_k * kOut;
  const int k_count = min(kOut, (group + 1) * outputs - k_begin);
  const int taps = s.kernel.h * s.kernel.w;

  WindowMax<A> window[kOut];
  bool first = true;
  for (int position = 0; position < s.pool.h * s.pool.w; ++position) {
    const int conv_h = out_h * s.pool_stride.h - s.pool_padding.h + position / s.pool.w;
    const int conv_w = out_w * s.pool_stride.w - s.pool_padding.w + position % s.pool.w;
    if (conv_h < 0 || conv_h >= s.conv.h || conv_w < 0 || conv_w >= s.conv.w) continue;
    A sum[kOut];
#pragma unroll
    for (int k = 0; k < kOut; ++k) sum[k] = A(0);
    for (int tap = 0; tap < taps; ++tap) {
      const int h = conv_h * s.stride.h - s.padding.h + tap / s.kernel.w * s.dilation.h;
      const int w = conv_w * s.stride.w - s.padding.w + tap % s.kernel.w * s.dilation.w;
      if (h < 0 || h >= s.in.h || w < 0 || w >= s.in.w) continue;
      for (int c = 0; c < channels; ++c) {
        const A in = widen(*at<const T>(x, n, group * channels + c, h, w));
#pragma unroll
        for (int k = 0; k < kOut; ++k)
          if (k < k_count) sum[k] += in * widen(weight[(int64_t(k_begin + k) * channels + c) * taps + tap]);
      }
    }
#pragma unroll
    for (int k = 0; k < kOut; ++k) {
      const A value = sum[k] + (bias && k < k_count ? widen(bias[k_begin + k]) : A(0));
      const A key = has_keys(s.activation) ? activate(s.activation, value) : value;
      if (first) window[k].start(key, value, position);
      if (!first) window[k].add(key, value, position);
    }
    first = false;
  }
#pragma unroll
  for (int k = 0; k < kOut; ++k) {
    if (k >= k_count) continue;
    window[k].finish(s.activation == Activation::kRelu);
    window[k].template store<T>(out, n, k_begin + k, out_h, out_w);
  }
}

// ---- launchers ----
template <typename T, int kPairs>
void launch_3x3(const ConvPoolShape& s, Map x, const T* weight, const T* bias, const ConvPoolResults& out,
                void* stream) {
  using A = Accumulator<T>;
  const int64_t blocks = int64_t(s.n) * ceil_div(blocks_of(s).h, Tile<kPairs>::kRows) *
                         ceil_div(blocks_of(s).w, Tile<kPairs>::kCols);
  const int tiles_k = s.groups * ceil_div(s.k / s.groups, kTileOut<A>);
  launch(conv3x3_forward<T, kPairs>, dim3(grid_size(blocks), tiles_k), kTileThreads,
         tile_shared_bytes<A, kPairs>(s.activation), stream, s, x, weight, bias, out);
}

template <typename T>
void forward(const ConvPoolShape& s, Map x, const void* weight_data, const void* bias_data,
             const ConvPoolResults& out, void* stream) {
  const T *weight = static_cast<const T*>(weight_data), *bias = static_cast<const T*>(bias_data);
  if (!is_3x3_in_blocks(s)) {
    if (const DirectTile tile = direct_tile<T>(s); tile.covers())
      return launch_direct(s, tile, x, weight, bias, out, stream);
    const int64_t blocks = ceil_div(int64_t(s.n) * s.out.h * s.out.w, int64_t(kGeneralThreads));
    const int tiles_k = s.groups * ceil_div(s.k / s.groups, kGeneralOut);
    launch(conv_pool_forward_general<T>, dim3(grid_size(blocks), tiles_k), kGeneralThreads, 0, stream, s, x,
           weight, bias, out);
    return;
  }
  // The tile shape that computes the fewest outputs outside the map.
  const auto covered = [&](int pairs) {
    return ceil_div(blocks_of(s).w, 2 * pairs) * 2 * pairs * ceil_div(blocks_of(s).h, kTileThreads / pairs) *
           (kTileThreads / pairs);
  };
  if (covered(16) <= covered(8) && covered(16) <= covered(4)) {
    launch_3x3<T, 16>(s, x, weight, bias, out, stream);
  } else if (covered(8) <= covered(4)) {
    launch_3x3<T, 8>(s, x, weight, bias, out, stream);
  } else {
    launch_3x3<T, 4>(s, x, weight, bias, out, stream);
  }
}

}  // namespace
}  // namespace cnnrnn::cuda
