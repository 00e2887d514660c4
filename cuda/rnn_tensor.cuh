// A recurrent layer on tensor cores: one launch runs all time steps. A group of blocks owns a tile of 16
// batch rows; each of them owns some of the hidden units, whose recurrent weights stay in its registers and
// shared memory, and hands what a step makes to the others:
//
//   group of            what the blocks tell each other goes through
//   1 block             shared memory and the block's barrier
//   a cluster           the others' shared memory, by pushes that their barriers count (sm_90)
//   blocks of the grid  global memory and a flag, in a cooperative launch
//
// Units come by 8, as columns of a 16 x 8 product, and each block has a balanced share of these eights. Two
// warps share an eight in all its gates: each sums half of the reduction, then they exchange half of their
// sums, and each goes on with 8 of the 16 rows. A lane has two neighbouring units of one row. A block on its
// own may have more eights than pairs of warps: then a pair takes up to four, one after the other.
//
// The reduction is cut into slices of 64 bytes. Its order within a slice is free as long as both operands
// have the same one: lane q of four takes the q-th 16 bytes of a row, the registers of two products, in one
// load.
#pragma once

#include "primitives_async.cuh"
#include "primitives_mma.cuh"
#include "rnn_common.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kTileRows = 16, kGroupUnits = 8;
constexpr int kWordBytes = 16;  // of a lane in a slice
constexpr int kSliceBytes = 4 * kWordBytes;

// What is stored for an element of the product.
template <typename E>
struct Stored {
  using type = E;
};
template <>
struct Stored<Tf32> {
  using type = float;
};
// Of floats whose products are made as exactly as floats have them, in three products of TF32.
struct WholeFloat {};
template <>
struct Stored<WholeFloat> {
  using type = float;
};
template <typename E>
using StoredAs = typename Stored<E>::type;
template <typename E>
constexpr bool kIsWhole = std::is_same_v<E, WholeFloat>;

template <typename E>
constexpr int kSliceUnits = kSliceBytes / sizeof(StoredAs<E>);
template <typename E>
constexpr int kWordUnits = kWordBytes / sizeof(StoredAs<E>);

template <typename E>
__device__ __forceinline__ StoredAs<E> round_to(float value) {
  if constexpr (std::is_same_v<E, Tf32>) {
    return bits_as<float>(to_tf32(value));
  } else {
    return narrow_to<StoredAs<E>>(value);
  }
}

// How the units of a layer are cut: `total` eights among `blocks` blocks, none of which goes empty.
struct UnitCut {
  int blocks, total;
  __host__ __device__ int most() const { return ceil_div(total, blocks); }  // of a block
  __host__ __device__ int first(int block) const { return block * (total / blocks) + min_of(block, extra()); }
  __host__ __device__ int count(int block) const { return total / blocks + (block < extra()); }
  __host__ __device__ int owner(int eight) const {
    const int less = total / blocks, of_larger = extra() * (less + 1);
    return eight < of_larger ? eight / (less + 1) : extra() + (eight - of_larger) / less;
  }
  __host__ __device__ int extra() const { return total % blocks; }
  static __host__ __device__ int min_of(int a, int b) { return a < b ? a : b; }
};

// Bytes from row to row of a shared operand of so many slices: its 16-byte loads meet no bank twice.
__host__ __device__ __forceinline__ int row_bytes(int slices) { return (slices | 1) * kSliceBytes; }

// Which of the kernels a launch takes: the most warps of a block, the eights of a pair of them, and whether
// the groups are of the grid.
template <int kMostWarps, int kEightsOfPair, bool kOfGrid>
struct TensorVariant {
  static constexpr int kWarps = kMostWarps, kEights = kEightsOfPair;
  static constexpr bool kGrid = kOfGrid;
  // Warps of a block that has so many eights.
  static __host__ __device__ int warps(int eights) {
    return kEights == 1 || 2 * eights < kWarps ? 2 * eights : kWarps;
  }
};

// Where a lane stands. Of what a pair has, `e` says which: eight number e, or the lane's part of it.
struct TensorPlace {
  int lane, g, q, warp, pair, half;
  int block, tile, direction, group;  // group: of all groups of the layer
  int local_row, row;                 // of the lane's units
  // Groups follow each other in the grid: those of the first direction by their tiles, then the second's.
  __device__ TensorPlace(const RnnShape& s, const UnitCut& cut, int first_group)
      : own_(cut.count(block_of(cut))), first_(cut.first(block_of(cut))) {
    lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    warp = threadIdx.x / 32, pair = warp / 2, half = warp % 2;
    block = block_of(cut), group = first_group + static_cast<int>(blockIdx.x) / cut.blocks;
    const int tiles = ceil_div(s.batch, kTileRows);
    tile = group % tiles, direction = group / tiles;
    local_row = g + 8 * half;
    row = tile * kTileRows + local_row;
  }
  __device__ int eight(int e) const {
    return pair + e * static_cast<int>(blockDim.x / 64);
  }  // of the block's
  __device__ bool has(int e) const { return eight(e) < own_; }
  __device__ int first(int e) const { return (first_ + eight(e)) * kGroupUnits; }  // its first unit
  __device__ int unit(int e) const { return first(e) + 2 * q; }  // the first of the lane's two
  // Whether unit `unit(e) + u` of the lane's row exists.
  __device__ bool owns(const RnnShape& s, int e, int u) const {
    return has(e) && unit(e) + u < s.hidden && row < s.batch;
  }

 private:
  int own_, first_;
  static __device__ int block_of(const UnitCut& cut) { return static_cast<int>(blockIdx.x) % cut.blocks; }
};

// The steps in which some row of a tile runs.
struct TileSteps {
  int begin, count;
  __device__ TileSteps(const RnnShape& s, int tile, int direction) {
    count = 0;
    for (int n = tile * kTileRows; n < min((tile + 1) * kTileRows, s.batch); ++n)
      count = max(count, length_of(s, n));
    begin = direction == 0 ? 0 : s.steps - count;
  }
};

// acc[i] += the tile's 16 rows times weights(i) for kTiles columns of 8: a slice's two products.
template <typename E, int kTiles, typename Weights>
__device__ __forceinline__ void multiply_slice(float (&acc)[kTiles][4], const unsigned char* rows, int stride,
                                               int slice, int g, int q, int tiles, const Weights& weights) {
  const unsigned char* at = rows + g * stride + slice * kSliceBytes + q * kWordBytes;
  const Words4 low = *pack_at<const Words4>(at), high = *pack_at<const Words4>(at + 8 * stride);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= tiles) continue;
    const Words4 w = weights(i);
    mma<E>(acc[i], low.v[0], high.v[0], low.v[1], high.v[1], w.v[0], w.v[1]);
    mma<E>(acc[i], low.v[2], high.v[2], low.v[3], high.v[3], w.v[2], w.v[3]);
  }
}

// The same for floats that are no TF32 numbers.
template <int kTiles, typename Weights>
__device__ __forceinline__ void multiply_whole_slice(float (&acc)[kTiles][4], const unsigned char* rows,
                                                     int stride, int slice, int g, int q, int tiles,
                                                     const Weights& weights) {
  const unsigned char* at = rows + g * stride + slice * kSliceBytes + q * kWordBytes;
  const Words4 words[2] = {*pack_at<const Words4>(at), *pack_at<const Words4>(at + 8 * stride)};
  FloatParts a[2][4];  // of row g and of row g + 8
#pragma unroll
  for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = float_parts(words[i / 4].v[i % 4]);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= tiles) continue;
    const Words4 w = weights(i);
    // Tensor cores cut off where they add: only a few products are added there, the small ones first.
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      const FloatParts b0 = float_parts(not_ahead(w.v[k])), b1 = float_parts(not_ahead(w.v[k + 1]));
      mma<Tf32>(sum, a[0][k].low, a[1][k].low, a[0][k + 1].low, a[1][k + 1].low, b0.high, b1.high);
      mma<Tf32>(sum, a[0][k].high, a[1][k].high, a[0][k + 1].high, a[1][k + 1].high, b0.low, b1.low);
    }
#pragma unroll
    for (int k = 0; k < 4; k += 2)
      mma<Tf32>(sum, a[0][k].high, a[1][k].high, a[0][k + 1].high, a[1][k + 1].high,
                high_part(not_ahead(w.v[k])), high_part(not_ahead(w.v[k + 1])));
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[i][j] += sum[j];
  }
}

// Either, by the element.
template <typename E, int kTiles, typename Weights>
__device__ __forceinline__ void multiply_slice_of(float (&acc)[kTiles][4], const unsigned char* rows,
                                                  int stride, int slice, int g, int q, int tiles,
                                                  const Weights& weights) {
  if constexpr (kIsWhole<E>)
    multiply_whole_slice<kTiles>(acc, rows, stride, slice, g, q, tiles, weights);
  else
    multiply_slice<E, kTiles>(acc, rows, stride, slice, g, q, tiles, weights);
}

// A lane's 16 bytes of a product's operand: `stride` apart in `from`, zeros from the `there`-th on.
template <typename E>
__device__ __forceinline__ Words4 gather_word(const StoredAs<E>* from, int64_t stride, int there) {
  Pack<StoredAs<E>, kWordUnits<E>> values;
#pragma unroll
  for (int i = 0; i < kWordUnits<E>; ++i)
    values.v[i] = round_to<E>(i < there ? float(widen(from[i * stride])) : 0.0f);
  return bits_as<Words4>(values);
}

// The weights of one warp: `count` slices for kTiles columns of 8, of which `tiles` exist. The first kKept
// slices stay in registers and the others in shared memory, [slice - kKept][tile][lane].
template <typename E, int kTiles, int kKept>
struct WarpWeights {
  Words4 kept[kKept > 0 ? kKept : 1][kTiles];
  Words4* rest;
  int count, tiles;

  // word(slice, tile): a lane's 16 bytes.
  template <typename Word>
  __device__ __forceinline__ void load(Words4* shared, int slices, int existing, const Word& word) {
    rest = shared + threadIdx.x % 32, count = slices, tiles = existing;
#pragma unroll
    for (int slice = 0; slice < kKept; ++slice)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        kept[slice][tile] = slice < count && tile < tiles ? word(slice, tile) : Words4{};
#pragma unroll 1
    for (int slice = kKept; slice < count; ++slice)
#pragma unroll 1
      for (int tile = 0; tile < tiles; ++tile)
        rest[((slice - kKept) * kTiles + tile) * 32] = word(slice, tile);
  }

  // rows: the operand from the warp's first slice on.
  __device__ __forceinline__ void multiply(float (&acc)[kTiles][4], const unsigned char* rows, int stride,
                                           int g, int q) const {
    const auto add = [&](int slice, const auto& of_slice) {
      multiply_slice_of<E>(acc, rows, stride, slice, g, q, tiles, of_slice);
    };
#pragma unroll
    for (int slice = 0; slice < kKept; ++slice)
      if (slice < count) add(slice, [&](int i) { return kept[slice][i]; });
    for (int slice = kKept; slice < count; ++slice)
      add(slice, [&](int i) { return *pack_at<const Words4>(&rest[((slice - kKept) * kTiles + i) * 32]); });
  }
};

// What a group's blocks hand each other in global memory, and the counter of those that have; grid only.
struct GridExchange {
  unsigned char* data;  // two buffers, and in each one part per group
  unsigned* arrived;    // per group
  int groups;           // of the layer
};

// All blocks of a group of the grid have come here `times` times.
__device__ __forceinline__ void grid_group_barrier(unsigned* arrived, int blocks, int times) {
  block_barrier();
  if (threadIdx.x == 0) {
    signal(arrived);
    signals_wait(arrived, static_cast<unsigned>(blocks) * times);
  }
  block_barrier();
}

// Parity of the n-th hand-over (n = 1, 2, ...) at its barrier, of which there are two in turn.
__device__ __forceinline__ unsigned parity_of(int n) { return static_cast<unsigned>(n - 1) / 2 % 2; }

}  // namespace
}  // namespace cnnrnn::cuda
