// The conv_pool kernels on tile registers against plain loops: kernels, strides, dilations, pools, layouts,
// strips and panels, codes and all.
//
// test_conv_pool_tiles.py compiles it with the registers in plain loops (CNNRNN_EMULATE_AMX) and vectors
// of 512 bits in narrower instructions (CNNRNN_EMULATE_512). The numbers are small and whole, so that results
// must be equal, ties included. Prints what differs; exits with 1 if anything does.

#include "conv_pool_tiles.h"

#include <cmath>
#include <cstdio>
#include <cstring>

#include "conv_pool_shapes.h"
#include "guarded.h"

static void put(float& to, float value) { to = value; }
static void put(Half& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to = bits >> 16;
}
static float get(float value) { return value; }
static float get(Half value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static int64_t streams = 0, across = 0;

template <typename T>
static float convolution(const ConvPoolShape& s, const T* x, const T* weight, bool mirrored, int64_t n,
                         int64_t k, int64_t row, int64_t column) {
  float sum = 0;
  const int64_t taps = s.kernel.h * s.kernel.w;
  for (int64_t c = 0; c < s.channels; ++c)
    for (int64_t tap = 0; tap < taps; ++tap) {
      const int64_t y = row * s.stride.h + tap / s.kernel.w * s.dilation.h - s.padding.h;
      const int64_t z = column * s.stride.w + tap % s.kernel.w * s.dilation.w - s.padding.w;
      if (y < 0 || y >= s.input.h || z < 0 || z >= s.input.w) continue;
      const int64_t at =
          mirrored ? (c * s.outputs + k) * taps + taps - 1 - tap : (k * s.channels + c) * taps + tap;
      sum += get(x[place(s, s.channels, s.input, n, c, y, z)]) * get(weight[at]);
    }
  return sum;
}

template <int P, typename T>
static void run(const ConvPoolShape& s, Guard guard, bool with_bias, bool with_codes, bool mirrored) {
  Guarded<T> x(s.batch * s.channels * s.input.h * s.input.w, guard);
  Guarded<T> weight(s.outputs * s.channels * s.kernel.h * s.kernel.w, guard);
  Guarded<float> bias(s.outputs, guard);
  for (T& value : x) put(value, whole_number());
  for (T& value : weight) put(value, whole_number());
  for (float& value : bias) value = whole_number();
  const int64_t count = s.batch * s.outputs * s.windows(), panels = tiles_output_panels(s);
  Guarded<T> y(count, guard), again(count, guard);
  Guarded<uint8_t> codes(count, guard), codes_again(count, guard), flags(s.batch, guard);
  Guarded<float> packed(tiles_packed_size<P>(s), guard);
  tiles_pack<P, T>(s, weight.data(), mirrored, packed.data(), 0, panels);
  const float* const shift = with_bias ? bias.data() : nullptr;
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
      run_tiles<P, T>(way, x.data(), packed.data(), shift, to, code_to, nullptr, flags.data(), scratch.data(),
                      ends[i], ends[i + 1], 0, panels);
  };
  // Weights packed in passing give the same bits.
  const auto stream = [&](const ConvPoolShape& way) {
    if (!streams_tiles<P>(way)) return;
    Guarded<char> scratch(round_up(tiles_scratch_bytes<P>(way), 64), guard);
    stream_tiles<P, T>(way, x.data(), weight.data(), mirrored, shift, again.data(), code_again, nullptr,
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
  for (int64_t n = 0; n < s.batch; ++n) {
    failures += flags[n] != 0;
    for (int64_t k = 0; k < s.outputs; ++k)
      for (int64_t i = 0; i < s.windows(); ++i) {
        const int64_t row = i / s.pooled.w, column = i % s.pooled.w;
        float best = -INFINITY;
        int code = 0;
        for (int64_t q = 0; q < s.positions(); ++q) {
          const int64_t r = row * s.step.h - s.margin.h + q / s.window.w;
          const int64_t c = column * s.step.w - s.margin.w + q % s.window.w;
          if (r < 0 || r >= s.conv.h || c < 0 || c >= s.conv.w) continue;
          const float value =
              convolution(s, x.data(), weight.data(), mirrored, n, k, r, c) + (with_bias ? bias[k] : 0.0f);
          if (value > best) best = value, code = static_cast<int>(q);
        }
        if (s.relu && best <= 0) best = 0, code = kDead;
        const int64_t at = place(s, s.outputs, s.pooled, n, k, row, column);
        // A bfloat16 holds whole numbers up to 256; larger ones are rounded.
        const bool same =
            sizeof(T) == 4 ? get(y[at]) == best : std::fabs(get(y[at]) - best) <= std::fabs(best) / 256;
        const bool right = same && (!with_codes || codes[at] == code);
        ++checks;
        if (!right && ++failures < 20)
          std::printf("%d parts, C %ld K %ld, image %ld, output %ld, window %ld: %g (%d), expected %g (%d)\n",
                      P, static_cast<long>(s.channels), static_cast<long>(s.outputs), static_cast<long>(n),
                      static_cast<long>(k), static_cast<long>(i), get(y[at]), with_codes ? codes[at] : -1,
                      best, code);
      }
  }
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
  std::printf("%d-byte vectors: %ld checks, %ld failures\n", kVectorBytes, static_cast<long>(checks),
              static_cast<long>(failures));
  return failures > 0 || streams == 0 || across == 0;
}
