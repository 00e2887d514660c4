// One LSTM step after both products: gates and states, a thread for each (row, unit).
#pragma once

#include "lstm_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kCellThreads = 128;

template <typename T>
__global__ void __launch_bounds__(kCellThreads) lstm_cell_forward_kernel(LstmCellForward p) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kCellThreads + threadIdx.x;
  if (index >= int64_t(p.batch) * p.hidden) return;
  const int64_t row = index / p.hidden;
  const int unit = static_cast<int>(index % p.hidden);
  const int64_t at = row * 4 * p.hidden + unit;
  LstmGates<A> a{0, 0, 0, 0};
  add_gates<A, T>(a, p.gates_x, at, p.hidden);
  add_gates<A, T>(a, p.gates_h, at, p.hidden);
  add_gates<A, T>(a, p.bias_ih, unit, p.hidden);
  add_gates<A, T>(a, p.bias_hh, unit, p.hidden);
  const LstmGates<A> gates = lstm_activate<GateMath>(a);
  const LstmState<A> state = lstm_update<GateMath>(gates, load_or_zero<A, T>(p.c, index));
  store<T>(state.h, p.h_1, index);
  store<T>(state.c, p.c_1, index);
  if (p.reserve) store_gates<T>(gates, p.reserve, at, p.hidden);
}

template <typename T>
__global__ void __launch_bounds__(kCellThreads) lstm_cell_backward_kernel(LstmCellBackward p) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kCellThreads + threadIdx.x;
  if (index >= int64_t(p.batch) * p.hidden) return;
  const int64_t row = index / p.hidden;
  const int64_t at = row * 4 * p.hidden + index % p.hidden;
  LstmGates<A> gates{0, 0, 0, 0};
  add_gates<A, T>(gates, p.reserve, at, p.hidden);
  const LstmGradients<A> d =
      lstm_backward<GateMath>(gates, load_or_zero<A, T>(p.c_1, index), load_or_zero<A, T>(p.c, index),
                              load_or_zero<A, T>(p.grad_h_1, index), load_or_zero<A, T>(p.grad_c_1, index));
  store_gates<T>(d.a, p.grad_gates, at, p.hidden);
  store<T>(d.c_prev, p.grad_c, index);
}

inline dim3 cell_grid(int batch, int hidden) {
  return dim3(grid_size(ceil_div(int64_t(batch) * hidden, int64_t(kCellThreads))));
}

}  // namespace
}  // namespace cnnrnn::cuda
