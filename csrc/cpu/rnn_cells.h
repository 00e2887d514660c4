// The recurrent cells on vectors of hidden units: what one row of a tile does between its product and memory.
//
// A cell has kGates rows of weights per unit and kParts pre-activations: its first kJoint gates add up the
// input's and the state's products, the rest keep the state's apart, as a part of its own at the end.
// A forward panel holds kUnitVectors vectors of units. The reserve keeps kKept values per unit.
#pragma once

#include "../elman_gates.h"
#include "../gru_gates.h"
#include "../lstm_gates.h"
#include "rnn_tile.h"
#include "vmath.h"

namespace {

using cnnrnn::RnnBackwardStep;
using cnnrnn::RnnForwardStep;

// `n` hidden units of a row, from `unit` on.
struct Units {
  int64_t row, unit, n;
};

template <typename T, int Count>
CNNRNN_INLINE void store_parts(T* to, int64_t hidden, int64_t n, const Vec<T> (&parts)[Count]) {
  for (int p = 0; p < Count; ++p) store_n(to + p * hidden, parts[p], n);
}

template <typename T>
CNNRNN_INLINE Vec<T> load_state(const cnnrnn::StateRows<T>& s, const Units& at) {
  return load_n(state_row(s, at.row) + at.unit, at.n);
}

// The gradient that a step hands to the one before it, by way of `carry`: none to a row it did not read.
template <typename T>
CNNRNN_INLINE void store_carry(const RnnBackwardStep<T>& s, const cnnrnn::StateRows<T>& state,
                               const Units& at, const Vec<T>& value) {
  store_n(s.carry + at.row * s.carry_stride + at.unit, is_reset(state, at.row) ? Vec<T>{} : value, at.n);
}

template <typename T>
CNNRNN_INLINE const T* kept_at(const RnnBackwardStep<T>& s, const Units& at) {
  return s.kept + at.row * s.kept_stride + at.unit;
}

template <typename T>
CNNRNN_INLINE Vec<T> load_carry(const RnnBackwardStep<T>& s, const Units& at) {
  return load_n(s.carry + at.row * s.carry_stride + at.unit, at.n);
}

struct LstmUnits {
  static constexpr int kGates = 4, kJoint = 4, kParts = 4, kKept = 4, kUnitVectors = 1;
  static constexpr bool kHasC = true, kHasCarry = true;

  template <typename T>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const Units& at, const Vec<T> (&a)[kParts]) {
    const LstmGates<Vec<T>> y = lstm_activate<VectorMath>(LstmGates<Vec<T>>{a[0], a[1], a[2], a[3]});
    const LstmState<Vec<T>> state = lstm_update<VectorMath>(y, load_state(s.c, at));
    if (s.kept)
      store_parts<T, kKept>(s.kept + at.row * s.kept_stride + at.unit, s.hidden, at.n, {y.i, y.f, y.g, y.o});
    store_n(s.c_out + at.row * s.c_out_stride + at.unit, state.c, at.n);
    store_n(s.h_out + at.row * s.h_out_stride + at.unit, state.h, at.n);
  }

  template <typename T>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const Units& at, const Vec<T>& dh) {
    const T* kept = kept_at(s, at);
    const LstmGates<Vec<T>> y = {load_n(kept, at.n), load_n(kept + s.hidden, at.n),
                                 load_n(kept + 2 * s.hidden, at.n), load_n(kept + 3 * s.hidden, at.n)};
    Vec<T> dc = load_carry(s, at);
    if (s.dc_1) dc += load_n(s.dc_1 + at.row * s.dc_1_stride + at.unit, at.n);
    const Vec<T> c = load_n(s.c_now + at.row * s.c_now_stride + at.unit, at.n);
    const LstmGradients<Vec<T>> d = lstm_backward<VectorMath>(y, c, load_state(s.c, at), dh, dc);
    store_parts<T, kParts>(s.d + at.row * s.d_stride + at.unit, s.hidden, at.n, {d.a.i, d.a.f, d.a.g, d.a.o});
    store_carry(s, s.c, at, d.c_prev);
  }
};

struct GruUnits {
  static constexpr int kGates = 3, kJoint = 2, kParts = 4, kKept = 4, kUnitVectors = 1;
  static constexpr bool kHasC = false, kHasCarry = true;

  template <typename T>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const Units& at, const Vec<T> (&a)[kParts]) {
    const GruGates<Vec<T>> y = gru_activate<VectorMath>(GruGates<Vec<T>>{a[0], a[1], a[2], a[3]});
    const Vec<T> h = gru_update(y, load_state(s.h, at));
    if (s.kept)
      store_parts<T, kKept>(s.kept + at.row * s.kept_stride + at.unit, s.hidden, at.n,
                            {y.r, y.z, y.n, y.n_h});
    store_n(s.h_out + at.row * s.h_out_stride + at.unit, h, at.n);
  }

  template <typename T>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const Units& at, const Vec<T>& dh) {
    const T* kept = kept_at(s, at);
    const GruGates<Vec<T>> y = {load_n(kept, at.n), load_n(kept + s.hidden, at.n),
                                load_n(kept + 2 * s.hidden, at.n), load_n(kept + 3 * s.hidden, at.n)};
    const GruGradients<Vec<T>> d = gru_backward(y, load_state(s.h, at), dh + load_carry(s, at));
    store_parts<T, kParts>(s.d + at.row * s.d_stride + at.unit, s.hidden, at.n, {d.r, d.z, d.n_x, d.n_h});
    store_carry(s, s.h, at, d.h_prev);
  }
};

template <typename Activation>
struct ElmanUnits {
  static constexpr int kGates = 1, kJoint = 1, kParts = 1, kKept = 0, kUnitVectors = 4;
  static constexpr bool kHasC = false, kHasCarry = false;

  template <typename T>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const Units& at, const Vec<T> (&a)[kParts]) {
    store_n(s.h_out + at.row * s.h_out_stride + at.unit, Activation::template activate<VectorMath>(a[0]),
            at.n);
  }

  template <typename T>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const Units& at, const Vec<T>& dh) {
    const Vec<T> h = load_n(s.h_now + at.row * s.h_now_stride + at.unit, at.n);
    store_n(s.d + at.row * s.d_stride + at.unit, Activation::backward(h, dh), at.n);
  }
};

}  // namespace
