// conv_pool forward on tile registers: an implicit product of matrices, pixels x (taps and channels) x
// outputs, with bias, pool, activation and code while the map is in cache. float32 by three bfloat16 parts,
// bfloat16 by one (split.h).
//
// A strip of pooled rows has its input copied once: parted, padded, channels innermost. Then the values under
// one row of the kernel lie side by side, so a tile of A is 16 pixels at a constant distance, read in place.
// The map of 32 outputs at a time goes through a buffer.
//
// Maps too small to fill such tiles go 16 images at a time (s.across): a tile is one pixel of them all, and
// no padding is stored or multiplied.
//
// Beyond a row of the kernel a tile reads neighbours that meet weights of 0: where those are not finite, or
// values do not part, NaN appears, and the host computes such images again by another kernel.
#pragma once

#include "conv_pool_tiles_product.h"
#include "conv_pool_write.h"

namespace {

inline int64_t tiles_output_panels(const ConvPoolShape& s) { return ceil_div(s.outputs, kPanelOutputs); }
template <int P>
int64_t tiles_units(const ConvPoolShape& s) {
  return TilePlan<P>(s).units(s);
}
// Whether weights are packed in passing: all units are one group, and their maps fit beside them.
template <int P>
bool streams_tiles(const ConvPoolShape& s) {
  const TilePlan<P> plan(s);
  const int64_t units = plan.units(s), most = s.across ? kAcrossMapBytes : kStripMapBytes;
  return plan.by_channels && units <= plan.group && units * plan.images * plan.map_size * 4 <= most;
}
template <int P>
int64_t tiles_scratch_bytes(const ConvPoolShape& s) {
  const TilePlan<P> plan(s);
  const int64_t maps = streams_tiles<P>(s) ? plan.units(s) : 1, tiles = plan.tiles(plan.conv_rows);
  return carved_bytes(plan.group * plan.size, sizeof(Half)) +
         carved_bytes(maps * plan.images * plan.map_size, 4) +
         (s.keyed ? 1 : 0) * carved_bytes(plan.map_size, 4) + 2 * carved_bytes(plan.out_size(s), 4) +
         carved_bytes(kPanelOutputs, 4) + carved_bytes(tiles, sizeof(Place)) +
         carved_bytes(tiles, sizeof(Bundle)) + carved_bytes(plan.all_steps(), sizeof(Step));
}

// The part of a tile of pixels that those of one image fill; 1 where 16 images cannot share tiles: their maps
// or inputs take too much of the cache, or some weight meets padding alone. (A strip multiplies it by 0, so
// that one that is not finite shows.)
template <int P>
double tiles_fill(const ConvPoolShape& s) {
  const TilePlan<P> plan(s);
  ConvPoolShape together = s;
  together.across = true;
  const TilePlan<P> across(together);
  const bool fits =
      across.images * across.map_size * 4 <= kAcrossMapBytes && across.size * 2 <= kAcrossInputBytes;
  if (!plan.by_channels || !fits || !vertical(s).all_meet() || !horizontal(s).all_meet()) return 1;
  return static_cast<double>(across.conv_rows * s.conv.w) /
         static_cast<double>(plan.strips * plan.tiles(plan.conv_rows) * kTileSide);
}

// Rows of an image one after the other, to their places in a unit's input, the parts of their values; stores
// reach up to 32 halves beyond each row unless channels come in 32s.
template <int P, typename T>
void part_rows(const ConvPoolShape& s, const TilePlan<P>& plan, const T* from, int64_t rows, Half* to) {
  const auto put = [&](Half* at, const Parts<P>& first, const Parts<P>& second) {
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store_words(at + p * plan.part, halves_of(first.of[p], second.of[p]));
  };
  const int64_t columns = s.input.w;
  if (s.channels_last) {
    const bool by_rows = plan.images == 1;  // else pixel by pixel
    const int64_t run = by_rows ? columns : 1, count = run * s.channels;
    for (int64_t r = 0; r < rows * columns; r += run, from += count, to += by_rows ? plan.row : plan.pixel)
      for (int64_t i = 0; i < count; i += kTileDepth)
        put(to + i / kTileDepth * plan.block, parts_of<P>(widened(from + i, smaller(count - i, kLanes))),
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
      places[i] = to + y * plan.row + x * plan.pixel;
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
          store_words(places[i] + p * plan.part + c / kTileDepth * plan.block,
                      reinterpret_cast<vu>(words[p][i]));
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

// A strip of a unit, or one of its images.
template <int P>
Strip strip_of(const ConvPoolShape& s, const TilePlan<P>& plan, int64_t unit, int64_t image = 0) {
  const int64_t row = unit % plan.strips * plan.rows;
  return {unit / plan.strips * plan.images + image, larger(row * s.step.h - s.margin.h, 0), row,
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

// The input of a unit.
template <int P, typename T>
void fill_unit(const ConvPoolShape& s, const TilePlan<P>& plan, const T* x, int64_t unit, Half* input) {
  const Strip strip = strip_of(s, plan, unit);
  const int64_t size = s.channels * s.input.h * s.input.w;
  x += strip.image * size;
  if (plan.images == 1)
    return fill_strip<P>(s, plan, x, strip.first * s.stride.h - s.padding.h,
                         (conv_rows_of(s, strip) - 1) * s.stride.h + (s.kernel.h - 1) * s.dilation.h + 1,
                         input);
  for (int64_t i = 0; i < smaller(plan.images, s.batch - strip.image); ++i)
    part_rows<P>(s, plan, x + i * size, s.input.h, input + i * plan.tile_row);
}

// Outputs of panels [out_begin, out_end) of units [begin, end), which are one group if weights are packed in
// passing. not_finite [N]: set to 1 for images whose outputs are to be computed again.
template <int P, typename T, typename Weights>
void compute_tiles(const ConvPoolShape& s, const T* x, const Weights& weights, const float* bias, T* y,
                   uint8_t* code, T* kept, uint8_t* not_finite, void* memory, int64_t begin, int64_t end,
                   int64_t out_begin, int64_t out_end) {
  const TilePlan<P> plan(s);
  const int64_t most_tiles = plan.tiles(plan.conv_rows), unit_map = plan.images * plan.map_size;
  char* scratch = static_cast<char*>(memory);
  Half* inputs = carve<Half>(scratch, plan.group * plan.size);
  float* maps = carve<float>(scratch, (Weights::kInPassing ? end - begin : 1) * unit_map);
  float* keys = s.keyed ? carve<float>(scratch, plan.map_size) : nullptr;
  float* ys = carve<float>(scratch, plan.out_size(s));
  float* codes = carve<float>(scratch, plan.out_size(s));
  float* shift = carve<float>(scratch, kPanelOutputs);
  Place* places = carve<Place>(scratch, most_tiles);
  Bundle* bundles = carve<Bundle>(scratch, most_tiles);
  Step* all_steps = carve<Step>(scratch, plan.all_steps());
  const MapTiles map_places = map_tiles(s, plan, places, bundles);
  fill_steps(s, plan, all_steps);
  const bool whole =
      s.positions() == 1 && s.step.h == 1 && s.step.w == 1 && !code && s.activation == cnnrnn::kNoActivation;

  // A sum is never -0, which would tell whether padding was multiplied (+ 0.0f below).
  const auto finish = [&](const Strip& strip, const float* map, int64_t panel) {
    const int64_t k0 = panel * kPanelOutputs, channels = smaller(kPanelOutputs, s.outputs - k0);
    vf health{};
    if (whole) {
      write_map(s, strip, map, kPanelOutputs, k0, channels, y, [&](vf v) {
        health += 0.0f * v;
        return s.relu ? (v <= 0 ? vf{} : v) : v + 0.0f;
      });
    } else {
      pool_strip<float, kTilePanel>(s, strip, map, keys, conv_rows_of(s, strip) * plan.pitch, ys, codes);
      for (int64_t i = 0; i < strip.rows * s.pooled.w; ++i)
        for (int64_t k = 0; k < channels; k += kLanes) {
          float* const at = ys + i * kPanelOutputs + k;
          health += 0.0f * loadu(at);
          storeu(at, loadu(at) + 0.0f);
        }
      write_strip(s, strip, ys, codes, kPanelOutputs, k0, channels, y, code, kept);
    }
    if (!is_zero(health)) __atomic_store_n(not_finite + strip.image, 1, __ATOMIC_RELAXED);
  };

  // `count` units side by side in inputs, the first of them number `unit`.
  const auto compute = [&](int64_t unit, int64_t count, const Half* input, int64_t panel) {
    const bool two = s.outputs - panel * kPanelOutputs > kTileSide;
    for (int64_t step = 0; step < plan.all_steps(); step += plan.chunk) {
      const int64_t steps = smaller(plan.chunk, plan.all_steps() - step);
      const Chunk chunk{all_steps + step, steps, weights(plan, panel, step, steps)};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t tiles = plan.tiles(conv_rows_of(s, strip_of(s, plan, unit + i)));
        (two ? map_steps<P, 2> : map_steps<P, 1>)(s, plan, input + i * plan.size, map_places, tiles, chunk,
                                                  step == 0 ? shift : nullptr, maps + i * unit_map);
      }
    }
    for (int64_t i = 0; i < count; ++i)
      for (int64_t image = 0; image < plan.images; ++image) {
        const Strip strip = strip_of(s, plan, unit + i, image);
        if (strip.image < s.batch) finish(strip, maps + i * unit_map + image * plan.map_size, panel);
      }
  };

  const TileSession session;
  for (int64_t group = begin; group < end; group += plan.group) {
    const int64_t count = smaller(plan.group, end - group), together = Weights::kInPassing ? count : 1;
    for (int64_t i = 0; i < count; ++i) fill_unit(s, plan, x, group + i, inputs + i * plan.size);
    for (int64_t panel = out_begin; panel < out_end; ++panel) {
      for (int64_t k = 0; k < kPanelOutputs; ++k) {
        const int64_t at_k = panel * kPanelOutputs + k;
        shift[k] = bias && at_k < s.outputs ? bias[at_k] + 0.0f : 0.0f;
      }
      for (int64_t i = 0; i < count; i += together)
        compute(group + i, together, inputs + i * plan.size, panel);
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
  return {tiles_output_panels, tiles_packed_size<P>,   tiles_pack<P, T>,
          tiles_units<P>,      tiles_scratch_bytes<P>, run_tiles<P, T>,
          streams_tiles<P>,    stream_tiles<P, T>,     tiles_fill<P>};
}

}  // namespace
