// conv_pool on the CPU: check -> allocate -> pack -> call the kernels in parallel.

#include <algorithm>
#include <limits>

#include "conv_pool_average.h"
#include "conv_pool_winograd.h"
#include "cpu/capability.h"
#include "cpu/conv_pool.h"
#include "slices.h"

namespace cnnrnn {
namespace {

using Ints = std::vector<int64_t>;

const ConvPoolKernels& kernels() { return CNNRNN_ACTIVE_TABLE(conv_pool); }

template <typename T>
const ConvPoolKernelsOf<T>& kernels_of();
template <>
const ConvPoolKernelsOf<float>& kernels_of<float>() {
  return kernels().f32;
}
template <>
const ConvPoolKernelsOf<double>& kernels_of<double>() {
  return kernels().f64;
}

// The arguments that every form of the operator shares.
struct Config {
  Ints stride, padding, dilation;
  int64_t groups;
  std::string activation, pool;
  Ints window, step, margin;
  bool ceil_mode;
  std::string precision = "highest";
};

Pair pair(const char* name, const Ints& values, int64_t least) {
  check(values.size() == 2, name, ": expected 2 values, got ", values.size());
  // The upper bound keeps every product and sum of sizes below within int64.
  constexpr int64_t most = std::numeric_limits<int32_t>::max();
  for (int64_t value : values)
    check(value >= least && value <= most, name, ": expected values from ", least, " to ", most, ", got (",
          values[0], ", ", values[1], ")");
  return {values[0], values[1]};
}

int64_t convolved(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t span = size + 2 * padding - dilation * (kernel - 1) - 1;
  return span < 0 ? 0 : span / stride + 1;
}

// torch's rule: in ceil_mode the last window may hang over, but must begin inside.
int64_t pooled(int64_t size, int64_t window, int64_t step, int64_t margin, bool ceil_mode) {
  const int64_t span = size + 2 * margin - window + (ceil_mode ? step - 1 : 0);
  if (span < 0) return 0;
  const int64_t count = span / step + 1;
  return ceil_mode && (count - 1) * step >= size + margin ? count - 1 : count;
}

Tensor in_layout(const Tensor& t, bool channels_last) {
  if (channels_last ? is_channels_last(t) : t.is_contiguous()) return t;
  return torch::stable::contiguous(t, channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                                    : torch::headeronly::MemoryFormat::Contiguous);
}

Tensor empty_image(const Tensor& like, const ConvPoolShape& s, int64_t channels, Pair size,
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
void simplify(int64_t kernel, int64_t conv, int64_t window, int64_t pooled, int64_t& stride,
              int64_t& dilation, int64_t& step) {
  if (kernel == 1) dilation = 1;
  if (conv == 1) stride = 1;
  if (pooled == 1) step = std::min(step, window);
}

// The kernels keep offsets within a pooling window in 32 bits, sizes of scratch memory in 64. Products of
// sizes may not fit even those, so the check itself is in floating point.
void check_extents(const ConvPoolShape& s) {
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

int find_activation(const std::string& name) {
  if (name == "none") return kNoActivation;
  const auto& table = kernels().f32;
  for (int row = 0; row < table.activation_count; ++row)
    if (name == table.activations[row].name) return row;
  check(false, "activation: expected 'none' or the name of an activation, got '", name, "'");
  return kNoActivation;
}

Call check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Config& c) {
  check(x.dim() == 4, "x: expected shape [N, C, H, W], got ", shape(x));
  check(weight.dim() == 4, "weight: expected shape [K, C/groups, KH, KW], got ", shape(weight));
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
        "x: the CPU kernels of conv_pool2d take float32 or float64");
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

// Images [from, to).
template <typename T>
void run_direct(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                const Outputs& out, int64_t from, int64_t to) {
  const auto& kernel = kernels_of<T>();
  Tensor packed = new_dense(x, {kernel.forward_packed_size(s)});
  kernel.forward_pack(s, data<T>(weight), data<T>(get(bias)), mutable_data<T>(packed));
  const int64_t of_image = s.batch == 0 ? 0 : kernel.forward_units(s) / s.batch;
  in_slices(x, (to - from) * of_image, kernel.forward_scratch_bytes(s),
            [&](int64_t, int64_t begin, int64_t end, char* scratch) {
              kernel.forward(s, data<T>(x), data<T>(packed), out.y_data<T>(), out.code_data(),
                             out.kept_data<T>(), scratch, from * of_image + begin, from * of_image + end);
            });
}

template <typename T>
void run_forward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 bool high, const Outputs& out) {
  if constexpr (std::is_same_v<T, float>) {
    if (winograd_pays(s)) {
      const auto& winograd = kernels().winograd;
      const auto& kernel = high && coarse_winograd_pays(s) ? winograd.of_4 : winograd.of_2;
      const Tensor packed = packed_winograd(winograd, kernel, s, weight, false);
      run_winograd(winograd, kernel, s, x, packed, bias, out,
                   [&](int64_t from, int64_t to) { run_direct<float>(s, x, weight, bias, out, from, to); });
      return;
    }
  }
  run_direct<T>(s, x, weight, bias, out, 0, s.batch);
}

template <typename T>
void run_weight_gradient(const ConvPoolShape& s, const Tensor& grad_y, const Tensor& x, const Tensor& code,
                         Tensor* grad_weight, Tensor* grad_bias) {
  const auto& kernel = kernels_of<T>();
  const int64_t units = kernel.weight_units(s), size = kernel.weight_partial_size(s);
  const int64_t slices = std::max<int64_t>(1, std::min<int64_t>(units, torch::stable::get_num_threads()));
  Tensor partials = torch::stable::new_zeros(x, {slices, size});
  in_slices(x, units, kernel.weight_scratch_bytes(s),
            [&](int64_t slice, int64_t begin, int64_t end, char* scratch) {
              kernel.weight(s, data<T>(x), data<T>(grad_y), data<uint8_t>(code),
                            mutable_data<T>(partials) + slice * size, scratch, begin, end);
            });
  kernel.weight_reduce(s, data<T>(partials), slices, grad_weight ? mutable_data<T>(*grad_weight) : nullptr,
                       grad_bias ? mutable_data<T>(*grad_bias) : nullptr);
}

template <typename T>
void run_input_gradient(const ConvPoolShape& s, const Tensor& grad_y, const Tensor& weight,
                        const Tensor& code, Tensor& grad_x) {
  const auto& kernel = kernels_of<T>();
  Tensor packed = empty_like_of(grad_y, {kernel.input_packed_size(s)});
  kernel.input_pack(s, data<T>(weight), mutable_data<T>(packed));
  in_slices(grad_y, kernel.input_units(s), kernel.input_scratch_bytes(s),
            [&](int64_t, int64_t begin, int64_t end, char* scratch) {
              kernel.input(s, data<T>(packed), data<T>(grad_y), data<uint8_t>(code), mutable_data<T>(grad_x),
                           scratch, begin, end);
            });
}

template <typename T>
void run_any_forward(const Call& call, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Tensor* map, const Outputs& out) {
  if (!call.average) return run_forward<T>(call.shape, x, weight, bias, call.high, out);
  run_forward<T>(without_pool(call.shape, call.of_output()), x, weight, bias, call.high,
                 {map, nullptr, nullptr});
  run_average(kernels_of<T>(), call.shape, call.of_output() ? kNoActivation : call.activation, *map, *out.y);
}

// y, and for a backward pass code and what is kept of the map, where there is any: see operators.schema.
std::tuple<Tensor, OptionalTensor, OptionalTensor> forward(const Tensor& x_any, const Tensor& weight_any,
                                                           const OptionalTensor& bias_any,
                                                           const Config& config, bool train) {
  const Call call = check_arguments(x_any, weight_any, bias_any, config);
  const ConvPoolShape& s = call.shape;
  const Tensor x = in_layout(x_any, s.channels_last), weight = in_layout(weight_any, false);
  OptionalTensor bias;
  if (bias_any) bias = dense(*bias_any);
  const ScalarType dtype = x.scalar_type();
  const Tensor y = empty_image(x, s, s.outputs, s.pooled, dtype);
  OptionalTensor code, kept, map;
  if (train && !call.average) {
    code = empty_image(x, s, s.outputs, s.pooled, ScalarType::Byte);
    if (!call.of_output()) kept = empty_image(x, s, s.outputs, s.pooled, dtype);
  }
  if (call.average) map = empty_image(x, s, s.outputs, s.conv, dtype);
  const auto run = dtype == ScalarType::Float ? run_any_forward<float> : run_any_forward<double>;
  run(call, x, weight, bias, get(map), {&y, get(code), get(kept)});
  if (train && call.activation != kNoActivation && map) kept = map;
  return {y, code, kept};
}

Tensor conv_pool2d(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, Ints dilation,
                   int64_t groups, Text activation, Text pool, Ints pool_size, Ints pool_stride,
                   Ints pool_padding, bool ceil_mode, Text precision) {
  return std::get<0>(forward(x, weight, bias,
                             {stride, padding, dilation, groups, activation.take(), pool.take(), pool_size,
                              pool_stride, pool_padding, ceil_mode, precision.take()},
                             false));
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_train(Tensor x, Tensor weight, OptionalTensor bias,
                                                     Ints stride, Ints padding, Ints dilation, int64_t groups,
                                                     Text activation, Text pool, Ints pool_size,
                                                     Ints pool_stride, Ints pool_padding, bool ceil_mode,
                                                     Text precision) {
  const auto [y, code, kept] = forward(x, weight, bias,
                                       {stride, padding, dilation, groups, activation.take(), pool.take(),
                                        pool_size, pool_stride, pool_padding, ceil_mode, precision.take()},
                                       true);
  return {y, code ? *code : empty_like_of(x, {0}, ScalarType::Byte), kept ? *kept : empty_like_of(x, {0})};
}

// The gradient of what the activation is applied to: of the map where the pool is an average, of the winners
// elsewhere. grad_y and kept in x's order.
template <typename T>
Tensor gradient_of_map(const Call& call, const Tensor& grad_y, const Tensor* kept) {
  const ConvPoolShape& s = call.shape;
  if (call.average) {
    Tensor grad = empty_image(grad_y, s, s.outputs, s.conv, grad_y.scalar_type());
    run_spread(kernels_of<T>(), s, call.activation, kept, grad_y, grad);
    return grad;
  }
  if (s.activation == kNoActivation) return grad_y;
  Tensor grad = torch::stable::empty_like(grad_y);
  const auto gradient = kernels_of<T>().activations[s.activation].gradient;
  in_slices(grad_y, s.batch * s.outputs * s.windows(), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    gradient(data<T>(*kept) + begin, data<T>(grad_y) + begin, mutable_data<T>(grad) + begin, end - begin);
  });
  return grad;
}

// Checks what a backward call gets beside the operands of the forward call.
void check_backward(const Call& call, const Tensor& grad_y, const Tensor& x, const Tensor& code,
                    const OptionalTensor& kept) {
  const ConvPoolShape& s = call.shape;
  const std::vector<int64_t> out = {s.batch, s.outputs, s.pooled.h, s.pooled.w};
  const std::vector<int64_t> map = {s.batch, s.outputs, s.conv.h, s.conv.w};
  check_shape("grad_y", grad_y, out);
  check_like("grad_y", grad_y, "x", x);
  check(code.scalar_type() == ScalarType::Byte, "code: expected dtype uint8");
  if (!call.average) check_shape("code", code, out);
  if (call.average ? call.activation == kNoActivation : s.activation == kNoActivation) return;
  check(kept.has_value(), "kept: expected a tensor for this activation, got none");
  check_like("kept", *kept, "x", x);
  check_shape("kept", *kept, call.average ? map : out);
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_backward(Tensor grad_y, Tensor x_any, Tensor weight_any,
                                                        OptionalTensor bias, Tensor code_any,
                                                        OptionalTensor kept_any, Ints stride, Ints padding,
                                                        Ints dilation, int64_t groups, Text activation,
                                                        Text pool, Ints pool_size, Ints pool_stride,
                                                        Ints pool_padding, bool ceil_mode, bool need_x,
                                                        bool need_weight, bool need_bias, Text precision) {
  const Call call = check_arguments(x_any, weight_any, bias,
                                    {stride, padding, dilation, groups, activation.take(), pool.take(),
                                     pool_size, pool_stride, pool_padding, ceil_mode, precision.take()});
  check_backward(call, grad_y, x_any, code_any, kept_any);
  const ConvPoolShape s = call.average ? without_pool(call.shape, true) : call.shape;
  OptionalTensor kept;
  if (kept_any) kept = in_layout(*kept_any, s.channels_last);
  const bool single = grad_y.scalar_type() == ScalarType::Float;
  const Tensor grad = (single ? gradient_of_map<float>
                              : gradient_of_map<double>)(call, in_layout(grad_y, s.channels_last), get(kept));
  const Tensor code = call.average ? torch::stable::new_zeros(grad, {grad.numel()}, ScalarType::Byte)
                                   : in_layout(code_any, s.channels_last);
  need_bias = need_bias && bias.has_value();
  const Tensor none = empty_like_of(grad, {0});
  Tensor grad_x = none, grad_weight = none, grad_bias = none;
  const bool dense = single && winograd_backward_pays(s);
  const Tensor alive = !dense ? none : s.relu && !call.average ? alive_gradient(grad, code, s) : grad;
  if (need_x) {
    const Tensor weight = in_layout(weight_any, false);
    grad_x = empty_image(grad, s, s.channels, s.input, grad.scalar_type());
    if (dense)
      run_winograd_input(kernels().winograd, s, alive, weight, grad_x, run_direct<float>);
    else
      (single ? run_input_gradient<float> : run_input_gradient<double>)(s, grad, weight, code, grad_x);
  }
  if (need_weight || need_bias) {
    const Tensor x = in_layout(x_any, s.channels_last);
    if (need_weight)
      grad_weight = empty_like_of(grad, {s.outputs, s.group_channels(), s.kernel.h, s.kernel.w});
    if (need_bias) grad_bias = empty_like_of(grad, {s.outputs});
    Tensor* const of_weight = need_weight ? &grad_weight : nullptr;
    Tensor* const of_bias = need_bias ? &grad_bias : nullptr;
    const bool done = dense && run_winograd_weight(kernels().winograd, s, alive, x, of_weight, of_bias);
    const auto run = single ? run_weight_gradient<float> : run_weight_gradient<double>;
    if (!done) run(s, grad, x, code, of_weight, of_bias);
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnrnn_ext, CPU, library) {
  library.impl("conv_pool2d", TORCH_BOX(&conv_pool2d));
  library.impl("conv_pool2d_train", TORCH_BOX(&conv_pool2d_train));
  library.impl("conv_pool2d_backward", TORCH_BOX(&conv_pool2d_backward));
}

}  // namespace cnnrnn
