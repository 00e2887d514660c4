// The arithmetic of one Elman unit, for every kernel; see lstm_gates.h for V and Math. h = f(a), f = tanh or
// ReLU.
#pragma once

#include "gates_inline.h"

namespace {

struct ElmanTanh {
  template <typename Math, typename V>
  static CNNRNN_GATES_INLINE V activate(const V& a) {
    return Math::tanh(a);
  }
  // The gradient of a, from h itself.
  template <typename Math, typename V>
  static CNNRNN_GATES_INLINE V backward(const V& h, const V& dh) {
    return dh * (1 - h * h);
  }
};

struct ElmanRelu {
  // As torch's: NaN stays NaN, in the gradient too.
  template <typename Math, typename V>
  static CNNRNN_GATES_INLINE V activate(const V& a) {
    return Math::relu(a);
  }
  template <typename Math, typename V>
  static CNNRNN_GATES_INLINE V backward(const V& h, const V& dh) {
    return Math::relu_gradient(h, dh);
  }
};

}  // namespace
