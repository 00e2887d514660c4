// The steps of packed sequences, as both devices' host files take them.
#pragma once

#include "tensor.h"

namespace cnnrnn {

// Checked: none larger than the one before, `rows` in all.
inline std::vector<int64_t> batch_sizes_of(const Tensor& sizes, int64_t rows) {
  check(sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1 && sizes.is_cpu(),
        "batch_sizes: expected [T] int64 on the CPU, got shape ", shape(sizes));
  const Tensor values = dense(sizes);
  const int64_t* size = data<int64_t>(values);
  std::vector<int64_t> taken(size, size + values.numel());
  int64_t sum = 0;
  for (size_t t = 0; t < taken.size(); ++t) {
    check(taken[t] >= 0 && (t == 0 || taken[t] <= taken[t - 1]),
          "batch_sizes: expected sizes of at least 0, none larger than the one before, got ", taken[t],
          " at step ", t);
    sum += taken[t];
  }
  check(sum == rows, "batch_sizes: expected a sum of ", rows, ", the rows of x, got ", sum);
  return taken;
}

}  // namespace cnnrnn
