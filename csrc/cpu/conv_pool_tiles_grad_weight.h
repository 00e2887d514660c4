// The gradients of weight and bias on tile registers, where there is no pool: products of matrices,
// outputs x (pixels of all images) x (columns: taps and channels), float32 by three bfloat16 parts.
//
// x is parted once, padded, channels innermost: what stands under a row of the kernel lies side by side, at
// any stride. For 32 columns at a time, pairs of pixels are gathered from it, so that the contraction over
// pixels is full whatever the map's width. Each sum has one owner: results do not depend on the threads.
//
// Columns that only fill up a step hold neighbours, or what memory held; they are not written. Where values
// do not part, NaN appears, and the host computes again by another kernel.
#pragma once

#include "conv_pool_tiles.h"
#include "conv_pool_tiles_grad.h"

namespace {

constexpr int64_t kGatherSteps = 4;          // steps of 32 pixels that sums stay in registers for
constexpr int64_t kSumBytes = 640 << 10;     // of the second-level cache
constexpr int64_t kColumns = kPanelOutputs;  // that a gathered panel has

struct TilesWeightPlan {
  TilePlan<kGradParts> input;  // x as one strip an image; rows with room for what stores reach beyond them
  int64_t image;               // halves of an image
  int64_t steps;               // of 32 pixels
  int64_t outputs;             // rounded up to pairs of tiles
  int64_t panels;              // of 32 columns

  explicit TilesWeightPlan(const ConvPoolShape& s) : input(s) {
    // Whatever the taps: weights of a channel are written together.
    input.by_channels = s.channels % kTileDepth == 0;
    input.row = round_up(input.row, kTileDepth) + 2 * kTileDepth;
    input.part = (s.input.h + 2 * s.padding.h) * input.row;
    image = kGradParts * input.part;
    steps = ceil_div(s.batch * s.conv.h * s.conv.w, kTileDepth);
    outputs = round_up(s.outputs, kPanelOutputs);
    panels = input.all_steps();
  }

  int64_t panel_size() const { return outputs * kColumns; }  // of sums
};

inline int64_t tiles_weight_panels(const ConvPoolShape& s) { return TilesWeightPlan(s).panels; }
inline int64_t tiles_weight_input_bytes(const ConvPoolShape& s) {
  return s.batch * TilesWeightPlan(s).image * static_cast<int64_t>(sizeof(Half));
}
inline int64_t tiles_weight_map_bytes(const ConvPoolShape& s) {
  const TilesWeightPlan plan(s);
  return plan.outputs / kTileSide * plan.steps * kStepHalves * static_cast<int64_t>(sizeof(Half));
}

inline int64_t tiles_weight_sums(const ConvPoolShape& s) {
  const TilesWeightPlan plan(s);
  return plan.panels * plan.panel_size();
}

// Images [begin, end) of x.
inline void tiles_weight_part_input(const ConvPoolShape& s, const float* x, void* parted, int64_t begin,
                                    int64_t end) {
  const TilesWeightPlan plan(s);
  for (int64_t n = begin; n < end; ++n)
    fill_rows<kGradParts>(s, plan.input, x + n * s.channels * s.input.h * s.input.w, -s.padding.h,
                          s.input.h + 2 * s.padding.h, static_cast<Half*>(parted) + n * plan.image);
}

// Tiles [begin, end) of outputs of the map's gradient, whose sum is added to grad_bias unless that is null.
inline void tiles_weight_part_map(const ConvPoolShape& s, const float* grad, const uint8_t* code,
                                  void* parted, float* grad_bias, int64_t begin, int64_t end) {
  const TilesWeightPlan plan(s);
  const MapPixels pixels(s, grad, code);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t k = tile * kTileSide;
    Half* const to = static_cast<Half*>(parted) + tile * plan.steps * kStepHalves;
    double bias[kLanes] = {};
    for (int64_t step = 0; step < plan.steps; step += kGatherSteps) {
      vf sums[kLanes] = {};
      part_map<false>(pixels, k, step * kTileDepth, smaller(kGatherSteps, plan.steps - step),
                      grad_bias ? sums : nullptr, to + step * kStepHalves);
      for (int i = 0; grad_bias && i < kLanes; ++i)
        for (int l = 0; l < kLanes; ++l) bias[i] += sums[i][l];
    }
    for (int64_t i = 0; grad_bias && i < smaller(kLanes, s.outputs - k); ++i)
      grad_bias[k + i] += static_cast<float>(bias[i]);
  }
}

// 32 columns, which begin at `columns`, of the pixels at `offsets`, as the second operand of a product: pairs
// of pixels; of each four columns the first four of eight go to the first tile, the others to the second.
CNNRNN_APART void gather_columns(const Half* columns, int64_t part, const int64_t* offsets, int64_t steps,
                                 Half* to) {
  const auto load = [&](int64_t at) {
    return reinterpret_cast<vs>(loadu(reinterpret_cast<const int32_t*>(columns + at)));
  };
  for (int64_t step = 0; step < steps; ++step, to += kTilePanel * kStepHalves)
    for (int64_t pair = 0; pair < kTileSide; ++pair, offsets += 2)
#pragma GCC unroll 3
      for (int p = 0; p < kGradParts; ++p) {
        const vs a = load(offsets[0] + p * part), b = load(offsets[1] + p * part);
        Half* const at = to + p * kTilePanel * kTileValues + pair * kTileDepth;
        store_words(at, reinterpret_cast<vu>(unpack<int16_t, 1, 8, 0>(a, b)));
        store_words(at + kTileValues, reinterpret_cast<vu>(unpack<int16_t, 1, 8, 1>(a, b)));
      }
}
// 16 of such 32 columns in order.
template <int half>
CNNRNN_INLINE vf columns_in_order(const float* sums) {
  return unpack<float, 4, 16, half>(loadu(sums), loadu(sums + kLanes));
}

// Where pixels [first, first + count) stand in x, that of the last repeated up to whole steps.
inline void pixel_offsets(const ConvPoolShape& s, const TilesWeightPlan& plan, int64_t first, int64_t count,
                          int64_t* offsets) {
  const int64_t plane = s.conv.h * s.conv.w;
  int64_t image = first / plane, y = first % plane / s.conv.w, x = first % s.conv.w;
  for (int64_t i = 0; i < count; ++i) {
    offsets[i] = image * plan.image + y * s.stride.h * plan.input.row + x * s.stride.w * s.channels;
    if (++x < s.conv.w) continue;
    x = 0;
    if (++y < s.conv.h) continue;
    y = 0, ++image;
  }
  for (int64_t i = count; i < round_up(count, kTileDepth); ++i) offsets[i] = offsets[count - 1];
}

// Weights of 32 channels at `count` taps, from sums [count][of_tap: outputs x 32], to `to`, where those of
// one channel lie side by side, channels `taps` apart. Their sum times nought: 0 if all are finite.
inline vf write_channels(int64_t taps, int64_t count, int64_t of_tap, const float* sums, float* to) {
  vf health{};
  const auto write = [&](auto half) {
    for (int64_t t = 0; t < count; t += kLanes) {
      vf block[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        block[i] = t + i < count ? columns_in_order<half>(sums + (t + i) * of_tap) : vf{};
        health += 0.0f * block[i];
      }
      transpose<float>(block);
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLanes; ++c) store_n(to + (half * kLanes + c) * taps + t, block[c], count - t);
    }
  };
  write(std::integral_constant<int, 0>{}), write(std::integral_constant<int, 1>{});
  return health;
}

// Writes panels [begin, end) of the gradient, outputs [k_begin, k_end), from sums [panel][outputs][32].
// Whether all of it is finite.
inline bool write_panels(const ConvPoolShape& s, const TilesWeightPlan& plan, int64_t begin, int64_t end,
                         int64_t k_begin, int64_t k_end, const float* sums, float* grad_weight) {
  const int64_t taps = s.kernel.h * s.kernel.w, of_output = s.channels * taps;
  const int64_t of_panel = plan.panel_size();
  const int64_t of_row = plan.input.runs / s.kernel.h;  // runs of a row of the kernel
  vf health{};
  for (int64_t panel = begin, next; panel < end; sums += (next - panel) * of_panel, panel = next) {
    if (plan.input.by_channels) {
      const int64_t tap = panel % taps;
      next = smaller(end, panel - tap + taps);
      float* const first = grad_weight + panel / taps * kTileDepth * taps + tap;
      for (int64_t k = k_begin; k < k_end; ++k)
        health += write_channels(taps, next - panel, of_panel, sums + k * kColumns, first + k * of_output);
      continue;
    }
    next = panel + 1;
    const int64_t run = panel / plan.input.steps, first = panel % plan.input.steps * kTileDepth;
    const int64_t count = smaller(kTileDepth, plan.input.depth - first);
    int64_t place[kColumns];
    for (int64_t i = 0; i < count; ++i)
      place[i] = (first + i) % s.channels * taps + run / of_row * s.kernel.w + run % of_row +
                 (first + i) / s.channels;
    for (int64_t k = k_begin; k < k_end; ++k) {
      const float* const from = sums + k * kColumns;
      alignas(64) float row[kColumns];
      storeu(row, columns_in_order<0>(from)), storeu(row + kLanes, columns_in_order<1>(from));
      for (int64_t i = 0; i < count; ++i) {
        grad_weight[k * of_output + place[i]] = row[i];
        health[0] += 0.0f * row[i];
      }
    }
  }
  return is_zero(health);
}

inline int64_t weight_panels_together(const TilesWeightPlan& plan) {
  return larger(1, smaller(plan.panels, kSumBytes / (plan.panel_size() * 4)));
}
inline int64_t tiles_weight_scratch_bytes(const ConvPoolShape& s) {
  const TilesWeightPlan plan(s);
  return carved_bytes(plan.panels, sizeof(Step)) + carved_bytes(kGatherSteps * kTileDepth, sizeof(int64_t)) +
         carved_bytes(kGatherSteps * kTilePanel * kStepHalves, sizeof(Half)) +
         carved_bytes(weight_panels_together(plan) * plan.panel_size(), 4) +
         carved_bytes(kPanelOutputs * kColumns, 4);
}

// Panels [begin, end) of columns, tiles [out_begin, out_end) of outputs, an even number unless they are the
// last, over the steps of this part -> grad_weight [K, C, KH, KW], whether all of it is finite.
inline bool tiles_weight(const ConvPoolShape& s, const void* input, const void* map, const BatchPart& part,
                         float* grad_weight, void* memory, int64_t begin, int64_t end, int64_t out_begin,
                         int64_t out_end) {
  const TilesWeightPlan plan(s);
  const Half *x = static_cast<const Half*>(input), *grad = static_cast<const Half*>(map);
  const int64_t k_begin = out_begin * kTileSide, k_end = smaller(out_end * kTileSide, s.outputs);
  const int64_t together = weight_panels_together(plan), of_panel = plan.panel_size();
  char* scratch = static_cast<char*>(memory);
  Step* at = carve<Step>(scratch, plan.panels);
  int64_t* offsets = carve<int64_t>(scratch, kGatherSteps * kTileDepth);
  Half* gathered = carve<Half>(scratch, kGatherSteps * kTilePanel * kStepHalves);
  float* of_block = carve<float>(scratch, together * of_panel);
  float* chunk = carve<float>(scratch, kPanelOutputs * kColumns);
  fill_steps(s, plan.input, at);
  const int64_t pixels = s.batch * s.conv.h * s.conv.w, of_tile = plan.steps * kStepHalves;

  const TileSession session;
  bool finite = true;
  for (int64_t block = begin, next; block < end; block = next) {
    next = smaller(block + together, end);
    for (int64_t step = part.begin; step < part.end; step += kGatherSteps) {
      const int64_t steps = smaller(kGatherSteps, part.end - step), p = step * kTileDepth;
      const bool add = step > part.begin;
      pixel_offsets(s, plan, p, smaller(steps * kTileDepth, pixels - p), offsets);
      for (int64_t panel = block; panel < next; ++panel) {
        gather_columns(x + at[panel].a, plan.input.part, offsets, steps, gathered);
        for (int64_t tile = out_begin; tile < out_end; tile += 2) {
          const int64_t rows = smaller(2, ceil_div(s.outputs, kTileSide) - tile);
          float* const to = of_block + (panel - block) * of_panel + tile * kTileSide * kColumns;
          // One long sum would lose digits: each chunk's begins at nought.
          multiply_tiles_of<kGradParts>(rows, kTilePanel, grad + tile * of_tile + step * kStepHalves, of_tile,
                                        gathered, kTilePanel * kTileValues, steps, add ? chunk : to, kColumns,
                                        false);
          for (int64_t i = 0; add && i < rows * kTileSide * kColumns; i += kLanes)
            storeu(to + i, loadu(to + i) + loadu(chunk + i));
        }
      }
    }
    // Those of each part do, too.
    float* const sums = part.kept ? part.kept + block * of_panel : of_block;
    for (int64_t panel = 0; part.kept && panel < (next - block) * of_panel; panel += of_panel)
      for (int64_t i = out_begin * kTileSide * kColumns; i < out_end * kTileSide * kColumns; i += kLanes) {
        const vf sum = loadu(of_block + panel + i);
        storeu(sums + panel + i, part.first ? sum : loadu(sums + panel + i) + sum);
      }
    if (part.last) finite &= write_panels(s, plan, block, next, k_begin, k_end, sums, grad_weight);
  }
  return finite;
}

}  // namespace
