// One step after both products: gates and states, a thread for each (row, unit).
#pragma once

#include "rnn_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kCellThreads = 128;

template <typename Cell, typename T>
__global__ void __launch_bounds__(kCellThreads) rnn_cell_forward(RnnCellForward p) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kCellThreads + threadIdx.x;
  if (index >= p.batch * p.hidden) return;
  const int64_t row = index / p.hidden;
  const int unit = static_cast<int>(index % p.hidden);
  const int64_t at = row * Cell::kGates * p.hidden + unit;
  Values<A, Cell::kParts> a{};
  add_input<Cell>(a, load_values<Cell::kGates, A, T>(p.gates_x, at, p.hidden));
  add_state<Cell>(a, load_values<Cell::kGates, A, T>(p.gates_h, at, p.hidden));
  add_biases<Cell, A, T>(a, p.bias_ih, p.bias_hh, unit, p.hidden);
  Values<A, Cell::kKept> kept{};
  const State<A> state =
      Cell::forward(a, State<A>{load_or_zero<A, T>(p.h, index), load_or_zero<A, T>(p.c, index)}, kept);
  if (p.h_1) store<T>(state.h, p.h_1, index);
  if constexpr (Cell::kHasC)
    if (p.c_1) store<T>(state.c, p.c_1, index);
  if constexpr (Cell::kKept > 0)
    if (p.reserve)
      store_values<Cell::kKept, T>(kept, p.reserve, row * Cell::kKept * p.hidden + unit, p.hidden);
}

template <typename Cell, typename T>
__global__ void __launch_bounds__(kCellThreads) rnn_cell_backward(RnnCellBackward p) {
  using A = Accumulator<T>;
  const int64_t index = int64_t(blockIdx.x) * kCellThreads + threadIdx.x;
  if (index >= int64_t(p.batch) * p.hidden) return;
  const int64_t row = index / p.hidden, unit = index % p.hidden;
  const auto kept = load_values<Cell::kKept, A, T>(p.reserve, row * Cell::kKept * p.hidden + unit, p.hidden);
  const auto state = [&](const void* h, const void* c) {
    return State<A>{load_or_zero<A, T>(h, index), Cell::kHasC ? load_or_zero<A, T>(c, index) : A(0)};
  };
  Values<A, Cell::kParts> d;
  const State<A> direct =
      Cell::backward(kept, state(p.h, p.c), state(p.h_1, p.c_1), state(p.grad_h_1, p.grad_c_1), d);
  store_values<Cell::kParts, T>(d, p.grad_parts, row * Cell::kParts * p.hidden + unit, p.hidden);
  store<T>(direct.h, p.grad_h, index);
  if constexpr (Cell::kHasC) store<T>(direct.c, p.grad_c, index);
}

inline dim3 cell_grid(int64_t batch, int hidden) {
  return dim3(grid_size(ceil_div(batch * hidden, int64_t(kCellThreads))));
}

}  // namespace
}  // namespace cnnrnn::cuda
