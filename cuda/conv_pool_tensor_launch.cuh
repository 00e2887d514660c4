// How the tensor-core kernels of conv_pool are launched: choice of types and tiles, packing of the weights.
#pragma once

#include "conv_pool_tensor_grad_x.cuh"

namespace cnnrnn::cuda {
namespace {

// Whether the kernels for 3x3 serve, which gather nothing: see conv_pool_tensor.cuh.
inline bool has_own_kernel(const ConvPoolShape& s) { return is_3x3_in_blocks(s) && s.groups == 1; }

// Calls function(T{}) with the C++ type of a dtype that tensor cores multiply.
template <typename Function>
void with_tensor_type(DType dtype, const Function& function) {
  if (dtype == DType::kHalf) return function(Half{});
  if (dtype == DType::kBFloat16) return function(BFloat16{});
  function(float{});
}
// Of 16 bits.
template <typename Function>
void with_half_type(DType dtype, const Function& function) {
  if (dtype == DType::kHalf) return function(Half{});
  function(BFloat16{});
}

// Calls function(tiles): channels by 8 of a tile.
template <typename Function>
void with_channel_tiles(int outputs, const Function& function) {
  if (outputs <= 32) return function(std::integral_constant<int, 4>{});
  function(std::integral_constant<int, 8>{});
}

// Calls function(tiles, wide), compile-time numbers: channels by 8 of a tile, and its width in 2x2 blocks.
template <typename Function>
void with_tile(int outputs, Size2 blocks, const Function& function) {
  using std::integral_constant;
  const auto covered = [&](int wide) {
    return int64_t(ceil_div(blocks.w, wide)) * wide * ceil_div(blocks.h, kTileBlocks / wide) *
           (kTileBlocks / wide);
  };
  const auto with_wide = [&](auto tiles) {
    if (covered(16) <= covered(8)) return function(tiles, integral_constant<int, 16>{});
    function(tiles, integral_constant<int, 8>{});
  };
  with_channel_tiles(outputs, with_wide);
}

// The orders of the forward and of the gradient of x.
inline WeightOrder forward_order(const ConvPoolShape& s) {
  return {s.groups, s.c / s.groups, s.k / s.groups, s.kernel.h * s.kernel.w, false, false};
}
inline WeightOrder gradient_order(const ConvPoolShape& s, bool turned) {
  return {s.groups, s.k / s.groups, s.c / s.groups, s.kernel.h * s.kernel.w, true, turned};
}

// Channels of a group in whole units.
template <typename T>
int padded_channels(int channels) {
  constexpr int kOfUnit = kUnitBytes / sizeof(T);
  return ceil_div(channels, kOfUnit) * kOfUnit;
}

template <typename T>
MapGradient<T> map_gradient(const ConvPoolShape& s, Map grad, Map code) {
  const bool side_by_side = s.pool_stride == s.pool && s.pool_padding == Size2{0, 0};
  return {grad, code, s.conv, s.pool, s.pool_stride, s.pool_padding, s.out, side_by_side, s.k / s.groups};
}

template <typename T, int kTiles>
int64_t packed_weights_bytes(const WeightOrder& order) {
  const TensorGrid grid = tensor_grid<T, kTiles>(order.channels, order.outputs);
  return int64_t(order.groups) * grid.tiles_k * grid.chunks * order.taps * kTapBytes<kTiles>;
}

template <typename T, int kTiles>
void launch_pack_weights(const void* weight, const WeightOrder& order, void* packed, void* stream) {
  const int64_t words = packed_weights_bytes<T, kTiles>(order) / 4;
  launch(pack_weights<T, kTiles>, dim3(grid_size(ceil_div(words, int64_t(kPackThreads)))), kPackThreads, 0,
         stream, static_cast<const T*>(weight), order, static_cast<uint32_t*>(packed));
}

template <int kWide>
unsigned tile_blocks(int n, Size2 blocks, int tiles_k) {
  return grid_size(int64_t(n) * ceil_div(blocks.w, Halo<kWide>::kBlocksX) *
                   ceil_div(blocks.h, Halo<kWide>::kBlocksY) * tiles_k);
}

}  // namespace
}  // namespace cnnrnn::cuda
