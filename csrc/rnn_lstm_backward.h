// Back through the LSTM: the scan that yields the gradients of the pre-activations, then everything that
// needs no order of time as large matrix products.
#pragma once

#include "rnn_lstm_run.h"

namespace cnnrnn {

template <typename T>
class LstmBackward {
 public:
  LstmBackward(const LstmKernels<T>& kernels, const LstmProblem<T>& problem, const LstmGradientsIn<T>& in,
               const T* output, const T* reserve, const LstmGradientsOut<T>& out)
      : k(kernels), p(problem), in(in), output(output), reserve(reserve), out(out) {}

  void run() {
    const int64_t wide = 4 * k.lanes;
    hidden_panels_ = ceil_div(H, wide), input_panels_ = ceil_div(p.input, wide);
    r_ = scratch_.template take<T>(D * hidden_panels_ * wide * 4 * H);
    if (out.x) w_ = scratch_.template take<T>(D * input_panels_ * wide * 4 * H);
    d_ = scratch_.template take<T>(D * p.rows() * d_stride());
    start();
    scan();
    products();
  }

 private:
  // Rows of d_ are padded: a power of two would send a column of it to a few sets of the cache.
  int64_t d_stride() const { return 4 * H + 16; }
  T* d_at(int64_t d, int64_t t) const { return d_ + (d * p.steps + t) * N * d_stride(); }
  const T* r_at(int64_t d) const { return r_ + d * hidden_panels_ * 4 * k.lanes * 4 * H; }
  const T* w_at(int64_t d) const { return w_ + d * input_panels_ * 4 * k.lanes * 4 * H; }

  // Packs the weights; sets the running gradient of c.
  void start() {
    const int64_t workers = threads_for(p.scan_work() + p.input_work(), hidden_panels_ + input_panels_);
    for_workers(workers, [&](int64_t worker) {
      const Share hidden(hidden_panels_, worker, workers), input(input_panels_, worker, workers);
      for (int64_t d = 0; d < D; ++d) {
        k.pack_columns(p.weight_hh[d], H, 4 * H, H, hidden.first, hidden.last, const_cast<T*>(r_at(d)));
        if (out.x)
          k.pack_columns(p.weight_ih[d], p.input, 4 * H, p.input, input.first, input.last,
                         const_cast<T*>(w_at(d)));
      }
    });
    const size_t bytes = static_cast<size_t>(D * N * H) * sizeof(T);
    if (bytes == 0) return;
    if (in.c_n)
      std::memcpy(out.c_0, in.c_n, bytes);
    else
      std::memset(out.c_0, 0, bytes);
  }

  void scan() {
    const int64_t bytes = hidden_panels_ * 4 * k.lanes * 4 * H * static_cast<int64_t>(sizeof(T));
    const ScanPlan plan(p.scan_work(), D, N, hidden_panels_ * ceil_div(N, k.tile_rows), k.tile_rows, bytes);
    plan.run(
        p.steps, D, N,
        [&](int64_t s, int64_t d, int64_t row, int64_t rows, int64_t worker, int64_t of, int64_t directions) {
          const int64_t step = p.steps - 1 - s, t = p.time(d, step);
          const int64_t state = p.state_offset(d) + row * H;
          LstmBackwardStep<T> b{};
          b.rows = rows, b.hidden = H, b.downward = s % 2 == 1;
          if (s > 0) b.d_next = d_at(d, p.time(d, step + 1)) + row * d_stride();
          b.d_stride = d_stride();
          b.r = r_at(d);
          if (in.output) b.dh_1 = in.output + (t * N + row) * D * H + d * H;
          b.dh_1_stride = D * H;
          if (s == 0 && in.h_n) b.dh_2 = in.h_n + state;
          b.dh_2_stride = H;
          b.dc = out.c_0 + state, b.dc_stride = H;
          b.gates = reserve + ((d * p.steps + t) * N + row) * 5 * H, b.gates_stride = 5 * H;
          const bool first = step == 0;
          b.c = first ? p.c_0 + state
                      : reserve + ((d * p.steps + p.time(d, step - 1)) * N + row) * 5 * H + 4 * H;
          b.c_stride = first ? H : 5 * H;
          b.d = d_at(d, t) + row * d_stride();
          const Share share =
              direction_share(hidden_panels_ * ceil_div(rows, k.tile_rows), d, directions, worker, of);
          k.backward(b, share.first, share.last);
        });
  }

  void products() {
    const double work = p.scan_work() + 2 * p.input_work();
    const int64_t workers = threads_for(work, (4 * H + k.tile_rows - 1) / k.tile_rows);
    std::vector<T*> slabs(workers);
    for (T*& slab : slabs) slab = scratch_.template take<T>(k.product_scratch);
    for_workers(workers, [&](int64_t worker) {
      for (int64_t d = 0; d < D; ++d) {
        if (out.x) grad_input(d, worker, workers);
        if (out.h_0) grad_state(d, worker, workers);
        // Without input grad_weight_ih is empty, its address null, and grad_weight_hh still wanted.
        if (out.weight_hh[d]) grad_weights(d, worker, workers, slabs[worker]);
        if (out.bias[d]) {
          const Share share(4 * H, worker, workers);
          k.sum_rows(d_at(d, 0), d_stride(), p.rows(), share.first, share.last, out.bias[d]);
        }
      }
    });
  }

  // grad_x (+)= d * W
  void grad_input(int64_t d, int64_t worker, int64_t workers) const {
    Product<T> x{};
    x.rows = p.rows(), x.columns = p.input, x.depth = 4 * H;
    x.a = d_at(d, 0), x.a_row = d_stride(), x.a_depth = 1;
    x.b = w_at(d);
    x.c = out.x, x.c_stride = p.input, x.accumulate = d > 0;
    const Share share(input_panels_ * ceil_div(x.rows, k.tile_rows), worker, workers);
    k.multiply(x, share.first, share.last);
  }

  // grad_h_0 = d of the first step * R
  void grad_state(int64_t d, int64_t worker, int64_t workers) const {
    if (p.steps == 0) {
      if (worker != 0) return;
      for (int64_t i = p.state_offset(d); i < p.state_offset(d) + N * H; ++i)
        out.h_0[i] = in.h_n ? in.h_n[i] : T(0);
      return;
    }
    Product<T> h{};
    h.rows = N, h.columns = H, h.depth = 4 * H;
    h.a = d_at(d, p.time(d, 0)), h.a_row = d_stride(), h.a_depth = 1;
    h.b = r_at(d);
    h.c = out.h_0 + p.state_offset(d), h.c_stride = H;
    const Share share(hidden_panels_ * ceil_div(N, k.tile_rows), worker, workers);
    k.multiply(h, share.first, share.last);
  }

  // grad_W = d^T x; grad_R = d^T h, where h of the first step is h_0 and of every other the output before.
  void grad_weights(int64_t d, int64_t worker, int64_t workers, T* slab) const {
    const int64_t blocks = ceil_div(4 * H, k.row_block);
    Product<T> w{};
    w.rows = 4 * H, w.columns = p.input, w.depth = p.rows();
    w.a = d_at(d, 0), w.a_row = 1, w.a_depth = d_stride();
    w.b = p.x, w.b_stride = p.input;
    w.c = out.weight_ih[d], w.c_stride = p.input;
    Share share(input_panels_ * blocks, worker, workers);
    k.multiply_unpacked(w, share.first, share.last, slab);

    share = Share(hidden_panels_ * blocks, worker, workers);
    Product<T> r = w;
    r.columns = H, r.c = out.weight_hh[d], r.c_stride = H;
    r.depth = p.steps == 0 ? 0 : N;
    r.a = d_at(d, p.steps == 0 ? 0 : p.time(d, 0));
    r.b = p.h_0 + p.state_offset(d), r.b_stride = H;
    k.multiply_unpacked(r, share.first, share.last, slab);
    if (p.steps < 2) return;
    r.depth = p.rows() - N, r.accumulate = true;
    r.a = d_at(d, d == 0 ? 1 : 0);
    r.b = output + (d == 0 ? 0 : 1) * N * D * H + d * H, r.b_stride = D * H;
    k.multiply_unpacked(r, share.first, share.last, slab);
  }

  const LstmKernels<T>& k;
  const LstmProblem<T>& p;
  const LstmGradientsIn<T>& in;
  const T *output, *reserve;
  const LstmGradientsOut<T>& out;
  const int64_t N = p.batch, H = p.hidden, D = p.directions;
  int64_t hidden_panels_ = 0, input_panels_ = 0;
  T *r_ = nullptr, *w_ = nullptr, *d_ = nullptr;
  Scratch scratch_;
};

}  // namespace cnnrnn
