// Activations of conv_pool beside ReLU, which its kernels have inside: value and derivative of whole vectors,
// and the table of loops over them. One activation = one struct and one row of the table at the end.
//
// The derivative is written in terms of the value where that suffices (kOfOutput), else of the argument.
// Values, flat ends and what NaN passes on are those of torch's float32 kernels.
#pragma once

#include "conv_pool_common.h"
#include "vmath.h"

namespace {

// scalar(x) in each lane.
template <typename Scalar>
CNNRNN_INLINE Vec<double> each_lane(Vec<double> x, const Scalar& scalar) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = scalar(x[i]);
  return x;
}

struct Relu {
  static constexpr bool kOfOutput = true;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return VectorMath::relu(x);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return VectorMath::relu_gradient(y, grad);
  }
};

struct Relu6 {
  static constexpr bool kOfOutput = true;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    const Vec<T> low = x < 0 ? Vec<T>{} : x;
    return low > 6 ? Vec<T>{} + 6 : low;
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return (y > 0) & (y < 6) ? grad : Vec<T>{};
  }
};

struct LeakyRelu {
  static constexpr bool kOfOutput = true;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return x > 0 ? x : x * T(0.01);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return y > 0 ? grad : grad * T(0.01);
  }
};

struct Tanh {
  static constexpr bool kOfOutput = true;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return VectorMath::tanh(x);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return grad * (1 - y * y);
  }
};

struct Sigmoid {
  static constexpr bool kOfOutput = true;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return VectorMath::sigmoid(x);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return grad * (1 - y) * y;
  }
};

// x, and e^x - 1 where it is negative.
struct Elu {
  static constexpr bool kOfOutput = true;
  static CNNRNN_INLINE vf minus_one(vf x) {
    const ExpParts e = exp_parts(vmax(constant(kLow), x));
    return e.scale * e.p + (e.scale - constant(kOne));
  }
  static CNNRNN_INLINE Vec<double> minus_one(Vec<double> x) {
    return each_lane(x, [](double lane) { return __builtin_expm1(lane); });
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    // Clamped, or inf would be computed where it is not wanted.
    return x > 0 ? x : minus_one(x > 0 ? Vec<T>{} : x);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> y, Vec<T> grad) {
    return y > 0 ? grad : grad * (y + 1);
  }
};

// x * sigmoid(x)
struct Silu {
  static constexpr bool kOfOutput = false;
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return x * VectorMath::sigmoid(x);
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> x, Vec<T> grad) {
    const Vec<T> s = VectorMath::sigmoid(x);
    return grad * (s * (1 + x * (1 - s)));
  }
};

// x * P(x), P the distribution function of the normal distribution: (1 + erf(x / sqrt 2)) / 2.
struct Gelu {
  static constexpr bool kOfOutput = false;

  template <typename T>
  struct Normal {
    Vec<T> distribution, density;
  };

  // erfc(a / sqrt 2) = e^(-a^2 / 2) * q(t), t = 1 / (1 + 0.39 a): q fitted for the least largest error,
  // 1.9e-8. erf is rounded to a float before 1 is added, as torch does it: from there on down
  // everything is -0, and of such positions of a window the first wins.
  static CNNRNN_INLINE Normal<float> normal(vf x) {
    const vf a = x < 0 ? -x : x;
    const vf t = 1 / (1 + 0.39f * a);
    vf q = t * 0.10769279447863465f - 0.5164826410850738f;
    q = q * t + 0.7503293249319466f;
    q = q * t - 0.03326526501523869f;
    q = q * t + 0.3888713914030068f;
    q = q * t + 0.3028544012768569f;
    const vf exponent = -0.5f * (x * x);
    const ExpParts e = exp_parts(vmax(constant(kLow), exponent));
    const vf bell = exponent < constant(kLow) ? vf{} : e.scale * (1 + e.p);
    const vf tail = bell * (q * t);
    const vf erf = x < 0 ? tail - 1 : 1 - tail;
    return {0.5f * (1 + erf), 0.3989422804f * bell};
  }
  static CNNRNN_INLINE Normal<double> normal(Vec<double> x) {
    const Vec<double> erf = each_lane(x, [](double v) { return __builtin_erf(v * 0.70710678118654752440); });
    const Vec<double> bell = each_lane(x, [](double v) { return __builtin_exp(-0.5 * v * v); });
    return {0.5 * (1 + erf), 0.39894228040143267794 * bell};
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> value(Vec<T> x) {
    return x * normal(x).distribution;
  }
  template <typename T>
  static CNNRNN_INLINE Vec<T> gradient(Vec<T> x, Vec<T> grad) {
    const Normal<T> n = normal(x);
    return grad * (n.distribution + x * n.density);
  }
};

// ---- loops ----

template <typename T, typename A>
void activate(const T* z, T* y, int64_t n) {
  constexpr int L = kLanesOf<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) storeu(y + i, A::template value<T>(loadu(z + i)));
  if (i < n) store_n(y + i, A::template value<T>(load_n(z + i, n - i)), n - i);
}

template <typename T, typename A>
void activation_gradient(const T* kept, const T* grad, T* out, int64_t n) {
  constexpr int L = kLanesOf<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) storeu(out + i, A::template gradient<T>(loadu(kept + i), loadu(grad + i)));
  if (i < n)
    store_n(out + i, A::template gradient<T>(load_n(kept + i, n - i), load_n(grad + i, n - i)), n - i);
}

template <typename T, typename A>
constexpr cnnrnn::ActivationOf<T> activation_row(const char* name) {
  return {name, A::kOfOutput, activate<T, A>, activation_gradient<T, A>};
}

template <typename T>
constexpr cnnrnn::ActivationOf<T> kActivations[] = {
    activation_row<T, Relu>("relu"),
    activation_row<T, Relu6>("relu6"),
    activation_row<T, LeakyRelu>("leaky_relu"),
    activation_row<T, Tanh>("tanh"),
    activation_row<T, Sigmoid>("sigmoid"),
    activation_row<T, Elu>("elu"),
    activation_row<T, Silu>("silu"),
    activation_row<T, Gelu>("gelu"),
};

}  // namespace
