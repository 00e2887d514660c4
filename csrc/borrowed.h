// Operands where the dispatcher left them: no handle is copied, no list or string made anew, which is most of
// the time of a short call.
#pragma once

#include <cstring>

#include "cpu/rnn.h"
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

// The arguments of an operator on the stack. They stay there until `release`.
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

  bool flag(int i) const { return torch::stable::detail::to<bool>(stack_[i]); }

  // Frees what the stack holds: `kinds` has a letter for each argument, as in the schema: s string, t tensor,
  // o optional tensor, l list, b bool.
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
      else if (kinds[i] == 'o' && !none(i))
        aoti_torch_delete_tensor_object(
            *torch::stable::detail::to<std::optional<AtenTensorHandle>>(stack_[i]));
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

}  // namespace cnnrnn
