// conv_pool backward from (grad_y, code): at most one position of each pooling window has a gradient, so both
// gradients visit pooled outputs only. With 2x2 windows that is a quarter of a dense backward's products.
//
// Both are sums of the same form, held in registers and computed by one kernel, `accumulate`:
//   grad_weight[k][footprint] = sum over live outputs o of k:    grad_y[o] * x[position of o][footprint]
//   grad_x[position][footprint] = sum over the k alive there:    grad_y[o] * weight[k][footprint]
// A footprint is KH rows of KW * C contiguous numbers; x, weight and grad_x are laid out channels-last in
// slabs of kSlab channels for it.
#pragma once

#include "conv_pool_forward.h"

namespace {

constexpr int kMaxRows = 3;                                    // footprint rows held in registers at once
constexpr int kMaxVectors = kVectorRegisters == 32 ? 8 : 4;    // vectors of each row
constexpr int64_t kSlab = 32;                                  // channels of a slab
constexpr int64_t kOutputsChunk = 64;                          // output channels whose lists exist at once
constexpr int64_t kTileBytes = 32768;                          // of one slab of x: stays in L1
constexpr int64_t kTileMaxWindows = 256;                       // of the tiles whose lists exist at once
constexpr int64_t kStripWindows = 32;                          // of the buckets that exist at once

// target[r][v] += sum over i < n of g[i] * source[offset[i]][r][v], rows at source_row[r] and target_row[r].
template <typename T, int R, int V>
void accumulate(const T* source, const int64_t* source_row, const int32_t* offset, const T* g, int64_t n,
                T* target, const int64_t* target_row) {
  constexpr int L = kLanesOf<T>;
  constexpr int U = R * V >= 7 ? 1 : R * V >= 4 ? 2 : 4;  // enough independent sums to hide an FMA's latency
  Vec<T> acc[U][R][V] = {};
  int64_t i = 0;
  for (; i + U <= n; i += U) {
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const T* at = source + offset[i + u];
      const Vec<T> factor = broadcast(g[i + u]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T* row = at + source_row[r];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[u][r][v] += factor * loadu(row + v * L);
      }
    }
  }
  for (; i < n; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v)
        acc[0][r][v] += broadcast(g[i]) * loadu(source + offset[i] + source_row[r] + v * L);
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      Vec<T> sum = acc[0][r][v];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum += acc[u][r][v];
      T* at = target + target_row[r] + v * L;
      storeu(at, loadu(at) + sum);
    }
  }
}

template <typename T>
using Accumulate = void (*)(const T*, const int64_t*, const int32_t*, const T*, int64_t, T*, const int64_t*);

template <typename T, int R>
Accumulate<T> accumulate_of(int64_t vectors) {
  static const Accumulate<T> table[] = {
      accumulate<T, R, 1>, accumulate<T, R, 2>, accumulate<T, R, 3>, accumulate<T, R, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
      accumulate<T, R, 5>, accumulate<T, R, 6>, accumulate<T, R, 7>, accumulate<T, R, 8>,
#endif
  };
  return table[vectors - 1];
}

// A part of a footprint that fits the registers.
template <typename T>
struct Part {
  Accumulate<T> run;
  int64_t source_row[kMaxRows], target_row[kMaxRows];
};

// The footprint of one slab: `rows` rows (kernel rows, or taps where the kernel is dilated along x), each
// `length` contiguous numbers in `vectors` vectors.
template <typename T>
struct Footprint {
  int64_t slab, slabs;            // channels of a slab (a multiple of the lanes if so asked), their number
  int64_t rows, length, vectors;  // length and vectors of one row
  bool by_taps;

  Footprint(const ConvPoolShape& s, bool whole_vectors) {
    const int64_t channels = s.group_channels();
    slab = smaller(channels, kSlab);
    if (whole_vectors || slab >= kLanesOf<T>) slab = round_up(slab, kLanesOf<T>);
    slabs = ceil_div(channels, slab);
    by_taps = s.dilation.w > 1;
    rows = by_taps ? s.kernel.h * s.kernel.w : s.kernel.h;
    length = by_taps ? slab : s.kernel.w * slab;
    vectors = ceil_div(length, kLanesOf<T>);
  }

  // In weights: one row after another.
  int64_t dense_row(int64_t row) const { return row * vectors * kLanesOf<T>; }
  int64_t dense_size() const { return dense_row(rows); }
  // In an image of `width` pixels of a slab.
  int64_t image_row(const ConvPoolShape& s, int64_t row, int64_t width) const {
    if (!by_taps) return row * s.dilation.h * width * slab;
    return (row / s.kernel.w * s.dilation.h * width + row % s.kernel.w * s.dilation.w) * slab;
  }

  // Calls run(part) for each part; the image is read (dense is the target) or written.
  template <typename Run>
  CNNRNN_INLINE void for_each_part(const ConvPoolShape& s, int64_t width, bool image_is_source, int64_t max_rows,
                                   const Run& run) const {
    for (int64_t r = 0; r < rows; r += max_rows) {
      const int64_t height = smaller(max_rows, rows - r);
      for (int64_t v = 0; v < vectors; v += kMaxVectors) {
        const int64_t count = smaller(kMaxVectors, vectors - v);
        Part<T> part;
        part.run = height == 3   ? accumulate_of<T, 3>(count)
                   : height == 2 ? accumulate_of<T, 2>(count)
                                 : accumulate_of<T, 1>(count);
        for (int64_t i = 0; i < height; ++i) {
          const int64_t image = image_row(s, r + i, width) + v * kLanesOf<T>;
          const int64_t dense = dense_row(r + i) + v * kLanesOf<T>;
          part.source_row[i] = image_is_source ? image : dense;
          part.target_row[i] = image_is_source ? dense : image;
        }
        run(part);
      }
    }
  }

  // The place of weight element (c, ky, kx) of one output channel.
  int64_t place(const ConvPoolShape& s, int64_t c, int64_t ky, int64_t kx) const {
    const int64_t row = by_taps ? ky * s.kernel.w + kx : ky, column = by_taps ? 0 : kx * slab;
    return c / slab * dense_size() + dense_row(row) + column + c % slab;
  }
};

// Where a window's positions stand in an image of `width` pixels of a slab, relative to the window itself.
// Codes beyond the window count as dead.
inline void fill_positions(const ConvPoolShape& s, int64_t slab, int64_t width, int32_t* delta) {
  for (int64_t q = 0; q < 256; ++q) {
    const int64_t at = q / s.window.w * s.stride.h * width + q % s.window.w * s.stride.w;
    delta[q] = q < s.positions() ? static_cast<int32_t>(at * slab) : 0;
  }
}

// Length of input under `count` windows along one dimension.
inline int64_t extent(int64_t count, int64_t step, int64_t window, int64_t stride, int64_t kernel,
                      int64_t dilation) {
  return ((count - 1) * step + window - 1) * stride + (kernel - 1) * dilation + 1;
}

// ---- gradients of weight and bias ----

// A tile is a rectangle of pooled outputs of one image, small enough that a slab of the x under it stays in L1.
template <typename T>
struct WeightPlan {
  Footprint<T> footprint;
  int64_t rows, cols;          // pooled outputs of a tile
  int64_t in_rows, in_cols;    // of x under it
  int64_t down, across;        // tiles of an image
  int64_t tile_size;           // numbers of a slab of x under a tile
  int64_t batch;               // tiles whose lists exist at once
  int64_t chunk;               // output channels whose lists exist at once

  explicit WeightPlan(const ConvPoolShape& s) : footprint(s, false) {
    const int64_t limit = kTileBytes / sizeof(T) / footprint.slab;
    cols = smaller(s.pooled.w, 16);
    while (cols > 1 && extent(cols, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w) *
                               extent(1, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h) >
                           limit / 2)
      --cols;
    across = ceil_div(s.pooled.w, cols);
    cols = ceil_div(s.pooled.w, across);
    in_cols = extent(cols, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w);
    rows = 1;
    while (rows < s.pooled.h && (rows + 1) * cols <= kTileMaxWindows &&
           extent(rows + 1, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h) * in_cols <= limit)
      ++rows;
    down = ceil_div(s.pooled.h, rows);
    rows = ceil_div(s.pooled.h, down);
    in_rows = extent(rows, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h);
    // The last row of a footprint may be read up to a whole vector beyond its end.
    tile_size = round_up(in_rows * in_cols * footprint.slab + kLanesOf<T>, kLanesOf<T>);
    const int64_t tile_windows = rows * cols;
    batch = larger(1, smaller(kTileMaxWindows / tile_windows, kTileBytes / (tile_size * sizeof(T))));
    chunk = smaller(s.group_outputs(), kOutputsChunk);
  }

  int64_t list_capacity() const { return round_up(batch * rows * cols, 16); }
  // Of one output channel: its footprint in every slab, then its bias.
  int64_t partial_stride() const { return footprint.slabs * footprint.dense_size() + kLanesOf<T>; }
};

template <typename T>
int64_t weight_partial_size(const ConvPoolShape& s) {
  return s.outputs * WeightPlan<T>(s).partial_stride();
}

template <typename T>
int64_t weight_units(const ConvPoolShape& s) {
  const WeightPlan<T> plan(s);
  return s.batch * plan.down * plan.across;
}

template <typename T>
int64_t weight_scratch_bytes(const ConvPoolShape& s) {
  const WeightPlan<T> plan(s);
  const int64_t entries = plan.chunk * plan.list_capacity();
  return carved_bytes(plan.batch * plan.tile_size * plan.footprint.slabs * s.groups, sizeof(T)) +
         carved_bytes(entries, sizeof(T)) + carved_bytes(entries, sizeof(int32_t)) +
         carved_bytes(plan.chunk, sizeof(int64_t)) + carved_bytes(256, sizeof(int32_t));
}

// Copies channels [c0, c0 + count) of a rectangle of an NCHW or NHWC image, which may reach into the padding,
// to [rows][cols][slab].
template <typename T>
void pack_pixels(const ConvPoolShape& s, const T* image, int64_t c0, int64_t count, int64_t slab, int64_t y0,
                 int64_t x0, int64_t rows, int64_t cols, T* out) {
  const int64_t plane = s.input.h * s.input.w;
  const int64_t left = smaller(larger(0, -x0), cols), right = larger(left, smaller(cols, s.input.w - x0));
  for (int64_t r = 0; r < rows; ++r, out += cols * slab) {
    const int64_t y = y0 + r;
    const bool outside = y < 0 || y >= s.input.h;
    if (outside || count < slab || left > 0 || right < cols)
      __builtin_memset(out, 0, cols * slab * sizeof(T));
    if (outside) continue;
    T* at = out + left * slab;
    if (s.channels_last) {
      const T* from = image + (y * s.input.w + x0 + left) * s.channels + c0;
      for (int64_t x = left; x < right; ++x, at += slab, from += s.channels)
        __builtin_memcpy(at, from, count * sizeof(T));
    } else {
      const T* from = image + c0 * plane + y * s.input.w + x0 + left;
      if (slab == 1)
        __builtin_memcpy(at, from, (right - left) * sizeof(T));
      else if (count < kLanesOf<T>)
        for (int64_t c = 0; c < count; ++c)
          for (int64_t x = 0; x < right - left; ++x) at[x * slab + c] = from[c * plane + x];
      else
        transpose(from, count, right - left, plane, [&](int64_t x, int64_t c, Vec<T> v, int64_t n) {
          store_n(at + x * slab + c, v, n);
        });
    }
  }
}

template <typename T>
T sum(const T* values, int64_t n) {
  Vec<T> total{};
  for (int64_t i = 0; i < n; i += kLanesOf<T>) total += load_n(values + i, n - i);
  T result = 0;
  for (int lane = 0; lane < kLanesOf<T>; ++lane) result += total[lane];
  return result;
}

template <typename T>
void weight_gradient(const ConvPoolShape& s, const T* x, const T* grad_y, const uint8_t* code, T* partial,
                     void* memory, int64_t begin, int64_t end) {
  const WeightPlan<T> plan(s);
  const Footprint<T>& footprint = plan.footprint;
  char* scratch = static_cast<char*>(memory);
  T* xs = carve<T>(scratch, plan.batch * plan.tile_size * footprint.slabs * s.groups);
  T* values = carve<T>(scratch, plan.chunk * plan.list_capacity());
  int32_t* offsets = carve<int32_t>(scratch, plan.chunk * plan.list_capacity());
  int64_t* counts = carve<int64_t>(scratch, plan.chunk);
  int32_t* delta = carve<int32_t>(scratch, 256);
  fill_positions(s, footprint.slab, plan.in_cols, delta);
  const int64_t window_stride = s.channels_last ? s.outputs : 1;
  const int64_t output_stride = s.channels_last ? 1 : s.windows();
  const int64_t slab_size = plan.batch * plan.tile_size;

  for (int64_t unit = begin; unit < end; unit += plan.batch) {
    const int64_t tiles = smaller(plan.batch, end - unit);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t place = (unit + tile) % (plan.down * plan.across), n = (unit + tile) / (plan.down * plan.across);
      const int64_t py = place / plan.across * plan.rows, px = place % plan.across * plan.cols;
      const T* image = x + n * s.channels * s.input.h * s.input.w;
      for (int64_t g = 0; g < s.groups; ++g)
        for (int64_t b = 0; b < footprint.slabs; ++b)
          pack_pixels(s, image, g * s.group_channels() + b * footprint.slab,
                      smaller(footprint.slab, s.group_channels() - b * footprint.slab), footprint.slab,
                      (py * s.step.h - s.margin.h) * s.stride.h - s.padding.h,
                      (px * s.step.w - s.margin.w) * s.stride.w - s.padding.w, plan.in_rows, plan.in_cols,
                      xs + (g * footprint.slabs + b) * slab_size + tile * plan.tile_size);
    }
    for (int64_t k0 = 0; k0 < s.outputs; k0 += plan.chunk) {
      // A chunk stays within one group: its outputs are a multiple of the chunk, or the chunk is cut short.
      const int64_t g = k0 / s.group_outputs();
      const int64_t outputs = smaller(plan.chunk, (g + 1) * s.group_outputs() - k0);
      for (int64_t k = 0; k < outputs; ++k) {
        T* value = values + k * plan.list_capacity();
        int32_t* offset = offsets + k * plan.list_capacity();
        int64_t live = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t place = (unit + tile) % (plan.down * plan.across),
                        n = (unit + tile) / (plan.down * plan.across);
          const int64_t top = place / plan.across * plan.rows, left = place % plan.across * plan.cols;
          const int64_t bottom = smaller(top + plan.rows, s.pooled.h), right = smaller(left + plan.cols, s.pooled.w);
          const int64_t plane = n * s.outputs * s.windows() + (k0 + k) * output_stride;
          for (int64_t py = top; py < bottom; ++py) {
            int64_t at = plane + (py * s.pooled.w + left) * window_stride;
            int32_t from = static_cast<int32_t>(
                tile * plan.tile_size + (py - top) * s.step.h * s.stride.h * plan.in_cols * footprint.slab);
            const int32_t step = static_cast<int32_t>(s.step.w * s.stride.w * footprint.slab);
            for (int64_t px = left; px < right; ++px, at += window_stride, from += step) {
              value[live] = grad_y[at];
              offset[live] = from + delta[code[at]];
              live += code[at] < s.positions();
            }
          }
        }
        counts[k] = live;
        partial[(k0 + k) * plan.partial_stride() + footprint.slabs * footprint.dense_size()] += sum(value, live);
      }
      for (int64_t b = 0; b < footprint.slabs; ++b) {
        const T* slab = xs + (g * footprint.slabs + b) * slab_size;
        footprint.for_each_part(s, plan.in_cols, true, kMaxRows, [&](const Part<T>& part) {
          for (int64_t k = 0; k < outputs; ++k)
            part.run(slab, part.source_row, offsets + k * plan.list_capacity(),
                     values + k * plan.list_capacity(), counts[k],
                     partial + (k0 + k) * plan.partial_stride() + b * footprint.dense_size(), part.target_row);
        });
      }
      k0 -= plan.chunk - outputs;
    }
  }
}

template <typename T>
void weight_reduce(const ConvPoolShape& s, const T* partials, int64_t count, T* grad_weight, T* grad_bias) {
  const WeightPlan<T> plan(s);
  const Footprint<T>& footprint = plan.footprint;
  const int64_t stride = weight_partial_size<T>(s);
  for (int64_t k = 0; k < s.outputs; ++k) {
    const T* own = partials + k * plan.partial_stride();
    const auto total = [&](int64_t place) {
      T result = own[place];
      for (int64_t i = 1; i < count; ++i) result += own[i * stride + place];
      return result;
    };
    if (grad_bias) grad_bias[k] = total(footprint.slabs * footprint.dense_size());
    if (!grad_weight) continue;
    for (int64_t c = 0; c < s.group_channels(); ++c)
      for (int64_t ky = 0; ky < s.kernel.h; ++ky)
        for (int64_t kx = 0; kx < s.kernel.w; ++kx) *grad_weight++ = total(footprint.place(s, c, ky, kx));
  }
}

// ---- gradient of x ----

// A unit is one slab of channels of one image, gathered in an image of its own that has room for the paddings
// of convolution and pool.
template <typename T>
struct InputPlan {
  Footprint<T> footprint;
  Pair lead;              // rows and columns before the first one of x
  int64_t height, width;  // of that image
  int64_t outputs_chunk;

  explicit InputPlan(const ConvPoolShape& s) : footprint(s, true) {
    lead = {s.padding.h + s.margin.h * s.stride.h, s.padding.w + s.margin.w * s.stride.w};
    height = larger(lead.h + s.input.h, extent(s.pooled.h, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h));
    width = larger(lead.w + s.input.w, extent(s.pooled.w, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w));
    outputs_chunk = smaller(s.group_outputs(), kOutputsChunk);
  }
  int64_t image_size() const { return height * width * footprint.slab; }
  int64_t buckets(const ConvPoolShape& s) const { return kStripWindows * s.positions(); }
};

template <typename T>
int64_t input_packed_size(const ConvPoolShape& s) {
  const InputPlan<T> plan(s);
  return s.outputs * plan.footprint.slabs * plan.footprint.dense_size();
}

// weight [K, C/G, KH, KW] -> [group][slab][K/G][footprint], zeros where a slab is not full.
template <typename T>
void input_pack(const ConvPoolShape& s, const T* weight, T* packed) {
  const InputPlan<T> plan(s);
  const Footprint<T>& footprint = plan.footprint;
  const int64_t size = footprint.dense_size();
  __builtin_memset(packed, 0, input_packed_size<T>(s) * sizeof(T));
  for (int64_t k = 0; k < s.outputs; ++k) {
    const int64_t g = k / s.group_outputs(), of_group = k % s.group_outputs();
    for (int64_t c = 0; c < s.group_channels(); ++c) {
      const int64_t slab = g * footprint.slabs + c / footprint.slab;
      T* out = packed + (slab * s.group_outputs() + of_group) * size;
      for (int64_t ky = 0; ky < s.kernel.h; ++ky)
        for (int64_t kx = 0; kx < s.kernel.w; ++kx)
          out[footprint.place(s, c % footprint.slab, ky, kx)] = *weight++;
    }
  }
}

template <typename T>
int64_t input_units(const ConvPoolShape& s) {
  return s.batch * s.groups * Footprint<T>(s, true).slabs;
}

template <typename T>
int64_t input_scratch_bytes(const ConvPoolShape& s) {
  const InputPlan<T> plan(s);
  const int64_t buckets = plan.buckets(s);
  return carved_bytes(plan.image_size(), sizeof(T)) + carved_bytes(buckets * plan.outputs_chunk, sizeof(T)) +
         carved_bytes(buckets * plan.outputs_chunk, sizeof(int32_t)) + carved_bytes(buckets, sizeof(int32_t)) +
         carved_bytes(kStripWindows, sizeof(int64_t)) + carved_bytes(256, sizeof(int32_t));
}

// The inverse of pack_pixels over a whole image: crops the padding.
template <typename T>
void unpack_pixels(const ConvPoolShape& s, const InputPlan<T>& plan, const T* from, int64_t c0, int64_t count,
                   T* image) {
  const int64_t plane = s.input.h * s.input.w, slab = plan.footprint.slab;
  for (int64_t y = 0; y < s.input.h; ++y) {
    const T* row = from + ((y + plan.lead.h) * plan.width + plan.lead.w) * slab;
    if (s.channels_last) {
      T* to = image + y * s.input.w * s.channels + c0;
      for (int64_t x = 0; x < s.input.w; ++x)
        __builtin_memcpy(to + x * s.channels, row + x * slab, count * sizeof(T));
    } else {
      T* to = image + c0 * plane + y * s.input.w;
      transpose(row, s.input.w, count, slab,
                [&](int64_t c, int64_t x, Vec<T> v, int64_t n) { store_n(to + c * plane + x, v, n); });
    }
  }
}

template <typename T>
void input_gradient(const ConvPoolShape& s, const T* packed, const T* grad_y, const uint8_t* code, T* grad_x,
                    void* memory, int64_t begin, int64_t end) {
  const InputPlan<T> plan(s);
  const Footprint<T>& footprint = plan.footprint;
  const int64_t positions = s.positions(), chunk = plan.outputs_chunk, size = footprint.dense_size();
  char* scratch = static_cast<char*>(memory);
  T* image = carve<T>(scratch, plan.image_size());
  T* values = carve<T>(scratch, plan.buckets(s) * chunk);
  int32_t* offsets = carve<int32_t>(scratch, plan.buckets(s) * chunk);
  int32_t* counts = carve<int32_t>(scratch, plan.buckets(s));
  int64_t* origins = carve<int64_t>(scratch, kStripWindows);
  int32_t* delta = carve<int32_t>(scratch, 256);
  fill_positions(s, footprint.slab, plan.width, delta);
  const int64_t window_stride = s.channels_last ? s.outputs : 1;
  const int64_t output_stride = s.channels_last ? 1 : s.windows();

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t slab_of_all = unit % (s.groups * footprint.slabs), n = unit / (s.groups * footprint.slabs);
    const int64_t g = slab_of_all / footprint.slabs, b = slab_of_all % footprint.slabs;
    __builtin_memset(image, 0, plan.image_size() * sizeof(T));
    for (int64_t w0 = 0; w0 < s.windows(); w0 += kStripWindows) {
      const int64_t windows = smaller(kStripWindows, s.windows() - w0);
      for (int64_t w = 0; w < windows; ++w) {
        const int64_t py = (w0 + w) / s.pooled.w, px = (w0 + w) % s.pooled.w;
        origins[w] = (py * s.step.h * s.stride.h * plan.width + px * s.step.w * s.stride.w) * footprint.slab;
      }
      for (int64_t k0 = 0; k0 < s.group_outputs(); k0 += chunk) {
        const int64_t outputs = smaller(chunk, s.group_outputs() - k0);
        __builtin_memset(counts, 0, windows * positions * sizeof(int32_t));
        for (int64_t k = 0; k < outputs; ++k) {
          int64_t at = n * s.outputs * s.windows() + (g * s.group_outputs() + k0 + k) * output_stride +
                       w0 * window_stride;
          for (int64_t w = 0; w < windows; ++w, at += window_stride) {
            if (code[at] >= positions) continue;
            const int64_t bucket = w * positions + code[at], entry = bucket * chunk + counts[bucket]++;
            values[entry] = grad_y[at];
            offsets[entry] = static_cast<int32_t>(k * size);
          }
        }
        const T* weights = packed + (slab_of_all * s.group_outputs() + k0) * size;
        footprint.for_each_part(s, plan.width, false, kMaxRows, [&](const Part<T>& part) {
          for (int64_t w = 0; w < windows; ++w)
            for (int64_t q = 0; q < positions; ++q) {
              const int64_t bucket = w * positions + q;
              if (counts[bucket] > 0)
                part.run(weights, part.source_row, offsets + bucket * chunk, values + bucket * chunk,
                         counts[bucket], image + origins[w] + delta[q], part.target_row);
            }
        });
      }
    }
    unpack_pixels(s, plan, image, g * s.group_channels() + b * footprint.slab,
                  smaller(footprint.slab, s.group_channels() - b * footprint.slab),
                  grad_x + n * s.channels * s.input.h * s.input.w);
  }
}

}  // namespace
