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

template <>
struct Simd<int16_t> {
  typedef int16_t V __attribute__((vector_size(kVectorBytes)));
  typedef int16_t U __attribute__((vector_size(kVectorBytes), aligned(2), may_alias));
  typedef int16_t I __attribute__((vector_size(kVectorBytes)));
};

template <typename T>
using Vec = typename Simd<T>::V;
using vf = Vec<float>;
using vi = Vec<int32_t>;
using vs = Vec<int16_t>;

template <typename T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));
constexpr int kLanes = kLanesOf<float>;

#define CNNRNN_INLINE inline __attribute__((always_inline))

// For inner loops that need every register: inlined, they would have to share with what surrounds them.
#define CNNRNN_APART __attribute__((noinline))

template <typename T>
CNNRNN_INLINE Vec<T> loadu(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::U*>(p);
}

template <typename T>
CNNRNN_INLINE void storeu(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::U*>(p) = v;
}

// v, loaded once: a compiler may fold the load into each of its uses, and loads are what the tiles run short
// of.
template <typename V>
CNNRNN_INLINE V in_register(V v) {
#if defined(CNNRNN_EMULATE_512)
  // Such a vector has no register.
#elif defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

// Keeps what is written before it ahead of what follows: left alone, compilers bring every load of an
// unrolled loop to its front, and then spill.
template <typename V>
CNNRNN_INLINE void in_order(V& v) {
#if defined(CNNRNN_EMULATE_512)
#elif defined(__AVX512F__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(v));
#endif
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

// a[first], a[first + 2], ..., then the same of b; first is 0 or 1.
template <typename T, int first>
CNNRNN_INLINE Vec<T> every_other(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanesOf<T>;
#if defined(__clang__)
  Vec<T> v = a;
  for (int i = 0; i < L; ++i) v[i] = 2 * i < L ? a[first + 2 * i] : b[first + 2 * i - L];
  return v;
#else
  typename Simd<T>::I order{};
  for (int i = 0; i < L; ++i) order[i] = first + 2 * i;
  return __builtin_shuffle(a, b, order);
#endif
}

CNNRNN_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// 2 * kLanes bytes as 16-bit numbers.
CNNRNN_INLINE vs load_int16(const int8_t* p) {
#if defined(CNNRNN_EMULATE_512) || !defined(__x86_64__)
  vs v{};
  for (int i = 0; i < 2 * kLanes; ++i) v[i] = p[i];
  return v;
#elif defined(__AVX512BW__)
  return reinterpret_cast<vs>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<vs>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<vs>(_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8));
#endif
}

// Lane i is a[2i] * b[2i] + a[2i + 1] * b[2i + 1].
CNNRNN_INLINE vi multiply_pairs(vs a, vs b) {
#if defined(CNNRNN_EMULATE_512) || !defined(__x86_64__)
  const vi u = reinterpret_cast<vi>(a), v = reinterpret_cast<vi>(b);
  return (u << 16 >> 16) * (v << 16 >> 16) + (u >> 16) * (v >> 16);
#elif defined(__AVX512BW__)
  return reinterpret_cast<vi>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#endif
}

// In each `region` of a and b: the `unit`s of elements of their first (half = 0) or second halves, in turns.
// Within 16 bytes, or of 16 bytes and more, that is one instruction.
template <typename T, int unit, int region, int half>
CNNRNN_INLINE Vec<T> unpack(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanesOf<T>;
#if defined(__clang__)
  Vec<T> v = a;
#else
  typename Simd<T>::I order{};
#endif
  for (int i = 0; i < L; ++i) {
    const int in_region = i % region, pair = in_region / (2 * unit);
    const int from = i - in_region + half * region / 2 + pair * unit + in_region % unit;
    const bool of_b = in_region / unit % 2;
#if defined(__clang__)
    v[i] = of_b ? b[from] : a[from];
  }
  return v;
#else
    order[i] = from + (of_b ? L : 0);
  }
  return __builtin_shuffle(a, b, order);
#endif
}

// rows[i][j] becomes rows[j][i]: within 16 bytes first, where shuffles are cheap, then by whole 16 bytes.
template <typename T>
CNNRNN_INLINE void transpose(Vec<T> (&rows)[kLanesOf<T>]) {
  constexpr int L = kLanesOf<T>, kUnit = 16 / static_cast<int>(sizeof(T));
  Vec<T> next[L];
#pragma GCC unroll 8
  for (int i = 0; i < L; i += kUnit) {
    if constexpr (kUnit == 2) {
      next[i] = unpack<T, 1, kUnit, 0>(rows[i], rows[i + 1]);
      next[i + 1] = unpack<T, 1, kUnit, 1>(rows[i], rows[i + 1]);
    } else {
      const Vec<T> a = unpack<T, 1, kUnit, 0>(rows[i], rows[i + 1]);
      const Vec<T> b = unpack<T, 1, kUnit, 0>(rows[i + 2], rows[i + 3]);
      const Vec<T> c = unpack<T, 1, kUnit, 1>(rows[i], rows[i + 1]);
      const Vec<T> d = unpack<T, 1, kUnit, 1>(rows[i + 2], rows[i + 3]);
      next[i] = unpack<T, 2, kUnit, 0>(a, b), next[i + 1] = unpack<T, 2, kUnit, 1>(a, b);
      next[i + 2] = unpack<T, 2, kUnit, 0>(c, d), next[i + 3] = unpack<T, 2, kUnit, 1>(c, d);
    }
  }
  // Row i now holds, in unit q, column q * kUnit + i % kUnit of rows i / kUnit * kUnit on: perfect shuffles.
#pragma GCC unroll 4
  for (int round = kUnit; round < L; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = next[i];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      const int unit = i / kUnit, rest = i % kUnit;
      next[2 * unit * kUnit + rest] = unpack<T, kUnit, L, 0>(rows[i], rows[i + L / 2]);
      next[(2 * unit + 1) * kUnit + rest] = unpack<T, kUnit, L, 1>(rows[i], rows[i + L / 2]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) rows[i] = next[i];
}

template <typename T, int unit>
CNNRNN_INLINE void sum_pairs(Vec<T> (&rows)[kLanesOf<T>]) {
  constexpr int L = kLanesOf<T>, kInstructionLane = 16 / static_cast<int>(sizeof(T));
  constexpr int region = unit < kInstructionLane ? kInstructionLane : L;
#pragma GCC unroll 8
  for (int i = 0; i < L / unit / 2; ++i)
    rows[i] = unpack<T, unit, region, 0>(rows[2 * i], rows[2 * i + 1]) +
              unpack<T, unit, region, 1>(rows[2 * i], rows[2 * i + 1]);
  if constexpr (2 * unit < L) sum_pairs<T, 2 * unit>(rows);
}

// Lane i of the result is the sum of rows[i].
template <typename T>
CNNRNN_INLINE Vec<T> sum_each(Vec<T> (&rows)[kLanesOf<T>]) {
  sum_pairs<T, 1>(rows);
  return rows[0];
}

}  // namespace
