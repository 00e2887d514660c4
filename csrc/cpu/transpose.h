// Transposes in registers, for the step between NCHW and NHWC order.
#pragma once

#include "simd.h"

namespace {

template <int... J>
struct Indices {};
template <int N, int... J>
struct IndicesUpTo : IndicesUpTo<N - 1, N - 1, J...> {};
template <int... J>
struct IndicesUpTo<0, J...> {
  using type = Indices<J...>;
};

// Swaps the off-diagonal blocks of B x B elements of each 2B x 2B block of the rows.
template <typename T, int B, int... J>
CNNRNN_INLINE void swap_blocks(Vec<T> (&rows)[sizeof...(J)], Indices<J...>) {
  constexpr int L = sizeof...(J);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    if (i & B) continue;
    const Vec<T> a = rows[i], b = rows[i + B];
#if defined(__clang__)
    rows[i] = __builtin_shufflevector(a, b, ((J & B) ? L + J - B : J)...);
    rows[i + B] = __builtin_shufflevector(a, b, ((J & B) ? L + J : J + B)...);
#else  // GCC has the other one since version 12 only
    typedef typename Simd<T>::I Order;
    rows[i] = __builtin_shuffle(a, b, Order{((J & B) ? L + J - B : J)...});
    rows[i + B] = __builtin_shuffle(a, b, Order{((J & B) ? L + J : J + B)...});
#endif
  }
}

template <typename T>
CNNRNN_INLINE void transpose_rows(Vec<T> (&rows)[kLanesOf<T>]) {
  using All = typename IndicesUpTo<kLanesOf<T>>::type;
  if constexpr (kLanesOf<T> > 8) swap_blocks<T, 8>(rows, All{});
  if constexpr (kLanesOf<T> > 4) swap_blocks<T, 4>(rows, All{});
  if constexpr (kLanesOf<T> > 2) swap_blocks<T, 2>(rows, All{});
  swap_blocks<T, 1>(rows, All{});
}

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
      transpose_rows<T>(block);
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
