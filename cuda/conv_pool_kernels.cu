// Entry points of the conv_pool kernels: element type and specialisation are chosen here.

#include "conv_pool_backward.cuh"
#include "conv_pool_pointwise.cuh"

namespace cnnrnn::cuda {

void conv_pool_forward(DType dtype, const ConvPoolShape& s, Map x, const void* weight, const void* bias,
                       const ConvPoolResults& out, void* stream) {
  with_type(dtype, [&](auto zero) { forward<decltype(zero)>(s, x, weight, bias, out, stream); });
}

void conv_pool_activation_gradient(DType dtype, const ConvPoolShape& s, Map grad_y, Map kept, Map grad,
                                   void* stream) {
  with_type(dtype, [&](auto zero) {
    launch(activation_gradient_kernel<decltype(zero)>, dim3(pointwise_blocks(s, s.out)), kPointwiseThreads, 0,
           stream, s, grad_y, kept, grad);
  });
}

void conv_pool_average(DType dtype, const ConvPoolShape& s, Map map, Map y, void* stream) {
  with_type(dtype, [&](auto zero) {
    launch(average_kernel<decltype(zero)>, dim3(pointwise_blocks(s, s.out)), kPointwiseThreads, 0, stream, s,
           map, y);
  });
}

void conv_pool_spread(DType dtype, const ConvPoolShape& s, Map grad_y, Map kept, Map grad_map, void* stream) {
  with_type(dtype, [&](auto zero) {
    launch(spread_kernel<decltype(zero)>, dim3(pointwise_blocks(s, s.conv)), kPointwiseThreads, 0, stream, s,
           grad_y, kept, grad_map);
  });
}

void conv_pool_grad_x(DType dtype, const ConvPoolShape& s, Map grad, Map code, const void* weight,
                      Map grad_of_x, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (is_3x3_pool2(s) ? grad_x<T, true> : grad_x<T, false>)(s, grad, code, weight, grad_of_x, stream);
  });
}

int64_t conv_pool_grad_weight_workspace(const ConvPoolShape& s) {
  return int64_t(slices_of(s)) * s.k * (elements_of(s) + 1);
}

void conv_pool_grad_weight(DType dtype, const ConvPoolShape& s, Map grad, Map code, Map x, void* workspace,
                           void* grad_of_weight, void* grad_bias, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = is_3x3_pool2(s) ? grad_weight<T, true> : grad_weight<T, false>;
    run(s, grad, code, x, workspace, grad_of_weight, grad_bias, stream);
  });
}

}  // namespace cnnrnn::cuda
