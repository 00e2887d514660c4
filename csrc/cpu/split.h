// float32 as a sum of bfloat16 parts, and matrix products of such sums on tile registers.
//
// A float is exactly the sum of three bfloat16: each takes 8 of its 24 bits. Of the nine products of parts
// the three smallest, below 2^-24 of the whole, are left out; the rest, summed in float32, err no more than
// the float32 product does, at more than its speed. One part alone is bfloat16 arithmetic. Tile registers
// take parts below the smallest normal number for zeros.
//
// Infinities and NaN do not part (inf - inf), nor do values that round to infinity; rows of A and panels of
// B that hold any are multiplied in float32, slowly, from whole values.
#pragma once

#include "amx.h"
#include "bf16.h"
#include "rnn_product.h"
#include "vmath.h"

namespace {

using Half = uint16_t;  // the bits of a bfloat16

constexpr uint32_t kHalfMask = 0xffff0000u;
constexpr int32_t kRoundsToInfinity = 0x7f7f8000;

// The largest magnitude among values, as bits: above any threshold if there is a NaN.
struct Magnitudes {
  vi most{};
  CNNRNN_INLINE void see(vf x) {
    const vi bits = reinterpret_cast<vi>(x) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  CNNRNN_INLINE bool part() const {
    for (int l = 0; l < kLanes; ++l)
      if (most[l] >= kRoundsToInfinity) return false;
    return true;
  }
};

// Parts in the upper halves of words, the largest first.
template <int P>
struct Parts {
  vu of[P];
};

template <int P>
CNNRNN_INLINE Parts<P> parts_of(vf x) {
  Parts<P> y;
#pragma GCC unroll 3
  for (int p = 0; p < P; ++p) {
    // Of three, the last is all that is left: cut, not rounded, a NaN stays one whatever its bits.
    const uint32_t half = P == 3 && p == 2 ? 0 : 0x8000u;
    y.of[p] = (reinterpret_cast<vu>(x) + half) & kHalfMask;
    x -= reinterpret_cast<vf>(y.of[p]);
  }
  return y;
}

// The same of any value: what does not round is cut, what is not finite has one part.
template <int P>
CNNRNN_INLINE Parts<P> parts_of_any(vf x) {
  Parts<P> y = parts_of<P>(x);
  const vi bits = reinterpret_cast<vi>(x) & 0x7fffffff;
  const vi large = bits >= kRoundsToInfinity, infinite = bits >= 0x7f800000, nan = bits > 0x7f800000;
  const vu cut = reinterpret_cast<vu>(x) & kHalfMask;
  const Parts<P> rest = parts_of<P>(x - reinterpret_cast<vf>(cut));
#pragma GCC unroll 3
  for (int p = 0; p < P; ++p) {
    const vu whole = p == 0 ? (nan ? cut | 0x400000u : cut) : (infinite ? vu{} : rest.of[p - 1]);
    y.of[p] = large ? whole : y.of[p];
  }
  return y;
}

// 32 halves in order, out of the words of two vectors.
CNNRNN_INLINE vu halves_of(vu first, vu second) {
  return reinterpret_cast<vu>(
      every_other<int16_t, 1>(reinterpret_cast<vs>(first), reinterpret_cast<vs>(second)));
}

CNNRNN_INLINE void store_words(Half* to, vu words) {
  storeu(reinterpret_cast<int32_t*>(to), reinterpret_cast<vi>(words));
}

constexpr int64_t tile_steps(int64_t depth) { return (depth + kTileDepth - 1) / kTileDepth; }
constexpr int64_t tile_rows(int64_t rows) { return (rows + kTileSide - 1) / kTileSide; }

// A row of A from depth `from` on, in two pieces: up to depth `split`, and the others `skip` further.
template <typename A>
struct SplitRow {
  const A* first;
  int64_t split, skip, from;
  CNNRNN_INLINE const A* at(int64_t k) const {
    return first + (from + k < split ? from + k : from + k + skip);
  }
  // Whether the values from k on lie side by side.
  CNNRNN_INLINE bool is_whole(int64_t k, int64_t count) const {
    return from + k + count <= split || from + k >= split;
  }
};

// Rows of an A that is contiguous by column.
struct StridedRow {
  const float* first;
  int64_t stride;
  CNNRNN_INLINE const float* at(int64_t k) const { return first + k * stride; }
};
struct StridedRows {
  const float* first;
  int64_t stride;
  CNNRNN_INLINE StridedRow operator()(int64_t r) const { return {first + r, stride}; }
};

// Rows of A, prepared: [tiles of rows][steps][P][16][32] halves, and whether each tile's rows could be
// parted.
template <int P>
struct PartedRows {
  Half* tiles;
  bool* plain;  // [tiles of rows]
  int64_t depth;

  static constexpr int64_t tile_size(int64_t depth) { return tile_steps(depth) * P * kTileValues; }
  // Elements of float that `rows` rows take.
  static constexpr int64_t size(int64_t rows, int64_t depth) {
    return tile_rows(rows) * (tile_size(depth) / 2 + kLanes);
  }
  CNNRNN_INLINE PartedRows(float* memory, int64_t rows, int64_t depth)
      : tiles(reinterpret_cast<Half*>(memory)),
        plain(reinterpret_cast<bool*>(memory + tile_rows(rows) * (tile_size(depth) / 2))),
        depth(depth) {}

  // row(r) for r in [0, rows) is where a row lies.
  template <typename Rows>
  CNNRNN_INLINE void fill(int64_t rows, const Rows& row) const {
    for (int64_t r = 0; r < rows; ++r) {
      const auto from = row(r);
      Half* to = tiles + r / kTileSide * tile_size(depth) + r % kTileSide * kTileDepth;
      Magnitudes magnitudes;
      for (int64_t k = 0; k < depth; k += kTileDepth, to += P * kTileValues) {
        if constexpr (P == 1 && std::is_same_v<decltype(*from.at(0)), const Bf16&>)
          if (k + kTileDepth <= depth && from.is_whole(k, kTileDepth)) {
            store_words(to, reinterpret_cast<vu>(loadu(reinterpret_cast<const int32_t*>(from.at(k)))));
            continue;  // one part of a bfloat16 is itself, and goes through tile registers whatever it is
          }
        put(piece(from, k), piece(from, k + kLanes), magnitudes, to);
      }
      bool& flag = plain[r / kTileSide];
      flag = (r % kTileSide == 0 || flag) && magnitudes.part();
    }
  }

  // The same for rows that are contiguous by column, kMostTiles tiles at most: 16 x 16 values at a time
  // change places.
  static constexpr int kMostTiles = 12;
  CNNRNN_INLINE void fill_columns(int64_t rows, const StridedRows& from) const {
    Magnitudes magnitudes[kMostTiles];
    for (int64_t k = 0; k < depth; k += kTileDepth)
      for (int64_t r = 0; r < rows; r += kTileSide) {
        const int64_t tile = r / kTileSide, width = valid(rows, r, kTileSide);
        const auto load = [&](int64_t i) {
          return load_n(from.first + i * from.stride + r, i < depth ? width : 0);
        };
        vf first[kLanes], second[kLanes];
        for (int i = 0; i < kLanes; ++i) first[i] = load(k + i), second[i] = load(k + kLanes + i);
        transpose<float>(first), transpose<float>(second);
        Half* to = tiles + tile * tile_size(depth) + k / kTileDepth * P * kTileValues;
        for (int i = 0; i < kLanes; ++i) put(first[i], second[i], magnitudes[tile], to + i * kTileDepth);
      }
    for (int64_t tile = 0; tile < tile_rows(rows); ++tile) plain[tile] = magnitudes[tile].part();
  }

 private:
  // A row's 32 values of one step.
  static CNNRNN_INLINE void put(vf a, vf b, Magnitudes& magnitudes, Half* to) {
    magnitudes.see(a), magnitudes.see(b);
    const Parts<P> first = parts_of<P>(a), second = parts_of<P>(b);
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) store_words(to + p * kTileValues, halves_of(first.of[p], second.of[p]));
  }
  // The 16 values from k on, zeros from `depth` on.
  template <typename A>
  CNNRNN_INLINE vf piece(const SplitRow<A>& row, int64_t k) const {
    if (k + kLanes <= depth && row.is_whole(k, kLanes)) return loadu(row.at(k));
    vf v{};
    for (int l = 0; l < kLanes && k + l < depth; ++l) v[l] = value_of(*row.at(k + l));
    return v;
  }
};

// A panel of B, packed: [steps][P][V][16 pairs of depths][16 columns][2] halves; then whether it could be
// parted.
template <int P, int V>
struct PartedPanel {
  static constexpr int64_t kStep = P * V * kTileValues;
  // Elements of float that a panel takes.
  static constexpr int64_t size(int64_t depth) { return tile_steps(depth) * kStep / 2 + kLanes; }

  static CNNRNN_INLINE Half* halves(float* panel) { return reinterpret_cast<Half*>(panel); }
  static CNNRNN_INLINE const Half* halves(const float* panel) { return reinterpret_cast<const Half*>(panel); }
  static CNNRNN_INLINE bool plain(const float* panel, int64_t depth) {
    return panel[tile_steps(depth) * kStep / 2] != 0;
  }
  static CNNRNN_INLINE void set_plain(float* panel, int64_t depth, bool plain) {
    panel[tile_steps(depth) * kStep / 2] = plain;
  }
  // Row k, vector v, as it was.
  static CNNRNN_INLINE vf whole(const float* panel, int64_t k, int v) {
    vf sum{};
    for (int p = P - 1; p >= 0; --p) {
      const Half* pair = halves(panel) + k / kTileDepth * kStep + (p * V + v) * kTileValues +
                         k % kTileDepth / 2 * kTileDepth;
      const vu words = reinterpret_cast<vu>(loadu(reinterpret_cast<const int32_t*>(pair)));
      sum += reinterpret_cast<vf>(k % 2 ? words & kHalfMask : words << 16);
    }
    return sum;
  }
};

template <int P, int V>
int64_t packed_parts(int64_t panels, int64_t depth) {
  return panels * PartedPanel<P, V>::size(depth);
}

// Panel `panel` of packed ones of this depth, from depth `from` on.
template <int P, int V>
struct PanelSlice {
  using Panel = PartedPanel<P, V>;
  const float* panel;
  int64_t from;
  bool plain;

  CNNRNN_INLINE PanelSlice(const void* packed, int64_t index, int64_t depth, int64_t from = 0)
      : panel(static_cast<const float*>(packed) + index * Panel::size(depth)),
        from(from),
        plain(Panel::plain(panel, depth)) {}
  CNNRNN_INLINE const Half* halves() const { return Panel::halves(panel) + from / kTileDepth * Panel::kStep; }
  CNNRNN_INLINE vf whole(int64_t k, int v) const { return Panel::whole(panel, from + k, v); }
};

// Fills a panel by `put(Part)`, where Part{}(x) parts a vector and sees its magnitudes: once, and again for
// values of any kind if there are such.
template <int P, int V, typename Put>
CNNRNN_INLINE void part_panel(float* panel, int64_t depth, const Put& put) {
  Magnitudes magnitudes;
  put([&](vf x) {
    magnitudes.see(x);
    return parts_of<P>(x);
  });
  const bool plain = magnitudes.part();
  if (!plain) put([](vf x) { return parts_of_any<P>(x); });
  PartedPanel<P, V>::set_plain(panel, depth, plain);
}

// 4 vectors of columns from `column` on, of `depth` rows from `from` on.
template <int P, typename B>
CNNRNN_INLINE void part_columns(const MatrixRows<B>& b, int64_t from, int64_t depth, int64_t columns,
                                int64_t column, float* panel) {
  using Panel = PartedPanel<P, 4>;
  part_panel<P, 4>(panel, depth, [&](const auto& part) {
    for (int64_t k = 0; k < tile_steps(depth) * kTileDepth; k += 2)
      for (int v = 0; v < 4; ++v) {
        const int64_t n = valid(columns - column, v * kLanes, kLanes);
        const auto row = [&](int64_t i) {
          return i < depth ? load_n(b(from + i) + column + v * kLanes, n) : vf{};
        };
        const Parts<P> even = part(row(k)), odd = part(row(k + 1));
        Half* to = Panel::halves(panel) + k / kTileDepth * Panel::kStep + v * kTileValues +
                   k % kTileDepth / 2 * kTileDepth;
        for (int p = 0; p < P; ++p) store_words(to + p * 4 * kTileValues, even.of[p] >> 16 | odd.of[p]);
      }
  });
}

template <int P, typename B>
void part_columns_of(const B* b, int64_t stride, int64_t depth, int64_t columns, int64_t first, int64_t last,
                     float* out) {
  for (int64_t p = first; p < last; ++p)
    part_columns<P, B>({b, stride, nullptr}, 0, depth, columns, p * kPanel<float>,
                       out + p * PartedPanel<P, 4>::size(depth));
}

// The first `vectors` of columns that lie along the depth: column(c) is where one begins, or null for zeros.
template <int P, int V, typename Columns>
CNNRNN_INLINE void part_turned(int64_t vectors, int64_t depth, const Columns& column, float* panel) {
  using Panel = PartedPanel<P, V>;
  part_panel<P, V>(panel, depth, [&](const auto& part) {
    for (int64_t k = 0; k < depth; k += kTileDepth)
      for (int64_t v = 0; v < vectors; ++v) {
        vf pairs[P][kLanes];
        for (int l = 0; l < kLanes; ++l) {
          const auto* const from = column(v * kLanes + l);
          const int64_t left = from ? depth - k : 0;
          const Parts<P> a = part(load_n(from + k, valid(left, 0, kLanes)));
          const Parts<P> b = part(load_n(from + k + kLanes, valid(left, kLanes, kLanes)));
          for (int p = 0; p < P; ++p) pairs[p][l] = reinterpret_cast<vf>(halves_of(a.of[p], b.of[p]));
        }
        Half* to = Panel::halves(panel) + k / kTileDepth * Panel::kStep + v * kTileValues;
        for (int p = 0; p < P; ++p) {
          transpose<float>(pairs[p]);
          for (int l = 0; l < kLanes; ++l)
            store_words(to + p * V * kTileValues + l * kTileDepth, reinterpret_cast<vu>(pairs[p][l]));
        }
      }
  });
}

// c (+)= a b, of R x C tiles. a: [steps][P] tiles, `a_rows` from one tile of rows to the next. b: [steps][P]
// of C tiles, `b_part` from part to part. Small products first: what is added to a small sum errs little.
template <int P, int R, int C>
CNNRNN_INLINE void multiply_tiles(const Half* a, int64_t a_rows, const Half* b, int64_t b_part, int64_t steps,
                                  float* c, int64_t c_stride, bool accumulate) {
  static_assert(R <= 2 && C <= 2, "eight registers: sums, then what is multiplied");
  const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
  if (accumulate) {
    tile_load<0>(c, c_bytes);
    if constexpr (C > 1) tile_load<1>(c + kTileSide, c_bytes);
    if constexpr (R > 1) tile_load<2>(c + kTileSide * c_stride, c_bytes);
    if constexpr (R > 1 && C > 1) tile_load<3>(c + kTileSide * c_stride + kTileSide, c_bytes);
  } else {
    tile_zero<0>();
    if constexpr (C > 1) tile_zero<1>();
    if constexpr (R > 1) tile_zero<2>();
    if constexpr (R > 1 && C > 1) tile_zero<3>();
  }
  const auto load_a = [&](int part) {
    tile_load<4>(a + part * kTileValues, kTileBytes);
    if constexpr (R > 1) tile_load<5>(a + part * kTileValues + a_rows, kTileBytes);
  };
  const auto load_b = [&](int part) {
    tile_load<6>(b + part * b_part, kTileBytes);
    if constexpr (C > 1) tile_load<7>(b + part * b_part + kTileValues, kTileBytes);
  };
  const auto multiply = [] {
    tile_multiply<0, 4, 6>();
    if constexpr (C > 1) tile_multiply<1, 4, 7>();
    if constexpr (R > 1) tile_multiply<2, 5, 6>();
    if constexpr (R > 1 && C > 1) tile_multiply<3, 5, 7>();
  };
  for (int64_t step = 0; step < steps; ++step, a += P * kTileValues, b += P * b_part) {
    if constexpr (P == 3) {
      load_a(2), load_b(0), multiply();
      load_a(1), multiply();
      load_b(1), multiply();
      load_a(0), multiply();
      load_b(2), multiply();
      load_b(0), multiply();
    } else {
      static_assert(P == 1, "one part or all three");
      load_a(0), load_b(0), multiply();
    }
    if (step % 4 == 3) tiles_stay_awake<4>();
  }
  tile_store<0>(c, c_bytes);
  if constexpr (C > 1) tile_store<1>(c + kTileSide, c_bytes);
  if constexpr (R > 1) tile_store<2>(c + kTileSide * c_stride, c_bytes);
  if constexpr (R > 1 && C > 1) tile_store<3>(c + kTileSide * c_stride + kTileSide, c_bytes);
}

// The same for `rows` tiles of rows x `vectors` of columns.
template <int P>
CNNRNN_INLINE void multiply_tiles_of(int64_t rows, int64_t vectors, const Half* a, int64_t a_rows,
                                     const Half* b, int64_t b_part, int64_t steps, float* c, int64_t c_stride,
                                     bool accumulate) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bool two = r + 1 < rows;
    for (int64_t v = 0; v < vectors; v += 2) {
      const Half *a_from = a + r * a_rows, *b_from = b + v * kTileValues;
      float* to = c + r * kTileSide * c_stride + v * kTileSide;
      if (v + 1 < vectors && two)
        multiply_tiles<P, 2, 2>(a_from, a_rows, b_from, b_part, steps, to, c_stride, accumulate);
      else if (v + 1 < vectors)
        multiply_tiles<P, 1, 2>(a_from, a_rows, b_from, b_part, steps, to, c_stride, accumulate);
      else if (two)
        multiply_tiles<P, 2, 1>(a_from, a_rows, b_from, b_part, steps, to, c_stride, accumulate);
      else
        multiply_tiles<P, 1, 1>(a_from, a_rows, b_from, b_part, steps, to, c_stride, accumulate);
    }
  }
}

// sums (+)= A * panel for `rows` rows of A from the tile of rows `tile` on, and the first `vectors` of
// columns; value(r, k) is what A was filled with, r counted from that tile.
template <int P, int V, int kRows, typename Value>
CNNRNN_INLINE void multiply_parted(BandSums<float, V, kRows>& sums, const PartedRows<P>& a, int64_t tile,
                                   int64_t rows, const Value& value, const PanelSlice<P, V>& panel,
                                   bool accumulate, int64_t vectors = V) {
  const int64_t count = tile_rows(rows), steps = tile_steps(a.depth);
  bool plain = panel.plain;
  for (int64_t t = 0; t < count; ++t) plain = plain && a.plain[tile + t];
  if (plain) {
    multiply_tiles_of<P>(count, vectors, a.tiles + tile * a.tile_size(a.depth), a.tile_size(a.depth),
                         panel.halves(), V * kTileValues, steps, reinterpret_cast<float*>(sums.of[0]),
                         V * kTileSide, accumulate);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v) {
      vf sum = accumulate ? sums.of[r][v] : vf{};
      for (int64_t k = 0; k < a.depth; ++k) sum += broadcast(value(r, k)) * panel.whole(k, v);
      sums.of[r][v] = sum;
    }
}

}  // namespace
