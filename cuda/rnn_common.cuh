// What the recurrent kernels share: where a step of a row stands in time and in memory, the loads and stores
// of one unit at one step, and the packing of the weights.
#pragma once

#include "rnn_units.cuh"

namespace cnnrnn::cuda {
namespace {

// Direction 1 runs backward in time.
__device__ __forceinline__ int time_of(const RnnShape& s, int step, int direction) {
  return direction == 0 ? step : s.steps - 1 - step;
}

__device__ __forceinline__ int64_t row_at(const RnnShape& s, int time, int n) {
  return (s.offsets ? s.offsets[time] : int64_t(time) * s.batch) + n;
}

// The host does not look at lengths, so that it need not wait for them: here they are kept in bounds.
__device__ __forceinline__ int length_of(const RnnShape& s, int n) {
  return s.lengths ? static_cast<int>(min(max(s.lengths[n], int64_t(0)), int64_t(s.steps))) : s.steps;
}

// Batch row n at one step of a direction.
struct Moment {
  int64_t row = 0;  // of x
  int64_t row_before = 0;
  bool runs = false;   // the step is part of the sequence; what follows is said of such steps only
  bool first = false;  // it starts from h_0, and not from the output at row_before
  bool last = false;   // it makes h_n
  bool cut = false;    // it starts from a state of zero
  __device__ __forceinline__ Moment() {}
  __device__ __forceinline__ Moment(const RnnShape& s, int direction, int step, int n) {
    const int length = length_of(s, n), time = time_of(s, step, direction);
    runs = time >= 0 && time < length;
    if (!runs) return;
    row = row_at(s, time, n);
    const int time_before = direction == 0 ? time - 1 : time + 1;
    first = time_before < 0 || time_before == length;
    if (!first) row_before = row_at(s, time_before, n);
    last = time == (direction == 0 ? length - 1 : 0);
    const int border = direction == 0 ? time : time + 1;  // a flag stands at the later of two times
    cut = s.reset && border < length && s.reset[row_at(s, border, n)];
  }
};

// Element (row, unit) of a state [D, N, H]; of output and cells [R, D*H]; of gate 0 of [R, count*H]; of the
// first value in the reserve [D, R, K, H].
__device__ __forceinline__ int64_t state_at(const RnnShape& s, int direction, int n, int unit) {
  return (int64_t(direction) * s.batch + n) * s.hidden + unit;
}
__device__ __forceinline__ int64_t output_at(const RnnShape& s, int64_t row, int direction, int unit) {
  return (row * s.directions + direction) * s.hidden + unit;
}
__device__ __forceinline__ int64_t gates_at(const RnnShape& s, int64_t row, int count, int unit) {
  return row * count * s.hidden + unit;
}
__device__ __forceinline__ int64_t reserve_at(const RnnShape& s, int direction, int64_t row, int kept,
                                              int unit) {
  return (direction * s.rows + row) * kept * s.hidden + unit;
}

template <typename A, typename T>
__device__ __forceinline__ A load_or_zero(const void* data, int64_t index) {
  return data ? A(widen(static_cast<const T*>(data)[index])) : A(0);
}

template <typename T, typename A>
__device__ __forceinline__ void store(const A& value, void* data, int64_t index) {
  static_cast<T*>(data)[index] = narrow_to<T>(value);
}

// Values of one unit: value i stands at data[index + i * hidden].
template <int kCount, typename A, typename T>
__device__ __forceinline__ Values<A, kCount> load_values(const void* data, int64_t index, int hidden) {
  Values<A, kCount> values{};
#pragma unroll
  for (int i = 0; i < kCount; ++i) values.v[i] = load_or_zero<A, T>(data, index + int64_t(i) * hidden);
  return values;
}

template <int kCount, typename T, typename A>
__device__ __forceinline__ void store_values(const Values<A, kCount>& values, void* data, int64_t index,
                                             int hidden) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) store<T>(values.v[i], data, index + int64_t(i) * hidden);
}

// Adds the input's gates, or the state's, to the pre-activations.
template <typename Cell, typename A>
__device__ __forceinline__ void add_input(Values<A, Cell::kParts>& a, const Values<A, Cell::kGates>& x) {
#pragma unroll
  for (int gate = 0; gate < Cell::kGates; ++gate) a.v[gate] += x.v[gate];
}
template <typename Cell, typename A>
__device__ __forceinline__ void add_state(Values<A, Cell::kParts>& a, const Values<A, Cell::kGates>& h) {
#pragma unroll
  for (int gate = 0; gate < Cell::kGates; ++gate) a.v[part_of_gate<Cell>(gate)] += h.v[gate];
}

// The gradients of the state's gates among those of the parts.
template <typename Cell, typename A>
__device__ __forceinline__ Values<A, Cell::kGates> state_gates(const Values<A, Cell::kParts>& d) {
  Values<A, Cell::kGates> gates;
#pragma unroll
  for (int gate = 0; gate < Cell::kGates; ++gate) gates.v[gate] = d.v[part_of_gate<Cell>(gate)];
  return gates;
}

template <typename Cell, typename A, typename T>
__device__ __forceinline__ void add_biases(Values<A, Cell::kParts>& a, const void* bias_ih,
                                           const void* bias_hh, int unit, int hidden) {
  add_input<Cell>(a, load_values<Cell::kGates, A, T>(bias_ih, unit, hidden));
  add_state<Cell>(a, load_values<Cell::kGates, A, T>(bias_hh, unit, hidden));
}

template <typename Cell, typename A, typename T>
__device__ __forceinline__ void add_gates_x(Values<A, Cell::kParts>& a, const RnnForward& p, int direction,
                                            int64_t row, int unit) {
  const int64_t at = gates_at(p.shape, row, Cell::kGates, unit);
  add_input<Cell>(a, load_values<Cell::kGates, A, T>(p.gates_x[direction], at, p.shape.hidden));
}

template <typename Cell, typename A, typename T>
__device__ __forceinline__ State<A> load_state(const RnnShape& s, const void* h, const void* c, int direction,
                                               int n, int unit) {
  const int64_t at = state_at(s, direction, n, unit);
  return {load_or_zero<A, T>(h, at), Cell::kHasC ? load_or_zero<A, T>(c, at) : A(0)};
}

template <typename Cell, typename T, typename A>
__device__ __forceinline__ void store_state(const RnnShape& s, const State<A>& state, void* h, void* c,
                                            int direction, int n, int unit) {
  const int64_t at = state_at(s, direction, n, unit);
  store<T>(state.h, h, at);
  if constexpr (Cell::kHasC) store<T>(state.c, c, at);
}

// What a step leaves: its h, and where the backward will want them its c and what the cell keeps.
template <typename Cell, typename T, typename A>
__device__ __forceinline__ void store_step(const RnnForward& p, const State<A>& state,
                                           const Values<A, Cell::kKept>& kept, int direction, int64_t row,
                                           int unit) {
  const RnnShape& s = p.shape;
  const int64_t at = output_at(s, row, direction, unit);
  store<T>(state.h, p.output, at);
  if constexpr (Cell::kHasC)
    if (p.cells) store<T>(state.c, p.cells, at);
  if constexpr (Cell::kKept > 0)
    if (p.reserve)
      store_values<Cell::kKept, T>(kept, p.reserve, reserve_at(s, direction, row, Cell::kKept, unit),
                                   s.hidden);
}

// What the forward pass left of one step, and the gradients that enter there.
template <typename Cell, typename A>
struct StepMade {
  Values<A, Cell::kKept> kept;
  State<A> before, after, grad;
};

template <typename Cell, typename A, typename T>
__device__ __forceinline__ StepMade<Cell, A> load_step(const RnnBackward& p, const Moment& now, int direction,
                                                       int n, int unit) {
  const RnnShape& s = p.shape;
  const int64_t at = output_at(s, now.row, direction, unit);
  const auto load_pair = [&](const void* h, const void* c, int64_t index) -> State<A> {
    return {load_or_zero<A, T>(h, index), Cell::kHasC ? load_or_zero<A, T>(c, index) : A(0)};
  };
  StepMade<Cell, A> made;
  made.kept = load_values<Cell::kKept, A, T>(p.reserve, reserve_at(s, direction, now.row, Cell::kKept, unit),
                                             s.hidden);
  made.before = {0, 0};
  if (!now.cut)
    made.before = now.first ? load_state<Cell, A, T>(s, p.h_0, p.c_0, direction, n, unit)
                            : load_pair(p.output, p.cells, output_at(s, now.row_before, direction, unit));
  made.after = load_pair(p.output, p.cells, at);
  made.grad = load_pair(p.grad_output, p.grad_cells, at);
  return made;
}

// One step of the backward pass of a row that runs. grad: the gradient of its state but for grad_output and
// grad_cells. d: that of its parts, which is also stored. Returns what reaches the state before, but for the
// way through the product.
template <typename Cell, typename A, typename T>
__device__ __forceinline__ State<A> step_gradients(const RnnBackward& p, const Moment& now,
                                                   const StepMade<Cell, A>& made, int direction, int unit,
                                                   const State<A>& grad, Values<A, Cell::kParts>& d) {
  const State<A> whole = {grad.h + made.grad.h, grad.c + made.grad.c};
  const State<A> direct = Cell::backward(made.kept, made.before, made.after, whole, d);
  store_values<Cell::kParts, T>(d, p.grad_parts[direction], gates_at(p.shape, now.row, Cell::kParts, unit),
                                p.shape.hidden);
  return now.cut ? State<A>{0, 0} : direct;
}

struct WeightPointers {
  const void* direction[2];
};

// packed T [D][H][H][G]. Forward sums over the old state k and backward over the unit j:
//   forward  packed[k][j][gate] = weight_hh[gate * H + j][k]
//   backward packed[j][k][gate] = weight_hh[gate * H + j][k]
// so that neighbouring threads read neighbouring groups of gates.
constexpr int kPackThreads = 256;

template <typename T, int kGates, bool kForward>
__global__ void __launch_bounds__(kPackThreads)
    rnn_pack_weights(WeightPointers weights, int hidden, T* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t matrix = int64_t(hidden) * hidden;
  if (index >= matrix) return;
  const int64_t j = kForward ? index % hidden : index / hidden;
  const int64_t k = kForward ? index / hidden : index % hidden;
  const T* weight = static_cast<const T*>(weights.direction[blockIdx.y]);
  Pack<T, kGates> gates;
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) gates.v[gate] = weight[gate * matrix + j * hidden + k];
  reinterpret_cast<Pack<T, kGates>*>(packed)[blockIdx.y * matrix + index] = gates;
}

template <typename T, int kGates, bool kForward>
void pack_weights(const RnnShape& s, const void* const weight_hh[2], void* packed, void* stream) {
  const int64_t blocks = ceil_div(int64_t(s.hidden) * s.hidden, int64_t(kPackThreads));
  launch(rnn_pack_weights<T, kGates, kForward>, dim3(grid_size(blocks), s.directions), kPackThreads, 0,
         stream, WeightPointers{{weight_hh[0], weight_hh[1]}}, s.hidden, static_cast<T*>(packed));
}

}  // namespace
}  // namespace cnnrnn::cuda
