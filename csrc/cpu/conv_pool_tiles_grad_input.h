// The gradient of x on tile registers, where there is no pool: products of matrices, (pixels of all images) x
// outputs x (channels at one tap), each added where the tap stands in the input. Any stride and dilation; no
// product is with zeros of padding or of a stride. float32 by three bfloat16 parts.
//
// 32 channels at a time: their weights are packed into the second-level cache and pass over all images. Each
// sum has one owner: results do not depend on the threads. Where values do not part, NaN appears, and the
// host computes again by another kernel.
#pragma once

#include "conv_pool_tiles_grad.h"
#include "conv_pool_write.h"

namespace {

constexpr int64_t kGroupPixels = 256;       // images are taken together up to about so many pixels of maps,
constexpr int64_t kGroupBytes = 512 << 10;  // and so large a gradient
constexpr int64_t kSumSteps = 4;            // steps of 32 outputs that sums stay in registers for

struct TilesInputPlan {
  int64_t taps, steps;       // steps of 32 outputs
  int64_t in_rows, in_cols;  // of an image with its padding
  int64_t units;             // panels of 32 channels
  int64_t group, groups;     // images that share tiles of pixels, and how many such groups there are
  int64_t tiles;             // of pixels of a group
  int64_t block;             // pixels that meet one tap before the next

  explicit TilesInputPlan(const ConvPoolShape& s)
      : taps(s.kernel.h * s.kernel.w),
        steps(tile_steps(s.outputs)),
        in_rows(s.input.h + 2 * s.padding.h),
        in_cols(s.input.w + 2 * s.padding.w),
        units(ceil_div(s.channels, kPanelOutputs)) {
    group = smaller(ceil_div(kGroupPixels, s.conv.h * s.conv.w), larger(kGroupBytes / (image_size() * 4), 1));
    // Where images share tiles, all of a group: each sum then goes on from tap to tap wherever its image
    // stands. One image alone keeps its tiles in the first-level cache.
    const bool shared = group > 1;
    group = smaller(group, s.batch);
    groups = ceil_div(s.batch, group);
    tiles = tile_rows(group * s.conv.h * s.conv.w);
    block = (shared ? tiles : 2) * kTileSide;
  }

  int64_t tap_size() const { return steps * kTilePanel * kStepHalves; }
  int64_t image_size() const { return in_rows * in_cols * kPanelOutputs; }
};

inline int64_t tiles_input_units(const ConvPoolShape& s) { return TilesInputPlan(s).units; }
inline int64_t tiles_input_groups(const ConvPoolShape& s) { return TilesInputPlan(s).groups; }
inline int64_t tiles_input_map_tiles(const ConvPoolShape& s) {
  const TilesInputPlan plan(s);
  return plan.groups * plan.tiles;
}
inline int64_t tiles_input_map_bytes(const ConvPoolShape& s) {
  return tiles_input_map_tiles(s) * TilesInputPlan(s).steps * kStepHalves *
         static_cast<int64_t>(sizeof(Half));
}
inline int64_t tiles_input_scratch_bytes(const ConvPoolShape& s) {
  const TilesInputPlan plan(s);
  return carved_bytes(plan.taps * plan.tap_size(), sizeof(Half)) +
         carved_bytes(plan.group * plan.image_size(), 4) + carved_bytes(plan.taps, sizeof(int64_t)) +
         carved_bytes(plan.tiles * kTileSide, sizeof(int64_t));
}

// Tiles [begin, end) of pixels, counted over all groups, of the map's gradient.
inline void tiles_input_part_map(const ConvPoolShape& s, const float* grad, const uint8_t* code, void* parted,
                                 int64_t begin, int64_t end) {
  const TilesInputPlan plan(s);
  const MapPixels pixels(s, grad, code);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t first = tile / plan.tiles * plan.group * pixels.plane + tile % plan.tiles * kTileSide;
    part_map<true>(pixels, first, 0, plan.steps, nullptr,
                   static_cast<Half*>(parted) + tile * plan.steps * kStepHalves);
  }
}

// Weights of channels [c, c + 32): [tap][step][P][2][16 pairs of outputs][16 channels][2].
inline void pack_unit(const ConvPoolShape& s, const TilesInputPlan& plan, const float* weight, int64_t c,
                      Half* packed) {
  if (s.channels - c < kPanelOutputs || s.outputs % kTileDepth)
    __builtin_memset(packed, 0, plan.taps * plan.tap_size() * sizeof(Half));
  alignas(64) float staged[(kTileDepth + 1) * kMostTaps][kTileSide];
  for (int64_t k = 0; k < s.outputs; k += kTileDepth)
    for (int64_t tile = 0; tile < kTilePanel; ++tile) {
      const int64_t first = c + tile * kTileSide, outputs = smaller(kTileDepth, s.outputs - k);
      if (first >= s.channels) continue;
      stage_weights(weight + (k * s.channels + first) * plan.taps, plan.taps, s.channels * plan.taps,
                    smaller(kTileSide, s.channels - first), outputs, plan.taps, staged);
      if (outputs % 2) __builtin_memset(staged[outputs * plan.taps], 0, plan.taps * sizeof staged[0]);
      for (int64_t tap = 0; tap < plan.taps; ++tap)
        pair_channels<kGradParts>(
            staged + tap, plan.taps, outputs,
            packed + tap * plan.tap_size() + k / kTileDepth * kTilePanel * kStepHalves + tile * kTileValues);
    }
}

// Adds rows of 32 channels to where they belong.
CNNRNN_INLINE void add_rows(const float* rows, const int64_t* offsets, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i, rows += kPanelOutputs) {
    float* const at = to + offsets[i];
    storeu(at, loadu(at) + loadu(rows));
    storeu(at + kLanes, loadu(at + kLanes) + loadu(rows + kLanes));
  }
}

// Units [begin, end) of channels in groups [group_begin, group_end) of images -> grad_x [N, C, input].
// Whether all of it is finite.
inline bool tiles_input(const ConvPoolShape& s, const float* weight, const void* map, float* grad_x,
                        void* memory, int64_t begin, int64_t end, int64_t group_begin, int64_t group_end) {
  const TilesInputPlan plan(s);
  char* scratch = static_cast<char*>(memory);
  Half* packed = carve<Half>(scratch, plan.taps * plan.tap_size());
  float* images = carve<float>(scratch, plan.group * plan.image_size());
  int64_t* at = carve<int64_t>(scratch, plan.taps);
  int64_t* offsets = carve<int64_t>(scratch, plan.tiles * kTileSide);
  alignas(64) float sums[2 * kTileSide * kPanelOutputs] = {};
  const int64_t plane = s.conv.h * s.conv.w, of_tile = plan.steps * kStepHalves;
  for (int64_t tap = 0; tap < plan.taps; ++tap)
    at[tap] =
        (tap / s.kernel.w * s.dilation.h * plan.in_cols + tap % s.kernel.w * s.dilation.w) * kPanelOutputs;
  for (int64_t p = 0; p < plan.group * plane; ++p)
    offsets[p] =
        p / plane * plan.image_size() +
        (p % plane / s.conv.w * s.stride.h * plan.in_cols + p % s.conv.w * s.stride.w) * kPanelOutputs;
  ConvPoolShape to = s;  // of what is written
  to.outputs = s.channels, to.pooled = s.input;

  const TileSession session;
  vf health{};
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t c = unit * kPanelOutputs, channels = smaller(kPanelOutputs, s.channels - c);
    pack_unit(s, plan, weight, c, packed);
    for (int64_t group = group_begin; group < group_end; ++group) {
      const int64_t image = group * plan.group, count = smaller(plan.group, s.batch - image);
      const Half* tiles = static_cast<const Half*>(map) + group * plan.tiles * of_tile;
      __builtin_memset(images, 0, count * plan.image_size() * sizeof(float));
      const int64_t pixels = count * plane;
      for (int64_t block = 0; block < pixels; block += plan.block)
        for (int64_t step = 0; step < plan.steps; step += kSumSteps)
          for (int64_t tap = 0; tap < plan.taps; ++tap)
            for (int64_t p = block; p < smaller(block + plan.block, pixels); p += 2 * kTileSide) {
              const int64_t rows = smaller(pixels - p, 2 * kTileSide);
              multiply_tiles_of<kGradParts>(tile_rows(rows), tile_rows(channels),
                                            tiles + p / kTileSide * of_tile + step * kStepHalves, of_tile,
                                            packed + tap * plan.tap_size() + step * kTilePanel * kStepHalves,
                                            kTilePanel * kTileValues, smaller(kSumSteps, plan.steps - step),
                                            sums, kPanelOutputs, false);
              add_rows(sums, offsets + p, rows, images + at[tap]);
            }
      for (int64_t i = 0; i < count; ++i) {
        const Strip strip{image + i, 0, 0, s.input.h, plan.in_cols};
        const float* first =
            images + i * plan.image_size() + (s.padding.h * plan.in_cols + s.padding.w) * kPanelOutputs;
        write_map(to, strip, first, kPanelOutputs, c, channels, grad_x, [&](vf v) {
          health += 0.0f * v;
          return v;
        });
      }
    }
  }
  stores_past_done();
  return is_zero(health);
}

}  // namespace
