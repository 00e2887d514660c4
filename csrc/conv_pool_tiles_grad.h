// The gradients of a convolution without a pool on tile registers: when, and how they are run.
#pragma once

#include <atomic>

#include "conv_pool_tiles.h"
#include "conv_pool_winograd.h"

namespace cnnrnn {

inline bool tiles_gradients_serve(const ConvPoolShape& s) {
  return tiles_serve(s) && s.batch > 0 && s.positions() == 1 && s.step.h == 1 && s.step.w == 1;
}

constexpr int64_t kMostTilesBytes = 32 << 20;  // of memory that is taken for one image, whatever the batch
inline ConvPoolShape with_batch(ConvPoolShape s, int64_t batch) {
  s.batch = batch;
  return s;
}

// Whether the copy of x with its padding is not much larger than x, or small.
inline bool tiles_copy_is_modest(const ConvPoolShape& s) {
  const int64_t padded = (s.input.h + 2 * s.padding.h) * (s.input.w + 2 * s.padding.w);
  return padded <= 4 * s.input.h * s.input.w ||
         tiles()->gradients.weight_input_bytes(with_batch(s, 1)) < kMostTilesBytes;
}

// Whether the gradients of weight and bias are faster there than by Winograd's algorithm, whose sums are 16/9
// of the weight: that is where they are many for the pixels (measured at 64 to 512 channels, maps of 4x4 to
// 56x56, batches of 1 to 16).
inline bool tiles_weight_pays(const ConvPoolShape& s) {
  const int64_t pixels = s.batch * s.conv.h * s.conv.w, channels = std::min(s.channels, s.outputs);
  return tiles_gradients_serve(s) && tiles_copy_is_modest(s) &&
         (!winograd_weight_pays(s) || 16 * pixels <= channels * channels);
}

// The same of x, where images of 32 channels stay in cache: on small maps Winograd's algorithm fills its
// tiles badly (measured as above). The batch has no say, so that it changes no result.
inline bool tiles_input_pays(const ConvPoolShape& s) {
  constexpr int64_t kSmall = 49;
  return tiles_gradients_serve(s) &&
         tiles()->gradients.input_scratch_bytes(with_batch(s, 1)) < kMostTilesBytes &&
         (!winograd_input_pays(s, true) || (s.input.h + 1) / 2 * ((s.input.w + 1) / 2) <= kSmall);
}

// One parallel region over a grid of units x parts, each of whose parts is [0, whole) cut into equal pieces;
// as few as keep all threads busy. Calls body(begin, end, from, to, scratch) for units [begin, end) and the
// piece [from, to).
template <typename Body>
void in_grid(const Tensor& like, int64_t units, int64_t whole, int64_t scratch_bytes, const Body& body) {
  const int64_t threads = torch::stable::get_num_threads();
  const auto idle = [&](int64_t pieces) {  // threads, by the time the last is done
    const int64_t items = units * pieces;
    return (items + threads - 1) / threads * threads - items;
  };
  int64_t pieces = 1;
  while (pieces < std::min(whole, threads) && 8 * idle(pieces) > units * pieces) ++pieces;
  in_slices(like, units * pieces, scratch_bytes, [&](int64_t, int64_t begin, int64_t end, char* scratch) {
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t piece = i / units;
      next = std::min(end, (piece + 1) * units);
      body(i - piece * units, next - piece * units, whole * piece / pieces, whole * (piece + 1) / pieces,
           scratch);
    }
  });
}

// The gradient of the outputs, and where it passes to the map: see TilesGradients.
struct OutputGradient {
  const float* grad_y;
  const uint8_t* code;

  OutputGradient from_image(const ConvPoolShape& s, int64_t image) const {
    const int64_t at = image * s.outputs * s.windows();
    return {grad_y + at, code ? code + at : nullptr};
  }
};

// The batch in parts, so that what is parted of one, `bytes` of the whole, stays in cache.
struct BatchParts {
  const ConvPoolShape& whole;
  int64_t count;

  BatchParts(const ConvPoolShape& s, int64_t bytes) : whole(s) {
    constexpr int64_t kMostBytes = 4 << 20;
    count = std::max<int64_t>(1, std::min(s.batch, bytes / kMostBytes));
  }
  int64_t first(int64_t i) const { return whole.batch * i / count; }
  ConvPoolShape operator[](int64_t i) const { return with_batch(whole, first(i + 1) - first(i)); }
  ConvPoolShape largest() const { return with_batch(whole, (whole.batch + count - 1) / count); }
};

// x in the shape's order; grad_weight and grad_bias may be null. False where the results are not finite.
inline bool run_tiles_weight(const ConvPoolShape& s, const OutputGradient& whole, const Tensor& x,
                             Tensor* grad_weight, Tensor* grad_bias) {
  const TilesGradients& kernel = tiles()->gradients;
  const BatchParts parts(s, kernel.weight_input_bytes(s) + kernel.weight_map_bytes(s));
  const ConvPoolShape largest = parts.largest();
  const int64_t input_bytes = kernel.weight_input_bytes(largest);
  const Tensor parted =
      empty_like_of(x, {input_bytes + kernel.weight_map_bytes(largest) + 64}, ScalarType::Byte);
  constexpr int64_t kLongSum = 256;  // of steps of 32 pixels: one longer sum would lose digits
  const auto steps_of = [](const ConvPoolShape& t) { return (t.batch * t.conv.h * t.conv.w + 31) / 32; };
  const bool in_parts = parts.count > 1 || steps_of(s) > kLongSum;
  const Tensor sums = empty_like_of(x, {in_parts ? kernel.weight_sums(s) : 0});
  char *const input = aligned(parted.mutable_data_ptr()), *const map = input + input_bytes;
  const int64_t out_tiles = (s.outputs + 15) / 16, of_image = s.channels * s.input.h * s.input.w;
  float* const weights = grad_weight ? mutable_data<float>(*grad_weight) : nullptr;
  float* const bias = grad_bias ? mutable_data<float>(*grad_bias) : nullptr;
  if (bias) std::fill_n(bias, s.outputs, 0.0f);
  std::atomic<bool> finite{true};
  for (int64_t i = 0; i < parts.count; ++i) {
    const ConvPoolShape part = parts[i];
    const OutputGradient grad = whole.from_image(s, parts.first(i));
    const float* images = data<float>(x) + parts.first(i) * of_image;
    in_slices(x, weights ? part.batch : 0, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
      kernel.weight_part_input(part, images, input, begin, end);
    });
    in_slices(x, out_tiles, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
      kernel.weight_part_map(part, grad.grad_y, grad.code, map, bias, begin, end);
    });
    if (!weights) continue;
    const int64_t steps = steps_of(part);
    for (int64_t step = 0; step < steps; step += kLongSum) {
      const int64_t next = std::min(step + kLongSum, steps);
      const TilesGradients::Part place{i == 0 && step == 0, i + 1 == parts.count && next == steps,
                                       in_parts ? mutable_data<float>(sums) : nullptr, step, next};
      in_grid(x, kernel.weight_panels(s), (out_tiles + 1) / 2, kernel.weight_scratch_bytes(part),
              [&](int64_t begin, int64_t end, int64_t from, int64_t to, char* scratch) {
                if (!kernel.weight(part, input, map, place, weights, scratch, begin, end, 2 * from,
                                   std::min(2 * to, out_tiles)))
                  finite = false;
              });
    }
  }
  return finite;
}

// The same of x.
inline bool run_tiles_input(const ConvPoolShape& s, const OutputGradient& whole, const Tensor& weight,
                            Tensor& grad_x) {
  const TilesGradients& kernel = tiles()->gradients;
  const BatchParts parts(s, kernel.input_map_bytes(s));
  const Tensor parted =
      empty_like_of(grad_x, {kernel.input_map_bytes(parts.largest()) + 64}, ScalarType::Byte);
  char* const map = aligned(parted.mutable_data_ptr());
  std::atomic<bool> finite{true};
  for (int64_t i = 0; i < parts.count; ++i) {
    const ConvPoolShape part = parts[i];
    const OutputGradient grad = whole.from_image(s, parts.first(i));
    float* const to = mutable_data<float>(grad_x) + parts.first(i) * s.channels * s.input.h * s.input.w;
    in_slices(grad_x, kernel.input_map_tiles(part), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
      kernel.input_part_map(part, grad.grad_y, grad.code, map, begin, end);
    });
    in_grid(grad_x, kernel.input_units(part), kernel.input_groups(part), kernel.input_scratch_bytes(part),
            [&](int64_t begin, int64_t end, int64_t first, int64_t last, char* scratch) {
              if (!kernel.input(part, data<float>(weight), map, to, scratch, begin, end, first, last))
                finite = false;
            });
  }
  return finite;
}

}  // namespace cnnrnn
