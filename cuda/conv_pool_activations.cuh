// The activations of conv_pool: value and derivative of each, as torch computes them.
//
// The derivative is written in terms of the value where that suffices (falls() is false), else of the
// argument. A new one is a row of kActivationNames (conv_pool.h), a struct here and a line in
// with_activation().
#pragma once

#include <math.h>

#include "conv_pool.h"
#include "primitives.cuh"

namespace cnnrnn::cuda {
namespace {

// The functions of <math.h>, correct to a few units in the last place, by precision.
struct Math {
  static __device__ __forceinline__ float exp(float x) { return expf(x); }
  static __device__ __forceinline__ double exp(double x) { return ::exp(x); }
  static __device__ __forceinline__ float expm1(float x) { return expm1f(x); }
  static __device__ __forceinline__ double expm1(double x) { return ::expm1(x); }
  static __device__ __forceinline__ float tanh(float x) { return tanhf(x); }
  static __device__ __forceinline__ double tanh(double x) { return ::tanh(x); }
  static __device__ __forceinline__ float erf(float x) { return erff(x); }
  static __device__ __forceinline__ double erf(double x) { return ::erf(x); }
};

// Comparisons are such that NaN passes through.

struct Identity {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x;
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A, A grad) {
    return grad;
  }
};

struct Relu {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x < A(0) ? A(0) : x;
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return y <= A(0) ? A(0) : grad;
  }
};

struct Relu6 {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x < A(0) ? A(0) : x > A(6) ? A(6) : x;
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return y > A(0) && y < A(6) ? grad : A(0);
  }
};

struct LeakyRelu {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x > A(0) ? x : x * A(0.01);
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return y > A(0) ? grad : grad * A(0.01);
  }
};

struct Tanh {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return Math::tanh(x);
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return grad * (A(1) - y * y);
  }
};

struct Sigmoid {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return A(1) / (A(1) + Math::exp(-x));
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return grad * (A(1) - y) * y;
  }
};

struct Elu {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x > A(0) ? x : Math::expm1(x);
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A y, A grad) {
    return y > A(0) ? grad : grad * (y + A(1));
  }
};

// x * sigmoid(x)
struct Silu {
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x / (A(1) + Math::exp(-x));
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A x, A grad) {
    const A s = Sigmoid::value(x);
    return grad * (s * (A(1) + x * (A(1) - s)));
  }
};

// x * P(x), P the distribution function of the normal distribution.
struct Gelu {
  template <typename A>
  static __device__ __forceinline__ A distribution(A x) {
    return A(0.5) * (A(1) + Math::erf(x * A(0.70710678118654752440)));
  }
  template <typename A>
  static __device__ __forceinline__ A value(A x) {
    return x * distribution(x);
  }
  template <typename A>
  static __device__ __forceinline__ A gradient(A x, A grad) {
    const A density = A(0.39894228040143267794) * Math::exp(A(-0.5) * x * x);
    return grad * (distribution(x) + x * density);
  }
};

// What function(Struct{}) returns for this activation. All threads of a kernel take the same branch.
template <typename Function>
__device__ __forceinline__ auto with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kRelu:
      return function(Relu{});
    case Activation::kRelu6:
      return function(Relu6{});
    case Activation::kLeakyRelu:
      return function(LeakyRelu{});
    case Activation::kTanh:
      return function(Tanh{});
    case Activation::kSigmoid:
      return function(Sigmoid{});
    case Activation::kElu:
      return function(Elu{});
    case Activation::kSilu:
      return function(Silu{});
    case Activation::kGelu:
      return function(Gelu{});
    case Activation::kNone:
      break;
  }
  return function(Identity{});
}

template <typename A>
__device__ __forceinline__ A activate(Activation activation, A x) {
  return with_activation(activation, [&](auto row) { return decltype(row)::template value<A>(x); });
}

// kept: the argument where the activation falls somewhere, else its value.
template <typename A>
__device__ __forceinline__ A activation_gradient(Activation activation, A kept, A grad) {
  return with_activation(activation,
                         [&](auto row) { return decltype(row)::template gradient<A>(kept, grad); });
}

}  // namespace
}  // namespace cnnrnn::cuda
