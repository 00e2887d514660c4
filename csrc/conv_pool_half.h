// bfloat16 among the operands of conv_pool on the CPU, some of which may be missing.
#pragma once

#include "halves.h"

namespace cnnrnn {

inline OptionalTensor widened(const OptionalTensor& t) {
  return t ? OptionalTensor(widened(*t)) : std::nullopt;
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
