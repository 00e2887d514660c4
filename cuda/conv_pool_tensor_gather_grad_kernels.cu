// Entry points of the gathered conv_pool backward: element type and tile are chosen here.

#include "conv_pool_reduce.cuh"
#include "conv_pool_tensor_gather.h"
#include "conv_pool_tensor_gather_few.cuh"
#include "conv_pool_tensor_gather_grad_weight.cuh"
#include "conv_pool_tensor_gather_grad_x.cuh"
#include "conv_pool_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

template <typename T>
ColumnOrder<T> column_order(const ConvPoolShape& s) {
  const int channels = s.c / s.groups;
  return {!gather_grad_weight_reads_units(s), channels, s.kernel.h * s.kernel.w,
          ceil_div(channels, GatheredStage<T>::kOfUnit)};
}

// Tiles of outputs and columns: blocks of a slice.
template <typename T>
dim3 grid_of_weights(const ConvPoolShape& s, int slices) {
  const int units = column_order<T>(s).units(), of_block = kColumns / GatheredStage<T>::kOfUnit;
  return dim3(s.groups * ceil_div(s.k / s.groups, kGradChannels), ceil_div(units, of_block), slices);
}

// At least eight stages a slice and at most 256 blocks, as long as the partial sums stay below 64 MB.
template <typename T>
GatheredSlices slices_of_positions(const ConvPoolShape& s) {
  const dim3 grid = grid_of_weights<T>(s, 1);
  const int64_t positions = int64_t(s.n) * s.conv.h * s.conv.w;
  const int64_t stages = ceil_div(positions, int64_t(GatheredStage<T>::kPositions));
  const int64_t of_slice = int64_t(s.k) * (s.c / s.groups * s.kernel.h * s.kernel.w + 1);
  const int64_t fit = (int64_t(1) << 24) / of_slice;
  const int64_t wanted = std::min(ceil_div(stages, int64_t(8)), int64_t(256) / (grid.x * grid.y));
  const int64_t slices = std::max(int64_t(1), std::min(wanted, fit));
  return {static_cast<int>(slices), ceil_div(stages, slices)};
}

}  // namespace

bool gather_grad_weight_reads_units(const ConvPoolShape& s) { return s.c / s.groups > kMostFewGathered; }

int64_t gather_grad_x_workspace(DType dtype, const ConvPoolShape& s) {
  int64_t bytes = 0;
  with_tensor_type(dtype, [&](auto zero) {
    with_channel_tiles(s.c / s.groups, [&](auto tiles) {
      bytes = packed_weights_bytes<decltype(zero), tiles.value>(gradient_order(s, false));
    });
  });
  return bytes;
}

void gather_grad_x(DType dtype, const ConvPoolShape& s, Map grad, Map code, const void* weight, Map grad_x,
                   void* workspace, void* stream) {
  with_tensor_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    with_channel_tiles(s.c / s.groups, [&](auto tiles_of_c) {
      constexpr int kTiles = tiles_of_c.value;
      const WeightOrder order = gradient_order(s, false);
      launch_pack_weights<T, kTiles>(weight, order, workspace, stream);
      const ConvPoolShape t = gathered_gradient_shape(s);
      const GatherTiles tiles = runs_of_blocks(t);
      const Size2 classes = position_classes(s);
      const GradientUnits<T> source{
          map_gradient<T>(s, grad, code), padded_channels<T>(order.channels), s.in, classes.w, {}};
      const int64_t blocks = tiles.all * s.groups * ceil_div(order.outputs, 8 * kTiles);
      launch(tensor_gather<T, kTiles, GradientUnits<T>>, dim3(grid_size(blocks), classes.h * classes.w),
             kTensorThreads, kGatherStages * kGatherStageBytes<kTiles>, stream, t, source, tiles, true,
             static_cast<const unsigned char*>(workspace), static_cast<const T*>(nullptr),
             ConvPoolResults{grad_x, {}, {}});
    });
  });
}

int64_t gather_grad_weight_workspace(DType dtype, const ConvPoolShape& s) {
  int64_t floats = 0;
  with_tensor_type(dtype, [&](auto zero) {
    const int64_t elements = s.c / s.groups * s.kernel.h * s.kernel.w;
    floats = slices_of_positions<decltype(zero)>(s).slices * s.k * (elements + 1);
  });
  return floats;
}

void gather_grad_weight(DType dtype, const ConvPoolShape& s, Map grad, Map code, Map x, void* workspace,
                        void* grad_weight, void* grad_bias, void* stream) {
  with_tensor_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    using Stage = GatheredStage<T>;
    const ColumnOrder<T> order = column_order<T>(s);
    const GatheredSlices slices = slices_of_positions<T>(s);
    const dim3 grid = grid_of_weights<T>(s, slices.slices);
    int units_of_row = 8;  // a power of two
    while (units_of_row < std::min(order.units(), kColumns / Stage::kOfUnit)) units_of_row *= 2;
    const size_t stage =
        Stage::kGradientBytes + Stage::kPositions * (units_of_row * kUnitBytes + Stage::kPadding);
    auto* partial = static_cast<float*>(workspace);
    // A group's channels of x as they stand, or in units.
    const int of_group_c = order.by_elements ? order.channels : padded_channels<T>(order.channels);
    launch(tensor_gather_grad_weight<T>, grid, kTensorThreads, 2 * stage, stream, s,
           map_gradient<T>(s, grad, code), padded_channels<T>(s.k / s.groups), x, of_group_c, order,
           units_of_row, slices, partial);
    launch_reduce_slices<T>(partial, slices.slices, s.k, order.channels * order.taps, grad_weight, grad_bias,
                            stream);
  });
}

}  // namespace cnnrnn::cuda
