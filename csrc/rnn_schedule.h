// How the recurrent host code spreads work over torch's threads: independent tasks, and steps that must
// follow one another without a fork and join for each.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cnnrnn {

// Below this many multiply-adds a thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 17;

inline int64_t threads_for(double multiply_adds, int64_t tasks) {
  const int64_t most = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  if (multiply_adds < static_cast<double>(most) * kWorkPerThread)
    return std::max<int64_t>(1, std::min(most, static_cast<int64_t>(multiply_adds / kWorkPerThread)));
  return std::max<int64_t>(1, most);
}

// Calls f(worker) for each of `workers`, in parallel; torch may give several to one thread.
template <typename F>
void for_workers(int64_t workers, const F& f) {
  if (workers == 1) return f(int64_t{0});
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) f(worker);
  });
}

// The share of `worker` in `tasks` tasks.
struct Share {
  int64_t first, last;
  Share(int64_t tasks, int64_t worker, int64_t workers)
      : first(tasks * worker / workers), last(tasks * (worker + 1) / workers) {}
};

// Runs f(step, member) for every member of every step; a step begins when all of the one before has ended.
//
// Each thread serves the members torch gave it, so that their data stays in its cache. What nobody has
// begun after a short spin may be taken by any thread that waits: if torch runs the members one after the
// other on a single thread, or a thread starts late, the work is done all the same and nothing can
// deadlock. Which thread runs a member does not change what it computes.
class Lockstep {
 public:
  template <typename F>
  static void run(int64_t steps, int64_t members, const F& f) {
    if (members == 1) {
      for (int64_t step = 0; step < steps; ++step) f(step, int64_t{0});
      return;
    }
    Lockstep state(members);
    torch::stable::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
      for (int64_t step = 0; step < steps; ++step) {
        for (int64_t m = begin; m < end; ++m) state.serve(step, m, f);
        state.wait(step, f);
      }
    });
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> value{0};
  };

  explicit Lockstep(int64_t members) : members_(members), begun_(new Counter[members]) {}

  template <typename F>
  void serve(int64_t step, int64_t member, const F& f) {
    int64_t expected = step;
    if (!begun_[member].value.compare_exchange_strong(expected, step + 1, std::memory_order_acq_rel)) return;
    f(step, member);
    ended_.value.fetch_add(1, std::memory_order_release);
  }

  template <typename F>
  void wait(int64_t step, const F& f) {
    constexpr int kSpins = 4096;  // some ten microseconds; a virtual core may be away for longer
    const int64_t goal = (step + 1) * members_;
    for (int spin = 0; ended_.value.load(std::memory_order_acquire) < goal; ++spin) {
      if (spin < kSpins) {
        pause();
        continue;
      }
      for (int64_t m = 0; m < members_; ++m) serve(step, m, f);
      std::this_thread::yield();
    }
  }

  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  const int64_t members_;
  std::unique_ptr<Counter[]> begun_;  // per member: how many steps were begun
  Counter ended_;                     // over all members: how many (step, member) have ended
};

}  // namespace cnnrnn
