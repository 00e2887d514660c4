// How the rows of a batch of sequences lie, step by step: all of one length, or packed, the longest first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace cnnrnn {

class Layout {
 public:
  // `steps` steps of `batch` rows each.
  Layout(int64_t steps, int64_t batch) : steps(steps), batch(batch), rows(steps * batch) {}

  // Step t has sizes[t] rows, none more than the one before. Rows beyond the first step's never begin.
  Layout(std::vector<int64_t> sizes, int64_t batch)
      : steps(static_cast<int64_t>(sizes.size())), batch(batch), rows(0), sizes_(std::move(sizes)) {
    for (int64_t size : sizes_) offsets_.push_back(rows), rows += size;
    offsets_.push_back(rows);
  }

  int64_t size(int64_t t) const { return sizes_.empty() ? batch : sizes_[t]; }
  int64_t offset(int64_t t) const { return sizes_.empty() ? t * batch : offsets_[t]; }
  // The t-th step in the order of direction d.
  int64_t time(int64_t d, int64_t step) const { return d == 0 ? step : steps - 1 - step; }
  int64_t begun() const { return steps == 0 ? 0 : size(0); }

  // Number of steps of each row that begins.
  std::vector<int64_t> lengths() const {
    std::vector<int64_t> length(begun(), steps);
    if (sizes_.empty()) return length;
    for (int64_t n = 0, t = steps; n < begun(); ++n) {
      while (sizes_[t - 1] <= n) --t;
      length[n] = t;
    }
    return length;
  }

  // The first row of part `part` of `parts`, cut so that all have about the same number of steps.
  int64_t cut(int64_t part, int64_t parts) const {
    if (sizes_.empty()) return batch * part / parts;
    if (part == parts) return begun();
    const std::vector<int64_t> length = lengths();
    int64_t row = 0;
    for (int64_t before = 0; row < begun() && before < rows * part / parts; ++row) before += length[row];
    return row;
  }

  int64_t steps, batch, rows;

 private:
  std::vector<int64_t> sizes_, offsets_;  // empty where every step has `batch` rows
};

}  // namespace cnnrnn
