// conv_pool backward: gradients from (grad, code), grad being that of the winners before their activation. At
// most one position of a window has a gradient, so both kernels walk over windows, not over the convolution's
// outputs: a quarter of the products for a 2x2 pool. No atomics: every sum has one owner and a fixed order.
#pragma once

#include "conv_pool_forward.cuh"
#include "conv_pool_reduce.cuh"

namespace cnnrnn::cuda {
namespace {

inline bool is_3x3_pool2(const ConvPoolShape& s) { return is_3x3_in_blocks(s) && s.pool == Size2{2, 2}; }

// The shape, with what is_3x3_pool2() promises known to the compiler where k3x3Pool2.
template <bool k3x3Pool2>
struct Geometry {
  const ConvPoolShape& s;
  __device__ Size2 kernel() const { return k3x3Pool2 ? Size2{3, 3} : s.kernel; }
  __device__ Size2 stride() const { return k3x3Pool2 ? Size2{1, 1} : s.stride; }
  __device__ Size2 dilation() const { return k3x3Pool2 ? Size2{1, 1} : s.dilation; }
  __device__ Size2 pool() const { return k3x3Pool2 ? Size2{2, 2} : s.pool; }
  __device__ Size2 pool_stride() const { return k3x3Pool2 ? Size2{2, 2} : s.pool_stride; }
  __device__ Size2 pool_padding() const { return k3x3Pool2 ? Size2{0, 0} : s.pool_padding; }
};

__device__ __forceinline__ int ceil_div_signed(int a, int b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }

// One dimension of the windows that can send a gradient to one input position.
struct WindowRange {
  int begin, end;
};
__device__ __forceinline__ WindowRange windows_over(int position, int padding, int kernel, int dilation,
                                                    int stride, int conv, int pool, int pool_stride,
                                                    int pool_padding, int out) {
  const int conv_begin = max(0, ceil_div_signed(position + padding - (kernel - 1) * dilation, stride));
  const int conv_last = min(conv - 1, (position + padding) / stride);
  const int begin = max(0, ceil_div_signed(conv_begin + pool_padding - pool + 1, pool_stride));
  const int last = min(out - 1, (conv_last + pool_padding) / pool_stride);
  return {begin, conv_begin <= conv_last ? last + 1 : begin};
}

// The tap that leads from an input position to a convolution output, or -1.
__device__ __forceinline__ int tap_between(int position, int padding, int conv_position, int stride,
                                           int dilation, int kernel) {
  const int distance = position + padding - conv_position * stride;
  if (distance < 0 || distance % dilation != 0 || distance / dilation >= kernel) return -1;
  return distance / dilation;
}

// ---- grad_x: a thread gathers one input position of kIn channels ----
constexpr int kGradXThreads = 128, kGradXIn = 4;

template <typename T, bool k3x3Pool2>
__global__ void __launch_bounds__(kGradXThreads)
    conv_pool_grad_x_kernel(ConvPoolShape s, Map grad_y, Map code, const T* weight, Map grad_x) {
  using A = Accumulator<T>;
  constexpr int kIn = kGradXIn;
  const Geometry<k3x3Pool2> geometry{s};
  const Size2 kernel = geometry.kernel(), stride = geometry.stride(), dilation = geometry.dilation();
  const Size2 pool = geometry.pool(), pool_stride = geometry.pool_stride(),
              pool_pad = geometry.pool_padding();
  const int64_t index = int64_t(blockIdx.x) * kGradXThreads + threadIdx.x;
  const int64_t in_size = int64_t(s.in.h) * s.in.w;
  if (index >= s.n * in_size) return;
  const int64_t n = index / in_size;
  const int h = static_cast<int>(index % in_size / s.in.w), w = static_cast<int>(index % s.in.w);
  const int channels = s.c / s.groups, outputs = s.k / s.groups;
  const int tiles_c = ceil_div(channels, kIn);
  const int group = blockIdx.y / tiles_c, c_begin = static_cast<int>(blockIdx.y) % tiles_c * kIn;
  const int c_count = min(kIn, channels - c_begin);
  const int taps = kernel.h * kernel.w;

  const WindowRange rows = windows_over(h, s.padding.h, kernel.h, dilation.h, stride.h, s.conv.h, pool.h,
                                        pool_stride.h, pool_pad.h, s.out.h);
  const WindowRange cols = windows_over(w, s.padding.w, kernel.w, dilation.w, stride.w, s.conv.w, pool.w,
                                        pool_stride.w, pool_pad.w, s.out.w);
  A sum[kIn];
#pragma unroll
  for (int c = 0; c < kIn; ++c) sum[c] = A(0);
  for (int out_h = rows.begin; out_h < rows.end; ++out_h) {
    for (int out_w = cols.begin; out_w < cols.end; ++out_w) {
      for (int k = group * outputs; k < (group + 1) * outputs; ++k) {
        const int winner = *at<const uint8_t>(code, n, k, out_h, out_w);
        if (winner == kNoGradient) continue;
        const int tap_h = tap_between(h, s.padding.h, out_h * pool_stride.h - pool_pad.h + winner / pool.w,
                                      stride.h, dilation.h, kernel.h);
        const int tap_w = tap_between(w, s.padding.w, out_w * pool_stride.w - pool_pad.w + winner % pool.w,
                                      stride.w, dilation.w, kernel.w);
        if (tap_h < 0 || tap_w < 0) continue;
        const A g = widen(*at<const T>(grad_y, n, k, out_h, out_w));
        const T* from = weight + (int64_t(k) * channels + c_begin) * taps + tap_h * kernel.w + tap_w;
#pragma unroll
        for (int c = 0; c < kIn; ++c)
          if (c < c_count) sum[c] += g * widen(from[c * taps]);
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kIn; ++c)
    if (c < c_count) *at<T>(grad_x, n, group * channels + c_begin + c, h, w) = narrow_to<T>(sum[c]);
}

// ---- grad_weight and grad_bias ----
// The windows are cut into slices, their number a function of the shape alone. A block sums one output
// channel over one slice: a thread owns one element of the kernel (the element after the last is the bias)
// and all threads walk over the same windows. A second kernel adds the slices in order
// (conv_pool_reduce.cuh).
constexpr int kGradWThreads = 128;

template <typename A>
struct LiveWindow {  // of one output channel: its gradient and where its receptive field begins
  A gradient;
  int n, h, w;  // n < 0: no gradient
};

template <typename T, bool k3x3Pool2>
__global__ void __launch_bounds__(kGradWThreads)
    conv_pool_grad_weight_kernel(ConvPoolShape s, Map grad_y, Map code, Map x, int64_t slice_windows,
                                 Accumulator<T>* partial /* [slices][k][elements + 1] */) {
  using A = Accumulator<T>;
  const Geometry<k3x3Pool2> geometry{s};
  const Size2 kernel = geometry.kernel(), stride = geometry.stride(), dilation = geometry.dilation();
  const Size2 pool = geometry.pool(), pool_stride = geometry.pool_stride(),
              pool_pad = geometry.pool_padding();
  auto* windows = shared_memory<LiveWindow<A>>();  // [blockDim.x]

  const int tid = threadIdx.x, threads = blockDim.x;
  const int k = blockIdx.y, channels = s.c / s.groups, taps = kernel.h * kernel.w;
  const int elements = channels * taps, element = blockIdx.x * threads + tid;
  const int c = k / (s.k / s.groups) * channels + element / taps;
  const int tap_h = element % taps / kernel.w * dilation.h, tap_w = element % taps % kernel.w * dilation.w;
  const int64_t out_size = int64_t(s.out.h) * s.out.w, all = s.n * out_size;
  const int64_t begin = blockIdx.z * slice_windows, end = min(begin + slice_windows, all);

  A sum = A(0);
  for (int64_t chunk = begin; chunk < end; chunk += threads) {
    const int count = static_cast<int>(min(int64_t(threads), end - chunk));
    block_barrier();  // the last chunk has been read
    if (tid < count) {
      const int64_t index = chunk + tid, n = index / out_size;
      const int out_h = static_cast<int>(index % out_size / s.out.w),
                out_w = static_cast<int>(index % s.out.w);
      const int winner = *at<const uint8_t>(code, n, k, out_h, out_w);
      LiveWindow<A> window{A(0), -1, 0, 0};
      if (winner != kNoGradient) {
        window.gradient = widen(*at<const T>(grad_y, n, k, out_h, out_w));
        window.n = static_cast<int>(n);
        window.h = (out_h * pool_stride.h - pool_pad.h + winner / pool.w) * stride.h - s.padding.h;
        window.w = (out_w * pool_stride.w - pool_pad.w + winner % pool.w) * stride.w - s.padding.w;
      }
      windows[tid] = window;
    }
    block_barrier();
    for (int i = 0; i < count; ++i) {
      const LiveWindow<A> window = windows[i];
      if (window.n < 0) continue;  // the same for the whole block
      const int h = window.h + tap_h, w = window.w + tap_w;
      const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w;
      if (element < elements && inside) sum += window.gradient * widen(*at<const T>(x, window.n, c, h, w));
      if (element == elements) sum += window.gradient;
    }
  }
  if (element <= elements) partial[(int64_t(blockIdx.z) * s.k + k) * (elements + 1) + element] = sum;
}

// ---- launchers ----
template <typename T, bool k3x3Pool2>
void grad_x(const ConvPoolShape& s, Map grad_y, Map code, const void* weight, Map grad_x, void* stream) {
  const int64_t blocks = ceil_div(int64_t(s.n) * s.in.h * s.in.w, int64_t(kGradXThreads));
  const int tiles_c = s.groups * ceil_div(s.c / s.groups, kGradXIn);
  launch(conv_pool_grad_x_kernel<T, k3x3Pool2>, dim3(grid_size(blocks), tiles_c), kGradXThreads, 0, stream, s,
         grad_y, code, static_cast<const T*>(weight), grad_x);
}

inline int elements_of(const ConvPoolShape& s) { return s.c / s.groups * s.kernel.h * s.kernel.w; }

// About 512 windows a slice, as long as the partial sums stay below 64 MB.
inline int slices_of(const ConvPoolShape& s) {
  const int64_t windows = int64_t(s.n) * s.out.h * s.out.w;
  const int64_t fit = (int64_t(1) << 24) / (int64_t(s.k) * (elements_of(s) + 1));
  const int64_t wanted = ceil_div(windows, int64_t(512));
  return static_cast<int>(std::max(int64_t(1), std::min({wanted, fit, int64_t(256)})));
}

template <typename T, bool k3x3Pool2>
void grad_weight(const ConvPoolShape& s, Map grad_y, Map code, Map x, void* workspace, void* grad_weight,
                 void* grad_bias, void* stream) {
  using A = Accumulator<T>;
  const int elements = elements_of(s), slices = slices_of(s);
  const int threads = std::min(kGradWThreads, ceil_div(elements + 1, 32) * 32);
  const int64_t slice_windows = ceil_div(int64_t(s.n) * s.out.h * s.out.w, int64_t(slices));
  auto* partial = static_cast<A*>(workspace);
  launch(conv_pool_grad_weight_kernel<T, k3x3Pool2>, dim3(ceil_div(elements + 1, threads), s.k, slices),
         threads, threads * sizeof(LiveWindow<A>), stream, s, grad_y, code, x, slice_windows, partial);
  launch_reduce_slices<T>(partial, slices, s.k, elements, grad_weight, grad_bias, stream);
}

}  // namespace
}  // namespace cnnrnn::cuda
