// conv_pool on the CPU by kernels whose outputs come in panels (PanelForward): how they are run.
#pragma once

#include <cmath>

#include "cpu/conv_pool.h"
#include "slices.h"

namespace cnnrnn {

// Whether threads share the outputs of a call rather than its units of tiles: each then transforms all
// inputs, but reads only its part of what belongs to the outputs: U, or the sums of a gradient. The unit of
// this estimate is one unit's product with an output panel; `pass`: what a panel costs for each group of
// units beside it.
inline bool shares_outputs(int64_t units, int64_t panels, double pass) {
  constexpr double kTransform = 2.5;
  const auto cost = [&](double units, double panels) {
    return units * (panels + kTransform) + pass * panels * std::ceil(units / 4);
  };
  const double threads = torch::stable::get_num_threads();
  return cost(units, std::ceil(panels / threads)) < cost(std::ceil(units / threads), panels);
}

// One parallel region over units or output panels: calls body(slice, begin, end, out_begin, out_end,
// scratch).
template <typename Body>
void in_panel_slices(const Tensor& like, int64_t units, int64_t panels, bool by_outputs,
                     int64_t scratch_bytes, const Body& body) {
  in_slices(like, by_outputs ? panels : units, scratch_bytes,
            [&](int64_t slice, int64_t begin, int64_t end, char* scratch) {
              if (by_outputs)
                body(slice, 0, units, begin, end, scratch);
              else
                body(slice, begin, end, 0, panels, scratch);
            });
}

// Whether pixels of several images go through the kernel together: where that leaves the busiest thread less
// work. Its unit is the product of an image with an output panel, at one tap. The copy of an image, which
// each thread makes that shares outputs, costs about two, and twice as much together, as it leaves the cache.
template <typename T>
bool goes_across(const PanelForward<T>& kernel, const ConvPoolShape& s) {
  if (!kernel.fill) return false;
  constexpr double kCopy = 2, kCopyAcross = 4;
  const double fill = kernel.fill(s), taps = static_cast<double>(s.kernel.h * s.kernel.w);
  const double copied =
      fill * static_cast<double>(s.input.h * s.input.w) / static_cast<double>(s.conv.h * s.conv.w);
  const int64_t threads = torch::stable::get_num_threads(), panels = kernel.output_panels(s);
  const auto share = [&](int64_t count) { return (count + threads - 1) / threads; };
  const auto most = [&](int64_t units, double product, double copy) {
    const auto cost = [&](int64_t units, int64_t panels) {
      return static_cast<double>(units) * (static_cast<double>(panels) * product + copy);
    };
    return std::min(cost(share(units), panels), cost(units, share(panels)));
  };
  const int64_t units = (s.batch + kImagesAcross - 1) / kImagesAcross;
  return kImagesAcross * most(units, fill * taps, kCopyAcross * copied) < most(s.batch, taps, kCopy * copied);
}

template <typename T>
Tensor packed_panels(const PanelForward<T>& kernel, const ConvPoolShape& s, const Tensor& weight,
                     bool mirrored) {
  Tensor packed = empty_like_of(weight, {kernel.packed_size(s)}, ScalarType::Float);
  in_slices(weight, kernel.output_panels(s), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.pack(s, data<T>(weight), mirrored, mutable_data<float>(packed), begin, end);
  });
  return packed;
}

// What a forward call writes; code and kept may be null.
struct Outputs {
  const Tensor* y;
  const Tensor* code;
  const Tensor* kept;

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

// Outputs shared among threads, one panel after the other: its weights are packed right before they are used,
// and never leave the cache. For that each panel goes over the input again.
template <typename T>
void run_panels_apart(const PanelForward<T>& kernel, const ConvPoolShape& s, const Tensor& x,
                      const Tensor& weight, bool mirrored, const float* bias, const Outputs& out,
                      uint8_t* not_finite) {
  const int64_t panels = kernel.output_panels(s), size = kernel.packed_size(s) / panels;
  const int64_t packed_bytes = (size * static_cast<int64_t>(sizeof(float)) + 63) / 64 * 64;
  in_slices(x, panels, packed_bytes + kernel.scratch_bytes(s),
            [&](int64_t, int64_t begin, int64_t end, char* scratch) {
              float* packed = reinterpret_cast<float*>(scratch);
              for (int64_t panel = begin; panel < end; ++panel) {
                float* const first = packed - panel * size;  // where panel 0 would stand
                kernel.pack(s, data<T>(weight), mirrored, first, panel, panel + 1);
                kernel.run(s, data<T>(x), first, bias, out.y_data<T>(), out.code_data(), out.kept_data<T>(),
                           not_finite, scratch + packed_bytes, 0, kernel.units(s), panel, panel + 1);
              }
            });
}

// bias in float32, or null; mirrored as in PanelForward. Images whose outputs are not all finite are computed
// again, by direct(from, to): these kernels may turn one inf into NaN around it. Whether that happens depends
// on nothing but the image.
template <typename T, typename Direct>
void run_panels(const PanelForward<T>& kernel, ConvPoolShape s, const Tensor& x, const Tensor& weight,
                bool mirrored, const float* bias, const Outputs& out, const Direct& direct) {
  s.across = goes_across(kernel, s);
  std::vector<uint8_t> not_finite(s.batch);
  const int64_t units = kernel.units(s), panels = kernel.output_panels(s);
  constexpr double kReadsWeights = 0.5;
  const bool by_outputs = shares_outputs(units, panels, kReadsWeights);
  if (kernel.streams && kernel.streams(s)) {
    in_slices(x, panels, kernel.scratch_bytes(s), [&](int64_t, int64_t begin, int64_t end, char* scratch) {
      kernel.stream(s, data<T>(x), data<T>(weight), mirrored, bias, out.y_data<T>(), out.code_data(),
                    out.kept_data<T>(), not_finite.data(), scratch, begin, end);
    });
  } else if (by_outputs && kernel.streams) {
    run_panels_apart(kernel, s, x, weight, mirrored, bias, out, not_finite.data());
  } else {
    const Tensor packed = packed_panels<T>(kernel, s, weight, mirrored);
    in_panel_slices(
        x, units, panels, by_outputs, kernel.scratch_bytes(s),
        [&](int64_t, int64_t begin, int64_t end, int64_t out_begin, int64_t out_end, char* scratch) {
          kernel.run(s, data<T>(x), data<float>(packed), bias, out.y_data<T>(), out.code_data(),
                     out.kept_data<T>(), not_finite.data(), scratch, begin, end, out_begin, out_end);
        });
  }
  for (int64_t from = 0; from < s.batch;) {
    int64_t to = from;
    while (to < s.batch && not_finite[to]) ++to;
    if (to > from) direct(from, to);
    from = to + 1;
  }
}

}  // namespace cnnrnn
