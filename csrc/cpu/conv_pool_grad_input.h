// Gradient of conv_pool's x, by the sparse sum that conv_pool_footprint.h describes.
#pragma once

#include "conv_pool_footprint.h"
#include "transpose.h"

namespace {

constexpr int64_t kStripWindows = 32;   // windows whose buckets exist at once
constexpr int64_t kBucketOutputs = 64;  // output channels of a bucket

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
    height = larger(lead.h + s.input.h,
                    extent(s.pooled.h, s.step.h, s.window.h, s.stride.h, s.kernel.h, s.dilation.h));
    width = larger(lead.w + s.input.w,
                   extent(s.pooled.w, s.step.w, s.window.w, s.stride.w, s.kernel.w, s.dilation.w));
    outputs_chunk = smaller(s.group_outputs(), kBucketOutputs);
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
         carved_bytes(buckets * plan.outputs_chunk, sizeof(int32_t)) +
         carved_bytes(buckets, sizeof(int32_t)) + carved_bytes(kStripWindows, sizeof(int64_t)) +
         carved_bytes(256, sizeof(int32_t));
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
