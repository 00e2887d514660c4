// The LSTM over a whole sequence: what to pack, how to cut the work, in which order.
#pragma once

#include "rnn_lstm_run.h"

namespace cnnrnn {

template <typename T>
class LstmForward {
 public:
  LstmForward(const LstmKernels<T>& kernels, const LstmProblem<T>& problem, const LstmOutputs<T>& out)
      : k(kernels), p(problem), out(out) {
    work_ = p.scan_work() + p.input_work();
    workers_ = threads_for(work_, D * panels_ * ceil_div(std::max<int64_t>(p.rows(), 1), k.tile_rows));
    // Packing costs as much as the product of some rows.
    constexpr int64_t kDirectRows = 16;
    direct_ = p.rows() <= kDirectRows;
    // x * W inside the scan's tiles if the weights stay in cache from step to step, else as large products
    // ahead of it: there a panel of W serves the rows of many steps.
    const int64_t weight_bytes = D * packed(p.input + H) * static_cast<int64_t>(sizeof(T));
    fused_ = direct_ || p.steps == 1 || (N >= k.tile_rows && weight_bytes / workers_ <= kCachedBytes);
  }

  void run() {
    if (!direct_) pack();
    // Projections are made for some steps at a time: few enough to be still in cache when the scan comes.
    constexpr int64_t kProjectedBytes = 2 << 20;
    const int64_t step_bytes = std::max<int64_t>(D * N * 4 * H * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t enough_rows = ceil_div(96, std::max<int64_t>(N, 1));
    chunk_ = fused_ ? p.steps : std::max(kProjectedBytes / step_bytes, enough_rows);
    chunk_ = std::min(std::max<int64_t>(chunk_, 1), p.steps);
    if (!fused_ && !out.reserve) projected_ = scratch_.template take<T>(D * chunk_ * N * 4 * H);
    for (from_ = 0; from_ < p.steps; from_ += chunk_) {
      count_ = std::min(chunk_, p.steps - from_);
      if (!fused_) project();
      scan();
    }
    finish();
  }

 private:
  int64_t packed(int64_t depth) const { return panels_ * 4 * k.lanes * depth; }

  void pack() {
    w_ = scratch_.template take<T>(D * packed(p.input));
    r_ = scratch_.template take<T>(D * packed(H));
    if (p.bias_ih[0]) bias_ = scratch_.template take<T>(D * packed(1));
    for_workers(workers_, [&](int64_t worker) {
      const Share share(panels_, worker, workers_);
      for (int64_t d = 0; d < D; ++d) {
        k.pack_gates(p.weight_ih[d], H, p.input, share.first, share.last, w_ + d * packed(p.input));
        k.pack_gates(p.weight_hh[d], H, H, share.first, share.last, r_ + d * packed(H));
        if (bias_ && worker == 0) k.pack_bias(p.bias_ih[d], p.bias_hh[d], H, bias_ + d * packed(1));
      }
    });
  }

  // The chunk's first time: steps from_ .. from_ + count_ of direction 1 lie mirrored.
  int64_t chunk_time(int64_t d) const { return d == 0 ? from_ : p.steps - from_ - count_; }
  int64_t gates_stride() const { return out.reserve ? 5 * H : 4 * H; }
  T* gates_at(int64_t d, int64_t t) const {
    if (out.reserve) return out.reserve + (d * p.steps + t) * N * 5 * H;
    if (!projected_) return nullptr;
    return projected_ + (d * chunk_ + t - chunk_time(d)) * N * 4 * H;
  }

  void project() {
    const int64_t tasks = panels_ * ceil_div(count_ * N, k.tile_rows);
    for_workers(workers_, [&](int64_t worker) {
      for (int64_t d = 0; d < D; ++d) {
        LstmForwardStep<T> step{};
        step.rows = count_ * N, step.hidden = H, step.input = p.input;
        step.x = p.x + chunk_time(d) * N * p.input, step.x_stride = p.input;
        step.w = w_ + d * packed(p.input);
        step.gates = gates_at(d, chunk_time(d)), step.gates_stride = gates_stride();
        const Share share(tasks, worker, workers_);
        k.project(step, share.first, share.last);
      }
    });
  }

  int64_t scan_tasks(int64_t rows) const { return panels_ * (direct_ ? 1 : ceil_div(rows, k.tile_rows)); }

  void scan() {
    const int64_t bytes = packed(fused_ ? p.input + H : H) * static_cast<int64_t>(sizeof(T));
    const ScanPlan plan(fused_ ? work_ : p.scan_work() * count_ / p.steps, D, N, scan_tasks(N), k.tile_rows,
                        bytes);
    plan.run(
        count_, D, N,
        [&](int64_t s, int64_t d, int64_t row, int64_t rows, int64_t worker, int64_t of, int64_t directions) {
          const Share share = direction_share(scan_tasks(rows), d, directions, worker, of);
          const LstmForwardStep<T> step = make_step(s, d, row, rows);
          (direct_ ? k.forward_direct : k.forward)(step, share.first, share.last);
        });
  }

  LstmForwardStep<T> make_step(int64_t s, int64_t d, int64_t row, int64_t rows) const {
    const int64_t t = p.time(d, from_ + s), before = p.time(d, from_ + s - 1);
    const int64_t state = p.state_offset(d) + row * H;
    const bool first = from_ + s == 0;
    LstmForwardStep<T> step{};
    step.rows = rows, step.hidden = H, step.input = p.input;
    step.downward = s % 2 == 1;
    step.projected = !fused_;
    if (fused_) {
      step.x = p.x + (t * N + row) * p.input, step.x_stride = p.input;
      step.w = direct_ ? p.weight_ih[d] : w_ + d * packed(p.input);
    }
    step.h = first ? p.h_0 + state : out.output + (before * N + row) * D * H + d * H;
    step.h_stride = first ? H : D * H;
    step.r = direct_ ? p.weight_hh[d] : r_ + d * packed(H);
    step.bias = bias_ ? bias_ + d * packed(1) : nullptr;
    step.bias_ih = p.bias_ih[d], step.bias_hh = p.bias_hh[d];
    if (T* gates = gates_at(d, t)) step.gates = gates + row * gates_stride();
    step.gates_stride = gates_stride(), step.keep_gates = out.reserve != nullptr;
    if (out.reserve) {
      step.c = first ? p.c_0 + state : out.reserve + ((d * p.steps + before) * N + row) * 5 * H + 4 * H;
      step.c_stride = first ? H : 5 * H;
      step.c_out = step.gates + 4 * H, step.c_out_stride = 5 * H;
    } else {
      step.c = first ? p.c_0 + state : out.c_n + state, step.c_stride = H;
      step.c_out = out.c_n + state, step.c_out_stride = H;
    }
    step.h_out = out.output + (t * N + row) * D * H + d * H, step.h_out_stride = D * H;
    return step;
  }

  // The last states, where they do not stand in place already.
  void finish() const {
    const size_t bytes = static_cast<size_t>(H) * sizeof(T);
    for (int64_t d = 0; d < D; ++d) {
      const int64_t t = p.time(d, p.steps - 1);
      for (int64_t n = 0; n < N && H > 0; ++n) {
        const int64_t state = p.state_offset(d) + n * H;
        const T* h = p.steps == 0 ? p.h_0 + state : out.output + (t * N + n) * D * H + d * H;
        if (out.h_n) std::memcpy(out.h_n + state, h, bytes);
        if (p.steps == 0)
          std::memcpy(out.c_n + state, p.c_0 + state, bytes);
        else if (out.reserve)
          std::memcpy(out.c_n + state, out.reserve + ((d * p.steps + t) * N + n) * 5 * H + 4 * H, bytes);
      }
    }
  }

  const LstmKernels<T>& k;
  const LstmProblem<T>& p;
  const LstmOutputs<T>& out;
  const int64_t N = p.batch, H = p.hidden, D = p.directions;
  const int64_t panels_ = ceil_div(H, k.lanes);
  double work_;
  int64_t workers_, chunk_ = 0, from_ = 0, count_ = 0;
  bool direct_, fused_;
  T *w_ = nullptr, *r_ = nullptr, *bias_ = nullptr, *projected_ = nullptr;
  Scratch scratch_;
};

}  // namespace cnnrnn
