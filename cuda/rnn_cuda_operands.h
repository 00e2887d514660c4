// The operands of the recurrent operators on CUDA: checked, contiguous. Shapes: cnnrnn_ext/operators.schema.
#pragma once

#include <climits>
#include <string>
#include <vector>

#include "batch_sizes.h"
#include "device.h"
#include "rnn.h"

namespace cnnrnn::cuda {

using Tensors = std::vector<Tensor>;

inline RnnCell cell_of(const std::string& name) {
  if (name == "lstm") return RnnCell::kLstm;
  if (name == "gru") return RnnCell::kGru;
  if (name == "rnn_tanh") return RnnCell::kRnnTanh;
  check(name == "rnn_relu", "cell: expected 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu', got '", name, "'");
  return RnnCell::kRnnRelu;
}

inline void check_operand(const Tensor& x, const char* name, const Tensor& t,
                          const std::vector<int64_t>& sizes) {
  check_like(name, t, "x", x);
  check_shape(name, t, sizes);
}

inline Tensor taken(const Tensor& x, const char* name, const Tensor& from,
                    const std::vector<int64_t>& sizes) {
  check_operand(x, name, from, sizes);
  return dense(from);
}

inline OptionalTensor taken(const Tensor& x, const char* name, const OptionalTensor& from,
                            const std::vector<int64_t>& sizes) {
  return from ? OptionalTensor(taken(x, name, *from, sizes)) : std::nullopt;
}

inline Tensors taken(const Tensor& x, const char* name, const Tensors& from, size_t count,
                     const std::vector<int64_t>& sizes) {
  check(from.size() == count, name, ": expected one tensor per direction (", count, "), got ", from.size());
  Tensors all;
  for (const Tensor& t : from) all.push_back(taken(x, name, t, sizes));
  return all;
}

inline int int_size(const char* name, const Tensor& t, int64_t d) {
  check(t.size(d) <= INT_MAX / 8, name, ": too large for the CUDA kernels: ", shape(t));
  return static_cast<int>(t.size(d));
}

inline void check_biases(bool both_or_neither) {
  check(both_or_neither, "bias_ih and bias_hh: give both or neither");
}

inline int hidden_size(const Tensor& weight_hh) {
  check(weight_hh.dim() == 2, "weight_hh: expected shape [G*H, H], got ", shape(weight_hh));
  return int_size("weight_hh", weight_hh, 1);
}

// Which rows there are, beside x: as the operator got them.
struct RowOperands {
  const OptionalTensor &batch_sizes, &lengths, &reset;
};

// The operands of one sequence call, checked and contiguous.
struct Operands {
  RnnCell cell;
  RnnSizes sizes;
  RnnShape shape;
  Tensor x;
  OptionalTensor h_0, c_0, lengths, offsets, reset;
  std::vector<int64_t> batch_sizes;  // of a packed x
  Tensors weight_ih, weight_hh, bias_ih, bias_hh;

  bool packed() const { return !batch_sizes.empty() || x.dim() == 2; }
  bool empty() const { return shape.rows == 0 || shape.hidden == 0; }
  int64_t gate_rows() const { return int64_t(sizes.gates) * shape.hidden; }
  const void* bias(const Tensors& biases, size_t direction) const {
    return direction < biases.size() ? input(biases[direction]) : nullptr;
  }
  RnnPlan plan(bool tf32, bool forward) const { return rnn_plan(cell, dtype_of(x), shape, tf32, forward); }
  // Workspace for the kernels of a plan; counters are zeros.
  Tensor weight_workspace(const RnnPlan& plan) const {
    return empty_like_of(x, {static_cast<int64_t>(plan.packed_bytes / x.element_size())});
  }
  Tensor exchange(const RnnPlan& plan) const {
    const std::vector<int64_t> floats = {static_cast<int64_t>(plan.exchange_bytes / sizeof(float))};
    return plan.zeros ? torch::stable::new_zeros(x, floats, ScalarType::Float)
                      : empty_like_of(x, floats, ScalarType::Float);
  }
  Tensor counters(const RnnPlan& plan) const {
    return torch::stable::new_zeros(x, {plan.counters}, ScalarType::Int);
  }
  Tensor carry() const { return empty_like_of(x, state_sizes(), accumulator_type(x)); }
  // What only some rows of are written is zero in the others.
  Tensor by_row(const std::vector<int64_t>& of) const {
    return lengths && !packed() ? torch::stable::new_zeros(x, of) : empty_like_of(x, of);
  }
  Tensor state() const { return empty_like_of(x, state_sizes()); }
  Tensor state_or_zeros(const OptionalTensor& like) const {  // a copy
    return like ? torch::stable::clone(*like) : torch::stable::new_zeros(x, state_sizes());
  }
  Tensor rows_as_matrix(const Tensor& t) const {
    return torch::stable::view(t, {shape.rows, t.size(t.dim() - 1)});
  }
  std::vector<int64_t> state_sizes() const { return {shape.directions, shape.batch, shape.hidden}; }
  std::vector<int64_t> output_sizes() const { return rows_of({int64_t(shape.directions) * shape.hidden}); }
  // `kept`: values of a unit.
  std::vector<int64_t> reserve_sizes(int64_t kept) const {
    std::vector<int64_t> of = rows_of({kept, shape.hidden});
    of.insert(of.begin(), shape.directions);
    return of;
  }
  // The shape of something with a value per row.
  std::vector<int64_t> rows_of(std::vector<int64_t> each) const {
    if (packed())
      each.insert(each.begin(), shape.rows);
    else
      each.insert(each.begin(), {shape.steps, shape.batch});
    return each;
  }
  // `shape` with pointers, valid while these operands live. Enqueues what a packed x needs.
  RnnShape shape_on(const Device& device) {
    RnnShape s = shape;
    if (!batch_sizes.empty()) {
      offsets = empty_like_of(x, {s.steps + 1}, ScalarType::Long);
      lengths = empty_like_of(x, {s.batch}, ScalarType::Long);
      rnn_packed_rows(batch_sizes.data(), s.steps, s.batch, static_cast<int64_t*>(output(offsets)),
                      static_cast<int64_t*>(output(lengths)), device.stream);
    }
    s.lengths = static_cast<const int64_t*>(input(lengths));
    s.offsets = static_cast<const int64_t*>(input(offsets));
    s.reset = static_cast<const unsigned char*>(input(reset));
    return s;
  }
};

inline void take_rows(Operands& o, const RowOperands& rows) {
  const Tensor& x = o.x;
  const bool packed = rows.batch_sizes.has_value();
  check(x.dim() == (packed ? 2 : 3), "x: expected shape ", packed ? "[R, I]" : "[T, N, I]", ", got ",
        shape(x));
  check(!(packed && rows.lengths), "lengths: a packed x has them in batch_sizes");
  if (packed) {
    o.batch_sizes = batch_sizes_of(*rows.batch_sizes, x.size(0));
    o.shape.steps = int_size("batch_sizes", *rows.batch_sizes, 0);
    check(x.size(0) <= INT_MAX / 8, "x: too large for the CUDA kernels: ", shape(x));
    o.shape.batch = o.batch_sizes.empty() ? 0 : static_cast<int>(o.batch_sizes[0]);
    o.shape.rows = x.size(0);
  } else {
    o.shape.steps = int_size("x", x, 0), o.shape.batch = int_size("x", x, 1);
    o.shape.rows = int64_t(o.shape.steps) * o.shape.batch;
  }
  if (rows.lengths) {
    const Tensor& lengths = *rows.lengths;
    check(lengths.scalar_type() == ScalarType::Long && lengths.device() == x.device(),
          "lengths: expected int64 on x's device");
    check_shape("lengths", lengths, {int64_t(o.shape.batch)});
    o.lengths = dense(lengths);
  }
  if (rows.reset) {
    const Tensor& reset = *rows.reset;
    check(reset.scalar_type() == ScalarType::Bool && reset.device() == x.device(),
          "reset: expected bool on x's device");
    check_shape("reset", reset, o.rows_of({}));
    o.reset = dense(reset);
  }
}

inline Operands operands(const std::string& cell, const Tensor& x, const OptionalTensor& h_0,
                         const OptionalTensor& c_0, const Tensors& weight_ih, const Tensors& weight_hh,
                         const Tensors& bias_ih, const Tensors& bias_hh, const RowOperands& rows) {
  Operands o{};
  o.cell = cell_of(cell);
  o.sizes = rnn_sizes(o.cell);
  dtype_of(x);
  o.x = x;
  take_rows(o, rows);
  o.x = dense(x);
  const size_t directions = weight_hh.size();
  check(directions == 1 || directions == 2, "weight_hh: expected 1 or 2 tensors, one per direction, got ",
        directions);
  check_biases(bias_ih.empty() == bias_hh.empty());
  o.shape.hidden = hidden_size(weight_hh[0]), o.shape.directions = static_cast<int>(directions);
  o.h_0 = taken(x, "h_0", h_0, o.state_sizes());
  check(!c_0 || o.sizes.has_c, "c_0: only lstm has one");
  o.c_0 = taken(x, "c_0", c_0, o.state_sizes());
  const int64_t gates = o.gate_rows();
  o.weight_ih = taken(x, "weight_ih", weight_ih, directions, {gates, x.size(x.dim() - 1)});
  o.weight_hh = taken(x, "weight_hh", weight_hh, directions, {gates, int64_t(o.shape.hidden)});
  o.bias_ih = taken(x, "bias_ih", bias_ih, bias_ih.empty() ? 0 : directions, {gates});
  o.bias_hh = taken(x, "bias_hh", bias_hh, bias_hh.empty() ? 0 : directions, {gates});
  return o;
}

struct CellOperands {
  RnnCell cell;
  RnnSizes sizes;
  Tensor x;
  OptionalTensor h, c;
  Tensor weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  int64_t batch, hidden;

  Tensor state() const { return empty_like_of(x, {batch, hidden}); }
};

inline CellOperands cell_operands(const std::string& cell, const Tensor& x, const OptionalTensor& h,
                                  const OptionalTensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                                  const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const RnnCell which = cell_of(cell);
  const RnnSizes sizes = rnn_sizes(which);
  check(x.dim() == 2, "x: expected shape [N, I], got ", shape(x));
  check_biases(bias_ih.has_value() == bias_hh.has_value());
  check(!c || sizes.has_c, "c: only lstm has one");
  dtype_of(x);
  const int64_t batch = int_size("x", x, 0), hidden = hidden_size(weight_hh), gates = sizes.gates * hidden;
  return {which,
          sizes,
          dense(x),
          taken(x, "h", h, {batch, hidden}),
          taken(x, "c", c, {batch, hidden}),
          taken(x, "weight_ih", weight_ih, {gates, x.size(1)}),
          taken(x, "weight_hh", weight_hh, {gates, hidden}),
          taken(x, "bias_ih", bias_ih, {gates}),
          taken(x, "bias_hh", bias_hh, {gates}),
          batch,
          hidden};
}

}  // namespace cnnrnn::cuda
