// What the LSTM kernels share: addresses of states, gates and reserve, and the packing of the weights.
#pragma once

#include <math.h>

#include "lstm_gates.h"
#include "primitives.cuh"
#include "rnn.h"

namespace cnnrnn::cuda {
namespace {

// The functions the gates are made of, correct to a few units in the last place.
struct GateMath {
  static __device__ __forceinline__ float sigmoid(float a) { return 1.0f / (1.0f + expf(-a)); }
  static __device__ __forceinline__ double sigmoid(double a) { return 1.0 / (1.0 + exp(-a)); }
  static __device__ __forceinline__ float tanh(float a) { return tanhf(a); }
  static __device__ __forceinline__ double tanh(double a) { return ::tanh(a); }
};

// Direction 1 runs backward in time.
__device__ __forceinline__ int time_of(const LstmShape& s, int step, int direction) {
  return direction == 0 ? step : s.steps - 1 - step;
}

// Element (row, unit) of a state [D, N, H], of output and cells [T, N, D*H], and of gate 0 of gates
// [T, N, 4*H].
__device__ __forceinline__ int64_t state_at(const LstmShape& s, int direction, int row, int unit) {
  return (int64_t(direction) * s.batch + row) * s.hidden + unit;
}
__device__ __forceinline__ int64_t output_at(const LstmShape& s, int time, int row, int direction, int unit) {
  return ((int64_t(time) * s.batch + row) * s.directions + direction) * s.hidden + unit;
}
__device__ __forceinline__ int64_t gates_at(const LstmShape& s, int time, int row, int unit) {
  return (int64_t(time) * s.batch + row) * 4 * s.hidden + unit;
}
// Of gate i in the reserve [D, T, N, 4, H]; f, g and o follow, H elements apart.
__device__ __forceinline__ int64_t reserve_at(const LstmShape& s, int direction, int time, int row,
                                              int unit) {
  return ((int64_t(direction) * s.steps + time) * s.batch + row) * 4 * s.hidden + unit;
}

template <typename A, typename T>
__device__ __forceinline__ A load_or_zero(const void* data, int64_t index) {
  return data ? A(widen(static_cast<const T*>(data)[index])) : A(0);
}

// The sum of four gates' addends of one unit: gate g stands at data[index + g * hidden].
template <typename A, typename T>
__device__ __forceinline__ void add_gates(LstmGates<A>& a, const void* data, int64_t index, int hidden) {
  a.i += load_or_zero<A, T>(data, index);
  a.f += load_or_zero<A, T>(data, index + hidden);
  a.g += load_or_zero<A, T>(data, index + 2 * int64_t(hidden));
  a.o += load_or_zero<A, T>(data, index + 3 * int64_t(hidden));
}

template <typename T, typename A>
__device__ __forceinline__ void store(const A& value, void* data, int64_t index) {
  static_cast<T*>(data)[index] = narrow_to<T>(value);
}

template <typename T, typename A>
__device__ __forceinline__ void store_gates(const LstmGates<A>& a, void* data, int64_t index, int hidden) {
  T* out = static_cast<T*>(data) + index;
  out[0] = narrow_to<T>(a.i);
  out[hidden] = narrow_to<T>(a.f);
  out[2 * int64_t(hidden)] = narrow_to<T>(a.g);
  out[3 * int64_t(hidden)] = narrow_to<T>(a.o);
}

// What a step leaves: its h, and where the backward will want them its gates and its c.
template <typename T, typename A>
__device__ __forceinline__ void store_step(const LstmForward& p, const LstmGates<A>& gates,
                                           const LstmState<A>& state, int direction, int time, int row,
                                           int unit) {
  const LstmShape& s = p.shape;
  const int64_t at = output_at(s, time, row, direction, unit);
  store<T>(state.h, p.output, at);
  if (p.cells) store<T>(state.c, p.cells, at);
  if (p.reserve) store_gates<T>(gates, p.reserve, reserve_at(s, direction, time, row, unit), s.hidden);
}

template <typename T, typename A>
__device__ __forceinline__ void store_last(const LstmForward& p, A h, A c, int direction, int row, int unit) {
  const int64_t at = state_at(p.shape, direction, row, unit);
  store<T>(h, p.h_n, at);
  store<T>(c, p.c_n, at);
}

// The cell state before a step of the forward pass.
template <typename A, typename T>
__device__ __forceinline__ A cell_before(const LstmBackward& p, int step, int direction, int row, int unit) {
  const LstmShape& s = p.shape;
  if (step == 0) return load_or_zero<A, T>(p.c_0, state_at(s, direction, row, unit));
  return load_or_zero<A, T>(p.cells, output_at(s, time_of(s, step - 1, direction), row, direction, unit));
}

// One step of the backward pass; its gates' gradients are also stored. dh and dc come from the step after it.
template <typename A, typename T>
__device__ __forceinline__ LstmGradients<A> step_gradients(const LstmBackward& p, int step, int direction,
                                                           int row, int unit, A dh, A dc) {
  const LstmShape& s = p.shape;
  const int time = time_of(s, step, direction);
  const int64_t at = output_at(s, time, row, direction, unit);
  LstmGates<A> gates{0, 0, 0, 0};
  add_gates<A, T>(gates, p.reserve, reserve_at(s, direction, time, row, unit), s.hidden);
  const LstmGradients<A> d = lstm_backward<GateMath>(
      gates, load_or_zero<A, T>(p.cells, at), cell_before<A, T>(p, step, direction, row, unit),
      dh + load_or_zero<A, T>(p.grad_output, at), dc + load_or_zero<A, T>(p.grad_cells, at));
  store_gates<T>(d.a, p.grad_gates[direction], gates_at(s, time, row, unit), s.hidden);
  return d;
}

struct WeightPointers {
  const void* direction[2];
};

// packed [D][H][H][4 gates] of A. Forward sums over the old state k and backward over the unit j:
//   forward  packed[k][j][gate] = weight_hh[gate * H + j][k]
//   backward packed[j][k][gate] = weight_hh[gate * H + j][k]
// so that neighbouring threads read neighbouring groups of four gates.
constexpr int kPackThreads = 256;

template <typename T, bool kForward>
__global__ void __launch_bounds__(kPackThreads)
    lstm_pack_weights(WeightPointers weights, int hidden, Accumulator<T>* packed) {
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int64_t matrix = int64_t(hidden) * hidden;
  if (index >= matrix) return;
  const int64_t j = kForward ? index % hidden : index / hidden;
  const int64_t k = kForward ? index / hidden : index % hidden;
  const T* weight = static_cast<const T*>(weights.direction[blockIdx.y]);
  Pack<Accumulator<T>, 4> gates;
#pragma unroll
  for (int gate = 0; gate < 4; ++gate) gates.v[gate] = widen(weight[gate * matrix + j * hidden + k]);
  reinterpret_cast<Pack<Accumulator<T>, 4>*>(packed)[blockIdx.y * matrix + index] = gates;
}

template <typename T, bool kForward>
void pack_weights(const LstmShape& s, const void* const weight_hh[2], void* packed, void* stream) {
  const int64_t blocks = ceil_div(int64_t(s.hidden) * s.hidden, int64_t(kPackThreads));
  launch(lstm_pack_weights<T, kForward>, dim3(grid_size(blocks), s.directions), kPackThreads, 0, stream,
         WeightPointers{{weight_hh[0], weight_hh[1]}}, s.hidden, static_cast<Accumulator<T>*>(packed));
}

}  // namespace
}  // namespace cnnrnn::cuda
