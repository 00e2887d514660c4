// LSTM of any size: one launch a time step, the product with the recurrent weights and the gates in one
// kernel. Steps follow each other on the stream; the host never waits.
//
// A block makes 16 units of 4 * kRows batch rows. A thread is (unit, row group, part): it sums a quarter of
// the reduction for kRows rows; the quarters meet in shared memory, and each (unit, row) goes on in one
// thread.
#pragma once

#include "lstm_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kStepUnits = 16, kStepGroups = 4, kStepParts = 4;
constexpr int kStepThreads = kStepUnits * kStepGroups * kStepParts;
constexpr int kStepChunk = 128;  // of the reduction, staged at a time: a multiple of kStepParts

// Rows and units of a thread, by part of the kernel.
template <int kRows>
struct StepTile {
  static constexpr int kTileRows = kRows * kStepGroups;
  int unit, local_unit, group, part;  // in the product
  int row, local_row;                 // in the gates; local_row may be >= kTileRows
  int row_begin, direction;
  __device__ StepTile() {
    local_unit = threadIdx.x % kStepUnits;
    unit = blockIdx.x * kStepUnits + local_unit;
    group = threadIdx.x / kStepUnits % kStepGroups;
    part = threadIdx.x / (kStepUnits * kStepGroups);
    local_row = threadIdx.x / kStepUnits;
    row_begin = blockIdx.y * kTileRows;
    row = row_begin + local_row;
    direction = blockIdx.z;
  }
};

template <typename T, int kRows>
__global__ void __launch_bounds__(kStepThreads, 2) lstm_step_forward(LstmForward p, int step) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  using Rows = Pack<A, kRows>;
  const StepTile<kRows> tile;
  constexpr int kTileRows = tile.kTileRows;
  const LstmShape s = p.shape;
  const int hidden = s.hidden, direction = tile.direction, time = time_of(s, step, direction);
  auto* partial = shared_memory<Gates4>();                              // [part][row][unit]
  auto* h = pack_at<A>(partial + kStepParts * kTileRows * kStepUnits);  // [k][row]
  const auto* weights = static_cast<const Gates4*>(p.packed) + int64_t(direction) * hidden * hidden;

  Gates4 sum[kRows] = {};
  for (int k_begin = 0; k_begin < hidden; k_begin += kStepChunk) {
    const int count = min(kStepChunk, hidden - k_begin);
    block_barrier();  // the last chunk has been read
    for (int i = threadIdx.x; i < kStepChunk * kTileRows; i += kStepThreads) {
      const int k = i % kStepChunk, local_row = i / kStepChunk, row = tile.row_begin + local_row;
      if (k >= count) continue;
      A value = 0;
      if (row < s.batch && step == 0)
        value = load_or_zero<A, T>(p.h_0, state_at(s, direction, row, k_begin + k));
      if (row < s.batch && step > 0)
        value = load_or_zero<A, T>(
            p.output, output_at(s, time_of(s, step - 1, direction), row, direction, k_begin + k));
      h[k * kTileRows + local_row] = value;
    }
    block_barrier();
    if (tile.unit < hidden) {
      constexpr int kPart = kStepChunk / kStepParts;
      const int end = min(count, (tile.part + 1) * kPart);
      for (int k = tile.part * kPart; k < end; ++k) {
        const Gates4 w = weights[int64_t(k_begin + k) * hidden + tile.unit];
        const Rows old = *pack_at<const Rows>(h + k * kTileRows + tile.group * kRows);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r].v[gate] += w.v[gate] * old.v[r];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    partial[(tile.part * kTileRows + tile.group * kRows + r) * kStepUnits + tile.local_unit] = sum[r];
  block_barrier();
  if (tile.unit >= hidden || tile.local_row >= kTileRows || tile.row >= s.batch) return;

  LstmGates<A> a{0, 0, 0, 0};
  add_gates<A, T>(a, p.gates_x[direction], gates_at(s, time, tile.row, tile.unit), hidden);
  add_gates<A, T>(a, p.bias_ih[direction], tile.unit, hidden);
  add_gates<A, T>(a, p.bias_hh[direction], tile.unit, hidden);
#pragma unroll
  for (int i = 0; i < kStepParts; ++i) {
    const Gates4 part = partial[(i * kTileRows + tile.local_row) * kStepUnits + tile.local_unit];
    a = {a.i + part.v[0], a.f + part.v[1], a.g + part.v[2], a.o + part.v[3]};
  }
  A* carry = static_cast<A*>(p.carry) + state_at(s, direction, tile.row, tile.unit);
  const LstmGates<A> gates = lstm_activate<GateMath>(a);
  const LstmState<A> state = lstm_update<GateMath>(
      gates, step == 0 ? load_or_zero<A, T>(p.c_0, state_at(s, direction, tile.row, tile.unit)) : *carry);
  *carry = state.c;
  store_step<T>(p, gates, state, direction, time, tile.row, tile.unit);
  if (step == s.steps - 1) store_last<T>(p, state.h, state.c, direction, tile.row, tile.unit);
}

// The gradients of step's gates, from those of step + 1. With step = -1 the gradient of h_0 and c_0.
template <typename T, int kRows>
__global__ void __launch_bounds__(kStepThreads, 2) lstm_step_backward(LstmBackward p, int step) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  const StepTile<kRows> tile;
  constexpr int kTileRows = tile.kTileRows;
  const LstmShape s = p.shape;
  const int hidden = s.hidden, direction = tile.direction;
  const bool last = step == s.steps - 1;                          // nothing comes from a later step
  auto* grad = shared_memory<Gates4>();                           // [j][row]
  auto* partial = pack_at<A>(grad + kStepChunk / 4 * kTileRows);  // [part][row][unit]
  const auto* weights = static_cast<const Gates4*>(p.packed) + int64_t(direction) * hidden * hidden;
  constexpr int kChunk = kStepChunk / 4;  // units; four gates each

  A sum[kRows] = {};
  for (int j_begin = 0; j_begin < (last ? 0 : hidden); j_begin += kChunk) {
    const int count = min(kChunk, hidden - j_begin), next = time_of(s, step + 1, direction);
    block_barrier();  // the last chunk has been read
    for (int i = threadIdx.x; i < kChunk * kTileRows; i += kStepThreads) {
      const int j = i % kChunk, local_row = i / kChunk, row = tile.row_begin + local_row;
      if (j >= count) continue;
      LstmGates<A> a{0, 0, 0, 0};
      if (row < s.batch)
        add_gates<A, T>(a, p.grad_gates[direction], gates_at(s, next, row, j_begin + j), hidden);
      grad[j * kTileRows + local_row] = {a.i, a.f, a.g, a.o};
    }
    block_barrier();
    if (tile.unit < hidden) {
      constexpr int kPart = kChunk / kStepParts;
      const int end = min(count, (tile.part + 1) * kPart);
      for (int j = tile.part * kPart; j < end; ++j) {
        const Gates4 w = weights[int64_t(j_begin + j) * hidden + tile.unit];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const Gates4 g = grad[j * kTileRows + tile.group * kRows + r];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r] += w.v[gate] * g.v[gate];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    partial[(tile.part * kTileRows + tile.group * kRows + r) * kStepUnits + tile.local_unit] = sum[r];
  block_barrier();
  if (tile.unit >= hidden || tile.local_row >= kTileRows || tile.row >= s.batch) return;

  const int64_t state = state_at(s, direction, tile.row, tile.unit);
  A dh = last ? load_or_zero<A, T>(p.grad_h_n, state) : A(0);
#pragma unroll
  for (int i = 0; i < kStepParts; ++i)
    dh += partial[(i * kTileRows + tile.local_row) * kStepUnits + tile.local_unit];
  A* carry = static_cast<A*>(p.carry) + state;
  const A dc = last ? load_or_zero<A, T>(p.grad_c_n, state) : *carry;
  if (step >= 0) {
    *carry = step_gradients<A, T>(p, step, direction, tile.row, tile.unit, dh, dc).c_prev;
  } else {
    store<T>(dh, p.grad_h_0, state);
    store<T>(dc, p.grad_c_0, state);
  }
}

// ---- launchers ----
template <typename A, int kRows>
constexpr size_t step_shared_bytes(bool forward) {
  const size_t rows = StepTile<kRows>::kTileRows;
  return sizeof(A) * (kStepParts * rows * kStepUnits * (forward ? 4 : 1) + kStepChunk * rows);
}

template <int kRows>
dim3 step_grid(const LstmShape& s) {
  return dim3(ceil_div(s.hidden, kStepUnits), ceil_div(s.batch, StepTile<kRows>::kTileRows), s.directions);
}

template <typename T, int kRows>
void step_forward(const LstmForward& p, void* stream) {
  pack_weights<T, true>(p.shape, p.weight_hh, p.packed, stream);
  for (int step = 0; step < p.shape.steps; ++step)
    launch(lstm_step_forward<T, kRows>, step_grid<kRows>(p.shape), kStepThreads,
           step_shared_bytes<Accumulator<T>, kRows>(true), stream, p, step);
}

template <typename T, int kRows>
void step_backward(const LstmBackward& p, void* stream) {
  pack_weights<T, false>(p.shape, p.weight_hh, p.packed, stream);
  for (int step = p.shape.steps - 1; step >= -1; --step)
    launch(lstm_step_backward<T, kRows>, step_grid<kRows>(p.shape), kStepThreads,
           step_shared_bytes<Accumulator<T>, kRows>(false), stream, p, step);
}

}  // namespace
}  // namespace cnnrnn::cuda
