// The Winograd kernels against plain loops: every pool, layout, padding and hanging window, codes and all.
//
// test_winograd_tiles.py compiles it with the kernels' own source for 512-bit vectors in narrower
// instructions (CNNRNN_EMULATE_512), and tile registers in plain loops (CNNRNN_EMULATE_AMX). The numbers are
// small and whole, so that results of F(2x2, 3x3) must be equal, ties included; those of F(4x4, 3x3) are
// rounded. Prints what differs; exits with 1 if anything does.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "conv_pool_shapes.h"
#include "guarded.h"

#define CNNRNN_ISA tested
#include "conv_pool_winograd.h"
#include "conv_pool_winograd_grad.h"
#if defined(CNNRNN_EMULATE_AMX)
#include "conv_pool_winograd_tiles.h"
#endif

constexpr int kSilu = 6;  // its row

static ConvPoolShape shape_of(const int64_t (&sizes)[5], Pair padding, Pair window, bool ceil_mode) {
  ConvPoolShape s{};
  s.activation = cnnrnn::kNoActivation;
  s.batch = sizes[0], s.channels = sizes[1], s.outputs = sizes[2], s.groups = 1;
  s.input = {sizes[3], sizes[4]};
  s.kernel = {3, 3}, s.stride = s.dilation = {1, 1}, s.padding = padding;
  s.conv = {s.input.h + 2 * padding.h - 2, s.input.w + 2 * padding.w - 2};
  s.window = s.step = window;
  s.pooled = {(s.conv.h + (ceil_mode ? window.h - 1 : 0)) / window.h,
              (s.conv.w + (ceil_mode ? window.w - 1 : 0)) / window.w};
  return s;
}

static float convolution(const ConvPoolShape& s, const float* x, const float* weight, int64_t n, int64_t k,
                         int64_t row, int64_t column) {
  float sum = 0;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t i = 0; i < 3; ++i)
      for (int64_t j = 0; j < 3; ++j) {
        const int64_t y = row + i - s.padding.h, z = column + j - s.padding.w;
        if (y >= 0 && y < s.input.h && z >= 0 && z < s.input.w)
          sum +=
              x[place(s, s.channels, s.input, n, c, y, z)] * weight[((k * s.channels + c) * 3 + i) * 3 + j];
      }
  return sum;
}

// By the row of the table that s names, itself tested elsewhere.
static float activated(const ConvPoolShape& s, float value) {
  if (s.activation != cnnrnn::kNoActivation) kActivations<float>[s.activation].value(&value, &value, 1);
  return value;
}

// tolerance: of values, and between values of a window of which either may win; 0 where s.keyed.
static void compare(const ConvPoolShape& s, const float* x, const float* weight, const float* bias,
                    const float* y, const uint8_t* code, const float* kept, float tolerance) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t row = 0; row < s.pooled.h; ++row)
        for (int64_t column = 0; column < s.pooled.w; ++column) {
          float best = -INFINITY, values[4];
          int position = 0;
          for (int64_t q = 0; q < s.positions(); ++q) {
            const int64_t i = row * s.window.h + q / s.window.w, j = column * s.window.w + q % s.window.w;
            values[q] = -INFINITY;
            if (i >= s.conv.h || j >= s.conv.w) continue;
            values[q] = convolution(s, x, weight, n, k, i, j) + (bias ? bias[k] : 0);
            const bool wins = s.keyed ? activated(s, values[q]) > activated(s, best) : values[q] > best;
            if (wins || best == -INFINITY) best = values[q], position = static_cast<int>(q);
          }
          const float top = best;
          if (s.relu && best <= 0) best = 0, position = kDead;
          const int64_t at = place(s, s.outputs, s.pooled, n, k, row, column);
          ++checks;
          if (kept) failures += kept[at] != best;
          best = activated(s, best);
          bool right = !code || code[at] == position;
          if (!right && tolerance > 0)
            right = code[at] == kDead ? s.relu && top <= tolerance
                                      : code[at] < s.positions() && values[code[at]] >= top - tolerance &&
                                            (!s.relu || top >= -tolerance);
          if (std::abs(y[at] - best) <= tolerance && right) continue;
          if (++failures <= 20)
            std::printf("C %d, window %dx%d, %s: [%d, %d, %d, %d] is %g (code %d), expected %g (%d)\n",
                        static_cast<int>(s.channels), static_cast<int>(s.window.h),
                        static_cast<int>(s.window.w), s.channels_last ? "NHWC" : "NCHW", static_cast<int>(n),
                        static_cast<int>(k), static_cast<int>(row), static_cast<int>(column), y[at],
                        code ? code[at] : -1, best, position);
        }
}

// A call in parts [begin, end) of units and of output panels, in four.
template <typename Body>
static void in_quarters(int64_t units, int64_t panels, const Body& body) {
  for (const auto& [begin, end] : {Pair{units / 2, units}, Pair{0, units / 2}})
    for (const auto& [out_begin, out_end] : {Pair{0, panels / 2}, Pair{panels / 2, panels}})
      body(begin, end, out_begin, out_end);
}

// The parts of the work out of order: nothing may depend on what ran before.
static void run(const cnnrnn::PanelForward<float>& kernel, bool exact, const ConvPoolShape& s, Guard guard,
                bool with_code, bool mirrored) {
  Guarded<float> x(s.batch * s.channels * s.input.h * s.input.w, guard), bias(s.outputs, guard);
  Guarded<float> weight(s.outputs * s.channels * 9, guard), y(s.batch * s.outputs * s.windows(), guard);
  Guarded<float> turned(weight.size(), guard);
  Guarded<uint8_t> code(y.size(), guard), not_finite(s.batch, guard);
  Guarded<float> kept(y.size(), guard);
  for (float& value : x) value = whole_number();
  for (float& value : weight) value = whole_number();
  for (float& value : bias) value = whole_number();
  for (int64_t k = 0; k < s.outputs; ++k)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t tap = 0; tap < 9; ++tap)
        turned[(c * s.outputs + k) * 9 + 8 - tap] = weight[(k * s.channels + c) * 9 + tap];
  std::fill(y.begin(), y.end(), NAN);
  const int64_t panels = kernel.output_panels(s);
  Guarded<float> packed(round_up(kernel.packed_size(s), 16), guard);
  kernel.pack(s, mirrored ? turned.data() : weight.data(), mirrored, packed.data(), 0, panels);
  const int64_t bytes = round_up(kernel.scratch_bytes(s), 64);
  Guarded<char> scratch(bytes, guard);
  std::fill(scratch.begin(), scratch.end(), static_cast<char>(0xff));  // NaN
  const float* shift = s.relu ? bias.data() : nullptr;
  uint8_t* codes = with_code ? code.data() : nullptr;
  float* arguments = s.keyed && with_code ? kept.data() : nullptr;
  in_quarters(kernel.units(s), panels, [&](int64_t begin, int64_t end, int64_t out_begin, int64_t out_end) {
    kernel.run(s, x.data(), packed.data(), shift, y.data(), codes, arguments, not_finite.data(),
               scratch.data(), begin, end, out_begin, out_end);
  });
  const float rounding = 3e-5f * (s.channels + 10);
  compare(s, x.data(), weight.data(), shift, y.data(), codes, arguments, exact ? 0 : rounding);
  for (uint8_t flag : not_finite) failures += flag;
}

// Gradients of weight and bias, in two partials.
static void run_gradient(const ConvPoolShape& s, Guard guard) {
  Guarded<float> x(s.batch * s.channels * s.input.h * s.input.w, guard);
  Guarded<float> grad(s.batch * s.outputs * s.windows(), guard), grad_bias(s.outputs, guard);
  Guarded<float> grad_weight(s.outputs * s.channels * 9, guard);
  for (float& value : x) value = whole_number();
  for (float& value : grad) value = whole_number();
  const int64_t size = winograd_partial_size(s), units = winograd_units<2>(s);
  Guarded<float> partials(2 * size, guard);
  const int64_t bytes = round_up(winograd_grad_scratch_bytes(s), 64);
  Guarded<char> scratch(bytes, guard);
  std::fill(scratch.begin(), scratch.end(), static_cast<char>(0xff));
  in_quarters(units, winograd_output_panels<OnVectors>(s),
              [&](int64_t begin, int64_t end, int64_t out_begin, int64_t out_end) {
                winograd_weight(s, x.data(), grad.data(), partials.data() + (begin ? size : 0),
                                scratch.data(), begin, end, out_begin, out_end);
              });
  for (int64_t k = 0; k < s.outputs; ++k)
    failures +=
        !winograd_weight_reduce(s, partials.data(), 2, grad_weight.data(), grad_bias.data(), k, k + 1);
  for (int64_t k = 0; k < s.outputs; ++k) {
    float bias = 0;
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t tap = 0; tap < 9; ++tap) {
        float sum = 0;
        bias = 0;
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t row = 0; row < s.conv.h; ++row)
            for (int64_t column = 0; column < s.conv.w; ++column) {
              const float g = grad[place(s, s.outputs, s.conv, n, k, row, column)];
              const int64_t i = row + tap / 3 - s.padding.h, j = column + tap % 3 - s.padding.w;
              bias += g;
              if (i >= 0 && i < s.input.h && j >= 0 && j < s.input.w)
                sum += g * x[place(s, s.channels, s.input, n, c, i, j)];
            }
        const float got = grad_weight[(k * s.channels + c) * 9 + tap];
        ++checks;
        if (got == sum) continue;
        if (++failures <= 20)
          std::printf("gradient of weight [%d, %d, tap %d] is %g, expected %g\n", static_cast<int>(k),
                      static_cast<int>(c), static_cast<int>(tap), got, sum);
      }
    failures += grad_bias[k] != bias;
  }
}

int main() {
  if (std::strcmp(kActivations<float>[kSilu].name, "silu") != 0) return 2;
  const int64_t shapes[][5] = {// N, C, K, H, W
                               {2, 17, 13, 9, 11},
                               {1, 3, 30, 4, 75},
                               {9, 5, 7, 5, 6},
                               {1, 70, 4, 3, 3},
                               {3, 4, 5, 40, 3}};
  for (const auto& sizes : shapes)
    for (const Pair window : {Pair{1, 1}, Pair{1, 2}, Pair{2, 1}, Pair{2, 2}})
      for (const Pair padding : {Pair{0, 0}, Pair{1, 1}, Pair{3, 2}})
        for (int choice = 0; choice < 12; ++choice) {
          ConvPoolShape s = shape_of(sizes, padding, window, choice % 2);
          if (s.windows() == 0) continue;
          s.channels_last = choice & 2, s.relu = choice & 4;
          if (choice & 8) s.activation = kSilu, s.keyed = s.positions() > 1;
          if (s.positions() == 1 && choice < 4) run_gradient(s, choice % 2 ? Guard::kBefore : Guard::kAfter);
          const Guard guard = choice % 3 == 0 ? Guard::kBefore : Guard::kAfter;
          const auto run_both = [&](const auto& of_2, const auto& of_4) {
            run(of_2, true, s, guard, choice % 3 != 1, choice == 3);
            if (choice < 8) run(of_4, false, s, guard, choice % 3 != 1, choice == 4);
          };
          run_both(winograd_forward_of<2>(), winograd_forward_of<4>());
#if defined(CNNRNN_EMULATE_AMX)
          run_both(winograd_tiles_of<2>(), winograd_tiles_of<4>());
#endif
        }
  // An infinity is reported for its image alone.
  ConvPoolShape s = shape_of(shapes[2], {1, 1}, {2, 2}, false);
  Guarded<float> x(s.batch * s.channels * s.input.h * s.input.w, Guard::kAfter);
  Guarded<float> weight(s.outputs * s.channels * 9, Guard::kAfter),
      y(s.batch * s.outputs * s.windows(), Guard::kAfter);
  for (float& value : weight) value = 1;
  x[place(s, s.channels, s.input, 4, 2, 3, 3)] = INFINITY;
  const cnnrnn::PanelForward<float> kernel = winograd_forward_of<2>();
  const int64_t panels = kernel.output_panels(s);
  Guarded<float> packed(kernel.packed_size(s), Guard::kAfter);
  kernel.pack(s, weight.data(), false, packed.data(), 0, panels);
  Guarded<char> scratch(round_up(kernel.scratch_bytes(s), 64), Guard::kAfter);
  Guarded<uint8_t> flags(s.batch, Guard::kAfter);
  kernel.run(s, x.data(), packed.data(), nullptr, y.data(), nullptr, nullptr, flags.data(), scratch.data(), 0,
             kernel.units(s), 0, panels);
  for (int64_t n = 0; n < s.batch; ++n) failures += flags[n] != (n == 4);
  std::printf("%d-byte vectors: %ld checks, %ld failures\n", kVectorBytes, static_cast<long>(checks),
              static_cast<long>(failures));
  return failures > 0;
}
