// bfloat16 in memory, float32 in registers.
#pragma once

#include "rnn.h"
#include "vmath.h"

namespace {

using cnnrnn::Bf16;

CNNRNN_INLINE float value_of(float x) { return x; }
CNNRNN_INLINE float value_of(Bf16 x) {
  return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16);
}

CNNRNN_INLINE vf loadu(const Bf16* p) {
#if defined(CNNRNN_EMULATE_512) || !defined(__AVX2__)
  vf v{};
  for (int l = 0; l < kLanes; ++l) v[l] = value_of(p[l]);
  return v;
#elif defined(__AVX512F__)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#endif
}

CNNRNN_INLINE vf load_n(const Bf16* p, int64_t n) {
  if (n >= kLanes) return loadu(p);
  vf v{};
  for (int64_t i = 0; i < n; ++i) v[i] = value_of(p[i]);
  return v;
}

}  // namespace
