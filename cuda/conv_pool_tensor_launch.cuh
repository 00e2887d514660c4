// How the tensor-core kernels of conv_pool are launched: choice of types and tiles, packing of the weights.
#pragma once

#include "conv_pool_tensor.cuh"

namespace cnnrnn::cuda {
namespace {

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
  if (outputs <= 32) return with_wide(integral_constant<int, 4>{});
  with_wide(integral_constant<int, 8>{});
}

template <typename T, int kTiles>
int64_t packed_weights_bytes(int channels, int outputs) {
  const TensorGrid grid = tensor_grid<T, kTiles>(channels, outputs);
  return int64_t(grid.tiles_k) * grid.chunks * kWeightBytes<kTiles>;
}

template <bool kGradient, typename T, int kTiles>
void launch_pack_weights(const void* weight, int channels, int outputs, void* packed, void* stream) {
  const int64_t words = packed_weights_bytes<T, kTiles>(channels, outputs) / 4;
  launch(pack_weights<T, kTiles, kGradient>, dim3(grid_size(ceil_div(words, int64_t(kPackThreads)))),
         kPackThreads, 0, stream, static_cast<const T*>(weight), channels, outputs,
         static_cast<uint32_t*>(packed));
}

template <int kWide>
unsigned tile_blocks(int n, Size2 blocks, int tiles_k) {
  return grid_size(int64_t(n) * ceil_div(blocks.w, Halo<kWide>::kBlocksX) *
                   ceil_div(blocks.h, Halo<kWide>::kBlocksY) * tiles_k);
}

}  // namespace
}  // namespace cnnrnn::cuda
