// The recurrent operators on CPU: check, allocate, run. Shapes: cnnrnn_ext/operators.schema.

#include "cpu/capability.h"
#include "cpu/rnn.h"
#include "rnn_lstm_backward.h"
#include "rnn_lstm_forward.h"
#include "tensor.h"

namespace cnnrnn {
namespace {

using Tensors = std::vector<Tensor>;

const RnnKernels& kernels() { return CNNRNN_ACTIVE_TABLE(rnn); }

template <typename T>
const LstmKernels<T>& lstm_kernels() {
  if constexpr (sizeof(T) == sizeof(float))
    return kernels().f32;
  else
    return kernels().f64;
}

// Calls f with a value of the element type.
template <typename F>
auto with_element(const Tensor& x, const F& f) {
  const ScalarType type = x.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::Double,
        "x: the CPU kernels of lstm take float32 and float64, got ", torch::headeronly::toString(type));
  return type == ScalarType::Float ? f(float{}) : f(double{});
}

Tensor new_empty(const Tensor& x, std::initializer_list<int64_t> sizes) { return empty_like_of(x, sizes); }

// The operands of one call, checked and contiguous.
struct Operands {
  Tensor x, h_0, c_0;
  Tensors weight_ih, weight_hh, bias_ih, bias_hh;
  int64_t steps, batch, input, hidden, directions;

  void take(const char* name, Tensor& into, const Tensor& from, const std::vector<int64_t>& sizes) const {
    check_like(name, from, "x", x);
    check_shape(name, from, sizes);
    into = dense(from);
  }

  void take(const char* name, Tensors& into, const Tensors& from, const std::vector<int64_t>& sizes) const {
    check(static_cast<int64_t>(from.size()) == directions, name, ": expected one tensor per direction (",
          directions, "), got ", from.size());
    into = from;
    for (size_t d = 0; d < from.size(); ++d) take(name, into[d], from[d], sizes);
  }

  template <typename T>
  LstmProblem<T> problem() const {
    LstmProblem<T> p{};
    p.steps = steps, p.batch = batch, p.input = input, p.hidden = hidden, p.directions = directions;
    p.x = data<T>(x), p.h_0 = data<T>(h_0), p.c_0 = data<T>(c_0);
    for (int64_t d = 0; d < directions; ++d) {
      p.weight_ih[d] = data<T>(weight_ih[d]), p.weight_hh[d] = data<T>(weight_hh[d]);
      if (bias_ih.empty()) continue;
      p.bias_ih[d] = data<T>(bias_ih[d]), p.bias_hh[d] = data<T>(bias_hh[d]);
    }
    return p;
  }
};

int64_t hidden_size(const Tensor& weight_hh) {
  check(weight_hh.dim() == 2, "weight_hh: expected shape [4*H, H], got ", shape(weight_hh));
  return weight_hh.size(1);
}

Operands sequence_operands(const Tensor& x, const Tensor& h_0, const Tensor& c_0, const Tensors& weight_ih,
                           const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh) {
  Operands o;
  check(x.dim() == 3, "x: expected shape [T, N, I], got ", shape(x));
  o.directions = static_cast<int64_t>(weight_hh.size());
  check(o.directions == 1 || o.directions == 2, "weight_hh: expected 1 or 2 tensors, one per direction, got ",
        o.directions);
  o.hidden = hidden_size(weight_hh[0]);
  o.steps = x.size(0), o.batch = x.size(1), o.input = x.size(2);
  o.x = dense(x);
  o.take("h_0", o.h_0, h_0, {o.directions, o.batch, o.hidden});
  o.take("c_0", o.c_0, c_0, {o.directions, o.batch, o.hidden});
  o.take("weight_ih", o.weight_ih, weight_ih, {4 * o.hidden, o.input});
  o.take("weight_hh", o.weight_hh, weight_hh, {4 * o.hidden, o.hidden});
  check(bias_ih.empty() == bias_hh.empty(), "bias_ih and bias_hh: give both or neither");
  if (!bias_ih.empty()) {
    o.take("bias_ih", o.bias_ih, bias_ih, {4 * o.hidden});
    o.take("bias_hh", o.bias_hh, bias_hh, {4 * o.hidden});
  }
  return o;
}

// A cell is a sequence of one step and one direction.
Operands cell_operands(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
                       const Tensor& weight_hh, const OptionalTensor& bias_ih,
                       const OptionalTensor& bias_hh) {
  Operands o;
  check(x.dim() == 2, "x: expected shape [N, I], got ", shape(x));
  o.directions = 1, o.steps = 1;
  o.hidden = hidden_size(weight_hh);
  o.batch = x.size(0), o.input = x.size(1);
  o.x = dense(x);
  o.take("h", o.h_0, h, {o.batch, o.hidden});
  o.take("c", o.c_0, c, {o.batch, o.hidden});
  o.take("weight_ih", o.weight_ih, Tensors{weight_ih}, {4 * o.hidden, o.input});
  o.take("weight_hh", o.weight_hh, Tensors{weight_hh}, {4 * o.hidden, o.hidden});
  check(bias_ih.has_value() == bias_hh.has_value(), "bias_ih and bias_hh: give both or neither");
  if (bias_ih) {
    o.take("bias_ih", o.bias_ih, Tensors{*bias_ih}, {4 * o.hidden});
    o.take("bias_hh", o.bias_hh, Tensors{*bias_hh}, {4 * o.hidden});
  }
  return o;
}

void forward(const Operands& o, const Tensor& output, const Tensor* h_n, const Tensor& c_n,
             const Tensor* reserve) {
  with_element(o.x, [&](auto element) {
    using T = decltype(element);
    const LstmOutputs<T> out = {mutable_data<T>(output), h_n ? mutable_data<T>(*h_n) : nullptr,
                                mutable_data<T>(c_n), reserve ? mutable_data<T>(*reserve) : nullptr};
    const LstmProblem<T> problem = o.problem<T>();
    LstmForward<T>(lstm_kernels<T>(), problem, out).run();
  });
}

std::tuple<Tensor, Tensor, Tensor> lstm(const Tensor& x, const Tensor& h_0, const Tensor& c_0,
                                        const Tensors& weight_ih, const Tensors& weight_hh,
                                        const Tensors& bias_ih, const Tensors& bias_hh) {
  const Operands o = sequence_operands(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor output = new_empty(x, {o.steps, o.batch, o.directions * o.hidden});
  const Tensor h_n = new_empty(x, {o.directions, o.batch, o.hidden});
  const Tensor c_n = new_empty(x, {o.directions, o.batch, o.hidden});
  forward(o, output, &h_n, c_n, nullptr);
  return {output, h_n, c_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_train(const Tensor& x, const Tensor& h_0, const Tensor& c_0,
                                                      const Tensors& weight_ih, const Tensors& weight_hh,
                                                      const Tensors& bias_ih, const Tensors& bias_hh) {
  const Operands o = sequence_operands(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor output = new_empty(x, {o.steps, o.batch, o.directions * o.hidden});
  const Tensor h_n = new_empty(x, {o.directions, o.batch, o.hidden});
  const Tensor c_n = new_empty(x, {o.directions, o.batch, o.hidden});
  const Tensor reserve = new_empty(x, {o.directions, o.steps, o.batch, 5, o.hidden});
  forward(o, output, &h_n, c_n, &reserve);
  return {output, h_n, c_n, reserve};
}

std::tuple<Tensor, Tensor> lstm_cell(const Tensor& x, const Tensor& h, const Tensor& c,
                                     const Tensor& weight_ih, const Tensor& weight_hh,
                                     const OptionalTensor& bias_ih, const OptionalTensor& bias_hh) {
  const Operands o = cell_operands(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor h_1 = new_empty(x, {o.batch, o.hidden}), c_1 = new_empty(x, {o.batch, o.hidden});
  forward(o, h_1, nullptr, c_1, nullptr);
  return {h_1, c_1};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_train(const Tensor& x, const Tensor& h, const Tensor& c,
                                                   const Tensor& weight_ih, const Tensor& weight_hh,
                                                   const OptionalTensor& bias_ih,
                                                   const OptionalTensor& bias_hh) {
  const Operands o = cell_operands(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor h_1 = new_empty(x, {o.batch, o.hidden}), c_1 = new_empty(x, {o.batch, o.hidden});
  const Tensor reserve = new_empty(x, {o.batch, 5, o.hidden});
  forward(o, h_1, nullptr, c_1, &reserve);
  return {h_1, c_1, reserve};
}

struct Gradients {
  Tensor x, h_0, c_0;
  Tensors weight_ih, weight_hh, bias;
};

// An optional gradient that comes in: checked, contiguous.
OptionalTensor incoming(const Operands& o, const char* name, const OptionalTensor& grad,
                        const std::vector<int64_t>& sizes) {
  if (!grad) return std::nullopt;
  Tensor taken;
  o.take(name, taken, *grad, sizes);
  return taken;
}

template <typename T>
T* mutable_data_if(bool wanted, const Tensor& t) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

Gradients backward(const Operands& o, const OptionalTensor& grad_output, const OptionalTensor& grad_h_n,
                   const OptionalTensor& grad_c_n, const Tensor* output, const Tensor& reserve, bool need_x,
                   bool need_state, bool need_weight, bool need_bias) {
  const bool bias_wanted = need_bias && !o.bias_ih.empty();
  const Tensor nothing = new_empty(o.x, {0});
  Gradients grad{nothing, nothing, nothing, {}, {}, {}};
  if (need_x) grad.x = torch::stable::empty_like(o.x);
  if (need_state) grad.h_0 = torch::stable::empty_like(o.h_0);
  // The scan's running gradient lives there, wanted or not.
  const Tensor c_0 = torch::stable::empty_like(o.c_0);
  if (need_state) grad.c_0 = c_0;
  for (int64_t d = 0; d < o.directions; ++d) {
    if (need_weight) {
      grad.weight_ih.push_back(new_empty(o.x, {4 * o.hidden, o.input}));
      grad.weight_hh.push_back(new_empty(o.x, {4 * o.hidden, o.hidden}));
    }
    if (bias_wanted) grad.bias.push_back(new_empty(o.x, {4 * o.hidden}));
  }
  with_element(o.x, [&](auto element) {
    using T = decltype(element);
    const LstmProblem<T> problem = o.problem<T>();
    const LstmGradientsIn<T> in = {data<T>(get(grad_output)), data<T>(get(grad_h_n)), data<T>(get(grad_c_n))};
    LstmGradientsOut<T> out{};
    out.x = mutable_data_if<T>(need_x, grad.x), out.h_0 = mutable_data_if<T>(need_state, grad.h_0);
    out.c_0 = mutable_data<T>(c_0);
    for (int64_t d = 0; d < o.directions; ++d) {
      if (need_weight) {
        out.weight_ih[d] = mutable_data<T>(grad.weight_ih[d]);
        out.weight_hh[d] = mutable_data<T>(grad.weight_hh[d]);
      }
      if (bias_wanted) out.bias[d] = mutable_data<T>(grad.bias[d]);
    }
    LstmBackward<T>(lstm_kernels<T>(), problem, in, data<T>(output), data<T>(reserve), out).run();
  });
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors> lstm_backward(
    const OptionalTensor& grad_output, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
    const Tensor& x, const Tensor& h_0, const Tensor& c_0, const Tensors& weight_ih, const Tensors& weight_hh,
    const Tensors& bias_ih, const Tensors& bias_hh, const Tensor& output, const Tensor& reserve, bool need_x,
    bool need_state, bool need_weight, bool need_bias) {
  const Operands o = sequence_operands(x, h_0, c_0, weight_ih, weight_hh, bias_ih, bias_hh);
  const std::vector<int64_t> all = {o.steps, o.batch, o.directions * o.hidden};
  const std::vector<int64_t> state = {o.directions, o.batch, o.hidden};
  Tensor output_dense, reserve_dense;
  o.take("output", output_dense, output, all);
  o.take("reserve", reserve_dense, reserve, {o.directions, o.steps, o.batch, 5, o.hidden});
  Gradients grad =
      backward(o, incoming(o, "grad_output", grad_output, all), incoming(o, "grad_h_n", grad_h_n, state),
               incoming(o, "grad_c_n", grad_c_n, state), &output_dense, reserve_dense, need_x, need_state,
               need_weight, need_bias);
  return {grad.x, grad.h_0, grad.c_0, grad.weight_ih, grad.weight_hh, grad.bias};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cell_backward(
    const OptionalTensor& grad_h_1, const OptionalTensor& grad_c_1, const Tensor& x, const Tensor& h,
    const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const Tensor& reserve, bool need_x, bool need_state, bool need_weight,
    bool need_bias) {
  const Operands o = cell_operands(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh);
  const std::vector<int64_t> state = {o.batch, o.hidden};
  Tensor reserve_dense;
  o.take("reserve", reserve_dense, reserve, {o.batch, 5, o.hidden});
  Gradients grad = backward(o, std::nullopt, incoming(o, "grad_h_1", grad_h_1, state),
                            incoming(o, "grad_c_1", grad_c_1, state), nullptr, reserve_dense, need_x,
                            need_state, need_weight, need_bias);
  const auto only = [&](const Tensors& list) { return list.empty() ? new_empty(x, {0}) : list[0]; };
  return {grad.x, grad.h_0, grad.c_0, only(grad.weight_ih), only(grad.weight_hh), only(grad.bias)};
}

}  // namespace
}  // namespace cnnrnn

STABLE_TORCH_LIBRARY_IMPL(cnnrnn_ext, CPU, library) {
  library.impl("lstm", TORCH_BOX(&cnnrnn::lstm));
  library.impl("lstm_train", TORCH_BOX(&cnnrnn::lstm_train));
  library.impl("lstm_backward", TORCH_BOX(&cnnrnn::lstm_backward));
  library.impl("lstm_cell", TORCH_BOX(&cnnrnn::lstm_cell));
  library.impl("lstm_cell_train", TORCH_BOX(&cnnrnn::lstm_cell_train));
  library.impl("lstm_cell_backward", TORCH_BOX(&cnnrnn::lstm_cell_backward));
}
