// conv_pool forward by Winograd's F(2x2, 3x3) on the CPU: when, and how it is run.
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

// Images whose outputs are not all finite are computed again, by direct(s, x, weight, bias, y, code, from,
// to): the transforms turn one inf into NaN all over a tile. Whether that happens depends on nothing but the
// image.
template <typename Direct>
void run_winograd(const WinogradKernels& kernel, const ConvPoolShape& s, const Tensor& x,
                  const Tensor& weight, const OptionalTensor& bias, Tensor& y, Tensor* code,
                  const Direct& direct) {
  Tensor packed = empty_like_of(x, {kernel.packed_size(s)});
  in_slices(x, kernel.pack_units(s), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.pack(s, data<float>(weight), mutable_data<float>(packed), begin, end);
  });
  std::vector<uint8_t> not_finite(s.batch);
  in_slices(
      x, kernel.units(s), kernel.scratch_bytes(s), [&](int64_t, int64_t begin, int64_t end, char* scratch) {
        kernel.forward(s, data<float>(x), data<float>(packed), data<float>(get(bias)), mutable_data<float>(y),
                       code ? mutable_data<uint8_t>(*code) : nullptr, not_finite.data(), scratch, begin, end);
      });
  for (int64_t from = 0; from < s.batch;) {
    int64_t to = from;
    while (to < s.batch && not_finite[to]) ++to;
    if (to > from) direct(s, x, weight, bias, y, code, from, to);
    from = to + 1;
  }
}

}  // namespace cnnrnn
