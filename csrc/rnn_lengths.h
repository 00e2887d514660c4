// Padded sequences of several lengths as packed ones: sorted, the longest first, without their padding.
#pragma once

#include <algorithm>
#include <cstring>
#include <numeric>

#include "rnn_layout.h"
#include "rnn_schedule.h"
#include "tensor.h"

namespace cnnrnn {

class Lengths {
 public:
  // lengths [N]: 0 to steps each.
  Lengths(const int64_t* lengths, int64_t batch, int64_t steps) : steps_(steps), order_(batch) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
    std::vector<int64_t> sizes(batch > 0 ? lengths[order_[0]] : 0);
    for (int64_t n = 0; n < batch; ++n)
      for (int64_t t = 0; t < lengths[n]; ++t) ++sizes[t];
    layout_ = Layout(std::move(sizes), batch);
  }

  const Layout& layout() const { return layout_; }

  // [T, N, ...] to [R, ...]
  Tensor pack(const Tensor& padded) const {
    std::vector<int64_t> sizes = {layout_.rows};
    for (int64_t d = 2; d < padded.dim(); ++d) sizes.push_back(padded.size(d));
    const Tensor packed = new_dense(padded, sizes);
    for_rows(row_bytes(padded, steps_ * batch()), padded, packed,
             [](char* wide, char* dense, size_t bytes) { std::memcpy(dense, wide, bytes); });
    return packed;
  }

  // [R, W] to [T, N, W], padded with zeros
  Tensor unpack(const Tensor& packed) const {
    const Tensor padded = new_dense(packed, {steps_, batch(), packed.size(1)});
    std::memset(padded.mutable_data_ptr(), 0, static_cast<size_t>(padded.numel()) * padded.element_size());
    for_rows(row_bytes(packed, layout_.rows), padded, packed,
             [](char* wide, char* dense, size_t bytes) { std::memcpy(wide, dense, bytes); });
    return padded;
  }

  // Rows of a state [D, N, H] in the packed order, or back in the user's.
  Tensor sorted(const Tensor& state) const { return permuted(state, true); }
  Tensor restored(const Tensor& state) const { return permuted(state, false); }

 private:
  int64_t batch() const { return static_cast<int64_t>(order_.size()); }

  static size_t row_bytes(const Tensor& t, int64_t rows) {
    return rows == 0 ? 0 : static_cast<size_t>(t.numel() / rows) * t.element_size();
  }

  template <typename F>
  void for_rows(size_t bytes, const Tensor& padded, const Tensor& packed, const F& f) const {
    char* wide = static_cast<char*>(padded.mutable_data_ptr());
    char* dense = static_cast<char*>(packed.mutable_data_ptr());
    const int64_t workers =
        threads_for(static_cast<double>(bytes) * static_cast<double>(layout_.rows), layout_.steps);
    for_workers(workers, [&](int64_t worker) {
      const Share share(layout_.steps, worker, workers);
      for (int64_t t = share.first; t < share.last; ++t)
        for (int64_t n = 0; n < layout_.size(t); ++n)
          f(wide + (t * batch() + order_[n]) * bytes, dense + (layout_.offset(t) + n) * bytes, bytes);
    });
  }

  Tensor permuted(const Tensor& state, bool sort) const {
    const Tensor moved = torch::stable::empty_like(state);
    const int64_t hidden = state.size(2);
    const size_t bytes = static_cast<size_t>(hidden) * state.element_size();
    const char* from = static_cast<const char*>(state.const_data_ptr());
    char* to = static_cast<char*>(moved.mutable_data_ptr());
    for (int64_t d = 0; d < state.size(0); ++d)
      for (int64_t n = 0; n < batch() && bytes > 0; ++n) {
        const size_t here = (d * batch() + n) * bytes, there = (d * batch() + order_[n]) * bytes;
        std::memcpy(to + (sort ? here : there), from + (sort ? there : here), bytes);
      }
    return moved;
  }

  int64_t steps_;
  std::vector<int64_t> order_;  // the user's row of each packed one
  Layout layout_{0, 0};
};

}  // namespace cnnrnn
