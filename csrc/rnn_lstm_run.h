// The LSTM over a whole sequence on raw pointers: what to pack, how to cut the work, in which order.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/rnn.h"
#include "rnn_schedule.h"

namespace cnnrnn {

// Shapes as in operators.schema; all contiguous. Direction 1 runs backward in time.
template <typename T>
struct LstmProblem {
  int64_t steps, batch, input, hidden, directions;
  const T *x, *h_0, *c_0;
  const T *weight_ih[2], *weight_hh[2], *bias_ih[2], *bias_hh[2];  // biases may be null

  int64_t time(int64_t d, int64_t step) const { return d == 0 ? step : steps - 1 - step; }
  int64_t state_offset(int64_t d) const { return d * batch * hidden; }
  int64_t rows() const { return steps * batch; }
  double scan_work() const { return 4.0 * directions * rows() * hidden * hidden; }
  double input_work() const { return 4.0 * directions * rows() * hidden * input; }
};

template <typename T>
struct LstmOutputs {
  T *output, *h_n, *c_n;  // h_n may be null where output says the same (one step)
  T* reserve;             // null in inference
};

template <typename T>
struct LstmGradientsIn {
  const T *output, *h_n, *c_n;  // each may be null
};

template <typename T>
struct LstmGradientsOut {
  T *x, *h_0;                                // null if not wanted
  T* c_0;                                    // always: the scan keeps its running gradient there
  T *weight_ih[2], *weight_hh[2], *bias[2];  // null if not wanted
};

// Memory of a call, kept for the next one on the same thread unless it is large: page faults on fresh
// memory would cost more than some of the kernels.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
    std::unique_ptr<char[]> block;
    for (auto& kept : pool()) {
      if (kept.size < bytes || kept.size > 4 * bytes + (1 << 16)) continue;
      blocks_.push_back(std::move(kept));
      std::swap(kept, pool().back());
      pool().pop_back();
      return aligned<T>();
    }
    blocks_.push_back({std::unique_ptr<char[]>(new char[bytes]), bytes});
    return aligned<T>();
  }
  ~Scratch() {
    size_t total = 0;
    for (auto& kept : pool()) total += kept.size;
    for (auto& block : blocks_) {
      if (total + block.size > kKept) continue;
      total += block.size;
      pool().push_back(std::move(block));
    }
  }

 private:
  static constexpr size_t kKept = size_t{64} << 20;
  struct Block {
    std::unique_ptr<char[]> memory;
    size_t size;
  };
  static std::vector<Block>& pool() {
    thread_local std::vector<Block> blocks;
    return blocks;
  }
  template <typename T>
  T* aligned() {
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().memory.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }
  std::vector<Block> blocks_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The bytes of weights that a core can hope to find in its second-level cache at every step.
constexpr int64_t kCachedBytes = 768 << 10;

// How a scan is cut. Independent: each member takes some batch rows of some directions through all steps.
// Otherwise all members share every step, cut by hidden units, and meet at its end.
struct ScanPlan {
  int64_t members, row_parts, direction_parts;
  bool independent;

  ScanPlan(double work, int64_t directions, int64_t batch, int64_t tasks, int64_t tile_rows,
           int64_t direction_bytes) {
    members = threads_for(work, std::max<int64_t>(tasks * directions, 1));
    direction_parts = directions == 2 && members % 2 == 0 ? 2 : 1;
    row_parts = members / direction_parts;
    const bool rows_suffice = row_parts == 1 || batch >= 2 * tile_rows * row_parts;
    const bool cached = row_parts == 1 || direction_bytes * (directions / direction_parts) <= kCachedBytes;
    independent = rows_suffice && cached;
  }

  // f(step, direction, first row, rows, worker of workers that share these rows)
  template <typename F>
  void run(int64_t steps, int64_t directions, int64_t batch, const F& f) const {
    if (!independent) {
      Lockstep::run(steps, members, [&](int64_t step, int64_t member) {
        // Work is numbered through both directions; each gets the part of the share that falls into it.
        for (int64_t d = 0; d < directions; ++d) f(step, d, int64_t{0}, batch, member, members, directions);
      });
      return;
    }
    for_workers(members, [&](int64_t member) {
      const Share rows(batch, member % row_parts, row_parts);
      const int64_t part = member / row_parts;
      const int64_t d_first = direction_parts == 2 ? part : 0;
      const int64_t d_last = direction_parts == 2 ? part + 1 : directions;
      for (int64_t d = d_first; d < d_last; ++d)
        for (int64_t step = 0; step < steps; ++step)
          f(step, d, rows.first, rows.last - rows.first, int64_t{0}, int64_t{1}, int64_t{1});
    });
  }
};

// The part of direction d's tasks that falls to a worker when `directions` x tasks are shared out.
inline Share direction_share(int64_t tasks, int64_t d, int64_t directions, int64_t worker, int64_t workers) {
  Share share(directions == 1 ? tasks : tasks * directions, worker, workers);
  if (directions == 1) return share;
  share.first = std::clamp<int64_t>(share.first - d * tasks, 0, tasks);
  share.last = std::clamp<int64_t>(share.last - d * tasks, 0, tasks);
  return share;
}

template <typename T>
void lstm_forward_run(const LstmKernels<T>& k, const LstmProblem<T>& p, const LstmOutputs<T>& out) {
  const int64_t N = p.batch, H = p.hidden, D = p.directions, lanes = k.lanes;
  const int64_t panels = ceil_div(H, lanes), panel = 4 * lanes;
  const double work = p.scan_work() + p.input_work();
  Scratch scratch;

  // x * W inside the scan's tiles if the weights stay in cache from step to step, else as large products
  // ahead of it: there a panel of W serves the rows of many steps.
  const int64_t workers =
      threads_for(work, D * panels * ceil_div(std::max<int64_t>(p.rows(), 1), k.tile_rows));
  const int64_t weight_bytes = D * panels * panel * (p.input + H) * static_cast<int64_t>(sizeof(T));
  const bool fused = p.steps == 1 || (N >= k.tile_rows && weight_bytes / workers <= kCachedBytes);

  T* w = scratch.take<T>(D * panels * panel * p.input);
  T* r = scratch.take<T>(D * panels * panel * H);
  T* bias = p.bias_ih[0] ? scratch.take<T>(D * panels * panel) : nullptr;
  for_workers(workers, [&](int64_t worker) {
    const Share share(panels, worker, workers);
    for (int64_t d = 0; d < D; ++d) {
      k.pack_gates(p.weight_ih[d], H, p.input, share.first, share.last, w + d * panels * panel * p.input);
      k.pack_gates(p.weight_hh[d], H, H, share.first, share.last, r + d * panels * panel * H);
      if (bias && worker == 0) k.pack_bias(p.bias_ih[d], p.bias_hh[d], H, bias + d * panels * panel);
    }
  });

  // Projections are made for some steps at a time: few enough to be still in cache when the scan comes.
  constexpr int64_t kProjectedBytes = 2 << 20;
  const int64_t step_bytes = std::max<int64_t>(D * N * 4 * H * static_cast<int64_t>(sizeof(T)), 1);
  int64_t chunk =
      fused ? p.steps
            : std::max<int64_t>(kProjectedBytes / step_bytes, ceil_div(96, std::max<int64_t>(N, 1)));
  chunk = std::min(std::max<int64_t>(chunk, 1), p.steps);
  T* projected = fused || out.reserve ? nullptr : scratch.take<T>(D * chunk * N * 4 * H);

  const int64_t gates_stride = out.reserve ? 5 * H : 4 * H;
  for (int64_t from = 0; from < p.steps; from += chunk) {
    const int64_t count = std::min(chunk, p.steps - from);
    // The chunk's first row of `gates` in order of time: later steps of direction 1 come earlier.
    const auto chunk_time = [&](int64_t d) { return d == 0 ? from : p.steps - from - count; };
    const auto gates_at = [&](int64_t d, int64_t t) -> T* {
      if (out.reserve) return out.reserve + (d * p.steps + t) * N * 5 * H;
      if (!projected) return nullptr;
      return projected + (d * chunk + t - chunk_time(d)) * N * 4 * H;
    };

    if (!fused) {
      const int64_t tasks = panels * ceil_div(count * N, k.tile_rows);
      for_workers(workers, [&](int64_t worker) {
        for (int64_t d = 0; d < D; ++d) {
          LstmForwardStep<T> step{};
          step.rows = count * N, step.hidden = H, step.input = p.input;
          step.x = p.x + chunk_time(d) * N * p.input, step.x_stride = p.input;
          step.w = w + d * panels * panel * p.input;
          step.gates = gates_at(d, chunk_time(d)), step.gates_stride = gates_stride;
          const Share share(tasks, worker, workers);
          k.project(step, share.first, share.last);
        }
      });
    }

    const int64_t per_direction =
        panels * panel * (fused ? p.input + H : H) * static_cast<int64_t>(sizeof(T));
    const ScanPlan plan(fused ? work : p.scan_work(), D, N, panels * ceil_div(N, k.tile_rows), k.tile_rows,
                        per_direction);
    plan.run(
        count, D, N,
        [&](int64_t s, int64_t d, int64_t row, int64_t rows, int64_t worker, int64_t of, int64_t directions) {
          const int64_t t = p.time(d, from + s), before = p.time(d, from + s - 1),
                        state = p.state_offset(d) + row * H;
          const bool first = from + s == 0;
          LstmForwardStep<T> step{};
          step.downward = s % 2 == 1;
          step.rows = rows, step.hidden = H, step.input = p.input;
          if (fused) {
            step.x = p.x + (t * N + row) * p.input, step.x_stride = p.input;
            step.w = w + d * panels * panel * p.input;
          }
          step.h = first ? p.h_0 + state : out.output + (before * N + row) * D * H + d * H;
          step.h_stride = first ? H : D * H;
          step.r = r + d * panels * panel * H;
          step.bias = bias ? bias + d * panels * panel : nullptr;
          if (T* gates = gates_at(d, t)) step.gates = gates + row * gates_stride;
          step.gates_stride = gates_stride, step.keep_gates = out.reserve != nullptr;
          if (out.reserve) {
            step.c = first ? p.c_0 + state : gates_at(d, before) + row * 5 * H + 4 * H;
            step.c_stride = first ? H : 5 * H;
            step.c_out = step.gates + 4 * H, step.c_out_stride = 5 * H;
          } else {
            step.c = first ? p.c_0 + state : out.c_n + state, step.c_stride = H;
            step.c_out = out.c_n + state, step.c_out_stride = H;
          }
          step.h_out = out.output + (t * N + row) * D * H + d * H, step.h_out_stride = D * H;
          const Share share =
              direction_share(panels * ceil_div(rows, k.tile_rows), d, directions, worker, of);
          k.forward(step, share.first, share.last);
        });
  }

  for (int64_t d = 0; d < D; ++d) {
    const int64_t t = p.time(d, p.steps - 1);
    for (int64_t n = 0; n < N; ++n) {
      const int64_t state = p.state_offset(d) + n * H;
      const size_t bytes = static_cast<size_t>(H) * sizeof(T);
      if (out.h_n)
        std::memcpy(out.h_n + state, p.steps == 0 ? p.h_0 + state : out.output + (t * N + n) * D * H + d * H,
                    bytes);
      if (p.steps == 0)
        std::memcpy(out.c_n + state, p.c_0 + state, bytes);
      else if (out.reserve)
        std::memcpy(out.c_n + state, out.reserve + ((d * p.steps + t) * N + n) * 5 * H + 4 * H, bytes);
    }
  }
}

}  // namespace cnnrnn
