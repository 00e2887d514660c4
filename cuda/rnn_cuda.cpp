// The recurrent operators on CUDA: check, allocate, launch on the current stream. The products over all time
// steps at once are torch's matmul. Shapes: cnnrnn_ext/operators.schema.

#include <string>
#include <tuple>

#include "rnn_cuda_operands.h"

namespace cnnrnn::cuda {
namespace {

using torch::stable::matmul;
using torch::stable::narrow;

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor columns(Tensor matrix, int64_t first, int64_t count) { return narrow(matrix, 1, first, count); }

Tensor sum_of(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

void copy_into(Tensor to, const Tensor& from) { torch::stable::copy_(to, from); }

// Some neighbouring gates of the state: `count` of them, in the weights from `gate` on, among the parts of
// the pre-activations' gradient from `part` on.
struct GateRange {
  int64_t gate, part, count;
};

std::vector<GateRange> state_gates(const RnnSizes& sizes) {
  std::vector<GateRange> ranges = {{0, 0, sizes.joint}};
  if (sizes.joint < sizes.gates) ranges.push_back({sizes.joint, sizes.gates, sizes.gates - sizes.joint});
  return ranges;
}

// One tensor [G*H, ...] of what make(range) gives for each range of the state's gates.
template <typename Make>
Tensor for_state_gates(const RnnSizes& sizes, int64_t hidden, const Make& make) {
  const std::vector<GateRange> ranges = state_gates(sizes);
  const Tensor first = make(ranges[0]);
  if (ranges.size() == 1) return first;
  std::vector<int64_t> of = {sizes.gates * hidden};
  for (int64_t d = 1; d < first.dim(); ++d) of.push_back(first.size(d));
  Tensor all = empty_like_of(first, of);
  for (const GateRange& range : ranges)
    copy_into(narrow(all, 0, range.gate * hidden, range.count * hidden),
              range.gate == 0 ? first : make(range));
  return all;
}

// The gradients of weights and biases of one direction or cell, from `parts` [R, P*H].
struct WeightGradients {
  Tensor weight_ih, weight_hh, bias_ih, bias_hh;
};

WeightGradients weight_gradients(const RnnSizes& sizes, int64_t hidden, Tensor parts, const Tensor& x,
                                 const OptionalTensor& before, const Tensor& weight_hh, bool need_weight,
                                 bool need_bias) {
  WeightGradients grad{nothing(x), nothing(x), nothing(x), nothing(x)};
  if (need_weight) {
    grad.weight_ih = matmul(transposed(columns(parts, 0, sizes.gates * hidden)), x);
    grad.weight_hh =
        !before
            ? torch::stable::new_zeros(x, {weight_hh.size(0), weight_hh.size(1)})
            : for_state_gates(sizes, hidden, [&](const GateRange& range) {
                return matmul(transposed(columns(parts, range.part * hidden, range.count * hidden)), *before);
              });
  }
  if (need_bias) {  // the two share no memory, even where they hold the same values
    Tensor sums = torch::stable::sum(parts, std::vector<int64_t>{0});
    grad.bias_ih = torch::stable::clone(narrow(sums, 0, 0, sizes.gates * hidden));
    grad.bias_hh = for_state_gates(sizes, hidden, [&](const GateRange& range) {
      return torch::stable::clone(narrow(sums, 0, range.part * hidden, range.count * hidden));
    });
  }
  return grad;
}

// ---- sequences ----

struct Outputs {
  Tensor output, h_n, c_n;
};

Outputs forward(Operands& o, const OptionalTensor& cells, const OptionalTensor& reserve, bool tf32) {
  const bool has_c = o.sizes.has_c;
  const Tensor all = o.by_row(o.output_sizes());
  if (o.empty()) return {all, o.state_or_zeros(o.h_0), has_c ? o.state_or_zeros(o.c_0) : nothing(o.x)};
  const Outputs out{all, o.state(), has_c ? o.state() : nothing(o.x)};
  const Device device(o.x);
  const RnnPlan plan = o.plan(tf32, true);
  const Tensor packed = o.weight_workspace(plan), carry_c = has_c ? o.carry() : nothing(o.x);
  const Tensor exchange = o.exchange(plan), counters = o.counters(plan);
  RnnForward p{};
  p.shape = o.shape_on(device);
  Tensors gates_x;  // alive until the kernels are enqueued
  for (int d = 0; d < p.shape.directions; ++d) {
    gates_x.push_back(matmul(o.rows_as_matrix(o.x), transposed(o.weight_ih[d])));
    p.gates_x[d] = input(gates_x[d]), p.weight_hh[d] = input(o.weight_hh[d]);
    p.bias_ih[d] = o.bias(o.bias_ih, d), p.bias_hh[d] = o.bias(o.bias_hh, d);
  }
  p.h_0 = input(o.h_0), p.c_0 = input(o.c_0);
  p.output = output(out.output), p.h_n = output(out.h_n), p.c_n = output(out.c_n);
  p.cells = has_c ? output(cells) : nullptr, p.reserve = output(reserve);
  p.packed = output(packed), p.carry_c = output(carry_c);
  p.exchange = output(exchange), p.counters = static_cast<unsigned*>(output(counters));
  rnn_layer_forward(o.cell, dtype_of(o.x), plan, p, device.stream);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rnn(Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                       Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
                                       OptionalTensor batch_sizes, OptionalTensor lengths,
                                       OptionalTensor reset, bool tf32) {
  Operands o = operands(cell.take(), x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
                        {batch_sizes, lengths, reset});
  const Outputs out = forward(o, std::nullopt, std::nullopt, tf32);
  return {out.output, out.h_n, out.c_n};
}

std::tuple<Tensor, Tensor, Tensor> rnn_layer(Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                             Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
                                             OptionalTensor bias_hh) {
  const auto list = [](const OptionalTensor& t) { return t ? Tensors{*t} : Tensors{}; };
  return rnn(cell, x, h_0, c_0, {weight_ih}, {weight_hh}, list(bias_ih), list(bias_hh), {}, {}, {}, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_train(Text cell, Tensor x, OptionalTensor h_0,
                                                             OptionalTensor c_0, Tensors weight_ih,
                                                             Tensors weight_hh, Tensors bias_ih,
                                                             Tensors bias_hh, OptionalTensor batch_sizes,
                                                             OptionalTensor lengths, OptionalTensor reset,
                                                             bool tf32, bool recompute_gates) {
  Operands o = operands(cell.take(), x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
                        {batch_sizes, lengths, reset});
  const Tensor cells = o.sizes.has_c ? o.by_row(o.output_sizes()) : nothing(x);
  const Tensor reserve = o.by_row(o.reserve_sizes(recompute_gates ? 0 : o.sizes.kept));
  const Outputs out = forward(o, cells, recompute_gates ? OptionalTensor() : OptionalTensor(reserve), tf32);
  return {out.output, out.h_n, out.c_n, cells, reserve};
}

// The reserve of a layer that kept none, from the states before each step (a tensor for each direction): all
// steps at once.
Tensor reserve_again(const Operands& o, const Tensors& before, const Device& device) {
  const int64_t kept = o.sizes.kept, hidden = o.shape.hidden, rows = o.shape.rows;
  Tensor reserve = empty_like_of(o.x, o.reserve_sizes(kept));
  Tensor of_directions = torch::stable::view(reserve, {int64_t(o.shape.directions), rows, kept, hidden});
  for (size_t d = 0; d < before.size(); ++d) {
    const Tensor gates_x = matmul(o.rows_as_matrix(o.x), transposed(o.weight_ih[d]));
    const Tensor gates_h = matmul(before[d], transposed(o.weight_hh[d]));
    rnn_cell_step_forward(o.cell, dtype_of(o.x),
                          {rows, o.shape.hidden, input(gates_x), input(gates_h), o.bias(o.bias_ih, d),
                           o.bias(o.bias_hh, d), input(before[d]), nullptr, nullptr, nullptr,
                           output(narrow(of_directions, 0, static_cast<int64_t>(d), 1))},
                          device.stream);
  }
  return reserve;
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensors> rnn_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, OptionalTensor grad_cells,
    Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0, Tensors weight_ih, Tensors weight_hh,
    Tensors bias_ih, Tensors bias_hh, OptionalTensor batch_sizes, OptionalTensor lengths,
    OptionalTensor reset, Tensor output_seen, Tensor cells_seen, Tensor reserve_seen, bool need_x,
    bool need_state, bool need_weight, bool need_bias, bool tf32) {
  Operands o = operands(cell.take(), x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh,
                        {batch_sizes, lengths, reset});
  const bool has_c = o.sizes.has_c;
  const int64_t hidden = o.shape.hidden;
  const OptionalTensor g_output = taken(x, "grad_output", grad_output, o.output_sizes());
  const OptionalTensor g_h = taken(x, "grad_h_n", grad_h_n, o.state_sizes());
  OptionalTensor g_c, g_cells, cells;
  if (has_c) {
    g_c = taken(x, "grad_c_n", grad_c_n, o.state_sizes());
    g_cells = taken(x, "grad_cells", grad_cells, o.output_sizes());
    cells = taken(x, "cells", cells_seen, o.output_sizes());
  }
  const Tensor out = taken(x, "output", output_seen, o.output_sizes());
  const bool recompute_gates = reserve_seen.dim() > 1 && reserve_seen.size(reserve_seen.dim() - 2) == 0;
  Tensor reserve = taken(x, "reserve", reserve_seen, o.reserve_sizes(recompute_gates ? 0 : o.sizes.kept));

  const Device device(x);
  const DType dtype = dtype_of(x);
  const RnnShape s = o.empty() ? o.shape : o.shape_on(device);
  const bool again = recompute_gates && o.sizes.kept > 0 && !o.empty();
  Tensors before;
  for (int d = 0; d < s.directions; ++d) {
    before.push_back(empty_like_of(x, {need_weight || again ? s.rows : 0, hidden}));
    if ((need_weight || again) && !o.empty())
      rnn_states_before(dtype, s, d, input(o.h_0), input(out), output(before[d]), device.stream);
  }
  if (again) reserve = reserve_again(o, before, device);
  Tensor grad_h_0 = o.state(), grad_c_0 = has_c ? o.state() : nothing(x);
  Tensors grad_parts;
  for (int d = 0; d < s.directions; ++d)
    grad_parts.push_back(o.by_row({s.rows, int64_t(o.sizes.parts) * hidden}));
  if (o.empty()) {
    grad_h_0 = o.state_or_zeros(g_h);
    if (has_c) grad_c_0 = o.state_or_zeros(g_c);
  } else {
    const RnnPlan plan = o.plan(tf32, false);
    const Tensor packed = o.weight_workspace(plan), carry_h = o.carry();
    const Tensor carry_c = has_c ? o.carry() : nothing(x);
    const Tensor exchange = o.exchange(plan), counters = o.counters(plan);
    RnnBackward p{};
    p.shape = s;
    for (int d = 0; d < s.directions; ++d)
      p.weight_hh[d] = input(o.weight_hh[d]), p.grad_parts[d] = output(grad_parts[d]);
    p.grad_output = input(g_output), p.grad_h_n = input(g_h), p.grad_c_n = input(g_c);
    p.grad_cells = input(g_cells);
    p.h_0 = input(o.h_0), p.c_0 = input(o.c_0);
    p.output = input(out), p.cells = input(cells), p.reserve = input(reserve);
    p.grad_h_0 = output(grad_h_0), p.grad_c_0 = output(grad_c_0);
    p.packed = output(packed), p.carry_h = output(carry_h), p.carry_c = output(carry_c);
    p.exchange = output(exchange), p.counters = static_cast<unsigned*>(output(counters));
    rnn_layer_backward(o.cell, dtype, plan, p, device.stream);
  }

  Tensor grad_x = nothing(x), rows = o.rows_as_matrix(o.x);
  Tensors grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh;
  if (need_weight && o.lengths && !o.packed() && !o.empty()) {
    // Behind a row's end anything may stand, NaN too.
    const Tensor running = empty_like_of(rows, {rows.size(0), rows.size(1)});
    rnn_running_rows(dtype, s, input(rows), int_size("x", rows, 1), output(running), device.stream);
    rows = running;
  }
  for (int d = 0; d < s.directions; ++d) {
    if (need_x) {
      const Tensor part = torch::stable::view(
          matmul(columns(grad_parts[d], 0, o.gate_rows()), o.weight_ih[d]), o.rows_of({rows.size(1)}));
      grad_x = d == 0 ? part : sum_of(grad_x, part);
    }
    const bool biased = need_bias && !o.bias_ih.empty();
    const WeightGradients grad = weight_gradients(o.sizes, hidden, grad_parts[d], rows, before[d],
                                                  o.weight_hh[d], need_weight, biased);
    if (need_weight) grad_weight_ih.push_back(grad.weight_ih), grad_weight_hh.push_back(grad.weight_hh);
    if (biased) grad_bias_ih.push_back(grad.bias_ih), grad_bias_hh.push_back(grad.bias_hh);
  }
  if (!need_state) grad_h_0 = nothing(x), grad_c_0 = nothing(x);
  return {grad_x, grad_h_0, grad_c_0, grad_weight_ih, grad_weight_hh, grad_bias_ih, grad_bias_hh};
}

// For trace(): how the forward or the backward of a layer would run on x's device. The schedule and the
// products are numbers of RnnSchedule and RnnProducts.
std::tuple<int64_t, int64_t, int64_t> plan_of_layer(Text cell, Tensor x, int64_t batch, int64_t hidden_size,
                                                    int64_t directions, bool tf32, bool forward) {
  const Device device(x);
  RnnShape s{};
  s.batch = static_cast<int>(batch), s.hidden = static_cast<int>(hidden_size);
  s.directions = static_cast<int>(directions);
  const RnnPlan plan = rnn_plan(cell_of(cell.take()), dtype_of(x), s, tf32, forward);
  return {static_cast<int64_t>(plan.schedule), plan.blocks, static_cast<int64_t>(plan.products)};
}

// ---- cells ----

std::tuple<Tensor, Tensor> cell_forward(const CellOperands& o, const OptionalTensor& reserve) {
  const Tensor h_1 = o.state(), c_1 = o.sizes.has_c ? o.state() : nothing(o.x);
  if (h_1.numel() == 0) return {h_1, c_1};
  const Device device(o.x);
  const Tensor gates_x = matmul(o.x, transposed(o.weight_ih));
  const OptionalTensor gates_h = o.h ? OptionalTensor(matmul(*o.h, transposed(o.weight_hh))) : std::nullopt;
  rnn_cell_step_forward(
      o.cell, dtype_of(o.x),
      {o.batch, static_cast<int>(o.hidden), input(gates_x), input(gates_h), input(o.bias_ih),
       input(o.bias_hh), input(o.h), input(o.c), output(h_1), output(c_1), output(reserve)},
      device.stream);
  return {h_1, c_1};
}

std::tuple<Tensor, Tensor> rnn_cell(Text cell, Tensor x, OptionalTensor h, OptionalTensor c, Tensor weight_ih,
                                    Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh) {
  return cell_forward(cell_operands(cell.take(), x, h, c, weight_ih, weight_hh, bias_ih, bias_hh),
                      std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor> rnn_cell_train(Text cell, Tensor x, OptionalTensor h, OptionalTensor c,
                                                  Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
                                                  OptionalTensor bias_hh) {
  const CellOperands o = cell_operands(cell.take(), x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor reserve = empty_like_of(x, {o.batch, o.sizes.kept, o.hidden});
  const auto [h_1, c_1] = cell_forward(o, reserve);
  return {h_1, c_1, reserve};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_cell_backward(
    OptionalTensor grad_h_1, OptionalTensor grad_c_1, Text cell, Tensor x, OptionalTensor h, OptionalTensor c,
    Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh, Tensor h_1_seen,
    Tensor c_1_seen, Tensor reserve_seen, bool need_x, bool need_state, bool need_weight, bool need_bias) {
  const CellOperands o = cell_operands(cell.take(), x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const bool has_c = o.sizes.has_c;
  const int64_t hidden = o.hidden;
  const OptionalTensor g_h = taken(x, "grad_h_1", grad_h_1, {o.batch, hidden});
  const Tensor h_1 = taken(x, "h_1", h_1_seen, {o.batch, hidden});
  OptionalTensor g_c, c_1;
  if (has_c) {
    g_c = taken(x, "grad_c_1", grad_c_1, {o.batch, hidden});
    c_1 = taken(x, "c_1", c_1_seen, {o.batch, hidden});
  }
  const Tensor reserve = taken(x, "reserve", reserve_seen, {o.batch, o.sizes.kept, hidden});
  const Device device(x);
  Tensor parts = empty_like_of(x, {o.batch, o.sizes.parts * hidden}), grad_h = o.state();
  const Tensor grad_c = has_c ? o.state() : nothing(x);
  if (grad_h.numel() > 0)
    rnn_cell_step_backward(
        o.cell, dtype_of(x),
        {static_cast<int>(o.batch), static_cast<int>(hidden), input(g_h), input(g_c), input(o.h), input(o.c),
         input(h_1), input(c_1), input(reserve), output(parts), output(grad_h), output(grad_c)},
        device.stream);
  if (need_state) {
    bool begun = o.sizes.blends;  // otherwise h reaches the new state through the product alone
    for (const GateRange& range : state_gates(o.sizes)) {
      Tensor weight = o.weight_hh;
      const Tensor through = matmul(columns(parts, range.part * hidden, range.count * hidden),
                                    narrow(weight, 0, range.gate * hidden, range.count * hidden));
      grad_h = begun ? sum_of(grad_h, through) : through;
      begun = true;
    }
  }
  const WeightGradients grad = weight_gradients(o.sizes, hidden, parts, o.x, o.h, o.weight_hh, need_weight,
                                                need_bias && o.bias_ih.has_value());
  return {need_x ? matmul(columns(parts, 0, o.sizes.gates * hidden), o.weight_ih) : nothing(x),
          need_state ? grad_h : nothing(x),
          need_state ? grad_c : nothing(x),
          grad.weight_ih,
          grad.weight_hh,
          grad.bias_ih,
          grad.bias_hh};
}

}  // namespace
}  // namespace cnnrnn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(CNNRNN_OPERATORS, library) {
  library.def(
      "rnn_plan(str cell, Tensor x, int batch, int hidden_size, int directions, bool tf32, bool forward) -> "
      "(int schedule, int blocks, int products)");
}

STABLE_TORCH_LIBRARY_IMPL(CNNRNN_OPERATORS, CNNRNN_DISPATCH_KEY, library) {
  namespace ops = cnnrnn::cuda;
  library.impl("rnn_plan", TORCH_BOX(&ops::plan_of_layer));
  library.impl("rnn", TORCH_BOX(&ops::rnn));
  library.impl("rnn_layer", TORCH_BOX(&ops::rnn_layer));
  library.impl("rnn_train", TORCH_BOX(&ops::rnn_train));
  library.impl("rnn_backward", TORCH_BOX(&ops::rnn_backward));
  library.impl("rnn_cell", TORCH_BOX(&ops::rnn_cell));
  library.impl("rnn_cell_train", TORCH_BOX(&ops::rnn_cell_train));
  library.impl("rnn_cell_backward", TORCH_BOX(&ops::rnn_cell_backward));
}
