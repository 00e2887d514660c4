// LSTM of at most 128 units: one block runs all time steps of a tile of batch rows. The recurrent weights
// stay in its shared memory where they fit, and stream from the L2 cache where they do not.
//
// A thread is (unit, lane), lane = 0..3. In the product it sums a quarter of the reduction for all four rows
// of the tile; the quarters meet in shared memory and the thread goes on with row = lane, whose cell state
// (or gradient of it) stays in a register for all steps.
#pragma once

#include "lstm_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kBlockRows = 4;  // batch rows of a block, and parts of the reduction
constexpr int kBlockHidden = 128;
constexpr int kBlockThreads = kBlockHidden * kBlockRows;

// Units rounded up so that a warp has one lane index.
__host__ __device__ __forceinline__ int padded_units(int hidden) { return ceil_div(hidden, 32) * 32; }

// [hidden][hidden] groups of four gates, in shared memory if kResident.
template <typename A, bool kResident>
__device__ __forceinline__ const Pack<A, 4>* place_weights(const Pack<A, 4>* packed, Pack<A, 4>* shared,
                                                           int hidden) {
  if constexpr (kResident) {
    for (int i = threadIdx.x; i < hidden * hidden; i += blockDim.x) shared[i] = packed[i];
    return shared;
  } else {
    return packed;
  }
}

template <typename T, bool kResident>
__global__ void __launch_bounds__(kBlockThreads, 1) lstm_block_forward(LstmForward p) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  using Rows4 = Pack<A, kBlockRows>;
  const LstmShape s = p.shape;
  const int hidden = s.hidden, units = padded_units(hidden), direction = blockIdx.y;
  const int unit = threadIdx.x % units, lane = threadIdx.x / units;
  const int row = blockIdx.x * kBlockRows + lane;
  const bool active = unit < hidden && row < s.batch;
  const int part = ceil_div(hidden, kBlockRows);
  const int k_begin = min(hidden, lane * part), k_end = min(hidden, k_begin + part);

  auto* partial = shared_memory<Gates4>();                                        // [part][row][unit]
  auto* h = reinterpret_cast<Rows4*>(partial + kBlockRows * kBlockRows * units);  // [unit], all rows
  const Gates4* weights =
      place_weights<A, kResident>(static_cast<const Gates4*>(p.packed) + int64_t(direction) * hidden * hidden,
                                  reinterpret_cast<Gates4*>(h + hidden), hidden);

  A c = 0;
  LstmGates<A> bias{0, 0, 0, 0};
  if (unit < hidden)
    h[unit].v[lane] = active ? load_or_zero<A, T>(p.h_0, state_at(s, direction, row, unit)) : A(0);
  if (active) {
    c = load_or_zero<A, T>(p.c_0, state_at(s, direction, row, unit));
    add_gates<A, T>(bias, p.bias_ih[direction], unit, hidden);
    add_gates<A, T>(bias, p.bias_hh[direction], unit, hidden);
  }
  block_barrier();

  for (int step = 0; step < s.steps; ++step) {
    const int time = time_of(s, step, direction);
    LstmGates<A> a = bias;
    if (active) add_gates<A, T>(a, p.gates_x[direction], gates_at(s, time, row, unit), hidden);
    if (unit < hidden) {
      Gates4 sum[kBlockRows] = {};
      for (int k = k_begin; k < k_end; ++k) {
        const Gates4 w = weights[k * hidden + unit];
        const Rows4 old = h[k];
#pragma unroll
        for (int r = 0; r < kBlockRows; ++r)
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r].v[gate] += w.v[gate] * old.v[r];
      }
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) partial[(lane * kBlockRows + r) * units + unit] = sum[r];
    }
    block_barrier();  // partial sums are complete, the old h has been read
    if (active) {
#pragma unroll
      for (int i = 0; i < kBlockRows; ++i) {
        const Gates4 sum = partial[(i * kBlockRows + lane) * units + unit];
        a = {a.i + sum.v[0], a.f + sum.v[1], a.g + sum.v[2], a.o + sum.v[3]};
      }
      const LstmGates<A> gates = lstm_activate<GateMath>(a);
      const LstmState<A> state = lstm_update<GateMath>(gates, c);
      c = state.c;
      h[unit].v[lane] = state.h;
      static_cast<T*>(p.output)[output_at(s, time, row, direction, unit)] = narrow_to<T>(state.h);
      store_reserve<T>(gates, c, p.reserve, reserve_at(s, direction, time, row, unit), hidden);
    }
    block_barrier();  // the new h is complete, partial sums have been read
  }
  if (active) {
    static_cast<T*>(p.h_n)[state_at(s, direction, row, unit)] = narrow_to<T>(h[unit].v[lane]);
    static_cast<T*>(p.c_n)[state_at(s, direction, row, unit)] = narrow_to<T>(c);
  }
}

template <typename T, bool kResident>
__global__ void __launch_bounds__(kBlockThreads, 1) lstm_block_backward(LstmBackward p) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  const LstmShape s = p.shape;
  const int hidden = s.hidden, units = padded_units(hidden), direction = blockIdx.y;
  const int unit = threadIdx.x % units, lane = threadIdx.x / units;
  const int row = blockIdx.x * kBlockRows + lane;
  const bool active = unit < hidden && row < s.batch;
  const int part = ceil_div(hidden, kBlockRows);
  const int j_begin = min(hidden, lane * part), j_end = min(hidden, j_begin + part);

  auto* grad = shared_memory<Gates4>();                              // [unit][row]
  auto* partial = reinterpret_cast<A*>(grad + kBlockRows * hidden);  // [part][row][unit]
  const Gates4* weights = place_weights<A, kResident>(
      static_cast<const Gates4*>(p.packed) + int64_t(direction) * hidden * hidden,
      reinterpret_cast<Gates4*>(partial + kBlockRows * kBlockRows * units), hidden);

  A dh = 0, dc = 0;
  if (active) {
    dh = load_or_zero<A, T>(p.grad_h_n, state_at(s, direction, row, unit));
    dc = load_or_zero<A, T>(p.grad_c_n, state_at(s, direction, row, unit));
  }

  for (int step = s.steps - 1; step >= 0; --step) {
    const int time = time_of(s, step, direction);
    if (unit < hidden) {
      LstmGradients<A> d{};
      if (active) {
        const int64_t at = reserve_at(s, direction, time, row, unit);
        LstmGates<A> gates{0, 0, 0, 0};
        add_gates<A, T>(gates, p.reserve, at, hidden);
        const A c = load_or_zero<A, T>(p.reserve, at + 4 * int64_t(hidden));
        const A c_prev =
            step == 0 ? load_or_zero<A, T>(p.c_0, state_at(s, direction, row, unit))
                      : load_or_zero<A, T>(
                            p.reserve, reserve_at(s, direction, time_of(s, step - 1, direction), row, unit) +
                                           4 * int64_t(hidden));
        dh += load_or_zero<A, T>(p.grad_output, output_at(s, time, row, direction, unit));
        d = lstm_backward<GateMath>(gates, c, c_prev, dh, dc);
        dc = d.c_prev;
        store_gates<T>(d.a, p.grad_gates[direction], gates_at(s, time, row, unit), hidden);
      }
      grad[unit * kBlockRows + lane] = {d.a.i, d.a.f, d.a.g, d.a.o};
    }
    block_barrier();  // the gates' gradients are complete, partial sums have been read
    if (unit < hidden) {
      A sum[kBlockRows] = {};
      for (int j = j_begin; j < j_end; ++j) {
        const Gates4 w = weights[j * hidden + unit];
#pragma unroll
        for (int r = 0; r < kBlockRows; ++r) {
          const Gates4 g = grad[j * kBlockRows + r];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r] += w.v[gate] * g.v[gate];
        }
      }
#pragma unroll
      for (int r = 0; r < kBlockRows; ++r) partial[(lane * kBlockRows + r) * units + unit] = sum[r];
    }
    block_barrier();  // partial sums are complete, the gates' gradients have been read
    dh = 0;
    if (active)
      for (int i = 0; i < kBlockRows; ++i) dh += partial[(i * kBlockRows + lane) * units + unit];
  }
  if (active) {
    static_cast<T*>(p.grad_h_0)[state_at(s, direction, row, unit)] = narrow_to<T>(dh);
    static_cast<T*>(p.grad_c_0)[state_at(s, direction, row, unit)] = narrow_to<T>(dc);
  }
}

// ---- launchers ----
template <typename A>
size_t block_shared_bytes(int hidden, bool forward, bool resident) {
  const size_t units = padded_units(hidden);
  const size_t state = kBlockRows * hidden * (forward ? 1 : 4);
  const size_t partial = kBlockRows * kBlockRows * units * (forward ? 4 : 1);
  return sizeof(A) * (state + partial + (resident ? size_t(4) * hidden * hidden : 0));
}

template <typename T>
void block_forward(const LstmForward& p, void* stream) {
  using A = Accumulator<T>;
  pack_weights<T, true>(p.shape, p.weight_hh, p.packed, stream);
  const bool resident = block_shared_bytes<A>(p.shape.hidden, true, true) <= shared_memory_limit();
  launch(resident ? lstm_block_forward<T, true> : lstm_block_forward<T, false>,
         dim3(ceil_div(p.shape.batch, kBlockRows), p.shape.directions),
         padded_units(p.shape.hidden) * kBlockRows, block_shared_bytes<A>(p.shape.hidden, true, resident),
         stream, p);
}

template <typename T>
void block_backward(const LstmBackward& p, void* stream) {
  using A = Accumulator<T>;
  pack_weights<T, false>(p.shape, p.weight_hh, p.packed, stream);
  const bool resident = block_shared_bytes<A>(p.shape.hidden, false, true) <= shared_memory_limit();
  launch(resident ? lstm_block_backward<T, true> : lstm_block_backward<T, false>,
         dim3(ceil_div(p.shape.batch, kBlockRows), p.shape.directions),
         padded_units(p.shape.hidden) * kBlockRows, block_shared_bytes<A>(p.shape.hidden, false, resident),
         stream, p);
}

}  // namespace
}  // namespace cnnrnn::cuda
