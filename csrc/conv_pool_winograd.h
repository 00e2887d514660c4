// conv_pool by Winograd's F(2x2, 3x3) on the CPU: when, and how it is run.
#pragma once

#include "cpu/conv_pool.h"
#include "slices.h"

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

// What a forward call writes; code and kept may be null.
struct Outputs {
  Tensor* y;
  Tensor* code;
  Tensor* kept;

  template <typename T>
  T* y_data() const {
    return mutable_data<T>(*y);
  }
  uint8_t* code_data() const { return code ? mutable_data<uint8_t>(*code) : nullptr; }
  template <typename T>
  T* kept_data() const {
    return kept ? mutable_data<T>(*kept) : nullptr;
  }
};

// Images whose outputs are not all finite are computed again, by direct(s, x, weight, bias, out, from, to):
// the transforms turn one inf into NaN all over a tile. Whether that happens depends on nothing but the
// image.
template <typename Direct>
void run_winograd(const WinogradKernels& kernel, const ConvPoolShape& s, const Tensor& x,
                  const Tensor& weight, const OptionalTensor& bias, const Outputs& out,
                  const Direct& direct) {
  Tensor packed = empty_like_of(x, {kernel.packed_size(s)});
  in_slices(x, kernel.pack_units(s), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.pack(s, data<float>(weight), mutable_data<float>(packed), begin, end);
  });
  std::vector<uint8_t> not_finite(s.batch);
  in_slices(
      x, kernel.units(s), kernel.scratch_bytes(s), [&](int64_t, int64_t begin, int64_t end, char* scratch) {
        kernel.forward(s, data<float>(x), data<float>(packed), data<float>(get(bias)), out.y_data<float>(),
                       out.code_data(), out.kept_data<float>(), not_finite.data(), scratch, begin, end);
      });
  for (int64_t from = 0; from < s.batch;) {
    int64_t to = from;
    while (to < s.batch && not_finite[to]) ++to;
    if (to > from) direct(s, x, weight, bias, out, from, to);
    from = to + 1;
  }
}

// The convolution whose output is the gradient of x where there is no pool: inputs and outputs exchanged.
inline ConvPoolShape input_gradient_shape(const ConvPoolShape& s) {
  ConvPoolShape t = s;
  t.channels = s.outputs, t.outputs = s.channels;
  t.input = s.conv;
  t.pooled = t.conv = s.input;
  t.padding = {2 - s.padding.h, 2 - s.padding.w};
  t.relu = t.keyed = false;
  t.activation = kNoActivation;
  return t;
}

// Whether the backward of a call is two such convolutions: there is no pool, and each pays.
inline bool winograd_backward_pays(const ConvPoolShape& s) {
  return s.window.h == 1 && s.window.w == 1 && s.padding.h <= 2 && s.padding.w <= 2 && winograd_pays(s) &&
         winograd_pays(input_gradient_shape(s));
}

// grad_y where the output is alive, 0 elsewhere; both in x's order.
inline Tensor alive_gradient(const Tensor& grad_y, const Tensor& code, const ConvPoolShape& s) {
  Tensor masked = torch::stable::empty_like(grad_y);
  in_slices(grad_y, s.batch * s.outputs * s.windows(), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    const float* __restrict from = data<float>(grad_y);
    const uint8_t* __restrict codes = data<uint8_t>(code);
    float* __restrict to = mutable_data<float>(masked);
    for (int64_t i = begin; i < end; ++i) {
      const float value = from[i];  // read anyway: the loop becomes vectors
      to[i] = codes[i] == kDead ? 0.0f : value;
    }
  });
  return masked;
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

// x and grad contiguous. False where the sums are not finite, which Winograd's algorithm cannot tell apart.
inline bool run_winograd_weight(const WinogradKernels& kernel, const ConvPoolShape& any, const Tensor& grad,
                                const Tensor& x, Tensor* grad_weight, Tensor* grad_bias) {
  ConvPoolShape s = any;
  s.channels_last = false;
  const int64_t units = kernel.units(s), size = kernel.weight_partial_size(s);
  const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(units, torch::stable::get_num_threads()));
  Tensor partials = torch::stable::new_zeros(x, {slices, size});
  in_slices(x, units, kernel.weight_scratch_bytes(s),
            [&](int64_t slice, int64_t begin, int64_t end, char* scratch) {
              kernel.weight(s, data<float>(x), data<float>(grad),
                            mutable_data<float>(partials) + slice * size, scratch, begin, end);
            });
  float* weights = grad_weight ? mutable_data<float>(*grad_weight) : nullptr;
  float* biases = grad_bias ? mutable_data<float>(*grad_bias) : nullptr;
  in_slices(x, s.outputs, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.weight_reduce(s, data<float>(partials), slices, weights, biases, begin, end);
  });
  float sum = 0;
  for (int64_t i = 0; weights && i < s.outputs * s.channels * 9; ++i) sum += weights[i] * 0.0f;
  for (int64_t i = 0; biases && i < s.outputs; ++i) sum += biases[i] * 0.0f;
  return sum == 0;
}

}  // namespace cnnrnn
