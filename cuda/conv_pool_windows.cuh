// What the conv_pool forward kernels share: addresses, the winner of a window, windows of a 2x2 block.
#pragma once

#include "conv_pool_activations.cuh"

namespace cnnrnn::cuda {
namespace {

template <typename T>
__device__ __forceinline__ T* at(const Map& map, int64_t n, int64_t c, int64_t h, int64_t w) {
  return static_cast<T*>(map.data) + (n * map.n + c * map.c + h * map.h + w * map.w);
}

// Running maximum of a window with torch's rules: the first of equals wins, and of several NaN the last.
// Positions compete by their keys, the activated values (but for relu's, which finish() applies).
template <typename A>
struct WindowMax {
  A key, value;
  int code;
  __device__ __forceinline__ void start(A new_key, A new_value, int position) {
    key = new_key;
    value = new_value;
    code = position;
  }
  __device__ __forceinline__ void add(A new_key, A new_value, int position) {
    if (new_key > key || new_key != new_key) start(new_key, new_value, position);
  }
  // max(relu(v)) = relu(max(v)). Where nothing is positive the gradient ends here, as in torch's
  // threshold_backward; a NaN is not "<= 0": it keeps its value and its gradient.
  __device__ __forceinline__ void finish(bool relu) {
    if (relu && key <= A(0)) start(A(0), value, kNoGradient);
  }
  template <typename T>
  __device__ __forceinline__ void store(const ConvPoolResults& out, int64_t n, int k, int h, int w) const {
    *at<T>(out.y, n, k, h, w) = narrow_to<T>(key);
    if (out.code.data) *at<uint8_t>(out.code, n, k, h, w) = static_cast<uint8_t>(code);
    if (out.kept.data) *at<T>(out.kept, n, k, h, w) = narrow_to<T>(value);
  }
};

// Whether a kernel must compute the keys: relu is applied to winners, no activation to nothing.
constexpr bool has_keys(Activation a) { return a != Activation::kNone && a != Activation::kRelu; }

// The keys of a thread's kCount accumulators, in shared memory [kCount][threads]: only the thread itself
// reads its column. In registers they would cost as many as the accumulators, and one copy of every
// activation each. The caller makes sure that nobody still uses the memory.
template <int kCount, typename A, typename Value>
__device__ __forceinline__ void compute_keys(Activation activation, const Value& value, A* column,
                                             int threads) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) column[i * threads] = value(i);
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) column[i * threads] = activate(activation, column[i * threads]);
}

// ---- windows that make up 2x2 blocks of convolution outputs: 2x2, 2x1, 1x2, or 1x1 (no pool) ----
template <int kPoolH, int kPoolW>
struct BlockWindows {
  static constexpr int kDown = 2 / kPoolH, kAcross = 2 / kPoolW, kCount = kDown * kAcross;
  static constexpr int kPositions = kPoolH * kPoolW;
  // Row and column in the block of one position of one window.
  static __device__ __forceinline__ int dy(int window, int position) {
    return window / kAcross * kPoolH + position / kPoolW;
  }
  static __device__ __forceinline__ int dx(int window, int position) {
    return window % kAcross * kPoolW + position % kPoolW;
  }
  // The winner of a window of block (block_y, block_x); key(dy, dx) and value(dy, dx) of each position. A
  // window may hang over the edge of the map (ceil_mode).
  template <typename A, typename Key, typename Value>
  static __device__ __forceinline__ WindowMax<A> winner(const ConvPoolShape& s, int window, int block_y,
                                                        int block_x, const Key& key, const Value& value) {
    WindowMax<A> best;
#pragma unroll
    for (int i = 0; i < kPositions; ++i) {
      const int y = dy(window, i), x = dx(window, i);
      if (i == 0) best.start(key(y, x), value(y, x), 0);
      if (i > 0 && 2 * block_y + y < s.conv.h && 2 * block_x + x < s.conv.w)
        best.add(key(y, x), value(y, x), i);
    }
    best.finish(s.activation == Activation::kRelu);
    return best;
  }
};

// Calls function(BlockWindows<...>{}) with those of this pool.
template <typename Function>
__device__ __forceinline__ void with_block_windows(Size2 pool, const Function& function) {
  if (pool.h == 2 && pool.w == 2) return function(BlockWindows<2, 2>{});
  if (pool.h == 2) return function(BlockWindows<2, 1>{});
  if (pool.w == 2) return function(BlockWindows<1, 2>{});
  function(BlockWindows<1, 1>{});
}

// Whether windows of 1 or 2 lie side by side: they make up 2x2 blocks of the map.
inline bool is_in_blocks(const ConvPoolShape& s) {
  return s.pool.h <= 2 && s.pool.w <= 2 && s.pool_stride == s.pool && s.pool_padding == Size2{0, 0};
}

// A 3x3 convolution of stride 1 whose windows make up 2x2 blocks of its outputs.
inline bool is_3x3_in_blocks(const ConvPoolShape& s) {
  constexpr Size2 kOne{1, 1};
  return s.kernel == Size2{3, 3} && s.stride == kOne && s.dilation == kOne && is_in_blocks(s);
}

// 2x2 blocks that hold all windows.
__host__ __device__ __forceinline__ Size2 blocks_of(const ConvPoolShape& s) {
  return {ceil_div(s.out.h * s.pool.h, 2), ceil_div(s.out.w * s.pool.w, 2)};
}

}  // namespace
}  // namespace cnnrnn::cuda
