// The gathered kernels of conv_pool on tensor cores, any convolution and pool, as their entry points
// (conv_pool_tensor*_kernels.cu) see them. Signatures as in conv_pool.h; every type takes part in each.
#pragma once

#include "conv_pool.h"

namespace cnnrnn::cuda {

bool gather_forward_reads_units(DType, const ConvPoolShape&);
bool gather_grad_weight_reads_units(const ConvPoolShape&);

int64_t gather_forward_workspace(DType, const ConvPoolShape&);
void gather_forward(DType, const ConvPoolShape&, Map x, const void* weight, const void* bias,
                    const ConvPoolResults&, void* workspace, void* stream);

int64_t gather_grad_x_workspace(DType, const ConvPoolShape&);
void gather_grad_x(DType, const ConvPoolShape&, Map grad, Map code, const void* weight, Map grad_x,
                   void* workspace, void* stream);

int64_t gather_grad_weight_workspace(DType, const ConvPoolShape&);
void gather_grad_weight(DType, const ConvPoolShape&, Map grad, Map code, Map x, void* workspace,
                        void* grad_weight, void* grad_bias, void* stream);

}  // namespace cnnrnn::cuda
