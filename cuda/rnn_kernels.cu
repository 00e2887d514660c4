// Entry points of the recurrent kernels: element type and schedule are chosen here.

#include "lstm_cell.cuh"
#include "lstm_resident.cuh"
#include "lstm_step.cuh"

namespace cnnrnn::cuda {
namespace {

template <typename T>
constexpr int kWideRows = sizeof(T) == 8 ? 2 : 4;  // of a thread; more would spill

}  // namespace

void lstm_layer_forward(DType dtype, const LstmForward& p, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (try_resident<T, 1, true>(p, stream) || try_resident<T, kClusterBlocks, true>(p, stream)) return;
    (p.shape.batch <= 4 ? step_forward<T, 1> : step_forward<T, kWideRows<T>>)(p, stream);
  });
}

void lstm_layer_backward(DType dtype, const LstmBackward& p, void* stream) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (try_resident<T, 1, false>(p, stream) || try_resident<T, kClusterBlocks, false>(p, stream)) return;
    (p.shape.batch <= 4 ? step_backward<T, 1> : step_backward<T, kWideRows<T>>)(p, stream);
  });
}

void lstm_cell_step_forward(DType dtype, const LstmCellForward& p, void* stream) {
  with_type(dtype, [&](auto zero) {
    launch(lstm_cell_forward_kernel<decltype(zero)>, cell_grid(p.batch, p.hidden), kCellThreads, 0, stream,
           p);
  });
}

void lstm_cell_step_backward(DType dtype, const LstmCellBackward& p, void* stream) {
  with_type(dtype, [&](auto zero) {
    launch(lstm_cell_backward_kernel<decltype(zero)>, cell_grid(p.batch, p.hidden), kCellThreads, 0, stream,
           p);
  });
}

}  // namespace cnnrnn::cuda
