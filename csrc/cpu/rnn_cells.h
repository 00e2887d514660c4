// The recurrent cells on vectors of hidden units: what one row of a tile does between its product and memory.
//
// A cell has kGates rows of weights per unit and kParts pre-activations: its first kJoint gates add up the
// input's and the state's products, the rest keep the state's apart, as a part of its own at the end.
// A forward panel holds kUnitVectors vectors of units. The reserve keeps kKept values per unit.
#pragma once

#include <type_traits>

#include "../elman_gates.h"
#include "../gru_gates.h"
#include "../lstm_gates.h"
#include "pack.h"
#include "rnn_tile.h"

namespace {

using cnnrnn::RnnBackwardStep;
using cnnrnn::RnnForwardStep;

// Some vectors of hidden units: the same units of consecutive rows, or units side by side in one row
// (kBeside). kFull: every vector is whole; otherwise units from `hidden` on do not exist.
template <bool kBeside, bool kFull>
struct Units {
  int64_t row, unit, hidden;

  template <typename T>
  CNNRNN_INLINE int64_t step(int64_t stride) const {
    return kBeside ? kLanesOf<T> : stride;
  }
  template <typename T>
  CNNRNN_INLINE int64_t count(int i) const {
    return kFull ? kLanesOf<T> : valid(hidden, unit + (kBeside ? i * kLanesOf<T> : 0), kLanesOf<T>);
  }
  CNNRNN_INLINE int64_t unit_of(int i, int lanes) const { return unit + (kBeside ? i * lanes : 0); }
  CNNRNN_INLINE int64_t row_of(int i) const { return kBeside ? row : row + i; }
};

template <int Count, typename T, typename At>
CNNRNN_INLINE Pack<T, Count> load_units(const T* from, int64_t stride, const At& at) {
  Pack<T, Count> y;
  from += at.row * stride + at.unit;
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i, from += at.template step<T>(stride))
    y.v[i] = load_n(from, at.template count<T>(i));
  return y;
}

template <typename T, int Count, typename At>
CNNRNN_INLINE void store_units(T* to, int64_t stride, const At& at, const Pack<T, Count>& y) {
  to += at.row * stride + at.unit;
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i, to += at.template step<T>(stride))
    store_n(to, y.v[i], at.template count<T>(i));
}

// The kept values of a step, forward or back.
template <typename Cell, typename Step>
CNNRNN_INLINE auto kept_of(const Step& s) {
  using T = std::remove_pointer_t<decltype(s.kept)>;
  return cnnrnn::Kept<T, Cell::kKept>{s.kept, s.kept_rows, s.kept_first, s.hidden};
}

template <int Count, typename T, int K, typename At>
CNNRNN_INLINE Pack<std::remove_const_t<T>, Count> load_kept(const cnnrnn::Kept<T, K>& kept, int k,
                                                            const At& at) {
  using Value = std::remove_const_t<T>;
  constexpr int L = kLanesOf<Value>;
  Pack<Value, Count> y;
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i)
    y.v[i] = load_n(kept.at(at.row_of(i), k, at.unit_of(i, L), L), at.template count<Value>(i));
  return y;
}

template <typename T, int K, int Count, typename At>
CNNRNN_INLINE void store_kept(const cnnrnn::Kept<T, K>& kept, int k, const At& at, const Pack<T, Count>& y) {
  constexpr int L = kLanesOf<T>;
#pragma GCC unroll 8
  for (int i = 0; i < Count; ++i)
    store_n(kept.at(at.row_of(i), k, at.unit_of(i, L), L), y.v[i], at.template count<T>(i));
}

template <int Count, typename T, typename At>
CNNRNN_INLINE Pack<T, Count> load_state(const cnnrnn::StateRows<T>& s, const At& at) {
  if (!s.reset && at.row_of(Count - 1) < s.carried)
    return load_units<Count, T>(s.before, s.before_stride, at);
  Pack<T, Count> y;
  for (int i = 0; i < Count; ++i)
    y.v[i] = load_n(state_row(s, at.row_of(i)) + at.unit_of(i, kLanesOf<T>), at.template count<T>(i));
  return y;
}

// The gradient that a step hands to the one before it, by way of `carry`: none to a row it did not read.
template <typename T, int Count, typename At>
CNNRNN_INLINE void store_carry(const RnnBackwardStep<T>& s, const cnnrnn::StateRows<T>& state, const At& at,
                               Pack<T, Count> y) {
  if (state.reset)
    for (int i = 0; i < Count; ++i)
      if (is_reset(state, at.row_of(i))) y.v[i] = Vec<T>{};
  store_units(s.carry, s.carry_stride, at, y);
}

struct LstmUnits {
  static constexpr int kGates = 4, kJoint = 4, kParts = 4, kKept = 4, kUnitVectors = 1;
  static constexpr bool kHasC = true, kHasCarry = true;

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const At& at,
                                    const Pack<T, Count> (&a)[kParts]) {
    using P = Pack<T, Count>;
    const LstmGates<P> y = lstm_activate<PackMath>(LstmGates<P>{a[0], a[1], a[2], a[3]});
    const LstmState<P> state = lstm_update<PackMath>(y, load_state<Count>(s.c, at));
    if (s.kept) {
      const auto kept = kept_of<LstmUnits>(s);
      store_kept(kept, 0, at, y.i);
      store_kept(kept, 1, at, y.f);
      store_kept(kept, 2, at, y.g);
      store_kept(kept, 3, at, y.o);
    }
    store_units(s.c_out, s.c_out_stride, at, state.c);
    store_units(s.h_out, s.h_out_stride, at, state.h);
  }

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const At& at, const Pack<T, Count>& dh) {
    using P = Pack<T, Count>;
    const auto kept = kept_of<LstmUnits>(s);
    const LstmGates<P> y = {load_kept<Count>(kept, 0, at), load_kept<Count>(kept, 1, at),
                            load_kept<Count>(kept, 2, at), load_kept<Count>(kept, 3, at)};
    P dc = load_units<Count>(s.carry, s.carry_stride, at);
    if (s.dc_1) dc = dc + load_units<Count>(s.dc_1, s.dc_1_stride, at);
    const P c = load_units<Count>(s.c_now, s.c_now_stride, at);
    const LstmGradients<P> d = lstm_backward<PackMath>(y, c, load_state<Count>(s.c, at), dh, dc);
    store_units(s.d, s.d_stride, at, d.a.i);
    store_units(s.d + s.hidden, s.d_stride, at, d.a.f);
    store_units(s.d + 2 * s.hidden, s.d_stride, at, d.a.g);
    store_units(s.d + 3 * s.hidden, s.d_stride, at, d.a.o);
    store_carry(s, s.c, at, d.c_prev);
  }
};

struct GruUnits {
  static constexpr int kGates = 3, kJoint = 2, kParts = 4, kKept = 4, kUnitVectors = 1;
  static constexpr bool kHasC = false, kHasCarry = true;

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const At& at,
                                    const Pack<T, Count> (&a)[kParts]) {
    using P = Pack<T, Count>;
    const GruGates<P> y = gru_activate<PackMath>(GruGates<P>{a[0], a[1], a[2], a[3]});
    if (s.kept) {
      const auto kept = kept_of<GruUnits>(s);
      store_kept(kept, 0, at, y.r);
      store_kept(kept, 1, at, y.z);
      store_kept(kept, 2, at, y.n);
      store_kept(kept, 3, at, y.n_h);
    }
    store_units(s.h_out, s.h_out_stride, at, gru_update(y, load_state<Count>(s.h, at)));
  }

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const At& at, const Pack<T, Count>& dh) {
    using P = Pack<T, Count>;
    const auto kept = kept_of<GruUnits>(s);
    const GruGates<P> y = {load_kept<Count>(kept, 0, at), load_kept<Count>(kept, 1, at),
                           load_kept<Count>(kept, 2, at), load_kept<Count>(kept, 3, at)};
    const P dh_all = dh + load_units<Count>(s.carry, s.carry_stride, at);
    const GruGradients<P> d = gru_backward(y, load_state<Count>(s.h, at), dh_all);
    store_units(s.d, s.d_stride, at, d.r);
    store_units(s.d + s.hidden, s.d_stride, at, d.z);
    store_units(s.d + 2 * s.hidden, s.d_stride, at, d.n_x);
    store_units(s.d + 3 * s.hidden, s.d_stride, at, d.n_h);
    store_carry(s, s.h, at, d.h_prev);
  }
};

template <typename Activation>
struct ElmanUnits {
  static constexpr int kGates = 1, kJoint = 1, kParts = 1, kKept = 0, kUnitVectors = 4;
  static constexpr bool kHasC = false, kHasCarry = false;

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void forward(const RnnForwardStep<T>& s, const At& at,
                                    const Pack<T, Count> (&a)[kParts]) {
    store_units(s.h_out, s.h_out_stride, at, Activation::template activate<PackMath>(a[0]));
  }

  template <typename T, int Count, typename At>
  static CNNRNN_INLINE void backward(const RnnBackwardStep<T>& s, const At& at, const Pack<T, Count>& dh) {
    const Pack<T, Count> h = load_units<Count>(s.h_now, s.h_now_stride, at);
    store_units(s.d, s.d_stride, at, Activation::template backward<PackMath>(h, dh));
  }
};

}  // namespace
