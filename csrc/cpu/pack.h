// Several vectors that go through the same arithmetic together, operation by operation: evaluations that do
// not wait for one another stand side by side and hide each other's latency.
#pragma once

#include "vmath.h"

namespace {

template <typename T, int Count>
struct Pack {
  Vec<T> v[Count];
};

#define CNNRNN_PACK_OPERATOR(op)                                                               \
  template <typename T, int Count>                                                             \
  CNNRNN_INLINE Pack<T, Count> operator op(const Pack<T, Count>& a, const Pack<T, Count>& b) { \
    Pack<T, Count> y;                                                                          \
    for (int i = 0; i < Count; ++i) y.v[i] = a.v[i] op b.v[i];                                 \
    return y;                                                                                  \
  }
CNNRNN_PACK_OPERATOR(+)
CNNRNN_PACK_OPERATOR(-)
CNNRNN_PACK_OPERATOR(*)
#undef CNNRNN_PACK_OPERATOR

template <typename T, int Count>
CNNRNN_INLINE Pack<T, Count> operator-(int a, const Pack<T, Count>& b) {
  Pack<T, Count> y;
  for (int i = 0; i < Count; ++i) y.v[i] = static_cast<T>(a) - b.v[i];
  return y;
}

struct PackMath {
  template <typename T, int Count>
  static CNNRNN_INLINE Pack<T, Count> sigmoid(const Pack<T, Count>& x) {
    Pack<T, Count> y;
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) y.v[i] = VectorMath::sigmoid(x.v[i]);
    return y;
  }
  template <typename T, int Count>
  static CNNRNN_INLINE Pack<T, Count> tanh(const Pack<T, Count>& x) {
    Pack<T, Count> y;
#pragma GCC unroll 8
    for (int i = 0; i < Count; ++i) y.v[i] = VectorMath::tanh(x.v[i]);
    return y;
  }
  template <typename T, int Count>
  static CNNRNN_INLINE Pack<T, Count> relu(const Pack<T, Count>& x) {
    Pack<T, Count> y;
    for (int i = 0; i < Count; ++i) y.v[i] = VectorMath::relu(x.v[i]);
    return y;
  }
  template <typename T, int Count>
  static CNNRNN_INLINE Pack<T, Count> relu_gradient(const Pack<T, Count>& y, const Pack<T, Count>& grad) {
    Pack<T, Count> d;
    for (int i = 0; i < Count; ++i) d.v[i] = VectorMath::relu_gradient(y.v[i], grad.v[i]);
    return d;
  }
};

}  // namespace
