// One step of one unit of a batch row where the state goes from launch to launch through memory: what is left
// to do when the product with the recurrent weights is made.
#pragma once

#include "rnn_common.cuh"

namespace cnnrnn::cuda {
namespace {

// from_state: the state's gates without biases. Returns the new h; 0 where the row does not run.
template <typename Cell, typename T, typename A>
__device__ __forceinline__ A step_unit_forward(const RnnForward& p, int step, int direction, int n, int unit,
                                               const Values<A, Cell::kGates>& from_state) {
  const RnnShape& s = p.shape;
  const Moment now(s, direction, step, n);
  if (step == 0 && length_of(s, n) == 0)
    store_state<Cell, T>(s, load_state<Cell, A, T>(s, p.h_0, p.c_0, direction, n, unit), p.h_n, p.c_n,
                         direction, n, unit);
  if (!now.runs) return 0;
  Values<A, Cell::kParts> a{};
  add_gates_x<Cell, A, T>(a, p, direction, now.row, unit);
  add_biases<Cell, A, T>(a, p.bias_ih[direction], p.bias_hh[direction], unit, s.hidden);
  add_state<Cell>(a, from_state);
  const int64_t at = state_at(s, direction, n, unit);
  State<A> before = {0, 0};
  if (!now.cut) {
    if (now.first) {
      before = load_state<Cell, A, T>(s, p.h_0, p.c_0, direction, n, unit);
    } else {
      before.h = load_or_zero<A, T>(p.output, output_at(s, now.row_before, direction, unit));
      if constexpr (Cell::kHasC) before.c = static_cast<const A*>(p.carry_c)[at];
    }
  }
  Values<A, Cell::kKept> kept{};
  const State<A> state = Cell::forward(a, before, kept);
  if constexpr (Cell::kHasC) static_cast<A*>(p.carry_c)[at] = state.c;
  store_step<Cell, T>(p, state, kept, direction, now.row, unit);
  if (now.last) store_state<Cell, T>(s, state, p.h_n, p.c_n, direction, n, unit);
  return state.h;
}

// from_next: the gradient that comes from step + 1 through the product. With step = -1 the rest of the
// gradient of h_0 and c_0 is made. Returns the gradients of the state's gates that the step before gets.
template <typename Cell, typename T, typename A>
__device__ __forceinline__ Values<A, Cell::kGates> step_unit_backward(const RnnBackward& p, int step,
                                                                      int direction, int n, int unit,
                                                                      A from_next) {
  const RnnShape& s = p.shape;
  const int64_t at = state_at(s, direction, n, unit);
  A *carry_h = static_cast<A*>(p.carry_h) + at, *carry_c = static_cast<A*>(p.carry_c) + at;
  State<A> grad = {0, 0};
  if (step == s.steps - 1) {
    grad = load_state<Cell, A, T>(s, p.grad_h_n, p.grad_c_n, direction, n, unit);
  } else {
    grad.h = *carry_h;
    if constexpr (Cell::kHasC) grad.c = *carry_c;
  }
  grad.h += from_next;
  if (step < 0) {
    store_state<Cell, T>(s, grad, p.grad_h_0, p.grad_c_0, direction, n, unit);
    return {};
  }
  const Moment now(s, direction, step, n);
  Values<A, Cell::kParts> d{};
  if (now.runs)
    grad = step_gradients<Cell, A, T>(p, now, load_step<Cell, A, T>(p, now, direction, n, unit), direction,
                                      unit, grad, d);
  *carry_h = grad.h;
  if constexpr (Cell::kHasC) *carry_c = grad.c;
  return now.runs && !now.cut ? state_gates<Cell>(d) : Values<A, Cell::kGates>{};
}

}  // namespace
}  // namespace cnnrnn::cuda
