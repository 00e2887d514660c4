// The operands of a recurrent operator: checked, contiguous, and as the kernels want them. Shapes:
// cnnrnn_ext/operators.schema.
#pragma once

#include <memory>
#include <tuple>

#include "batch_sizes.h"
#include "cpu/capability.h"
#include "halves.h"
#include "rnn_lengths.h"
#include "rnn_run.h"
#include "tensor.h"

namespace cnnrnn {

using Tensors = std::vector<Tensor>;

inline Cell cell_of(const std::string& name) {
  if (name == "lstm") return kLstm;
  if (name == "gru") return kGru;
  if (name == "rnn_tanh") return kRnnTanh;
  check(name == "rnn_relu", "cell: expected 'lstm', 'gru', 'rnn_tanh' or 'rnn_relu', got '", name, "'");
  return kRnnRelu;
}

struct RnnOperands {
  Cell cell;
  Layout layout{0, 0};
  int64_t input, hidden, directions, steps;
  bool packed;       // x came as [R, I]
  ScalarType dtype;  // of every operand as it came; bfloat16 is widened, but for x and the weights
  Tensor x;
  OptionalTensor h_0, c_0, reset;
  Weights weights = Weights::kElement;
  Tensors weight_ih, weight_hh, scale_ih, scale_hh, bias_ih, bias_hh;
  std::unique_ptr<Lengths> lengths;  // where x was padded and is packed now

  bool half() const { return dtype == ScalarType::BFloat16; }
  // A result as it is to go out.
  Tensor given(const Tensor& t) const { return half() ? rounded(t) : t; }

  const CellKernels<float>& sizes() const { return rnn_kernels().f32.cells[cell]; }
  int64_t gates() const { return sizes().gates; }
  bool has_c() const { return sizes().has_c; }

  // Calls f with a value of the kernels' element type; a new tensor of it.
  template <typename F>
  auto with_element(const F& f) const {
    return dtype == ScalarType::Double ? f(double{}) : f(float{});
  }
  Tensor fresh(const std::vector<int64_t>& sizes) const {
    return new_dense(sizes.data(), sizes.size(),
                     dtype == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  }

  std::vector<int64_t> state_sizes() const { return {directions, layout.batch, hidden}; }
  std::vector<int64_t> output_sizes() const { return rows_of({directions * hidden}); }
  // kept: values of a unit.
  std::vector<int64_t> reserve_sizes(int64_t kept) const {
    std::vector<int64_t> sizes_of = rows_of({kept, hidden}, false);
    sizes_of.insert(sizes_of.begin(), directions);
    return sizes_of;
  }
  // The shape of something with a value per row: as the user gave x, or as the kernels see it.
  std::vector<int64_t> rows_of(std::vector<int64_t> each, bool inside = true) const {
    if (packed || (inside && lengths))
      each.insert(each.begin(), layout.rows);
    else
      each.insert(each.begin(), {steps, layout.batch});
    return each;
  }

  template <typename Sizes>
  void check_operand(const char* name, const Tensor& t, const Sizes& sizes_of) const {
    check(t.scalar_type() == dtype, name, " and x must have the same dtype");
    check(t.device() == x.device(), name, " and x must be on the same device");
    check_shape(name, t, sizes_of);
  }

  void take(const char* name, Tensors& into, const Tensors& from, const std::vector<int64_t>& sizes_of,
            bool widen = true) const {
    check(static_cast<int64_t>(from.size()) == directions, name, ": expected one tensor per direction (",
          directions, "), got ", from.size());
    into.reserve(from.size());
    for (const Tensor& t : from) {
      check_operand(name, t, sizes_of);
      into.push_back(widen ? dense_wide(t) : dense(t));
    }
  }

  // A state, or the gradient of one: in the kernels' order.
  void take_state(const char* name, OptionalTensor& into, const OptionalTensor& from) const {
    if (!from) return;
    check_operand(name, *from, state_sizes());
    const Tensor state = dense_wide(*from);
    into = lengths ? lengths->sorted(state) : state;
  }

  // Something laid out as the output, in the kernels' order.
  void take_rows(const char* name, OptionalTensor& into, const OptionalTensor& from) const {
    if (!from) return;
    check_operand(name, *from, rows_of({directions * hidden}, false));
    const Tensor rows = dense_wide(*from);
    into = lengths ? lengths->pack(rows) : rows;
  }

  void take_weights(const Tensors& ih, const Tensors& hh, const Tensors& b_ih, const Tensors& b_hh) {
    const int64_t rows = gates() * hidden;
    take("weight_ih", weight_ih, ih, {rows, input}, false);
    take("weight_hh", weight_hh, hh, {rows, hidden}, false);
    if (half()) weights = Weights::kBf16;
    take_bias(b_ih, b_hh);
  }

  void take_bias(const Tensors& b_ih, const Tensors& b_hh) {
    const int64_t rows = gates() * hidden;
    check(b_ih.empty() == b_hh.empty(), "bias_ih and bias_hh: give both or neither");
    if (b_ih.empty()) return;
    take("bias_ih", bias_ih, b_ih, {rows});
    take("bias_hh", bias_hh, b_hh, {rows});
  }

  // Narrow weights: bfloat16 without scales, or int8 with one for each row.
  void take_narrow_weights(const Tensors& ih, const Tensors& hh, const Tensors& s_ih, const Tensors& s_hh) {
    const ScalarType type = ih.empty() ? ScalarType::Float : ih[0].scalar_type();
    check(x.scalar_type() == ScalarType::Float, "x: narrow weights take float32, got ",
          torch::headeronly::toString(x.scalar_type()));
    check(type == ScalarType::BFloat16 || type == ScalarType::Char,
          "weight_ih: expected bfloat16 or int8, got ", torch::headeronly::toString(type));
    weights = type == ScalarType::Char ? Weights::kInt8 : Weights::kBf16;
    const int64_t rows = gates() * hidden;
    const auto take_one = [&](const char* name, Tensors& into, const Tensors& from, int64_t depth) {
      check(static_cast<int64_t>(from.size()) == directions, name, ": expected one tensor per direction (",
            directions, "), got ", from.size());
      for (const Tensor& t : from) {
        check(t.scalar_type() == type, name, ": expected ", torch::headeronly::toString(type), ", got ",
              torch::headeronly::toString(t.scalar_type()));
        check_shape(name, t, {rows, depth});
        into.push_back(dense(t));
      }
    };
    take_one("weight_ih", weight_ih, ih, input);
    take_one("weight_hh", weight_hh, hh, hidden);
    if (weights == Weights::kInt8) {
      take("scale_ih", scale_ih, s_ih, {rows});
      take("scale_hh", scale_hh, s_hh, {rows});
    } else {
      check(s_ih.empty() && s_hh.empty(), "scale_ih and scale_hh: bfloat16 weights have none");
    }
  }

  template <typename T>
  RnnProblem<T> problem() const {
    RnnProblem<T> p{layout,
                    input,
                    hidden,
                    directions,
                    half() ? nullptr : data<T>(x),
                    data<T>(get(h_0)),
                    data<T>(get(c_0)),
                    {},
                    {},
                    weights,
                    {},
                    {},
                    {},
                    {},
                    data<uint8_t>(get(reset)),
                    half() ? data<Bf16>(x) : nullptr};
    for (int64_t d = 0; d < directions; ++d) {
      p.weight_ih[d] = weight_ih[d].const_data_ptr(), p.weight_hh[d] = weight_hh[d].const_data_ptr();
      if (!scale_ih.empty()) p.scale_ih[d] = data<T>(scale_ih[d]);
      if (!scale_hh.empty()) p.scale_hh[d] = data<T>(scale_hh[d]);
      if (!bias_ih.empty()) p.bias_ih[d] = data<T>(bias_ih[d]), p.bias_hh[d] = data<T>(bias_hh[d]);
    }
    return p;
  }
};

inline void check_element(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double,
        "x: the recurrent CPU kernels take float32 and float64, got ", torch::headeronly::toString(type));
}
inline void check_sequence_element(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16,
        "x: the recurrent CPU kernels take float32, float64 and bfloat16, got ",
        torch::headeronly::toString(type));
}

inline int64_t hidden_size(const Tensor& weight_hh) {
  check(weight_hh.dim() == 2, "weight_hh: expected shape [G*H, H], got ", shape(weight_hh));
  return weight_hh.size(1);
}

inline std::unique_ptr<Lengths> lengths_of(const Tensor& lengths, int64_t batch, int64_t steps) {
  check(lengths.scalar_type() == ScalarType::Long && lengths.is_cpu(),
        "lengths: expected int64 on x's device");
  check_shape("lengths", lengths, {batch});
  const Tensor values = dense(lengths);
  const int64_t* length = data<int64_t>(values);
  bool all = true;
  for (int64_t n = 0; n < batch; ++n) {
    check(length[n] >= 0 && length[n] <= steps, "lengths: expected values from 0 to ", steps, ", got ",
          length[n]);
    all = all && length[n] == steps;
  }
  return all ? nullptr : std::make_unique<Lengths>(length, batch, steps);
}

// Everything of a sequence operator but its weights.
inline RnnOperands sequence_operands(const std::string& cell, const Tensor& x, const OptionalTensor& h_0,
                                     const OptionalTensor& c_0, const Tensors& weight_hh,
                                     const OptionalTensor& batch_sizes, const OptionalTensor& lengths,
                                     const OptionalTensor& reset) {
  RnnOperands o;
  o.cell = cell_of(cell);
  check_sequence_element(x);
  o.dtype = x.scalar_type();
  o.packed = batch_sizes.has_value();
  check(x.dim() == (o.packed ? 2 : 3), "x: expected shape ", o.packed ? "[R, I]" : "[T, N, I]", ", got ",
        shape(x));
  check(!(o.packed && lengths), "lengths: a packed x has them in batch_sizes");
  o.directions = static_cast<int64_t>(weight_hh.size());
  check(o.directions == 1 || o.directions == 2, "weight_hh: expected 1 or 2 tensors, one per direction, got ",
        o.directions);
  o.hidden = hidden_size(weight_hh[0]);
  o.input = x.size(-1);
  if (o.packed) {
    std::vector<int64_t> sizes = batch_sizes_of(*batch_sizes, x.size(0));
    const int64_t batch = sizes.empty() ? 0 : sizes[0];
    o.steps = static_cast<int64_t>(sizes.size());
    o.layout = Layout(std::move(sizes), batch);
  } else {
    o.steps = x.size(0);
    if (lengths) o.lengths = lengths_of(*lengths, x.size(1), o.steps);
    o.layout = o.lengths ? o.lengths->layout() : Layout(o.steps, x.size(1));
  }
  o.x = dense(x);
  if (o.lengths) o.x = o.lengths->pack(o.x);
  o.take_state("h_0", o.h_0, h_0);
  check(!c_0 || o.has_c(), "c_0: only lstm has one");
  o.take_state("c_0", o.c_0, c_0);
  if (reset) {
    check(reset->scalar_type() == ScalarType::Bool && reset->is_cpu(), "reset: expected bool on x's device");
    check_shape("reset", *reset, o.rows_of({}, false));
    o.reset = o.lengths ? o.lengths->pack(dense(*reset)) : dense(*reset);
  }
  return o;
}

}  // namespace cnnrnn
