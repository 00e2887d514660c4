// conv_pool with an average pool on the CPU: the convolution without a pool, then the pool over its map.
#pragma once

#include "cpu/conv_pool.h"
#include "slices.h"

namespace cnnrnn {

// The convolution alone. What only the pool applies (an activation that falls somewhere) is left to it.
inline ConvPoolShape without_pool(const ConvPoolShape& s, bool activate) {
  ConvPoolShape t = s;
  t.window = t.step = {1, 1};
  t.margin = {0, 0};
  t.pooled = t.conv;
  t.keyed = false;
  if (!activate) t.activation = kNoActivation;
  return t;
}

// y from the map, activated first by this row of the table unless that is kNoActivation.
template <typename T>
void run_average(const ConvPoolKernelsOf<T>& kernel, const ConvPoolShape& s, int activation,
                 const Tensor& map, const Tensor& y) {
  in_slices(map, kernel.average_units(s), kernel.average_scratch_bytes(s),
            [&](int64_t, int64_t begin, int64_t end, char* scratch) {
              kernel.average(s, activation, data<T>(map), mutable_data<T>(y), scratch, begin, end);
            });
}

// The gradient of the map before its activation; kept may be null where there is none.
template <typename T>
void run_spread(const ConvPoolKernelsOf<T>& kernel, const ConvPoolShape& s, int activation,
                const Tensor* kept, const Tensor& grad_y, Tensor& grad_map) {
  in_slices(grad_y, kernel.spread_units(s), 0, [&](int64_t, int64_t begin, int64_t end, char*) {
    kernel.spread(s, activation, data<T>(kept), data<T>(grad_y), mutable_data<T>(grad_map), begin, end);
  });
}

}  // namespace cnnrnn
