// Activations on whole vectors. float: polynomials, errors of about one unit in the last place of the largest
// value (sigmoid) and of the result itself (tanh); double: the C library, lane by lane (gradient checks want
// its accuracy, not its speed). NaN stays NaN; sigmoid(-inf) = 0, sigmoid(inf) = 1, tanh(+-inf) = +-1, and so
// for every huge argument.
#pragma once

#include "simd.h"

namespace {

typedef uint32_t vu __attribute__((vector_size(kVectorBytes)));

// The constants as whole vectors in memory, which arithmetic takes as operands: a compiler that knows their
// values broadcasts each into a register anew at every use, and has too few registers to keep them.
enum Constant {
  kOne,
  kTwo,
  kRounding,
  kLog2e,
  kLow,
  kHigh,
  kTwoLog2e,
  kTwoLog2eLow,
  kTen,
  kMinusTen,
  kQ0,
  kConstants = kQ0 + 6
};

struct ConstantTable {
  alignas(kVectorBytes) float v[kConstants][kLanes];
};

constexpr ConstantTable constant_table() {
  const float values[kConstants] = {
      1.0f, 2.0f, 12582912.0f,  // 1.5 * 2^23
      -1.44269504f, -126.0f, 128.0f, 2.88539008f, 2 * 1.9259629e-8f, 10.0f, -10.0f,
      // (2^f - 1) / f, minimax on |f| <= 1/2: relative error 1.3e-8
      0.0001546973f, 0.0013390867f, 0.009618031f, 0.05550357f, 0.24022651f, 0.69314718f};
  ConstantTable table{};
  for (int i = 0; i < kConstants; ++i)
    for (int l = 0; l < kLanes; ++l) table.v[i][l] = values[i];
  return table;
}

constexpr ConstantTable kTable = constant_table();

CNNRNN_INLINE vf constant(Constant which) {
  const ConstantTable* table = &kTable;
  asm("" : "+r"(table));  // the values are out of the compiler's sight
  return *reinterpret_cast<const vf*>(table->v[which]);
}

// 2^t = scale * (1 + p), for t = n + f: n the nearest whole number, |f| <= 1/2; -126 <= t <= 128. scale is a
// power of two, inf at the upper end.
struct Exp2Parts {
  vf scale, p;
};

// shifted = t + 1.5 * 2^23, which rounds t to n and leaves n in the low bits.
CNNRNN_INLINE Exp2Parts exp2_parts(vf shifted, vf f) {
  vf q = constant(kQ0);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) q = q * f + constant(static_cast<Constant>(kQ0 + i));
  const vu bits = (reinterpret_cast<vu>(shifted) << 23) + reinterpret_cast<vu>(constant(kOne));
  return {reinterpret_cast<vf>(bits), q * f};
}

struct VectorMath {
  // 1 / (1 + 2^t), t = -x log2 e
  static CNNRNN_INLINE vf sigmoid(vf x) {
    // The clamped operand comes second, so NaN passes.
    const vf t = vmax(constant(kLow), vmin(constant(kHigh), x * constant(kLog2e)));
    const vf shifted = t + constant(kRounding);
    const Exp2Parts e = exp2_parts(shifted, t - (shifted - constant(kRounding)));
    // Not scale + scale * p: where scale is inf and p < 0, that is NaN.
    return constant(kOne) / (constant(kOne) + e.scale * (constant(kOne) + e.p));
  }

  // (2^t - 1) / (2^t + 1), t = 2 x log2 e; 2^t - 1 comes without cancellation, so small x stay exact.
  static CNNRNN_INLINE vf tanh(vf x) {
    const vf y = vmax(constant(kMinusTen), vmin(constant(kTen), x));
    const vf t = y * constant(kTwoLog2e);
    // What the product and its factor lost in rounding.
    const vf lost = (y * constant(kTwoLog2e) - t) + y * constant(kTwoLog2eLow);
    const vf shifted = t + constant(kRounding);
    const Exp2Parts e = exp2_parts(shifted, (t - (shifted - constant(kRounding))) + lost);
    const vf minus_one = e.scale * e.p + (e.scale - constant(kOne));
    return minus_one / (minus_one + constant(kTwo));
  }

  template <typename V>
  static CNNRNN_INLINE V relu(V x) {
    return x < 0 ? V{} : x;
  }
  // grad where y = relu(x) is above 0, or NaN.
  template <typename V>
  static CNNRNN_INLINE V relu_gradient(V y, V grad) {
    return y <= 0 ? V{} : grad;
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
