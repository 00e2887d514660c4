// The recurrent operators on CUDA: check, allocate, launch on the current stream. The products over all time
// steps at once are torch's matmul. Shapes: cnnrnn_ext/operators.schema. There are kernels for LSTM over
// whole sequences; the Python layer sends nothing else here.

#include <climits>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "rnn.h"

namespace cnnrnn::cuda {
namespace {

using Tensors = std::vector<Tensor>;
using torch::stable::matmul;

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor as_matrix(const Tensor& t) { return torch::stable::view(t, {t.size(0) * t.size(1), t.size(2)}); }

Tensor grad_of_bias(const Tensor& gates) { return torch::stable::sum(gates, std::vector<int64_t>{0}); }

void check_operand(const Tensor& x, const char* name, const Tensor& t, const std::vector<int64_t>& sizes) {
  check_like(name, t, "x", x);
  check_shape(name, t, sizes);
}

Tensor taken(const Tensor& x, const char* name, const Tensor& from, const std::vector<int64_t>& sizes) {
  check_operand(x, name, from, sizes);
  return dense(from);
}

OptionalTensor taken(const Tensor& x, const char* name, const OptionalTensor& from,
                     const std::vector<int64_t>& sizes) {
  return from ? OptionalTensor(taken(x, name, *from, sizes)) : std::nullopt;
}

Tensors taken(const Tensor& x, const char* name, const Tensors& from, size_t count,
              const std::vector<int64_t>& sizes) {
  check(from.size() == count, name, ": expected one tensor per direction (", count, "), got ", from.size());
  Tensors all;
  for (const Tensor& t : from) all.push_back(taken(x, name, t, sizes));
  return all;
}

int int_size(const char* name, const Tensor& t, int64_t d) {
  check(t.size(d) <= INT_MAX / 8, name, ": too large for the CUDA kernels: ", shape(t));
  return static_cast<int>(t.size(d));
}

void check_cell(const std::string& cell) {
  check(cell == "lstm", "cell: the CUDA kernels cover 'lstm', got '", cell, "'");
}

void check_biases(bool both_or_neither) {
  check(both_or_neither, "bias_ih and bias_hh: give both or neither");
}

int hidden_size(const Tensor& weight_hh) {
  check(weight_hh.dim() == 2, "weight_hh: expected shape [4*H, H], got ", shape(weight_hh));
  return int_size("weight_hh", weight_hh, 1);
}

// Operands that the CUDA kernels know only as absent.
struct Uncovered {
  const OptionalTensor &batch_sizes, &lengths, &reset;

  void check_absent() const {
    check(!batch_sizes, "batch_sizes: the CUDA kernels take none");
    check(!lengths, "lengths: the CUDA kernels take none");
    check(!reset, "reset: the CUDA kernels take none");
  }
};

// The operands of one sequence call, checked and contiguous.
struct Operands {
  Tensor x;
  OptionalTensor h_0, c_0;
  Tensors weight_ih, weight_hh, bias_ih, bias_hh;
  LstmShape shape;

  bool empty() const { return shape.steps == 0 || shape.batch == 0 || shape.hidden == 0; }
  const void* bias(const Tensors& biases, size_t direction) const {
    return direction < biases.size() ? input(biases[direction]) : nullptr;
  }
  Tensor packed() const {
    return empty_like_of(x, {shape.directions, shape.hidden, shape.hidden, 4}, accumulator_type(x));
  }
  Tensor carry() const { return empty_like_of(x, state_sizes(), accumulator_type(x)); }
  Tensor state() const { return empty_like_of(x, state_sizes()); }
  Tensor state(const OptionalTensor& like) const {  // a copy, or zeros
    return like ? torch::stable::clone(*like) : torch::stable::new_zeros(x, state_sizes());
  }
  std::vector<int64_t> state_sizes() const { return {shape.directions, shape.batch, shape.hidden}; }
  std::vector<int64_t> output_sizes() const {
    return {shape.steps, shape.batch, int64_t(shape.directions) * shape.hidden};
  }
  std::vector<int64_t> reserve_sizes() const {
    return {shape.directions, shape.steps, shape.batch, 4, shape.hidden};
  }
};

Operands operands(const std::string& cell, const Tensor& x, const OptionalTensor& h_0,
                  const OptionalTensor& c_0, const Tensors& weight_ih, const Tensors& weight_hh,
                  const Tensors& bias_ih, const Tensors& bias_hh, const Uncovered& uncovered) {
  check_cell(cell);
  uncovered.check_absent();
  check(x.dim() == 3, "x: expected shape [T, N, I], got ", shape(x));
  const size_t directions = weight_hh.size();
  check(directions == 1 || directions == 2, "weight_hh: expected 1 or 2 tensors, one per direction, got ",
        directions);
  check_biases(bias_ih.empty() == bias_hh.empty());
  dtype_of(x);
  Operands o{x, {}, {}, {}, {}, {}, {}, {}};
  const int64_t hidden = hidden_size(weight_hh[0]);
  o.shape = {int_size("x", x, 0), int_size("x", x, 1), static_cast<int>(hidden),
             static_cast<int>(directions)};
  o.x = dense(x);
  o.h_0 = taken(x, "h_0", h_0, o.state_sizes());
  o.c_0 = taken(x, "c_0", c_0, o.state_sizes());
  o.weight_ih = taken(x, "weight_ih", weight_ih, directions, {4 * hidden, x.size(2)});
  o.weight_hh = taken(x, "weight_hh", weight_hh, directions, {4 * hidden, hidden});
  o.bias_ih = taken(x, "bias_ih", bias_ih, bias_ih.empty() ? 0 : directions, {4 * hidden});
  o.bias_hh = taken(x, "bias_hh", bias_hh, bias_hh.empty() ? 0 : directions, {4 * hidden});
  return o;
}

struct Outputs {
  Tensor output, h_n, c_n;
};

Outputs forward(const Operands& o, const OptionalTensor& cells, const OptionalTensor& reserve) {
  const LstmShape s = o.shape;
  const Tensor all = empty_like_of(o.x, o.output_sizes());
  if (o.empty()) return {all, o.state(o.h_0), o.state(o.c_0)};
  const Outputs out{all, o.state(), o.state()};
  const Device device(o.x);
  const Tensor packed = o.packed(), carry = o.carry();
  LstmForward p{};
  p.shape = s;
  Tensors gates_x;  // alive until the kernels are enqueued
  for (int d = 0; d < s.directions; ++d) {
    gates_x.push_back(matmul(as_matrix(o.x), transposed(o.weight_ih[d])));
    p.gates_x[d] = input(gates_x[d]), p.weight_hh[d] = input(o.weight_hh[d]);
    p.bias_ih[d] = o.bias(o.bias_ih, d), p.bias_hh[d] = o.bias(o.bias_hh, d);
  }
  p.h_0 = input(o.h_0), p.c_0 = input(o.c_0);
  p.output = output(out.output), p.h_n = output(out.h_n), p.c_n = output(out.c_n);
  p.cells = output(cells), p.reserve = output(reserve);
  p.packed = output(packed), p.carry = output(carry);
  lstm_layer_forward(dtype_of(o.x), p, device.stream);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rnn(const std::string& cell, const Tensor& x, const OptionalTensor& h_0,
                                       const OptionalTensor& c_0, const Tensors& weight_ih,
                                       const Tensors& weight_hh, const Tensors& bias_ih,
                                       const Tensors& bias_hh, const OptionalTensor& batch_sizes,
                                       const OptionalTensor& lengths, const OptionalTensor& reset) {
  const Outputs out = forward(
      operands(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, {batch_sizes, lengths, reset}),
      std::nullopt, std::nullopt);
  return {out.output, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_train(
    const std::string& cell, const Tensor& x, const OptionalTensor& h_0, const OptionalTensor& c_0,
    const Tensors& weight_ih, const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
    const OptionalTensor& batch_sizes, const OptionalTensor& lengths, const OptionalTensor& reset) {
  const Operands o =
      operands(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, {batch_sizes, lengths, reset});
  const Tensor cells = empty_like_of(x, o.output_sizes()), reserve = empty_like_of(x, o.reserve_sizes());
  const Outputs out = forward(o, cells, reserve);
  return {out.output, out.h_n, out.c_n, cells, reserve};
}

// The state before each step [T*N, H]: the output one step earlier, and h_0 at the end where time begins.
Tensor states_before(const Operands& o, const Tensor& output, int direction) {
  const LstmShape s = o.shape;
  Tensor before = empty_like_of(o.x, {s.steps, s.batch, s.hidden});
  if (s.steps > 0) {
    Tensor first = torch::stable::select(before, 0, direction == 0 ? 0 : s.steps - 1);
    if (o.h_0)
      torch::stable::copy_(first, torch::stable::select(*o.h_0, 0, direction));
    else
      torch::stable::zero_(first);
    Tensor half = output;
    half = torch::stable::narrow(half, 2, int64_t(direction) * s.hidden, s.hidden);
    Tensor to = torch::stable::narrow(before, 0, direction == 0 ? 1 : 0, s.steps - 1);
    torch::stable::copy_(to, torch::stable::narrow(half, 0, direction == 0 ? 0 : 1, s.steps - 1));
  }
  return as_matrix(before);
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensors> rnn_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const OptionalTensor& grad_cells, const std::string& cell, const Tensor& x, const OptionalTensor& h_0,
    const OptionalTensor& c_0, const Tensors& weight_ih, const Tensors& weight_hh, const Tensors& bias_ih,
    const Tensors& bias_hh, const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
    const OptionalTensor& reset, const Tensor& output_seen, const Tensor& cells_seen,
    const Tensor& reserve_seen, bool need_x, bool need_state, bool need_weight, bool need_bias) {
  const Operands o =
      operands(cell, x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh, {batch_sizes, lengths, reset});
  const LstmShape s = o.shape;
  const OptionalTensor g_output = taken(x, "grad_output", grad_output, o.output_sizes());
  const OptionalTensor g_h = taken(x, "grad_h_n", grad_h_n, o.state_sizes());
  const OptionalTensor g_c = taken(x, "grad_c_n", grad_c_n, o.state_sizes());
  const OptionalTensor g_cells = taken(x, "grad_cells", grad_cells, o.output_sizes());
  const Tensor out = taken(x, "output", output_seen, o.output_sizes());
  const Tensor cells = taken(x, "cells", cells_seen, o.output_sizes());
  const Tensor reserve = taken(x, "reserve", reserve_seen, o.reserve_sizes());

  const Device device(x);
  Tensor grad_h_0 = o.state(), grad_c_0 = o.state();
  Tensors grad_gates;
  for (int d = 0; d < s.directions; ++d)
    grad_gates.push_back(empty_like_of(x, {s.steps, s.batch, 4 * int64_t(s.hidden)}));
  if (o.empty()) {
    grad_h_0 = o.state(g_h), grad_c_0 = o.state(g_c);
  } else {
    const Tensor packed = o.packed(), carry = o.carry();
    LstmBackward p{};
    p.shape = s;
    for (int d = 0; d < s.directions; ++d)
      p.weight_hh[d] = input(o.weight_hh[d]), p.grad_gates[d] = output(grad_gates[d]);
    p.grad_output = input(g_output), p.grad_h_n = input(g_h), p.grad_c_n = input(g_c);
    p.grad_cells = input(g_cells);
    p.c_0 = input(o.c_0), p.cells = input(cells), p.reserve = input(reserve);
    p.grad_h_0 = output(grad_h_0), p.grad_c_0 = output(grad_c_0);
    p.packed = output(packed), p.carry = output(carry);
    lstm_layer_backward(dtype_of(x), p, device.stream);
  }

  Tensor grad_x = nothing(x);
  Tensors grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh;
  for (int d = 0; d < s.directions; ++d) {
    const Tensor gates = as_matrix(grad_gates[d]);
    if (need_x) {
      const Tensor part = torch::stable::view(matmul(gates, o.weight_ih[d]), {s.steps, s.batch, x.size(2)});
      grad_x = d == 0 ? part : torch::stable::subtract(grad_x, part, -1.0);
    }
    if (need_weight) {
      grad_weight_ih.push_back(matmul(transposed(gates), as_matrix(o.x)));
      grad_weight_hh.push_back(matmul(transposed(gates), states_before(o, out, d)));
    }
    if (need_bias && !o.bias_ih.empty()) {  // both lists hold the same values, and share no memory
      grad_bias_ih.push_back(grad_of_bias(gates));
      grad_bias_hh.push_back(torch::stable::clone(grad_bias_ih.back()));
    }
  }
  if (!need_state) grad_h_0 = nothing(x), grad_c_0 = nothing(x);
  return {grad_x, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh};
}

struct CellOperands {
  Tensor x;
  OptionalTensor h, c;
  Tensor weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  int64_t batch, hidden;

  Tensor state() const { return empty_like_of(x, {batch, hidden}); }
};

CellOperands cell_operands(const std::string& cell, const Tensor& x, const OptionalTensor& h,
                           const OptionalTensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                           const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  check_cell(cell);
  check(x.dim() == 2, "x: expected shape [N, I], got ", shape(x));
  check_biases(bias_ih.has_value() == bias_hh.has_value());
  dtype_of(x);
  const int64_t batch = int_size("x", x, 0), hidden = hidden_size(weight_hh);
  return {dense(x),
          taken(x, "h", h, {batch, hidden}),
          taken(x, "c", c, {batch, hidden}),
          taken(x, "weight_ih", weight_ih, {4 * hidden, x.size(1)}),
          taken(x, "weight_hh", weight_hh, {4 * hidden, hidden}),
          taken(x, "bias_ih", bias_ih, {4 * hidden}),
          taken(x, "bias_hh", bias_hh, {4 * hidden}),
          batch,
          hidden};
}

std::tuple<Tensor, Tensor> cell_forward(const CellOperands& o, const OptionalTensor& reserve) {
  const Tensor h_1 = o.state(), c_1 = o.state();
  if (h_1.numel() == 0) return {h_1, c_1};
  const Device device(o.x);
  const Tensor gates_x = matmul(o.x, transposed(o.weight_ih));
  const OptionalTensor gates_h = o.h ? OptionalTensor(matmul(*o.h, transposed(o.weight_hh))) : std::nullopt;
  lstm_cell_step_forward(
      dtype_of(o.x),
      {static_cast<int>(o.batch), static_cast<int>(o.hidden), input(gates_x), input(gates_h),
       input(o.bias_ih), input(o.bias_hh), input(o.c), output(h_1), output(c_1), output(reserve)},
      device.stream);
  return {h_1, c_1};
}

std::tuple<Tensor, Tensor> rnn_cell(const std::string& cell, const Tensor& x, const OptionalTensor& h,
                                    const OptionalTensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                                    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  return cell_forward(cell_operands(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh), std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> rnn_cell_train(const std::string& cell, const Tensor& x,
                                                  const OptionalTensor& h, const OptionalTensor& c,
                                                  const Tensor& weight_ih, const Tensor& weight_hh,
                                                  const OptionalTensor& bias_ih,
                                                  const OptionalTensor& bias_hh) {
  const CellOperands o = cell_operands(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor reserve = empty_like_of(x, {o.batch, 4, o.hidden});
  const auto [h_1, c_1] = cell_forward(o, reserve);
  return {h_1, c_1, reserve};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_cell_backward(
    const OptionalTensor& grad_h_1, const OptionalTensor& grad_c_1, const std::string& cell, const Tensor& x,
    const OptionalTensor& h, const OptionalTensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const Tensor& h_1, const Tensor& c_1_seen,
    const Tensor& reserve_seen, bool need_x, bool need_state, bool need_weight, bool need_bias) {
  const CellOperands o = cell_operands(cell, x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const OptionalTensor g_h = taken(x, "grad_h_1", grad_h_1, {o.batch, o.hidden});
  const OptionalTensor g_c = taken(x, "grad_c_1", grad_c_1, {o.batch, o.hidden});
  check_operand(x, "h_1", h_1, {o.batch, o.hidden});  // an LSTM needs c_1 alone
  const Tensor c_1 = taken(x, "c_1", c_1_seen, {o.batch, o.hidden});
  const Tensor reserve = taken(x, "reserve", reserve_seen, {o.batch, 4, o.hidden});
  const Device device(x);
  const Tensor gates = empty_like_of(x, {o.batch, 4 * o.hidden}), grad_c = o.state();
  if (grad_c.numel() > 0)
    lstm_cell_step_backward(dtype_of(x),
                            {static_cast<int>(o.batch), static_cast<int>(o.hidden), input(g_h), input(g_c),
                             input(o.c), input(c_1), input(reserve), output(gates), output(grad_c)},
                            device.stream);
  Tensor grad_weight_hh = nothing(x), grad_bias_ih = nothing(x), grad_bias_hh = nothing(x);
  if (need_weight)
    grad_weight_hh =
        o.h ? matmul(transposed(gates), *o.h) : torch::stable::new_zeros(x, {4 * o.hidden, o.hidden});
  if (need_bias && o.bias_ih)  // the same values, and no memory shared
    grad_bias_ih = grad_of_bias(gates), grad_bias_hh = torch::stable::clone(grad_bias_ih);
  return {need_x ? matmul(gates, o.weight_ih) : nothing(x),
          need_state ? matmul(gates, o.weight_hh) : nothing(x),
          need_state ? grad_c : nothing(x),
          need_weight ? matmul(transposed(gates), o.x) : nothing(x),
          grad_weight_hh,
          grad_bias_ih,
          grad_bias_hh};
}

}  // namespace
}  // namespace cnnrnn::cuda

STABLE_TORCH_LIBRARY_IMPL(CNNRNN_OPERATORS, CNNRNN_DISPATCH_KEY, library) {
  namespace ops = cnnrnn::cuda;
  library.impl("rnn", TORCH_BOX(&ops::rnn));
  library.impl("rnn_train", TORCH_BOX(&ops::rnn_train));
  library.impl("rnn_backward", TORCH_BOX(&ops::rnn_backward));
  library.impl("rnn_cell", TORCH_BOX(&ops::rnn_cell));
  library.impl("rnn_cell_train", TORCH_BOX(&ops::rnn_cell_train));
  library.impl("rnn_cell_backward", TORCH_BOX(&ops::rnn_cell_backward));
}
