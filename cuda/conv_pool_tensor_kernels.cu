// Entry points of the conv_pool forward on tensor cores: element type and tile are chosen here.

#include "conv_pool_tensor_few.cuh"
#include "conv_pool_tensor_gather.h"
#include "conv_pool_tensor_launch.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr size_t kMostShared = 160 * 1024;  // of all kernels on tensor cores: what sm_80 has, 163 KB

template <typename T, int kTiles, int kWide>
void launch_forward(const ConvPoolShape& s, Map x, const void* weight, const T* bias,
                    const ConvPoolResults& out, void* packed, void* stream) {
  launch_pack_weights<T, kTiles>(weight, forward_order(s), packed, stream);
  const unsigned blocks = tile_blocks<kWide>(s.n, blocks_of(s), tensor_grid<T, kTiles>(s.c, s.k).tiles_k);
  launch(tensor_forward<T, kTiles, kWide>, dim3(blocks), kTensorThreads, 2 * kStageBytes<kTiles, kWide>,
         stream, s, x, static_cast<const unsigned char*>(packed), bias, out);
}

template <typename T, int kChannels>
void launch_forward_few(const ConvPoolShape& s, Map x, const void* weight, const T* bias,
                        const ConvPoolResults& out, void* packed, void* stream) {
  const int words = ceil_div(s.k, 8 * kFewTiles) * FewChannels<T, kChannels>::kPackedBytes / 4;
  launch(pack_few_weights<T, kChannels>, dim3(ceil_div(words, kPackThreads)), kPackThreads, 0, stream,
         static_cast<const T*>(weight), s.k, static_cast<uint32_t*>(packed));
  launch(tensor_forward_few<T, kChannels>, dim3(tile_blocks<kFewWide>(s.n, blocks_of(s), 1)), kTensorThreads,
         few_shared_bytes<T, kChannels>(s.activation), stream, s, x,
         static_cast<const unsigned char*>(packed), bias, out);
}

}  // namespace

bool conv_pool_tensor_covers(const ConvPoolShape& s) {
  constexpr int kMostClasses = 65535;  // of positions of x by the stride: see gather_grad_x()
  const int64_t classes = int64_t(std::min(s.stride.h, s.in.h)) * std::min(s.stride.w, s.in.w);
  return s.c > 0 && classes <= kMostClasses && shared_memory_limit() >= kMostShared;
}

bool conv_pool_tensor_reads_units(DType dtype, const ConvPoolShape& s) {
  return has_own_kernel(s) ? s.c > kMostFewChannels : gather_forward_reads_units(dtype, s);
}

int64_t conv_pool_tensor_forward_workspace(DType dtype, const ConvPoolShape& s) {
  if (!has_own_kernel(s)) return gather_forward_workspace(dtype, s);
  int64_t bytes = 0;
  with_tensor_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (s.c <= kMostFewChannels)
      return with_few_channels(s.c, [&](auto c) {
        bytes = int64_t(ceil_div(s.k, 8 * kFewTiles)) * FewChannels<T, c.value>::kPackedBytes;
      });
    with_tile(s.k, blocks_of(s),
              [&](auto tiles, auto) { bytes = packed_weights_bytes<T, tiles.value>(forward_order(s)); });
  });
  return bytes;
}

void conv_pool_tensor_forward(DType dtype, const ConvPoolShape& s, Map x, const void* weight,
                              const void* bias_data, const ConvPoolResults& out, void* workspace,
                              void* stream) {
  if (!has_own_kernel(s)) return gather_forward(dtype, s, x, weight, bias_data, out, workspace, stream);
  with_tensor_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* bias = static_cast<const T*>(bias_data);
    if (s.c <= kMostFewChannels)
      return with_few_channels(
          s.c, [&](auto c) { launch_forward_few<T, c.value>(s, x, weight, bias, out, workspace, stream); });
    with_tile(s.k, blocks_of(s), [&](auto tiles, auto wide) {
      launch_forward<T, tiles.value, wide.value>(s, x, weight, bias, out, workspace, stream);
    });
  });
}

// ---- pixels in units ----
bool conv_pool_has_units(int element_bytes, const Map& map, int of_unit) {
  return map.c == 1 && (map.n | map.h | map.w) % of_unit == 0 &&
         reinterpret_cast<uintptr_t>(map.data) % (of_unit * element_bytes) == 0;
}

Map conv_pool_pack_units(int element_bytes, const Map& map, int n, int c, int groups, Size2 size, int of_unit,
                         void* memory, void* stream) {
  const int of_group = c / groups, padded = ceil_div(of_group, of_unit) * of_unit, all = groups * padded;
  const int64_t tiles = ceil_div(int64_t(size.h) * size.w, int64_t(kPixelTile));
  const dim3 grid(grid_size(n * tiles), ceil_div(all, kPixelTile));
  const auto pack = [&](auto zero) {
    using T = decltype(zero);
    launch(pack_pixels<T>, grid, kPackThreads, sizeof(Staged<T>) * kPixelTile * (kPixelTile + 2), stream, map,
           PixelChannels{groups, of_group, padded}, size, static_cast<T*>(memory));
  };
  if (element_bytes == 1) pack(uint8_t{});
  if (element_bytes == 2) pack(uint16_t{});
  if (element_bytes == 4) pack(uint32_t{});
  return {memory, int64_t(size.h) * size.w * all, 1, int64_t(size.w) * all, all};
}

}  // namespace cnnrnn::cuda
