// The recurrent cells as the kernels see them: how many numbers a unit has, and what one unit does in one
// step. The arithmetic is that of csrc/*_gates.h, which the CPU kernels use too.
#pragma once

#include <math.h>

#include "elman_gates.h"
#include "gru_gates.h"
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
  // NaN stays NaN, in the gradient too.
  template <typename A>
  static __device__ __forceinline__ A relu(A a) {
    return a <= 0 ? A(0) : a;
  }
  template <typename A>
  static __device__ __forceinline__ A relu_gradient(A h, A dh) {
    return h <= 0 ? A(0) : dh;
  }
};

// One unit's state; c is zero where the cell has none.
template <typename A>
struct State {
  A h, c;
};

// A few numbers of one unit; an array, also where there is none.
template <typename A, int kCount>
using Values = Pack<A, (kCount > 0 ? kCount : 1)>;

// forward: the state after a step, and what is kept. backward: the gradients of the pre-activations (d), and
// of the state before (returned) but for its way through the product; grad is the whole gradient of `after`.
struct LstmUnit {
  static constexpr int kGates = 4, kJoint = 4, kParts = 4, kKept = 4;
  static constexpr bool kHasC = true, kBlends = false;

  template <typename A>
  static __device__ __forceinline__ State<A> forward(const Values<A, 4>& a, const State<A>& before,
                                                     Values<A, 4>& kept) {
    const LstmGates<A> y = lstm_activate<GateMath>(LstmGates<A>{a.v[0], a.v[1], a.v[2], a.v[3]});
    kept = {{y.i, y.f, y.g, y.o}};
    const LstmState<A> state = lstm_update<GateMath>(y, before.c);
    return {state.h, state.c};
  }

  template <typename A>
  static __device__ __forceinline__ State<A> backward(const Values<A, 4>& kept, const State<A>& before,
                                                      const State<A>& after, const State<A>& grad,
                                                      Values<A, 4>& d) {
    const LstmGates<A> y = {kept.v[0], kept.v[1], kept.v[2], kept.v[3]};
    const LstmGradients<A> g = lstm_backward<GateMath>(y, after.c, before.c, grad.h, grad.c);
    d = {{g.a.i, g.a.f, g.a.g, g.a.o}};
    return {A(0), g.c_prev};
  }
};

struct GruUnit {
  static constexpr int kGates = 3, kJoint = 2, kParts = 4, kKept = 4;
  static constexpr bool kHasC = false, kBlends = true;

  template <typename A>
  static __device__ __forceinline__ State<A> forward(const Values<A, 4>& a, const State<A>& before,
                                                     Values<A, 4>& kept) {
    const GruGates<A> y = gru_activate<GateMath>(GruGates<A>{a.v[0], a.v[1], a.v[2], a.v[3]});
    kept = {{y.r, y.z, y.n, y.n_h}};
    return {gru_update(y, before.h), A(0)};
  }

  template <typename A>
  static __device__ __forceinline__ State<A> backward(const Values<A, 4>& kept, const State<A>& before,
                                                      const State<A>&, const State<A>& grad,
                                                      Values<A, 4>& d) {
    const GruGates<A> y = {kept.v[0], kept.v[1], kept.v[2], kept.v[3]};
    const GruGradients<A> g = gru_backward(y, before.h, grad.h);
    d = {{g.r, g.z, g.n_x, g.n_h}};
    return {g.h_prev, A(0)};
  }
};

template <typename Activation>
struct ElmanUnit {
  static constexpr int kGates = 1, kJoint = 1, kParts = 1, kKept = 0;
  static constexpr bool kHasC = false, kBlends = false;

  template <typename A>
  static __device__ __forceinline__ State<A> forward(const Values<A, 1>& a, const State<A>&, Values<A, 0>&) {
    return {Activation::template activate<GateMath>(a.v[0]), A(0)};
  }

  template <typename A>
  static __device__ __forceinline__ State<A> backward(const Values<A, 0>&, const State<A>&,
                                                      const State<A>& after, const State<A>& grad,
                                                      Values<A, 1>& d) {
    d = {{Activation::template backward<GateMath>(after.h, grad.h)}};
    return {A(0), A(0)};
  }
};

// The part that gate g of the state's product is added to.
template <typename Cell>
__host__ __device__ constexpr int part_of_gate(int gate) {
  return gate < Cell::kJoint ? gate : Cell::kGates + gate - Cell::kJoint;
}

// Calls function with a value of the cell's type.
template <typename Function>
auto with_cell(RnnCell cell, const Function& function) {
  switch (cell) {
    case RnnCell::kLstm:
      return function(LstmUnit{});
    case RnnCell::kGru:
      return function(GruUnit{});
    case RnnCell::kRnnTanh:
      return function(ElmanUnit<ElmanTanh>{});
    default:
      return function(ElmanUnit<ElmanRelu>{});
  }
}

}  // namespace
}  // namespace cnnrnn::cuda
