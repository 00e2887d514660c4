// conv_pool on CUDA: check, allocate, launch on the current stream. Shapes: cnnrnn_ext/operators.schema.

#include <algorithm>
#include <climits>
#include <iterator>
#include <string>
#include <tuple>
#include <vector>

#include "conv_pool.h"
#include "device.h"

namespace cnnrnn::cuda {
namespace {

using Ints = std::vector<int64_t>;

struct Config {
  Ints stride, padding, dilation;
  int64_t groups;
  std::string activation, pool;
  Ints pool_size, pool_stride, pool_padding;
  bool ceil_mode;
  std::string precision = "highest";
};

Size2 pair_of(const char* name, const Ints& values, int64_t least) {
  check(values.size() == 2, name, ": expected 2 numbers, got ", values.size());
  for (int64_t value : values)
    check(value >= least && value <= INT_MAX, name, ": expected at least ", least, ", got ", value);
  return {static_cast<int>(values[0]), static_cast<int>(values[1])};
}

int dimension(const char* name, const Tensor& t, int64_t d, int64_t most = INT_MAX) {
  check(t.size(d) <= most, name, ": at most ", most, " elements are covered in dimension ", d, ", got ",
        shape(t));
  return static_cast<int>(t.size(d));
}

int conv_size(int64_t in, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  check(in + 2 * padding >= reach, "the kernel (", reach, " with dilation) is larger than the padded input (",
        in + 2 * padding, ")");
  const int64_t size = (in + 2 * padding - reach) / stride + 1;
  check(size <= INT_MAX, "the output is too large");
  return static_cast<int>(size);
}

int pool_size(int64_t in, int64_t window, int64_t stride, int64_t padding, bool ceil_mode) {
  check(2 * padding <= window, "pool_padding: expected at most half of pool_size, got ", padding);
  check(in + 2 * padding >= window || (ceil_mode && in + 2 * padding >= 1), "the pooling window (", window,
        ") is larger than its input (", in + 2 * padding, ")");
  const int64_t rest = in + 2 * padding - window + (ceil_mode ? stride - 1 : 0);
  int64_t size = (rest < 0 ? 0 : rest / stride) + 1;
  if (ceil_mode && (size - 1) * stride >= in + padding) --size;  // a window must begin inside
  return static_cast<int>(size);
}

Activation activation_of(const std::string& name) {
  for (int i = 0; i < static_cast<int>(std::size(kActivationNames)); ++i)
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  check(false, "activation: expected 'none' or the name of an activation, got '", name, "'");
  return Activation::kNone;
}

// What a call asks for.
struct Call {
  ConvPoolShape shape;
  bool average;

  // Whether the pool leaves a gradient's activation to be undone: relu's is in the codes.
  bool has_activation() const {
    return shape.activation != Activation::kNone && (average || shape.activation != Activation::kRelu);
  }
};

Call check_arguments(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Config& c) {
  check(x.dim() == 4, "x: expected shape [N, C, H, W], got ", shape(x));
  check(weight.dim() == 4, "weight: expected shape [K, C/groups, KH, KW], got ", shape(weight));
  check_like("weight", weight, "x", x);
  check(c.pool == "max" || c.pool == "avg", "pool: the CUDA kernels cover 'max' and 'avg', got '", c.pool,
        "'");
  check(c.precision == "highest" || c.precision == "high", "precision: expected 'highest' or 'high', got '",
        c.precision, "'");
  Call call{{}, c.pool == "avg"};
  ConvPoolShape& s = call.shape;
  constexpr int64_t kGridLimit = 65535;
  s.n = dimension("x", x, 0), s.c = dimension("x", x, 1, kGridLimit);
  s.in = {dimension("x", x, 2), dimension("x", x, 3)};
  s.k = dimension("weight", weight, 0, kGridLimit);
  s.kernel = {dimension("weight", weight, 2), dimension("weight", weight, 3)};
  check(s.kernel.h > 0 && s.kernel.w > 0, "weight: expected a kernel of at least 1x1, got ", shape(weight));
  check(c.groups > 0 && s.c % c.groups == 0 && s.k % c.groups == 0, "groups: expected a divisor of ", s.c,
        " input and ", s.k, " output channels, got ", c.groups);
  s.groups = static_cast<int>(c.groups);
  check_shape("weight", weight, {s.k, s.c / s.groups, s.kernel.h, s.kernel.w});
  if (bias) {
    check_like("bias", *bias, "x", x);
    check_shape("bias", *bias, {s.k});
  }
  s.stride = pair_of("stride", c.stride, 1), s.padding = pair_of("padding", c.padding, 0);
  s.dilation = pair_of("dilation", c.dilation, 1);
  s.pool = pair_of("pool_size", c.pool_size, 1), s.pool_stride = pair_of("pool_stride", c.pool_stride, 1);
  s.pool_padding = pair_of("pool_padding", c.pool_padding, 0);
  check(int64_t(s.pool.h) * s.pool.w <= kNoGradient, "pool_size: expected at most ", int{kNoGradient},
        " positions, got ", s.pool.h, "x", s.pool.w);
  s.conv = {conv_size(s.in.h, s.kernel.h, s.stride.h, s.padding.h, s.dilation.h),
            conv_size(s.in.w, s.kernel.w, s.stride.w, s.padding.w, s.dilation.w)};
  s.out = {pool_size(s.conv.h, s.pool.h, s.pool_stride.h, s.pool_padding.h, c.ceil_mode),
           pool_size(s.conv.w, s.pool.w, s.pool_stride.w, s.pool_padding.w, c.ceil_mode)};
  s.activation = activation_of(c.activation);
  return call;
}

// The convolution of a call with an average pool, which by itself has no pool. An activation that falls is
// left to the pool: the backward wants its argument.
ConvPoolShape without_pool(const ConvPoolShape& s) {
  ConvPoolShape t = s;
  t.pool = t.pool_stride = {1, 1};
  t.pool_padding = {0, 0};
  t.out = t.conv;
  if (falls(t.activation)) t.activation = Activation::kNone;
  return t;
}

// A new [n, c, h, w] of x's memory format.
Tensor empty_map(const Tensor& x, int64_t n, int64_t c, Size2 size,
                 std::optional<ScalarType> dtype = std::nullopt) {
  if (!is_channels_last(x)) return empty_like_of(x, {n, c, size.h, size.w}, dtype);
  const Tensor nhwc = empty_like_of(x, {n, size.h, size.w, c}, dtype);
  return torch::stable::transpose(torch::stable::transpose(nhwc, 1, 3), 2, 3);
}

Map map_of(void* data, const Tensor& t) { return {data, t.stride(0), t.stride(1), t.stride(2), t.stride(3)}; }
Map output_map(const Tensor& t) { return map_of(output(t), t); }
Map input_map(const Tensor& t) { return map_of(const_cast<void*>(input(t)), t); }  // kernels only read it

void run_forward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 const ConvPoolResults& out, const Device& device) {
  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  conv_pool_forward(dtype_of(x), s, input_map(x), input(w), bias ? input(b) : nullptr, out, device.stream);
}

// y, and for a backward pass code and what is kept of the map: see operators.schema.
std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                           const Config& config, bool train) {
  const Call call = check_arguments(x, weight, bias, config);
  const ConvPoolShape& s = call.shape;
  const Device device(x);
  const Tensor y = empty_map(x, s.n, s.k, s.out), none = nothing(x);
  if (call.average) {
    const Tensor map = empty_map(x, s.n, s.k, s.conv);
    if (y.numel() > 0) {
      run_forward(without_pool(s), x, weight, bias, {output_map(map), {}, {}}, device);
      conv_pool_average(dtype_of(x), s, input_map(map), output_map(y), device.stream);
    }
    const bool keeps = train && s.activation != Activation::kNone;
    return {y, empty_like_of(x, {0}, ScalarType::Byte), keeps ? map : none};
  }
  const bool keeps = train && falls(s.activation);
  const Tensor code = train ? empty_map(x, s.n, s.k, s.out, ScalarType::Byte) : none;
  const Tensor kept = keeps ? empty_map(x, s.n, s.k, s.out) : none;
  if (y.numel() > 0)
    run_forward(s, x, weight, bias,
                {output_map(y), train ? output_map(code) : Map{}, keeps ? output_map(kept) : Map{}}, device);
  return {y, code, kept};
}

Tensor conv_pool2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Ints& stride,
                   const Ints& padding, const Ints& dilation, int64_t groups, Text activation, Text pool,
                   const Ints& pool_size, const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode,
                   Text precision) {
  return std::get<0>(forward(x, weight, bias,
                             {stride, padding, dilation, groups, activation.take(), pool.take(), pool_size,
                              pool_stride, pool_padding, ceil_mode, precision.take()},
                             false));
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_train(const Tensor& x, const Tensor& weight,
                                                     const OptionalTensor& bias, const Ints& stride,
                                                     const Ints& padding, const Ints& dilation,
                                                     int64_t groups, Text activation, Text pool,
                                                     const Ints& pool_size, const Ints& pool_stride,
                                                     const Ints& pool_padding, bool ceil_mode,
                                                     Text precision) {
  return forward(x, weight, bias,
                 {stride, padding, dilation, groups, activation.take(), pool.take(), pool_size, pool_stride,
                  pool_padding, ceil_mode, precision.take()},
                 true);
}

// Checks what a backward call gets beside the operands of the forward call.
void check_backward(const Call& call, const Tensor& grad_y, const Tensor& x, const Tensor& code,
                    const OptionalTensor& kept) {
  const ConvPoolShape& s = call.shape;
  check_like("grad_y", grad_y, "x", x);
  check_shape("grad_y", grad_y, {s.n, s.k, s.out.h, s.out.w});
  check(code.scalar_type() == ScalarType::Byte, "code: expected dtype uint8");
  check(code.device() == x.device(), "code and x must be on the same device");
  if (!call.average) check_shape("code", code, {s.n, s.k, s.out.h, s.out.w});
  if (!call.has_activation()) return;
  check(kept.has_value(), "kept: expected a tensor for this activation, got none");
  check_like("kept", *kept, "x", x);
  const Size2 size = call.average ? s.conv : s.out;
  check_shape("kept", *kept, {s.n, s.k, size.h, size.w});
}

// The gradient of what the activation is applied to: of the map where the pool is an average, of the winners
// elsewhere.
Tensor gradient_of_map(const Call& call, const Tensor& grad_y, const Tensor& x, const OptionalTensor& kept,
                       const Device& device) {
  const ConvPoolShape& s = call.shape;
  if (!call.average && !call.has_activation()) return grad_y;
  const Tensor grad = empty_map(x, s.n, s.k, call.average ? s.conv : s.out);
  const Map kept_map = call.has_activation() ? input_map(*kept) : Map{};
  if (grad.numel() > 0)
    (call.average ? conv_pool_spread : conv_pool_activation_gradient)(
        dtype_of(x), s, input_map(grad_y), kept_map, output_map(grad), device.stream);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& code_of_y, const OptionalTensor& kept, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, Text activation, Text pool, const Ints& pool_size,
    const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode, bool need_x, bool need_weight,
    bool need_bias) {
  const Call call = check_arguments(x, weight, bias,
                                    {stride, padding, dilation, groups, activation.take(), pool.take(),
                                     pool_size, pool_stride, pool_padding, ceil_mode});
  check_backward(call, grad_y, x, code_of_y, kept);
  const Device device(x);
  const DType dtype = dtype_of(x);
  const ConvPoolShape s = call.average ? without_pool(call.shape) : call.shape;
  const Tensor grad = gradient_of_map(call, grad_y, x, kept, device);
  // Every position of the map of an average pool has a gradient: a window of one position, which won. One
  // zero is the code of them all.
  const Tensor zero = torch::stable::new_zeros(x, {1}, ScalarType::Byte);
  const Map code = call.average ? Map{const_cast<void*>(input(zero)), 0, 0, 0, 0} : input_map(code_of_y);

  Tensor grad_x = nothing(x);
  if (need_x) {
    grad_x = empty_map(x, s.n, s.c, s.in);
    const Tensor w = dense(weight);
    if (grad_x.numel() > 0)
      conv_pool_grad_x(dtype, s, input_map(grad), code, input(w), output_map(grad_x), device.stream);
  }
  OptionalTensor grad_weight, grad_bias;
  if (need_weight) grad_weight = empty_like_of(weight, {s.k, s.c / s.groups, s.kernel.h, s.kernel.w});
  if (need_bias && bias) grad_bias = empty_like_of(weight, {s.k});
  if ((grad_weight || grad_bias) && s.k > 0) {
    const Tensor workspace = empty_like_of(x, {conv_pool_grad_weight_workspace(s)}, accumulator_type(x));
    conv_pool_grad_weight(dtype, s, input_map(grad), code, input_map(x), output(workspace),
                          output(grad_weight), output(grad_bias), device.stream);
  }
  return {grad_x, grad_weight.value_or(nothing(x)), grad_bias.value_or(nothing(x))};
}

}  // namespace
}  // namespace cnnrnn::cuda

STABLE_TORCH_LIBRARY_IMPL(CNNRNN_OPERATORS, CNNRNN_DISPATCH_KEY, library) {
  library.impl("conv_pool2d", TORCH_BOX(&cnnrnn::cuda::conv_pool2d));
  library.impl("conv_pool2d_train", TORCH_BOX(&cnnrnn::cuda::conv_pool2d_train));
  library.impl("conv_pool2d_backward", TORCH_BOX(&cnnrnn::cuda::conv_pool2d_backward));
}
