// conv_pool by Winograd's F(2x2, 3x3) or F(4x4, 3x3) on the CPU: when, and how it is run.
#pragma once

#include <atomic>

#include "conv_pool_panels.h"

namespace cnnrnn {

// Whether the kernels cover a call and are the faster ones. The limits were measured on AVX2, one thread,
// over maps of 4x4 to 56x56, 4 to 128 channels in and out, batches of 1 and 8: with fewer channels or tiles
// of one image the transforms cost more than they save. The batch has no say, so that it changes no result.
inline bool winograd_pays(const ConvPoolShape& s) {
  const auto is = [](Pair pair, int64_t value) { return pair.h == value && pair.w == value; };
  const bool covered = s.groups == 1 && is(s.kernel, 3) && is(s.stride, 1) && is(s.dilation, 1) &&
                       is(s.margin, 0) && s.window.h <= 2 && s.window.w <= 2 && s.step.h == s.window.h &&
                       s.step.w == s.window.w;
  const int64_t tiles = (s.conv.h + 1) / 2 * ((s.conv.w + 1) / 2);
  return covered && s.channels >= 8 && s.outputs >= 4 && tiles * s.channels >= 128;
}

// Whether direct products on tile registers are faster: on small maps what Winograd's algorithm saves is less
// than its larger weights cost (measured at 64 to 512 channels, batches of 1 to 16; at 16 images of 512
// channels it would be a fifth faster).
inline bool too_small_for_winograd(const ConvPoolShape& s) {
  return ((s.conv.h + 1) / 2) * ((s.conv.w + 1) / 2) <= 16;
}

// Whether F(4x4, 3x3) is the faster one where F(2x2, 3x3) pays: by the products of one image, and with fewer
// channels its longer transforms cost what they save (measured at one size of image, 56 x 56).
inline bool coarse_winograd_pays(const ConvPoolShape& s) {
  const auto tiles = [&](int64_t edge) {
    return (s.conv.h + edge - 1) / edge * ((s.conv.w + edge - 1) / edge);
  };
  return s.channels >= 16 && 36 * tiles(4) < 16 * tiles(2);
}

// The convolution whose output is the gradient of x, from that of the map: inputs and outputs exchanged.
inline ConvPoolShape input_gradient_shape(const ConvPoolShape& s) {
  ConvPoolShape t = s;
  t.channels = s.outputs, t.outputs = s.channels;
  t.input = s.conv;
  t.pooled = t.conv = s.input;
  t.window = t.step = {1, 1};
  t.padding = {2 - s.padding.h, 2 - s.padding.w};
  t.relu = t.keyed = false;
  t.activation = kNoActivation;
  return t;
}

inline bool winograd_input_serves(const ConvPoolShape& s) {
  return s.padding.h <= 2 && s.padding.w <= 2 && winograd_pays(s) && winograd_pays(input_gradient_shape(s));
}

// Whether the gradient of x is better computed as such a convolution. Below a pool the sparse kernel visits
// its windows alone: it is faster unless the products are on tile registers, many for each number that is
// transformed, and nearly every tile has its window (measured at 16 to 256 channels, maps of 7x7 to 56x56).
inline bool winograd_input_pays(const ConvPoolShape& s, bool on_tiles) {
  const int64_t tiles = ((s.input.h + 1) / 2) * ((s.input.w + 1) / 2);
  const bool beats_sparse =
      on_tiles && s.channels >= 64 && s.pooled.w * s.channels >= 640 && 10 * tiles <= 13 * s.windows();
  return winograd_input_serves(s) && (s.positions() == 1 || beats_sparse);
}

// Whether the gradient of the weight is computed from the whole map too: there is no pool.
inline bool winograd_weight_pays(const ConvPoolShape& s) {
  return s.positions() == 1 && winograd_input_serves(s);
}

// The gradient of the map from that of the outputs, both in x's order.
inline Tensor unpooled(const WinogradKernels& kernel, const Tensor& grad_y, const Tensor& code,
                       const ConvPoolShape& s) {
  Tensor map = empty_image(grad_y, s, s.outputs, s.conv, grad_y.scalar_type());
  const int64_t rows = s.batch * (s.channels_last ? 1 : s.outputs) * s.conv.h;
  in_slices(grad_y, rows, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.unpool(s, data<float>(grad_y), data<uint8_t>(code), mutable_data<float>(map), begin, end);
  });
  return map;
}

// weight [K, C, 3, 3] -> [C, K, 3, 3], each kernel turned by half a turn.
inline Tensor mirrored_weight(const Tensor& weight, const ConvPoolShape& s) {
  Tensor mirrored = empty_like_of(weight, {s.channels, s.outputs, 3, 3});
  const float* from = data<float>(weight);
  float* to = mutable_data<float>(mirrored);
  for (int64_t k = 0; k < s.outputs; ++k)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t tap = 0; tap < 9; ++tap)
        to[(c * s.outputs + k) * 9 + 8 - tap] = from[(k * s.channels + c) * 9 + tap];
  return mirrored;
}

// The gradient of x from that of the map, by this kernel of its shape; direct:
// run_direct.
template <typename Direct>
void run_dense_input(const PanelForward<float>& kernel, const ConvPoolShape& s, const Tensor& grad,
                     const Tensor& weight, Tensor& grad_x, const Direct& direct) {
  const ConvPoolShape t = input_gradient_shape(s);
  const Outputs out{&grad_x, nullptr, nullptr};
  run_panels<float>(kernel, t, grad, weight, true, nullptr, out, [&](int64_t from, int64_t to) {
    direct(t, grad, mirrored_weight(weight, s), std::nullopt, out, from, to);
  });
}

// x and grad in s's order. False where the results are not finite, which Winograd's algorithm cannot tell
// apart.
inline bool run_winograd_weight(const WinogradKernels& kernel, const ConvPoolShape& s, const Tensor& grad,
                                const Tensor& x, Tensor* grad_weight, Tensor* grad_bias) {
  const int64_t units = kernel.of_2.units(s), panels = kernel.of_2.output_panels(s);
  const int64_t size = kernel.weight_partial_size(s);
  constexpr double kAddsSums = 2;
  const bool by_outputs = shares_outputs(units, panels, kAddsSums);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t partial_count = by_outputs ? 1 : std::max<int64_t>(1, std::min(units, threads));
  Tensor partials = torch::stable::new_zeros(x, {partial_count, size});
  in_panel_slices(
      x, units, panels, by_outputs, kernel.weight_scratch_bytes(s),
      [&](int64_t slice, int64_t begin, int64_t end, int64_t out_begin, int64_t out_end, char* scratch) {
        float* partial = mutable_data<float>(partials) + (by_outputs ? 0 : slice * size);
        kernel.weight(s, data<float>(x), data<float>(grad), partial, scratch, begin, end, out_begin, out_end);
      });
  float* weights = grad_weight ? mutable_data<float>(*grad_weight) : nullptr;
  float* biases = grad_bias ? mutable_data<float>(*grad_bias) : nullptr;
  std::atomic<bool> finite{true};
  in_slices(x, s.outputs, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    if (!kernel.weight_reduce(s, data<float>(partials), partial_count, weights, biases, begin, end))
      finite = false;
  });
  return finite;
}

}  // namespace cnnrnn
