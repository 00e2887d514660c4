// The conv_pool kernels on tile registers against plain loops: kernels, strides, dilations, pools, layouts,
// strips and panels, codes and all.
//
// test_conv_pool_tiles.py compiles it with the registers in plain loops (CNNRNN_EMULATE_AMX) and vectors
// of 512 bits in narrower instructions (CNNRNN_EMULATE_512). The numbers are small and whole, so that results
// must be equal, ties included. Prints what differs; exits with 1 if anything does.

#include "conv_pool_tiles.h"

#include "conv_pool_forward.h"

static int64_t streams = 0, across = 0;

template <int P, typename T>
static void run(const ConvPoolShape& s, Guard guard, bool with_bias, bool with_codes, bool mirrored) {
  Operands<T> of(s, guard);
  const int64_t count = s.batch * s.outputs * s.windows(), panels = tiles_output_panels(s);
  Guarded<T> y(count, guard), again(count, guard);
  Guarded<uint8_t> codes(count, guard), codes_again(count, guard), flags(s.batch, guard);
  Guarded<float> packed(tiles_packed_size<P>(s), guard);
  tiles_pack<P, T>(s, of.weight.data(), mirrored, packed.data(), 0, panels);
  const float* const shift = with_bias ? of.bias.data() : nullptr;
  uint8_t* const code = with_codes ? codes.data() : nullptr;
  uint8_t* const code_again = with_codes ? codes_again.data() : nullptr;
  const auto same_again = [&] {
    failures += std::memcmp(again.data(), y.data(), count * sizeof(T)) != 0;
    failures += with_codes && std::memcmp(codes_again.data(), codes.data(), count) != 0;
    std::memset(again.data(), 0xff, count * sizeof(T));
    std::memset(codes_again.data(), 0xff, count);
  };
  const auto run_halves = [&](const ConvPoolShape& way, T* to, uint8_t* code_to) {
    Guarded<char> scratch(round_up(tiles_scratch_bytes<P>(way), 64), guard);
    const int64_t units = tiles_units<P>(way), ends[] = {0, units / 2, units};
    for (int i = 0; i < 2; ++i)
      run_tiles<P, T>(way, of.x.data(), packed.data(), shift, to, code_to, nullptr, flags.data(),
                      scratch.data(), ends[i], ends[i + 1], 0, panels);
  };
  // Weights packed in passing give the same bits.
  const auto stream = [&](const ConvPoolShape& way) {
    if (!streams_tiles<P>(way)) return;
    Guarded<char> scratch(round_up(tiles_scratch_bytes<P>(way), 64), guard);
    stream_tiles<P, T>(way, of.x.data(), of.weight.data(), mirrored, shift, again.data(), code_again, nullptr,
                       flags.data(), scratch.data(), 0, panels);
    ++streams;
    same_again();
  };
  run_halves(s, y.data(), code);
  stream(s);
  // So do images that share tiles.
  if (tiles_fill<P>(s) < 1) {
    ConvPoolShape together = s;
    together.across = true;
    run_halves(together, again.data(), code_again);
    same_again();
    stream(together);
    ++across;
  }
  for (uint8_t flag : flags) failures += flag != 0;
  check_outputs(s, of, shift, mirrored, y.data(), code);
}

int main() {
  const Pair one{1, 1}, none{0, 0}, two{2, 2};
  const Sizes all[] = {
      {2, 6, 18, {9, 11}, {3, 3}, one, one, one, two, two, none},
      {1, 33, 5, {7, 19}, {5, 5}, one, two, one, {3, 3}, two, one},
      {2, 4, 34, {13, 18}, {3, 3}, two, one, one, one, one, none},
      {1, 70, 17, {4, 6}, {1, 1}, one, none, one, one, one, none},
      {1, 8, 16, {12, 21}, {2, 3}, {1, 2}, {0, 3}, {3, 2}, {1, 2}, {1, 2}, none},
      {3, 1, 3, {90, 20}, {3, 2}, one, one, one, two, two, none},
      {1, 3, 40, {20, 35}, {7, 7}, two, {3, 3}, one, {3, 3}, two, one},
      {1, 64, 50, {6, 7}, {3, 3}, one, one, one, two, two, none},
      {3, 96, 21, {5, 4}, {1, 2}, two, none, one, one, one, none},
      {2, 32, 33, {7, 9}, {3, 2}, one, one, two, one, one, none},
      {17, 32, 34, {4, 4}, {3, 3}, one, one, one, one, one, none},
      {33, 32, 17, {5, 3}, {3, 2}, one, {2, 1}, one, two, two, none},
      {16, 32, 3, {6, 7}, {3, 3}, two, one, two, {3, 2}, two, one},
      {3, 64, 5, {5, 6}, {1, 1}, {1, 2}, none, one, one, one, none},
  };
  for (const Sizes& sizes : all)
    for (int choice = 0; choice < 8; ++choice) {
      ConvPoolShape s = shape_of(sizes);
      s.channels_last = choice & 1, s.relu = choice & 2;
      const Guard guard = choice % 3 == 0 ? Guard::kBefore : Guard::kAfter;
      run<3, float>(s, guard, choice != 5, choice & 4, choice == 6);
      run<1, Half>(s, guard, choice != 5, choice & 4, choice == 7);
    }
  return report() || streams == 0 || across == 0;
}
