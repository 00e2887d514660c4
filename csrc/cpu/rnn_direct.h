// One step of the scan for few rows, from weights as they come: each gate of a unit is the dot product of a
// row of weights, which is read once from wherever it is. No packing; weights may be narrow.
#pragma once

#include "rnn_narrow.h"
#include "rnn_step.h"

namespace {

constexpr int kDirectRows = kNarrowRows;  // a gate's weights of some units stay in cache for so many rows

// L units of one gate: the dot products of x with n rows of weights.
template <typename T>
CNNRNN_APART Vec<T> dots(const T* w, int64_t n, const T* x, int64_t depth) {
  constexpr int L = kLanesOf<T>;
  const T* rows[L];
  for (int l = 0; l < L; ++l) rows[l] = w + (l < n ? l : n - 1) * depth;
  Vec<T> sums[L];
#pragma GCC unroll 16
  for (int l = 0; l < L; ++l) sums[l] = Vec<T>{};
  int64_t k = 0;
  for (; k + L <= depth; k += L) {
    const Vec<T> v = loadu(x + k);
#pragma GCC unroll 16
    for (int l = 0; l < L; ++l) sums[l] += v * loadu(rows[l] + k);
  }
  Vec<T> total = sum_each<T>(sums);
  for (; k < depth; ++k) {
    Vec<T> column{};
    for (int l = 0; l < L; ++l) column[l] = rows[l][k];
    total += column * broadcast(x[k]);
  }
  return total;
}

// Rows of activations beside weights of their own type; see NarrowRows.
template <typename T>
struct PlainRows {
  int64_t rows, depth;
  const T* given[kDirectRows];

  CNNRNN_INLINE void take(int64_t r, const T* row) { given[r] = row; }
  CNNRNN_INLINE void multiply(const T* w, const T*, const T*, int64_t n,
                              Vec<T> (&products)[kDirectRows]) const {
    for (int64_t r = 0; r < rows; ++r) products[r] = dots(w, n, given[r], depth);
  }
};

// Up to kBeside vectors of units at a time: their activations hide each other's latency.
constexpr int kBeside = 4;

// The x and h of some rows from `row` on, and what becomes of them.
template <typename T, typename Cell, typename W, typename Rows>
struct DirectUnits {
  static constexpr int L = kLanesOf<T>, kApart = Cell::kGates - Cell::kJoint;
  const RnnForwardStep<T>& s;
  int64_t row;
  Rows x, h;

  CNNRNN_INLINE void take() {
    for (int64_t r = 0; r < h.rows; ++r) {
      if (!s.projected) x.take(r, s.x + (row + r) * s.x_stride);
      h.take(r, state_row(s.h, row + r));
    }
  }

  CNNRNN_INLINE void run(int64_t unit, int64_t end) const {
    Pack<T, kBeside> a[kDirectRows][Cell::kParts];
    for (int g = 0; g < Cell::kGates; ++g)
      for (int v = 0; v < kBeside && unit + v * L < end; ++v)
        gate(g, unit + v * L, valid(end, unit + v * L, L), v, a);
    for (int64_t r = 0; r < h.rows; ++r) {
      if (unit + kBeside * L <= end)
        Cell::forward(s, Units<true, true>{row + r, unit, end}, a[r]);
      else
        Cell::forward(s, Units<true, false>{row + r, unit, end}, a[r]);
    }
  }

  CNNRNN_INLINE void gate(int g, int64_t unit, int64_t n, int v,
                          Pack<T, kBeside> (&a)[kDirectRows][Cell::kParts]) const {
    const int64_t at = g * s.hidden + unit;
    Vec<T> bias_x{}, bias_h{}, x_part[kDirectRows], h_part[kDirectRows];
    if (s.bias_ih) bias_x = load_n(s.bias_ih + at, n), bias_h = load_n(s.bias_hh + at, n);
    if (s.projected) {
      for (int64_t r = 0; r < h.rows; ++r)
        x_part[r] = load_n(s.projection + (row + r) * s.projection_stride + at, n);
    } else {
      products(x, s.w, s.scale_ih, at, n, x_part);
    }
    products(h, s.r, s.scale_hh, at, n, h_part);
    for (int64_t r = 0; r < h.rows; ++r) {
      if (g < Cell::kJoint) {
        a[r][g].v[v] = x_part[r] + h_part[r] + (bias_x + bias_h);
      } else {
        a[r][g].v[v] = x_part[r] + bias_x;
        a[r][g + kApart].v[v] = h_part[r] + bias_h;
      }
    }
  }

  CNNRNN_INLINE void products(const Rows& rows, const void* weights, const T* scales, int64_t at, int64_t n,
                              Vec<T> (&y)[kDirectRows]) const {
    const W* w = static_cast<const W*>(weights);
    rows.multiply(w + at * rows.depth, w + Cell::kGates * s.hidden * rows.depth,
                  scales ? scales + at : nullptr, n, y);
  }
};

// The units of tasks [first, last), in groups.
template <typename T, typename Cell>
struct DirectGroups {
  static constexpr int64_t kUnits = kBeside * kLanesOf<T>;
  const RnnForwardStep<T>& s;
  int64_t begin, end, count;

  CNNRNN_INLINE DirectGroups(const RnnForwardStep<T>& s, int64_t first, int64_t last)
      : s(s),
        begin(first * kPanelUnits<T, Cell>),
        end(valid(s.hidden, 0, last * kPanelUnits<T, Cell>)),
        count((end - begin + kUnits - 1) / kUnits) {}

  // f(first unit, last unit) for group i in the order wished.
  template <typename F>
  CNNRNN_INLINE void with(int64_t i, const F& f) const {
    const int64_t unit = begin + (s.downward ? count - 1 - i : i) * kUnits;
    f(unit, unit + kUnits < end ? unit + kUnits : end);
  }
};

// Prepared rows live on the stack.
constexpr int64_t kPreparedBytes = 128 << 10;

// How many rows of `bytes` fit there; none if not even one does.
CNNRNN_INLINE int64_t prepared_rows(int64_t rows, int64_t bytes) {
  return at_most(at_most(rows, kNarrowRows), bytes == 0 ? kNarrowRows : kPreparedBytes / bytes);
}

// The same with narrow weights. Rows are prepared once for all units, so these come from cache again for
// every few rows.
template <typename Cell, typename W>
void forward_narrow(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  using Rows = NarrowRows<W>;
  const DirectGroups<float, Cell> groups(s, first, last);
  const int64_t x_bytes = s.projected ? 0 : Rows::bytes(s.input), bytes = x_bytes + Rows::bytes(s.hidden);
  const int64_t prepared = prepared_rows(s.rows, bytes), together = prepared ? prepared : kNarrowRows;
  char* memory = static_cast<char*>(__builtin_alloca_with_align(prepared * bytes + 1, 8 * kVectorBytes));
  const auto at = [&](int64_t offset) {
    return prepared ? reinterpret_cast<typename Rows::Activation*>(memory + offset) : nullptr;
  };
  for (int64_t row = 0; row < s.rows; row += together) {
    const int64_t rows = at_most(s.rows - row, together);
    DirectUnits<float, Cell, W, Rows> units{s, row, Rows{rows, s.input, {}, at(0), {}, {}},
                                            Rows{rows, s.hidden, {}, at(prepared * x_bytes), {}, {}}};
    units.take();
    for (int64_t i = 0; i < groups.count; ++i)
      groups.with(i, [&](int64_t unit, int64_t end) { units.run(unit, end); });
  }
}

template <typename T, typename Cell>
void forward_direct(const RnnForwardStep<T>& s, int64_t first, int64_t last) {
  if constexpr (sizeof(T) == sizeof(float))
    if (s.rows > 1) return forward_narrow<Cell, float>(s, first, last);
  using Rows = PlainRows<T>;
  const DirectGroups<T, Cell> groups(s, first, last);
  for (int64_t i = 0; i < groups.count; ++i)
    for (int64_t row = 0; row < s.rows; row += kDirectRows) {
      const int64_t rows = at_most(s.rows - row, kDirectRows);
      DirectUnits<T, Cell, T, Rows> units{s, row, Rows{rows, s.input, {}}, Rows{rows, s.hidden, {}}};
      units.take();
      groups.with(i, [&](int64_t unit, int64_t end) { units.run(unit, end); });
    }
}

// x * W of many rows from narrow weights as they come; see ProjectBand. Tasks are panels, each with all rows.
template <typename Cell, typename W>
void project_narrow(const RnnForwardStep<float>& s, int64_t first, int64_t last) {
  using Rows = NarrowRows<W>;
  const int64_t begin = first * kPanelUnits<float, Cell>;
  const int64_t end = valid(s.hidden, 0, last * kPanelUnits<float, Cell>);
  // Vectors of weight rows: those of a gate's units, gate by gate. Some of them at a time stay in the
  // second-level cache while all rows pass.
  constexpr int64_t kBlockBytes = 256 << 10;
  const int64_t of_gate = (end - begin + kLanes - 1) / kLanes, count = Cell::kGates * of_gate;
  const int64_t vector_bytes = kLanes * s.input * static_cast<int64_t>(sizeof(W));
  const int64_t block = vector_bytes * 2 > kBlockBytes ? 1 : kBlockBytes / (vector_bytes + 1);
  const int64_t bytes = Rows::bytes(s.input), prepared = prepared_rows(s.rows, bytes);
  const int64_t together = prepared ? prepared : kNarrowRows;
  void* memory = __builtin_alloca_with_align(prepared * bytes + 1, 8 * kVectorBytes);
  const W *w = static_cast<const W*>(s.w), *w_end = w + Cell::kGates * s.hidden * s.input;
  for (int64_t from = 0; from < count; from += block)
    for (int64_t row = 0; row < s.rows; row += together) {
      const int64_t rows = at_most(s.rows - row, together);
      Rows x{rows, s.input, {}, prepared ? static_cast<typename Rows::Activation*>(memory) : nullptr, {}, {}};
      for (int64_t r = 0; r < rows; ++r) x.take(r, s.x + (row + r) * s.x_stride);
      for (int64_t v = from; v < at_most(from + block, count); ++v) {
        const int64_t unit = begin + v % of_gate * kLanes, at = v / of_gate * s.hidden + unit;
        const int64_t n = valid(end, unit, kLanes);
        vf y[kNarrowRows] = {};
        x.multiply(w + at * s.input, w_end, s.scale_ih ? s.scale_ih + at : nullptr, n, y);
        for (int64_t r = 0; r < rows; ++r)
          store_n(s.projection + (row + r) * s.projection_stride + at, y[r], n);
      }
    }
}

}  // namespace
