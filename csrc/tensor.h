// What the host files share: readable checks and typed access to stable-ABI tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace cnnrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A string among the arguments of a typed operator, to be taken once. Typed as std::string it would leak at
// each call: torch's own conversion loses a copy (2.10 to 2.13).
struct Text {
  StringHandle handle;

  std::string take() const {
    const char* text;
    size_t length;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &text));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    std::string taken(text, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return taken;
  }
};

// Throws std::runtime_error, which reaches Python as RuntimeError, torch's own type for bad operands.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// For messages; written out only where one is.
struct shape {
  explicit shape(const Tensor& t) : t(t) {}
  friend std::ostream& operator<<(std::ostream& text, const shape& s) {
    text << "[";
    for (int64_t d = 0; d < s.t.dim(); ++d) text << (d ? ", " : "") << s.t.size(d);
    return text << "]";
  }
  const Tensor& t;
};

// "weight_ih: expected shape [512, 64], got [64, 512]"
inline void check_shape(const char* name, const Tensor& t, const int64_t* expected, int64_t dims) {
  bool same = t.dim() == dims;
  for (int64_t d = 0; same && d < dims; ++d) same = t.size(d) == expected[d];
  if (same) return;
  std::ostringstream want;
  for (int64_t d = 0; d < dims; ++d) want << (d ? ", " : "") << expected[d];
  check(false, name, ": expected shape [", want.str(), "], got ", shape(t));
}
inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> expected) {
  check_shape(name, t, expected.begin(), static_cast<int64_t>(expected.size()));
}
inline void check_shape(const char* name, const Tensor& t, const std::vector<int64_t>& expected) {
  check_shape(name, t, expected.data(), static_cast<int64_t>(expected.size()));
}

inline void check_like(const char* name, const Tensor& t, const char* of, const Tensor& other) {
  check(t.scalar_type() == other.scalar_type(), name, " and ", of, " must have the same dtype");
  check(t.device() == other.device(), name, " and ", of, " must be on the same device");
}

inline const Tensor* get(const OptionalTensor& t) { return t.has_value() ? &*t : nullptr; }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
const T* data(const Tensor* t) {
  return t ? data<T>(*t) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// A new contiguous tensor on the CPU, without a pass through the dispatcher.
inline Tensor new_dense(const int64_t* sizes, size_t dims, int32_t dtype) {
  int64_t strides[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (size_t d = dims; d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(dims), sizes, strides, dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}
// The same, dtype as like's.
inline Tensor new_dense(const Tensor& like, const int64_t* sizes, size_t dims) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_dense(sizes, dims, dtype);
}
inline Tensor new_dense(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_dense(like, sizes.begin(), sizes.size());
}
inline Tensor new_dense(const Tensor& like, const std::vector<int64_t>& sizes) {
  return new_dense(like, sizes.data(), sizes.size());
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// Whether outputs of x take NHWC order: x is laid out so, and not also in NCHW order.
inline bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t expected = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// A new tensor of x's device; dtype as x's unless given.
inline Tensor empty_like_of(const Tensor& x, const std::vector<int64_t>& sizes,
                            std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(x, sizes, dtype);
}

}  // namespace cnnrnn
