// What the forward and backward runs of a recurrent layer share: the problem on raw pointers, scratch memory,
// how a scan is cut into work for threads.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/capability.h"
#include "cpu/rnn.h"
#include "rnn_layout.h"
#include "rnn_schedule.h"

namespace cnnrnn {

enum class Weights { kElement, kBf16, kInt8 };

// Shapes as in operators.schema, rows as `layout` says; all contiguous. Direction 1 runs backward in time.
template <typename T>
struct RnnProblem {
  const Layout& layout;
  int64_t input, hidden, directions;
  const T *x, *h_0, *c_0;  // states may be null: zeros
  const void *weight_ih[2], *weight_hh[2];
  Weights weights;
  const T *scale_ih[2], *scale_hh[2];  // null but for int8
  const T *bias_ih[2], *bias_hh[2];    // may be null
  const uint8_t* reset = nullptr;      // [rows], or null
  const Bf16* x_bf16 = nullptr;        // x in its place: products in bfloat16 will do

  int64_t state_offset(int64_t d) const { return d * layout.batch * hidden; }
  double scan_work(int64_t gates) const { return 1.0 * gates * directions * layout.rows * hidden * hidden; }
  double input_work(int64_t gates) const { return 1.0 * gates * directions * layout.rows * hidden * input; }

  // The rows of `states` (laid out as the output) and `initial` from which `step` of direction d starts,
  // beginning at `row`.
  StateRows<T> before(const T* states, int64_t states_stride, const T* initial, const T* zeros, int64_t d,
                      int64_t step, int64_t row) const {
    const int64_t t = layout.time(d, step);
    StateRows<T> s{};
    if (step > 0) {
      const int64_t earlier = layout.time(d, step - 1);
      s.carried = std::min(layout.size(earlier), layout.size(t)) - row;
      s.before = states + (layout.offset(earlier) + row) * states_stride + d * hidden;
      s.before_stride = states_stride;
    }
    s.initial = initial ? initial + state_offset(d) + row * hidden : zeros;
    s.initial_stride = initial ? hidden : 0;
    s.zeros = zeros;
    resets(d, t, row, s.reset, s.flagged);
    return s;
  }

  // The flags that cut the state on its way into step t of direction d.
  void resets(int64_t d, int64_t t, int64_t row, const uint8_t*& flags, int64_t& count) const {
    const int64_t border = d == 0 ? t : t + 1;  // a flag stands at the later of the two times it parts
    if (!reset || border >= layout.steps) return;
    flags = reset + layout.offset(border) + row;
    count = layout.size(border) - row;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline const RnnTable& rnn_kernels() { return CNNRNN_ACTIVE_TABLE(rnn); }

template <typename T>
const RnnKernels<T>& rnn_kernels_of() {
  if constexpr (sizeof(T) == sizeof(float))
    return rnn_kernels().f32;
  else
    return rnn_kernels().f64;
}

// The kernels for products of `rows` rows at a time with packed weights: on tile registers where the machine
// has them and the rows fill tiles of 16 well enough. Ill filled they cost as much as full ones; in bfloat16
// few rows pay.
template <typename T>
const RnnKernels<T>& packed_kernels_for(int64_t rows, bool half) {
  constexpr int64_t kLeast = 12, kLeastHalf = 4, kTile = 16;
  if constexpr (sizeof(T) == sizeof(float)) {
#if defined(__x86_64__)
    const bool filled = rows >= kLeast && 4 * rows >= 3 * ceil_div(rows, kTile) * kTile;
    if (active_isa() == Isa::kAmx && half && rows >= kLeastHalf) return rnn_amx_bfloat16;
    if (active_isa() == Isa::kAmx && !half && filled) return rnn_amx_float32;
#endif
  }
  return rnn_kernels_of<T>();
}

// The kernels on tile registers for `rows` rows in all beside weights as they come, or null where others are
// faster.
template <typename T>
const CellKernels<T>* turned_kernels_for(int64_t rows, Cell cell) {
  constexpr int64_t kLeast = 28, kMost = 255;
  if constexpr (sizeof(T) == sizeof(float)) {
#if defined(__x86_64__)
    if (active_isa() == Isa::kAmx && rows >= kLeast && rows <= kMost) return &rnn_amx_turned[cell];
#endif
  }
  return nullptr;
}

template <typename T>
struct RnnOutputs {
  T *output, *h_n, *c_n;  // h_n and c_n may be null where output and cells say the same (one step)
  T *cells, *reserve;     // null in inference, or where the cell has none
};

template <typename T>
struct RnnGradientsIn {
  const T *output, *h_n, *c_n, *cells;  // each may be null
};

template <typename T>
struct RnnGradientsOut {
  T* x;          // null if not wanted
  T *h_0, *c_0;  // h_0 always; c_0 if the cell has one: the scan keeps running gradients there
  bool want_h_0;
  T *weight_ih[2], *weight_hh[2], *bias_ih[2], *bias_hh[2];  // null if not wanted
};

// Memory of a call, kept for the next one on the same thread unless it is large: page faults on fresh
// memory would cost more than some of the kernels.
class Scratch {
 public:
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 127) / 64 * 64;
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
  template <typename T>
  T* take_zeros(int64_t count) {
    T* memory = take<T>(count);
    std::memset(memory, 0, static_cast<size_t>(count) * sizeof(T));
    return memory;
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

  // f(member, step, direction, first row, last row, worker of workers that share these rows, directions they
  // share)
  template <typename F>
  void run(int64_t steps, int64_t directions, const Layout& layout, const F& f) const {
    if (!independent) {
      Lockstep::run(steps, members, [&](int64_t step, int64_t member) {
        // Work is numbered through both directions; each gets the part of the share that falls into it.
        for (int64_t d = 0; d < directions; ++d)
          f(member, step, d, int64_t{0}, layout.batch, member, members, directions);
      });
      return;
    }
    for_workers(members, [&](int64_t member) {
      const int64_t part = member % row_parts, first = layout.cut(part, row_parts);
      const int64_t last = layout.cut(part + 1, row_parts);
      const int64_t d_first = direction_parts == 2 ? member / row_parts : 0;
      const int64_t d_last = direction_parts == 2 ? d_first + 1 : directions;
      for (int64_t d = d_first; d < d_last; ++d)
        for (int64_t step = 0; step < steps; ++step)
          f(member, step, d, first, last, int64_t{0}, int64_t{1}, int64_t{1});
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

}  // namespace cnnrnn
