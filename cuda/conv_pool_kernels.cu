// Entry points of the conv_pool kernels: element type and specialisation are chosen here.

#include "conv_pool_backward.cuh"

namespace cnnrnn::cuda {

void conv_pool_forward(DType dtype, const ConvPoolShape& s, Map x, const void* weight, const void* bias,
                       Map y, Map code, void* stream) {
  with_type(dtype, [&](auto zero) { forward<decltype(zero)>(s, x, weight, bias, y, code, stream); });
}

void conv_pool_grad_x(DType dtype, const ConvPoolShape& s, Map grad_y, Map code, const void* weight, Map grad,
                      void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    (is_3x3_pool2(s) ? grad_x<T, true> : grad_x<T, false>)(s, grad_y, code, weight, grad, stream);
  });
}

int64_t conv_pool_grad_weight_workspace(const ConvPoolShape& s) {
  return int64_t(slices_of(s)) * s.k * (elements_of(s) + 1);
}

void conv_pool_grad_weight(DType dtype, const ConvPoolShape& s, Map grad_y, Map code, Map x, void* workspace,
                           void* grad, void* grad_bias, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto run = is_3x3_pool2(s) ? grad_weight<T, true> : grad_weight<T, false>;
    run(s, grad_y, code, x, workspace, grad, grad_bias, stream);
  });
}

}  // namespace cnnrnn::cuda
