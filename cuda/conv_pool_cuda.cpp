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
  bool high;  // of precision: float32 may be multiplied as TF32

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
  Call call{{}, c.pool == "avg", c.precision == "high"};
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

bool on_tensor_cores(const ConvPoolShape& s, DType dtype, bool tf32) {
  return (dtype == DType::kHalf || dtype == DType::kBFloat16 || (dtype == DType::kFloat && tf32)) &&
         conv_pool_tensor_covers(s);
}

Tensor bytes_like(const Tensor& x, int64_t bytes) { return empty_like_of(x, {bytes}, ScalarType::Byte); }

// A map with its channels in units: that of a tensor itself, or of a packed copy.
struct Units {
  Map map;
  std::optional<Tensor> copy;
};
Units in_units(const Tensor& like, int element_bytes, const Map& map, int n, int c, int groups, Size2 size,
               int of_unit, const Device& device) {
  const int64_t padded = (c / groups + of_unit - 1) / of_unit * of_unit * groups;
  if (padded == c && conv_pool_has_units(element_bytes, map, of_unit)) return {map, std::nullopt};
  const Tensor copy = bytes_like(like, padded * n * size.h * size.w * element_bytes);
  return {conv_pool_pack_units(element_bytes, map, n, c, groups, size, of_unit, output(copy), device.stream),
          copy};
}

// A batch of rows is one image: sequences, and what else has a height of 1 from x to y.
bool is_of_rows(const ConvPoolShape& s) {
  return s.in.h == 1 && s.kernel.h == 1 && s.padding.h == 0 && s.pool.h == 1 && s.pool_padding.h == 0;
}
ConvPoolShape rows_as_image(ConvPoolShape s) {
  if (!is_of_rows(s)) return s;
  s.in.h = s.conv.h = s.out.h = s.n;
  s.n = s.stride.h = s.dilation.h = s.pool_stride.h = 1;
  return s;
}
Map rows_as_image(const ConvPoolShape& s, const Map& map) {
  return is_of_rows(s) ? Map{map.data, 0, map.c, map.n, map.w} : map;
}

int bytes_of(DType dtype) { return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2; }

void run_forward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 bool tf32, const ConvPoolResults& out, const Device& device) {
  const Tensor w = dense(weight), b = bias ? dense(*bias) : w;
  const void* const of_bias = bias ? input(b) : nullptr;
  const DType dtype = dtype_of(x);
  const ConvPoolShape t = rows_as_image(s);
  const ConvPoolResults of_rows = {rows_as_image(s, out.y), rows_as_image(s, out.code),
                                   rows_as_image(s, out.kept)};
  Units units{rows_as_image(s, input_map(x)), std::nullopt};
  if (!on_tensor_cores(s, dtype, tf32))
    return conv_pool_forward(dtype, t, units.map, input(w), of_bias, of_rows, device.stream);
  if (conv_pool_tensor_reads_units(dtype, t))
    units = in_units(x, bytes_of(dtype), units.map, t.n, t.c, t.groups, t.in, 16 / bytes_of(dtype), device);
  const Tensor workspace = bytes_like(x, conv_pool_tensor_forward_workspace(dtype, t));
  conv_pool_tensor_forward(dtype, t, units.map, input(w), of_bias, of_rows, output(workspace), device.stream);
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
      run_forward(without_pool(s), x, weight, bias, call.high, {output_map(map), {}, {}}, device);
      conv_pool_average(dtype_of(x), s, input_map(map), output_map(y), device.stream);
    }
    const bool keeps = train && s.activation != Activation::kNone;
    return {y, empty_like_of(x, {0}, ScalarType::Byte), keeps ? map : none};
  }
  const bool keeps = train && falls(s.activation);
  const Tensor code = train ? empty_map(x, s.n, s.k, s.out, ScalarType::Byte) : none;
  const Tensor kept = keeps ? empty_map(x, s.n, s.k, s.out) : none;
  if (y.numel() > 0)
    run_forward(s, x, weight, bias, call.high,
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

// What a backward writes; null where nobody asked.
struct Gradients {
  Map x;
  void *weight, *bias;
  bool any_of_weights() const { return weight != nullptr || bias != nullptr; }
};

void run_backward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, Map grad, Map code,
                  const Gradients& gradients, const Device& device) {
  const DType dtype = dtype_of(x);
  if (gradients.x.data) conv_pool_grad_x(dtype, s, grad, code, input(weight), gradients.x, device.stream);
  if (!gradients.any_of_weights() || s.k == 0) return;
  const Tensor workspace = empty_like_of(x, {conv_pool_grad_weight_workspace(s)}, accumulator_type(x));
  conv_pool_grad_weight(dtype, s, grad, code, input_map(x), output(workspace), gradients.weight,
                        gradients.bias, device.stream);
}

void run_tensor_backward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, Map grad, Map code,
                         const Gradients& gradients, const Device& device) {
  const ConvPoolShape t = rows_as_image(s);
  const DType dtype = dtype_of(x);
  const int bytes = bytes_of(dtype), of_unit = 16 / bytes;
  const Units grads = in_units(x, bytes, rows_as_image(s, grad), t.n, t.k, t.groups, t.out, of_unit, device);
  const Units codes = in_units(x, 1, rows_as_image(s, code), t.n, t.k, t.groups, t.out, of_unit, device);
  if (gradients.x.data) {
    const Tensor workspace = bytes_like(x, conv_pool_tensor_grad_x_workspace(dtype, t));
    conv_pool_tensor_grad_x(dtype, t, grads.map, codes.map, input(weight), rows_as_image(s, gradients.x),
                            output(workspace), device.stream);
  }
  if (!gradients.any_of_weights()) return;
  Units pixels{rows_as_image(s, input_map(x)), std::nullopt};
  if (conv_pool_tensor_grad_weight_reads_units(t))
    pixels = in_units(x, bytes, pixels.map, t.n, t.c, t.groups, t.in, of_unit, device);
  const Tensor workspace =
      empty_like_of(x, {conv_pool_tensor_grad_weight_workspace(dtype, t)}, ScalarType::Float);
  conv_pool_tensor_grad_weight(dtype, t, grads.map, codes.map, pixels.map, output(workspace),
                               gradients.weight, gradients.bias, device.stream);
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& code_of_y, const OptionalTensor& kept, const Ints& stride, const Ints& padding,
    const Ints& dilation, int64_t groups, Text activation, Text pool, const Ints& pool_size,
    const Ints& pool_stride, const Ints& pool_padding, bool ceil_mode, bool need_x, bool need_weight,
    bool need_bias, Text precision) {
  const Call call = check_arguments(x, weight, bias,
                                    {stride, padding, dilation, groups, activation.take(), pool.take(),
                                     pool_size, pool_stride, pool_padding, ceil_mode, precision.take()});
  check_backward(call, grad_y, x, code_of_y, kept);
  const Device device(x);
  const DType dtype = dtype_of(x);
  const ConvPoolShape s = call.average ? without_pool(call.shape) : call.shape;
  const Tensor grad = gradient_of_map(call, grad_y, x, kept, device);
  // Every position of the map of an average pool has a gradient: a window of one position, which won. One
  // zero is the code of them all.
  const Tensor zero = torch::stable::new_zeros(x, {1}, ScalarType::Byte);
  const Map code = call.average ? Map{const_cast<void*>(input(zero)), 0, 0, 0, 0} : input_map(code_of_y);

  const bool need_bias_too = need_bias && bias;
  Tensor grad_x = nothing(x);
  OptionalTensor grad_weight, grad_bias;
  if (need_x) grad_x = empty_map(x, s.n, s.c, s.in);
  if (need_weight) grad_weight = empty_like_of(weight, {s.k, s.c / s.groups, s.kernel.h, s.kernel.w});
  if (need_bias_too) grad_bias = empty_like_of(weight, {s.k});
  const Tensor w = dense(weight);
  const Gradients gradients{need_x && grad_x.numel() > 0 ? output_map(grad_x) : Map{}, output(grad_weight),
                            output(grad_bias)};
  (on_tensor_cores(s, dtype, call.high) && grad.numel() > 0 ? run_tensor_backward : run_backward)(
      s, x, w, input_map(grad), code, gradients, device);
  return {grad_x, grad_weight.value_or(nothing(x)), grad_bias.value_or(nothing(x))};
}

}  // namespace
}  // namespace cnnrnn::cuda

STABLE_TORCH_LIBRARY_IMPL(CNNRNN_OPERATORS, CNNRNN_DISPATCH_KEY, library) {
  library.impl("conv_pool2d", TORCH_BOX(&cnnrnn::cuda::conv_pool2d));
  library.impl("conv_pool2d_train", TORCH_BOX(&cnnrnn::cuda::conv_pool2d_train));
  library.impl("conv_pool2d_backward", TORCH_BOX(&cnnrnn::cuda::conv_pool2d_backward));
}
