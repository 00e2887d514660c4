// Activations on whole vectors. float: polynomials, error below 2 units in the last place of the result's
// magnitude; double: the C library, lane by lane (gradient checks want its accuracy, not its speed).
// NaN stays NaN; sigmoid(-inf) = 0, sigmoid(inf) = 1, tanh(+-inf) = +-1, and so for every huge argument.
#pragma once

#include "simd.h"

namespace {

typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));

// e^x = scale * (1 + p) for -87.3 <= x <= 88.8: scale is a power of two, inf at the upper end.
struct ExpParts {
  vf scale, p;
};

CNNRNN_INLINE ExpParts exp_parts(vf x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const vf magic = broadcast(12582912.0f);
  const vf shifted = x * broadcast(1.44269504f) + magic;
  const vf n = shifted - magic;
  // ln 2 in two parts; the first has few enough bits for n * ln2_high to be exact.
  vf r = x - n * broadcast(0.693359375f);
  r = r - n * broadcast(-2.12194440e-4f);
  // (e^r - 1 - r) / r^2, minimax on |r| <= ln 2 / 2
  vf q = broadcast(0.00139488f);
  q = q * r + broadcast(0.00836792f);
  q = q * r + broadcast(0.04166625f);
  q = q * r + broadcast(0.16666533f);
  q = q * r + broadcast(0.50000001f);
  const vu bits = (reinterpret_cast<vu>(shifted) << 23) + 0x3f800000u;
  return {reinterpret_cast<vf>(bits), r + r * r * q};
}

struct VectorMath {
  static CNNRNN_INLINE vf sigmoid(vf x) {
    // The clamped operand comes second: a comparison with NaN is false, so NaN passes.
    const vf y = vmax(broadcast(-87.3f), vmin(broadcast(88.8f), -x));
    const ExpParts e = exp_parts(y);
    const vf one = broadcast(1.0f);
    // Not scale + scale * p: where scale is inf and p < 0, that is NaN.
    return one / (one + e.scale * (one + e.p));
  }

  // Near 0 an odd polynomial, elsewhere 1 - 2 / (e^2|x| + 1) with x's sign.
  static CNNRNN_INLINE vf tanh(vf x) {
    const vu sign = reinterpret_cast<vu>(x) & 0x80000000u;
    const vf y = reinterpret_cast<vf>(reinterpret_cast<vu>(x) ^ sign);
    const ExpParts e = exp_parts(vmin(broadcast(40.0f), y + y));
    const vf one = broadcast(1.0f);
    const vf far = one - broadcast(2.0f) / (one + (e.scale + e.scale * e.p));
    // (tanh x - x) / x^3, minimax on |x| <= 0.7
    const vf z = x * x;
    vf q = broadcast(0.00189567f);
    q = q * z + broadcast(-0.00788331f);
    q = q * z + broadcast(0.02157106f);
    q = q * z + broadcast(-0.05392095f);
    q = q * z + broadcast(0.13332983f);
    q = q * z + broadcast(-0.33333325f);
    const vf near = x + x * z * q;
    return z < broadcast(0.49f) ? near : reinterpret_cast<vf>(reinterpret_cast<vu>(far) | sign);
  }

  static CNNRNN_INLINE Vec<double> sigmoid(Vec<double> x) {
    Vec<double> y = x;
    for (int i = 0; i < kLanesOf<double>; ++i) y[i] = 1.0 / (1.0 + __builtin_exp(-x[i]));
    return y;
  }

  static CNNRNN_INLINE Vec<double> tanh(Vec<double> x) {
    Vec<double> y = x;
    for (int i = 0; i < kLanesOf<double>; ++i) y[i] = __builtin_tanh(x[i]);
    return y;
  }
};

}  // namespace
