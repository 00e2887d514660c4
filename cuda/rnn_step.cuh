// A recurrent layer of any size: one launch a time step, the product with the recurrent weights and the gates
// in one kernel. Steps follow each other on the stream; the host never waits.
//
// A block makes 16 units of 4 * kRows batch rows. A thread is (unit, row group, part): it sums a quarter of
// the reduction for kRows rows, in two sums by turns, as shorter sums round less; the quarters meet in shared
// memory, and each (unit, row) goes on in one thread.
#pragma once

#include "rnn_step_unit.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kStepUnits = 16, kStepGroups = 4, kStepParts = 4;
constexpr int kStepThreads = kStepUnits * kStepGroups * kStepParts;
constexpr int kStepChunk = 128;  // of the reduction, staged at a time: a multiple of kStepParts
constexpr int kStepSums = 2;     // of a thread

// first[r] += second[r]: the sums of a thread's rows.
template <int kRows, typename A, int kCount>
__device__ __forceinline__ void add_sums(Pack<A, kCount> (&first)[kRows],
                                         const Pack<A, kCount> (&second)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int i = 0; i < kCount; ++i) first[r].v[i] += second[r].v[i];
}

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
  __device__ bool owns(const RnnShape& s) const {
    return unit < s.hidden && local_row < kTileRows && row < s.batch;
  }
};

template <typename Cell, typename T, int kRows>
__global__ void __launch_bounds__(kStepThreads, 2) rnn_step_forward(RnnForward p, int step) {
  using A = Accumulator<T>;
  using Gates = Values<A, Cell::kGates>;
  using Rows = Pack<A, kRows>;
  const StepTile<kRows> tile;
  constexpr int kTileRows = tile.kTileRows;
  const RnnShape s = p.shape;
  const int hidden = s.hidden, direction = tile.direction;
  auto* h = shared_memory<A>();                                // [k][row]
  auto* partial = pack_at<Gates>(h + kStepChunk * kTileRows);  // [part][row][unit]
  const auto* weights =
      static_cast<const Pack<T, Cell::kGates>*>(p.packed) + int64_t(direction) * hidden * hidden;

  Gates sum[kStepSums][kRows] = {};
  for (int k_begin = 0; k_begin < hidden; k_begin += kStepChunk) {
    const int count = min(kStepChunk, hidden - k_begin);
    block_barrier();  // the last chunk has been read
    for (int i = threadIdx.x; i < kStepChunk * kTileRows; i += kStepThreads) {
      const int k = i % kStepChunk, local_row = i / kStepChunk, row = tile.row_begin + local_row;
      if (k >= count) continue;
      A value = 0;
      if (row < s.batch) {
        const Moment now(s, direction, step, row);
        if (now.runs && !now.cut)
          value = now.first
                      ? load_or_zero<A, T>(p.h_0, state_at(s, direction, row, k_begin + k))
                      : load_or_zero<A, T>(p.output, output_at(s, now.row_before, direction, k_begin + k));
      }
      h[k * kTileRows + local_row] = value;
    }
    block_barrier();
    if (tile.unit < hidden) {
      constexpr int kPart = kStepChunk / kStepParts;
      const int end = min(count, (tile.part + 1) * kPart);
      for (int k_pair = tile.part * kPart; k_pair < end; k_pair += kStepSums)
#pragma unroll
        for (int i = 0; i < kStepSums; ++i) {
          const int k = k_pair + i;
          if (k >= end) continue;
          const auto w = weights[int64_t(k_begin + k) * hidden + tile.unit];
          const Rows old = *pack_at<const Rows>(h + k * kTileRows + tile.group * kRows);
#pragma unroll
          for (int gate = 0; gate < Cell::kGates; ++gate) {
            const A weight = widen(w.v[gate]);
#pragma unroll
            for (int r = 0; r < kRows; ++r) sum[i][r].v[gate] += weight * old.v[r];
          }
        }
    }
  }
  add_sums(sum[0], sum[1]);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    partial[(tile.part * kTileRows + tile.group * kRows + r) * kStepUnits + tile.local_unit] = sum[0][r];
  block_barrier();
  if (!tile.owns(s)) return;

  // The parts' sum by itself, whose roundings are smaller than those of a sum that begins with x * W.
  Gates from_state{};
#pragma unroll
  for (int i = 0; i < kStepParts; ++i)
#pragma unroll
    for (int gate = 0; gate < Cell::kGates; ++gate)
      from_state.v[gate] += partial[(i * kTileRows + tile.local_row) * kStepUnits + tile.local_unit].v[gate];
  step_unit_forward<Cell, T>(p, step, direction, tile.row, tile.unit, from_state);
}

// The gradients of step's parts, from those of step + 1. With step = -1 the gradient of h_0 and c_0.
template <typename Cell, typename T, int kRows>
__global__ void __launch_bounds__(kStepThreads, 2) rnn_step_backward(RnnBackward p, int step) {
  using A = Accumulator<T>;
  using Gates = Values<A, Cell::kGates>;
  const StepTile<kRows> tile;
  constexpr int kTileRows = tile.kTileRows;
  constexpr int kChunk = kStepChunk / 4;  // units; some gates each
  const RnnShape s = p.shape;
  const int hidden = s.hidden, direction = tile.direction;
  const bool last = step == s.steps - 1;                             // no step comes after it
  auto* grad = shared_memory<Gates>();                               // [j][row]
  auto* partial = pack_at<Values<A, 1>>(grad + kChunk * kTileRows);  // [part][row][unit]
  const auto* weights =
      static_cast<const Pack<T, Cell::kGates>*>(p.packed) + int64_t(direction) * hidden * hidden;

  Values<A, 1> sum[kStepSums][kRows] = {};
  for (int j_begin = 0; j_begin < (last ? 0 : hidden); j_begin += kChunk) {
    const int count = min(kChunk, hidden - j_begin);
    block_barrier();  // the last chunk has been read
    for (int i = threadIdx.x; i < kChunk * kTileRows; i += kStepThreads) {
      const int j = i % kChunk, local_row = i / kChunk, row = tile.row_begin + local_row;
      if (j >= count) continue;
      Gates gates{};
      if (row < s.batch) {
        const Moment next(s, direction, step + 1, row);
        if (next.runs && !next.cut)
          gates = state_gates<Cell>(load_values<Cell::kParts, A, T>(
              p.grad_parts[direction], gates_at(s, next.row, Cell::kParts, j_begin + j), hidden));
      }
      grad[j * kTileRows + local_row] = gates;
    }
    block_barrier();
    if (tile.unit < hidden) {
      constexpr int kPart = kChunk / kStepParts;
      const int end = min(count, (tile.part + 1) * kPart);
      for (int j_pair = tile.part * kPart; j_pair < end; j_pair += kStepSums)
#pragma unroll
        for (int i = 0; i < kStepSums; ++i) {
          const int j = j_pair + i;
          if (j >= end) continue;
          const auto w = weights[int64_t(j_begin + j) * hidden + tile.unit];
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const Gates g = grad[j * kTileRows + tile.group * kRows + r];
#pragma unroll
            for (int gate = 0; gate < Cell::kGates; ++gate) sum[i][r].v[0] += widen(w.v[gate]) * g.v[gate];
          }
        }
    }
  }
  add_sums(sum[0], sum[1]);
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    partial[(tile.part * kTileRows + tile.group * kRows + r) * kStepUnits + tile.local_unit] = sum[0][r];
  block_barrier();
  if (!tile.owns(s)) return;

  A from_next = 0;
#pragma unroll
  for (int i = 0; i < kStepParts; ++i)
    from_next += partial[(i * kTileRows + tile.local_row) * kStepUnits + tile.local_unit].v[0];
  step_unit_backward<Cell, T>(p, step, direction, tile.row, tile.unit, from_next);
}

// ---- launchers ----
template <typename Cell, typename A, int kRows>
constexpr size_t step_shared_bytes(bool forward) {
  const size_t rows = StepTile<kRows>::kTileRows, gates = Cell::kGates;
  const size_t staged = forward ? kStepChunk * rows : kStepChunk / 4 * rows * gates;
  return sizeof(A) * (kStepParts * rows * kStepUnits * (forward ? gates : 1) + staged);
}

template <int kRows>
dim3 step_grid(const RnnShape& s) {
  return dim3(ceil_div(s.hidden, kStepUnits), ceil_div(s.batch, StepTile<kRows>::kTileRows), s.directions);
}

template <typename Cell, typename T, int kRows>
void step_forward(const RnnForward& p, void* stream) {
  pack_weights<T, Cell::kGates, true>(p.shape, p.weight_hh, p.packed, stream);
  for (int step = 0; step < p.shape.steps; ++step)
    launch(rnn_step_forward<Cell, T, kRows>, step_grid<kRows>(p.shape), kStepThreads,
           step_shared_bytes<Cell, Accumulator<T>, kRows>(true), stream, p, step);
}

template <typename Cell, typename T, int kRows>
void step_backward(const RnnBackward& p, void* stream) {
  pack_weights<T, Cell::kGates, false>(p.shape, p.weight_hh, p.packed, stream);
  for (int step = p.shape.steps - 1; step >= -1; --step)
    launch(rnn_step_backward<Cell, T, kRows>, step_grid<kRows>(p.shape), kStepThreads,
           step_shared_bytes<Cell, Accumulator<T>, kRows>(false), stream, p, step);
}

}  // namespace
}  // namespace cnnrnn::cuda
