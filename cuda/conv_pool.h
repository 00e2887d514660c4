// The CUDA kernels of conv_pool as the host file sees them: raw pointers, sizes, a stream. No torch.
// Every launcher enqueues on `stream` and returns at once; errors throw std::runtime_error.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace cnnrnn::cuda {

struct Size2 {
  int h, w;
};

// y [n, k, out] = max_pool(activation(conv(x [n, c, in], weight [k, c/groups, kernel]) + bias [k]))
struct ConvPoolShape {
  int n, c, k, groups;
  Size2 in, kernel, stride, padding, dilation;
  Size2 conv;  // size of the map between convolution and pooling, which is never stored
  Size2 pool, pool_stride, pool_padding;
  Size2 out;
  bool relu;
};

// A tensor [N, C, H, W] of any strides (in elements).
struct Map {
  void* data;
  int64_t n, c, h, w;
};

constexpr uint8_t kNoGradient = 255;  // a code: no position of this window has a gradient

// code.data may be null: nothing is kept for a backward.
void conv_pool_forward(DType, const ConvPoolShape&, Map x, const void* weight, const void* bias, Map y,
                       Map code, void* stream);

// grad_x is written whole.
void conv_pool_grad_x(DType, const ConvPoolShape&, Map grad_y, Map code, const void* weight, Map grad_x,
                      void* stream);

// Elements (of double for kDouble, else of float) of the workspace of conv_pool_grad_weight.
int64_t conv_pool_grad_weight_workspace(const ConvPoolShape&);

// grad_weight [k, c/groups, kernel] and grad_bias [k]; either may be null.
void conv_pool_grad_weight(DType, const ConvPoolShape&, Map grad_y, Map code, Map x, void* workspace,
                           void* grad_weight, void* grad_bias, void* stream);

}  // namespace cnnrnn::cuda
