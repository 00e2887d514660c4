// The arithmetic of one LSTM unit, forward and backward, for every kernel: V is a float or double on a GPU
// and a SIMD vector on a CPU; Math::sigmoid(V) and Math::tanh(V) come with the kernel.
// Gate order i, f, g, o, as torch's (nn.LSTM):
//   i, f, o = sigmoid(a_i, a_f, a_o)   g = tanh(a_g)   c = f * c_prev + i * g   h = o * tanh(c)
#pragma once

#include "gates_inline.h"

namespace {

template <typename V>
struct LstmGates {
  V i, f, g, o;
};

template <typename V>
struct LstmState {
  V c, h;
};

// Pre-activations to activated gates.
template <typename Math, typename V>
CNNRNN_GATES_INLINE LstmGates<V> lstm_activate(const LstmGates<V>& a) {
  return {Math::sigmoid(a.i), Math::sigmoid(a.f), Math::tanh(a.g), Math::sigmoid(a.o)};
}

template <typename Math, typename V>
CNNRNN_GATES_INLINE LstmState<V> lstm_update(const LstmGates<V>& gates, const V& c_prev) {
  const V c = gates.f * c_prev + gates.i * gates.g;
  return {c, gates.o * Math::tanh(c)};
}

template <typename V>
struct LstmGradients {
  LstmGates<V> a;  // of the pre-activations
  V c_prev;
};

// dh: the whole gradient of h. dc: the gradient of c that comes from the next step, not through h.
template <typename Math, typename V>
CNNRNN_GATES_INLINE LstmGradients<V> lstm_backward(const LstmGates<V>& gates, const V& c, const V& c_prev,
                                                   const V& dh, const V& dc) {
  const V t = Math::tanh(c);
  const V dc_all = dc + dh * gates.o * (1 - t * t);
  LstmGradients<V> d;
  d.a.i = dc_all * gates.g * gates.i * (1 - gates.i);
  d.a.f = dc_all * c_prev * gates.f * (1 - gates.f);
  d.a.g = dc_all * gates.i * (1 - gates.g * gates.g);
  d.a.o = dh * t * gates.o * (1 - gates.o);
  d.c_prev = dc_all * gates.f;
  return d;
}

}  // namespace
