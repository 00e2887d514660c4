// Every recurrent CPU kernel against plain loops, at all tile heights and partial panels.
//
// test_rnn_tiles.py compiles it with the kernels' own source for 512-bit vectors in narrower instructions
// (CNNRNN_EMULATE_512), and with tile registers in plain loops (CNNRNN_EMULATE_AMX). Every buffer ends where
// a page without access begins: an element too many is a crash. Prints what differs; exits with 1 if anything
// does.

#include "rnn_tiles.h"

#define CNNRNN_ISA tested
#include "rnn_kernels.h"
#include "rnn_turned.h"

using cnnrnn::CellKernels;
using cnnrnn::Product;
using cnnrnn::RnnBackwardStep;
using cnnrnn::RnnForwardStep;
using cnnrnn::RnnKernels;

enum class How {
  kFused,
  kProjected,
  kFusedFromBf16,  // weights packed from bfloat16, and x as it where the kernel takes that
  kProjectedFromBf16,
  kDirect,
  kDirectProjected,
  kBf16,
  kInt8,
  kBf16Projected,
  kInt8Projected
};

template <typename T>
void forward(const CellKernels<T>& k, int cell, int64_t rows, int64_t H, int64_t I, How how, bool bias,
             bool keep, bool resets) {
  const int64_t G = k.gates, P = k.parts, K = k.kept, panels = ceil_div(H, k.panel_units);
  constexpr int64_t lanes = kLanesOf<T>;
  Buffer<T> x = random<T>(rows * (I + 2));
  Buffer<T> w = random<T>(G * H * I), r = random<T>(G * H * H, 0.7);
  const Buffer<T> b_ih = random<T>(G * H), b_hh = random<T>(G * H);
  const Buffer<T> s_ih = random<T>(G * H), s_hh = random<T>(G * H);
  const States<T> h(rows, H, rows - rows / 3, resets), c(rows, H, rows - rows / 3, resets);
  States<T> c_same = c;
  c_same.reset = h.reset;
  Buffer<T> projection(rows * (G * H + 1)), kept(keep ? (rows + 2) * K * H : 0);
  Buffer<T> c_out(k.has_c ? rows * H : 0), h_out(rows * (H + 1));
  Buffer<T> packed_w(k.as_they_come ? 0 : k.packed(panels, I));
  Buffer<T> packed_r(k.as_they_come ? 0 : k.packed(panels, H));
  Buffer<T> scratch(std::max(k.scratch(rows, I, H, false), k.project_scratch(rows, I)));
  Buffer<T> packed_bias(panels * P * k.panel_units);
  const bool from_bf16 = how == How::kFusedFromBf16 || how == How::kProjectedFromBf16;
  Buffer<Bf16> half_x, half_w, half_r;
  const auto pack = [&](const auto& pack_gates, const auto& of_w, const auto& of_r) {
    pack_gates(of_w.data(), H, I, 0, panels, packed_w.data());
    pack_gates(of_r.data(), H, H, 0, panels / 2, packed_r.data());
    pack_gates(of_r.data(), H, H, panels / 2, panels, packed_r.data());
  };
  if (from_bf16) {
    half_w = narrowed(w), half_r = narrowed(r), half_x = narrowed(x);
    pack(k.pack_gates_bf16, half_w, half_r);
  } else if (!k.as_they_come) {
    pack(k.pack_gates, w, r);
  }
  k.pack_bias(b_ih.data(), b_hh.data(), H, packed_bias.data());

  RnnForwardStep<T> s{};
  s.rows = rows, s.hidden = H, s.input = I, s.downward = rows % 2;
  s.x = x.data(), s.x_stride = I + 2;
  if (from_bf16 && k.takes_bf16) s.x = nullptr, s.x_bf16 = half_x.data();
  s.w = k.as_they_come ? w.data() : packed_w.data(), s.r = k.as_they_come ? r.data() : packed_r.data();
  if (bias) s.bias = packed_bias.data(), s.bias_ih = b_ih.data(), s.bias_hh = b_hh.data();
  s.h = h.view(), s.c = c_same.view();
  s.projection = projection.data(), s.projection_stride = G * H + 1;
  if (keep && K) s.kept = kept.data(), s.kept_rows = rows + 2, s.kept_first = 1;
  s.c_out = c_out.data(), s.c_out_stride = H;
  s.h_out = h_out.data(), s.h_out_stride = H + 1;
  s.scratch = scratch.data();

  const int64_t tasks = panels * ceil_div(rows, k.tile_rows), bands = panels * ceil_div(rows, k.band_rows);
  const bool direct = how != How::kFused && how != How::kProjected && !from_bf16;
  if (how == How::kProjected || how == How::kDirectProjected || how == How::kProjectedFromBf16) {
    k.project(s, 0, bands / 2), k.project(s, bands / 2, bands);
    s.projected = true, s.x = nullptr, s.x_bf16 = nullptr, s.w = nullptr;
  }
  Buffer<int8_t> byte_w, byte_r;
  auto kernel = direct ? k.forward_direct : k.forward;
  const bool bf16 = how == How::kBf16 || how == How::kBf16Projected;
  const bool int8 = how == How::kInt8 || how == How::kInt8Projected;
  if (bf16) {
    half_w = narrowed(w), half_r = narrowed(r);
    kernel = k.forward_bf16, s.w = half_w.data(), s.r = half_r.data();
  } else if (int8) {
    const auto narrow = [&](Buffer<T>& from, Buffer<int8_t>& to, const Buffer<T>& scale, int64_t depth) {
      for (size_t i = 0; i < from.size(); ++i) {
        to.push_back(static_cast<int8_t>(std::lround(127 * from[i])));
        from[i] = scale[i / depth] * to.back();
      }
    };
    narrow(w, byte_w, s_ih, I), narrow(r, byte_r, s_hh, H);
    kernel = k.forward_int8, s.w = byte_w.data(), s.r = byte_r.data();
    s.scale_ih = s_ih.data(), s.scale_hh = s_hh.data();
  } else if (direct) {
    if (!s.projected) s.w = w.data();
    s.r = r.data();
  }
  if (how == How::kBf16Projected || how == How::kInt8Projected) {
    const auto project = bf16 ? k.project_bf16 : k.project_int8;
    project(s, 0, panels / 2), project(s, panels / 2, panels);
    s.projected = true, s.x = nullptr, s.w = nullptr;
  }
  const int64_t work = direct ? panels : tasks;
  kernel(s, 0, work / 2), kernel(s, work / 2, work);

  // int8 weights reach 127 times their scale: saturated gates, and a ReLU of large values.
  const double scale = int8 ? 500 * static_cast<double>(I + H) : static_cast<double>(I + H);
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t u = 0; u < H; ++u) {
      double a[4] = {};
      for (int g = 0; g < G; ++g) {
        const int64_t row = g * H + u;
        double from_x = bias ? b_ih[row] : 0, from_h = bias ? b_hh[row] : 0;
        for (int64_t i = 0; i < I; ++i) from_x += static_cast<double>(w[row * I + i]) * x[n * (I + 2) + i];
        for (int64_t i = 0; i < H; ++i) from_h += static_cast<double>(r[row * H + i]) * h.at(n, i);
        a[input_part(cell, g)] += from_x, a[state_part(cell, g)] += from_h;
      }
      const Gates y = step_of(cell, a, h.at(n, u), c_same.at(n, u));
      const double error = cell == cnnrnn::kRnnRelu || int8 ? scale : 1;
      check("h", cell, rows, H, h_out[n * (H + 1) + u], y.h, error);
      if (k.has_c) check("c", cell, rows, H, c_out[n * H + u], y.c, error);
      for (int64_t v = 0; keep && v < K; ++v)
        check("kept", cell, rows, H, kept[kept_at(rows + 2, n + 1, H, K, v, u, lanes)], y.kept[v],
              cell == cnnrnn::kGru ? scale : error);
    }
}

template <typename T>
void backward(const RnnKernels<T>& shared, const CellKernels<T>& k, int cell, int64_t rows, int64_t H,
              int64_t continued, bool next, bool upstream, bool resets) {
  const int64_t G = k.gates, P = k.parts, K = k.kept, wide = 4 * shared.lanes, panels = ceil_div(H, wide);
  const Buffer<T> r = random<T>(G * H * H), d_next = random<T>(continued * (P * H + 2));
  const Buffer<T> dh_1 = random<T>(rows * (H + 1)), dh_n = random<T>(rows * H);
  const Buffer<T> dc_1 = random<T>(rows * (H + 2)), zeros(P * H);
  Buffer<T> carry = random<T>(rows * H), kept = random<T>(rows * K * H);
  for (T& v : kept) v = std::abs(v);
  const Buffer<T> h_now = random<T>(rows * (H + 1)), c_now = random<T>(rows * (H + 1));
  const Buffer<uint8_t> next_reset = flags(resets ? continued : 0);
  const States<T> h(rows, H, rows - rows / 3, resets);
  States<T> c(rows, H, rows - rows / 3, resets);
  c.reset = h.reset;
  Buffer<T> packed(shared.packed(panels, G * H)), scratch(k.scratch(rows, 0, H, true));
  shared.pack_columns(r.data(), H, G * H, H, 0, panels, packed.data());

  RnnBackwardStep<T> s{};
  s.rows = rows, s.hidden = H, s.downward = rows % 2;
  if (next && continued) s.d_next = d_next.data();
  s.d_stride = P * H + 2, s.continued = next ? continued : 0;
  if (!next_reset.empty()) s.next_reset = next_reset.data(), s.next_flagged = continued;
  s.zeros = zeros.data(), s.r = packed.data();
  if (upstream) s.dh_1 = dh_1.data(), s.dh_1_stride = H + 1;
  if (upstream) s.dc_1 = dc_1.data(), s.dc_1_stride = H + 2;
  if (upstream) s.dh_n = dh_n.data(), s.dh_n_stride = H;
  const Buffer<T> carried = carry;
  s.carry = carry.data(), s.carry_stride = H;
  s.kept = kept.data(), s.kept_rows = rows;
  s.h_now = h_now.data(), s.h_now_stride = H + 1, s.c_now = c_now.data(), s.c_now_stride = H + 1;
  s.h = h.view(), s.c = c.view();

  Buffer<T> d_rows(rows * (P * H + 2));
  s.d = d_rows.data(), s.scratch = scratch.data();
  const int64_t tasks = panels * ceil_div(rows, shared.tile_rows);
  k.backward(s, 0, tasks / 2), k.backward(s, tasks / 2, tasks);

  for (int64_t n = 0; n < rows; ++n)
    for (int64_t u = 0; u < H; ++u) {
      double dh = 0;
      const bool reaches = s.d_next && n < continued && !(n < s.next_flagged && s.next_reset[n]);
      for (int g = 0; reaches && g < G; ++g)
        for (int64_t j = 0; j < H; ++j)
          dh += static_cast<double>(d_next[n * (P * H + 2) + state_part(cell, g) * H + j]) *
                r[(g * H + j) * H + u];
      if (upstream) dh += dh_1[n * (H + 1) + u];
      if (upstream && n >= s.continued) dh += dh_n[n * H + u];
      const auto value = [&](int i) {
        return static_cast<double>(kept[kept_at(rows, n, H, K, i, u, shared.lanes)]);
      };
      const double hn = h_now[n * (H + 1) + u], cn = c_now[n * (H + 1) + u], held = carried[n * H + u];
      double wanted[4] = {}, passed = 0;
      if (cell == cnnrnn::kLstm) {
        const double i = value(0), f = value(1), g = value(2), o = value(3), t = std::tanh(cn);
        const double dc = held + (upstream ? dc_1[n * (H + 2) + u] : 0) + dh * o * (1 - t * t);
        wanted[0] = dc * g * i * (1 - i), wanted[1] = dc * c.at(n, u) * f * (1 - f);
        wanted[2] = dc * i * (1 - g * g), wanted[3] = dh * t * o * (1 - o);
        passed = dc * f;
      } else if (cell == cnnrnn::kGru) {
        const double r_ = value(0), z = value(1), g = value(2), n_h = value(3);
        dh += held;
        wanted[2] = dh * (1 - z) * (1 - g * g), wanted[3] = wanted[2] * r_;
        wanted[0] = wanted[2] * n_h * r_ * (1 - r_), wanted[1] = dh * (h.at(n, u) - g) * z * (1 - z);
        passed = dh * z;
      } else {
        wanted[0] = cell == cnnrnn::kRnnTanh ? dh * (1 - hn * hn) : hn > 0 ? dh : 0;
      }
      const double scale = static_cast<double>(G * H);
      for (int64_t p = 0; p < P; ++p)
        check("d", cell, rows, H, d_rows[n * (P * H + 2) + p * H + u], wanted[p], scale);
      if (k.has_carry) check("carry", cell, rows, H, carry[n * H + u], h.is_reset(n) ? 0 : passed, scale);
    }
}

// Infinities, NaN and numbers near the largest, which do not part into bfloat16.
template <typename T>
void put_special(Buffer<T>& values, int64_t every) {
  const T large = std::numeric_limits<T>::max(), infinite = std::numeric_limits<T>::infinity();
  const T special[] = {infinite, large, -infinite, std::numeric_limits<T>::quiet_NaN(), -large * T(0.999)};
  for (size_t i = every / 2, n = 0; i < values.size(); i += every) values[i] = special[n++ % 5];
}

template <typename T>
void products(const RnnKernels<T>& k, int64_t rows, int64_t columns, int64_t depth, bool accumulate,
              bool special = false, bool from_bf16 = false) {
  const int64_t wide = 4 * k.lanes, panels = ceil_div(columns, wide);
  const int64_t split = depth / 3, skip = accumulate ? 5 : 0, a_row = depth + skip + 1;
  Buffer<T> a = random<T>(rows * a_row), a_t = random<T>(depth * (rows + 1));
  Buffer<T> b = random<T>(depth * (columns + 2));
  if (special) put_special(a, 7 * a_row + 1), put_special(a_t, 7 * rows + 3), put_special(b, 9 * columns + 5);
  Buffer<T> packed(k.packed(panels, depth)), sums(rows);
  Buffer<T> scratch(std::max(k.product_scratch, k.multiply_scratch(depth)));
  const Buffer<T> start = random<T>(rows * (columns + 1));
  Buffer<T> c = start;
  Buffer<Bf16> half_b;
  if (from_bf16) {
    half_b = narrowed(b);
    k.pack_columns_bf16(half_b.data(), columns + 2, depth, columns, 0, panels, packed.data());
  } else {
    k.pack_columns(b.data(), columns + 2, depth, columns, 0, panels, packed.data());
  }
  Product<T> p{};
  p.rows = rows, p.columns = columns, p.depth = depth, p.accumulate = accumulate;
  p.a = a.data(), p.a_row = a_row, p.a_depth = 1, p.a_split = split, p.a_skip = skip;
  p.b = packed.data(), p.c = c.data(), p.c_stride = columns + 1;
  int64_t tasks = panels * ceil_div(rows, k.band_rows);
  k.multiply(p, 0, tasks / 3, scratch.data()), k.multiply(p, tasks / 3, tasks, scratch.data());
  const auto expect = [&](const char* what, const Buffer<T>& left, int64_t row, int64_t step, int64_t gap) {
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < columns; ++j) {
        double sum = accumulate ? start[m * (columns + 1) + j] : 0;
        for (int64_t i = 0; i < depth; ++i)
          sum += static_cast<double>(left[m * row + i * step + (i < split ? 0 : gap)]) *
                 b[i * (columns + 2) + j];
        check(what, -1, rows, columns, c[m * (columns + 1) + j], sum, static_cast<double>(depth));
      }
  };
  expect("product", a, a_row, 1, skip);
  c = start;
  p.a = a_t.data(), p.a_row = 1, p.a_depth = rows + 1;
  p.b = b.data(), p.b_stride = columns + 2;
  if (from_bf16) p.b = nullptr, p.b_bf16 = half_b.data();
  tasks = panels * ceil_div(rows, k.row_block);
  k.multiply_unpacked(p, 0, tasks / 3, scratch.data());
  k.multiply_unpacked(p, tasks / 3, tasks, scratch.data());
  expect("unpacked product", a_t, 1, rows + 1, 0);
  k.sum_rows(a_t.data(), rows + 1, depth, 0, rows / 2, sums.data());
  k.sum_rows(a_t.data(), rows + 1, depth, rows / 2, rows, sums.data());
  for (int64_t m = 0; m < rows; ++m) {
    double sum = 0;
    for (int64_t i = 0; i < depth; ++i) sum += a_t[i * (rows + 1) + m];
    check("sum", -1, rows, 1, sums[m], sum, static_cast<double>(depth));
  }
}

// Kernels that take weights as they come. Units that fill a panel, some of one, one more; one.
void turned(const CellKernels<float>& k, int cell) {
  for (int64_t rows : {1, 16, 17, 33, 48, 64, 65, 130, 257})
    for (int64_t H : {k.panel_units - 1, k.panel_units, k.panel_units + 1, 1}) {
      const bool odd = (rows + H) % 2;
      forward(k, cell, rows, H, rows < 100 ? 37 : 3, How::kFused, odd, true, !odd);
      forward(k, cell, rows, H, 32, How::kProjected, !odd, !odd, odd);
    }
}

template <typename T>
void all(const RnnKernels<T>& k, const std::vector<int64_t>& heights) {
  for (int cell = 0; cell < cnnrnn::kCells; ++cell) {
    const CellKernels<T>& one = k.cells[cell];
    // Panels that are whole, partial, or one unit.
    for (int64_t rows : heights)
      for (int64_t H : {one.panel_units - 1, one.panel_units, one.panel_units + 1, 1}) {
        const bool odd = (rows + H) % 2;
        forward(one, cell, rows, H, 5, How::kFused, true, true, odd);
        forward(one, cell, rows, H, 19, How::kProjected, odd, !odd, !odd);
        if constexpr (sizeof(T) == 4) {
          forward(one, cell, rows, H, 2 * k.lanes + 5, How::kFusedFromBf16, odd, true, !odd);
          forward(one, cell, rows, H, 2 * k.lanes + 5, How::kProjectedFromBf16, !odd, odd, odd);
        }
        if (rows > 5 || !one.forward_direct) continue;
        forward(one, cell, rows, H, k.lanes + 3, How::kDirect, !odd, true, odd);
        forward(one, cell, rows, H, 7, How::kDirectProjected, true, odd, !odd);
        if constexpr (sizeof(T) == 4) {
          forward(one, cell, rows, H, k.lanes + 1, How::kBf16, true, false, odd);
          forward(one, cell, rows, H, k.lanes + 5, How::kInt8, odd, false, !odd);
          forward(one, cell, rows, H, 2 * k.lanes + 5, How::kBf16Projected, odd, false, !odd);
          forward(one, cell, rows, H, 4 * k.lanes, How::kInt8Projected, true, false, odd);
        }
      }
    // A long product, in several blocks.
    forward(one, cell, 3, 5, 517, How::kFused, true, true, false);
    for (int64_t rows : heights)
      for (int64_t H : {4 * k.lanes - 1, 4 * k.lanes, 4 * k.lanes + 1, 3}) {
        const bool odd = (rows + H) % 2;
        backward(k, one, cell, rows, H, rows, true, true, odd);
        backward(k, one, cell, rows, H, rows - rows / 2, true, odd, !odd);
        backward(k, one, cell, rows, H, 0, false, true, odd);
      }
  }
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 11, 50, 100})
    for (int64_t columns : {1, 4 * k.lanes, 4 * k.lanes + 3})
      for (int64_t depth : {0, 1, 9, 300}) {
        products(k, rows, columns, depth, (rows + depth) % 2);
        if constexpr (sizeof(T) == 4) products(k, rows, columns, depth, (rows + depth) % 2, false, true);
      }
  if (!halves) products(k, 75, 70, 40, false, true);
}

int main() {
  // Each height of a tile, two tiles of unequal height.
  const std::vector<int64_t> heights = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13};
  all(cnnrnn::rnn_tested.f32, heights);
  all(cnnrnn::rnn_tested.f64, heights);
  // One tile, two, a pair and one; two bands.
  all(parted_kernels<3>(), {1, 15, 16, 17, 33, 80});
  turned(turned_cell<3, LstmUnits>(), cnnrnn::kLstm);
  turned(turned_cell<3, GruUnits>(), cnnrnn::kGru);
  turned(turned_cell<3, ElmanUnits<ElmanTanh>>(), cnnrnn::kRnnTanh);
  turned(turned_cell<3, ElmanUnits<ElmanRelu>>(), cnnrnn::kRnnRelu);
  halves = true;
  all(parted_kernels<1>(), {1, 17, 33});
  std::printf("%d-byte vectors: %ld checks, %ld failures\n", kVectorBytes, static_cast<long>(checks),
              static_cast<long>(failures));
  return failures > 0;
}
