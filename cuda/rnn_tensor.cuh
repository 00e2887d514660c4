// A recurrent layer on tensor cores: one launch runs all time steps. A group of blocks owns a tile of 16
// batch rows; each of them owns some of the hidden units, whose recurrent weights stay in its registers and
// shared memory, and hands what a step makes to the others:
//
//   group of            what the blocks tell each other goes through
//   1 block             shared memory and the block's barrier
//   a cluster           the others' shared memory, by pushes that their barriers count (sm_90)
//   blocks of the grid  global memory and a flag, in a cooperative launch
//
// Units come by 8, as columns of a 16 x 8 product, and each block has a balanced share of them. Two warps
// share 8 units in all their gates: each sums half of the reduction, then they exchange half of their sums,
// and each goes on with 8 of the 16 rows. A lane has two neighbouring units of one row.
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
template <typename E>
using StoredAs = typename Stored<E>::type;

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

// Where a lane stands.
struct TensorPlace {
  int lane, g, q, warp, pair, half;
  int block, tile, direction, group;  // group: of all groups of the grid
  int first;                          // unit of the pair; beyond the layer if the block has fewer
  int unit, local_row, row;           // of the lane's two units the first, and its row
  bool has_units;
  __device__ TensorPlace(const RnnShape& s, const UnitCut& cut) {
    lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    warp = threadIdx.x / 32, pair = warp / 2, half = warp % 2;
    block = static_cast<int>(blockIdx.x) % cut.blocks, tile = static_cast<int>(blockIdx.x) / cut.blocks;
    direction = blockIdx.y;
    group = direction * (static_cast<int>(gridDim.x) / cut.blocks) + tile;
    has_units = pair < cut.count(block);
    first = (cut.first(block) + pair) * kGroupUnits;
    unit = first + 2 * q;
    local_row = g + 8 * half;
    row = tile * kTileRows + local_row;
  }
  // Whether unit `unit + u` of the lane's row exists.
  __device__ bool owns(const RnnShape& s, int u) const {
    return has_units && unit + u < s.hidden && row < s.batch;
  }
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
#pragma unroll
    for (int slice = 0; slice < kKept; ++slice)
      if (slice < count)
        multiply_slice<E, kTiles>(acc, rows, stride, slice, g, q, tiles,
                                  [&](int i) { return kept[slice][i]; });
    for (int slice = kKept; slice < count; ++slice)
      multiply_slice<E, kTiles>(acc, rows, stride, slice, g, q, tiles, [&](int i) {
        return *pack_at<const Words4>(&rest[((slice - kKept) * kTiles + i) * 32]);
      });
  }
};

// What a group's blocks hand each other in global memory, and the counter of those that have; grid only.
struct GridExchange {
  unsigned char* data;  // two buffers, and in each one part per group
  unsigned* arrived;    // per group
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
