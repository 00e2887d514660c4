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

inline Tensor new_dense_of(const Tensor& like, int32_t dtype) {
  std::vector<int64_t> sizes;
  for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
  return new_dense(sizes.data(), sizes.size(), dtype);
}

// t contiguous, in float32 where it is in bfloat16.
inline Tensor dense_wide(const Tensor& t) {
  const Tensor from = dense(t);
  if (!is_half(t)) return from;
  const Tensor wide = new_dense_of(from, aoti_torch_dtype_float32());
  for_elements(from.numel(), [&](int64_t first, int64_t last) {
    widen(data<Bf16>(from) + first, last - first, mutable_data<float>(wide) + first);
  });
  return wide;
}

inline Tensor narrowed(const Tensor& wide) {
  const Tensor half = new_dense_of(wide, aoti_torch_dtype_bfloat16());
  for_elements(wide.numel(), [&](int64_t first, int64_t last) {
    narrow(data<float>(wide) + first, last - first, mutable_data<uint16_t>(half) + first);
  });
  return half;
}

}  // namespace cnnrnn
