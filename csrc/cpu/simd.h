// One vector type per instruction set, through the vector extensions of GCC and Clang: the same kernel
// source becomes 512-, 256- or 128-bit code by the flags it is compiled with. Arithmetic, comparison and
// selection (`mask ? a : b`) are the language's own operators; a * b + c contracts to an FMA.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// CNNRNN_EMULATE_512: the kernels of 512 bits in narrower instructions, to test them on any machine.
#if defined(__AVX512F__) || defined(CNNRNN_EMULATE_512)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

// V: vector of T. U: the same in memory, at any alignment. I: integers of T's width (masks, bits).
template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float U __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double U __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<int32_t> {
  typedef int32_t V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t U __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename Simd<T>::V;
using vf = Vec<float>;
using vi = Vec<int32_t>;

template <typename T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));
constexpr int kLanes = kLanesOf<float>;

#define CNNRNN_INLINE inline __attribute__((always_inline))

template <typename T>
CNNRNN_INLINE Vec<T> loadu(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}

template <typename T>
CNNRNN_INLINE void storeu(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}

// x - 0 is x for every x, -0 and NaN included; x + 0 is not.
template <typename T>
CNNRNN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// The first n of kLanes elements, the rest 0; never touches memory past p[n - 1].
template <typename T>
CNNRNN_INLINE Vec<T> load_n(const T* p, int64_t n) {
  if (n >= kLanesOf<T>) return loadu(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_epi32((1u << n) - 1, p));
  else
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_epi64((1u << n) - 1, p));
#else
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

template <typename T>
CNNRNN_INLINE void store_n(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanesOf<T>) return storeu(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_epi32(p, (1u << n) - 1, reinterpret_cast<__m512i>(v));
  else
    _mm512_mask_storeu_epi64(p, (1u << n) - 1, reinterpret_cast<__m512i>(v));
#else
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// As max/min of the hardware: where a or b is NaN, b. Order the operands so that NaN survives.
template <typename V>
CNNRNN_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
CNNRNN_INLINE V vmin(V a, V b) {
  return a < b ? a : b;
}
// Compilers make a comparison and a blend of the lines above, not the one instruction that does the same.
#if defined(CNNRNN_EMULATE_512)
#elif defined(__AVX512F__)
CNNRNN_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
CNNRNN_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
#elif defined(__AVX2__)
CNNRNN_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
CNNRNN_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
#elif defined(__x86_64__)
CNNRNN_INLINE vf vmax(vf a, vf b) { return _mm_max_ps(a, b); }
CNNRNN_INLINE vf vmin(vf a, vf b) { return _mm_min_ps(a, b); }
#endif

// a[0], b[0], a[1], b[1], ... beginning at a[first]; first is 0 or half the lanes.
template <typename T, int first>
CNNRNN_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanesOf<T>;
#if defined(__clang__)
  Vec<T> v = a;
  for (int i = 0; i < L; ++i) v[i] = i % 2 ? b[first + i / 2] : a[first + i / 2];
  return v;
#else
  typename Simd<T>::I order{};
  for (int i = 0; i < L; ++i) order[i] = first + i / 2 + (i % 2 ? L : 0);
  return __builtin_shuffle(a, b, order);
#endif
}

// rows[i][j] becomes rows[j][i]: log2(lanes) perfect shuffles.
template <typename T>
CNNRNN_INLINE void transpose(Vec<T> (&rows)[kLanesOf<T>]) {
  constexpr int L = kLanesOf<T>;
#pragma GCC unroll 4
  for (int round = 1; round < L; round *= 2) {
    Vec<T> next[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      next[2 * i] = interleave<T, 0>(rows[i], rows[i + L / 2]);
      next[2 * i + 1] = interleave<T, L / 2>(rows[i], rows[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
}

// Lane i of the result is the sum of rows[i].
template <typename T>
CNNRNN_INLINE Vec<T> sum_each(Vec<T> (&rows)[kLanesOf<T>]) {
#pragma GCC unroll 4
  for (int count = kLanesOf<T> / 2; count >= 1; count /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      rows[i] = interleave<T, 0>(rows[i], rows[i + count]) +
                interleave<T, kLanesOf<T> / 2>(rows[i], rows[i + count]);
  }
  return rows[0];
}

}  // namespace
