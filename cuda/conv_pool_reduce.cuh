// The last step of a gradient of the weights: partial sums of slices, added in their order.
#pragma once

#include "primitives.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kReduceThreads = 128;

// partial [slices][k_all][elements + 1]: the element after the last is the bias's. Either result may be null.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    conv_pool_reduce_slices(const Accumulator<T>* partial, int slices, int k_all, int elements,
                            T* grad_weight, T* grad_bias) {
  const int64_t index = int64_t(blockIdx.x) * kReduceThreads + threadIdx.x,
                all = int64_t(k_all) * (elements + 1);
  if (index >= all) return;
  Accumulator<T> sum = 0;
  for (int slice = 0; slice < slices; ++slice) sum += partial[slice * all + index];
  const int64_t k = index / (elements + 1), element = index % (elements + 1);
  if (element < elements && grad_weight) grad_weight[k * elements + element] = narrow_to<T>(sum);
  if (element == elements && grad_bias) grad_bias[k] = narrow_to<T>(sum);
}

template <typename T>
void launch_reduce_slices(const Accumulator<T>* partial, int slices, int k_all, int elements,
                          void* grad_weight, void* grad_bias, void* stream) {
  const int64_t blocks = ceil_div(int64_t(k_all) * (elements + 1), int64_t(kReduceThreads));
  launch(conv_pool_reduce_slices<T>, dim3(grid_size(blocks)), kReduceThreads, 0, stream, partial, slices,
         k_all, elements, static_cast<T*>(grad_weight), static_cast<T*>(grad_bias));
}

}  // namespace
}  // namespace cnnrnn::cuda
