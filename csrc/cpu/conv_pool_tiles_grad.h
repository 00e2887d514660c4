// What both gradients of conv_pool on tile registers read, where there is no pool: the gradient of the map as
// tiles of three bfloat16 parts (split.h), all images one after the other, so that tiles are full however
// small a map is.
#pragma once

#include "conv_pool_tiles_pack.h"
#include "conv_pool_unpool.h"

namespace {

CNNRNN_INLINE vi lanes_from_zero() {
  vi lanes{};
  for (int l = 0; l < kLanes; ++l) lanes[l] = l;
  return lanes;
}

using BatchPart = cnnrnn::TilesGradients::Part;

constexpr int kGradParts = 3;
constexpr int64_t kStepHalves = kGradParts * kTileValues;  // of one tile of rows at 32 depths

// The gradient of the map, from that of the outputs [N, K, conv]: 0 where the code says so. Pixels are
// numbered over all images.
struct MapPixels {
  const float* grad;
  const uint8_t* code;  // null: every output passes its gradient
  int64_t outputs, plane, total;
  bool channels_last;

  MapPixels(const ConvPoolShape& s, const float* grad, const uint8_t* code)
      : grad(grad),
        code(code),
        outputs(s.outputs),
        plane(s.conv.h * s.conv.w),
        total(s.batch * plane),
        channels_last(s.channels_last) {}

  // n values side by side, zeros in other lanes.
  CNNRNN_INLINE vf load(int64_t at, int64_t n) const {
    const vf v = load_n(grad + at, n);
    return code ? (load_codes(code + at, n) == 0 ? v : vf{}) : v;
  }
  // 16 pixels of output k, from pixel `at` of an image on, across images.
  CNNRNN_INLINE vf of_output(int64_t k, int64_t image, int64_t at) const {
    const auto place = [&](int64_t image) { return (image * outputs + k) * plane; };
    const int64_t left = plane - at;
    if (left >= kLanes) return load(place(image) + at, kLanes);
    const vf head = load(place(image) + at, left);
    if ((image + 1) * plane >= total) return head;
    if (plane >= kLanes) {
      const vf tail = load(place(image + 1) - left, kLanes);
      return lanes_from_zero() < static_cast<int32_t>(left) ? head : tail;
    }
    alignas(64) float pixels[kLanes];
    storeu(pixels, head);
    for (int64_t n = left; n < kLanes && ++image * plane < total;)
      for (int64_t i = 0; i < plane && n < kLanes; ++i, ++n) {
        const int64_t from = place(image) + i;
        pixels[n] = code && code[from] ? 0.0f : grad[from];
      }
    return loadu(pixels);
  }

  // 16 outputs from k on at 16 pixels from p on, a row for each output, or for each pixel; zeros beyond the
  // last.
  template <bool kByPixel>
  CNNRNN_INLINE void block(int64_t k, int64_t p, vf (&rows)[kLanes]) const {
    const int64_t wide = smaller(outputs - k, kLanes), high = smaller(total - p, kLanes);
    if (channels_last) {
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = i < high && wide > 0 ? load((p + i) * outputs + k, wide) : vf{};
    } else {
      const int64_t image = p / plane, at = p % plane;
      for (int64_t i = 0; i < kLanes; ++i)
        rows[i] = i < wide && high > 0 ? of_output(k + i, image, at) : vf{};
    }
    if (channels_last != kByPixel) transpose<float>(rows);
  }
};

// A tile of rows at `steps` steps of 32 depths: rows are outputs from `row` on and depths pixels from `depth`
// on, or the other way round. sums: null, or what each row's values are added to, lane by lane.
template <bool kByPixel>
void part_map(const MapPixels& pixels, int64_t row, int64_t depth, int64_t steps, vf* sums, Half* to) {
  for (int64_t step = 0; step < steps; ++step, depth += kTileDepth, to += kStepHalves) {
    vf first[kLanes], second[kLanes];
    const auto load = [&](int64_t at, vf(&rows)[kLanes]) {
      kByPixel ? pixels.block<true>(at, row, rows) : pixels.block<false>(row, at, rows);
    };
    load(depth, first), load(depth + kLanes, second);
    for (int i = 0; i < kLanes; ++i) {
      const Parts<kGradParts> a = parts_of<kGradParts>(first[i]), b = parts_of<kGradParts>(second[i]);
#pragma GCC unroll 3
      for (int p = 0; p < kGradParts; ++p)
        store_words(to + p * kTileValues + i * kTileDepth, halves_of(a.of[p], b.of[p]));
      if (sums) sums[i] += first[i] + second[i];
    }
  }
}

}  // namespace
