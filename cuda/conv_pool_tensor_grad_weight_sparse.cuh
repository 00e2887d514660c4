// An experiment, off unless CNNRNN_SPARSE_GRAD_WEIGHT=1: the gradient of the weights of 3x3 with 2x2 windows
// by sparse products. Its layouts follow the PTX manual and have been emulated; no GPU has run it.
//
// At most one of the four positions of a window has a gradient. With the four as neighbours in depth they are
// a chunk of a sparse operand: the gradient is its value, the code tells the half of the word where it stands
// and the metadata. A patch takes 144 instructions of a warp, where the dense product has 288.
#pragma once

#include "conv_pool_tensor_grad_weight.cuh"
#include "primitives_sparse.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kWindowRows = kPatchRows / 2, kWindowCols = kPatchCols / 2;
constexpr int kPatchWindows = kWindowRows * kWindowCols;
constexpr int kWindowStride = kGradChannels + 8;  // words; windows t = 0..3 are in different banks
constexpr int kWindowBytes = kPatchWindows * kWindowStride * 4;

template <typename T_>
struct SparseGradient {
  using T = T_;
  static constexpr int kOfUnit = MapGradient<T>::kOfUnit;
  // Words [window][channel], then metadata of 16 bits [row of windows][half of it][channel].
  static constexpr int kBytes = kWindowBytes + kWindowRows * 2 * kGradChannels * 2;

  // A thread makes 8 channels of a window: the lanes of a warp are 4 windows, a metadata's worth.
  static __device__ __forceinline__ void make(unsigned char* to, const MapGradient<T>& map,
                                              const ConvPoolShape& s, const Patch& patch, int k) {
    const int lane = threadIdx.x % 32, window = threadIdx.x / 8, unit = threadIdx.x % 8;
    const int h = patch.y / 2 + window / kWindowCols, w = patch.x / 2 + window % kWindowCols;
    const int c = k + unit * kOfUnit;
    Pack<uint32_t, kOfUnit> words{};
    uint32_t places = 0;  // of the 8 channels
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i) places |= kFirstPlaces << (4 * i);
    if (h < s.out.h && w < s.out.w && c < s.k) {
      const auto values = *pack_at<const Pack<T, kOfUnit>>(at<const T>(map.grad, patch.n, c, h, w));
      const auto codes =
          *pack_at<const Pack<uint8_t, kOfUnit>>(at<const uint8_t>(map.code, patch.n, c, h, w));
#pragma unroll
      for (int i = 0; i < kOfUnit; ++i) {
        const int code = codes.v[i];
        if (code == kNoGradient) continue;
        words.v[i] = uint32_t(bits_as<uint16_t>(values.v[i])) << (code % 2 * 16);
        if (code >= 2) places ^= (kFirstPlaces ^ kLastPlaces) << (4 * i);
      }
    }
    auto* const row = reinterpret_cast<uint32_t*>(to) + window * kWindowStride + unit * kOfUnit;
#pragma unroll
    for (int i = 0; i < kOfUnit; i += 4) {
      Pack<uint32_t, 4> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.v[j] = words.v[i + j];
      *pack_at<Pack<uint32_t, 4>>(row + i) = four;
    }
    // Lane (window of the four, unit) puts together two of the unit's channels.
    const int first = lane / 8 * 2;
    uint32_t pair = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t of_window = shuffle(places, i * 8 + unit);
      pair |= (of_window >> (4 * first) & 15) << (4 * i) | (of_window >> (4 * first + 4) & 15)
                                                               << (4 * i + 16);
    }
    auto* const metadata = reinterpret_cast<uint32_t*>(to + kWindowBytes);
    metadata[(window / 4 * kGradChannels + unit * kOfUnit + first) / 2] = pair;
  }

  static __device__ __forceinline__ float bias(const unsigned char* gradient, int k, int part) {
    float sum = 0;
    for (int i = part; i < kPatchWindows; i += kBiasParts) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(gradient)[i * kWindowStride + k];
      sum += widen(bits_as<T>(static_cast<uint16_t>(word >> 16 ? word >> 16 : word)));
    }
    return sum;
  }

  static __device__ __forceinline__ void multiply(TapSums& sum, const unsigned char* gradient,
                                                  const unsigned char* pixels) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const auto* words = reinterpret_cast<const uint32_t*>(gradient);
    const auto* metadata = reinterpret_cast<const uint16_t*>(gradient + kWindowBytes);
#pragma unroll 1
    for (int row = 0; row < kWindowRows; ++row) {
      uint32_t a[4][4], places[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[m][r] = words[(row * kWindowCols + t + r / 2 * 4) * kWindowStride + 16 * m + g + r % 2 * 8];
        const auto* of_row = metadata + (row * 2 + t % 2) * kGradChannels + 16 * m + g;
        places[m] = of_row[0] | uint32_t(of_row[8]) << 16;
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        // Depth `lane`: position lane % 4 of window lane / 4.
        const int y = 2 * row + lane % 4 / 2 + tap / 3, x = lane / 4 * 2 + lane % 2 + tap % 3;
        uint32_t b[4];
        load_matrices_transposed(b, pixels + unit_offset(y * kPatchInCols + x, warp));
#pragma unroll
        for (int m = 0; m < 4; ++m) mma_sparse<T>(sum[tap][m], a[m], b, places[m]);
      }
    }
  }
};

}  // namespace
}  // namespace cnnrnn::cuda
