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
  kLn2High,
  kLn2Low,
  kLow,
  kHigh,
  kTwenty,
  kMinusTwenty,
  kQ0,
  kConstants = kQ0 + 6
};

struct ConstantTable {
  alignas(kVectorBytes) float v[kConstants][kLanes];
};

constexpr ConstantTable constant_table() {
  const float values[kConstants] = {
      1.0f, 2.0f, 12582912.0f,  // 1.5 * 2^23
      1.44269504f,
      // ln 2 in two parts; the first has few enough bits for its products with whole numbers to be exact.
      0.693359375f, -2.12194440e-4f, -87.3f, 89.0f, 20.0f, -20.0f,
      // (e^r - 1) / r, minimax on |r| <= ln 2 / 2: relative error 1.3e-8
      0.0013948579f, 0.00836915076f, 0.0416662417f, 0.166665049f, 0.500000006f, 1.0f};
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

// e^x = scale * (1 + p) for -87.3 <= x <= 89: scale is a power of two, inf at the upper end; p keeps small x
// exact.
struct ExpParts {
  vf scale, p;
};

CNNRNN_INLINE ExpParts exp_parts(vf x) {
  // Adding 1.5 * 2^23 rounds to a whole number, which then stands in the low bits.
  const vf shifted = x * constant(kLog2e) + constant(kRounding);
  const vf n = shifted - constant(kRounding);
  const vf r = (x - n * constant(kLn2High)) - n * constant(kLn2Low);
  vf q = constant(kQ0);
#pragma GCC unroll 5
  for (int i = 1; i < 6; ++i) q = q * r + constant(static_cast<Constant>(kQ0 + i));
  const vu bits = (reinterpret_cast<vu>(shifted) << 23) + reinterpret_cast<vu>(constant(kOne));
  return {reinterpret_cast<vf>(bits), q * r};
}

struct VectorMath {
  // 1 / (1 + e^-x)
  static CNNRNN_INLINE vf sigmoid(vf x) {
    // The clamped operand comes second, so NaN passes.
    const ExpParts e = exp_parts(vmax(constant(kLow), vmin(constant(kHigh), -x)));
    // Not scale + scale * p: where scale is inf and p < 0, that is NaN.
    return constant(kOne) / (constant(kOne) + e.scale * (constant(kOne) + e.p));
  }

  // (e^2x - 1) / (e^2x + 1), where e^2x - 1 comes without cancellation.
  static CNNRNN_INLINE vf tanh(vf x) {
    const ExpParts e = exp_parts(vmax(constant(kMinusTwenty), vmin(constant(kTwenty), x + x)));
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
