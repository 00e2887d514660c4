// What the tests of forward kernels of conv_pool share: operands, and the outputs by plain loops.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>

#include "conv_pool_shapes.h"
#include "guarded.h"
#include "split.h"

static void put(float& to, float value) { to = value; }
static void put(Half& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to = bits >> 16;
}
static float get(float value) { return value; }
static float get(Half value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

template <typename T>
static float convolution(const ConvPoolShape& s, const T* x, const T* weight, bool mirrored, int64_t n,
                         int64_t k, int64_t row, int64_t column) {
  float sum = 0;
  const int64_t taps = s.kernel.h * s.kernel.w;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = row * s.stride.h + tap / s.kernel.w * s.dilation.h - s.padding.h;
      const int64_t z = column * s.stride.w + tap % s.kernel.w * s.dilation.w - s.padding.w;
      if (y < 0 || y >= s.input.h || z < 0 || z >= s.input.w) continue;
      const int64_t at =
          mirrored ? (c * s.outputs + k) * taps + taps - 1 - tap : (k * s.channels + c) * taps + tap;
      sum += get(x[place(s, s.channels, s.input, n, c, y, z)]) * get(weight[at]);
    }
  return sum;
}

// The operands of a call, of whole numbers.
template <typename T>
struct Operands {
  Guarded<T> x, weight;
  Guarded<float> bias;

  Operands(const ConvPoolShape& s, Guard guard)
      : x(s.batch * s.channels * s.input.h * s.input.w, guard),
        weight(s.outputs * s.channels * s.kernel.h * s.kernel.w, guard),
        bias(s.outputs, guard) {
    for (T& value : x) put(value, whole_number());
    for (T& value : weight) put(value, whole_number());
    for (float& value : bias) value = whole_number();
  }
};

// Counts the outputs, and those that differ. bias and codes may be null.
template <typename T>
static void check_outputs(const ConvPoolShape& s, Operands<T>& of, const float* bias, bool mirrored,
                          const T* y, const uint8_t* codes) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t i = 0; i < s.windows(); ++i) {
        const int64_t row = i / s.pooled.w, column = i % s.pooled.w;
        float best = -INFINITY;
        int code = 0;
        for (int64_t q = 0; q < s.positions(); ++q) {
          const int64_t r = row * s.step.h - s.margin.h + q / s.window.w;
          const int64_t c = column * s.step.w - s.margin.w + q % s.window.w;
          if (r < 0 || r >= s.conv.h || c < 0 || c >= s.conv.w) continue;
          const float value =
              convolution(s, of.x.data(), of.weight.data(), mirrored, n, k, r, c) + (bias ? bias[k] : 0.0f);
          if (value > best) best = value, code = static_cast<int>(q);
        }
        if (s.relu && best <= 0) best = 0, code = kDead;
        const int64_t at = place(s, s.outputs, s.pooled, n, k, row, column);
        // A bfloat16 holds whole numbers up to 256; larger ones are rounded.
        const bool same =
            sizeof(T) == 4 ? get(y[at]) == best : std::fabs(get(y[at]) - best) <= std::fabs(best) / 256;
        const bool right = same && (!codes || codes[at] == code);
        ++checks;
        if (!right && ++failures < 20)
          std::printf("%d bytes, C %ld K %ld, image %ld, output %ld, window %ld: %g (%d), expected %g (%d)\n",
                      static_cast<int>(sizeof(T)), static_cast<long>(s.channels),
                      static_cast<long>(s.outputs), static_cast<long>(n), static_cast<long>(k),
                      static_cast<long>(i), get(y[at]), codes ? codes[at] : -1, best, code);
      }
}

static int report() {
  std::printf("%d-byte vectors: %ld checks, %ld failures\n", kVectorBytes, static_cast<long>(checks),
              static_cast<long>(failures));
  return failures > 0;
}
