// Kernels about rows alone: the state each started from, and where the rows of a packed x stand.
#pragma once

#include "rnn_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kRowThreads = 128;

// A block for every row of every step.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    rnn_states_before_kernel(RnnShape s, int direction, const void* h_0, const void* output, T* before) {
  const int step = blockIdx.x / s.batch, n = blockIdx.x % s.batch;
  const Moment now(s, direction, step, n);
  if (!now.runs && s.offsets) return;  // there is no such row
  const int64_t row = row_at(s, time_of(s, step, direction), n);
  for (int unit = threadIdx.x; unit < s.hidden; unit += kRowThreads) {
    T value = narrow_to<T>(0.0f);
    if (now.runs && !now.cut) {
      if (!now.first) value = static_cast<const T*>(output)[output_at(s, now.row_before, direction, unit)];
      if (now.first && h_0) value = static_cast<const T*>(h_0)[state_at(s, direction, n, unit)];
    }
    before[row * s.hidden + unit] = value;
  }
}

// A block for every row of every step.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    rnn_running_rows_kernel(RnnShape s, const T* x, int width, T* to) {
  const int time = blockIdx.x / s.batch, n = blockIdx.x % s.batch;
  const bool runs = time < length_of(s, n);
  if (!runs && s.offsets) return;  // there is no such row
  const int64_t first = row_at(s, time, n) * width;
  for (int i = threadIdx.x; i < width; i += kRowThreads)
    to[first + i] = runs ? x[first + i] : narrow_to<T>(0.0f);
}

// A part of batch_sizes as an argument of a kernel, whose arguments may take 4 KB.
constexpr int kSizesAtOnce = 448;
struct BatchSizes {
  int64_t first_row;  // of the first of these steps
  int first, count, batch;
  int64_t size[kSizesAtOnce];
};

// One block. offsets [T + 1], lengths [N]: a row's length grows by one for each step that has it.
__global__ void __launch_bounds__(kRowThreads)
    rnn_packed_rows_kernel(BatchSizes sizes, int64_t* offsets, int64_t* lengths) {
  if (threadIdx.x == 0) {
    int64_t row = sizes.first_row;
    for (int i = 0; i < sizes.count; ++i) {
      offsets[sizes.first + i] = row;
      row += sizes.size[i];
    }
    offsets[sizes.first + sizes.count] = row;
  }
  for (int n = threadIdx.x; n < sizes.batch; n += kRowThreads) {
    int64_t length = sizes.first == 0 ? 0 : lengths[n];
    for (int i = 0; i < sizes.count; ++i) length += n < sizes.size[i];
    lengths[n] = length;
  }
}

}  // namespace
}  // namespace cnnrnn::cuda
