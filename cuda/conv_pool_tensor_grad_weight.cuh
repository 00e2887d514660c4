// conv_pool gradient of the weights on tensor cores, 16-bit types: over a slice of the map, the products of
// the map's gradient, made in shared memory from (grad, code), and the pixels that each tap pairs it with.
//
// A block owns 64 outputs x 64 input channels x 9 taps of one slice, a warp 8 of the input channels: the rows
// of its fragments are outputs, their depth 16 neighbouring positions of the map, so that both operands are
// read transposed. What a slice sums up is added in the order of the slices by a second kernel.
#pragma once

#include "conv_pool_tensor_grad_x.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kPatchRows = 8, kPatchCols = 16, kPatch = kPatchRows * kPatchCols;  // positions of the map
constexpr int kPatchInRows = kPatchRows + 2, kPatchInCols = kPatchCols + 2;
constexpr int kGradRowBytes = 128, kGradChannels = 64, kGradUnits = kGradRowBytes / kUnitBytes;
constexpr int kGradientBytes = kPatch * kGradRowBytes;
constexpr int kPixelBytes = kPatchInRows * kPatchInCols * kGradRowBytes;
constexpr int kBiasParts = kTensorThreads / kGradChannels;

// Where a unit of a row of 128 bytes stands: 8 neighbouring rows have the same unit in different banks.
__device__ __forceinline__ int unit_offset(int row, int unit) {
  return row * kGradRowBytes + (unit ^ row % 8) * kUnitBytes;
}

// How the map is cut up. Patches are counted over all images; a slice is a run of them.
struct PatchGrid {
  int64_t patches, of_slice;
  int across, down;
};
__host__ __device__ __forceinline__ PatchGrid patch_grid(const ConvPoolShape& s, int slices) {
  const int across = ceil_div(s.conv.w, kPatchCols), down = ceil_div(s.conv.h, kPatchRows);
  const int64_t patches = int64_t(s.n) * across * down;
  return {patches, ceil_div(patches, int64_t(slices)), across, down};
}

struct Patch {
  int64_t n;
  int y, x;  // first position
};
__device__ __forceinline__ Patch patch_of(const PatchGrid& grid, int64_t index) {
  return {index / grid.across / grid.down, static_cast<int>(index / grid.across % grid.down) * kPatchRows,
          static_cast<int>(index % grid.across) * kPatchCols};
}

// The map's gradient of a patch, channels k..k+63, [position][64].
template <typename T>
__device__ __forceinline__ void make_gradient(unsigned char* to, const MapGradient<T>& map,
                                              const ConvPoolShape& s, const Patch& patch, int k) {
  constexpr int kOfUnit = MapGradient<T>::kOfUnit;
  for (int i = threadIdx.x; i < kPatch * kGradUnits; i += kTensorThreads) {
    const int unit = i % kGradUnits, position = i / kGradUnits;
    const int y = patch.y + position / kPatchCols, x = patch.x + position % kPatchCols;
    const auto made = map.unit(patch.n, k + unit * kOfUnit, 0, y, x);
    *pack_at<Pack<T, kOfUnit>>(reinterpret_cast<T*>(to + unit_offset(position, unit))) = made;
  }
}

// Begins to copy the pixels that the taps of a patch touch, channels c..c+63, [pixel][64].
template <typename T>
__device__ __forceinline__ void copy_patch(unsigned char* to, const Map& x, const ConvPoolShape& s,
                                           const Patch& patch, int c) {
  constexpr int kOfUnit = kUnitBytes / sizeof(T);
  const T* image = at<const T>(x, patch.n, 0, 0, 0);
  for (int i = threadIdx.x; i < kPatchInRows * kPatchInCols * kGradUnits; i += kTensorThreads) {
    const int unit = i % kGradUnits, pixel = i / kGradUnits, channel = c + unit * kOfUnit;
    const int h = patch.y + pixel / kPatchInCols - s.padding.h,
              w = patch.x + pixel % kPatchInCols - s.padding.w;
    const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w && channel < s.c;
    async_copy(to + unit_offset(pixel, unit), inside ? image + h * x.h + w * x.w + channel : image, inside);
  }
}

// Fragments of the gradient for 64 outputs and the 16 positions of one row of the patch.
__device__ __forceinline__ void load_gradient(uint32_t (&a)[4][4], const unsigned char* gradient, int row,
                                              int lane) {
  const int position = row * kPatchCols + lane % 8 + lane / 16 * 8;
#pragma unroll
  for (int m = 0; m < 4; ++m)
    load_matrices_transposed(a[m], gradient + unit_offset(position, 2 * m + lane / 8 % 2));
}

// The sum of 1/kBiasParts of a patch's gradient of one output.
template <typename T>
__device__ __forceinline__ float bias_part(const unsigned char* gradient, int k, int part) {
  float sum = 0;
  for (int i = part; i < kPatch; i += kBiasParts)
    sum += widen(*pack_at<const T>(reinterpret_cast<const T*>(gradient + unit_offset(i, k / 8)) + k % 8));
  return sum;
}

// The sum of the kBiasParts parts of output tid, in their order; all threads of the block come here. parts:
// [kTensorThreads], of which nobody uses anything.
__device__ __forceinline__ float sum_of_parts(float* parts, float own) {
  parts[threadIdx.x] = own;
  block_barrier();
  float all = 0;
  if (threadIdx.x < kGradChannels)
#pragma unroll
    for (int i = 0; i < kBiasParts; ++i) all += parts[threadIdx.x + i * kGradChannels];
  return all;
}

// [tap][outputs by 16][register] of a warp
using TapSums = float[kTaps][4][4];

// The gradient of a patch, position by position: one of the operands of tensor_grad_weight().
template <typename T_>
struct DenseGradient {
  using T = T_;
  static constexpr int kBytes = kGradientBytes;
  static __device__ __forceinline__ void make(unsigned char* to, const MapGradient<T>& map,
                                              const ConvPoolShape& s, const Patch& patch, int k) {
    make_gradient(to, map, s, patch, k);
  }
  static __device__ __forceinline__ float bias(const unsigned char* gradient, int k, int part) {
    return bias_part<T>(gradient, k, part);
  }
  static __device__ __forceinline__ void multiply(TapSums& sum, const unsigned char* gradient,
                                                  const unsigned char* pixels) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll 1
    for (int row = 0; row < kPatchRows; ++row) {
      uint32_t a[4][4];
      load_gradient(a, gradient, row, lane);
#pragma unroll
      for (int tap = 0; tap < kTaps; tap += 2) {
        // Lanes 0-15 bring the pixels of this tap, 16-31 those of the next (the last has none: itself again).
        const int own = min(tap + lane / 16, kTaps - 1);
        const int pixel = (row + own / 3) * kPatchInCols + own % 3 + lane % 16;
        uint32_t b[4];
        load_matrices_transposed(b, pixels + unit_offset(pixel, warp));
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          mma<T>(sum[tap][m], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
          if (tap + 1 < kTaps) mma<T>(sum[tap + 1][m], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
        }
      }
    }
  }
};

template <typename Gradient>
constexpr int kGradStageBytes = Gradient::kBytes + kPixelBytes;

template <typename Gradient>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_grad_weight(ConvPoolShape s, MapGradient<typename Gradient::T> map, Map x, int slices,
                       float* partial /* [slices][k][c * 9 + 1] */) {
  auto* shared = shared_memory<unsigned char>();  // two stages
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int k_begin = blockIdx.x * kGradChannels, c_begin = blockIdx.y * kGradChannels;
  const PatchGrid grid = patch_grid(s, slices);
  const int64_t begin = blockIdx.z * grid.of_slice, end = min(begin + grid.of_slice, grid.patches);
  const auto make_stage = [&](int64_t index) {
    unsigned char* stage = shared + index % 2 * kGradStageBytes<Gradient>;
    const Patch patch = patch_of(grid, index);
    copy_patch<typename Gradient::T>(stage + Gradient::kBytes, x, s, patch, c_begin);
    async_commit();
    Gradient::make(stage, map, s, patch, k_begin);
  };

  TapSums sum;
#pragma unroll
  for (int i = 0; i < kTaps * 16; ++i) sum[i / 16][i / 4 % 4][i % 4] = 0.0f;
  float bias_sum = 0;
  if (begin < end) make_stage(begin);
  for (int64_t index = begin; index < end; ++index) {
    async_wait<0>();
    block_barrier();  // this stage has been made, and the one before has been read
    if (index + 1 < end) make_stage(index + 1);
    const unsigned char* gradient = shared + index % 2 * kGradStageBytes<Gradient>;
    if (c_begin == 0) bias_sum += Gradient::bias(gradient, tid % kGradChannels, tid / kGradChannels);
    Gradient::multiply(sum, gradient, gradient + Gradient::kBytes);
  }

  const int elements = s.c * kTaps;
  partial += int64_t(blockIdx.z) * s.k * (elements + 1);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kTaps * 16; ++i) {
    const int r = i % 4, k = k_begin + i / 4 % 4 * 16 + g + r / 2 * 8, c = c_begin + warp * 8 + 2 * t + r % 2;
    if (k < s.k && c < s.c)
      partial[int64_t(k) * (elements + 1) + c * kTaps + i / 16] = sum[i / 16][i / 4 % 4][r];
  }
  if (c_begin != 0) return;
  block_barrier();  // the last stage has been read
  const float all = sum_of_parts(shared_memory<float>(), bias_sum);
  if (tid < kGradChannels && k_begin + tid < s.k)
    partial[int64_t(k_begin + tid) * (elements + 1) + elements] = all;
}

}  // namespace
}  // namespace cnnrnn::cuda
