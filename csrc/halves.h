// bfloat16 tensors as the CPU kernels take and give them: widened to float32, rounded to nearest even.
#pragma once

#include <cstring>

#include "cpu/rnn.h"
#include "rnn_schedule.h"
#include "tensor.h"

namespace cnnrnn {

inline bool is_half(const Tensor& t) { return t.scalar_type() == ScalarType::BFloat16; }

// f(first, last) for shares of `count` elements, in parallel.
template <typename F>
void for_elements(int64_t count, const F& f) {
  const int64_t workers = threads_for(static_cast<double>(count), count);
  for_workers(workers, [&](int64_t worker) {
    const Share share(count, worker, workers);
    f(share.first, share.last);
  });
}

inline void widen(const Bf16* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i].bits) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

inline void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + i, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to[i] = static_cast<uint16_t>(from[i] != from[i] ? bits >> 16 | 0x40 : rounded);
  }
}

inline void widen_all(const Bf16* from, int64_t count, float* to) {
  for_elements(count, [&](int64_t first, int64_t last) { widen(from + first, last - first, to + first); });
}

// A new tensor of t's sizes and strides; t has no gaps.
inline Tensor empty_in_order(const Tensor& t, int32_t dtype) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d)), strides.push_back(t.stride(d));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(t.dim(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// bfloat16 in float32 and back, in the same order of memory.
inline Tensor widened(const Tensor& t) {
  const Tensor wide = empty_in_order(t, aoti_torch_dtype_float32());
  widen_all(data<Bf16>(t), t.numel(), mutable_data<float>(wide));
  return wide;
}
inline Tensor rounded(const Tensor& t) {
  const Tensor half = empty_in_order(t, aoti_torch_dtype_bfloat16());
  for_elements(t.numel(), [&](int64_t first, int64_t last) {
    narrow(data<float>(t) + first, last - first, mutable_data<uint16_t>(half) + first);
  });
  return half;
}

// t contiguous, in float32 where it is in bfloat16.
inline Tensor dense_wide(const Tensor& t) { return is_half(t) ? widened(dense(t)) : dense(t); }

}  // namespace cnnrnn
