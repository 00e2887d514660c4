// conv_pool with pixels as the columns of tiles: what becomes of the map (conv_pool_columns.h has the whole).
#pragma once

#include "conv_pool_columns_plan.h"
#include "conv_pool_write.h"

namespace {

// Outputs [first, first + outputs) of a strip of windows, and where its pooled values stay until they are
// written: [outputs][plan.windows].
struct ColumnsStrip {
  int64_t image, row, rows, column, columns;  // windows
  int64_t first, outputs;
  float* ys;
  uint8_t* codes;
};

constexpr float kLowest = -__FLT_MAX__;

// What of a strip's map no convolution computes can win no window.
template <int P>
void fill_border(const ConvPoolShape& s, const ColumnsPlan<P>& plan, const ColumnsStrip& strip, float* map) {
  const auto lose = [](float* from, int64_t count) {
    for (int64_t x = 0; x < count; ++x) from[x] = kLowest;
  };
  const int64_t width = strip.columns + plan.reach.w;
  for (int64_t q = 0; q < plan.phases.h * plan.phases.w; ++q)
    for (int64_t i = 0; i < plan.map_rows; ++i) {
      const int64_t y = (strip.row + i) * s.step.h + q / plan.phases.w - s.margin.h;
      const int64_t first = strip.column * s.step.w + q % plan.phases.w - s.margin.w;  // column of the map
      const int64_t left = y < 0 || y >= s.conv.h ? width
                           : first < 0            ? smaller(ceil_div(-first, s.step.w), width)
                                                  : 0;
      const int64_t end = smaller(larger(ceil_div(s.conv.w - first, s.step.w), left), width);
      for (int64_t k = 0; k < strip.outputs; ++k) {
        float* const at = map + q * plan.map_phase + k * plan.map_output + i * plan.pitch;
        lose(at, left), lose(at + end, width - end);
      }
    }
}

// Pools blocks of a map, little by little: 16 windows side by side of kOutputs outputs at a time. Q:
// positions of a window, 0: any number.
template <int P, int Q, bool kCodes>
struct ColumnsPool {
  static constexpr int64_t kOutputs = 4;

  const ConvPoolShape& s;
  const ColumnsPlan<P>& plan;
  const int64_t* positions;  // from the first pixel of an output's block
  uint8_t* not_finite;
  const ColumnsStrip* strip = nullptr;
  // Of a block: its map, pooled rows of the strip and tiles of a row; and what comes next.
  const float* map = nullptr;
  int64_t top = 0, bottom = 0, left = 0, right = 0, row = 0, tile = 0, output = 0;
  const float* from = nullptr;
  int64_t to = 0, width = 0;  // of the tile: where its windows begin, how many they are
  vf health{};

  static int64_t pieces(const ColumnsStrip& of, int64_t tiles) {
    return ceil_div(of.outputs, kOutputs) * tiles;
  }
  // Not inlined, for numbers are then stored as they are loaded: one load of two would wait for both stores,
  // and so for all products before them.
  CNNRNN_APART void start(const ColumnsStrip* of, const float* block, int64_t first_row, int64_t last_row,
                          int64_t first_tile, int64_t last_tile) {
    strip = of, map = block, top = row = first_row, bottom = last_row, left = tile = first_tile,
    right = last_tile;
    begin_tile();
  }
  CNNRNN_INLINE void some(int64_t count) {
    for (; count > 0 && row < bottom; --count) {
      pool();
      if (output >= strip->outputs) end_tile();
    }
  }
  void finish() { some(INT64_MAX); }

 private:
  CNNRNN_INLINE void begin_tile() {
    from = map + (row - top) * plan.pitch + (tile - left) * kTileSide;
    to = row * strip->columns + tile * kTileSide;
    width = smaller(strip->columns - tile * kTileSide, kTileSide);
    output = 0;
  }
  // Tells of sums that are not finite and belong to windows.
  CNNRNN_INLINE void end_tile() {
    if (!is_zero(health)) tell();
    health = vf{};
    if (++tile == right) tile = left, ++row;
    begin_tile();
  }
  CNNRNN_APART void tell() const {
    for (int64_t i = 0; i < width; ++i)
      if (health[i] != 0) __atomic_store_n(not_finite + strip->image, 1, __ATOMIC_RELAXED);
  }
  CNNRNN_INLINE void pool() {
    const int64_t* const place = positions;
    const float* at = from;
    float* y = strip->ys + to;
    [[maybe_unused]] uint8_t* code_at = strip->codes + to;
    const int64_t map_output = plan.map_output, windows = plan.windows, count = width;
    const vf floor = vf{} + (s.relu ? 0.0f : kLowest);
    // 0, or NaN where some position is not finite: which of those wins need not be known.
    vf sums = health;
#pragma GCC unroll 4
    for (int k = 0; k < kOutputs; ++k, at += map_output, y += windows) {
      vf best = loadu(at + place[0]), sum = 0.0f * best;
      vi code{};
      const auto compete = [&](int64_t q) {
        const vf value = loadu(at + place[q]);
        sum += 0.0f * value;
        if constexpr (kCodes) {
          const vi wins = value > best;
          code = wins ? code_of<float>(q) : code;
          best = wins ? value : best;
        } else {
          best = vmax(value, best);
        }
      };
      if constexpr (Q > 0) {
#pragma GCC unroll 4
        for (int q = 1; q < Q; ++q) compete(q);
      } else {
        for (int64_t q = 1; q < s.positions(); ++q) compete(q);
      }
      sums += sum;
      if constexpr (kCodes) {
        code = best <= floor ? code_of<float>(kDead) : code;
        store_codes<float>(code_at, reinterpret_cast<vf>(code), count);
        code_at += windows;
      }
      store_n(y, vmax(best, floor), count);
    }
    health = sums;
    from = at, to += kOutputs * windows, output += kOutputs;
  }
};

// Writes strips, little by little.
template <int P, typename Out>
struct ColumnsWrite {
  static constexpr int64_t kWindows = 8 * kLanes;  // of one output, NCHW

  const ConvPoolShape& s;
  const ColumnsPlan<P>& plan;
  Out* y;
  uint8_t* code;  // may be null, as kept
  Out* kept;
  const ColumnsStrip* strip = nullptr;
  int64_t windows = 0, next = 0;  // of the strip; the next, of all outputs
  int64_t output = 0;
  bool past;

  ColumnsWrite(const ConvPoolShape& s, const ColumnsPlan<P>& plan, Out* y, uint8_t* code, Out* kept)
      : s(s),
        plan(plan),
        y(y),
        code(code),
        kept(kept),
        past(passes_cache<Out>(s.batch * s.outputs * s.windows())) {}

  static int64_t pieces(const ConvPoolShape& s, const ColumnsStrip& of) {
    const int64_t windows = of.rows * of.columns;
    return s.channels_last ? ceil_div(windows, kTileSide) * ceil_div(of.outputs, kTileSide)
                           : ceil_div(windows, kWindows) * of.outputs;
  }
  void start(const ColumnsStrip* of) { strip = of, windows = of->rows * of->columns, next = output = 0; }
  CNNRNN_INLINE void some(int64_t count) {
    for (; count > 0 && next < windows; --count) {
      if (s.channels_last)
        write_turned();
      else
        write();
    }
  }
  void finish() { some(INT64_MAX); }

 private:
  void activate(float* values, int64_t count) const {
    if (s.activation != cnnrnn::kNoActivation) kActivations<float>[s.activation].value(values, values, count);
  }
  CNNRNN_INLINE void write() {
    const int64_t count = smaller(kWindows, windows - next), at = output * plan.windows + next;
    const int64_t to = (strip->image * s.outputs + strip->first + output) * s.windows() +
                       strip->row * s.pooled.w + strip->column + next;
    float* const values = strip->ys + at;
    if (kept) copy(values, count, kept + to);
    activate(values, count);
    copy(values, count, y + to);
    if (code) __builtin_memcpy(code + to, strip->codes + at, count);
    if (++output == strip->outputs) output = 0, next += kWindows;
  }
  CNNRNN_INLINE void copy(const float* values, int64_t count, Out* to) const {
    int64_t i = 0;
    if (past && store_past(to, loadu(values), count))
      for (i = kLanes; i + kLanes <= count; i += kLanes) store_past(to + i, loadu(values + i), kLanes);
    for (; i < count; i += kLanes) store_values(to + i, loadu(values + i), count - i);
  }
  CNNRNN_APART void write_turned() {
    const int64_t count = smaller(kTileSide, windows - next),
                  outputs = smaller(kTileSide, strip->outputs - output);
    const int64_t at = output * plan.windows + next;
    const int64_t to =
        (strip->image * s.windows() + strip->row * s.pooled.w + strip->column + next) * s.outputs +
        strip->first + output;
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    alignas(64) float values[kTileSide * kTileSide];
    vf block[kTileSide];
    const auto turn = [&](const auto& load, const auto& put) {
      for (int k = 0; k < kTileSide; ++k) block[k] = load(at + k * plan.windows);
      transpose<float>(block);
      for (int i = 0; i < kTileSide; ++i) put(i, block[i]);
    };
    turn([&](int64_t from) { return loadu(strip->ys + from); },
         [&](int i, vf v) { storeu(values + i * kTileSide, v); });
    const auto store = [&](Out* out) {
      for (int64_t i = 0; i < count; ++i)
        if (const vf v = loadu(values + i * kTileSide);
            !past || !store_past(out + to + i * s.outputs, v, outputs))
          store_values(out + to + i * s.outputs, v, outputs);
    };
    if (kept) store(kept);
    activate(values, kTileSide * kTileSide);
    store(y);
    if (!code) return advance();
    turn(
        [&](int64_t from) {
          Bytes bytes;
          __builtin_memcpy(&bytes, strip->codes + from, sizeof bytes);
          return reinterpret_cast<vf>(__builtin_convertvector(bytes, vi));
        },
        [&](int64_t i, vf v) {
          if (i < count) store_codes<float>(code + to + i * s.outputs, v, outputs);
        });
    advance();
  }
  void advance() {
    output += kTileSide;
    if (output >= strip->outputs) output = 0, next += kTileSide;
  }
};

}  // namespace
