// conv_pool forward by Winograd's F(2x2, 3x3), for 3x3 kernels of stride 1: 2.25 times fewer products.
//
// A tile is 2x2 outputs of the convolution: a 2x2 pooling window, two 2x1 or 1x2 windows, or four outputs
// where there is no pool (windows 1x1). One vector runs over tiles, which are numbered through the rows of
// an image and through the images. A block of tiles goes through three phases:
//   1. the input transform:  V[place][channel][tile];
//   2. for some outputs at a time, 16 products:  M[place][output][tile] = U[place][output][channel] * V;
//   3. the inverse transform of those outputs, with bias, pool, activation and code in registers.
// Every number is computed by the same operations in the same order wherever its tile stands in a block.
//
// Inf and NaN spread over a whole tile, and huge numbers may overflow in between: images with an output
// that is not finite are reported, and the host computes them again by the direct kernel.
#pragma once

#include "conv_pool_forward.h"
#include "conv_pool_winograd_input.h"
#include "conv_pool_winograd_product.h"

namespace {

inline int64_t winograd_packed_size(const ConvPoolShape& s) {
  return kPlaces * s.outputs * WinogradPlan(s).weight_stride;
}
inline int64_t winograd_pack_units(const ConvPoolShape& s) { return WinogradPlan(s).output_blocks; }
inline int64_t winograd_units(const ConvPoolShape& s) { return ceil_div(WinogradPlan(s).total, kPanelTiles); }

inline int64_t winograd_scratch_bytes(const ConvPoolShape& s) {
  const WinogradPlan plan(s);
  return carved_bytes(kPlaces * plan.v_stride, sizeof(float)) +
         carved_bytes(kPlaces * plan.m_stride, sizeof(float)) +
         carved_bytes(plan.turned_size(s), sizeof(float)) +
         2 * carved_bytes(plan.stage_size(), sizeof(float)) + 3 * carved_bytes(plan.block, sizeof(float)) +
         carved_bytes(plan.stage_stride, 1) + carved_bytes(plan.block, sizeof(TileRun)) +
         carved_bytes(plan.vectors(s), sizeof(TileVector)) + carved_bytes(plan.pixels(s), sizeof(int64_t));
}

// weight [K, C, 3, 3] -> for output blocks [begin, end): U[place][output of the block][channel].
inline void winograd_pack(const ConvPoolShape& s, const float* weight, float* packed, int64_t begin,
                          int64_t end) {
  const WinogradPlan plan(s);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = plan.first_output(s, b), count = plan.first_output(s, b + 1) - first;
    float* u = packed + kPlaces * first * plan.weight_stride;
    for (int64_t k = 0; k < count; ++k)
      transform_weights(weight + (first + k) * s.channels * 9, s.channels, u + k * plan.weight_stride,
                        count * plan.weight_stride);
  }
}

// A finite later value wins if greater; tiles of others are not used.
template <bool kCodes>
CNNRNN_INLINE void challenge(vf value, int64_t position, vf& best, Code<float>& code) {
  if constexpr (kCodes) code = value > best ? code_of<float>(position) : code;
  best = vmax(value, best);
}

// The same between values that compete by their activated keys.
CNNRNN_INLINE void challenge(vf key, vf value, int64_t position, vf& best_key, vf& best, Code<float>& code) {
  const Code<float> wins = key > best_key;
  code = wins ? code_of<float>(position) : code;
  best = wins ? value : best;
  best_key = wins ? key : best_key;
}

// Two rows of outputs of a tile, side by side as in the image.
template <bool kCodes>
CNNRNN_INLINE void finish_columns(bool relu, const vf (&best)[2], const Code<float> (&code)[2], float* y,
                                  float* codes) {
  vf values[2], positions[2];
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    finish<float, kCodes>(relu, best[j], code[j], reinterpret_cast<float*>(&values[j]),
                          reinterpret_cast<float*>(&positions[j]));
  }
  storeu(y, interleave<float, 0>(values[0], values[1]));
  storeu(y + kLanes, interleave<float, kLanes / 2>(values[0], values[1]));
  if constexpr (kCodes) {
    storeu(codes, interleave<float, 0>(positions[0], positions[1]));
    storeu(codes + kLanes, interleave<float, kLanes / 2>(positions[0], positions[1]));
  }
}

// Phase 3 for windows of H x W: ys and codes [outputs][2 / H][stage_stride]. right and below: lanes whose
// window reaches beyond the map. health: NaN in the lanes of tiles with an output that is not finite.
template <int H, int W, bool kCodes, bool kKeyed>
void inverse_block(const ConvPoolShape& s, const WinogradPlan& plan, const float* m, const float* bias,
                   int64_t outputs, int64_t tiles, const int32_t* right, const int32_t* below, float* ys,
                   float* codes, float* health) {
  for (int64_t t = 0; t < tiles; t += kLanes) {
    vf sick = loadu(health + t);
    const vi beyond_right = loadu(right + t), beyond_below = loadu(below + t);
    for (int64_t k = 0; k < outputs; ++k) {
      vf y[4];
      transform_output(m + k * plan.block + t, plan.m_stride, y);
      const vf shift = broadcast(bias ? bias[k] : 0.0f);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) y[i] += shift;
      sick += ((y[0] + y[1]) + (y[2] + y[3])) * 0.0f;
      // Beyond the map stands the pixel before again: a copy never wins.
      if (H == 2 && plan.hangs_below) {
        y[2] = beyond_below ? y[0] : y[2];
        y[3] = beyond_below ? y[1] : y[3];
      }
      if (W == 2 && plan.hangs_right) {
        y[1] = beyond_right ? y[0] : y[1];
        y[3] = beyond_right ? y[2] : y[3];
      }
      vf keys[4];
      if constexpr (kKeyed) {
        kActivations<float>[s.activation].value(reinterpret_cast<const float*>(y),
                                                reinterpret_cast<float*>(keys), 4 * kLanes);
      }
#pragma GCC unroll 2
      for (int i = 0; i < 2 / H; ++i) {
        const int64_t at = (k * (2 / H) + i) * plan.stage_stride + 2 / W * t;
        vf best[2] = {y[2 * i], y[2 * i + 1]};
        Code<float> code[2] = {};
        constexpr int kLast = W == 2 ? 0 : 1;  // the window that y[3] belongs to
        if constexpr (kKeyed) {
          vf best_key[2] = {keys[2 * i], keys[2 * i + 1]};
          const auto enter = [&](int j, int64_t position, int window) {
            challenge(keys[j], y[j], position, best_key[window], best[window], code[window]);
          };
          if constexpr (W == 2) enter(2 * i + 1, 1, 0);
          if constexpr (H == 2) enter(2, W, 0);
          if constexpr (H == 2) enter(3, 2 * W - 1, kLast);
        } else {
          if constexpr (W == 2) challenge<kCodes>(y[2 * i + 1], 1, best[0], code[0]);
          if constexpr (H == 2) challenge<kCodes>(y[2], W, best[0], code[0]);
          if constexpr (H == 2) challenge<kCodes>(y[3], 2 * W - 1, best[kLast], code[kLast]);
        }
        if constexpr (W == 2)
          finish<float, kCodes>(s.relu, best[0], code[0], ys + at, codes + at);
        else
          finish_columns<kCodes>(s.relu, best, code, ys + at, codes + at);
      }
    }
    storeu(health + t, sick);
  }
}

using InverseBlock = decltype(&inverse_block<2, 2, true, false>);

template <int H, int W>
InverseBlock inverse_of_window(bool codes, bool keyed) {
  if constexpr (H * W > 1)
    if (keyed) return codes ? inverse_block<H, W, true, true> : inverse_block<H, W, false, true>;
  return codes ? inverse_block<H, W, true, false> : inverse_block<H, W, false, false>;
}

inline InverseBlock inverse_of(const ConvPoolShape& s, bool codes) {
  if (s.window.h == 1)
    return (s.window.w == 1 ? inverse_of_window<1, 1> : inverse_of_window<1, 2>)(codes, s.keyed);
  return (s.window.w == 1 ? inverse_of_window<2, 1> : inverse_of_window<2, 2>)(codes, s.keyed);
}

// Copies of a few numbers, which a call of the C library's would take as long as.
CNNRNN_INLINE void copy_row(float* to, const float* from, int64_t n) {
  if (n < kLanes) {
    for (int64_t j = 0; j < n; ++j) to[j] = from[j];
    return;
  }
  for (int64_t j = 0; j + kLanes < n; j += kLanes) storeu(to + j, loadu(from + j));
  storeu(to + n - kLanes, loadu(from + n - kLanes));
}

// Copies the staged outputs [k0, k0 + outputs) to y and code, images of size `map`. turned, bytes: for one
// row of outputs and for one output of it.
inline void write_block(const ConvPoolShape& s, const WinogradPlan& plan, Pair map, const TileRun* runs,
                        int64_t count, const float* ys, const float* codes, float* turned, uint8_t* bytes,
                        int64_t k0, int64_t outputs, float* y, uint8_t* code) {
  // Calls copy(where it stands in a staged row, pixel of the batch's images, pixels) for each run of a row.
  const auto for_each_run = [&](int64_t i, const auto& copy) {
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = plan.outputs.h * runs[r].row + i, column = plan.outputs.w * runs[r].column;
      if (row >= map.h) continue;
      copy(plan.outputs.w * runs[r].tile, runs[r].image, row * map.w + column,
           smaller(plan.outputs.w * runs[r].count, map.w - column));
    }
  };
  const int64_t staged = plan.outputs.h * plan.stage_stride;  // between outputs
  for (int64_t i = 0; i < plan.outputs.h; ++i, ys += plan.stage_stride, codes += plan.stage_stride) {
    if (s.channels_last) {
      constexpr int64_t kMostCodes = kBlockOutputs + kLanes;
      const int64_t stride = plan.turned_stride(), columns = plan.outputs.w * plan.block;
      const auto turn = [&](const float* staged_rows) {
        transpose(staged_rows, outputs, columns, staged,
                  [&](int64_t j, int64_t k, vf v, int64_t) { storeu(turned + j * stride + k, v); });
      };
      const auto for_each_pixel = [&](const auto& copy) {
        for_each_run(i, [&](int64_t from, int64_t image, int64_t pixel, int64_t width) {
          for (int64_t j = 0; j < width; ++j)
            copy(turned + (from + j) * stride, (image * s.windows() + pixel + j) * s.outputs + k0);
        });
      };
      turn(ys);
      for_each_pixel([&](const float* from, int64_t to) { copy_row(y + to, from, outputs); });
      if (!code) continue;
      turn(codes);
      for_each_pixel([&](const float* from, int64_t to) {
        uint8_t of_pixel[kMostCodes];
        for (int64_t k = 0; k < outputs; k += kLanes)
          store_codes<float>(of_pixel + k, loadu(from + k), kLanes);
        __builtin_memcpy(code + to, of_pixel, outputs);
      });
      continue;
    }
    for (int64_t k = 0; k < outputs; ++k) {
      const float* row = ys + k * staged;
      for_each_run(i, [&](int64_t from, int64_t image, int64_t pixel, int64_t width) {
        copy_row(y + (image * s.outputs + k0 + k) * s.windows() + pixel, row + from, width);
      });
      if (!code) continue;
      for (int64_t j = 0; j < plan.stage_stride; j += kLanes)
        store_codes<float>(bytes + j, loadu(codes + k * staged + j), kLanes);
      for_each_run(i, [&](int64_t from, int64_t image, int64_t pixel, int64_t width) {
        __builtin_memcpy(code + (image * s.outputs + k0 + k) * s.windows() + pixel, bytes + from, width);
      });
    }
  }
}

// Tiles of panels [begin, end). not_finite [N]: set to 1 for images whose outputs are to be computed again.
inline void winograd(const ConvPoolShape& s, const float* x, const float* packed, const float* bias, float* y,
                     uint8_t* code, float* kept, uint8_t* not_finite, void* memory, int64_t begin,
                     int64_t end) {
  const WinogradPlan plan(s);
  char* scratch = static_cast<char*>(memory);
  float* v = carve<float>(scratch, kPlaces * plan.v_stride);
  float* m = carve<float>(scratch, kPlaces * plan.m_stride);
  float* turned = carve<float>(scratch, plan.turned_size(s));
  float* ys = carve<float>(scratch, plan.stage_size());
  float* codes = carve<float>(scratch, plan.stage_size());
  uint8_t* bytes = carve<uint8_t>(scratch, plan.stage_stride);
  int32_t* right = carve<int32_t>(scratch, plan.block);
  int32_t* below = carve<int32_t>(scratch, plan.block);
  float* health = carve<float>(scratch, plan.block);
  TileRun* runs = carve<TileRun>(scratch, plan.block);
  TileVector* vectors = carve<TileVector>(scratch, plan.vectors(s));
  int64_t* pixels = carve<int64_t>(scratch, plan.pixels(s));
  // What follows the last tile of a run takes part in the arithmetic, without effect: it must be numbers.
  __builtin_memset(memory, 0, reinterpret_cast<char*>(ys) - static_cast<char*>(memory));

  const InverseBlock inverse = inverse_of(s, code != nullptr);
  const int64_t of_image = plan.tiles.h * plan.tiles.w, last = smaller(end * kPanelTiles, plan.total);
  // One output a tile: rows follow one another in y without a gap.
  const bool whole_images = s.window.h * s.window.w == 4;
  const Pair map = whole_images ? Pair{1, s.windows()} : s.pooled;
  for (int64_t first = begin * kPanelTiles; first < last; first += plan.block) {
    const int64_t count = smaller(plan.block, last - first), tiles = round_up(count, kPanelTiles);
    const int64_t input_runs = winograd_runs(plan.tiles, first, count, runs);
    if (s.channels_last) {
      tile_pixels(s, runs, input_runs, pixels);
      transform_pixels(s, plan, x, pixels, count, turned, v);
    } else {
      transform_planes(s, plan, x, vectors, tile_vectors(s, runs, input_runs, vectors), v);
    }
    for (int64_t t = 0; t < plan.block; ++t) {
      const int64_t place = (first + t) % of_image;
      right[t] = 2 * (place % plan.tiles.w) + 1 >= s.conv.w ? -1 : 0;
      below[t] = 2 * (place / plan.tiles.w) + 1 >= s.conv.h ? -1 : 0;
      health[t] = 0;
    }
    const int64_t output_runs =
        winograd_runs(whole_images ? Pair{1, of_image} : plan.tiles, first, count, runs);
    for (int64_t b = 0; b < plan.output_blocks; ++b) {
      const int64_t k = plan.first_output(s, b), outputs = plan.first_output(s, b + 1) - k;
      const float* u = packed + kPlaces * k * plan.weight_stride;
      for (int64_t p = 0; p < kPlaces; ++p)
        multiply_place<false>(u + p * outputs * plan.weight_stride, plan.weight_stride, outputs,
                              v + p * plan.v_stride, plan.block, tiles, s.channels, m + p * plan.m_stride,
                              plan.block);
      inverse(s, plan, m, bias ? bias + k : nullptr, outputs, tiles, right, below, ys, codes, health);
      const auto write = [&](float* to, uint8_t* to_code) {
        write_block(s, plan, map, runs, output_runs, ys, codes, turned, bytes, k, outputs, to, to_code);
      };
      if (kept) write(kept, nullptr);
      if (s.activation != cnnrnn::kNoActivation)
        kActivations<float>[s.activation].value(ys, ys, outputs * plan.outputs.h * plan.stage_stride);
      write(y, code);
    }
    for (int64_t t = 0; t < count; ++t)
      if (health[t] != 0) __atomic_store_n(not_finite + (first + t) / of_image, 1, __ATOMIC_RELAXED);
  }
}

}  // namespace
