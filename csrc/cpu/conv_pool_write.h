// What the conv_pool kernels do with a strip's map or its pooled values: pool, activate, write.
#pragma once

#include "activations.h"
#include "conv_pool_past.h"
#include "conv_pool_pool.h"
#include "transpose.h"

namespace {

template <typename T>
CNNRNN_INLINE void store_codes(uint8_t* out, Vec<T> v, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanesOf<T>)));
  const Bytes bytes = __builtin_convertvector(reinterpret_cast<Code<T>>(v), Bytes);
  if (n >= kLanesOf<T>)
    __builtin_memcpy(out, &bytes, sizeof(bytes));
  else
    __builtin_memcpy(out, &bytes, n);
}

template <typename T>
CNNRNN_INLINE void store_values(T* out, Vec<T> v, int64_t n) {
  store_n(out, v, n);
}
// The bits of bfloat16, rounded to nearest even.
CNNRNN_INLINE void store_values(uint16_t* out, vf v, int64_t n) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  const Words bits = reinterpret_cast<Words>(v), rounded = bits + 0x7fffu + (bits >> 16 & 1u);
  const Words words = (v != v ? bits | 0x400000u : rounded) >> 16;
  const Halves halves = __builtin_convertvector(words, Halves);
  if (n >= kLanes)
    __builtin_memcpy(out, &halves, sizeof(halves));
  else
    __builtin_memcpy(out, &halves, 2 * n);
}

// Writes [windows, lanes] of ys and codes to channels k0.. of y and code; code may be null.
template <typename T, typename Out>
void write_block(const ConvPoolShape& s, const Strip& strip, const T* ys, const T* codes, int64_t lanes,
                 int64_t k0, int64_t channels, Out* y, uint8_t* code) {
  constexpr int L = kLanesOf<T>;
  const int64_t windows = strip.rows * s.pooled.w, before = strip.row * s.pooled.w;
  const bool past = passes_cache<Out>(s.batch * s.outputs * s.windows());
  const auto put = [&](int64_t to, Vec<T> v, int64_t n) {
    if (!past || !store_past(y + to, v, n)) store_values(y + to, v, n);
  };
  if (s.channels_last) {
    const int64_t at = (strip.image * s.windows() + before) * s.outputs + k0;
    for (int64_t w = 0; w < windows; ++w) {
      for (int64_t c = 0; c < channels; c += L) {
        put(at + w * s.outputs + c, loadu(ys + w * lanes + c), channels - c);
        if (code) store_codes<T>(code + at + w * s.outputs + c, loadu(codes + w * lanes + c), channels - c);
      }
    }
    return;
  }
  const int64_t plane = s.windows(), at = (strip.image * s.outputs + k0) * plane + before;
  transpose(ys, windows, channels, lanes,
            [&](int64_t k, int64_t w, Vec<T> v, int64_t count) { put(at + k * plane + w, v, count); });
  if (code)
    transpose(codes, windows, channels, lanes, [&](int64_t k, int64_t w, Vec<T> v, int64_t count) {
      store_codes<T>(code + at + k * plane + w, v, count);
    });
}

// pool_map of `count` pixels; keys: room for as many.
template <typename T, int V>
void pool_strip(const ConvPoolShape& s, const Strip& strip, const T* map, T* keys, int64_t count, T* ys,
                T* codes) {
  if (!s.keyed) return pool_map<T, V, false>(s, strip, map, map, ys, codes);
  kActivations<T>[s.activation].value(map, keys, count * V * kLanesOf<T>);
  pool_map<T, V, true>(s, strip, map, keys, ys, codes);
}

// Activates and writes pooled values; code and kept may be null.
template <typename T, typename Out>
void write_strip(const ConvPoolShape& s, const Strip& strip, T* ys, const T* codes, int64_t lanes, int64_t k0,
                 int64_t channels, Out* y, uint8_t* code, Out* kept) {
  if (kept) write_block<T, Out>(s, strip, ys, codes, lanes, k0, channels, kept, nullptr);
  if (s.activation != cnnrnn::kNoActivation)
    kActivations<T>[s.activation].value(ys, ys, strip.rows * s.pooled.w * lanes);
  write_block<T, Out>(s, strip, ys, codes, lanes, k0, channels, y, code);
}

// Where there is no pool and nothing to keep: writes the map [rows, pitch, lanes] itself, after `activate`.
template <typename Out, typename Activate>
void write_map(const ConvPoolShape& s, const Strip& strip, const float* map, int64_t lanes, int64_t k0,
               int64_t channels, Out* y, const Activate& activate) {
  // Rows without a gap are one.
  const int64_t plane = s.windows(), whole = strip.pitch == s.pooled.w ? strip.rows : 1;
  const int64_t width = whole * s.pooled.w;
  const bool past = passes_cache<Out>(s.batch * s.outputs * plane);
  for (int64_t r = strip.row; r < strip.row + strip.rows; r += whole, map += strip.pitch * lanes) {
    if (s.channels_last) {
      Out* to = y + (strip.image * plane + r * s.pooled.w) * s.outputs + k0;
      for (int64_t x = 0; x < width; ++x, to += s.outputs)
        for (int64_t c = 0; c < channels; c += kLanes)
          store_values(to + c, activate(loadu(map + x * lanes + c)), channels - c);
    } else {
      Out* to = y + (strip.image * s.outputs + k0) * plane + r * s.pooled.w;
      transpose(map, width, channels, lanes, [&](int64_t k, int64_t x, vf v, int64_t count) {
        const vf value = activate(v);
        if (!past || !store_past(to + k * plane + x, value, count))
          store_values(to + k * plane + x, value, count);
      });
    }
  }
}

}  // namespace
