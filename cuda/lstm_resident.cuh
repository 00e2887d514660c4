// LSTM with resident weights: one launch runs all time steps, and the recurrent weights stay in shared
// memory. A group of kBlocks blocks (1, or a cluster of 8 that splits the units between them) owns a tile of
// 4 batch rows. What a step makes (h forward, the gates' gradients backward) goes to every block of the
// group, into the other one of two buffers, so that one barrier of the group a step is enough.
//
// A thread is (unit, lane), lane = 0..3. In the product it sums a quarter of the reduction for all four rows
// of the tile; the quarters meet in shared memory and the thread goes on with row = lane, whose cell state
// (or gradient of it) stays in a register for all steps.
#pragma once

#include "lstm_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kGroupRows = 4;  // batch rows of a group, and parts of the reduction
constexpr int kClusterBlocks = 8;

// Units of one block, and the threads that leaves.
template <int kBlocks>
constexpr int kMaxUnits = kBlocks == 1 ? 128 : 64;
template <int kBlocks>
constexpr int kMaxThreads = kMaxUnits<kBlocks> * kGroupRows;

// A block's share of the hidden units, also rounded up so that a warp has one lane index.
struct Share {
  int units, padded;
  __host__ __device__ Share(int hidden, int blocks)
      : units(ceil_div(hidden, blocks)), padded(ceil_div(ceil_div(hidden, blocks), 32) * 32) {}
};

// Writes value to the same place in every block of the group.
template <int kBlocks, typename V>
__device__ __forceinline__ void give_to_group(V* place, const V& value) {
  if constexpr (kBlocks == 1) {
    *place = value;
  } else {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) *in_block_of_cluster(place, block) = value;
  }
}

// Where a thread stands.
template <int kBlocks>
struct Place {
  int padded, first_unit, local_unit, unit, lane, row, direction;
  bool owns_unit, active;
  __device__ explicit Place(const LstmShape& s) {
    const Share share(s.hidden, kBlocks);
    padded = share.padded;
    first_unit = static_cast<int>(blockIdx.x) % kBlocks * share.units;
    local_unit = threadIdx.x % padded;
    unit = first_unit + local_unit;
    lane = threadIdx.x / padded;
    row = static_cast<int>(blockIdx.x) / kBlocks * kGroupRows + lane;
    direction = blockIdx.y;
    owns_unit = local_unit < share.units && unit < s.hidden;
    active = owns_unit && row < s.batch;
  }
};

// This block's columns of the packed weights, into shared memory [hidden][share.units].
template <int kBlocks, typename A>
__device__ __forceinline__ void load_weights(Pack<A, 4>* weights, const void* packed, const LstmShape& s,
                                             const Place<kBlocks>& place) {
  const int units = Share(s.hidden, kBlocks).units;
  const auto* from = static_cast<const Pack<A, 4>*>(packed) + int64_t(place.direction) * s.hidden * s.hidden;
  for (int i = threadIdx.x; i < s.hidden * units; i += blockDim.x) {
    const int unit = place.first_unit + i % units;
    if (unit < s.hidden) weights[i] = from[i / units * s.hidden + unit];
  }
}

template <typename T, int kBlocks>
__global__ void __launch_bounds__(kMaxThreads<kBlocks>, 1) lstm_resident_forward(LstmForward p) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  using Rows4 = Pack<A, kGroupRows>;
  const LstmShape s = p.shape;
  const Place<kBlocks> place(s);
  const int hidden = s.hidden, direction = place.direction, row = place.row, unit = place.unit;
  const int lane = place.lane, units = Share(hidden, kBlocks).units, part = ceil_div(hidden, kGroupRows);
  const int k_begin = min(hidden, lane * part), k_end = min(hidden, k_begin + part);

  auto* partial = shared_memory<Gates4>();                                     // [part][row][unit]
  auto* h = pack_at<Rows4>(partial + kGroupRows * kGroupRows * place.padded);  // [2][hidden], all rows
  auto* weights = pack_at<Gates4>(h + 2 * hidden);                             // [hidden][units]
  load_weights(weights, p.packed, s, place);
  for (int i = threadIdx.x; i < hidden * kGroupRows; i += blockDim.x) {
    const int k = i % hidden, r = i / hidden, from_row = row - lane + r;
    h[k].v[r] = from_row < s.batch ? load_or_zero<A, T>(p.h_0, state_at(s, direction, from_row, k)) : A(0);
    h[hidden + k].v[r] = A(0);  // rows past the batch stay so
  }

  A c = 0, h_last = 0;
  LstmGates<A> bias{0, 0, 0, 0};
  if (place.active) {
    c = load_or_zero<A, T>(p.c_0, state_at(s, direction, row, unit));
    add_gates<A, T>(bias, p.bias_ih[direction], unit, hidden);
    add_gates<A, T>(bias, p.bias_hh[direction], unit, hidden);
  }
  group_barrier<kBlocks>();  // weights and h are there, and every block of the group has begun

  for (int step = 0; step < s.steps; ++step) {
    const int time = time_of(s, step, direction);
    const Rows4* h_old = h + step % 2 * hidden;
    LstmGates<A> a = bias;
    if (place.active) add_gates<A, T>(a, p.gates_x[direction], gates_at(s, time, row, unit), hidden);
    if (place.owns_unit) {
      Gates4 sum[kGroupRows] = {};
      for (int k = k_begin; k < k_end; ++k) {
        const Gates4 w = weights[k * units + place.local_unit];
        const Rows4 old = h_old[k];
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r)
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r].v[gate] += w.v[gate] * old.v[r];
      }
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r)
        partial[(lane * kGroupRows + r) * place.padded + place.local_unit] = sum[r];
    }
    block_barrier();  // partial sums are complete
    if (place.active) {
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) {
        const Gates4 sum = partial[(i * kGroupRows + lane) * place.padded + place.local_unit];
        a = {a.i + sum.v[0], a.f + sum.v[1], a.g + sum.v[2], a.o + sum.v[3]};
      }
      const LstmGates<A> gates = lstm_activate<GateMath>(a);
      const LstmState<A> state = lstm_update<GateMath>(gates, c);
      c = state.c;
      h_last = state.h;
      // Nothing is sent in the last step: a block may have returned by then.
      if (step + 1 < s.steps) give_to_group<kBlocks>(&h[(step + 1) % 2 * hidden + unit].v[lane], state.h);
      store_step<T>(p, gates, state, direction, time, row, unit);
    }
    if (step + 1 < s.steps) group_barrier<kBlocks>();  // the new h is complete, partial sums have been read
  }
  if (place.active) store_last<T>(p, h_last, c, direction, row, unit);
}

template <typename T, int kBlocks>
__global__ void __launch_bounds__(kMaxThreads<kBlocks>, 1) lstm_resident_backward(LstmBackward p) {
  using A = Accumulator<T>;
  using Gates4 = Pack<A, 4>;
  const LstmShape s = p.shape;
  const Place<kBlocks> place(s);
  const int hidden = s.hidden, direction = place.direction, row = place.row, unit = place.unit;
  const int lane = place.lane, units = Share(hidden, kBlocks).units, part = ceil_div(hidden, kGroupRows);
  const int j_begin = min(hidden, lane * part), j_end = min(hidden, j_begin + part);

  auto* grad = shared_memory<Gates4>();                                               // [2][hidden][row]
  auto* partial = pack_at<A>(grad + 2 * hidden * kGroupRows);                         // [part][row][unit]
  auto* weights = pack_at<Gates4>(partial + kGroupRows * kGroupRows * place.padded);  // [hidden][units]
  load_weights(weights, p.packed, s, place);

  A dh = 0, dc = 0;
  if (place.active) {
    dh = load_or_zero<A, T>(p.grad_h_n, state_at(s, direction, row, unit));
    dc = load_or_zero<A, T>(p.grad_c_n, state_at(s, direction, row, unit));
  }
  if constexpr (kBlocks > 1) cluster_barrier();  // every block of the group has begun

  for (int step = s.steps - 1; step >= 0; --step) {
    Gates4* grad_now = grad + step % 2 * hidden * kGroupRows;
    if (place.owns_unit) {
      LstmGradients<A> d{};
      if (place.active) {
        d = step_gradients<A, T>(p, step, direction, row, unit, dh, dc);
        dc = d.c_prev;
      }
      give_to_group<kBlocks>(&grad_now[unit * kGroupRows + lane], Gates4{d.a.i, d.a.f, d.a.g, d.a.o});
    }
    group_barrier<kBlocks>();  // the gates' gradients are complete, partial sums have been read
    if (place.owns_unit) {
      A sum[kGroupRows] = {};
      for (int j = j_begin; j < j_end; ++j) {
        const Gates4 w = weights[j * units + place.local_unit];
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
          const Gates4 g = grad_now[j * kGroupRows + r];
#pragma unroll
          for (int gate = 0; gate < 4; ++gate) sum[r] += w.v[gate] * g.v[gate];
        }
      }
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r)
        partial[(lane * kGroupRows + r) * place.padded + place.local_unit] = sum[r];
    }
    block_barrier();  // partial sums are complete
    dh = 0;
    if (place.active)
      for (int i = 0; i < kGroupRows; ++i)
        dh += partial[(i * kGroupRows + lane) * place.padded + place.local_unit];
  }
  if (place.active) {
    store<T>(dh, p.grad_h_0, state_at(s, direction, row, unit));
    store<T>(dc, p.grad_c_0, state_at(s, direction, row, unit));
  }
}

// ---- launchers: true if the schedule fits, and then the work is enqueued ----
template <typename A, int kBlocks>
size_t resident_shared_bytes(int hidden, bool forward) {
  const Share share(hidden, kBlocks);
  const size_t exchanged = size_t(2) * kGroupRows * hidden * (forward ? 1 : 4);
  const size_t partial = size_t(kGroupRows) * kGroupRows * share.padded * (forward ? 4 : 1);
  return sizeof(A) * (exchanged + partial + size_t(4) * hidden * share.units);
}

template <typename T, int kBlocks, bool kForward, typename Params>
bool try_resident(const Params& p, void* stream) {
  const LstmShape& s = p.shape;
  const Share share(s.hidden, kBlocks);
  const size_t shared = resident_shared_bytes<Accumulator<T>, kBlocks>(s.hidden, kForward);
  if (share.units > kMaxUnits<kBlocks> || shared > shared_memory_limit()) return false;
  void (*kernel)(Params);
  if constexpr (kForward) {
    kernel = lstm_resident_forward<T, kBlocks>;
  } else {
    kernel = lstm_resident_backward<T, kBlocks>;
  }
  const unsigned threads = share.padded * kGroupRows;
  const dim3 grid(ceil_div(s.batch, kGroupRows) * kBlocks, s.directions);
  if (kBlocks > 1 && !clusters_fit(kernel, kBlocks, threads, shared)) return false;
  pack_weights<T, kForward>(s, p.weight_hh, p.packed, stream);
  launch_clusters(kernel, grid, kBlocks, threads, shared, stream, p);
  return true;
}

}  // namespace
}  // namespace cnnrnn::cuda
