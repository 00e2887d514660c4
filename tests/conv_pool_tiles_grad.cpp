// The gradients of conv_pool on tile registers against plain loops: kernels, strides, dilations, paddings,
// layouts, small maps, batches in parts and groups, panels and tiles of outputs in pieces.
//
// test_conv_pool_tiles_grad.py compiles it with the registers in plain loops (CNNRNN_EMULATE_AMX) and vectors
// of 512 bits in narrower instructions (CNNRNN_EMULATE_512). The numbers are small and whole, so that results
// must be equal; memory that the kernels get is full of NaN. Prints what differs; exits with 1 if anything
// does.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

#include "conv_pool_shapes.h"
#include "conv_pool_tiles_grad_input.h"
#include "conv_pool_tiles_grad_weight.h"
#include "guarded.h"

static int64_t elements(int64_t batch, int64_t channels, Pair size) {
  return batch * channels * size.h * size.w;
}

// NaN in float32 and bfloat16: what is read before it is written shows.
template <typename T>
static void spoil(Guarded<T>& memory) {
  std::memset(memory.data(), 0xff, memory.size() * sizeof(T));
}

struct Operands {
  Guarded<float> x, weight, grad;
  Guarded<uint8_t> code;

  // coded: some outputs pass no gradient, and theirs is NaN.
  Operands(const ConvPoolShape& s, Guard guard, bool coded, const std::function<float()>& number)
      : x(elements(s.batch, s.channels, s.input), guard),
        weight(elements(s.outputs, s.channels, s.kernel), guard),
        grad(elements(s.batch, s.outputs, s.conv), guard),
        code(coded ? grad.size() : 0, guard) {
    for (float& value : x) value = number();
    for (float& value : weight) value = number();
    for (float& value : grad) value = number();
    for (size_t i = 0; i < code.size(); ++i)
      if (whole_number() > 1) code[i] = kDead, grad[i] = NAN;
  }
  const uint8_t* codes() { return code.size() ? code.data() : nullptr; }
  float map(int64_t at) { return code.size() && code[at] ? 0.0f : grad[at]; }
};

// Calls body(index of x, of weight, of grad) for all products of the convolution.
template <typename Body>
static void for_products(const ConvPoolShape& s, const Body& body) {
  const int64_t taps = s.kernel.h * s.kernel.w;
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t row = 0; row < s.conv.h; ++row)
      for (int64_t column = 0; column < s.conv.w; ++column)
        for (int64_t tap = 0; tap < taps; ++tap) {
          const int64_t y = row * s.stride.h + tap / s.kernel.w * s.dilation.h - s.padding.h;
          const int64_t z = column * s.stride.w + tap % s.kernel.w * s.dilation.w - s.padding.w;
          if (y < 0 || y >= s.input.h || z < 0 || z >= s.input.w) continue;
          for (int64_t k = 0; k < s.outputs; ++k) {
            const int64_t grad = place(s, s.outputs, s.conv, n, k, row, column);
            for (int64_t c = 0; c < s.channels; ++c)
              body(place(s, s.channels, s.input, n, c, y, z), (k * s.channels + c) * taps + tap, grad);
          }
        }
}

static void compare(const char* what, const ConvPoolShape& s, Guarded<float>& found,
                    const std::vector<float>& expected) {
  for (size_t i = 0; i < expected.size(); ++i, ++checks)
    if (found[i] != expected[i] && ++failures < 20)
      std::printf("%s, N %ld C %ld K %ld, kernel %ldx%ld, map %ldx%ld, %s, at %zu: %g, expected %g\n", what,
                  static_cast<long>(s.batch), static_cast<long>(s.channels), static_cast<long>(s.outputs),
                  static_cast<long>(s.kernel.h), static_cast<long>(s.kernel.w), static_cast<long>(s.conv.h),
                  static_cast<long>(s.conv.w), s.channels_last ? "NHWC" : "NCHW", i, found[i], expected[i]);
}
static void expect(bool right, const char* what) {
  ++checks;
  if (!right && ++failures < 20) std::printf("%s\n", what);
}

// [0, count) in up to `pieces`, whose ends are whole multiples of `unit`.
template <typename Body>
static void in_pieces(int64_t count, int64_t pieces, int64_t unit, const Body& body) {
  const int64_t units = ceil_div(count, unit);
  for (int64_t i = 0; i < pieces; ++i) {
    const int64_t begin = units * i / pieces * unit, end = smaller(units * (i + 1) / pieces * unit, count);
    if (begin < end) body(begin, end);
  }
}

// Images [first, first + count) of s, as parts of a batch are.
template <typename Body>
static void in_parts(const ConvPoolShape& s, int64_t parts, const Body& body) {
  in_pieces(s.batch, parts, 1, [&](int64_t begin, int64_t end) {
    ConvPoolShape part = s;
    part.batch = end - begin;
    body(part, begin);
  });
}

static bool weight_gradient(const ConvPoolShape& s, Operands& of, int64_t parts, int64_t pieces, Guard guard,
                            Guarded<float>& grad_weight, float* grad_bias) {
  const int64_t panels = tiles_weight_panels(s), tiles = tile_rows(s.outputs);
  Guarded<float> kept(parts > 1 ? tiles_weight_sums(s) : 0, guard);
  spoil(kept), spoil(grad_weight);
  bool finite = true;
  in_parts(s, parts, [&](const ConvPoolShape& part, int64_t first) {
    const int64_t at = elements(first, s.outputs, s.conv);
    const uint8_t* code = of.codes() ? of.codes() + at : nullptr;
    Guarded<char> input(tiles_weight_input_bytes(part), guard), map(tiles_weight_map_bytes(part), guard);
    Guarded<char> scratch(tiles_weight_scratch_bytes(part), guard);
    spoil(input), spoil(map), spoil(scratch);
    in_pieces(part.batch, 2, 1, [&](int64_t begin, int64_t end) {
      tiles_weight_part_input(part, of.x.data() + elements(first, s.channels, s.input), input.data(), begin,
                              end);
    });
    in_pieces(tiles, 2, 1, [&](int64_t begin, int64_t end) {
      tiles_weight_part_map(part, of.grad.data() + at, code, map.data(), grad_bias, begin, end);
    });
    const bool last = first + part.batch == s.batch;
    const int64_t steps = tile_steps(part.batch * s.conv.h * s.conv.w);
    in_pieces(steps, parts > 1 ? 2 : 1, 1, [&](int64_t step, int64_t next) {
      const BatchPart place{first == 0 && step == 0, last && next == steps, parts > 1 ? kept.data() : nullptr,
                            step, next};
      in_pieces(tiles, pieces, 2, [&](int64_t out_begin, int64_t out_end) {
        in_pieces(panels, pieces, 1, [&](int64_t begin, int64_t end) {
          finite &= tiles_weight(part, input.data(), map.data(), place, grad_weight.data(), scratch.data(),
                                 begin, end, out_begin, out_end);
        });
      });
    });
  });
  return finite;
}

static bool input_gradient(const ConvPoolShape& s, Operands& of, int64_t parts, int64_t pieces, Guard guard,
                           Guarded<float>& grad_x) {
  spoil(grad_x);
  bool finite = true;
  in_parts(s, parts, [&](const ConvPoolShape& part, int64_t first) {
    const int64_t at = elements(first, s.outputs, s.conv);
    const uint8_t* code = of.codes() ? of.codes() + at : nullptr;
    Guarded<char> map(tiles_input_map_bytes(part), guard), scratch(tiles_input_scratch_bytes(part), guard);
    spoil(map), spoil(scratch);
    in_pieces(tiles_input_map_tiles(part), 3, 1, [&](int64_t begin, int64_t end) {
      tiles_input_part_map(part, of.grad.data() + at, code, map.data(), begin, end);
    });
    in_pieces(tiles_input_groups(part), pieces, 1, [&](int64_t group_begin, int64_t group_end) {
      in_pieces(tiles_input_units(part), pieces, 1, [&](int64_t begin, int64_t end) {
        finite &= tiles_input(part, of.weight.data(), map.data(),
                              grad_x.data() + elements(first, s.channels, s.input), scratch.data(), begin,
                              end, group_begin, group_end);
      });
    });
  });
  return finite;
}

static void exact(const ConvPoolShape& s, Guard guard, bool coded, int64_t parts, int64_t pieces) {
  Operands of(s, guard, coded, whole_number);
  std::vector<float> of_x(of.x.size()), of_weight(of.weight.size()), of_bias(s.outputs);
  for_products(s, [&](int64_t x, int64_t weight, int64_t grad) {
    of_x[x] += of.weight[weight] * of.map(grad);
    of_weight[weight] += of.x[x] * of.map(grad);
  });
  Guarded<float> grad_x(of.x.size(), guard), grad_weight(of.weight.size(), guard);
  Guarded<float> grad_bias(s.outputs, guard);
  for (int64_t k = 0; k < s.outputs; ++k) {
    of_bias[k] = grad_bias[k] = whole_number();  // added to
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t i = 0; i < s.conv.h * s.conv.w; ++i)
        of_bias[k] += of.map(place(s, s.outputs, s.conv, n, k, i / s.conv.w, i % s.conv.w));
  }
  expect(input_gradient(s, of, parts, pieces, guard, grad_x), "grad_x is said not to be finite");
  compare("grad_x", s, grad_x, of_x);
  expect(weight_gradient(s, of, parts, pieces, guard, grad_weight, grad_bias.data()),
         "grad_weight is said not to be finite");
  compare("grad_weight", s, grad_weight, of_weight);
  compare("grad_bias", s, grad_bias, of_bias);
}

// Real numbers: the gradient of an image has the same bits wherever it stands, that of the weight however the
// work is shared.
static void same_bits(const ConvPoolShape& s, Guard guard) {
  Operands of(s, guard, true, [] { return whole_number() / 3 + whole_number() / 700; });
  Guarded<float> together(of.x.size(), guard), alone(of.x.size(), guard);
  input_gradient(s, of, 1, 1, guard, together);
  input_gradient(s, of, s.batch, 2, guard, alone);
  expect(!std::memcmp(together.data(), alone.data(), of.x.size() * sizeof(float)),
         "grad_x of images alone has other bits");
  Guarded<float> whole(of.weight.size(), guard), pieces(of.weight.size(), guard);
  const int64_t parts = smaller(s.batch, 2);
  weight_gradient(s, of, parts, 1, guard, whole, nullptr);
  weight_gradient(s, of, parts, 3, guard, pieces, nullptr);
  expect(!std::memcmp(whole.data(), pieces.data(), of.weight.size() * sizeof(float)),
         "grad_weight in pieces has other bits");
}

// One value that has no parts is told of, unless it meets none of the other operand: the kernel sees padding
// there, or a stride steps over it.
static void not_finite(const ConvPoolShape& s, Guard guard) {
  for (const float value : {NAN, INFINITY, -INFINITY, 3.4e38f}) {
    Operands of(s, guard, false, whole_number);
    Guarded<float> grad_x(of.x.size(), guard), grad_weight(of.weight.size(), guard);
    const int64_t at[] = {static_cast<int64_t>(of.x.size()) / 2, static_cast<int64_t>(of.weight.size()) / 2,
                          static_cast<int64_t>(of.grad.size()) / 2};
    bool met[3] = {};
    for_products(s, [&](int64_t x, int64_t weight, int64_t grad) {
      met[0] |= x == at[0], met[1] |= weight == at[1], met[2] |= grad == at[2];
    });
    of.grad[at[2]] = value;
    expect(input_gradient(s, of, 1, 1, guard, grad_x) != met[2], "grad_x: a gradient without parts");
    expect(!weight_gradient(s, of, 1, 1, guard, grad_weight, nullptr), "grad_weight: one without parts");
    of.grad[at[2]] = 1;
    of.weight[at[1]] = of.x[at[0]] = value;
    expect(input_gradient(s, of, 1, 2, guard, grad_x) != met[1], "grad_x: a weight without parts");
    expect(weight_gradient(s, of, 1, 2, guard, grad_weight, nullptr) != met[0],
           "grad_weight: an input without parts");
  }
}

int main() {
  const Pair one{1, 1}, none{0, 0}, two{2, 2};
  const Sizes all[] = {
      {2, 3, 17, {9, 11}, {3, 3}, one, one, one},
      {3, 20, 8, {7, 6}, {2, 3}, {2, 1}, {0, 2}, {1, 2}},
      {2, 65, 33, {5, 6}, {1, 1}, one, none, one},
      {1, 32, 96, {6, 7}, {3, 3}, two, one, one},
      {2, 64, 20, {6, 5}, {3, 2}, one, {2, 4}, {2, 3}},  // steps by channels, rows of the kernel apart
      {2, 3, 65, {6, 17}, {4, 4}, two, one, one},
      {3, 20, 33, {3, 9}, {1, 3}, {1, 2}, {0, 1}, one},
      {1, 1, 5, {1, 40}, {1, 5}, one, {0, 2}, one},
      {1, 6, 5, {23, 25}, {2, 2}, one, none, one},      // many chunks of pixels
      {1, 2, 140, {5, 7}, {1, 2}, one, none, one},      // sums of outputs in pieces
      {1, 192, 70, {3, 4}, {3, 3}, one, one, one},      // more panels than go together
      {2, 1, 33, {6, 5}, {1, 1}, one, none, one},       // weights that lie side by side either way
      {2, 7, 9, {9, 5}, {1, 1}, {3, 2}, two, one},      // input that no pixel meets
      {1, 5, 3, {12, 9}, {8, 8}, {2, 1}, {4, 4}, one},  // most taps
      {1, 3, 2, {4, 6}, {3, 3}, {5, 4}, {9, 12}, two},  // more padding than input
      {33, 4, 8, {3, 3}, {3, 3}, one, none, one},       // maps of one pixel
      {21, 32, 17, {2, 3}, {1, 1}, one, none, one},     // of 6
      {14, 8, 33, {5, 4}, {1, 1}, one, none, one},      // of 20, more than one group
      {12, 3, 1, {5, 5}, {3, 3}, one, one, one},        // of 25
      {7, 5, 40, {8, 2}, {2, 1}, one, {1, 0}, one},     // of 18
      {9, 35, 3, {7, 7}, {3, 3}, one, one, one},        // of 49
      {300, 1, 2, {2, 2}, {2, 2}, one, none, one},
  };
  for (const Sizes& sizes : all) {
    for (int choice = 0; choice < 4; ++choice) {
      ConvPoolShape s = shape_of(sizes);
      s.channels_last = choice & 1;
      const Guard guard = choice % 3 == 0 ? Guard::kAfter : Guard::kBefore;
      exact(s, guard, choice & 2, smaller(1 + choice, s.batch), 3 - choice % 3);
      if (choice < 2) same_bits(s, guard);
    }
    not_finite(shape_of(sizes), Guard::kAfter);
  }
  std::printf("%d-byte vectors: %ld checks, %ld failures\n", kVectorBytes, static_cast<long>(checks),
              static_cast<long>(failures));
  return failures > 0;
}
