// What conv_pool does to a map without a convolution: average pooling, its gradient, an activation's
// gradient.
#pragma once

#include "conv_pool_windows.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kPointwiseThreads = 256;

struct Place {
  int64_t n;
  int k, h, w;
};

// Element `index` of a map [n, k, size], counted in the order of its memory so that a warp's accesses are
// adjacent.
__device__ __forceinline__ Place place_of(const Map& map, int k, Size2 size, int64_t index) {
  if (map.c == 1) {
    const int64_t pixel = index / k;
    return {pixel / size.w / size.h, static_cast<int>(index % k), static_cast<int>(pixel / size.w % size.h),
            static_cast<int>(pixel % size.w)};
  }
  const int64_t row = index / size.w;
  return {row / size.h / k, static_cast<int>(row / size.h % k), static_cast<int>(row % size.h),
          static_cast<int>(index % size.w)};
}

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    activation_gradient_kernel(ConvPoolShape s, Map grad_y, Map kept, Map grad) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  if (index >= int64_t(s.n) * s.k * s.out.h * s.out.w) return;
  const auto [n, k, h, w] = place_of(grad, s.k, s.out, index);
  const A of_y = widen(*at<const T>(grad_y, n, k, h, w)), from = widen(*at<const T>(kept, n, k, h, w));
  *at<T>(grad, n, k, h, w) = narrow_to<T>(activation_gradient(s.activation, from, of_y));
}

// One dimension of the windows of an average pool.
struct AverageWindows {
  int size, window, stride, padding;
  __device__ __forceinline__ int begin(int p) const { return max(p * stride - padding, 0); }
  __device__ __forceinline__ int end(int p) const { return min(p * stride - padding + window, size); }
  // Positions that torch divides by: a window may hang over the padding too (ceil_mode).
  __device__ __forceinline__ int counted(int p) const { return min(window, size + 2 * padding - p * stride); }
  // Of `count` windows, those over position x: [first, last).
  __device__ __forceinline__ int first(int x) const {
    return ceil_div(max(x + padding - window + 1, 0), stride);
  }
  __device__ __forceinline__ int last(int x, int count) const {
    return min((x + padding) / stride + 1, count);
  }
};
__device__ __forceinline__ AverageWindows windows_down(const ConvPoolShape& s) {
  return {s.conv.h, s.pool.h, s.pool_stride.h, s.pool_padding.h};
}
__device__ __forceinline__ AverageWindows windows_across(const ConvPoolShape& s) {
  return {s.conv.w, s.pool.w, s.pool_stride.w, s.pool_padding.w};
}

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads) average_kernel(ConvPoolShape s, Map map, Map y) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  if (index >= int64_t(s.n) * s.k * s.out.h * s.out.w) return;
  const auto [n, k, h, w] = place_of(y, s.k, s.out, index);
  const AverageWindows down = windows_down(s), across = windows_across(s);
  A sum = 0;
  for (int i = down.begin(h); i < down.end(h); ++i)
    for (int j = across.begin(w); j < across.end(w); ++j) {
      const A value = widen(*at<const T>(map, n, k, i, j));
      sum += falls(s.activation) ? activate(s.activation, value) : value;
    }
  *at<T>(y, n, k, h, w) = narrow_to<T>(sum / A(down.counted(h) * across.counted(w)));
}

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    spread_kernel(ConvPoolShape s, Map grad_y, Map kept, Map grad_map) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kPointwiseThreads + threadIdx.x;
  if (index >= int64_t(s.n) * s.k * s.conv.h * s.conv.w) return;
  const auto [n, k, h, w] = place_of(grad_map, s.k, s.conv, index);
  const AverageWindows down = windows_down(s), across = windows_across(s);
  A sum = 0;
  for (int i = down.first(h); i < down.last(h, s.out.h); ++i)
    for (int j = across.first(w); j < across.last(w, s.out.w); ++j)
      sum += A(widen(*at<const T>(grad_y, n, k, i, j))) / A(down.counted(i) * across.counted(j));
  if (s.activation != Activation::kNone)
    sum = activation_gradient(s.activation, A(widen(*at<const T>(kept, n, k, h, w))), sum);
  *at<T>(grad_map, n, k, h, w) = narrow_to<T>(sum);
}

// ---- launchers ----
inline unsigned pointwise_blocks(const ConvPoolShape& s, Size2 size) {
  return grid_size(ceil_div(int64_t(s.n) * s.k * size.h * size.w, int64_t(kPointwiseThreads)));
}

}  // namespace
}  // namespace cnnrnn::cuda
