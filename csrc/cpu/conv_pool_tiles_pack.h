// conv_pool on tile registers: how a call is cut up, and the weights as tiles (conv_pool_tiles.h has the
// whole).
#pragma once

#include "conv_pool_common.h"
#include "split.h"

namespace {

constexpr int kTilePanel = 2;  // tiles of outputs that pass over the pixels together
constexpr int64_t kPanelOutputs = kTilePanel * kTileSide;
constexpr int64_t kStripMapBytes = 96 << 10, kStripInputBytes = 768 << 10;  // of the second-level cache
constexpr int64_t kMostTaps = 64;                                           // of a kernel
constexpr int64_t kMostSteps = 16;  // of bfloat16: so many of a panel of B stay in the first-level cache

// How one call is cut up. Values under one row of the kernel make a run, or under one tap if it is dilated.
template <int P>
struct TilePlan {
  int64_t runs, depth, steps;  // of a run: values, and products of 32 of them
  bool flat;                   // tiles go on from one row of the strip to the next
  int64_t pitch;               // pixels from one row of the map to the next
  int64_t rows, strips;        // pooled rows of a strip, strips of an image
  int64_t conv_rows;           // rows of the map that a strip needs at most
  int64_t in_rows, in_cols;    // of its input
  int64_t row, part;           // halves from one row of its input, or part, to the next
  int64_t group;               // strips that share a pass over the weights

  explicit TilePlan(const ConvPoolShape& s) {
    const bool whole_rows = s.dilation.w == 1;
    runs = s.kernel.h * (whole_rows ? 1 : s.kernel.w);
    depth = s.channels * (whole_rows ? s.kernel.w : 1);
    steps = tile_steps(depth);
    in_cols = s.input.w + 2 * s.padding.w;
    const int64_t apart = round_up(s.conv.w, kTileSide);
    flat = s.stride.h == 1 && s.stride.w == 1 && in_cols <= apart;
    pitch = flat ? in_cols : apart;
    row = in_cols * s.channels;
    const auto conv_rows_of = [&](int64_t count) { return (count - 1) * s.step.h + s.window.h; };
    const auto in_rows_of = [&](int64_t count) {
      return (conv_rows_of(count) - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1;
    };
    const auto fits = [&](int64_t count) {
      return conv_rows_of(count) * pitch * kPanelOutputs * 4 <= kStripMapBytes &&
             in_rows_of(count) * row * P * 2 <= kStripInputBytes;
    };
    rows = 1;
    while (rows < s.pooled.h && fits(rows + 1)) ++rows;
    strips = ceil_div(s.pooled.h, rows);
    rows = ceil_div(s.pooled.h, strips);  // even strips
    strips = ceil_div(s.pooled.h, rows);
    conv_rows = conv_rows_of(rows), in_rows = in_rows_of(rows);
    // What tiles read beyond the last pixel, and what the last store of a row reaches.
    part = round_up(in_rows * row + 2 * kTileSide * s.channels * s.stride.w + depth + 2 * kTileDepth, 32);
    group = larger(1, smaller(kStripInputBytes / (P * part * 2), 4));
  }

  int64_t tiles() const { return ceil_div(conv_rows * pitch, kTileSide); }
  int64_t map_size() const { return (tiles() + 1) * kTileSide * kPanelOutputs; }
  int64_t out_size(const ConvPoolShape& s) const { return rows * s.pooled.w * kPanelOutputs + kPanelOutputs; }
  static constexpr int64_t step_size() { return P * kTilePanel * kTileValues; }  // halves of B
  int64_t panel_size() const { return runs * steps * step_size(); }
};

template <int P>
int64_t tiles_packed_size(const ConvPoolShape& s) {  // in floats
  const TilePlan<P> plan(s);
  return ceil_div(s.outputs, kPanelOutputs) * plan.panel_size() / 2;
}
// Bits of float32.
CNNRNN_INLINE vf widened(const float* p, int64_t n) { return load_n(p, n); }
CNNRNN_INLINE vf widened(const Half* p, int64_t n) {
  typedef Half Halves __attribute__((vector_size(2 * kLanes)));
  Halves halves{};
  if (n >= kLanes)
    __builtin_memcpy(&halves, p, sizeof(halves));
  else
    __builtin_memcpy(&halves, p, 2 * n);
  return reinterpret_cast<vf>(__builtin_convertvector(halves, vu) << 16);
}

typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes)));

// The parts of contiguous values.
template <int P, typename T>
CNNRNN_INLINE void stage_parts(const T* from, int64_t count, Half* to, int64_t to_part) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const Parts<P> parts = parts_of<P>(widened(from + i, smaller(count - i, kLanes)));
    for (int p = 0; p < P; ++p) {
      const HalfLanes halves = __builtin_convertvector(parts.of[p] >> 16, HalfLanes);
      __builtin_memcpy(to + p * to_part + i, &halves, sizeof(halves));
    }
  }
}

// Lane i: from[index[i]], of 32.
CNNRNN_INLINE vs take(vs from, vs index) {
#if defined(__AVX512BW__)
  return reinterpret_cast<vs>(
      _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(index), reinterpret_cast<__m512i>(from)));
#else
  vs v{};
  for (int i = 0; i < kTileDepth; ++i) v[i] = from[index[i] & (kTileDepth - 1)];
  return v;
#endif
}

// Every `stride`-th of 32 * stride halves, from `first` on: 32 of them.
CNNRNN_INLINE vs take_every(const Half* from, int stride, int first) {
  vs count{}, taken{};
#pragma GCC unroll 32
  for (int i = 0; i < kTileDepth; ++i) count[i] = static_cast<int16_t>(i);
  const vs place = count * static_cast<int16_t>(stride) + static_cast<int16_t>(first);
  const vs vector = place >> 5;
  for (int j = 0; j < stride; ++j)
    taken = vector == static_cast<int16_t>(j)
                ? take(loadu(reinterpret_cast<const int16_t*>(from) + j * kTileDepth), place)
                : taken;
  return taken;
}

// weight [K, C, KH, KW] -> for panels [begin, end) of outputs: [run][step][P][2][16 pairs][16 outputs][2].
// mirrored: weight is [C, K, KH, KW] and each kernel turned by half a turn.
//
// 32 channels of an output at a time are parted and staged in the order in which they lie. Where channels
// come in pairs, those of 16 outputs then change places by whole vectors; else each half goes by itself.
template <int P, typename T>
void tiles_pack(const ConvPoolShape& s, const T* weight, bool mirrored, float* packed, int64_t begin,
                int64_t end) {
  const TilePlan<P> plan(s);
  const int64_t taps = s.kernel.h * s.kernel.w, of_run = taps / plan.runs;
  const int64_t of_output = taps * (mirrored ? 1 : s.channels),
                of_channel = taps * (mirrored ? s.outputs : 1);
  constexpr int64_t kStaged = kTileDepth * kMostTaps + kLanes;
  alignas(64) Half staged[P * kStaged], rows[kMostTaps][P][kTileSide][kTileDepth];
  const bool in_pairs = s.channels % 2 == 0;
  for (int64_t panel = begin; panel < end; ++panel) {
    Half* const to_panel = reinterpret_cast<Half*>(packed) + panel * plan.panel_size();
    if ((panel + 1) * kPanelOutputs > s.outputs || plan.depth % kTileDepth)
      __builtin_memset(to_panel, 0, plan.panel_size() * sizeof(Half));
    const auto place = [&](int64_t tap, int64_t c) {  // of a channel's pair, for output 0
      const int64_t d = tap % of_run * s.channels + c;
      return to_panel + (tap / of_run * plan.steps + d / kTileDepth) * plan.step_size() +
             d % kTileDepth / 2 * kTileDepth + d % 2;
    };
    for (int64_t k = panel * kPanelOutputs; k < smaller((panel + 1) * kPanelOutputs, s.outputs);
         k += kTileSide) {
      const int64_t outputs = smaller(kTileSide, s.outputs - k),
                    tile = k % kPanelOutputs / kTileSide * kTileValues;
      for (int64_t c0 = 0; c0 < s.channels; c0 += kTileDepth) {
        const int64_t channels = smaller(kTileDepth, s.channels - c0);
        for (int64_t i = 0; i < outputs; ++i) {
          const T* const from = weight + (k + i) * of_output + c0 * of_channel;
          // The next channels: rows of weights are too far apart for the processor to foresee them.
          for (int64_t ahead = 0; !mirrored && ahead < kTileDepth * taps; ahead += 64 / sizeof(T))
            __builtin_prefetch(from + kTileDepth * taps + ahead);
          for (int64_t c = 0; c < (mirrored ? channels : 1); ++c)
            stage_parts<P>(from + c * of_channel, mirrored ? taps : channels * taps, staged + c * taps,
                           kStaged);
          for (int64_t t = 0; t < taps; ++t) {
            const int64_t tap = mirrored ? taps - 1 - t : t;
            for (int p = 0; p < P; ++p)
              if (in_pairs)
                storeu(reinterpret_cast<int16_t*>(rows[tap][p][i]),
                       take_every(staged + p * kStaged, taps, t));
              else
                for (int64_t c = 0; c < channels; ++c)
                  place(tap, c0 + c)[tile + p * kTilePanel * kTileValues + 2 * i] =
                      staged[p * kStaged + c * taps + t];
          }
        }
        for (int64_t tap = 0; in_pairs && tap < taps; ++tap)
          for (int p = 0; p < P; ++p) {
            vf words[kLanes];
            for (int i = 0; i < kLanes; ++i)
              words[i] = i < outputs ? loadu(reinterpret_cast<const float*>(rows[tap][p][i])) : vf{};
            transpose<float>(words);
            for (int64_t c = 0; c < channels; c += 2)
              store_words(place(tap, c0 + c) + tile + p * kTilePanel * kTileValues,
                          reinterpret_cast<vu>(words[c / 2]));
          }
      }
    }
  }
}

}  // namespace
