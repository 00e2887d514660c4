// Entry points of the gathered conv_pool forward: element type, tile and source are chosen here.

#include "conv_pool_tensor_gather.h"
#include "conv_pool_tensor_gather_few.cuh"
#include "conv_pool_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

// What a block needs: the stages and what the source keeps, then the results in their place.
template <int kTiles>
size_t shared_bytes(const ConvPoolShape& s, size_t kept) {
  size_t bytes = kGatherStages * kGatherStageBytes<kTiles> + kept;
  if (!is_in_blocks(s)) bytes = std::max(bytes, size_t(kFinishedBytes<kTiles>));
  if (is_in_blocks(s) && has_keys(s.activation))
    bytes = std::max(bytes, sizeof(float) * 4 * kTiles * 4 * kTensorThreads);
  return bytes;
}

// The rectangles for few channels; none where their pixels do not fit into shared memory.
template <typename T, int kTiles>
GatherTiles few_tiles(const ConvPoolShape& s) {
  return fewest_rectangles(s, [&](int wide) {
    const size_t kept = PixelElements<T>::kept_bytes(s, PixelElements<T>::halo_of(s, wide));
    return shared_bytes<kTiles>(s, kept) <= shared_memory_limit();
  });
}

template <typename T, int kTiles>
bool takes_few(const ConvPoolShape& s) {
  return s.c / s.groups <= kMostFewGathered && few_tiles<T, kTiles>(s).all > 0;
}

WeightOrder few_order(const ConvPoolShape& s) {
  WeightOrder order = forward_order(s);
  order.channels *= order.taps;
  order.taps = 1;
  return order;
}

template <typename T, int kTiles, typename Source>
void launch_gather(const ConvPoolShape& s, const Source& source, const GatherTiles& tiles,
                   const WeightOrder& order, size_t kept, const void* weight, const void* bias,
                   const ConvPoolResults& out, void* packed, void* stream) {
  launch_pack_weights<T, kTiles>(weight, order, packed, stream);
  const int64_t blocks = tiles.all * s.groups * ceil_div(order.outputs, 8 * kTiles);
  launch(tensor_gather<T, kTiles, Source>, dim3(grid_size(blocks)), kTensorThreads,
         shared_bytes<kTiles>(s, kept), stream, s, source, tiles, is_in_blocks(s),
         static_cast<const unsigned char*>(packed), static_cast<const T*>(bias), out);
}

// Calls function(T{}, tiles) with the type and the channels by 8 of a tile.
template <typename Function>
void with_kernel(DType dtype, const ConvPoolShape& s, const Function& function) {
  with_tensor_type(dtype, [&](auto zero) {
    with_channel_tiles(s.k / s.groups, [&](auto tiles) { function(zero, tiles); });
  });
}

}  // namespace

bool gather_forward_reads_units(DType dtype, const ConvPoolShape& s) {
  bool units = true;
  with_kernel(dtype, s, [&](auto zero, auto tiles) { units = !takes_few<decltype(zero), tiles.value>(s); });
  return units;
}

int64_t gather_forward_workspace(DType dtype, const ConvPoolShape& s) {
  int64_t bytes = 0;
  with_kernel(dtype, s, [&](auto zero, auto tiles) {
    using T = decltype(zero);
    bytes =
        packed_weights_bytes<T, tiles.value>(takes_few<T, tiles.value>(s) ? few_order(s) : forward_order(s));
  });
  return bytes;
}

void gather_forward(DType dtype, const ConvPoolShape& s, Map x, const void* weight, const void* bias,
                    const ConvPoolResults& out, void* workspace, void* stream) {
  with_kernel(dtype, s, [&](auto zero, auto tiles_of_k) {
    using T = decltype(zero);
    constexpr int kTiles = tiles_of_k.value;
    if (takes_few<T, kTiles>(s)) {
      const GatherTiles tiles = few_tiles<T, kTiles>(s);
      const PixelElements<T> source{x, PixelElements<T>::halo_of(s, tiles.wide)};
      launch_gather<T, kTiles>(s, source, tiles, few_order(s), source.kept_bytes(s, source.halo), weight,
                               bias, out, workspace, stream);
      return;
    }
    const PixelUnits<T> source{x, padded_channels<T>(s.c / s.groups)};
    const GatherTiles tiles =
        is_in_blocks(s) ? runs_of_blocks(s) : fewest_rectangles(s, [](int) { return true; });
    launch_gather<T, kTiles>(s, source, tiles, forward_order(s), 0, weight, bias, out, workspace, stream);
  });
}

}  // namespace cnnrnn::cuda
