// bfloat16 among the operands of conv_pool on the CPU: widened to float32 and rounded back, order of memory
// and all.
#pragma once

#include "halves.h"

namespace cnnrnn {

// A new tensor of t's sizes and strides; t has no gaps.
inline Tensor empty_in_order(const Tensor& t, int32_t dtype) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d)), strides.push_back(t.stride(d));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(t.dim(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor widened(const Tensor& t) {
  const Tensor wide = empty_in_order(t, aoti_torch_dtype_float32());
  for_elements(t.numel(), [&](int64_t first, int64_t last) {
    widen(data<Bf16>(t) + first, last - first, mutable_data<float>(wide) + first);
  });
  return wide;
}
inline OptionalTensor widened(const OptionalTensor& t) {
  return t ? OptionalTensor(widened(*t)) : std::nullopt;
}

inline Tensor rounded(const Tensor& t) {
  const Tensor half = empty_in_order(t, aoti_torch_dtype_bfloat16());
  for_elements(t.numel(), [&](int64_t first, int64_t last) {
    narrow(data<float>(t) + first, last - first, mutable_data<uint16_t>(half) + first);
  });
  return half;
}
inline OptionalTensor rounded(const OptionalTensor& t) {
  return t ? OptionalTensor(rounded(*t)) : std::nullopt;
}

// Images [from, to) of one tensor into another of the same dtype and order.
inline void copy_images(const Tensor& source, const Tensor& target, int64_t from, int64_t to) {
  const int64_t bytes = source.numel() / source.size(0) * static_cast<int64_t>(source.element_size());
  std::memcpy(static_cast<char*>(target.mutable_data_ptr()) + from * bytes,
              static_cast<const char*>(source.const_data_ptr()) + from * bytes, (to - from) * bytes);
}

}  // namespace cnnrnn
