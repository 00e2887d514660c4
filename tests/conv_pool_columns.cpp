// The conv_pool kernels whose pixels are columns of tiles against plain loops: kernels, strides, dilations,
// pools, margins, layouts, strips and panels, codes and all.
//
// test_conv_pool_columns.py compiles it with the registers in plain loops (CNNRNN_EMULATE_AMX) and vectors of
// 512 bits in narrower instructions (CNNRNN_EMULATE_512). The numbers are small and whole, so that results
// must be equal, ties included. Prints what differs; exits with 1 if anything does.

#include "conv_pool_columns.h"

#include "conv_pool_forward.h"

template <int P, typename T>
static void run(const ConvPoolShape& s, Guard guard, bool with_bias, bool with_codes) {
  Operands<T> of(s, guard);
  const int64_t count = s.batch * s.outputs * s.windows(), panels = columns_output_panels<P>(s);
  Guarded<T> y(count, guard);
  Guarded<uint8_t> codes(count, guard), flags(s.batch, guard);
  Guarded<float> packed(columns_packed_size<P>(s), guard);
  columns_pack<P, T>(s, of.weight.data(), false, packed.data(), 0, panels);
  const float* const bias = with_bias ? of.bias.data() : nullptr;
  uint8_t* const code = with_codes ? codes.data() : nullptr;
  Guarded<char> scratch(round_up(columns_scratch_bytes<P>(s), 64), guard);
  const int64_t units = columns_units<P>(s), ends[] = {0, units / 2, units};
  for (int i = 0; i < 2; ++i)
    run_columns<P, T>(s, of.x.data(), packed.data(), bias, y.data(), code, nullptr, flags.data(),
                      scratch.data(), ends[i], ends[i + 1], 0, panels);
  for (uint8_t flag : flags) failures += flag != 0;
  check_outputs(s, of, bias, false, y.data(), code);
}

int main() {
  const Pair one{1, 1}, none{0, 0}, two{2, 2};
  const Sizes all[] = {
      {2, 3, 18, {9, 11}, {3, 3}, one, one, one, two, two, none},
      {1, 1, 33, {28, 28}, {3, 3}, one, none, one, two, two, none},
      {1, 3, 40, {30, 75}, {7, 7}, two, {3, 3}, one, {3, 3}, two, one},
      {1, 3, 64, {40, 43}, {7, 7}, two, {3, 3}, one},
      {2, 5, 24, {17, 19}, {5, 5}, one, two, one, {3, 3}, two, none},
      {1, 3, 17, {44, 84}, {8, 8}, {4, 4}, none, one},
      {1, 1, 80, {1, 1200}, {1, 251}, {1, 10}, none, one, {1, 3}, {1, 3}, none},
      {3, 4, 5, {13, 18}, {3, 2}, {2, 1}, one, {1, 3}, {2, 1}, {2, 1}, none},
      {1, 2, 16, {23, 21}, {3, 3}, one, {3, 2}, one, {3, 3}, {3, 3}, one},
      {1, 2, 129, {7, 9}, {1, 1}, {3, 2}, none, one, two, {3, 4}, none},
      {1, 20, 140, {9, 20}, {5, 5}, one, two, one, {1, 2}, one, {0, 1}},
      {1, 1, 20, {1, 4500}, {1, 41}, {1, 5}, {0, 7}, one, {1, 3}, {1, 3}, none},
      {2, 1, 7, {2, 1000}, {1, 33}, one, {0, 2}, one, {2, 3}, {1, 2}, {1, 1}},
      {2, 1, 3, {200, 5}, {2, 1}, one, none, one, {4, 5}, {3, 2}, {2, 1}},
  };
  for (const Sizes& sizes : all)
    for (int choice = 0; choice < 8; ++choice) {
      ConvPoolShape s = shape_of(sizes);
      s.channels_last = choice & 1, s.relu = choice & 2;
      const Guard guard = choice % 3 == 0 ? Guard::kBefore : Guard::kAfter;
      run<3, float>(s, guard, choice != 5, choice & 4);
      run<1, Half>(s, guard, choice != 5, choice & 4);
    }
  return report();
}
