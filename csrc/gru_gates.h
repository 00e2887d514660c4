// The arithmetic of one GRU unit, forward and backward, for every kernel; see lstm_gates.h for V and Math.
// Gate order r, z, n, as torch's (nn.GRU). n_x and n_h are the input's and the state's part of n:
//   r, z = sigmoid(a_r, a_z)   n = tanh(n_x + r * n_h)   h = (1 - z) * n + z * h_prev
#pragma once

#include "gates_inline.h"

namespace {

template <typename V>
struct GruGates {
  V r, z, n, n_h;
};

// Pre-activations (n_x in the place of n) to activated gates.
template <typename Math, typename V>
CNNRNN_GATES_INLINE GruGates<V> gru_activate(const GruGates<V>& a) {
  const V r = Math::sigmoid(a.r);
  return {r, Math::sigmoid(a.z), Math::tanh(a.n + r * a.n_h), a.n_h};
}

template <typename V>
CNNRNN_GATES_INLINE V gru_update(const GruGates<V>& gates, const V& h_prev) {
  return gates.n + gates.z * (h_prev - gates.n);
}

template <typename V>
struct GruGradients {
  V r, z, n_x, n_h;  // of the pre-activations
  V h_prev;          // the part that does not come through them
};

template <typename V>
CNNRNN_GATES_INLINE GruGradients<V> gru_backward(const GruGates<V>& gates, const V& h_prev, const V& dh) {
  GruGradients<V> d;
  d.n_x = dh * (1 - gates.z) * (1 - gates.n * gates.n);
  d.n_h = d.n_x * gates.r;
  d.r = d.n_x * gates.n_h * gates.r * (1 - gates.r);
  d.z = dh * (h_prev - gates.n) * gates.z * (1 - gates.z);
  d.h_prev = dh * gates.z;
  return d;
}

}  // namespace
