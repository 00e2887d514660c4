// Transposes of whole matrices, for the step between NCHW and NHWC order.
#pragma once

#include "simd.h"

namespace {

// Hands column c of src [rows, columns] (row stride src_stride) to store(c, r, vector, n): n elements of it
// from row r on, for every column and row.
template <typename T, typename Store>
CNNRNN_INLINE void transpose(const T* src, int64_t rows, int64_t columns, int64_t src_stride,
                             const Store& store) {
  constexpr int L = kLanesOf<T>;
  for (int64_t r = 0; r < rows; r += L) {
    const int64_t height = rows - r < L ? rows - r : L;
    for (int64_t c = 0; c < columns; c += L) {
      const int64_t width = columns - c < L ? columns - c : L;
      Vec<T> block[L];
      const T* corner = src + r * src_stride + c;
      if (height == L && width == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = loadu(corner + i * src_stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) block[i] = i < height ? load_n(corner + i * src_stride, width) : Vec<T>{};
      }
      transpose<T>(block);
      if (width == L) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) store(c + i, r, block[i], height);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
          if (i < width) store(c + i, r, block[i], height);
      }
    }
  }
}

}  // namespace
