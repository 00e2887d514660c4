// The kernel table of conv_pool for the instruction set that this is compiled for.
#pragma once

#include "conv_pool_average.h"
#include "conv_pool_forward.h"
#include "conv_pool_grad_input.h"
#include "conv_pool_grad_weight.h"
#include "conv_pool_unpool.h"
#include "conv_pool_winograd.h"
#include "conv_pool_winograd_grad.h"
#include "isa.h"

namespace {

template <typename T>
constexpr cnnrnn::ConvPoolKernelsOf<T> conv_pool_kernels_of() {
  return {kActivations<T>,
          sizeof(kActivations<T>) / sizeof(kActivations<T>[0]),
          forward_packed_size<T>,
          forward_pack<T>,
          forward_units<T>,
          forward_scratch_bytes<T>,
          forward<T>,
          weight_partial_size<T>,
          weight_units<T>,
          weight_scratch_bytes<T>,
          weight_gradient<T>,
          weight_reduce<T>,
          input_packed_size<T>,
          input_pack<T>,
          input_units<T>,
          input_scratch_bytes<T>,
          input_gradient<T>,
          average_units,
          average_scratch_bytes<T>,
          average<T>,
          spread_units,
          spread<T>};
}

}  // namespace

namespace cnnrnn {
extern const ConvPoolKernels CNNRNN_TABLE(conv_pool);
const ConvPoolKernels CNNRNN_TABLE(conv_pool) = {
    conv_pool_kernels_of<float>(),
    conv_pool_kernels_of<double>(),
    {winograd_forward_of<2>(), winograd_forward_of<4>(), unpool, winograd_partial_size,
     winograd_grad_scratch_bytes, winograd_weight, winograd_weight_reduce}};
}  // namespace cnnrnn
