// Inference on operands where the dispatcher left them: no handle is copied, no list or string made anew,
// which is most of the time of a short call. It takes contiguous float32 operands of the right shapes;
// everything else, errors too, is left to the typed operators.
#pragma once

#include <cstring>

#include "cpu/capability.h"
#include "rnn_forward.h"
#include "tensor.h"

namespace cnnrnn {

// A tensor on the stack, still owned by it.
struct Borrowed {
  AtenTensorHandle handle = nullptr;
  int64_t dims = 0;
  int64_t* sizes = nullptr;
  const void* address = nullptr;
  int32_t dtype = 0;

  // Whether it is a contiguous tensor on the CPU, of float32 or, where those are welcome, of narrow weights.
  bool look(bool narrow = false) {
    int32_t device;
    bool contiguous;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(handle, &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle, &contiguous));
    if (device != aoti_torch_device_type_cpu() || !contiguous) return false;
    const bool fits = narrow ? dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_int8()
                             : dtype == aoti_torch_dtype_float32();
    if (!fits) return false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes));
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle, &address));
    return true;
  }
  bool has_shape(std::initializer_list<int64_t> expected) const {
    return dims == static_cast<int64_t>(expected.size()) &&
           std::equal(expected.begin(), expected.end(), sizes);
  }
  const float* data() const { return static_cast<const float*>(address); }
};

// The arguments of rnn or rnn_cell on the stack. They stay there until `release`.
class BorrowedArguments {
 public:
  explicit BorrowedArguments(StableIValue* stack) : stack_(stack) {}

  // Reads lead to false where the call is not for us.
  bool cell(int i, Cell& into) const {
    const auto name = torch::stable::detail::to<StringHandle>(stack_[i]);
    const char* text;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(name, &text));
    TORCH_ERROR_CODE_CHECK(torch_string_length(name, &length));
    static const char* const names[kCells] = {"lstm", "gru", "rnn_tanh", "rnn_relu"};
    for (int c = 0; c < kCells; ++c) {
      if (length != std::strlen(names[c]) || std::memcmp(text, names[c], length) != 0) continue;
      into = static_cast<Cell>(c);
      return true;
    }
    return false;
  }
  bool tensor(int i, Borrowed& into, bool narrow = false) const {
    into.handle = torch::stable::detail::to<AtenTensorHandle>(stack_[i]);
    return into.look(narrow);
  }
  bool none(int i) const { return torch::stable::detail::to<StableIValue*>(stack_[i]) == nullptr; }
  // One that may be none: then `into` has no address.
  bool optional_tensor(int i, Borrowed& into) const {
    if (none(i)) return true;
    into.handle =
        torch::stable::detail::to<AtenTensorHandle>(*torch::stable::detail::to<StableIValue*>(stack_[i]));
    return into.look();
  }
  // At most two.
  bool list(int i, Borrowed (&into)[2], int64_t& count, bool narrow = false) {
    const auto list = torch::stable::detail::to<StableListHandle>(stack_[i]);
    size_t size;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    count = static_cast<int64_t>(size);
    if (count > 2) return false;
    for (int64_t k = 0; k < count; ++k) {
      StableIValue value;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, k, &value));
      into[k].handle = item_[items_++] = torch::stable::detail::to<AtenTensorHandle>(value);
      if (!into[k].look(narrow)) return false;
    }
    return true;
  }

  // Frees what the stack holds: `kinds` has a letter for each argument, as in the schema: s string, t tensor,
  // o optional tensor, l list.
  void release(const char* kinds) const {
    // A list holds handles, and does not free them itself.
    for (int i = 0; i < items_; ++i) aoti_torch_delete_tensor_object(item_[i]);
    for (int i = 0; kinds[i]; ++i) {
      if (kinds[i] == 's')
        torch_delete_string(torch::stable::detail::to<StringHandle>(stack_[i]));
      else if (kinds[i] == 'l')
        torch_delete_list(torch::stable::detail::to<StableListHandle>(stack_[i]));
      else if (kinds[i] == 't')
        aoti_torch_delete_tensor_object(torch::stable::detail::to<AtenTensorHandle>(stack_[i]));
      else if (!none(i))
        torch::stable::detail::to<std::optional<Tensor>>(stack_[i]);
    }
  }

 private:
  StableIValue* stack_;
  AtenTensorHandle item_[12];
  int items_ = 0;
};

// Puts a new float32 tensor on the stack.
inline float* push(StableIValue& slot, std::initializer_list<int64_t> sizes) {
  int64_t strides[3] = {1, 1, 1};
  for (size_t d = sizes.size(); d-- > 1;)
    strides[d - 1] = strides[d] * std::max<int64_t>(sizes.begin()[d], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides,
                                                  aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                  &handle));
  slot = torch::stable::detail::from(handle);
  void* address;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle, &address));
  return static_cast<float*>(address);
}

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
  const RnnKernels<float>& kernels = CNNRNN_ACTIVE_TABLE(rnn).f32;
  const CellKernels<float>& k = kernels.cells[cell];
  if (D < 1 || count_ih != D || (biases != 0 && biases != D) || biases_hh != biases || w_hh[0].dims != 2 ||
      (scales != 0 && scales != D) || scales_hh != scales)
    return false;
  const int64_t T = x.sizes[0], N = x.sizes[1], I = x.sizes[2], H = w_hh[0].sizes[1], G = k.gates * H;
  if ((h_0.handle && !h_0.has_shape({D, N, H})) || (c_0.handle && (!k.has_c || !c_0.has_shape({D, N, H}))))
    return false;
  const Layout layout(T, N);
  RnnProblem<float> p{layout, I,  H,  D,  x.data(), h_0.data(), c_0.data(), {}, {}, Weights::kElement,
                      {},     {}, {}, {}, nullptr};
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
  RnnForward<float>(kernels, cell, p, to).run();
  in.release(kNarrow ? "stoollllllooo" : "stoollllooo");
  std::copy(out, out + 3, stack);
  return true;
}

// The same for rnn_cell and rnn_cell_narrow.
template <bool kNarrow>
bool borrowed_rnn_cell(StableIValue* stack) {
  constexpr int kBias = kNarrow ? 8 : 6;
  BorrowedArguments in(stack);
  Cell cell;
  Borrowed x, h, c, w_ih, w_hh, scale_ih, scale_hh, b_ih, b_hh;
  if (!in.cell(0, cell) || !in.tensor(1, x) || x.dims != 2 || !in.optional_tensor(2, h) ||
      !in.optional_tensor(3, c) || !in.tensor(4, w_ih, kNarrow) || !in.tensor(5, w_hh, kNarrow) ||
      w_hh.dims != 2 || !in.optional_tensor(kBias, b_ih) || !in.optional_tensor(kBias + 1, b_hh))
    return false;
  if (kNarrow && (!in.optional_tensor(6, scale_ih) || !in.optional_tensor(7, scale_hh))) return false;
  const RnnKernels<float>& kernels = CNNRNN_ACTIVE_TABLE(rnn).f32;
  const CellKernels<float>& k = kernels.cells[cell];
  const int64_t N = x.sizes[0], I = x.sizes[1], H = w_hh.sizes[1], G = k.gates * H;
  if ((h.handle && !h.has_shape({N, H})) || (c.handle && (!k.has_c || !c.has_shape({N, H}))) ||
      !w_ih.has_shape({G, I}) || !w_hh.has_shape({G, H}) ||
      (b_ih.handle == nullptr) != (b_hh.handle == nullptr) ||
      (b_ih.handle && (!b_ih.has_shape({G}) || !b_hh.has_shape({G}))))
    return false;
  const Layout layout(1, N);
  RnnProblem<float> p{layout, I,  H,  1,  x.data(), h.data(), c.data(), {}, {}, Weights::kElement,
                      {},     {}, {}, {}, nullptr};
  p.weight_ih[0] = w_ih.address, p.weight_hh[0] = w_hh.address;
  if (kNarrow && !take_narrow(p, 0, G, w_ih, w_hh, scale_ih, scale_hh)) return false;
  p.bias_ih[0] = b_ih.data(), p.bias_hh[0] = b_hh.data();
  if (kNarrow && !RnnForward<float>::takes_narrow(layout, p.weights)) return false;
  StableIValue out[2];
  RnnOutputs<float> to{};
  to.output = push(out[0], {N, H});
  if (k.has_c)
    to.c_n = push(out[1], {N, H});
  else
    push(out[1], {0});
  RnnForward<float>(kernels, cell, p, to).run();
  in.release(kNarrow ? "stoottoooo" : "stoottoo");
  std::copy(out, out + 2, stack);
  return true;
}

}  // namespace cnnrnn
