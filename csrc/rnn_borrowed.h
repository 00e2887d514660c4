// The recurrent operators on borrowed operands, for short calls. They take contiguous float32 operands of the
// right shapes; everything else, errors too, is left to the typed operators.
#pragma once

#include "borrowed.h"
#include "cpu/capability.h"
#include "rnn_backward.h"
#include "rnn_forward.h"

namespace cnnrnn {

// Narrow weights and their scales, as the problem wants them; false where they do not fit each other.
inline bool take_narrow(RnnProblem<float>& p, int64_t d, int64_t rows, const Borrowed& ih, const Borrowed& hh,
                        const Borrowed& scale_ih, const Borrowed& scale_hh) {
  const bool int8 = ih.dtype == aoti_torch_dtype_int8();
  if (ih.dtype != hh.dtype || int8 != (scale_ih.handle != nullptr) || int8 != (scale_hh.handle != nullptr))
    return false;
  p.weights = int8 ? Weights::kInt8 : Weights::kBf16;
  p.scale_ih[d] = scale_ih.data(), p.scale_hh[d] = scale_hh.data();
  return !int8 || (scale_ih.has_shape({rows}) && scale_hh.has_shape({rows}));
}

// rnn or rnn_narrow on the stack: whether it was one of those calls, and is done.
template <bool kNarrow>
bool borrowed_rnn(StableIValue* stack) {
  constexpr int kBias = kNarrow ? 8 : 6;  // where the lists of bias vectors stand, behind those of scales
  BorrowedArguments in(stack);
  Cell cell;
  Borrowed x, h_0, c_0, w_ih[2], w_hh[2], scale_ih[2], scale_hh[2], b_ih[2], b_hh[2];
  int64_t D, count_ih, biases, biases_hh, scales = 0, scales_hh = 0;
  if (!in.none(kBias + 2) || !in.none(kBias + 3) || !in.none(kBias + 4)) return false;
  if (!in.cell(0, cell) || !in.tensor(1, x) || x.dims != 3 || !in.optional_tensor(2, h_0) ||
      !in.optional_tensor(3, c_0) || !in.list(4, w_ih, count_ih, kNarrow) || !in.list(5, w_hh, D, kNarrow) ||
      !in.list(kBias, b_ih, biases) || !in.list(kBias + 1, b_hh, biases_hh))
    return false;
  if (kNarrow && (!in.list(6, scale_ih, scales) || !in.list(7, scale_hh, scales_hh))) return false;
  const CellKernels<float>& k = rnn_kernels().f32.cells[cell];
  if (D < 1 || count_ih != D || (biases != 0 && biases != D) || biases_hh != biases || w_hh[0].dims != 2 ||
      (scales != 0 && scales != D) || scales_hh != scales)
    return false;
  const int64_t T = x.sizes[0], N = x.sizes[1], I = x.sizes[2], H = w_hh[0].sizes[1], G = k.gates * H;
  if ((h_0.handle && !h_0.has_shape({D, N, H})) || (c_0.handle && (!k.has_c || !c_0.has_shape({D, N, H}))))
    return false;
  const Layout layout(T, N);
  RnnProblem<float> p{layout, I,  H,  D, x.data(), h_0.data(), c_0.data(), {}, {}, Weights::kElement,
                      {},     {}, {}, {}};
  for (int64_t d = 0; d < D; ++d) {
    if (!w_ih[d].has_shape({G, I}) || !w_hh[d].has_shape({G, H})) return false;
    p.weight_ih[d] = w_ih[d].address, p.weight_hh[d] = w_hh[d].address;
    if (kNarrow && !take_narrow(p, d, G, w_ih[d], w_hh[d], scale_ih[d], scale_hh[d])) return false;
    if (biases == 0) continue;
    if (!b_ih[d].has_shape({G}) || !b_hh[d].has_shape({G})) return false;
    p.bias_ih[d] = b_ih[d].data(), p.bias_hh[d] = b_hh[d].data();
  }
  if (kNarrow && !RnnForward<float>::takes_narrow(layout, p.weights)) return false;
  StableIValue out[3];
  RnnOutputs<float> to{};
  to.output = push(out[0], {T, N, D * H}), to.h_n = push(out[1], {D, N, H});
  if (k.has_c)
    to.c_n = push(out[2], {D, N, H});
  else
    push(out[2], {0});
  RnnForward<float>(cell, p, to).run();
  in.release(kNarrow ? "stoollllllooo" : "stoollllooo");
  std::copy(out, out + 3, stack);
  return true;
}

// The operands of one direction, none of them in a list: of rnn_layer, and of one step.
template <bool kNarrow>
struct OneDirection {
  Cell cell;
  Borrowed x, h, c, w_ih, w_hh, scale_ih, scale_hh, b_ih, b_hh;
  int64_t T = 1, N, I, H, G;
  bool sequence;  // x [T, N, I] and states [1, N, H]; else x [N, I] and states [N, H]

  const CellKernels<float>& k() const { return rnn_kernels().f32.cells[cell]; }

  // The arguments from the cell's name on: whether they are for us.
  bool look(const BorrowedArguments& in, int at, bool is_sequence) {
    const int bias = at + (kNarrow ? 8 : 6);
    sequence = is_sequence;
    if (!in.cell(at, cell) || !in.tensor(at + 1, x) || x.dims != 2 + sequence ||
        !in.optional_tensor(at + 2, h) || !in.optional_tensor(at + 3, c) ||
        !in.tensor(at + 4, w_ih, kNarrow) || !in.tensor(at + 5, w_hh, kNarrow) || w_hh.dims != 2 ||
        !in.optional_tensor(bias, b_ih) || !in.optional_tensor(bias + 1, b_hh))
      return false;
    if (kNarrow && (!in.optional_tensor(at + 6, scale_ih) || !in.optional_tensor(at + 7, scale_hh)))
      return false;
    if (sequence) T = x.sizes[0];
    N = x.sizes[sequence], I = x.sizes[1 + sequence], H = w_hh.sizes[1], G = k().gates * H;
    return (!h.handle || is_state(h)) && (!c.handle || (k().has_c && is_state(c))) &&
           w_ih.has_shape({G, I}) && w_hh.has_shape({G, H}) &&
           (b_ih.handle == nullptr) == (b_hh.handle == nullptr) &&
           (!b_ih.handle || (b_ih.has_shape({G}) && b_hh.has_shape({G})));
  }
  bool is_state(const Borrowed& t) const { return sequence ? t.has_shape({1, N, H}) : t.has_shape({N, H}); }

  RnnProblem<float> problem(const Layout& layout) const {
    RnnProblem<float> p{layout, I,  H,  1, x.data(), h.data(), c.data(), {}, {}, Weights::kElement,
                        {},     {}, {}, {}};
    p.weight_ih[0] = w_ih.address, p.weight_hh[0] = w_hh.address;
    p.bias_ih[0] = b_ih.data(), p.bias_hh[0] = b_hh.data();
    return p;
  }
};

// rnn_layer on the stack.
inline bool borrowed_rnn_layer(StableIValue* stack) {
  const BorrowedArguments in(stack);
  OneDirection<false> o;
  if (!o.look(in, 0, true)) return false;
  const Layout layout(o.T, o.N);
  const RnnProblem<float> p = o.problem(layout);
  StableIValue out[3];
  RnnOutputs<float> to{};
  to.output = push(out[0], {o.T, o.N, o.H}), to.h_n = push(out[1], {1, o.N, o.H});
  if (o.k().has_c)
    to.c_n = push(out[2], {1, o.N, o.H});
  else
    push(out[2], {0});
  RnnForward<float>(o.cell, p, to).run();
  in.release("stoottoo");
  std::copy(out, out + 3, stack);
  return true;
}

// rnn_cell, rnn_cell_narrow or rnn_cell_train on the stack.
template <bool kNarrow, bool kTrain = false>
bool borrowed_rnn_cell(StableIValue* stack) {
  const BorrowedArguments in(stack);
  OneDirection<kNarrow> o;
  if (!o.look(in, 0, false)) return false;
  const Layout layout(1, o.N);
  RnnProblem<float> p = o.problem(layout);
  if (kNarrow && !take_narrow(p, 0, o.G, o.w_ih, o.w_hh, o.scale_ih, o.scale_hh)) return false;
  if (kNarrow && !RnnForward<float>::takes_narrow(layout, p.weights)) return false;
  StableIValue out[3];
  RnnOutputs<float> to{};
  to.output = push(out[0], {o.N, o.H});
  if (o.k().has_c)
    (kTrain ? to.cells : to.c_n) = push(out[1], {o.N, o.H});
  else
    push(out[1], {0});
  if (kTrain) to.reserve = push(out[2], {o.N, o.k().kept, o.H});
  RnnForward<float>(o.cell, p, to).run();
  in.release(kNarrow ? "stoottoooo" : "stoottoo");
  std::copy(out, out + 2 + kTrain, stack);
  return true;
}

// rnn_cell_backward on the stack.
inline bool borrowed_rnn_cell_backward(StableIValue* stack) {
  const BorrowedArguments in(stack);
  OneDirection<false> o;
  Borrowed grad_h, grad_c, h_1, c_1, reserve;
  if (!in.optional_tensor(0, grad_h) || !in.optional_tensor(1, grad_c) || !o.look(in, 2, false) ||
      !in.tensor(10, h_1) || !in.tensor(11, c_1) || !in.tensor(12, reserve))
    return false;
  const bool has_c = o.k().has_c;
  if ((grad_h.handle && !o.is_state(grad_h)) || (has_c && grad_c.handle && !o.is_state(grad_c)) ||
      !o.is_state(h_1) || (has_c && !o.is_state(c_1)) || !reserve.has_shape({o.N, o.k().kept, o.H}))
    return false;
  const bool need_x = in.flag(13), need_state = in.flag(14), need_weight = in.flag(15);
  const bool need_bias = in.flag(16) && o.b_ih.handle;
  const Layout layout(1, o.N);
  const RnnProblem<float> p = o.problem(layout);
  const RnnGradientsIn<float> from = {nullptr, grad_h.data(), has_c ? grad_c.data() : nullptr, nullptr};
  StableIValue out[7];
  RnnGradientsOut<float> to{};
  const auto push_if = [&](bool wanted, int i, std::initializer_list<int64_t> sizes) {
    if (wanted) return push(out[i], sizes);
    push(out[i], {0});
    return static_cast<float*>(nullptr);
  };
  to.x = push_if(need_x, 0, {o.N, o.I});
  to.h_0 = push_if(need_state, 1, {o.N, o.H}), to.want_h_0 = need_state;
  to.c_0 = push_if(need_state && has_c, 2, {o.N, o.H});
  to.weight_ih[0] = push_if(need_weight, 3, {o.G, o.I});
  to.weight_hh[0] = push_if(need_weight, 4, {o.G, o.H});
  to.bias_ih[0] = push_if(need_bias, 5, {o.G});
  to.bias_hh[0] = push_if(need_bias, 6, {o.G});
  // The scan's running gradients live there, wanted or not.
  Scratch scratch;
  if (!to.h_0) to.h_0 = scratch.take<float>(o.N * o.H);
  if (!to.c_0 && has_c) to.c_0 = scratch.take<float>(o.N * o.H);
  RnnBackward<float>(o.cell, p, from, h_1.data(), has_c ? c_1.data() : nullptr, reserve.data(), to).run();
  in.release("oostoottoottt");
  std::copy(out, out + 7, stack);
  return true;
}

}  // namespace cnnrnn
