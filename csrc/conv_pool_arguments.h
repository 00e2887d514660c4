// The arguments of the conv_pool operators on the CPU: checked, and what a call asks for.
#pragma once

#include <algorithm>
#include <limits>

#include "cpu/capability.h"
#include "cpu/conv_pool.h"
#include "halves.h"

namespace cnnrnn {

using Ints = std::vector<int64_t>;

inline const ConvPoolKernels& kernels() { return CNNRNN_ACTIVE_TABLE(conv_pool); }

// The arguments that every form of the operator shares.
struct Config {
  Ints stride, padding, dilation;
  int64_t groups;
  std::string activation, pool;
  Ints window, step, margin;
  bool ceil_mode;
  std::string precision = "highest";
};

inline Pair pair(const char* name, const Ints& values, int64_t least) {
  check(values.size() == 2, name, ": expected 2 values, got ", values.size());
  // The upper bound keeps every product and sum of sizes below within int64.
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  for (int64_t value : values)
    check(value >= least && value <= most, name, ": expected values from ", least, " to ", most, ", got (",
          values[0], ", ", values[1], ")");
  return {values[0], values[1]};
}

inline int64_t convolved(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// torch's rule: in ceil_mode the last window may hang over, but must begin inside.
inline int64_t pooled(int64_t size, int64_t window, int64_t step, int64_t margin, bool ceil_mode) {
  const int64_t span = size + 2 * margin - window + (ceil_mode ? step - 1 : 0);
  if (span < 0) return 0;
  const int64_t count = span / step + 1;
  return ceil_mode && (count - 1) * step >= size + margin ? count - 1 : count;
}

inline Tensor in_layout(const Tensor& t, bool channels_last) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  return torch::stable::contiguous(t, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                    : torch::headeronly::MemoryFormat::Contiguous);
}

inline Tensor empty_image(const Tensor& like, const ConvPoolShape& s, int64_t channels, Pair size,
                          ScalarType dtype) {
  if (!s.channels_last && dtype == like.scalar_type())
    return new_dense(like, {s.batch, channels, size.h, size.w});
  const auto format = s.channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                      : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({s.batch, channels, size.h, size.w}, dtype, torch::headeronly::Layout::Strided,
                              like.device(), false, format);
}

// What nothing depends on is made small, for scratch memory grows with it: the stride of one convolution
// output, the step of one window, the dilation of one tap.
inline void simplify(int64_t kernel, int64_t conv, int64_t window, int64_t pooled, int64_t& stride,
                     int64_t& dilation, int64_t& step) {
  if (kernel == 1) dilation = 1;
  if (conv == 1) stride = 1;
  if (pooled == 1) step = std::min(step, window);
}

// The kernels keep offsets within a pooling window in 32 bits, sizes of scratch memory in 64. Products of
// sizes may not fit even those, so the check itself is in floating point.
inline void check_extents(const ConvPoolShape& s) {
  const auto length = [](int64_t size, int64_t padding, int64_t margin, int64_t window, int64_t stride) {
    return static_cast<double>(size) + 2.0 * padding + static_cast<double>(2 * margin + window) * stride;
  };
  const double height = length(s.input.h, s.padding.h, s.margin.h, s.window.h, s.stride.h);
  const double width = length(s.input.w, s.padding.w, s.margin.w, s.window.w, s.stride.w);
  constexpr double kOfSlab = 32;  // channels side by side
  constexpr double kMostBytes = 1e15;
  check((static_cast<double>(s.window.h - 1) * s.stride.h + 1) * width * kOfSlab <
                std::numeric_limits<int32_t>::max() &&
            height * width * std::max<int64_t>(s.channels, 32) * sizeof(double) < kMostBytes,
        "x: with padding (", s.padding.h, ", ", s.padding.w, "), stride (", s.stride.h, ", ", s.stride.w,
        ") and pool_size (", s.window.h, ", ", s.window.w, ") it is too large for the CPU kernels, got ",
        "size (", s.input.h, ", ", s.input.w, ")");
}

// What a call asks for.
struct Call {
  ConvPoolShape shape;
  int activation;  // row of the table, relu's too, or kNoActivation
  bool average;
  bool high;  // of precision: the faster algorithm with the larger error

  // Whether the derivative of the activation follows from its value.
  bool of_output() const {
    return activation == kNoActivation || kernels().f32.activations[activation].of_output;
  }
};

inline int find_activation(const std::string& name) {
  if (name == "none") return kNoActivation;
  const auto& table = kernels().f32;
  for (int row = 0; row < table.activation_count; ++row)
    if (name == table.activations[row].name) return row;
  check(false, "activation: expected 'none' or the name of an activation, got '", name, "'");
  return kNoActivation;
}

inline Call check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const Config& c) {
  check(x.dim() == 4, "x: expected shape [N, C, H, W], got ", shape(x));
  check(weight.dim() == 4, "weight: expected shape [K, C/groups, KH, KW], got ", shape(weight));
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double || is_half(x),
        "x: the CPU kernels of conv_pool2d take float32, float64 or bfloat16");
  check_like("weight", weight, "x", x);
  check(x.size(2) > 0 && x.size(3) > 0, "x: expected a non-zero height and width, got ", shape(x));
  check(c.groups > 0, "groups: expected a positive number, got ", c.groups);
  check(x.size(1) == weight.size(1) * c.groups, "x: expected ", weight.size(1) * c.groups,
        " channels for weight ", shape(weight), " and groups=", c.groups, ", got ", shape(x));
  check(weight.size(0) % c.groups == 0, "weight: its ", weight.size(0),
        " outputs are not divisible by groups=", c.groups);
  check(weight.numel() > 0, "weight: expected non-zero sizes, got ", shape(weight));
  if (bias) {
    check_like("bias", *bias, "x", x);
    check_shape("bias", *bias, {weight.size(0)});
  }
  check(c.pool == "max" || c.pool == "avg", "pool: the CPU kernels cover 'max' and 'avg', got '", c.pool,
        "'");
  check(c.precision == "highest" || c.precision == "high", "precision: expected 'highest' or 'high', got '",
        c.precision, "'");
  Call call{{}, find_activation(c.activation), c.pool == "avg", c.precision == "high"};
  ConvPoolShape& s = call.shape;
  s.batch = x.size(0), s.channels = x.size(1), s.outputs = weight.size(0), s.groups = c.groups;
  s.input = {x.size(2), x.size(3)};
  s.kernel = {weight.size(2), weight.size(3)};
  s.stride = pair("stride", c.stride, 1);
  s.padding = pair("padding", c.padding, 0);
  s.dilation = pair("dilation", c.dilation, 1);
  s.window = pair("pool_size", c.window, 1);
  s.step = pair("pool_stride", c.step, 1);
  s.margin = pair("pool_padding", c.margin, 0);
  check(s.positions() <= kDead, "pool_size: expected at most ", int{kDead}, " positions, got ",
        s.positions());
  check(2 * s.margin.h <= s.window.h && 2 * s.margin.w <= s.window.w,
        "pool_padding: expected at most half of pool_size");
  s.conv = {convolved(s.input.h, s.kernel.h, s.stride.h, s.padding.h, s.dilation.h),
            convolved(s.input.w, s.kernel.w, s.stride.w, s.padding.w, s.dilation.w)};
  check(s.conv.h > 0 && s.conv.w > 0, "x: the kernel ", shape(weight), " is larger than the padded input ",
        shape(x));
  s.pooled = {pooled(s.conv.h, s.window.h, s.step.h, s.margin.h, c.ceil_mode),
              pooled(s.conv.w, s.window.w, s.step.w, s.margin.w, c.ceil_mode)};
  check(s.pooled.h > 0 && s.pooled.w > 0, "pool_size: the window (", s.window.h, ", ", s.window.w,
        ") is larger than the convolution's output (", s.conv.h, ", ", s.conv.w, ")");
  simplify(s.kernel.h, s.conv.h, s.window.h, s.pooled.h, s.stride.h, s.dilation.h, s.step.h);
  simplify(s.kernel.w, s.conv.w, s.window.w, s.pooled.w, s.stride.w, s.dilation.w, s.step.w);
  check_extents(s);
  s.relu = c.activation == "relu";
  s.activation = s.relu ? kNoActivation : call.activation;
  s.keyed = !call.of_output() && s.positions() > 1;
  s.channels_last = is_channels_last(x);
  return call;
}

}  // namespace cnnrnn
