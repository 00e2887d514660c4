// Back through a recurrent layer: the scan that yields the gradients of the pre-activations, then everything
// that needs no order of time as large matrix products.
#pragma once

#include "rnn_run.h"

namespace cnnrnn {

template <typename T>
class RnnBackward {
 public:
  // output, cells and reserve are the forward run's.
  RnnBackward(Cell cell, const RnnProblem<T>& problem, const RnnGradientsIn<T>& in, const T* output,
              const T* cells, const T* reserve, const RnnGradientsOut<T>& out)
      : shared(packed_kernels_for<T>(problem.layout.batch, problem.x_bf16)),
        large(packed_kernels_for<T>(problem.layout.rows, problem.x_bf16)),
        k(shared.cells[cell]),
        p(problem),
        in(in),
        output(output),
        cells(cells),
        reserve(reserve),
        out(out) {}

  void run() {
    const int64_t wide = 4 * shared.lanes;
    hidden_panels_ = ceil_div(H, wide), input_panels_ = ceil_div(p.input, wide);
    // One step whose first state nobody asks about needs no R.
    if (layout.steps > 1 || out.want_h_0)
      r_ = scratch_.template take<T>(D * shared.packed(hidden_panels_, G));
    if (out.x) w_ = scratch_.template take<T>(D * large.packed(input_panels_, G));
    d_ = scratch_.template take<T>(D * layout.rows * d_stride());
    zeros_ = scratch_.template take_zeros<T>(k.parts * H);
    start();
    scan();
    products();
  }

 private:
  // Rows of d_ are padded: a power of two would send a column of it to a few sets of the cache.
  int64_t d_stride() const { return k.parts * H + 16; }
  T* d_at(int64_t d, int64_t t) const { return d_ + (d * layout.rows + layout.offset(t)) * d_stride(); }
  T* r_at(int64_t d) const { return r_ + d * shared.packed(hidden_panels_, G); }
  T* w_at(int64_t d) const { return w_ + d * large.packed(input_panels_, G); }
  void pack_columns(const RnnKernels<T>& of, const void* w, int64_t columns, const Share& share,
                    T* to) const {
    if (p.weights == Weights::kBf16)
      of.pack_columns_bf16(static_cast<const Bf16*>(w), columns, G, columns, share.first, share.last, to);
    else
      of.pack_columns(static_cast<const T*>(w), columns, G, columns, share.first, share.last, to);
  }

  // Packs the weights; sets the running gradients.
  void start() {
    const int64_t workers =
        threads_for(p.scan_work(k.gates) + p.input_work(k.gates), hidden_panels_ + input_panels_);
    for_workers(workers, [&](int64_t worker) {
      const Share hidden(hidden_panels_, worker, workers), input(input_panels_, worker, workers);
      for (int64_t d = 0; d < D; ++d) {
        if (r_) pack_columns(shared, p.weight_hh[d], H, hidden, r_at(d));
        if (out.x) pack_columns(large, p.weight_ih[d], p.input, input, w_at(d));
      }
    });
    for (int64_t d = 0; d < D; ++d) {
      if (k.has_c) set(out.c_0, in.c_n, d, 0);
      set(out.h_0, nullptr, d, 0);
      // A row that never begins hands its state through.
      set(out.h_0, in.h_n, d, layout.begun());
    }
  }
  void set(T* to, const T* from, int64_t d, int64_t first) const {
    const int64_t at = p.state_offset(d) + first * H;
    const size_t bytes = static_cast<size_t>((N - first) * H) * sizeof(T);
    if (bytes == 0) return;
    if (from)
      std::memcpy(to + at, from + at, bytes);
    else
      std::memset(to + at, 0, bytes);
  }

  void scan() {
    const int64_t bytes = shared.packed(hidden_panels_, G) * static_cast<int64_t>(sizeof(T));
    const int64_t member_size = k.scratch(N, 0, H, true);
    T* const member_scratch = scratch_.template take<T>(torch::stable::get_num_threads() * member_size);
    const ScanPlan plan(p.scan_work(k.gates), D, N, hidden_panels_ * ceil_div(N, shared.tile_rows),
                        shared.tile_rows, bytes);
    plan.run(layout.steps, D, layout,
             [&](int64_t member, int64_t s, int64_t d, int64_t row, int64_t last, int64_t worker, int64_t of,
                 int64_t directions) {
               const int64_t step = layout.steps - 1 - s;
               const int64_t rows = std::min(last, layout.size(layout.time(d, step))) - row;
               if (rows <= 0) return;
               const Share share = direction_share(hidden_panels_ * ceil_div(rows, shared.tile_rows), d,
                                                   directions, worker, of);
               RnnBackwardStep<T> back = make_step(step, d, row, rows);
               back.scratch = member_scratch + member * member_size;
               k.backward(back, share.first, share.last);
             });
  }

  RnnBackwardStep<T> make_step(int64_t step, int64_t d, int64_t row, int64_t rows) const {
    const int64_t t = layout.time(d, step), at = layout.offset(t) + row, state = p.state_offset(d) + row * H;
    RnnBackwardStep<T> b{};
    b.rows = rows, b.hidden = H, b.downward = step % 2 == 1;
    b.d_stride = d_stride(), b.zeros = zeros_;
    if (step + 1 < layout.steps) {
      const int64_t later = layout.time(d, step + 1);
      b.continued = std::min(layout.size(later), layout.size(t)) - row;
      if (b.continued > 0) b.d_next = d_at(d, later) + row * d_stride();
      p.resets(d, later, row, b.next_reset, b.next_flagged);
    }
    b.r = r_at(d);
    const int64_t wide = at * D * H + d * H;  // in what is laid out as the output
    if (in.output) b.dh_1 = in.output + wide, b.dh_1_stride = D * H;
    if (in.h_n) b.dh_n = in.h_n + state, b.dh_n_stride = H;
    if (in.cells) b.dc_1 = in.cells + wide, b.dc_1_stride = D * H;
    b.carry = (k.has_c ? out.c_0 : out.h_0) + state, b.carry_stride = H;
    b.kept = reserve + (d * layout.rows + layout.offset(t)) * k.kept * H;
    b.kept_rows = layout.size(t), b.kept_first = row;
    b.h_now = output + wide, b.h_now_stride = D * H;
    b.h = p.before(output, D * H, p.h_0, zeros_, d, step, row);
    if (k.has_c) {
      b.c_now = cells + wide, b.c_now_stride = D * H;
      b.c = p.before(cells, D * H, p.c_0, zeros_, d, step, row);
    }
    b.d = d_at(d, t) + row * d_stride();
    return b;
  }

  void products() {
    const double work = p.scan_work(k.gates) + 2 * p.input_work(k.gates);
    const int64_t workers = threads_for(work, ceil_div(G, shared.tile_rows));
    std::vector<T*> slabs(workers);
    const int64_t slab_size =
        std::max({large.product_scratch, large.multiply_scratch(G), shared.multiply_scratch(G)});
    for (T*& slab : slabs) slab = scratch_.template take<T>(slab_size);
    for (int64_t d = 0; d < D; ++d) list_states(d);
    for_workers(workers, [&](int64_t worker) {
      for (int64_t d = 0; d < D; ++d) {
        if (out.x) grad_input(d, worker, workers, slabs[worker]);
        if (out.want_h_0) grad_state(d, worker, workers, slabs[worker]);
        // Without input grad_weight_ih is empty, its address null, and grad_weight_hh still wanted.
        if (out.weight_hh[d]) grad_weights(d, worker, workers, slabs[worker]);
        if (out.bias_ih[d]) grad_bias(d, worker, workers);
      }
    });
  }

  // h_before_: the state that each row started from. d_first_: each sequence's first gradient of the
  // pre-activations, or zeros where its state did not reach it.
  void list_states(int64_t d) {
    if (out.weight_hh[d]) {
      h_before_[d].resize(layout.rows);
      for (int64_t step = 0; step < layout.steps; ++step) {
        const int64_t t = layout.time(d, step);
        const StateRows<T> s = p.before(output, D * H, p.h_0, zeros_, d, step, 0);
        for (int64_t n = 0; n < layout.size(t); ++n)
          h_before_[d][layout.offset(t) + n] = is_reset(s.reset, s.flagged, n) ? zeros_
                                               : n < s.carried ? s.before + n * s.before_stride
                                                               : s.initial + n * s.initial_stride;
      }
    }
    if (!out.want_h_0) return;
    d_first_[d].assign(N, zeros_);
    const std::vector<int64_t> length = layout.lengths();
    for (int64_t n = 0; n < layout.begun(); ++n) {
      const int64_t t = d == 0 ? 0 : length[n] - 1;
      const uint8_t* flags = nullptr;
      int64_t count = 0;
      p.resets(d, t, 0, flags, count);
      if (!is_reset(flags, count, n)) d_first_[d][n] = d_at(d, t) + n * d_stride();
    }
  }
  static bool is_reset(const uint8_t* flags, int64_t count, int64_t row) {
    return flags && row < count && flags[row];
  }

  // grad_x (+)= d * W
  void grad_input(int64_t d, int64_t worker, int64_t workers, T* slab) const {
    Product<T> x{};
    x.rows = layout.rows, x.columns = p.input, x.depth = x.a_split = G;
    x.a = d_ + d * layout.rows * d_stride(), x.a_row = d_stride(), x.a_depth = 1;
    x.b = w_at(d);
    x.c = out.x, x.c_stride = p.input, x.accumulate = d > 0;
    const Share share(input_panels_ * ceil_div(x.rows, large.band_rows), worker, workers);
    large.multiply(x, share.first, share.last, slab);
  }

  // grad_h_0 += d of the first step * R. The state's parts of d are those of the joint gates, then, behind
  // the other gates' input parts, those that stand apart.
  void grad_state(int64_t d, int64_t worker, int64_t workers, T* slab) const {
    Product<T> h{};
    h.rows = N, h.columns = H, h.depth = G;
    h.a_rows = d_first_[d].data(), h.a_depth = 1;
    h.a_split = k.joint * H, h.a_skip = (k.gates - k.joint) * H;
    h.b = r_at(d);
    h.c = out.h_0 + p.state_offset(d), h.c_stride = H, h.accumulate = true;
    const Share share(hidden_panels_ * ceil_div(N, shared.band_rows), worker, workers);
    shared.multiply(h, share.first, share.last, slab);
  }

  // Calls f(first gate, gates, their first part) for the state's parts of the gates: the joint ones, then
  // those that stand apart.
  template <typename F>
  void for_state_parts(const F& f) const {
    f(int64_t{0}, int64_t{k.joint}, int64_t{0});
    if (k.joint < k.gates) f(int64_t{k.joint}, int64_t{k.gates - k.joint}, int64_t{k.gates});
  }

  // grad_W = d^T x; grad_R = d^T h, h the states before.
  void grad_weights(int64_t d, int64_t worker, int64_t workers, T* slab) const {
    Product<T> w{};
    w.rows = G, w.columns = p.input, w.depth = layout.rows;
    w.a = d_ + d * layout.rows * d_stride(), w.a_row = 1, w.a_depth = d_stride();
    w.b = p.x, w.b_bf16 = p.x_bf16, w.b_stride = p.input;
    w.c = out.weight_ih[d], w.c_stride = p.input;
    Share share(input_panels_ * ceil_div(w.rows, large.row_block), worker, workers);
    large.multiply_unpacked(w, share.first, share.last, slab);
    for_state_parts([&](int64_t gate, int64_t gates, int64_t part) {
      Product<T> r = w;
      r.rows = gates * H, r.columns = H, r.a += part * H;
      r.b = nullptr, r.b_bf16 = nullptr, r.b_rows = h_before_[d].data();
      r.c = out.weight_hh[d] + gate * H * H, r.c_stride = H;
      const Share part_share(hidden_panels_ * ceil_div(r.rows, large.row_block), worker, workers);
      large.multiply_unpacked(r, part_share.first, part_share.last, slab);
    });
  }

  void grad_bias(int64_t d, int64_t worker, int64_t workers) const {
    const T* rows = d_ + d * layout.rows * d_stride();
    const auto sum = [&](int64_t gate, int64_t gates, int64_t part, T* bias) {
      const Share share(gates * H, worker, workers);
      large.sum_rows(rows + part * H, d_stride(), layout.rows, share.first, share.last, bias + gate * H);
      return share;
    };
    // Joint gates have one gradient for both.
    const Share joint = sum(0, k.joint, 0, out.bias_ih[d]);
    std::copy(out.bias_ih[d] + joint.first, out.bias_ih[d] + joint.last, out.bias_hh[d] + joint.first);
    if (k.joint == k.gates) return;
    sum(k.joint, k.gates - k.joint, k.joint, out.bias_ih[d]);
    sum(k.joint, k.gates - k.joint, k.gates, out.bias_hh[d]);
  }

  const RnnKernels<T>&shared, &large;  // for the scan and all that reads R; for products of all rows
  const CellKernels<T>& k;
  const RnnProblem<T>& p;
  const RnnGradientsIn<T>& in;
  const T *output, *cells, *reserve;
  const RnnGradientsOut<T>& out;
  const Layout& layout = p.layout;
  const int64_t N = layout.batch, H = p.hidden, D = p.directions, G = k.gates * H;
  int64_t hidden_panels_ = 0, input_panels_ = 0;
  T *r_ = nullptr, *w_ = nullptr, *d_ = nullptr, *zeros_ = nullptr;
  std::vector<const T*> h_before_[2], d_first_[2];
  Scratch scratch_;
};

}  // namespace cnnrnn
