// What the tests of the conv_pool kernels share beside the kernels themselves: whole numbers, shapes, places.
#pragma once

#include <cstdint>

#include "conv_pool.h"

using cnnrnn::ConvPoolShape;
using cnnrnn::Pair;

static uint32_t seed = 1;
static float whole_number() {  // -3 to 3
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>((seed >> 16) % 7) - 3;
}

static int64_t checks = 0, failures = 0;

struct Sizes {
  int64_t batch, channels, outputs;
  Pair input, kernel, stride, padding, dilation;
  Pair window{1, 1}, step{1, 1}, margin{0, 0};
};

static ConvPoolShape shape_of(const Sizes& z) {
  ConvPoolShape s{};
  s.activation = cnnrnn::kNoActivation;
  s.batch = z.batch, s.channels = z.channels, s.outputs = z.outputs, s.groups = 1;
  s.input = z.input, s.kernel = z.kernel, s.stride = z.stride, s.padding = z.padding, s.dilation = z.dilation;
  s.window = z.window, s.step = z.step, s.margin = z.margin;
  const auto convolved = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  s.conv = {convolved(z.input.h, z.kernel.h, z.stride.h, z.padding.h, z.dilation.h),
            convolved(z.input.w, z.kernel.w, z.stride.w, z.padding.w, z.dilation.w)};
  s.pooled = {(s.conv.h + 2 * z.margin.h - z.window.h) / z.step.h + 1,
              (s.conv.w + 2 * z.margin.w - z.window.w) / z.step.w + 1};
  return s;
}

// Where (n, c, row, column) stands.
static int64_t place(const ConvPoolShape& s, int64_t channels, Pair size, int64_t n, int64_t c, int64_t row,
                     int64_t column) {
  return s.channels_last ? ((n * size.h + row) * size.w + column) * channels + c
                         : ((n * channels + c) * size.h + row) * size.w + column;
}
