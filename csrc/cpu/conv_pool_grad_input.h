// Gradient of conv_pool's x, by the sparse sum that conv_pool_footprint.h describes.
//
// A unit is one slab of channels of one image. It goes down the image in strips of pooled rows: a buffer
// gathers the rows of grad_x under a strip, with room for the paddings; those that no later strip reaches are
// written out, the others move up.
#pragma once

#include "conv_pool_footprint.h"
#include "transpose.h"

namespace {

constexpr int64_t kBufferBytes = 262144;  // of a strip: stays in L2
constexpr int64_t kBucketWindows = 32;    // windows whose buckets exist at once
constexpr int64_t kBucketOutputs = 64;    // output channels of a bucket
constexpr int64_t kWeightVectors = 8;     // of a footprint at a time: those of a bucket's weights stay in L1

template <typename T>
struct InputPlan {
  Footprint<T> footprint;
  Pair lead;              // rows and columns of the buffer before the first one of x
  int64_t rows;           // pooled rows of a strip
  int64_t advance;        // rows of x from one strip to the next
  int64_t height, width;  // of the buffer
  int64_t outputs;        // output channels of a bucket

  explicit InputPlan(const ConvPoolShape& s) : footprint(s, true) {
    lead = {s.padding.h + s.margin.h * s.stride.h, s.padding.w + s.margin.w * s.stride.w};
    width = larger(lead.w + s.input.w,
                   extent(s.pooled.w, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w));
    const int64_t fits = kBufferBytes / sizeof(T) / (width * footprint.slab);
    rows = 1;
    while (rows < s.pooled.h && height_of(s, rows + 1) <= fits) ++rows;
    height = height_of(s, rows);
    advance = rows * s.step.h * s.stride.h;
    outputs = smaller(s.group_outputs(), kBucketOutputs);
  }

  static int64_t height_of(const ConvPoolShape& s, int64_t rows) {
    const int64_t reached = extent(rows, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h);
    return larger(reached, rows * s.step.h * s.stride.h);
  }
  int64_t buffer_size() const { return height * width * footprint.slab; }
  int64_t buckets(const ConvPoolShape& s) const { return kBucketWindows * s.positions(); }
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
  const int64_t buckets = plan.buckets(s), entries = buckets * plan.outputs;
  return carved_bytes(plan.buffer_size(), sizeof(T)) + carved_bytes(entries, sizeof(T)) +
         carved_bytes(entries, sizeof(int32_t)) + carved_bytes(buckets, sizeof(int32_t));
}

// The live outputs of some windows, sorted by window and position: for each, its grad_y and where its output
// channel's weights begin.
template <typename T>
struct Buckets {
  const ConvPoolShape& s;
  int64_t capacity, weight_size;
  T* values;
  int32_t *offsets, *counts;

  // grad_y and code from window 0 of channel 0 on.
  void fill(const T* grad_y, const uint8_t* code, int64_t windows, int64_t outputs) const {
    const int64_t positions = s.positions();
    const int64_t window_stride = s.channels_last ? s.outputs : 1;
    const int64_t output_stride = s.channels_last ? 1 : s.windows();
    __builtin_memset(counts, 0, windows * positions * sizeof(int32_t));
    for (int64_t k = 0; k < outputs; ++k) {
      int64_t at = k * output_stride;
      for (int64_t w = 0; w < windows; ++w, at += window_stride) {
        if (code[at] >= positions) continue;
        const int64_t bucket = w * positions + code[at], entry = bucket * capacity + counts[bucket]++;
        values[entry] = grad_y[at];
        offsets[entry] = static_cast<int32_t>(k * weight_size);
      }
    }
  }
};

// Adds what the windows of one strip, pooled rows [row, row + rows), pass back to the buffer.
template <typename T>
void scatter_strip(const ConvPoolShape& s, const InputPlan<T>& plan, const Buckets<T>& buckets,
                   const int32_t* delta, const T* weights, const T* grad_y, const uint8_t* code, int64_t row,
                   int64_t rows, T* buffer) {
  const int64_t first = row * s.pooled.w, last = (row + rows) * s.pooled.w;
  const int64_t window_stride = s.channels_last ? s.outputs : 1;
  const int64_t output_stride = s.channels_last ? 1 : s.windows();
  const int64_t slab = plan.footprint.slab, positions = s.positions();
  const int64_t weight_rows = smaller(kMaxRows, larger(1, kWeightVectors / plan.footprint.vectors));
  for (int64_t w0 = first; w0 < last; w0 += kBucketWindows) {
    const int64_t windows = smaller(kBucketWindows, last - w0);
    for (int64_t k0 = 0; k0 < s.group_outputs(); k0 += plan.outputs) {
      const int64_t from = k0 * output_stride + w0 * window_stride;
      buckets.fill(grad_y + from, code + from, windows, smaller(plan.outputs, s.group_outputs() - k0));
      plan.footprint.for_each_part(s, plan.width, false, weight_rows, [&](const Part<T>& part) {
        for (int64_t w = 0; w < windows; ++w) {
          const int64_t py = (w0 + w) / s.pooled.w - row, px = (w0 + w) % s.pooled.w;
          T* origin = buffer + (py * s.step.h * s.stride.h * plan.width + px * s.step.w * s.stride.w) * slab;
          for (int64_t q = 0; q < positions; ++q) {
            const int64_t bucket = w * positions + q, entry = bucket * buckets.capacity;
            if (buckets.counts[bucket] > 0)
              part.run(weights + k0 * buckets.weight_size, part.source_row, buckets.offsets + entry,
                       buckets.values + entry, buckets.counts[bucket], origin + delta[q], part.target_row);
          }
        }
      });
    }
  }
}

// Writes buffer rows [0, rows), which are rows top.. of channels [c0, c0 + count) of one image of grad_x;
// those outside the image are dropped.
template <typename T>
void write_rows(const ConvPoolShape& s, const InputPlan<T>& plan, const T* buffer, int64_t rows, int64_t top,
                int64_t c0, int64_t count, T* image) {
  const int64_t plane = s.input.h * s.input.w, slab = plan.footprint.slab;
  for (int64_t y = larger(top, 0); y < smaller(top + rows, s.input.h); ++y) {
    const T* row = buffer + ((y - top) * plan.width + plan.lead.w) * slab;
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
  const int64_t entries = plan.buckets(s) * plan.outputs, row_size = plan.width * footprint.slab;
  char* scratch = static_cast<char*>(memory);
  T* buffer = carve<T>(scratch, plan.buffer_size());
  T* values = carve<T>(scratch, entries);
  int32_t* offsets = carve<int32_t>(scratch, entries);
  int32_t* counts = carve<int32_t>(scratch, plan.buckets(s));
  const Buckets<T> buckets{s, plan.outputs, footprint.dense_size(), values, offsets, counts};
  int32_t delta[256];
  fill_positions(s, footprint.slab, plan.width, delta);
  __builtin_memset(buffer, 0, plan.buffer_size() * sizeof(T));

  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t slabs = s.groups * footprint.slabs, n = unit / slabs, of_all = unit % slabs;
    const int64_t g = of_all / footprint.slabs, c0 = of_all % footprint.slabs * footprint.slab;
    const int64_t count = smaller(footprint.slab, s.group_channels() - c0);
    const int64_t of_image = n * s.outputs * s.windows();
    const int64_t k0 = of_image + g * s.group_outputs() * (s.channels_last ? 1 : s.windows());
    const T* weights = packed + of_all * s.group_outputs() * footprint.dense_size();
    T* image = grad_x + n * s.channels * s.input.h * s.input.w;
    int64_t top = -plan.lead.h;  // row of x in the buffer's first row
    for (int64_t row = 0; row < s.pooled.h; row += plan.rows) {
      if (row > 0) {
        write_rows(s, plan, buffer, plan.advance, top, g * s.group_channels() + c0, count, image);
        const int64_t kept = (plan.height - plan.advance) * row_size;
        __builtin_memmove(buffer, buffer + plan.advance * row_size, kept * sizeof(T));
        __builtin_memset(buffer + kept, 0, plan.advance * row_size * sizeof(T));
        top += plan.advance;
      }
      scatter_strip(s, plan, buckets, delta, weights, grad_y + k0, code + k0, row,
                    smaller(plan.rows, s.pooled.h - row), buffer);
    }
    // What is left, then rows that no window reached: zeros, and so the buffer is for the next unit.
    for (; top < s.input.h; top += plan.height) {
      write_rows(s, plan, buffer, plan.height, top, g * s.group_channels() + c0, count, image);
      __builtin_memset(buffer, 0, plan.buffer_size() * sizeof(T));
    }
  }
}

}  // namespace
