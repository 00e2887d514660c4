// conv_pool forward by Winograd's F(ExE, 3x3), for 3x3 kernels of stride 1: 2.25 (E = 2) or 4 (E = 4) times
// fewer products.
//
// A tile is ExE outputs of the convolution, cut into pooling windows of up to 2x2. One vector runs over
// tiles, which are numbered through the rows of an image and through the images. A group of a few panels of
// tiles goes through three phases:
//   1. the input transform, panel by panel:  V[place][channel][tile];
//   2. for some outputs at a time, a product for each place, as `Product` computes it:
//      M[place][output][tile] = U[place][output][channel] * V;
//   3. the inverse transform of those outputs, with bias, pool, activation and code in registers.
// Every number is computed by the same operations in the same order wherever its tile stands in a group.
//
// Inf and NaN spread over a whole tile, and huge numbers may overflow in between: images with an output
// that is not finite are reported, and the host computes them again by the direct kernel.
#pragma once

#include "conv_pool_forward.h"
#include "conv_pool_winograd_input.h"
#include "conv_pool_winograd_product.h"

namespace {

template <int E>
int64_t winograd_packed_size(const ConvPoolShape& s) {
  return kPlacesOf<E> * s.outputs * s.channels;
}
template <int E>
int64_t winograd_units(const ConvPoolShape& s) {
  return ceil_div(WinogradPlan<E>(s).total, kPanelTiles);
}
template <typename Product>
int64_t winograd_output_panels(const ConvPoolShape& s) {
  return ceil_div(s.outputs, Product::kPanelOutputs);
}

template <int E, typename Product>
int64_t winograd_scratch_bytes(const ConvPoolShape& s) {
  const WinogradPlan<E, Product> plan(s);
  return carved_bytes(plan.panels * plan.v_size(), sizeof(typename Product::Value)) +
         carved_bytes(staged_size(plan, s), sizeof(float)) +
         carved_bytes(plan.panels * plan.m_size(), sizeof(float)) +
         carved_bytes(plan.turned_size(s), sizeof(float)) +
         2 * carved_bytes(plan.stage_size(), sizeof(float)) + carved_bytes(plan.stage_stride, 1) +
         3 * carved_bytes(plan.group(), sizeof(float)) + carved_bytes(plan.group(), sizeof(TileRun)) +
         carved_bytes(kPanelTiles, sizeof(TileVector<E>)) + carved_bytes(plan.pixels(s), sizeof(int64_t));
}

// weight [K, C, 3, 3] -> for output panels [begin, end): U[place][channel][output of the panel]. mirrored:
// weight is [C, K, 3, 3] and each kernel turned by half a turn, as for the gradient of the input.
template <int E>
void winograd_pack(const ConvPoolShape& s, const float* weight, bool mirrored, float* packed, int64_t begin,
                   int64_t end) {
  const WinogradPlan<E> plan(s);
  const int64_t of_output = 9 * (mirrored ? 1 : s.channels), of_channel = 9 * (mirrored ? s.outputs : 1);
  constexpr int64_t kRows = (kPanelRows + kLanes - 1) / kLanes * kLanes;
  float staged[kPlacesOf<E> * kRows * kLanes] = {};  // [place][output][channel]
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = plan.first_output(s, panel), rows = plan.first_output(s, panel + 1) - first;
    float* u = packed + kPlacesOf<E> * first * s.channels;
    for (int64_t c = 0; c < s.channels; c += kLanes) {
      const int64_t channels = smaller(kLanes, s.channels - c);
      int64_t offsets[kLanes];  // lanes beyond the last channel repeat it
      for (int64_t lane = 0; lane < kLanes; ++lane)
        offsets[lane] = (c + smaller(lane, channels - 1)) * of_channel;
      for (int64_t k = 0; k < rows; ++k) {
        vf taps[9];
#pragma GCC unroll 9
        for (int tap = 0; tap < 9; ++tap) {
          const float* from = weight + (first + k) * of_output + (mirrored ? 8 - tap : tap);
          vf lanes{};
#pragma GCC unroll 16
          for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = from[offsets[lane]];
          taps[tap] = lanes;
        }
        transform_weights<E>(taps, staged + k * kLanes, kRows * kLanes);
      }
      for (int64_t p = 0; p < kPlacesOf<E>; ++p) {
        for (int64_t k = 0; k < rows; k += kLanes) {
          vf block[kLanes];
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) block[i] = loadu(staged + (p * kRows + k + i) * kLanes);
          transpose<float>(block);
          // A whole vector may reach into the next channel, if that is written afterwards.
          float* to = u + (p * s.channels + c) * rows + k;
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) {
            if (k == 0 && c + i < s.channels - kLanes)
              storeu(to + i * rows, block[i]);
            else if (i < channels)
              store_n(to + i * rows, block[i], rows - k);
          }
        }
      }
    }
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

// Element 0 of each of N vectors, then element 1 of each, and so on.
template <int N>
CNNRNN_INLINE void store_in_turns(float* to, const vf (&v)[N]) {
  constexpr int kHalf = kLanes / 2;
  if constexpr (N == 1) {
    storeu(to, v[0]);
  } else if constexpr (N == 2) {
    storeu(to, interleave<float, 0>(v[0], v[1]));
    storeu(to + kLanes, interleave<float, kHalf>(v[0], v[1]));
  } else {
    const vf low[2] = {interleave<float, 0>(v[0], v[2]), interleave<float, 0>(v[1], v[3])};
    const vf high[2] = {interleave<float, kHalf>(v[0], v[2]), interleave<float, kHalf>(v[1], v[3])};
    store_in_turns<2>(to, low);
    store_in_turns<2>(to + 2 * kLanes, high);
  }
}

// Phase 3 of one panel for windows of H x W: ys and codes [outputs][E / H][stage_stride]. columns and rows:
// of the map that remain from each tile's first on. health: NaN in the lanes of tiles with an output that is
// not finite.
template <int E, typename Product, int H, int W, bool kCodes, bool kKeyed>
void inverse_panel(const ConvPoolShape& s, const WinogradPlan<E, Product>& plan, const float* m,
                   const float* bias, int64_t outputs, const int32_t* columns, const int32_t* rows, float* ys,
                   float* codes, float* health) {
  for (int64_t t = 0; t < kPanelTiles; t += kLanes) {
    vf sick = loadu(health + t);
    const vi columns_left = loadu(columns + t), rows_left = loadu(rows + t);
    for (int64_t k = 0; k < outputs; ++k) {
      vf y[E][E];
      transform_output<E>(m + k * kPanelTiles + t, plan.m_stride, y);
      const vf shift = broadcast(bias ? bias[k] : 0.0f);
      vf sum{};
#pragma GCC unroll 4
      for (int i = 0; i < E; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < E; ++j) y[i][j] += shift, sum += y[i][j];
      sick += sum * 0.0f;
      // Where a window reaches beyond the map stands the pixel before again: a copy never wins.
      if (H == 2 && plan.hangs_below) {
#pragma GCC unroll 2
        for (int i = 1; i < E; i += 2)
#pragma GCC unroll 4
          for (int j = 0; j < E; ++j) y[i][j] = rows_left <= i ? y[i - 1][j] : y[i][j];
      }
      if (W == 2 && plan.hangs_right) {
#pragma GCC unroll 4
        for (int i = 0; i < E; ++i)
#pragma GCC unroll 2
          for (int j = 1; j < E; j += 2) y[i][j] = columns_left <= j ? y[i][j - 1] : y[i][j];
      }
      vf keys[E][E];
      if constexpr (kKeyed) {
        kActivations<float>[s.activation].value(reinterpret_cast<const float*>(y),
                                                reinterpret_cast<float*>(keys), E * E * kLanes);
      }
#pragma GCC unroll 4
      for (int i = 0; i < E / H; ++i) {
        const int64_t at = (k * (E / H) + i) * plan.stage_stride + E / W * t;
        vf values[E / W], positions[E / W];
#pragma GCC unroll 4
        for (int j = 0; j < E / W; ++j) {
          vf best = y[H * i][W * j];
          [[maybe_unused]] vf best_key = keys[H * i][W * j];
          Code<float> code{};
          const auto enter = [&](int row, int column, int64_t position) {
            if constexpr (kKeyed)
              challenge(keys[row][column], y[row][column], position, best_key, best, code);
            else
              challenge<kCodes>(y[row][column], position, best, code);
          };
          if constexpr (W == 2) enter(H * i, W * j + 1, 1);
          if constexpr (H == 2) enter(H * i + 1, W * j, W);
          if constexpr (H == 2 && W == 2) enter(H * i + 1, W * j + 1, 3);
          finish<float, kCodes>(s.relu, best, code, reinterpret_cast<float*>(&values[j]),
                                reinterpret_cast<float*>(&positions[j]));
        }
        store_in_turns<E / W>(ys + at, values);
        if constexpr (kCodes) store_in_turns<E / W>(codes + at, positions);
      }
    }
    storeu(health + t, sick);
  }
}

template <int E, typename P>
using InversePanel = decltype(&inverse_panel<E, P, 2, 2, true, false>);

template <int E, typename P, int H, int W>
InversePanel<E, P> inverse_of_window(bool codes, bool keyed) {
  if constexpr (H * W > 1)
    if (keyed) return codes ? inverse_panel<E, P, H, W, true, true> : inverse_panel<E, P, H, W, false, true>;
  return codes ? inverse_panel<E, P, H, W, true, false> : inverse_panel<E, P, H, W, false, false>;
}

template <int E, typename P>
InversePanel<E, P> inverse_of(const ConvPoolShape& s, bool codes) {
  if (s.window.h == 1)
    return (s.window.w == 1 ? inverse_of_window<E, P, 1, 1> : inverse_of_window<E, P, 1, 2>)(codes, s.keyed);
  return (s.window.w == 1 ? inverse_of_window<E, P, 2, 1> : inverse_of_window<E, P, 2, 2>)(codes, s.keyed);
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
template <int E, typename Product>
void write_block(const ConvPoolShape& s, const WinogradPlan<E, Product>& plan, Pair map, const TileRun* runs,
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
      constexpr int64_t kMostCodes = Product::kBlockOutputs + kLanes;
      const int64_t stride = plan.turned_stride(), columns = plan.outputs.w * plan.group();
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

// Outputs of output panels [out_begin, out_end) of the tiles of panels [begin, end). not_finite [N]: set to 1
// for images whose outputs are to be computed again.
template <int E, typename Product>
void winograd(const ConvPoolShape& s, const float* x, const float* packed, const float* bias, float* y,
              uint8_t* code, float* kept, uint8_t* not_finite, void* memory, int64_t begin, int64_t end,
              int64_t out_begin, int64_t out_end) {
  const WinogradPlan<E, Product> plan(s);
  char* scratch = static_cast<char*>(memory);
  auto* v = carve<typename Product::Value>(scratch, plan.panels * plan.v_size());
  float* channels = carve<float>(scratch, staged_size(plan, s));
  float* m = carve<float>(scratch, plan.panels * plan.m_size());
  float* turned = carve<float>(scratch, plan.turned_size(s));
  float* ys = carve<float>(scratch, plan.stage_size());
  float* codes = carve<float>(scratch, plan.stage_size());
  uint8_t* bytes = carve<uint8_t>(scratch, plan.stage_stride);
  int32_t* columns = carve<int32_t>(scratch, plan.group());
  int32_t* rows = carve<int32_t>(scratch, plan.group());
  float* health = carve<float>(scratch, plan.group());
  TileRun* runs = carve<TileRun>(scratch, plan.group());
  TileVector<E>* vectors = carve<TileVector<E>>(scratch, kPanelTiles);
  int64_t* pixels = carve<int64_t>(scratch, plan.pixels(s));
  __builtin_memset(turned, 0, plan.turned_size(s) * sizeof(float));
  prepare_v(plan, s, v, channels);
  const auto inverse = inverse_of<E, Product>(s, code != nullptr);
  const int64_t of_image = plan.tiles.h * plan.tiles.w, last = smaller(end * kPanelTiles, plan.total);
  // One output a tile: rows follow one another in y without a gap.
  const bool whole_images = plan.outputs.h * plan.outputs.w == 1;
  const Pair map = whole_images ? Pair{1, s.windows()} : s.pooled;
  for (int64_t first = begin * kPanelTiles; first < last; first += plan.group()) {
    const int64_t count = smaller(plan.group(), last - first), panels = ceil_div(count, kPanelTiles);
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t from = first + i * kPanelTiles, tiles = smaller(kPanelTiles, last - from);
      const int64_t input_runs = winograd_runs(plan.tiles, from, tiles, runs);
      int64_t found = 0;
      if (s.channels_last)
        tile_pixels<E, E + 2>(s, runs, input_runs, pixels);
      else
        found = tile_vectors<E>(s, runs, input_runs, vectors);
      const auto transform = [&](int64_t c, int64_t c_end, float* to, int64_t stride) {
        if (s.channels_last)
          transform_pixels<E>(s, x, pixels, tiles, c, c_end, turned, to, stride);
        else
          transform_planes<E>(s, x, vectors, found, c, c_end, to, stride);
      };
      fill_v(plan, s, tiles, channels, transform, v + i * plan.v_size());
    }
    for (int64_t t = 0; t < plan.group(); ++t) {
      const int64_t place = (first + t) % of_image;
      columns[t] = static_cast<int32_t>(smaller(s.conv.w - place % plan.tiles.w * E, E));
      rows[t] = static_cast<int32_t>(smaller(s.conv.h - place / plan.tiles.w * E, E));
      health[t] = 0;
    }
    const int64_t output_runs =
        winograd_runs(whole_images ? Pair{1, of_image} : plan.tiles, first, count, runs);
    for (int64_t b = out_begin; b < out_end; b += plan.block) {
      const int64_t b_end = smaller(b + plan.block, out_end), k0 = plan.first_output(s, b);
      {
        [[maybe_unused]] const typename Product::Registers registers;
        for (int64_t p = 0; p < kPlacesOf<E>; ++p)
          for (int64_t panel = b; panel < b_end; ++panel)
            for (int64_t i = 0; i < panels; ++i)
              multiply_place(plan, s, packed, panel, p, v + i * plan.v_size() + p * plan.v_stride,
                             m + i * plan.m_size() + p * plan.m_stride +
                                 (plan.first_output(s, panel) - k0) * kPanelTiles);
      }
      const int64_t outputs = plan.first_output(s, b_end) - k0;
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t t = i * kPanelTiles;
        inverse(s, plan, m + i * plan.m_size(), bias ? bias + k0 : nullptr, outputs, columns + t, rows + t,
                ys + plan.outputs.w * t, codes + plan.outputs.w * t, health + t);
      }
      const auto write = [&](float* to, uint8_t* to_code) {
        write_block(s, plan, map, runs, output_runs, ys, codes, turned, bytes, k0, outputs, to, to_code);
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

template <int E>
constexpr cnnrnn::PanelForward<float> winograd_forward_of() {
  return {winograd_output_panels<OnVectors>,    winograd_packed_size<E>, winograd_pack<E>, winograd_units<E>,
          winograd_scratch_bytes<E, OnVectors>, winograd<E, OnVectors>};
}

}  // namespace
