// The recurrent operators on CPU: check, allocate, run. Shapes: cnnrnn_ext/operators.schema.

#include "rnn_backward.h"
#include "rnn_borrowed.h"
#include "rnn_forward.h"
#include "rnn_operands.h"

namespace cnnrnn {
namespace {

struct Results {
  Tensor output, h_n, c_n, cells, reserve;
};

Tensor nothing(const RnnOperands& o) { return o.fresh({0}); }

Tensors list(const OptionalTensor& t) { return t ? Tensors{*t} : Tensors{}; }

template <typename T>
T* mutable_data_if(bool wanted, const Tensor& t) {
  return wanted ? mutable_data<T>(t) : nullptr;
}

void run_forward(const RnnOperands& o, const Results& r, bool last_states, bool train) {
  o.with_element([&](auto element) {
    using T = decltype(element);
    const bool c = o.has_c();
    const RnnOutputs<T> out = {mutable_data<T>(r.output), mutable_data_if<T>(last_states, r.h_n),
                               mutable_data_if<T>(c && (last_states || !train), r.c_n),
                               mutable_data_if<T>(c && train, r.cells), mutable_data_if<T>(train, r.reserve)};
    const RnnProblem<T> problem = o.problem<T>();
    RnnForward<T>(o.cell, problem, out).run();
  });
}

Results forward(const RnnOperands& o, bool train) {
  Results r;
  r.output = o.fresh(o.output_sizes());
  r.h_n = o.fresh(o.state_sizes());
  r.c_n = o.has_c() ? o.fresh(o.state_sizes()) : nothing(o);
  if (train) {
    r.cells = o.has_c() ? o.fresh(o.output_sizes()) : nothing(o);
    r.reserve = o.fresh(o.reserve_sizes(o.sizes().kept));
  }
  run_forward(o, r, true, train);
  const auto outward = [&] {
    r.output = o.given(r.output), r.h_n = o.given(r.h_n), r.c_n = o.given(r.c_n);
    if (train) r.cells = o.given(r.cells);
    return r;
  };
  if (!o.lengths) return outward();
  if (train) {
    // Its rows stand packed; what they leave over is nobody's.
    const size_t bytes = r.reserve.element_size();
    const size_t used = static_cast<size_t>(o.directions * o.layout.rows * o.sizes().kept * o.hidden) * bytes;
    std::memset(static_cast<char*>(r.reserve.mutable_data_ptr()) + used, 0, r.reserve.numel() * bytes - used);
    if (o.has_c()) r.cells = o.lengths->unpack(r.cells);
  }
  r.output = o.lengths->unpack(r.output);
  r.h_n = o.lengths->restored(r.h_n);
  if (o.has_c()) r.c_n = o.lengths->restored(r.c_n);
  return outward();
}

std::tuple<Tensor, Tensor, Tensor> rnn(Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                       Tensors weight_ih, Tensors weight_hh, Tensors bias_ih, Tensors bias_hh,
                                       OptionalTensor batch_sizes, OptionalTensor lengths,
                                       OptionalTensor reset, bool /*tf32*/) {
  RnnOperands o = sequence_operands(cell.take(), x, h_0, c_0, weight_hh, batch_sizes, lengths, reset);
  o.take_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Results r = forward(o, false);
  return {r.output, r.h_n, r.c_n};
}

std::tuple<Tensor, Tensor, Tensor> rnn_layer(Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                             Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
                                             OptionalTensor bias_hh) {
  return rnn(cell, x, h_0, c_0, {weight_ih}, {weight_hh}, list(bias_ih), list(bias_hh), {}, {}, {}, false);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_train(Text cell, Tensor x, OptionalTensor h_0,
                                                             OptionalTensor c_0, Tensors weight_ih,
                                                             Tensors weight_hh, Tensors bias_ih,
                                                             Tensors bias_hh, OptionalTensor batch_sizes,
                                                             OptionalTensor lengths, OptionalTensor reset,
                                                             bool /*tf32*/, bool recompute_gates) {
  RnnOperands o = sequence_operands(cell.take(), x, h_0, c_0, weight_hh, batch_sizes, lengths, reset);
  o.take_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Results r = forward(o, true);
  if (recompute_gates) r.reserve = new_dense(r.reserve, o.reserve_sizes(0));
  return {r.output, r.h_n, r.c_n, r.cells, r.reserve};
}

// A copy of int8 weights in float32.
Tensors widened(const Tensors& narrow, const Tensors& scales) {
  Tensors wide;
  for (size_t d = 0; d < narrow.size(); ++d) {
    const int64_t rows = narrow[d].size(0), depth = narrow[d].size(1);
    wide.push_back(new_dense(scales[d], {rows, depth}));
    float* to = mutable_data<float>(wide[d]);
    const float* scale = data<float>(scales[d]);
    const int8_t* bytes = data<int8_t>(narrow[d]);
    const int64_t workers = threads_for(static_cast<double>(rows * depth), rows);
    for_workers(workers, [&](int64_t worker) {
      const Share share(rows, worker, workers);
      for (int64_t row = share.first; row < share.last; ++row)
        for (int64_t i = row * depth; i < (row + 1) * depth; ++i)
          to[i] = scale[row] * static_cast<float>(bytes[i]);
    });
  }
  return wide;
}

// Where the kernels of int8 weights are slower than those with packed ones, they get such.
void widen_unless_direct(RnnOperands& o) {
  if (o.weights != Weights::kInt8 || RnnForward<float>::takes_narrow(o.layout, o.weights)) return;
  o.weight_ih = widened(o.weight_ih, o.scale_ih), o.weight_hh = widened(o.weight_hh, o.scale_hh);
  o.scale_ih.clear(), o.scale_hh.clear();
  o.weights = Weights::kElement;
}

std::tuple<Tensor, Tensor, Tensor> rnn_narrow(Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0,
                                              Tensors weight_ih, Tensors weight_hh, Tensors scale_ih,
                                              Tensors scale_hh, Tensors bias_ih, Tensors bias_hh,
                                              OptionalTensor batch_sizes, OptionalTensor lengths,
                                              OptionalTensor reset) {
  RnnOperands o = sequence_operands(cell.take(), x, h_0, c_0, weight_hh, batch_sizes, lengths, reset);
  o.take_narrow_weights(weight_ih, weight_hh, scale_ih, scale_hh);
  o.take_bias(bias_ih, bias_hh);
  widen_unless_direct(o);
  Results r = forward(o, false);
  return {r.output, r.h_n, r.c_n};
}

// ---- cells: a sequence of one step and one direction ----

// As sequence_operands; states and bias vectors have no dimension for directions.
RnnOperands cell_operands(const std::string& cell, const Tensor& x, const OptionalTensor& h,
                          const OptionalTensor& c, const Tensor& weight_hh) {
  RnnOperands o;
  o.cell = cell_of(cell);
  check_element(x);
  check(x.dim() == 2, "x: expected shape [N, I], got ", shape(x));
  o.packed = true, o.directions = 1, o.steps = 1;
  o.hidden = hidden_size(weight_hh);
  o.input = x.size(1);
  o.layout = Layout(1, x.size(0));
  o.dtype = x.scalar_type();
  o.x = dense(x);
  const auto take = [&](const char* name, OptionalTensor& into, const OptionalTensor& from) {
    if (!from) return;
    check_like(name, *from, "x", x);
    check_shape(name, *from, {x.size(0), o.hidden});
    into = dense(*from);
  };
  take("h", o.h_0, h);
  check(!c || o.has_c(), "c: only lstm has one");
  take("c", o.c_0, c);
  return o;
}

Results cell_forward(const RnnOperands& o, bool train) {
  Results r;
  const std::vector<int64_t> state = {o.layout.batch, o.hidden};
  r.output = o.fresh(state);
  r.c_n = r.cells = o.has_c() ? o.fresh(state) : nothing(o);
  if (train) r.reserve = o.fresh({o.layout.batch, o.sizes().kept, o.hidden});
  run_forward(o, r, false, train);
  return r;
}

std::tuple<Tensor, Tensor> rnn_cell(Text cell, Tensor x, OptionalTensor h, OptionalTensor c, Tensor weight_ih,
                                    Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh) {
  RnnOperands o = cell_operands(cell.take(), x, h, c, weight_hh);
  o.take_weights({weight_ih}, {weight_hh}, list(bias_ih), list(bias_hh));
  Results r = cell_forward(o, false);
  return {r.output, r.c_n};
}

std::tuple<Tensor, Tensor, Tensor> rnn_cell_train(Text cell, Tensor x, OptionalTensor h, OptionalTensor c,
                                                  Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih,
                                                  OptionalTensor bias_hh) {
  RnnOperands o = cell_operands(cell.take(), x, h, c, weight_hh);
  o.take_weights({weight_ih}, {weight_hh}, list(bias_ih), list(bias_hh));
  Results r = cell_forward(o, true);
  return {r.output, r.c_n, r.reserve};
}

std::tuple<Tensor, Tensor> rnn_cell_narrow(Text cell, Tensor x, OptionalTensor h, OptionalTensor c,
                                           Tensor weight_ih, Tensor weight_hh, OptionalTensor scale_ih,
                                           OptionalTensor scale_hh, OptionalTensor bias_ih,
                                           OptionalTensor bias_hh) {
  RnnOperands o = cell_operands(cell.take(), x, h, c, weight_hh);
  o.take_narrow_weights({weight_ih}, {weight_hh}, list(scale_ih), list(scale_hh));
  o.take_bias(list(bias_ih), list(bias_hh));
  widen_unless_direct(o);
  Results r = cell_forward(o, false);
  return {r.output, r.c_n};
}

// ---- backward ----

struct Wanted {
  bool x, state, weight, bias;
};

struct Gradients {
  Tensor x;
  OptionalTensor h_0, c_0;
  Tensors weight_ih, weight_hh, bias_ih, bias_hh;
};

// Gradients that come in, in the kernels' order.
struct Incoming {
  OptionalTensor output, h_n, c_n, cells;
};

Gradients backward(const RnnOperands& o, const Incoming& in, const Tensor& output, const Tensor& cells,
                   const Tensor& reserve, std::vector<int64_t> state_sizes, Wanted want) {
  const int64_t rows = o.gates() * o.hidden;
  want.bias = want.bias && !o.bias_ih.empty();
  Gradients grad;
  grad.x = want.x ? o.fresh(o.rows_of({o.input})) : nothing(o);
  // The scan's running gradients live there, wanted or not.
  grad.h_0 = o.fresh(state_sizes);
  if (o.has_c()) grad.c_0 = o.fresh(state_sizes);
  for (int64_t d = 0; d < o.directions; ++d) {
    if (want.weight) grad.weight_ih.push_back(o.fresh({rows, o.input}));
    if (want.weight) grad.weight_hh.push_back(o.fresh({rows, o.hidden}));
    if (want.bias) grad.bias_ih.push_back(o.fresh({rows}));
    if (want.bias) grad.bias_hh.push_back(o.fresh({rows}));
  }
  o.with_element([&](auto element) {
    using T = decltype(element);
    const RnnProblem<T> problem = o.problem<T>();
    const RnnGradientsIn<T> from = {data<T>(get(in.output)), data<T>(get(in.h_n)), data<T>(get(in.c_n)),
                                    data<T>(get(in.cells))};
    RnnGradientsOut<T> to{};
    to.x = mutable_data_if<T>(want.x, grad.x);
    to.h_0 = mutable_data<T>(*grad.h_0), to.want_h_0 = want.state;
    if (o.has_c()) to.c_0 = mutable_data<T>(*grad.c_0);
    for (int64_t d = 0; d < o.directions; ++d) {
      if (want.weight) to.weight_ih[d] = mutable_data<T>(grad.weight_ih[d]);
      if (want.weight) to.weight_hh[d] = mutable_data<T>(grad.weight_hh[d]);
      if (want.bias) to.bias_ih[d] = mutable_data<T>(grad.bias_ih[d]);
      if (want.bias) to.bias_hh[d] = mutable_data<T>(grad.bias_hh[d]);
    }
    RnnBackward<T>(o.cell, problem, from, data<T>(output), o.has_c() ? data<T>(cells) : nullptr,
                   data<T>(reserve), to)
        .run();
  });
  if (o.lengths) {
    if (want.x) grad.x = o.lengths->unpack(grad.x);
    if (want.state) grad.h_0 = o.lengths->restored(*grad.h_0);
    if (want.state && grad.c_0) grad.c_0 = o.lengths->restored(*grad.c_0);
  }
  if (!want.state || !grad.c_0) grad.c_0 = nothing(o);
  if (!want.state) grad.h_0 = nothing(o);
  return grad;
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors, Tensors, Tensors> rnn_backward(
    OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n, OptionalTensor grad_cells,
    Text cell, Tensor x, OptionalTensor h_0, OptionalTensor c_0, Tensors weight_ih, Tensors weight_hh,
    Tensors bias_ih, Tensors bias_hh, OptionalTensor batch_sizes, OptionalTensor lengths,
    OptionalTensor reset, Tensor output, Tensor cells, Tensor reserve, bool need_x, bool need_state,
    bool need_weight, bool need_bias, bool /*tf32*/) {
  RnnOperands o = sequence_operands(cell.take(), x, h_0, c_0, weight_hh, batch_sizes, lengths, reset);
  o.take_weights(weight_ih, weight_hh, bias_ih, bias_hh);
  Incoming in;
  OptionalTensor output_rows, cell_rows;
  o.take_rows("grad_output", in.output, grad_output);
  o.take_state("grad_h_n", in.h_n, grad_h_n);
  o.take_rows("output", output_rows, output);
  if (o.has_c()) {
    o.take_state("grad_c_n", in.c_n, grad_c_n);
    o.take_rows("grad_cells", in.cells, grad_cells);
    o.take_rows("cells", cell_rows, cells);
  }
  check(reserve.scalar_type() == (o.half() ? ScalarType::Float : o.dtype) && reserve.device() == x.device(),
        "reserve and x", o.half() ? " in float32" : "", " must have the same dtype and device");
  const bool again = o.sizes().kept > 0 && reserve.dim() > 1 && reserve.size(reserve.dim() - 2) == 0;
  check_shape("reserve", reserve, o.reserve_sizes(again ? 0 : o.sizes().kept));
  if (again) reserve = forward(o, true).reserve;
  Gradients grad = backward(o, in, *output_rows, cell_rows ? *cell_rows : cells, dense(reserve),
                            o.state_sizes(), {need_x, need_state, need_weight, need_bias});
  const auto each = [&](Tensors list) {
    for (Tensor& t : list) t = o.given(t);
    return list;
  };
  return {o.given(grad.x),      o.given(*grad.h_0), o.given(*grad.c_0), each(grad.weight_ih),
          each(grad.weight_hh), each(grad.bias_ih), each(grad.bias_hh)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rnn_cell_backward(
    OptionalTensor grad_h_1, OptionalTensor grad_c_1, Text cell, Tensor x, OptionalTensor h, OptionalTensor c,
    Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh, Tensor h_1,
    Tensor c_1, Tensor reserve, bool need_x, bool need_state, bool need_weight, bool need_bias) {
  RnnOperands o = cell_operands(cell.take(), x, h, c, weight_hh);
  o.take_weights({weight_ih}, {weight_hh}, list(bias_ih), list(bias_hh));
  const std::vector<int64_t> state = {o.layout.batch, o.hidden};
  const auto take = [&](const char* name, const OptionalTensor& t) -> OptionalTensor {
    if (!t) return t;
    o.check_operand(name, *t, state);
    return dense(*t);
  };
  Incoming in;
  in.h_n = take("grad_h_1", grad_h_1);
  if (o.has_c()) in.c_n = take("grad_c_1", grad_c_1);
  check_like("reserve", reserve, "x", x);
  check_shape("reserve", reserve, {o.layout.batch, o.sizes().kept, o.hidden});
  Gradients grad = backward(o, in, *take("h_1", h_1), o.has_c() ? *take("c_1", c_1) : c_1, dense(reserve),
                            state, {need_x, need_state, need_weight, need_bias});
  const auto only = [&](const Tensors& one) { return one.empty() ? nothing(o) : one[0]; };
  return {grad.x,
          *grad.h_0,
          *grad.c_0,
          only(grad.weight_ih),
          only(grad.weight_hh),
          only(grad.bias_ih),
          only(grad.bias_hh)};
}

// Short calls are worth a way of their own through boxing; what it does not take goes the ordinary one.
using Boxed = void(StableIValue*, uint64_t, uint64_t);
template <bool (*borrowed)(StableIValue*), Boxed* typed>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t results) {
  if (!borrowed(stack)) typed(stack, arguments, results);
}

}  // namespace
}  // namespace cnnrnn

STABLE_TORCH_LIBRARY_IMPL(cnnrnn_ext, CPU, library) {
  using namespace cnnrnn;
  library.impl("rnn", boxed<borrowed_rnn<false>, TORCH_BOX(&rnn)>);
  library.impl("rnn_layer", boxed<borrowed_rnn_layer, TORCH_BOX(&rnn_layer)>);
  library.impl("rnn_train", TORCH_BOX(&rnn_train));
  library.impl("rnn_backward", TORCH_BOX(&rnn_backward));
  library.impl("rnn_narrow", boxed<borrowed_rnn<true>, TORCH_BOX(&rnn_narrow)>);
  library.impl("rnn_cell", boxed<borrowed_rnn_cell<false>, TORCH_BOX(&rnn_cell)>);
  library.impl("rnn_cell_train", boxed<borrowed_rnn_cell<false, true>, TORCH_BOX(&rnn_cell_train)>);
  library.impl("rnn_cell_backward", boxed<borrowed_rnn_cell_backward, TORCH_BOX(&rnn_cell_backward)>);
  library.impl("rnn_cell_narrow", boxed<borrowed_rnn_cell<true>, TORCH_BOX(&rnn_cell_narrow)>);
}
