// The gathered core of conv_pool for 1 to 4 input channels of a group, straight from x of any layout.
//
// The elements (c, ky, kx) of a kernel are the depth, 64 bytes of them a piece. The pixels that a rectangle
// of outputs needs stand in shared memory once, channel by channel; a table tells where each element begins
// there. Elements beyond the last point to a zero, which no infinity spoils.
#pragma once

#include "conv_pool_tensor_gather.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kMostFewGathered = 4;

template <typename T>
struct PixelElements {
  static constexpr bool kReadsRectangle = true;
  static constexpr int kOfUnit = kUnitBytes / sizeof(T);
  Map x;
  Size2 halo;  // pixels of a rectangle

  static __host__ __device__ __forceinline__ int elements(const ConvPoolShape& s) {
    return s.c / s.groups * s.kernel.h * s.kernel.w;
  }
  static __host__ __device__ __forceinline__ int packed(const ConvPoolShape& s) {
    return chunks_of<T>(elements(s));
  }
  static Size2 halo_of(const ConvPoolShape& s, int wide) {
    const auto side = [](int outputs, int stride, int kernel, int dilation) {
      return int64_t(outputs - 1) * stride + int64_t(kernel - 1) * dilation + 1;
    };
    const Size2 outputs = outputs_of_rectangle(wide);
    const int64_t h = side(outputs.h, s.stride.h, s.kernel.h, s.dilation.h);
    const int64_t w = side(outputs.w, s.stride.w, s.kernel.w, s.dilation.w);
    constexpr int64_t kMost = 1 << 14;  // of shared memory's size, and no overflow
    return {static_cast<int>(std::min(h, kMost)), static_cast<int>(std::min(w, kMost))};
  }
  // What is kept: the table [elements, rounded up to pieces], a zero, and the pixels [channel][halo].
  static size_t kept_bytes(const ConvPoolShape& s, Size2 halo) {
    return packed(s) * (kChunkBytes / sizeof(T)) * sizeof(int) +
           (kOfUnit + size_t(s.c / s.groups) * halo.h * halo.w) * sizeof(T);
  }

  static __device__ __forceinline__ void enter(ConvPoolShape&, ConvPoolResults&) {}
  static __device__ __forceinline__ int packed_at(const ConvPoolShape&, const Piece& piece) {
    return piece.chunk;
  }
  static __device__ __forceinline__ int pieces(const ConvPoolShape& s) { return packed(s); }
  static __device__ __forceinline__ Piece first(const ConvPoolShape&) { return {0, 0}; }
  static __device__ __forceinline__ Piece next(const ConvPoolShape&, const Piece& piece) {
    return {0, piece.chunk + 1};
  }

  static __device__ __forceinline__ int table_size(const ConvPoolShape& s) {
    return packed(s) * (kChunkBytes / static_cast<int>(sizeof(T)));
  }

  __device__ __forceinline__ void prepare(const ConvPoolShape& s, int group, const BlockPlace& corner,
                                          unsigned char* kept) const {
    auto* table = reinterpret_cast<int*>(kept);
    auto* zero = reinterpret_cast<T*>(table + table_size(s));
    T* const pixels = zero + kOfUnit;
    const int channels = s.c / s.groups, taps = s.kernel.h * s.kernel.w, plane = halo.h * halo.w;
    for (int i = threadIdx.x; i < table_size(s); i += kTensorThreads) {
      const int ky = i % taps / s.kernel.w * s.dilation.h, kx = i % taps % s.kernel.w * s.dilation.w;
      table[i] = i < channels * taps ? i / taps * plane + ky * halo.w + kx : -1;
    }
    const T nothing = narrow_to<T>(0.0f);
    if (threadIdx.x < kOfUnit) zero[threadIdx.x] = nothing;
    const int in_y = corner.y * s.stride.h - s.padding.h, in_x = corner.x * s.stride.w - s.padding.w;
    for (int i = threadIdx.x; i < channels * plane; i += kTensorThreads) {
      const int h = in_y + i % plane / halo.w, w = in_x + i % halo.w, c = group * channels + i / plane;
      const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w;
      const T value = inside ? *at<const T>(x, corner.n, c, h, w) : nothing;
      pixels[i] = value;
    }
    block_barrier();
  }

  __device__ __forceinline__ void fill(unsigned char* rows, const ConvPoolShape& s, int,
                                       const GatherThread& thread, const Piece& piece,
                                       const unsigned char* kept) const {
    const auto* table = reinterpret_cast<const int*>(kept);
    const auto* zero = reinterpret_cast<const T*>(table + table_size(s));
    const T* const pixels = zero + kOfUnit;
    int places[kOfUnit];
#pragma unroll
    for (int i = 0; i < kOfUnit; i += 4) {
      const auto four =
          *pack_at<const Pack<int, 4>>(table + (piece.chunk * kUnits + thread.unit) * kOfUnit + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) places[i + j] = four.v[j];
    }
    for_rows(thread, [&](int row, int which, int dy, int dx) {
      const Size2 local = thread.local[which];
      const T* const first = pixels + (local.h + dy) * s.stride.h * halo.w + (local.w + dx) * s.stride.w;
      Pack<T, kOfUnit> unit;
#pragma unroll
      for (int i = 0; i < kOfUnit; ++i) unit.v[i] = places[i] < 0 ? *zero : first[places[i]];
      *pack_at<Pack<T, kOfUnit>>(reinterpret_cast<T*>(rows + gathered_offset(row, thread.unit))) = unit;
    });
  }
};

}  // namespace
}  // namespace cnnrnn::cuda
