// conv_pool on the CPU: check -> allocate -> pack -> call the kernels in parallel.

#include "conv_pool_arguments.h"
#include "conv_pool_average.h"
#include "conv_pool_half.h"
#include "conv_pool_tiles_grad.h"
#include "conv_pool_winograd.h"

namespace cnnrnn {
namespace {

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

// What computes a call in float32; null: the direct kernels.
const PanelForward<float>* panel_kernel(const ConvPoolShape& s, bool high) {
  if (!winograd_pays(s)) return columns_pay(s) ? &tiles()->columns : tiles_pay(s) ? &tiles()->f32 : nullptr;
  const bool coarse = high && coarse_winograd_pays(s);
  if (!coarse && too_small_for_winograd(s) && tiles_serve(s)) return &tiles()->f32;
  if (tiles()) return coarse ? &tiles()->winograd_of_4 : &tiles()->winograd_of_2;
  const auto& winograd = kernels().winograd;
  return coarse ? &winograd.of_4 : &winograd.of_2;
}

template <typename T>
void run_forward(const ConvPoolShape& s, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                 bool high, const Outputs& out) {
  if constexpr (std::is_same_v<T, float>) {
    if (const auto* kernel = panel_kernel(s, high))
      return run_panels<float>(
          *kernel, s, x, weight, false, data<float>(get(bias)), out,
          [&](int64_t from, int64_t to) { run_direct<float>(s, x, weight, bias, out, from, to); });
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
  T* weights = grad_weight ? mutable_data<T>(*grad_weight) : nullptr;
  T* biases = grad_bias ? mutable_data<T>(*grad_bias) : nullptr;
  in_slices(x, s.outputs, 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.weight_reduce(s, data<T>(partials), slices, weights, biases, begin, end);
  });
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

struct Results {
  Tensor y;
  OptionalTensor code, kept;  // for a backward pass, where there are any: see operators.schema
};

Results empty_results(const Call& call, const Tensor& x, bool train) {
  const ConvPoolShape& s = call.shape;
  const auto image = [&](ScalarType dtype) { return empty_image(x, s, s.outputs, s.pooled, dtype); };
  Results r{image(x.scalar_type()), std::nullopt, std::nullopt};
  if (train && !call.average) {
    r.code = image(ScalarType::Byte);
    if (!call.of_output()) r.kept = image(x.scalar_type());
  }
  return r;
}

Results forward(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias_any,
                const Config& config, bool train);

// bfloat16: on tile registers, or by way of float32.
Results forward_half(const Call& call, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                     const Config& config, bool train) {
  const ConvPoolShape& s = call.shape;
  const auto by_float = [&] {
    Results r = forward(widened(x), widened(weight), widened(bias), config, train);
    return Results{rounded(r.y), r.code, rounded(r.kept)};
  };
  const bool by_columns = columns_pay(s);
  if (call.average || !(by_columns || tiles_serve(s))) return by_float();
  const Results r = empty_results(call, x, train);
  const OptionalTensor shift = widened(bias);
  const auto& kernel = by_columns ? tiles()->columns_bf16 : tiles()->bf16;
  std::optional<Results> again;
  run_panels<uint16_t>(kernel, s, x, weight, false, data<float>(get(shift)), {&r.y, get(r.code), get(r.kept)},
                       [&](int64_t from, int64_t to) {
                         if (!again) again = by_float();
                         copy_images(again->y, r.y, from, to);
                         if (r.code) copy_images(*again->code, *r.code, from, to);
                         if (r.kept) copy_images(*again->kept, *r.kept, from, to);
                       });
  return r;
}

Results forward(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& bias_any,
                const Config& config, bool train) {
  const Call call = check_arguments(x_any, weight_any, bias_any, config);
  const ConvPoolShape& s = call.shape;
  const Tensor x = in_layout(x_any, s.channels_last), weight = in_layout(weight_any, false);
  OptionalTensor bias;
  if (bias_any) bias = dense(*bias_any);
  if (is_half(x)) return forward_half(call, x, weight, bias, config, train);
  Results r = empty_results(call, x, train);
  OptionalTensor map;
  if (call.average) map = empty_image(x, s, s.outputs, s.conv, x.scalar_type());
  const auto run = x.scalar_type() == ScalarType::Float ? run_any_forward<float> : run_any_forward<double>;
  run(call, x, weight, bias, get(map), {&r.y, get(r.code), get(r.kept)});
  if (train && call.activation != kNoActivation && map) r.kept = map;
  return r;
}

Tensor conv_pool2d(Tensor x, Tensor weight, OptionalTensor bias, Ints stride, Ints padding, Ints dilation,
                   int64_t groups, Text activation, Text pool, Ints pool_size, Ints pool_stride,
                   Ints pool_padding, bool ceil_mode, Text precision) {
  return forward(x, weight, bias,
                 {stride, padding, dilation, groups, activation.take(), pool.take(), pool_size, pool_stride,
                  pool_padding, ceil_mode, precision.take()},
                 false)
      .y;
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

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x_any,
                                            const Tensor& weight_any, const OptionalTensor& bias,
                                            const Tensor& code_any, const OptionalTensor& kept_any,
                                            const Config& config, bool need_x, bool need_weight,
                                            bool need_bias) {
  const Call call = check_arguments(x_any, weight_any, bias, config);
  check_backward(call, grad_y, x_any, code_any, kept_any);
  if (is_half(x_any)) {
    const bool last = call.shape.channels_last;
    const auto wide = [&](const Tensor& t) { return widened(in_layout(t, last && t.dim() == 4)); };
    const auto [x, weight, b] = backward(wide(grad_y), wide(x_any), widened(in_layout(weight_any, false)),
                                         bias ? OptionalTensor(widened(dense(*bias))) : bias, code_any,
                                         kept_any ? OptionalTensor(wide(*kept_any)) : kept_any, config,
                                         need_x, need_weight, need_bias);
    return {rounded(x), rounded(weight), rounded(b)};
  }
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
  const bool need_sums = need_weight || need_bias;
  const bool input_on_tiles = single && need_x && tiles_input_pays(s);
  const bool weight_on_tiles = single && need_sums && tiles_weight_pays(s);
  const bool dense_input = single && need_x && !input_on_tiles && winograd_input_pays(s, tiles() != nullptr);
  const bool dense_weight = single && need_sums && !weight_on_tiles && winograd_weight_pays(s);
  const bool every_alive = s.positions() == 1 && (!s.relu || call.average);
  const auto outputs = [&] {
    return OutputGradient{data<float>(grad), every_alive ? nullptr : data<uint8_t>(code)};
  };
  const Tensor map = !dense_input && !dense_weight ? none
                     : every_alive                 ? grad
                                                   : unpooled(kernels().winograd, grad, code, s);
  if (need_x) {
    const Tensor weight = in_layout(weight_any, false);
    grad_x = empty_image(grad, s, s.channels, s.input, grad.scalar_type());
    bool done = input_on_tiles && run_tiles_input(s, outputs(), weight, grad_x);
    if (dense_input) {
      const auto* kernel = panel_kernel(input_gradient_shape(s), false);
      run_dense_input(*kernel, s, map, weight, grad_x, run_direct<float>);
      done = true;
    }
    const auto run = single ? run_input_gradient<float> : run_input_gradient<double>;
    if (!done) run(s, grad, weight, code, grad_x);
  }
  if (need_sums) {
    const Tensor x = in_layout(x_any, s.channels_last);
    if (need_weight)
      grad_weight = empty_like_of(grad, {s.outputs, s.group_channels(), s.kernel.h, s.kernel.w});
    if (need_bias) grad_bias = empty_like_of(grad, {s.outputs});
    Tensor* const of_weight = need_weight ? &grad_weight : nullptr;
    Tensor* const of_bias = need_bias ? &grad_bias : nullptr;
    const bool done =
        (weight_on_tiles && run_tiles_weight(s, outputs(), x, of_weight, of_bias)) ||
        (dense_weight && run_winograd_weight(kernels().winograd, s, map, x, of_weight, of_bias));
    const auto run = single ? run_weight_gradient<float> : run_weight_gradient<double>;
    if (!done) run(s, grad, x, code, of_weight, of_bias);
  }
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> conv_pool2d_backward(Tensor grad_y, Tensor x, Tensor weight,
                                                        OptionalTensor bias, Tensor code, OptionalTensor kept,
                                                        Ints stride, Ints padding, Ints dilation,
                                                        int64_t groups, Text activation, Text pool,
                                                        Ints pool_size, Ints pool_stride, Ints pool_padding,
                                                        bool ceil_mode, bool need_x, bool need_weight,
                                                        bool need_bias, Text precision) {
  return backward(grad_y, x, weight, bias, code, kept,
                  {stride, padding, dilation, groups, activation.take(), pool.take(), pool_size, pool_stride,
                   pool_padding, ceil_mode, precision.take()},
                  need_x, need_weight, need_bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cnnrnn_ext, CPU, library) {
  library.impl("conv_pool2d", TORCH_BOX(&conv_pool2d));
  library.impl("conv_pool2d_train", TORCH_BOX(&conv_pool2d_train));
  library.impl("conv_pool2d_backward", TORCH_BOX(&conv_pool2d_backward));
}

}  // namespace cnnrnn
