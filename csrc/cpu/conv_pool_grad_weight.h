// Gradients of conv_pool's weight and bias, by the sparse sum that conv_pool_footprint.h describes.
#pragma once

#include "conv_pool_live.h"

namespace {

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
  return carved_bytes(plan.batch * plan.tile_size * plan.footprint.slabs, sizeof(T)) +
         carved_bytes(entries, sizeof(T)) + carved_bytes(entries, sizeof(int32_t)) +
         carved_bytes(plan.chunk, sizeof(int64_t));
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
        transpose(from, count, right - left, plane,
                  [&](int64_t x, int64_t c, Vec<T> v, int64_t n) { store_n(at + x * slab + c, v, n); });
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
  const int64_t slab_size = plan.batch * plan.tile_size, capacity = plan.list_capacity();
  char* scratch = static_cast<char*>(memory);
  T* xs = carve<T>(scratch, slab_size * footprint.slabs);
  T* values = carve<T>(scratch, plan.chunk * capacity);
  int32_t* offsets = carve<int32_t>(scratch, plan.chunk * capacity);
  int64_t* counts = carve<int64_t>(scratch, plan.chunk);
  int32_t delta[256];
  fill_positions(s, footprint.slab, plan.in_cols, delta);

  for (int64_t unit = begin; unit < end; unit += plan.batch) {
    const int64_t tiles = smaller(plan.batch, end - unit);
    for (int64_t g = 0; g < s.groups; ++g) {
      for (int64_t i = 0; i < tiles; ++i) {
        const Tile tile = tile_of(s, plan, unit + i);
        for (int64_t b = 0; b < footprint.slabs; ++b)
          pack_pixels(s, x + tile.n * s.channels * s.input.h * s.input.w,
                      g * s.group_channels() + b * footprint.slab,
                      smaller(footprint.slab, s.group_channels() - b * footprint.slab), footprint.slab,
                      (tile.top * s.step.h - s.margin.h) * s.stride.h - s.padding.h,
                      (tile.left * s.step.w - s.margin.w) * s.stride.w - s.padding.w, plan.in_rows,
                      plan.in_cols, xs + b * slab_size + i * plan.tile_size);
      }
      for (int64_t k0 = 0; k0 < s.group_outputs(); k0 += plan.chunk) {
        const int64_t outputs = smaller(plan.chunk, s.group_outputs() - k0),
                      first = g * s.group_outputs() + k0;
        T* sums = partial + first * plan.partial_stride();
        const LiveLists<T> lists{values, offsets, counts, capacity};
        __builtin_memset(counts, 0, outputs * sizeof(int64_t));
        for (int64_t i = 0; i < tiles; ++i)
          list_live(s, plan, tile_of(s, plan, unit + i), first, outputs, i * plan.tile_size, grad_y, code,
                    delta, lists);
        for (int64_t k = 0; k < outputs; ++k)
          sums[k * plan.partial_stride() + footprint.slabs * footprint.dense_size()] +=
              sum(values + k * capacity, counts[k]);
        for (int64_t b = 0; b < footprint.slabs; ++b)
          footprint.for_each_part(s, plan.in_cols, true, kMaxRows, [&](const Part<T>& part) {
            for (int64_t k = 0; k < outputs; ++k)
              part.run(xs + b * slab_size, part.source_row, offsets + k * capacity, values + k * capacity,
                       counts[k], sums + k * plan.partial_stride() + b * footprint.dense_size(),
                       part.target_row);
          });
      }
    }
  }
}

// Of outputs [begin, end).
template <typename T>
void weight_reduce(const ConvPoolShape& s, const T* partials, int64_t count, T* grad_weight, T* grad_bias,
                   int64_t begin, int64_t end) {
  const WeightPlan<T> plan(s);
  const Footprint<T>& footprint = plan.footprint;
  const int64_t stride = weight_partial_size<T>(s), taps = s.kernel.h * s.kernel.w;
  for (int64_t k = begin; k < end; ++k) {
    const T* own = partials + k * plan.partial_stride();
    const auto total = [&](const T* at, int64_t n) {
      Vec<T> result = load_n(at, n);
      for (int64_t i = 1; i < count; ++i) result += load_n(at + i * stride, n);
      return result;
    };
    if (grad_bias) grad_bias[k] = total(own + footprint.slabs * footprint.dense_size(), 1)[0];
    if (!grad_weight) continue;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t c = 0; c < s.group_channels(); c += kLanesOf<T>) {
        const T* from = own + footprint.place(s, c, tap / s.kernel.w, tap % s.kernel.w);
        // A slab is a multiple of the lanes, or all channels.
        const int64_t n = smaller(s.group_channels() - c, kLanesOf<T>);
        const Vec<T> sums = total(from, n);
        T* to = grad_weight + (k * s.group_channels() + c) * taps + tap;
        for (int64_t i = 0; i < n; ++i) to[i * taps] = sums[i];
      }
  }
}

}  // namespace
