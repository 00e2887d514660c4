// Entry points of the conv_pool backward on tensor cores: element type and tile are chosen here.

#include <cstdlib>
#include <cstring>

#include "conv_pool_reduce.cuh"
#include "conv_pool_tensor_gather.h"
#include "conv_pool_tensor_grad_weight_few.cuh"
#include "conv_pool_tensor_grad_weight_sparse.cuh"
#include "conv_pool_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

// At least four patches a slice and at most 256 blocks, as long as the partial sums stay below 64 MB.
int slices_of_weights(const ConvPoolShape& s) {
  const int64_t tiles = int64_t(ceil_div(s.k, kGradChannels)) * ceil_div(s.c, kGradChannels);
  const int64_t wanted = ceil_div(patch_grid(s, 1).patches, int64_t(4));
  const int64_t fit = (int64_t(1) << 24) / (int64_t(s.k) * (s.c * kTaps + 1));
  return static_cast<int>(std::max(int64_t(1), std::min({wanted, fit, 256 / tiles})));
}

// The experiment of conv_pool_tensor_grad_weight_sparse.cuh.
bool tries_sparse(const ConvPoolShape& s) {
  const char* wish = std::getenv("CNNRNN_SPARSE_GRAD_WEIGHT");
  return wish && std::strcmp(wish, "1") == 0 && s.pool == Size2{2, 2};
}

// 16-bit types only: TF32 has no transposed loads.
bool has_own_weight_kernel(DType dtype, const ConvPoolShape& s) {
  return dtype != DType::kFloat && has_own_kernel(s);
}

}  // namespace

bool conv_pool_tensor_grad_weight_reads_units(const ConvPoolShape& s) {
  return gather_grad_weight_reads_units(s);
}

int64_t conv_pool_tensor_grad_x_workspace(DType dtype, const ConvPoolShape& s) {
  if (!has_own_kernel(s)) return gather_grad_x_workspace(dtype, s);
  const ConvPoolShape t = gradient_shape(s);
  int64_t bytes = 0;
  with_tensor_type(dtype, [&](auto zero) {
    with_channel_tiles(t.k, [&](auto tiles) {
      bytes = packed_weights_bytes<decltype(zero), tiles.value>(gradient_order(s, true));
    });
  });
  return bytes;
}

void conv_pool_tensor_grad_x(DType dtype, const ConvPoolShape& s, Map grad, Map code, const void* weight,
                             Map grad_x, void* workspace, void* stream) {
  if (!has_own_kernel(s)) return gather_grad_x(dtype, s, grad, code, weight, grad_x, workspace, stream);
  const ConvPoolShape t = gradient_shape(s);
  with_tensor_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_tile(t.k, blocks_of(t), [&](auto tiles, auto wide) {
      constexpr int kTiles = tiles.value, kWide = wide.value;
      launch_pack_weights<T, kTiles>(weight, gradient_order(s, true), workspace, stream);
      const int tiles_k = tensor_grid<T, kTiles>(t.c, t.k).tiles_k;
      launch(tensor_grad_x<T, kTiles, kWide>, dim3(tile_blocks<kWide>(t.n, blocks_of(t), tiles_k)),
             kTensorThreads, 2 * kStageBytes<kTiles, kWide>, stream, t, map_gradient<T>(s, grad, code),
             static_cast<const unsigned char*>(workspace), ConvPoolResults{grad_x, {}, {}});
    });
  });
}

int64_t conv_pool_tensor_grad_weight_workspace(DType dtype, const ConvPoolShape& s) {
  if (!has_own_weight_kernel(dtype, s)) return gather_grad_weight_workspace(dtype, s);
  return int64_t(slices_of_weights(s)) * s.k * (s.c * kTaps + 1);
}

void conv_pool_tensor_grad_weight(DType dtype, const ConvPoolShape& s, Map grad, Map code, Map x,
                                  void* workspace, void* grad_weight, void* grad_bias, void* stream) {
  if (!has_own_weight_kernel(dtype, s))
    return gather_grad_weight(dtype, s, grad, code, x, workspace, grad_weight, grad_bias, stream);
  with_half_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const int slices = slices_of_weights(s);
    auto* partial = static_cast<float*>(workspace);
    const MapGradient<T> map = map_gradient<T>(s, grad, code);
    const dim3 grid(ceil_div(s.k, kGradChannels), ceil_div(s.c, kGradChannels), slices);
    if (s.c <= kMostFewChannels) {
      with_few_channels(s.c, [&](auto c) {
        launch(tensor_grad_weight_few<T, c.value>, grid, kTensorThreads, FewGradient<c.value>::kSharedBytes,
               stream, s, map, x, slices, partial);
      });
    } else {
      const auto run = [&](auto kernel, int stage_bytes) {
        launch(kernel, grid, kTensorThreads, 2 * stage_bytes, stream, s, map, x, slices, partial);
      };
      using Dense = DenseGradient<T>;
      using Sparse = SparseGradient<T>;
      if (tries_sparse(s)) {
        run(tensor_grad_weight<Sparse>, kGradStageBytes<Sparse>);
      } else {
        run(tensor_grad_weight<Dense>, kGradStageBytes<Dense>);
      }
    }
    launch_reduce_slices<T>(partial, slices, s.k, s.c * kTaps, grad_weight, grad_bias, stream);
  });
}

}  // namespace cnnrnn::cuda
