// A recurrent layer over a whole sequence: what to pack, how to cut the work, in which order.
#pragma once

#include "halves.h"
#include "rnn_run.h"

namespace cnnrnn {

template <typename T>
class RnnForward {
 public:
  RnnForward(Cell cell, const RnnProblem<T>& problem, const RnnOutputs<T>& out)
      : turned_(problem.weights == Weights::kElement && !problem.x_bf16
                    ? turned_kernels_for<T>(problem.layout.rows, cell)
                    : nullptr),
        narrow_(problem.weights != Weights::kElement && takes_narrow(problem.layout, problem.weights)),
        few_((narrow_ || problem.weights == Weights::kElement) && !(turned_ && problem.layout.steps == 1) &&
             problem.layout.rows <= (problem.layout.steps == 1 ? kDirectStepRows : kDirectRows)),
        direct_(few_ || narrow_ ||
                (problem.weights == Weights::kElement && problem.layout.batch <= kDirectBatch)),
        k(turned_ && problem.layout.steps == 1 ? *turned_
          : direct_ ? rnn_kernels_of<T>().cells[cell]
                    : packed_kernels_for<T>(problem.layout.batch, problem.x_bf16).cells[cell]),
        input_(turned_ && &k == &rnn_kernels_of<T>().cells[cell] ? *turned_
               : problem.layout.rows < (problem.x_bf16 ? kManyHalfRows : kManyRows) ||
                       (narrow_ && !problem.x_bf16)
                   ? k
                   : packed_kernels_for<T>(problem.layout.rows, problem.x_bf16).cells[cell]),
        p(problem),
        out(out) {
    work_ = p.scan_work(k.gates) + p.input_work(k.gates);
    workers_ = threads_for(work_, D * panels_ * ceil_div(std::max<int64_t>(layout.rows, 1), k.tile_rows));
    // x * W inside the scan's steps if the weights stay in cache from step to step or many rows share what is
    // read, else as large products ahead of it: there a panel of W serves the rows of many steps, which may
    // fill tile registers where those of a step do not.
    const int64_t weight_bytes = D * packed(p.input + H) * static_cast<int64_t>(sizeof(T));
    const bool cached = weight_bytes / workers_ <= kCachedBytes;
    const bool alike = direct_ || input_.forward == k.forward;
    const bool shared = (N >= kFusedRows && alike) || (N >= k.tile_rows && cached);
    fused_ = few_ || (!direct_ && (layout.steps == 1 || shared));
    narrow_input_ = narrow_ && &of_input() == &k;
  }

  // Whether narrow weights are read as they come: int8 by faster kernels than packed ones are, until these
  // have rows enough; bfloat16 by slower ones, where packing would take longer.
  static bool takes_narrow(const Layout& layout, Weights weights) {
    return layout.rows <= kDirectRows || layout.batch <= (weights == Weights::kInt8 ? 32 : 2);
  }

  void run() {
    if (!p.h_0 || !p.c_0 || p.reset) zeros_ = scratch_.template take_zeros<T>(H);
    if (p.x_bf16 && !of_input().takes_bf16) widen_input();
    pack();
    // Projections are made for some steps at a time: few enough to be still in cache when the scan comes.
    constexpr int64_t kProjectedBytes = 2 << 20;
    const int64_t step_bytes = std::max<int64_t>(D * N * k.gates * H * static_cast<int64_t>(sizeof(T)), 1);
    const int64_t enough_rows = ceil_div(96, std::max<int64_t>(N, 1));
    chunk_ = fused_ ? layout.steps : std::max(kProjectedBytes / step_bytes, enough_rows);
    chunk_ = std::min(std::max<int64_t>(chunk_, 1), layout.steps);
    if (!fused_ && !projects_in_place()) projected_ = scratch_.template take<T>(D * chunk_ * N * k.gates * H);
    if (!direct_) member_size_ = k.scratch(N, fused_ ? p.input : 0, H, false);
    if (!fused_) member_size_ = std::max(member_size_, input_.project_scratch(chunk_ * N, p.input));
    member_scratch_ = scratch_.template take<T>(torch::stable::get_num_threads() * member_size_);
    for (from_ = 0; from_ < layout.steps; from_ += chunk_) {
      count_ = std::min(chunk_, layout.steps - from_);
      if (!fused_) project();
      scan();
    }
    finish();
  }

 private:
  // So few rows in all, or in a step, that reading the weights as they come is faster than packing them,
  // which reads the weights and writes as much to memory.
  static constexpr int64_t kDirectRows = 16, kDirectStepRows = 64, kDirectBatch = 1;
  static constexpr int64_t kFusedRows = 16;
  // Packing for tile registers takes longer: rows enough to make up for it.
  static constexpr int64_t kManyRows = 256, kManyHalfRows = 32;

  int64_t packed(int64_t depth) const { return packed(k, depth); }
  // Elements of the packed weights of one direction, or of as many as come.
  int64_t packed(const CellKernels<T>& of, int64_t depth) const {
    return of.as_they_come ? of.gates * H * depth : of.packed(panels_, depth);
  }
  // The kernels that multiply x, and what packed W takes for them.
  const CellKernels<T>& of_input() const { return fused_ ? k : input_; }
  int64_t packed_input() const { return packed(of_input(), p.input); }

  void widen_input() {
    const int64_t count = layout.rows * p.input;
    T* const wide = scratch_.template take<T>(count);
    if constexpr (sizeof(T) == sizeof(float)) widen_all(p.x_bf16, count, wide);
    x_ = wide;
  }

  void pack() {
    if ((fused_ ? !direct_ : !narrow_input_) && !of_input().as_they_come)
      w_ = scratch_.template take<T>(D * packed_input());
    if (!direct_ && !k.as_they_come) r_ = scratch_.template take<T>(D * packed(H));
    if (!direct_ && p.bias_ih[0]) bias_ = scratch_.template take<T>(D * packed_bias());
    if (!w_ && !r_ && !bias_) return;
    const int64_t workers = w_ || r_ ? workers_ : 1;
    for_workers(workers, [&](int64_t worker) {
      const Share share(panels_, worker, workers);
      for (int64_t d = 0; d < D; ++d) {
        if (w_) pack_gates(of_input(), p.weight_ih[d], p.input, share, w_ + d * packed_input());
        if (r_) pack_gates(k, p.weight_hh[d], H, share, r_ + d * packed(H));
        if (bias_ && worker == 0) k.pack_bias(p.bias_ih[d], p.bias_hh[d], H, bias_ + d * packed_bias());
      }
    });
  }
  void pack_gates(const CellKernels<T>& of, const void* w, int64_t depth, const Share& share, T* to) const {
    if (p.weights == Weights::kBf16)
      of.pack_gates_bf16(static_cast<const Bf16*>(w), H, depth, share.first, share.last, to);
    else
      of.pack_gates(static_cast<const T*>(w), H, depth, share.first, share.last, to);
  }
  const void* input_weights(int64_t d) const { return w_ ? w_ + d * packed_input() : p.weight_ih[d]; }
  int64_t packed_bias() const { return panels_ * k.parts * k.panel_units; }

  // x from row `first` on, as the kernels that multiply it take it.
  void set_input(RnnForwardStep<T>& step, int64_t first) const {
    if (x_)
      step.x = x_ + first * p.input;
    else
      step.x_bf16 = p.x_bf16 + first * p.input;
    step.x_stride = p.input;
  }

  // The chunk's first time: steps from_ .. from_ + count_ of direction 1 lie mirrored.
  int64_t chunk_time(int64_t d) const { return d == 0 ? from_ : layout.steps - from_ - count_; }

  // Where x * W waits for its step: for a cell of one gate in the output, whose step overwrites it.
  bool projects_in_place() const { return k.gates == 1; }
  int64_t projection_stride() const { return (projects_in_place() ? D : k.gates) * H; }
  T* projection_at(int64_t d, int64_t t) const {
    if (projects_in_place()) return out.output + layout.offset(t) * D * H + d * H;
    return projected_ + (d * chunk_ * N + layout.offset(t) - layout.offset(chunk_time(d))) * k.gates * H;
  }

  void project() {
    const auto project = !narrow_input_                ? input_.project
                         : p.weights == Weights::kBf16 ? input_.project_bf16
                                                       : input_.project_int8;
    for_workers(workers_, [&](int64_t worker) {
      for (int64_t d = 0; d < D; ++d) {
        const int64_t t = chunk_time(d), first = layout.offset(t);
        RnnForwardStep<T> step{};
        step.rows = layout.offset(t + count_) - first, step.hidden = H, step.input = p.input;
        set_input(step, first);
        step.w = input_weights(d), step.scale_ih = p.scale_ih[d];
        step.projection = projection_at(d, t), step.projection_stride = projection_stride();
        step.scratch = member_scratch(worker);
        const Share share(panels_ * (narrow_input_ ? 1 : ceil_div(step.rows, input_.band_rows)), worker,
                          workers_);
        project(step, share.first, share.last);
      }
    });
  }

  int64_t scan_tasks(int64_t rows) const { return panels_ * (direct_ ? 1 : ceil_div(rows, k.tile_rows)); }

  void scan() {
    const int64_t bytes = packed(fused_ ? p.input + H : H) * static_cast<int64_t>(sizeof(T));
    const ScanPlan plan(fused_ ? work_ : p.scan_work(k.gates) * count_ / layout.steps, D, N, scan_tasks(N),
                        k.tile_rows, bytes);
    const auto kernel = !direct_                      ? k.forward
                        : !narrow_                    ? k.forward_direct
                        : p.weights == Weights::kBf16 ? k.forward_bf16
                                                      : k.forward_int8;
    plan.run(count_, D, layout,
             [&](int64_t member, int64_t s, int64_t d, int64_t row, int64_t last, int64_t worker, int64_t of,
                 int64_t directions) {
               const int64_t rows = std::min(last, layout.size(layout.time(d, from_ + s))) - row;
               if (rows <= 0) return;
               const Share share = direction_share(scan_tasks(rows), d, directions, worker, of);
               RnnForwardStep<T> step = make_step(s, d, row, rows);
               step.scratch = member_scratch(member);
               kernel(step, share.first, share.last);
             });
  }

  // A worker's, for kernels that prepare what they multiply.
  T* member_scratch(int64_t member) const { return member_scratch_ + member * member_size_; }

  RnnForwardStep<T> make_step(int64_t s, int64_t d, int64_t row, int64_t rows) const {
    const int64_t t = layout.time(d, from_ + s), at = layout.offset(t) + row;
    RnnForwardStep<T> step{};
    step.rows = rows, step.hidden = H, step.input = p.input;
    step.downward = (s + turn_) % 2 == 1;
    step.projected = !fused_;
    if (fused_) {
      set_input(step, at);
      step.w = input_weights(d);
    } else {
      step.projection = projection_at(d, t) + row * projection_stride();
      step.projection_stride = projection_stride();
    }
    step.r = r_ ? r_ + d * packed(H) : p.weight_hh[d];
    step.bias = bias_ ? bias_ + d * packed_bias() : nullptr;
    step.bias_ih = p.bias_ih[d], step.bias_hh = p.bias_hh[d];
    step.scale_ih = p.scale_ih[d], step.scale_hh = p.scale_hh[d];
    step.h = p.before(out.output, D * H, p.h_0, zeros_, d, from_ + s, row);
    if (k.kept > 0 && out.reserve) {
      step.kept = out.reserve + (d * layout.rows + layout.offset(t)) * k.kept * H;
      step.kept_rows = layout.size(t), step.kept_first = row;
    }
    if (k.has_c) {
      step.c = p.before(out.cells, D * H, p.c_0, zeros_, d, from_ + s, row);
      if (out.cells) {
        step.c_out = out.cells + at * D * H + d * H, step.c_out_stride = D * H;
      } else {
        step.c_out = out.c_n + p.state_offset(d) + row * H, step.c_out_stride = H;
        step.c.before = step.c_out, step.c.before_stride = H;
      }
    }
    step.h_out = out.output + at * D * H + d * H, step.h_out_stride = D * H;
    return step;
  }

  // The last states, where they do not stand in place already.
  void finish() const {
    if (H == 0 || (!out.h_n && !out.cells)) return;
    const std::vector<int64_t> length = layout.lengths();
    for (int64_t d = 0; d < D; ++d)
      for (int64_t n = 0; n < N; ++n) {
        const int64_t state = p.state_offset(d) + n * H;
        const bool begins = n < layout.begun();
        const int64_t t = begins && d == 0 ? length[n] - 1 : 0;
        const int64_t at = begins ? (layout.offset(t) + n) * D * H + d * H : 0;
        if (out.h_n) copy_state(out.h_n + state, begins ? out.output + at : p.h_0 ? p.h_0 + state : nullptr);
        if (!out.c_n || (begins && !out.cells)) continue;
        copy_state(out.c_n + state, begins ? out.cells + at : p.c_0 ? p.c_0 + state : nullptr);
      }
  }
  void copy_state(T* to, const T* from) const {
    const size_t bytes = static_cast<size_t>(H) * sizeof(T);
    if (from)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }

  const CellKernels<T>* const turned_;  // where rows are as many as pay for them
  const bool narrow_, few_, direct_;
  const CellKernels<T>&k, &input_;  // of the scan, and of x * W where that stands apart
  const RnnProblem<T>& p;
  const RnnOutputs<T>& out;
  const Layout& layout = p.layout;
  const int64_t N = layout.batch, H = p.hidden, D = p.directions;
  const int64_t panels_ = ceil_div(H, k.panel_units);
  double work_;
  int64_t workers_, chunk_ = 0, from_ = 0, count_ = 0;
  bool fused_, narrow_input_;
  // Calls take turns too: a stream of single steps finds in cache what the call before has read last.
  const int64_t turn_ = next_turn();
  static int64_t next_turn() {
    thread_local int64_t turn = 0;
    return turn ^= 1;
  }
  T *w_ = nullptr, *r_ = nullptr, *bias_ = nullptr, *projected_ = nullptr, *zeros_ = nullptr;
  const T* x_ = p.x;
  T* member_scratch_ = nullptr;
  int64_t member_size_ = 0;
  Scratch scratch_;
};

}  // namespace cnnrnn
