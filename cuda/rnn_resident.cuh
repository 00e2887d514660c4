// A recurrent layer with resident weights: one launch runs all time steps, and the recurrent weights stay in
// shared memory. A group of kBlocks blocks (1, or a cluster of 8 that splits the units between them) owns a
// tile of 4 batch rows. What a step makes (h forward, the gates' gradients backward) goes to every block of
// the group, into the other one of two buffers, so that one barrier of the group a step is enough.
//
// A thread is (unit, lane), lane = 0..3. In the product it sums a quarter of the reduction for all four rows
// of the tile; the quarters meet in shared memory and the thread goes on with row = lane, whose state
// (or gradient of it) stays in a register for all steps.
#pragma once

#include "rnn_common.cuh"

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
  __device__ explicit Place(const RnnShape& s) {
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

// The steps in which some row of a group's tile runs.
struct Steps {
  int begin, end;
  __device__ Steps(const RnnShape& s, int first_row, int direction) {
    int longest = 0;
    for (int n = first_row; n < min(first_row + kGroupRows, s.batch); ++n)
      longest = max(longest, length_of(s, n));
    begin = direction == 0 ? 0 : s.steps - longest;
    end = begin + longest;
  }
};

// This block's columns of the packed weights, into shared memory [hidden][share.units].
template <int kBlocks, typename Gates>
__device__ __forceinline__ void load_weights(Gates* weights, const void* packed, const RnnShape& s,
                                             const Place<kBlocks>& place) {
  const int units = Share(s.hidden, kBlocks).units;
  const auto* from = static_cast<const Gates*>(packed) + int64_t(place.direction) * s.hidden * s.hidden;
  for (int i = threadIdx.x; i < s.hidden * units; i += blockDim.x) {
    const int unit = place.first_unit + i % units;
    if (unit < s.hidden) weights[i] = from[i / units * s.hidden + unit];
  }
}

template <typename Cell, typename T, int kBlocks>
__global__ void __launch_bounds__(kMaxThreads<kBlocks>, 1) rnn_resident_forward(RnnForward p) {
  using Gates = Pack<T, Cell::kGates>;
  using Rows = Pack<T, kGroupRows>;
  const RnnShape s = p.shape;
  const Place<kBlocks> place(s);
  const int hidden = s.hidden, direction = place.direction, row = place.row, unit = place.unit;
  const int lane = place.lane, units = Share(hidden, kBlocks).units, part = ceil_div(hidden, kGroupRows);
  const int k_begin = min(hidden, lane * part), k_end = min(hidden, k_begin + part);
  const Steps steps(s, row - lane, direction);

  auto* h = shared_memory<Rows>();                                   // [2][hidden], all rows
  auto* partial = pack_at<Gates>(h + 2 * hidden);                    // [part][row][unit]
  auto* weights = partial + kGroupRows * kGroupRows * place.padded;  // [hidden][units]
  load_weights(weights, p.packed, s, place);
  for (int i = threadIdx.x; i < hidden * kGroupRows; i += blockDim.x) {
    const int k = i % hidden, r = i / hidden, n = row - lane + r;
    const bool there = n < s.batch && !Moment(s, direction, steps.begin, n).cut;
    h[steps.begin % 2 * hidden + k].v[r] =
        there ? load_or_zero<T, T>(p.h_0, state_at(s, direction, n, k)) : T(0);
    h[(steps.begin + 1) % 2 * hidden + k].v[r] = T(0);  // rows past the batch stay so
  }

  State<T> state = {0, 0};
  Values<T, Cell::kParts> bias{};
  if (place.active) {
    state = load_state<Cell, T, T>(s, p.h_0, p.c_0, direction, row, unit);
    add_biases<Cell, T, T>(bias, p.bias_ih[direction], p.bias_hh[direction], unit, hidden);
  }
  group_barrier<kBlocks>();  // weights and h are there, and every block of the group has begun

  for (int step = steps.begin; step < steps.end; ++step) {
    const Rows* h_old = h + step % 2 * hidden;
    const Moment now = place.active ? Moment(s, direction, step, row) : Moment();
    Values<T, Cell::kParts> a = bias;
    if (now.runs) add_gates_x<Cell, T, T>(a, p, direction, now.row, unit);
    if (place.owns_unit) {
      Gates sum[kGroupRows] = {};
      for (int k = k_begin; k < k_end; ++k) {
        const Gates w = weights[k * units + place.local_unit];
        const Rows old = h_old[k];
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r)
#pragma unroll
          for (int gate = 0; gate < Cell::kGates; ++gate) sum[r].v[gate] += w.v[gate] * old.v[r];
      }
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r)
        partial[(lane * kGroupRows + r) * place.padded + place.local_unit] = sum[r];
    }
    block_barrier();  // partial sums are complete
    if (place.active) {
      if (now.runs) {
#pragma unroll
        for (int i = 0; i < kGroupRows; ++i)
          add_state<Cell>(a, partial[(i * kGroupRows + lane) * place.padded + place.local_unit]);
        Values<T, Cell::kKept> kept{};
        state = Cell::forward(a, now.cut ? State<T>{0, 0} : state, kept);
        store_step<Cell, T>(p, state, kept, direction, now.row, unit);
      }
      // Nothing is sent in the last step: a block may have returned by then.
      if (step + 1 < steps.end) {
        const bool cut = Moment(s, direction, step + 1, row).cut;
        give_to_group<kBlocks>(&h[(step + 1) % 2 * hidden + unit].v[lane], cut ? T(0) : state.h);
      }
    }
    if (step + 1 < steps.end) group_barrier<kBlocks>();  // the new h is complete, partial sums have been read
  }
  if (place.active) store_state<Cell, T>(s, state, p.h_n, p.c_n, direction, row, unit);
}

template <typename Cell, typename T, int kBlocks>
__global__ void __launch_bounds__(kMaxThreads<kBlocks>, 1) rnn_resident_backward(RnnBackward p) {
  using Gates = Pack<T, Cell::kGates>;
  const RnnShape s = p.shape;
  const Place<kBlocks> place(s);
  const int hidden = s.hidden, direction = place.direction, row = place.row, unit = place.unit;
  const int lane = place.lane, units = Share(hidden, kBlocks).units, part = ceil_div(hidden, kGroupRows);
  const int j_begin = min(hidden, lane * part), j_end = min(hidden, j_begin + part);
  const Steps steps(s, row - lane, direction);

  auto* grad = shared_memory<Gates>();                   // [2][hidden][row]
  auto* weights = grad + 2 * hidden * kGroupRows;        // [hidden][units]
  auto* partial = pack_at<T>(weights + hidden * units);  // [part][row][unit]
  load_weights(weights, p.packed, s, place);

  State<T> grad_now = {0, 0};
  if (place.active) grad_now = load_state<Cell, T, T>(s, p.grad_h_n, p.grad_c_n, direction, row, unit);
  if constexpr (kBlocks > 1) cluster_barrier();  // every block of the group has begun

  for (int step = steps.end - 1; step >= steps.begin; --step) {
    Gates* gates_now = grad + step % 2 * hidden * kGroupRows;
    if (place.owns_unit) {
      Gates gates{};
      const Moment now = place.active ? Moment(s, direction, step, row) : Moment();
      if (now.runs) {
        Values<T, Cell::kParts> d;
        grad_now = step_gradients<Cell, T, T>(p, now, load_step<Cell, T, T>(p, now, direction, row, unit),
                                              direction, unit, grad_now, d);
        if (!now.cut) gates = state_gates<Cell>(d);
      }
      give_to_group<kBlocks>(&gates_now[unit * kGroupRows + lane], gates);
    }
    group_barrier<kBlocks>();  // the gates' gradients are complete, partial sums have been read
    if (place.owns_unit) {
      T sum[kGroupRows] = {};
      for (int j = j_begin; j < j_end; ++j) {
        const Gates w = weights[j * units + place.local_unit];
#pragma unroll
        for (int r = 0; r < kGroupRows; ++r) {
          const Gates g = gates_now[j * kGroupRows + r];
#pragma unroll
          for (int gate = 0; gate < Cell::kGates; ++gate) sum[r] += w.v[gate] * g.v[gate];
        }
      }
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r)
        partial[(lane * kGroupRows + r) * place.padded + place.local_unit] = sum[r];
    }
    block_barrier();  // partial sums are complete
    if (place.active)
      for (int i = 0; i < kGroupRows; ++i)
        grad_now.h += partial[(i * kGroupRows + lane) * place.padded + place.local_unit];
  }
  if (place.active) store_state<Cell, T>(s, grad_now, p.grad_h_0, p.grad_c_0, direction, row, unit);
}

// ---- launchers ----
template <typename Cell, typename T, int kBlocks, bool kForward>
struct Resident {
  static size_t shared_bytes(int hidden) {
    const Share share(hidden, kBlocks);
    const size_t exchanged = size_t(2) * kGroupRows * hidden * (kForward ? 1 : Cell::kGates);
    const size_t partial = size_t(kGroupRows) * kGroupRows * share.padded * (kForward ? Cell::kGates : 1);
    return sizeof(T) * (exchanged + partial + size_t(Cell::kGates) * hidden * share.units);
  }
  static auto kernel() {
    if constexpr (kForward)
      return rnn_resident_forward<Cell, T, kBlocks>;
    else
      return rnn_resident_backward<Cell, T, kBlocks>;
  }
  static unsigned threads(int hidden) { return Share(hidden, kBlocks).padded * kGroupRows; }

  static bool fits(int hidden) {
    const size_t shared = shared_bytes(hidden);
    if (Share(hidden, kBlocks).units > kMaxUnits<kBlocks> || shared > shared_memory_limit()) return false;
    return kBlocks == 1 || clusters_fit(kernel(), kBlocks, threads(hidden), shared);
  }
  static dim3 grid(const RnnShape& s) {
    return dim3(grid_size(int64_t(ceil_div(s.batch, kGroupRows)) * kBlocks), s.directions);
  }
  static bool at_once(const RnnShape& s) {
    const dim3 all = grid(s);
    return all.x * all.y <= blocks_at_once(kernel(), threads(s.hidden), shared_bytes(s.hidden));
  }
  template <typename Params>
  static void run(const Params& p, void* stream) {
    const RnnShape& s = p.shape;
    pack_weights<T, Cell::kGates, kForward>(s, p.weight_hh, p.packed, stream);
    launch_clusters(kernel(), grid(s), kBlocks, threads(s.hidden), shared_bytes(s.hidden), stream, p);
  }
};

}  // namespace
}  // namespace cnnrnn::cuda
