// conv_pool gradient of x by the gathered core: the rows of a tap are units of the map's gradient, made of
// (grad, code).
//
// Input positions of one remainder by the stride form a class: the same taps reach all of them, and the
// others none. A block makes positions of one class, counted by the second dimension of the grid.
#pragma once

#include "conv_pool_tensor_gather.cuh"
#include "conv_pool_tensor_grad_x.cuh"

namespace cnnrnn::cuda {
namespace {

// Positions of x by remainders of the stride: as many classes, of at most this size each.
inline Size2 position_classes(const ConvPoolShape& s) {
  return {std::min(s.stride.h, s.in.h), std::min(s.stride.w, s.in.w)};
}
inline Size2 class_size(const ConvPoolShape& s) {
  return {ceil_div(s.in.h, s.stride.h), ceil_div(s.in.w, s.stride.w)};
}

// The map's gradient as pixels of s.c channels, where the "outputs" of the shape are positions of a class.
template <typename T>
struct GradientUnits {
  static constexpr bool kReadsRectangle = false;
  MapGradient<T> map;
  int of_group;  // channels from a group to the next
  Size2 in;      // of x
  int classes_w;
  Size2 position;  // the class

  __device__ __forceinline__ bool reaches(const ConvPoolShape& s, int tap) const {
    return (position.h + s.padding.h - tap / s.kernel.w * s.dilation.h) % s.stride.h == 0 &&
           (position.w + s.padding.w - tap % s.kernel.w * s.dilation.w) % s.stride.w == 0;
  }
  __device__ __forceinline__ void enter(ConvPoolShape& s, ConvPoolResults& out) {
    position = {static_cast<int>(blockIdx.y) / classes_w, static_cast<int>(blockIdx.y) % classes_w};
    s.out = s.conv = {ceil_div(in.h - position.h, s.stride.h), ceil_div(in.w - position.w, s.stride.w)};
    out.y = {at<T>(out.y, 0, 0, position.h, position.w), out.y.n, out.y.c, out.y.h * s.stride.h,
             out.y.w * s.stride.w};
  }
  static __device__ __forceinline__ int taps(const ConvPoolShape& s) { return s.kernel.h * s.kernel.w; }
  static __device__ __forceinline__ int chunks(const ConvPoolShape& s) {
    return chunks_of<T>(s.c / s.groups);
  }
  static __device__ __forceinline__ int packed(const ConvPoolShape& s) { return taps(s) * chunks(s); }
  static __device__ __forceinline__ int packed_at(const ConvPoolShape& s, const Piece& piece) {
    return piece.chunk * taps(s) + piece.tap;
  }
  __device__ __forceinline__ int pieces(const ConvPoolShape& s) const {
    int count = 0;
    for (int tap = 0; tap < taps(s); ++tap) count += reaches(s, tap);
    return count * chunks(s);
  }
  // The first piece at or after this one whose tap reaches.
  __device__ __forceinline__ Piece reaching(const ConvPoolShape& s, Piece piece) const {
    for (; piece.chunk < chunks(s); piece = {0, piece.chunk + 1})
      for (; piece.tap < taps(s); ++piece.tap)
        if (reaches(s, piece.tap)) return piece;
    return piece;
  }
  __device__ __forceinline__ Piece first(const ConvPoolShape& s) const { return reaching(s, {0, 0}); }
  __device__ __forceinline__ Piece next(const ConvPoolShape& s, const Piece& piece) const {
    return reaching(s, {piece.tap + 1, piece.chunk});
  }
  __device__ __forceinline__ void fill(unsigned char* rows, const ConvPoolShape& s, int group,
                                       const GatherThread& thread, const Piece& piece,
                                       const unsigned char*) const {
    const int c = (piece.chunk * kUnits + thread.unit) * map.kOfUnit;
    // Exact, for the tap reaches: in positions of the map.
    const int up = (position.h + s.padding.h - piece.tap / s.kernel.w * s.dilation.h) / s.stride.h;
    const int left = (position.w + s.padding.w - piece.tap % s.kernel.w * s.dilation.w) / s.stride.w;
    for_rows<1>(thread, [&](int row, int which, int dy, int dx) {
      const BlockPlace& output = thread.output[which];
      const auto made = map.unit(output.n, c, group * of_group, output.y + dy + up, output.x + dx + left);
      *pack_at<Pack<T, MapGradient<T>::kOfUnit>>(
          reinterpret_cast<T*>(rows + gathered_offset(row, thread.unit))) = made;
    });
  }
};

// The shape of the product that makes grad_x: no pool, no activation; kernel, stride, padding and dilation
// are those of the convolution.
inline ConvPoolShape gathered_gradient_shape(const ConvPoolShape& s) {
  ConvPoolShape t = s;
  t.c = s.k, t.k = s.c;
  t.out = t.conv = class_size(s);
  t.pool = t.pool_stride = {1, 1};
  t.pool_padding = {0, 0};
  t.activation = Activation::kNone;
  return t;
}

}  // namespace
}  // namespace cnnrnn::cuda
