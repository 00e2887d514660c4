// conv_pool gradient of the weights on tensor cores for 1 to 4 input channels, 16-bit types, straight from x
// of any layout.
//
// A block owns 64 outputs and all 9 * C elements of the kernel of one slice; each of its 8 warps one row of a
// patch. The columns of B are the elements of the kernel, their depth 16 neighbouring positions of the map:
// pixels that are adjacent in a plane of the halo. An odd tap begins at an odd pixel and is read from a
// second copy of the halo, one pixel on. The column after the last element is all ones: its sum is the
// gradient of the bias.
#pragma once

#include "conv_pool_tensor_few.cuh"
#include "conv_pool_tensor_grad_weight.cuh"

namespace cnnrnn::cuda {
namespace {

template <int kChannels>
struct FewGradient {
  static constexpr int kElements = kTaps * kChannels, kTiles = (kElements + 1 + 7) / 8;
  static constexpr int kRow = kPatchInCols + 2;  // even, and one pixel more for the copy
  static constexpr int kCopy = kChannels * kPatchInRows * kRow;
  static constexpr int kStageBytes = kGradientBytes + 2 * kCopy * 2;
  static constexpr int kSums = kTiles * 4 * 4;
  static constexpr int kSumsBytes = kTensorWarps * kSums * 32 * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = 2 * kStageBytes > kSumsBytes ? 2 * kStageBytes : kSumsBytes;
};

template <typename T>
__device__ __forceinline__ uint32_t pair_of_ones() {
  return std::is_same_v<T, Half> ? 0x3C003C00u : 0x3F803F80u;
}

// The pixels that the taps of a patch touch, plane by plane, in two copies.
template <typename T, int kChannels>
__device__ __forceinline__ void stage_planes(T* to, const Map& x, const ConvPoolShape& s,
                                             const Patch& patch) {
  using Few = FewGradient<kChannels>;
  for (int i = threadIdx.x; i < Few::kCopy; i += kTensorThreads) {
    const int col = i % Few::kRow, row = i / Few::kRow % kPatchInRows, c = i / Few::kRow / kPatchInRows;
    const int h = patch.y + row - s.padding.h, w = patch.x + col - s.padding.w;
    const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w && col < kPatchInCols;
    const T value = inside ? *at<const T>(x, patch.n, c, h, w) : narrow_to<T>(0.0f);
    to[i] = value;
    to[Few::kCopy + i - col + (col + Few::kRow - 1) % Few::kRow] = value;
  }
}

template <typename T, int kChannels>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_grad_weight_few(ConvPoolShape s, MapGradient<T> map, Map x, int slices,
                           float* partial /* [slices][k][c * 9 + 1] */) {
  using Few = FewGradient<kChannels>;
  auto* shared = shared_memory<unsigned char>();  // two stages
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int k_begin = blockIdx.x * kGradChannels;
  const PatchGrid grid = patch_grid(s, slices);
  const int64_t begin = blockIdx.z * grid.of_slice, end = min(begin + grid.of_slice, grid.patches);
  const auto make_stage = [&](int64_t index) {
    unsigned char* stage = shared + index % 2 * Few::kStageBytes;
    const Patch patch = patch_of(grid, index);
    stage_planes<T, kChannels>(reinterpret_cast<T*>(stage + kGradientBytes), x, s, patch);
    make_gradient(stage, map, s, patch, k_begin);
  };

  // Where this lane finds the pixels of column g of each tile of B, for position 2 * t of the warp's row.
  int places[Few::kTiles];
#pragma unroll
  for (int j = 0; j < Few::kTiles; ++j) {
    const int element = min(8 * j + g, Few::kElements - 1), c = element / kTaps, tap = element % kTaps;
    const int kx = tap % 3, odd = kx % 2;
    places[j] = odd * Few::kCopy + (c * kPatchInRows + warp + tap / 3) * Few::kRow + kx - odd + 2 * t;
  }

  float sum[Few::kTiles][4][4];  // [elements by 8][outputs by 16][register]
#pragma unroll
  for (int i = 0; i < Few::kSums; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
  if (begin < end) make_stage(begin);
  for (int64_t index = begin; index < end; ++index) {
    block_barrier();  // this stage has been made, and the one before has been read
    if (index + 1 < end) make_stage(index + 1);
    const unsigned char* gradient = shared + index % 2 * Few::kStageBytes;
    const T* planes = reinterpret_cast<const T*>(gradient + kGradientBytes);
    uint32_t a[4][4];
    load_gradient(a, gradient, warp, lane);
#pragma unroll
    for (int j = 0; j < Few::kTiles; ++j) {
      uint32_t b[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int element = 8 * j + g;
        b[r] = *pack_at<const uint32_t>(planes + places[j] + 8 * r);
        if (element >= Few::kElements) b[r] = element == Few::kElements ? pair_of_ones<T>() : 0u;
      }
#pragma unroll
      for (int m = 0; m < 4; ++m) mma<T>(sum[j][m], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
    }
  }

  // The warps' sums, added in the order of the warps.
  block_barrier();                       // the last stage has been read
  float* sums = shared_memory<float>();  // [warp][register][lane]
#pragma unroll
  for (int i = 0; i < Few::kSums; ++i)
    sums[(warp * Few::kSums + i) * 32 + lane] = sum[i / 16][i / 4 % 4][i % 4];
  block_barrier();
  partial += int64_t(blockIdx.z) * s.k * (Few::kElements + 1);
  for (int i = warp; i < Few::kSums; i += kTensorWarps) {
    float all = 0;
#pragma unroll
    for (int w = 0; w < kTensorWarps; ++w) all += sums[(w * Few::kSums + i) * 32 + lane];
    const int r = i % 4, k = k_begin + i / 4 % 4 * 16 + g + r / 2 * 8, element = i / 16 * 8 + 2 * t + r % 2;
    if (k < s.k && element <= Few::kElements) partial[int64_t(k) * (Few::kElements + 1) + element] = all;
  }
}

}  // namespace
}  // namespace cnnrnn::cuda
