// Winograd's products on tile registers: U and V as three bfloat16 parts (split.h). V lies as B of the
// products, two channels in a word; U as A.
#pragma once

#include "conv_pool_tiles_pack.h"
#include "conv_pool_winograd.h"

namespace {

constexpr int kParts = 3;

struct OnTiles {
  using Value = Half;
  using Registers = TileSession;
  static constexpr int64_t kPanelOutputs = kTilePanel * kTileSide;
  static constexpr int64_t kBlockOutputs = 4 * kPanelOutputs;
  static int64_t first_output(int64_t outputs, int64_t, int64_t p) {
    return smaller(p * kPanelOutputs, outputs);
  }
  // Up to these channels U stays in the second-level cache, if V and M leave room; else it is read less
  // often.
  static constexpr int64_t kResident = 128;
  static int64_t block_panels(int64_t channels) { return channels > kResident ? 4 : 1; }
  static int64_t group_tiles(int64_t channels) { return channels > kResident ? 128 : 64; }
  static constexpr int64_t kStep = kParts * kTileVectors * kTileValues;  // of V
  static int64_t v_stride(int64_t channels) { return tile_steps(channels) * kStep + 2 * kSpread; }
  // Of U: one tile of outputs, one place.
  static int64_t u_tile(int64_t channels) { return tile_steps(channels) * kParts * kTileValues; }
  // Channels that are transformed before they are parted: of planes a pair, of pixels a vector.
  static int64_t chunk(const ConvPoolShape& s) { return s.channels_last ? kLanes : 2; }
  static int64_t chunk_stride(const ConvPoolShape& s) { return chunk(s) * kPanelTiles + kLanes + kSpread; }
};

template <int E>
int64_t staged_size(const WinogradPlan<E, OnTiles>&, const ConvPoolShape& s) {
  return kPlacesOf<E> * OnTiles::chunk_stride(s);
}

// Channels that only fill up a step, and tiles that only fill up a panel, are numbers: nought times NaN is
// NaN.
template <int E>
void prepare_v(const WinogradPlan<E, OnTiles>& plan, const ConvPoolShape& s, Half* v, float* staged) {
  __builtin_memset(staged, 0, staged_size(plan, s) * sizeof(float));
  if (s.channels % kTileDepth) __builtin_memset(v, 0, plan.panels * plan.v_size() * sizeof(Half));
}

template <int E, typename Transform>
CNNRNN_APART void fill_v(const WinogradPlan<E, OnTiles>& plan, const ConvPoolShape& s, int64_t, float* staged,
                         const Transform& transform, Half* v) {
  const int64_t chunk = OnTiles::chunk(s), stride = OnTiles::chunk_stride(s);
  for (int64_t c = 0; c < s.channels; c += chunk) {
    if (c + chunk > s.channels) __builtin_memset(staged, 0, staged_size(plan, s) * sizeof(float));
    transform(c, smaller(c + chunk, s.channels), staged, stride);
    for (int64_t p = 0; p < kPlacesOf<E>; ++p)
      for (int64_t i = 0; i < chunk; i += 2) {
        const float* const from = staged + p * stride + i * kPanelTiles;
        Half* const to = v + p * plan.v_stride + (c + i) / kTileDepth * OnTiles::kStep +
                         (c + i) % kTileDepth / 2 * kTileDepth;
#pragma GCC unroll 4
        for (int j = 0; j < kTileVectors; ++j) {
          const Parts<kParts> even = parts_of<kParts>(loadu(from + j * kLanes));
          const Parts<kParts> odd = parts_of<kParts>(loadu(from + kPanelTiles + j * kLanes));
#pragma GCC unroll 3
          for (int part = 0; part < kParts; ++part)
            store_words(to + (part * kTileVectors + j) * kTileValues, even.of[part] >> 16 | odd.of[part]);
        }
      }
  }
}

template <int E>
CNNRNN_INLINE void multiply_place(const WinogradPlan<E, OnTiles>& plan, const ConvPoolShape& s,
                                  const float* packed, int64_t panel, int64_t p, const Half* v, float* m) {
  const int64_t u_tile = OnTiles::u_tile(s.channels), first = plan.first_output(s, panel);
  const Half* u = reinterpret_cast<const Half*>(packed) + (panel * kPlacesOf<E> + p) * kTilePanel * u_tile;
  multiply_tiles_of<kParts>(tile_rows(smaller(s.outputs - first, OnTiles::kPanelOutputs)), kTileVectors, u,
                            u_tile, v, kTileVectors * kTileValues, tile_steps(s.channels), m, kPanelTiles,
                            false);
}

template <int E>
int64_t winograd_tiles_packed_size(const ConvPoolShape& s) {  // in floats
  return ceil_div(s.outputs, OnTiles::kPanelOutputs) * kPlacesOf<E> * kTilePanel *
         OnTiles::u_tile(s.channels) / 2;
}

// The kernels of 16 channels from c on of output k, transformed: place p to staged[p * stride ...]. mirrored
// as in winograd_pack.
template <int E>
CNNRNN_INLINE void transform_kernels(const ConvPoolShape& s, const float* weight, bool mirrored, int64_t k,
                                     int64_t c, float* staged, int64_t stride) {
  const int64_t of_output = 9 * (mirrored ? 1 : s.channels), of_channel = 9 * (mirrored ? s.outputs : 1);
  const float* from = weight + k * of_output + c * of_channel;
  vf taps[kLanes], turned[9];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i)
    taps[i] = k < s.outputs && c + i < s.channels ? load_n(from + i * of_channel, 9) : vf{};
  transpose<float>(taps);
#pragma GCC unroll 9
  for (int tap = 0; tap < 9; ++tap) turned[tap] = taps[mirrored ? 8 - tap : tap];
  transform_weights<E>(turned, staged, stride);
}

// winograd_pack for tile registers: U[panel][place][tile of outputs][step of
// channels][part][output][channel]. The tiles of one step are made side by side, then copied: their places in
// U lie pages apart.
template <int E>
void winograd_tiles_pack(const ConvPoolShape& s, const float* weight, bool mirrored, float* packed,
                         int64_t begin, int64_t end) {
  constexpr int kPlaces = kPlacesOf<E>;
  const int64_t u_tile = OnTiles::u_tile(s.channels);
  alignas(64) float staged[kPlaces][2][kLanes];
  alignas(64) Half tiles[kPlaces][kParts][kTileSide][kTileDepth];
  for (int64_t tile = begin * kTilePanel; tile < end * kTilePanel; ++tile) {
    Half* const of_tile = reinterpret_cast<Half*>(packed) +
                          (tile / kTilePanel * kPlaces * kTilePanel + tile % kTilePanel) * u_tile;
    for (int64_t step = 0; step < tile_steps(s.channels); ++step) {
      for (int64_t i = 0; i < kTileSide; ++i) {
        for (int half = 0; half < 2; ++half)
          transform_kernels<E>(s, weight, mirrored, tile * kTileSide + i, step * kTileDepth + half * kLanes,
                               staged[0][half], 2 * kLanes);
        for (int p = 0; p < kPlaces; ++p) {
          const Parts<kParts> first = parts_of<kParts>(loadu(staged[p][0]));
          const Parts<kParts> second = parts_of<kParts>(loadu(staged[p][1]));
#pragma GCC unroll 3
          for (int part = 0; part < kParts; ++part)
            store_words(tiles[p][part][i], halves_of(first.of[part], second.of[part]));
        }
      }
      for (int p = 0; p < kPlaces; ++p)
        __builtin_memcpy(of_tile + p * kTilePanel * u_tile + step * kParts * kTileValues, tiles[p],
                         sizeof(tiles[p]));
    }
  }
}

template <int E>
constexpr cnnrnn::PanelForward<float> winograd_tiles_of() {
  return {winograd_output_panels<OnTiles>,
          winograd_tiles_packed_size<E>,
          winograd_tiles_pack<E>,
          winograd_units<E>,
          winograd_scratch_bytes<E, OnTiles>,
          winograd<E, OnTiles>};
}

}  // namespace
