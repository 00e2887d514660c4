// conv_pool gradient of the weights on tensor cores for any convolution, TF32 too: over a slice of the map's
// positions, the products of the map's gradient, made in shared memory from (grad, code), and the pixels
// that each element of the kernel pairs it with, gathered beside it.
//
// A block owns 64 outputs x 512 columns of one slice; a column is an element of the kernel, a warp has every
// eighth pair of tiles of 8. Both operands stand by positions, so 16-bit types are read transposed, from rows
// whose units are permuted; TF32 is read word by word from rows that are 32 bytes longer.
#pragma once

#include "conv_pool_tensor_gather.cuh"
#include "conv_pool_tensor_grad_weight.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kColumns = 512, kPairsOfWarp = kColumns / 16 / kTensorWarps;

template <typename T>
struct GatheredStage {
  static constexpr bool kWords = sizeof(T) == 4;
  static constexpr int kOfUnit = kUnitBytes / sizeof(T);
  static constexpr int kPositions = 128 / sizeof(T), kSteps = 4;  // of kPositions / 4
  static constexpr int kPadding = kWords ? 32 : 0;                // bytes of a row
  static constexpr int kGradientRow = kGradChannels * sizeof(T) + kPadding;
  static constexpr int kGradientBytes = kPositions * kGradientRow;
  static constexpr int kMostPixelBytes = kPositions * (kColumns * static_cast<int>(sizeof(T)) + kPadding);
  // Where a unit of a position stands, in rows of so many bytes.
  static __device__ __forceinline__ int offset(int position, int unit, int row_bytes) {
    return position * row_bytes + (kWords ? unit : unit ^ position % 8) * kUnitBytes;
  }
};

// How the columns of a group are laid out: by elements (c, ky, kx), or by taps of whole units of channels.
template <typename T>
struct ColumnOrder {
  bool by_elements;
  int channels, taps, units_of_tap;  // of a group
  __host__ __device__ __forceinline__ int units() const {
    constexpr int kOfUnit = GatheredStage<T>::kOfUnit;
    return by_elements ? ceil_div(channels * taps, kOfUnit) : taps * units_of_tap;
  }
  // The element of a column; none (-1) where there is padding.
  __device__ __forceinline__ int element(int column) const {
    if (by_elements) return column < channels * taps ? column : -1;
    const int of_tap = units_of_tap * GatheredStage<T>::kOfUnit, c = column % of_tap, tap = column / of_tap;
    return tap < taps && c < channels ? c * taps + tap : -1;
  }
};

// A position of the map.
struct Position {
  int64_t n;
  int y, x;
};
__device__ __forceinline__ Position position_at(const ConvPoolShape& s, int64_t index) {
  const int64_t row = index / s.conv.w;
  return {row / s.conv.h, static_cast<int>(row % s.conv.h), static_cast<int>(index % s.conv.w)};
}
__device__ __forceinline__ void advance(const ConvPoolShape& s, Position& place, int by) {
  place.x += by;
  for (; place.x >= s.conv.w; place.x -= s.conv.w)
    if (++place.y == s.conv.h) place.y = 0, ++place.n;
}

// An element of the kernel, and where its pixel stands relative to that of the kernel's corner at (0, 0).
struct Reach {
  int c, tap, down, across;  // c < 0: none
};
__device__ __forceinline__ Reach reach_of(const ConvPoolShape& s, int c, int tap) {
  return {c, tap, tap / s.kernel.w * s.dilation.h - s.padding.h,
          tap % s.kernel.w * s.dilation.w - s.padding.w};
}

// Units of columns [first_unit, first_unit + units) of the next positions, rows of units_of_row. A thread
// makes one unit, of every (threads of a row)-th position, of which `next` is the first.
template <typename T>
__device__ __forceinline__ void gather_columns(unsigned char* to, const ConvPoolShape& s, const Map& x,
                                               int first_channel, const ColumnOrder<T>& order, int first_unit,
                                               int units, int units_of_row, Position& next) {
  using Stage = GatheredStage<T>;
  constexpr int kOfUnit = Stage::kOfUnit;
  const int unit = threadIdx.x % units_of_row, by = kTensorThreads / units_of_row;
  const int row_bytes = units_of_row * kUnitBytes + Stage::kPadding;
  const T* const image = at<const T>(x, 0, 0, 0, 0);
  Reach reach[kOfUnit];  // by elements; else the first is of them all
#pragma unroll
  for (int i = 0; i < kOfUnit; ++i) {
    if (i > 0 && !order.by_elements) break;
    const int element = order.element((first_unit + unit) * kOfUnit + i);
    if (element < 0 || unit >= units) {
      reach[i] = {-1, 0, 0, 0};
    } else if (i == 0) {
      reach[i] = reach_of(s, element / order.taps, element % order.taps);
    } else {  // the one after the last
      const Reach& last = reach[i - 1];
      const bool new_channel = last.tap + 1 == order.taps;
      const bool new_row = last.across + s.padding.w == (s.kernel.w - 1) * s.dilation.w;
      reach[i] = {last.c + new_channel, new_channel ? 0 : last.tap + 1,
                  new_channel ? -s.padding.h
                  : new_row   ? last.down + s.dilation.h
                              : last.down,
                  new_row ? -s.padding.w : last.across + s.dilation.w};
    }
  }
  for (int row = threadIdx.x / units_of_row; row < Stage::kPositions; row += by, advance(s, next, by)) {
    if (unit >= units) continue;
    unsigned char* const place = to + Stage::offset(row, unit, row_bytes);
    const auto pixel = [&](const Reach& r) {
      const int h = next.y * s.stride.h + r.down, w = next.x * s.stride.w + r.across;
      const bool inside = r.c >= 0 && next.n < s.n && h >= 0 && h < s.in.h && w >= 0 && w < s.in.w;
      return inside ? at<const T>(x, next.n, first_channel + r.c, h, w) : nullptr;
    };
    if (!order.by_elements) {
      const T* from = pixel(reach[0]);
      async_copy(place, from ? from : image, from != nullptr);
      continue;
    }
    Pack<T, kOfUnit> made;
#pragma unroll
    for (int i = 0; i < kOfUnit; ++i) {
      const T* from = pixel(reach[i]);
      made.v[i] = from ? *from : narrow_to<T>(0.0f);
    }
    *pack_at<Pack<T, kOfUnit>>(reinterpret_cast<T*>(place)) = made;
  }
}

// The map's gradient of positions from `index` on, 64 channels of a group from k on.
template <typename T>
__device__ __forceinline__ void gather_gradient(unsigned char* to, const ConvPoolShape& s,
                                                const MapGradient<T>& map, int group, int k, int64_t index) {
  using Stage = GatheredStage<T>;
  constexpr int kUnitsOfRow = kGradChannels / Stage::kOfUnit;
  for (int i = threadIdx.x; i < Stage::kPositions * kUnitsOfRow; i += kTensorThreads) {
    const int unit = i % kUnitsOfRow, row = i / kUnitsOfRow;
    const Position here = position_at(s, index + row);
    const auto made = map.unit(here.n < s.n ? here.n : -1, k + unit * Stage::kOfUnit, group, here.y, here.x);
    *pack_at<Pack<T, Stage::kOfUnit>>(
        reinterpret_cast<T*>(to + Stage::offset(row, unit, Stage::kGradientRow))) = made;
  }
}

// Fragments of A: 64 outputs, and of B: two tiles of columns from unit or word 16 * pair on; positions of one
// step.
template <typename T>
__device__ __forceinline__ void load_gathered(uint32_t (&a)[4][4], const unsigned char* gradient, int step) {
  using Stage = GatheredStage<T>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    if constexpr (!Stage::kWords)
      load_matrices_transposed(a[m], gradient + Stage::offset(16 * step + lane % 8 + lane / 16 * 8,
                                                              2 * m + lane / 8 % 2, Stage::kGradientRow));
    if constexpr (Stage::kWords)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const auto* row =
            reinterpret_cast<const float*>(gradient + (8 * step + t + r / 2 * 4) * Stage::kGradientRow);
        a[m][r] = to_tf32(row[16 * m + g + r % 2 * 8]);
      }
  }
}
template <typename T>
__device__ __forceinline__ void load_columns(uint32_t (&b)[4], const unsigned char* pixels, int step,
                                             int pair, int row_bytes) {
  using Stage = GatheredStage<T>;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (!Stage::kWords)
    load_matrices_transposed(b,
                             pixels + Stage::offset(16 * step + lane % 16, 2 * pair + lane / 16, row_bytes));
  if constexpr (Stage::kWords)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const auto* row = reinterpret_cast<const float*>(pixels + (8 * step + t + r % 2 * 4) * row_bytes);
      b[r] = to_tf32(row[16 * pair + r / 2 * 8 + g]);
    }
}

// The sum of 1/kBiasParts of a stage's gradient of one output.
template <typename T>
__device__ __forceinline__ float gathered_bias_part(const unsigned char* gradient, int k, int part) {
  using Stage = GatheredStage<T>;
  float sum = 0;
  for (int i = part; i < Stage::kPositions; i += kBiasParts)
    sum += widen(reinterpret_cast<const T*>(
        gradient + Stage::offset(i, k / Stage::kOfUnit, Stage::kGradientRow))[k % Stage::kOfUnit]);
  return sum;
}

// Adds the products of one stage. tiles: of columns.
template <typename T>
__device__ __forceinline__ void multiply_gathered(float (&sum)[kPairsOfWarp][2][4][4],
                                                  const unsigned char* gradient, const unsigned char* pixels,
                                                  int tiles, int row_bytes) {
  using Element = typename MmaElement<T>::type;
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int step = 0; step < GatheredStage<T>::kSteps; ++step) {
    uint32_t a[4][4];
    load_gathered<T>(a, gradient, step);
#pragma unroll
    for (int i = 0; i < kPairsOfWarp; ++i) {
      const int pair = i * kTensorWarps + warp;
      if (2 * pair >= tiles) break;
      uint32_t b[4];
      load_columns<T>(b, pixels, step, pair, row_bytes);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        mma<Element>(sum[i][0][m], a[m][0], a[m][1], a[m][2], a[m][3], b[0], b[1]);
        mma<Element>(sum[i][1][m], a[m][0], a[m][1], a[m][2], a[m][3], b[2], b[3]);
      }
    }
  }
}

// How the work is cut up: slices of the positions, each some stages long.
struct GatheredSlices {
  int slices;
  int64_t stages;  // of a slice
};

template <typename T>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_gather_grad_weight(ConvPoolShape s, MapGradient<T> map, int of_group_k, Map x, int of_group_c,
                              ColumnOrder<T> order, int units_of_row, GatheredSlices slices,
                              float* partial /* [slices][k][elements + 1] */) {
  using Stage = GatheredStage<T>;
  auto* shared = shared_memory<unsigned char>();  // two stages
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int outputs = s.k / s.groups, tiles_k = ceil_div(outputs, kGradChannels);
  const int group = blockIdx.x / tiles_k, k_begin = static_cast<int>(blockIdx.x) % tiles_k * kGradChannels;
  const int first_unit = blockIdx.y * (kColumns / Stage::kOfUnit);
  const int units = min(order.units() - first_unit, kColumns / Stage::kOfUnit);
  const int tiles = ceil_div(units * Stage::kOfUnit, 8),
            row_bytes = units_of_row * kUnitBytes + Stage::kPadding;
  const int stage_bytes = Stage::kGradientBytes + Stage::kPositions * row_bytes;
  const int64_t all = ceil_div(int64_t(s.n) * s.conv.h * s.conv.w, int64_t(Stage::kPositions));
  const int64_t begin = blockIdx.z * slices.stages, end = min(begin + slices.stages, all);

  // Units that no column has are multiplied too: of an odd last tile, and of the last row of units.
  for (int i = tid; i < 2 * Stage::kPositions * units_of_row; i += kTensorThreads) {
    const int unit = i % units_of_row, row = i / units_of_row % Stage::kPositions;
    unsigned char* stage =
        shared + i / units_of_row / Stage::kPositions * stage_bytes + Stage::kGradientBytes;
    if (unit < units) continue;
    Pack<uint32_t, 4> zeros{};
    *pack_at<Pack<uint32_t, 4>>(reinterpret_cast<uint32_t*>(stage + Stage::offset(row, unit, row_bytes))) =
        zeros;
  }

  Position next = position_at(s, begin * Stage::kPositions + tid / units_of_row);
  const auto make_stage = [&](int64_t index) {
    unsigned char* stage = shared + index % 2 * stage_bytes;
    gather_columns<T>(stage + Stage::kGradientBytes, s, x, group * of_group_c, order, first_unit, units,
                      units_of_row, next);
    async_commit();
    gather_gradient<T>(stage, s, map, group * of_group_k, k_begin, index * Stage::kPositions);
  };

  float sum[kPairsOfWarp][2][4][4];  // [pair of tiles][tile][outputs by 16][register]
#pragma unroll
  for (int i = 0; i < kPairsOfWarp * 32; ++i) sum[i / 32][i / 16 % 2][i / 4 % 4][i % 4] = 0.0f;
  float bias_sum = 0;
  if (begin < end) make_stage(begin);
  for (int64_t index = begin; index < end; ++index) {
    async_wait<0>();
    block_barrier();  // this stage has been made, and the one before has been read
    if (index + 1 < end) make_stage(index + 1);
    const unsigned char* gradient = shared + index % 2 * stage_bytes;
    if (first_unit == 0)
      bias_sum += gathered_bias_part<T>(gradient, tid % kGradChannels, tid / kGradChannels);
    multiply_gathered<T>(sum, gradient, gradient + Stage::kGradientBytes, tiles, row_bytes);
  }

  const int elements = order.channels * order.taps;
  partial += (int64_t(blockIdx.z) * s.k + group * outputs) * (elements + 1);
  const int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kPairsOfWarp * 32; ++i) {
    const int pair = i / 32 * kTensorWarps + warp, r = i % 4, k = k_begin + i / 4 % 4 * 16 + g + r / 2 * 8;
    const int column = 16 * pair + i / 16 % 2 * 8 + 2 * t + r % 2;
    const int element = order.element(first_unit * Stage::kOfUnit + column);
    if (k < outputs && element >= 0)
      partial[int64_t(k) * (elements + 1) + element] = sum[i / 32][i / 16 % 2][i / 4 % 4][r];
  }
  if (first_unit != 0) return;
  block_barrier();  // the last stage has been read
  const float all_parts = sum_of_parts(shared_memory<float>(), bias_sum);
  if (tid < kGradChannels && k_begin + tid < outputs)
    partial[int64_t(k_begin + tid) * (elements + 1) + elements] = all_parts;
}

}  // namespace
}  // namespace cnnrnn::cuda
