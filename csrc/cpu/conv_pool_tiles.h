// conv_pool forward on tile registers: an implicit product of matrices, pixels x (taps and channels) x
// outputs, with bias, pool, activation and code while the map is in cache. float32 by three bfloat16 parts,
// bfloat16 by one (split.h).
//
// A strip of pooled rows has its input copied once: parted, padded, channels innermost. Then the values under
// one row of the kernel lie side by side, so a tile of A is 16 pixels at a constant distance, read in place.
// The map of 32 outputs at a time goes through a buffer.
//
// Beyond a row of the kernel a tile reads neighbours that meet weights of 0: where those are not finite, or
// values do not part, NaN appears, and the host computes such images again by another kernel.
#pragma once

#include "conv_pool_tiles_pack.h"
#include "conv_pool_write.h"

namespace {

inline int64_t tiles_output_panels(const ConvPoolShape& s) { return ceil_div(s.outputs, kPanelOutputs); }
template <int P>
int64_t tiles_units(const ConvPoolShape& s) {
  return s.batch * TilePlan<P>(s).strips;
}
// Whether weights are packed in passing: all strips are one group, and their maps fit beside them.
template <int P>
bool streams_tiles(const ConvPoolShape& s) {
  const TilePlan<P> plan(s);
  const int64_t units = s.batch * plan.strips;
  return plan.by_channels && units <= plan.group && units * plan.map_size() * 4 <= kStripMapBytes;
}
template <int P>
int64_t tiles_scratch_bytes(const ConvPoolShape& s) {
  const TilePlan<P> plan(s);
  const int64_t maps = streams_tiles<P>(s) ? tiles_units<P>(s) : 1;
  return carved_bytes(plan.group * P * plan.part, sizeof(Half)) +
         (maps + (s.keyed ? 1 : 0)) * carved_bytes(plan.map_size(), 4) +
         2 * carved_bytes(plan.out_size(s), 4) + carved_bytes(kPanelOutputs, 4) +
         carved_bytes(plan.tiles() + 1, sizeof(int64_t)) + carved_bytes(plan.all_steps(), sizeof(int64_t));
}

// Rows of an image one after the other, to their places in the strip, the parts of their values; stores reach
// up to 32 halves beyond each row.
template <int P, typename T>
void part_rows(const ConvPoolShape& s, const TilePlan<P>& plan, const T* from, int64_t rows, Half* to) {
  const auto put = [&](Half* at, const Parts<P>& first, const Parts<P>& second) {
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store_words(at + p * plan.part, halves_of(first.of[p], second.of[p]));
  };
  const int64_t columns = s.input.w;
  if (s.channels_last) {
    const int64_t count = columns * s.channels;
    for (int64_t r = 0; r < rows; ++r, from += count, to += plan.row)
      for (int64_t i = 0; i < count; i += kTileDepth)
        put(to + i, parts_of<P>(widened(from + i, smaller(count - i, kLanes))),
            parts_of<P>(widened(from + i + kLanes, larger(smaller(count - i - kLanes, kLanes), 0))));
    return;
  }
  // Words of two channels at 16 pixels, across rows, change places. Of a pixel's channels the last come
  // first: what their store reaches beyond is written afterwards.
  const int64_t plane = s.input.h * columns, last = (s.channels - 1) / kTileDepth * kTileDepth;
  for (int64_t first = 0, y = 0, x = 0; first < rows * columns; first += kLanes) {
    const int64_t width = smaller(rows * columns - first, kLanes);
    Half* places[kLanes];
    for (int64_t i = 0; i < width; ++i) {
      places[i] = to + y * plan.row + x * s.channels;
      if (++x == columns) x = 0, ++y;
    }
    for (int64_t c = last; c >= 0; c -= kTileDepth) {
      vf words[P][kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const auto channel = [&](int64_t at) {
          return parts_of<P>(at < s.channels ? widened(from + at * plane + first, width) : vf{});
        };
        const Parts<P> even = channel(c + 2 * i), odd = channel(c + 2 * i + 1);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) words[p][i] = reinterpret_cast<vf>(even.of[p] >> 16 | odd.of[p]);
      }
      for (int p = 0; p < P; ++p) {
        transpose<float>(words[p]);
        for (int64_t i = 0; i < width; ++i)
          store_words(places[i] + p * plan.part + c, reinterpret_cast<vu>(words[p][i]));
      }
    }
  }
}

// Rows [first, first + rows) of one image, with the padding around them.
template <int P, typename T>
void fill_rows(const ConvPoolShape& s, const TilePlan<P>& plan, const T* image, int64_t first, int64_t rows,
               Half* strip) {
  const int64_t left = s.padding.w * s.channels, middle = s.input.w * s.channels;
  const int64_t begin = smaller(larger(first, 0), s.input.h);
  const int64_t end = smaller(larger(first + rows, begin), s.input.h);
  part_rows<P>(s, plan, image + begin * s.input.w * (s.channels_last ? s.channels : 1), end - begin,
               strip + (begin - first) * plan.row + left);
  for (int64_t y = first; y < first + rows; ++y, strip += plan.row)
    for (int p = 0; p < P; ++p) {
      Half* const row = strip + p * plan.part;
      if (y < begin || y >= end) {
        __builtin_memset(row, 0, plan.row * sizeof(Half));
        continue;
      }
      __builtin_memset(row, 0, left * sizeof(Half));
      __builtin_memset(row + left + middle, 0, left * sizeof(Half));
    }
}
// The same, and what tiles read beyond: it meets weights of 0.
template <int P, typename T>
void fill_strip(const ConvPoolShape& s, const TilePlan<P>& plan, const T* image, int64_t first, int64_t rows,
                Half* strip) {
  fill_rows<P>(s, plan, image, first, rows, strip);
  for (int p = 0; p < P; ++p)
    __builtin_memset(strip + rows * plan.row + p * plan.part, 0,
                     (plan.depth + 2 * kTileDepth) * sizeof(Half));
}

// c = c0 + a b over `steps`, of R x C tiles: pixels, outputs. Step i of a stands at[i] halves on; its parts
// lie a_part halves apart, its pixels a_bytes. c0 is a row of 16 C values for all pixels, or what c holds.
template <int P, int R, int C>
void multiply_steps(const Half* first, const Half* second, int64_t a_bytes, int64_t a_part, const int64_t* at,
                    const Half* b, int64_t steps, const float* row, float* c) {
  constexpr int64_t kBytes = kPanelOutputs * 4;
  const float* from = row ? row : c;
  const int64_t from_bytes = row ? 0 : kBytes, next = row ? 0 : kTileSide * kPanelOutputs;
  tile_load<0>(from, from_bytes);
  if constexpr (C > 1) tile_load<1>(from + kTileSide, from_bytes);
  if constexpr (R > 1) tile_load<2>(from + next, from_bytes);
  if constexpr (R > 1 && C > 1) tile_load<3>(from + next + kTileSide, from_bytes);
  const auto load_a = [&](int64_t step, int part) {
    tile_load<4>(first + at[step] + part * a_part, a_bytes);
    if constexpr (R > 1) tile_load<5>(second + at[step] + part * a_part, a_bytes);
  };
  const auto load_b = [&](int64_t step, int part) {
    const Half* from = b + (step * P + part) * kTilePanel * kTileValues;
    tile_load<6>(from, kTileBytes);
    if constexpr (C > 1) tile_load<7>(from + kTileValues, kTileBytes);
  };
  const auto multiply = [] {
    tile_multiply<0, 4, 6>();
    if constexpr (C > 1) tile_multiply<1, 4, 7>();
    if constexpr (R > 1) tile_multiply<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tile_multiply<3, 5, 7>();
  };
  // Small products first: what is added to a small sum errs little.
  for (int64_t step = 0; P == 3 && step < steps; ++step) {
    load_a(step, P - 1), load_b(step, 0), multiply();
    load_a(step, 1), multiply();
    load_b(step, 1), multiply();
    load_a(step, 0), multiply();
    load_b(step, P - 1), multiply();
  }
  for (int64_t step = 0; step < steps; ++step) load_a(step, 0), load_b(step, 0), multiply();
  tile_store<0>(c, kBytes);
  if constexpr (C > 1) tile_store<1>(c + kTileSide, kBytes);
  if constexpr (R > 1) tile_store<2>(c + kTileSide * kPanelOutputs, kBytes);
  if constexpr (R > 1 && C > 1) tile_store<3>(c + kTileSide * kPanelOutputs + kTileSide, kBytes);
}

// Where each step of a product stands relative to the first, in the strip's input.
template <int P>
void fill_steps(const ConvPoolShape& s, const TilePlan<P>& plan, int64_t* at) {
  const int64_t down = s.dilation.h * plan.row, right = s.dilation.w * s.channels;
  if (plan.by_channels) {
    for (int64_t c = 0; c < s.channels; c += kTileDepth)
      for (int64_t ky = 0; ky < s.kernel.h; ++ky)
        for (int64_t kx = 0; kx < s.kernel.w; ++kx) *at++ = ky * down + kx * right + c;
    return;
  }
  const int64_t of_row = plan.runs / s.kernel.h;
  for (int64_t run = 0; run < plan.runs; ++run)
    for (int64_t step = 0; step < plan.steps; ++step)
      *at++ = run / of_row * down + run % of_row * right + step * kTileDepth;
}

// Some steps of the map of a strip, for C tiles of outputs, its pixels in tiles that begin at `offsets` of
// the input. bias: null if the map holds the sum of steps before. Of parts each such sum begins at nought and
// is added afterwards: one long sum would lose digits.
template <int P, int C>
void map_steps(const ConvPoolShape& s, const TilePlan<P>& plan, const Half* input, const int64_t* offsets,
               int64_t tiles, const int64_t* at, const Half* b, int64_t steps, const float* bias,
               float* map) {
  constexpr int64_t kTileMap = kTileSide * kPanelOutputs;
  alignas(64) static constexpr float kZeros[kPanelOutputs] = {};
  alignas(64) float sums[2 * kTileMap];
  const int64_t a_bytes = s.stride.w * s.channels * 2;
  const bool apart = P > 1 && !bias;
  const float* row = apart ? kZeros : bias;
  for (int64_t t = 0; t < tiles; t += 2) {
    const int64_t now = smaller(tiles - t, 2);
    float* const to = map + t * kTileMap;
    (now == 2 ? multiply_steps<P, 2, C>
              : multiply_steps<P, 1, C>)(input + offsets[t], now == 2 ? input + offsets[t + 1] : nullptr,
                                         a_bytes, plan.part, at, b, steps, row, apart ? sums : to);
    for (int64_t i = 0; apart && i < now * kTileMap; i += kPanelOutputs)
      for (int64_t j = i; j < i + C * kLanes; j += kLanes) storeu(to + j, loadu(to + j) + loadu(sums + j));
  }
}

// The strip that a unit is.
template <int P>
Strip strip_of(const ConvPoolShape& s, const TilePlan<P>& plan, int64_t unit) {
  const int64_t row = unit % plan.strips * plan.rows;
  return {unit / plan.strips, larger(row * s.step.h - s.margin.h, 0), row,
          smaller(plan.rows, s.pooled.h - row), plan.pitch};
}
// Rows of the map that it needs.
inline int64_t conv_rows_of(const ConvPoolShape& s, const Strip& strip) {
  return smaller((strip.row + strip.rows - 1) * s.step.h - s.margin.h + s.window.h, s.conv.h) - strip.first;
}

// The weights of a chunk of steps, as they were packed before.
template <int P>
struct PackedTiles {
  static constexpr bool kInPassing = false;
  const float* packed;

  const Half* operator()(const TilePlan<P>& plan, int64_t panel, int64_t step, int64_t) const {
    return reinterpret_cast<const Half*>(packed) + panel * plan.panel_size() + step * plan.step_size();
  }
};
// The same packed right before they pass over all pixels, where they stay in the first-level cache.
template <int P, typename T>
struct TilesInPassing {
  static constexpr bool kInPassing = true;
  const ConvPoolShape& s;
  const T* weight;
  bool mirrored;
  Half* packed;  // of one chunk

  const Half* operator()(const TilePlan<P>& plan, int64_t panel, int64_t step, int64_t steps) const {
    const int64_t taps = s.kernel.h * s.kernel.w;
    for (int64_t c = step / taps; c < (step + steps) / taps; ++c)
      pack_channels<P>(s, plan, weight, mirrored, panel, c * kTileDepth, packed - step * plan.step_size());
    return packed;
  }
};

// Outputs of panels [out_begin, out_end) of strips [begin, end), which is one group if weights are packed in
// passing. not_finite [N]: set to 1 for images whose outputs are to be computed again.
template <int P, typename T, typename Weights>
void compute_tiles(const ConvPoolShape& s, const T* x, const Weights& weights, const float* bias, T* y,
                   uint8_t* code, T* kept, uint8_t* not_finite, void* memory, int64_t begin, int64_t end,
                   int64_t out_begin, int64_t out_end) {
  const TilePlan<P> plan(s);
  char* scratch = static_cast<char*>(memory);
  Half* inputs = carve<Half>(scratch, plan.group * P * plan.part);
  float* maps = carve<float>(scratch, (Weights::kInPassing ? end - begin : 1) * plan.map_size());
  float* keys = s.keyed ? carve<float>(scratch, plan.map_size()) : nullptr;
  float* ys = carve<float>(scratch, plan.out_size(s));
  float* codes = carve<float>(scratch, plan.out_size(s));
  float* shift = carve<float>(scratch, kPanelOutputs);
  int64_t* offsets = carve<int64_t>(scratch, plan.tiles() + 1);
  int64_t* at = carve<int64_t>(scratch, plan.all_steps());
  fill_steps(s, plan, at);
  const int64_t of_row = plan.pitch / kTileSide, pixel = s.stride.w * s.channels;
  for (int64_t t = 0; t < plan.tiles(); ++t)
    offsets[t] = kTileSide * pixel * (plan.flat ? t : t % of_row) +
                 (plan.flat ? 0 : t / of_row * s.stride.h * plan.row);
  const bool whole =
      s.positions() == 1 && s.step.h == 1 && s.step.w == 1 && !code && s.activation == cnnrnn::kNoActivation;

  const auto finish = [&](const Strip& strip, const float* map, int64_t panel) {
    const int64_t k0 = panel * kPanelOutputs, channels = smaller(kPanelOutputs, s.outputs - k0);
    vf health{};
    if (whole) {
      write_map(s, strip, map, kPanelOutputs, k0, channels, y, [&](vf v) {
        health += 0.0f * v;
        return s.relu ? (v <= 0 ? vf{} : v) : v;
      });
    } else {
      pool_strip<float, kTilePanel>(s, strip, map, keys, conv_rows_of(s, strip) * plan.pitch, ys, codes);
      for (int64_t i = 0; i < strip.rows * s.pooled.w; ++i)
        for (int64_t k = 0; k < channels; k += kLanes) health += 0.0f * loadu(ys + i * kPanelOutputs + k);
      write_strip(s, strip, ys, codes, kPanelOutputs, k0, channels, y, code, kept);
    }
    for (int l = 0; l < kLanes; ++l)
      if (health[l] != 0) __atomic_store_n(not_finite + strip.image, 1, __ATOMIC_RELAXED);
  };

  // `count` strips side by side in inputs, the first of them number `unit`.
  const auto compute = [&](int64_t unit, int64_t count, const Half* input, int64_t panel) {
    const bool two = s.outputs - panel * kPanelOutputs > kTileSide;
    for (int64_t step = 0; step < plan.all_steps(); step += plan.chunk) {
      const int64_t steps = smaller(plan.chunk, plan.all_steps() - step);
      const Half* b = weights(plan, panel, step, steps);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t pixels = conv_rows_of(s, strip_of(s, plan, unit + i)) * plan.pitch;
        (two ? map_steps<P, 2> : map_steps<P, 1>)(s, plan, input + i * P * plan.part, offsets,
                                                  ceil_div(pixels, kTileSide), at + step, b, steps,
                                                  step == 0 ? shift : nullptr, maps + i * plan.map_size());
      }
    }
    for (int64_t i = 0; i < count; ++i)
      finish(strip_of(s, plan, unit + i), maps + i * plan.map_size(), panel);
  };

  const TileSession session;
  for (int64_t group = begin; group < end; group += plan.group) {
    const int64_t count = smaller(plan.group, end - group), together = Weights::kInPassing ? count : 1;
    for (int64_t i = 0; i < count; ++i) {
      const Strip strip = strip_of(s, plan, group + i);
      fill_strip<P>(s, plan, x + strip.image * s.channels * s.input.h * s.input.w,
                    strip.first * s.stride.h - s.padding.h,
                    (conv_rows_of(s, strip) - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1,
                    inputs + i * P * plan.part);
    }
    for (int64_t panel = out_begin; panel < out_end; ++panel) {
      for (int64_t k = 0; k < kPanelOutputs; ++k) {
        const int64_t at_k = panel * kPanelOutputs + k;
        shift[k] = bias && at_k < s.outputs ? bias[at_k] : 0.0f;
      }
      for (int64_t i = 0; i < count; i += together)
        compute(group + i, together, inputs + i * P * plan.part, panel);
    }
  }
  stores_past_done();
}

template <int P, typename T>
void run_tiles(const ConvPoolShape& s, const T* x, const float* packed, const float* bias, T* y,
               uint8_t* code, T* kept, uint8_t* not_finite, void* memory, int64_t begin, int64_t end,
               int64_t out_begin, int64_t out_end) {
  compute_tiles<P, T>(s, x, PackedTiles<P>{packed}, bias, y, code, kept, not_finite, memory, begin, end,
                      out_begin, out_end);
}
template <int P, typename T>
void stream_tiles(const ConvPoolShape& s, const T* x, const T* weight, bool mirrored, const float* bias, T* y,
                  uint8_t* code, T* kept, uint8_t* not_finite, void* memory, int64_t out_begin,
                  int64_t out_end) {
  alignas(64) Half packed[kMostSteps * TilePlan<P>::step_size()];
  const TilesInPassing<P, T> weights{s, weight, mirrored, packed};
  compute_tiles<P, T>(s, x, weights, bias, y, code, kept, not_finite, memory, 0, tiles_units<P>(s), out_begin,
                      out_end);
}

template <int P, typename T>
constexpr cnnrnn::PanelForward<T> tiles_forward() {
  return {tiles_output_panels,    tiles_packed_size<P>, tiles_pack<P, T>, tiles_units<P>,
          tiles_scratch_bytes<P>, run_tiles<P, T>,      streams_tiles<P>, stream_tiles<P, T>};
}

}  // namespace
