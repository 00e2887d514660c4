// The tensor-core core of conv_pool for any kernel, stride, dilation, padding, pool and number of groups:
// implicit GEMM whose rows are gathered one tap (or a few elements of the kernel) at a time.
//
// A block makes 128 2x2 blocks of outputs in 8 * kTiles channels, like conv_pool_tensor.cuh: four tiles of
// rows share every weight operand. Depth comes in pieces of 64 bytes, of which a Source writes
//   rows     [position of the 2x2 block][128 blocks][4 units of 16 bytes], units permuted within 128 bytes so
//            that 8 neighbouring rows have the same unit in different banks
// into a ring of stages, beside the piece's weights. Shared memory does not depend on the convolution.
//
// Windows that make up the 2x2 blocks are pooled in registers. Any other pool reads the finished outputs of
// a rectangle from shared memory; rectangles overlap by what their windows need.
#pragma once

#include "conv_pool_tensor_forward.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kGatherRows = 4 * kTileBlocks, kGatherBytes = kGatherRows * kChunkBytes;
constexpr int kGatherStages = 3;
template <int kTiles>
constexpr int kGatherStageBytes = kGatherBytes + kTapBytes<kTiles>;

__device__ __forceinline__ int gathered_offset(int row, int unit) {
  const int pair = row / 2;
  return pair * 2 * kChunkBytes + ((row % 2 * kUnits + unit) ^ (pair % kUnits)) * kUnitBytes;
}

// ---- which outputs a tile has ----
// Runs of 2x2 blocks over all images, or rectangles of an image.
struct GatherTiles {
  int wide;       // blocks of a rectangle across; 0: runs
  Size2 windows;  // of a rectangle
  Size2 count;    // rectangles of an image
  int64_t all;
};

inline GatherTiles runs_of_blocks(const ConvPoolShape& s) {
  const Size2 blocks = blocks_of(s);
  return {0, {}, {}, ceil_div(int64_t(s.n) * blocks.h * blocks.w, int64_t(kTileBlocks))};
}

inline Size2 outputs_of_rectangle(int wide) { return {2 * kTileBlocks / wide, 2 * wide}; }

// Rectangles `wide` blocks across; none (all = 0) if a window does not fit.
inline GatherTiles rectangles(const ConvPoolShape& s, int wide) {
  const Size2 outputs = outputs_of_rectangle(wide);
  if (outputs.h < s.pool.h || outputs.w < s.pool.w) return {wide, {}, {}, 0};
  const Size2 windows{(outputs.h - s.pool.h) / s.pool_stride.h + 1,
                      (outputs.w - s.pool.w) / s.pool_stride.w + 1};
  const Size2 count{ceil_div(s.out.h, windows.h), ceil_div(s.out.w, windows.w)};
  return {wide, windows, count, int64_t(s.n) * count.h * count.w};
}

// The fewest rectangles among those that `fits` permits; none if there are none.
template <typename Fits>
GatherTiles fewest_rectangles(const ConvPoolShape& s, const Fits& fits) {
  GatherTiles best{16, {}, {}, 0};
  for (const int wide : {16, 8, 32, 4, 64, 2, kTileBlocks, 1}) {
    const GatherTiles tiles = rectangles(s, wide);
    if (tiles.all > 0 && fits(wide) && (best.all == 0 || tiles.all < best.all)) best = tiles;
  }
  return best;
}

// First output of a rectangle.
__device__ __forceinline__ BlockPlace rectangle_at(const ConvPoolShape& s, const GatherTiles& tiles,
                                                   unsigned tile) {
  const int x = tile % tiles.count.w, y = tile / tiles.count.w % tiles.count.h;
  return {static_cast<int>(tile / tiles.count.w / tiles.count.h),
          y * tiles.windows.h * s.pool_stride.h - s.pool_padding.h,
          x * tiles.windows.w * s.pool_stride.w - s.pool_padding.w};
}

// First output of a 2x2 block of a tile.
__device__ __forceinline__ BlockPlace output_of(const ConvPoolShape& s, const GatherTiles& tiles,
                                                unsigned tile, int block) {
  if (tiles.wide > 0) {
    const BlockPlace first = rectangle_at(s, tiles, tile);
    return {first.n, first.y + block / tiles.wide * 2, first.x + block % tiles.wide * 2};
  }
  const Size2 blocks = blocks_of(s);
  const int64_t index = int64_t(tile) * kTileBlocks + block, of_image = int64_t(blocks.h) * blocks.w;
  if (index >= s.n * of_image) return {-1, 0, 0};
  const int rest = static_cast<int>(index % of_image);
  return {index / of_image, rest / blocks.w * 2, rest % blocks.w * 2};
}

// ---- sources ----
// What a thread writes of each piece: unit tid % 4 of the rows of two 2x2 blocks.
struct GatherThread {
  int unit, block[2];
  BlockPlace output[2];  // first output of each block
  Size2 local[2];        // the same in the rectangle, if there is one
};

// Calls make(row, which of the two blocks, dy, dx) for all of them, kTogether positions of a block at a time:
// what is made in flight takes registers.
template <int kTogether = 4, typename Make>
__device__ __forceinline__ void for_rows(const GatherThread& thread, const Make& make) {
#pragma unroll
  for (int which = 0; which < 2; ++which)
#pragma unroll kTogether
    for (int position = 0; position < 4; ++position)
      make(position * kTileBlocks + thread.block[which], which, position / 2, position % 2);
}

// A piece of depth: a tap, and a chunk of 64 bytes of channels.
struct Piece {
  int tap, chunk;
};

template <typename T>
__host__ __device__ __forceinline__ int chunks_of(int channels) {
  return ceil_div(channels * static_cast<int>(sizeof(T)), kChunkBytes);
}

// A Source tells
//   enter     changes the shape and the results to what this block makes of them
//   prepare   what a block keeps in shared memory beside the stages, if kReadsRectangle
//   pieces, first, next    the pieces of depth
//   packed, packed_at      how many pieces the weights of a tile have, and where this one's stand
//   fill      writes the rows of a piece

// Pixels of x whose channels come in units; those of a group begin `of_group` after those of the one before.
template <typename T>
struct PixelUnits {
  static constexpr bool kReadsRectangle = false;
  Map x;
  int of_group;

  static __device__ __forceinline__ void enter(ConvPoolShape&, ConvPoolResults&) {}
  static __device__ __forceinline__ int taps(const ConvPoolShape& s) { return s.kernel.h * s.kernel.w; }
  static __device__ __forceinline__ int packed(const ConvPoolShape& s) {
    return taps(s) * chunks_of<T>(s.c / s.groups);
  }
  static __device__ __forceinline__ int packed_at(const ConvPoolShape& s, const Piece& piece) {
    return piece.chunk * taps(s) + piece.tap;
  }
  static __device__ __forceinline__ int pieces(const ConvPoolShape& s) { return packed(s); }
  static __device__ __forceinline__ Piece first(const ConvPoolShape&) { return {0, 0}; }
  static __device__ __forceinline__ Piece next(const ConvPoolShape& s, const Piece& piece) {
    const bool last = piece.tap + 1 == taps(s);
    return {last ? 0 : piece.tap + 1, piece.chunk + last};
  }
  __device__ __forceinline__ void fill(unsigned char* rows, const ConvPoolShape& s, int group,
                                       const GatherThread& thread, const Piece& piece,
                                       const unsigned char*) const {
    const int c = (piece.chunk * kUnits + thread.unit) * (kUnitBytes / static_cast<int>(sizeof(T)));
    const int down = piece.tap / s.kernel.w * s.dilation.h - s.padding.h;
    const int across = piece.tap % s.kernel.w * s.dilation.w - s.padding.w;
    const T* const image = at<const T>(x, 0, 0, 0, 0);
    for_rows(thread, [&](int row, int which, int dy, int dx) {
      const BlockPlace& output = thread.output[which];
      const int h = (output.y + dy) * s.stride.h + down, w = (output.x + dx) * s.stride.w + across;
      const bool inside = output.n >= 0 && h >= 0 && h < s.in.h && w >= 0 && w < s.in.w && c < s.c / s.groups;
      async_copy(rows + gathered_offset(row, thread.unit),
                 inside ? at<const T>(x, output.n, group * of_group + c, h, w) : image, inside);
    });
  }
};

// ---- the products ----
// Adds those of one piece.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_piece(BlockSums<kTiles>& sum, const unsigned char* rows,
                                               const unsigned char* weights) {
  using Element = typename MmaElement<T>::type;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpBlocks + lane % 16;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[4][4];
#pragma unroll
    for (int position = 0; position < 4; ++position) {
      load_matrices(a[position], rows + gathered_offset(position * kTileBlocks + row, step * 2 + lane / 16));
      if constexpr (std::is_same_v<T, float>)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[position][r] = to_tf32(bits_to_float(a[position][r]));
    }
#pragma unroll
    for (int j = 0; j < kTiles; j += 2) {
      const auto b = *pack_at<const Pack<uint32_t, 4>>(
          reinterpret_cast<const uint32_t*>(weights + (step * kTiles + j) * 256 + lane * 16));
#pragma unroll
      for (int position = 0; position < 4; ++position) {
        const auto& x = a[position];
        mma<Element>(sum[position][j], x[0], x[1], x[2], x[3], b.v[0], b.v[1]);
        mma<Element>(sum[position][j + 1], x[0], x[1], x[2], x[3], b.v[2], b.v[3]);
      }
    }
  }
}

// ---- pools whose windows are no parts of 2x2 blocks ----
constexpr int kFinishedStride = kGatherRows + 5;  // odd: channels of a position are in different banks
template <int kTiles>
constexpr int kFinishedBytes = 8 * kTiles * kFinishedStride * static_cast<int>(sizeof(float));

// Bias, activation and pool by way of shared memory, finished [channel of the tile][output of the rectangle].
template <typename T, int kTiles>
__device__ void finish_rectangle(const ConvPoolShape& s, const T* bias, BlockSums<kTiles>& sum,
                                 float* finished, const GatherTiles& tiles, unsigned tile, int k_first,
                                 int k_end, const ConvPoolResults& out) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = 2 * tiles.wide;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int block = warp * kWarpBlocks + lane / 4 + 8 * half;
    float* const first = finished + lane % 4 * 2 * kTiles * kFinishedStride +
                         block / tiles.wide * 2 * across + block % tiles.wide * 2;
#pragma unroll
    for (int i = 0; i < 4 * 2 * kTiles; ++i) {
      const int position = i / (2 * kTiles), c = i % (2 * kTiles);
      first[c * kFinishedStride + position / 2 * across + position % 2] =
          sum[position][c / 2][2 * half + c % 2];
    }
  }
  block_barrier();
  const BlockPlace corner = rectangle_at(s, tiles, tile);
  const Size2 first_window{(corner.y + s.pool_padding.h) / s.pool_stride.h,
                           (corner.x + s.pool_padding.w) / s.pool_stride.w};
  const int channels = min(8 * kTiles, k_end - k_first), windows = tiles.windows.h * tiles.windows.w;
  for (int i = threadIdx.x; i < channels * windows; i += kTensorThreads) {
    // Neighbouring threads write neighbours of either layout.
    const int c = out.y.c == 1 ? i % channels : i / windows,
              window = out.y.c == 1 ? i / channels : i % windows;
    const int window_y = window / tiles.windows.w, window_x = window % tiles.windows.w;
    const int h = first_window.h + window_y, w = first_window.w + window_x;
    if (h >= s.out.h || w >= s.out.w) continue;
    const float b = bias ? widen(bias[k_first + c]) : 0.0f;
    WindowMax<float> best;
    bool any = false;
    for (int position = 0; position < s.pool.h * s.pool.w; ++position) {
      const int y = window_y * s.pool_stride.h + position / s.pool.w;
      const int x = window_x * s.pool_stride.w + position % s.pool.w;
      const int map_y = corner.y + y, map_x = corner.x + x;
      if (map_y < 0 || map_y >= s.conv.h || map_x < 0 || map_x >= s.conv.w) continue;
      const float value = finished[c * kFinishedStride + y * across + x] + b;
      const float key = has_keys(s.activation) ? activate(s.activation, value) : value;
      if (any) {
        best.add(key, value, position);
      } else {
        best.start(key, value, position);
      }
      any = true;
    }
    best.finish(s.activation == Activation::kRelu);
    best.store<T>(out, corner.n, k_first + c, h, w);
  }
}

// ---- kernel ----
template <typename T, int kTiles, typename Source>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_gather(ConvPoolShape s, Source source, GatherTiles tiles, bool in_blocks,
                  const unsigned char* packed, const T* bias, ConvPoolResults out) {
  auto* shared = shared_memory<unsigned char>();  // stages, and behind them what the source keeps
  unsigned char* const kept = shared + kGatherStages * kGatherStageBytes<kTiles>;
  source.enter(s, out);
  const int tid = threadIdx.x, outputs = s.k / s.groups, tiles_k = ceil_div(outputs, 8 * kTiles);
  const int tile_k = blockIdx.x % tiles_k, group = blockIdx.x / tiles_k % s.groups;
  const unsigned tile = blockIdx.x / tiles_k / s.groups;
  const int k_end = (group + 1) * outputs, k_first = group * outputs + tile_k * 8 * kTiles;
  const int pieces = source.pieces(s), of_tile = source.packed(s);
  packed += (int64_t(group) * tiles_k + tile_k) * of_tile * kTapBytes<kTiles>;

  GatherThread thread{tid % kUnits, {tid / kUnits, tid / kUnits + kTensorThreads / kUnits}, {}, {}};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    thread.output[i] = output_of(s, tiles, tile, thread.block[i]);
    if (tiles.wide > 0)
      thread.local[i] = {thread.block[i] / tiles.wide * 2, thread.block[i] % tiles.wide * 2};
  }
  if constexpr (Source::kReadsRectangle) source.prepare(s, group, rectangle_at(s, tiles, tile), kept);

  Piece piece = source.first(s);
  const auto begin_piece = [&](int number) {
    unsigned char* stage = shared + number % kGatherStages * kGatherStageBytes<kTiles>;
    const unsigned char* weights = packed + int64_t(source.packed_at(s, piece)) * kTapBytes<kTiles>;
    for (int i = tid; i < kTapBytes<kTiles> / kUnitBytes; i += kTensorThreads)
      async_copy(stage + kGatherBytes + i * kUnitBytes, weights + i * kUnitBytes, true);
    source.fill(stage, s, group, thread, piece, kept);
    piece = source.next(s, piece);
  };

  BlockSums<kTiles> sum;
#pragma unroll
  for (int i = 0; i < 4 * kTiles * 4; ++i) sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.0f;
  for (int number = 0; number < kGatherStages - 1; ++number) {
    if (number < pieces) begin_piece(number);
    async_commit();
  }
  for (int number = 0; number < pieces; ++number) {
    async_wait<kGatherStages - 2>();
    block_barrier();  // this piece is there, and the stage of the one before has been read
    if (number + kGatherStages - 1 < pieces) begin_piece(number + kGatherStages - 1);
    async_commit();
    const unsigned char* stage = shared + number % kGatherStages * kGatherStageBytes<kTiles>;
    multiply_piece<T, kTiles>(sum, stage, stage + kGatherBytes);
  }

  auto* memory = shared_memory<float>();
  if (!in_blocks || has_keys(s.activation)) block_barrier();  // the last stage has been read
  if (!in_blocks) {
    finish_rectangle<T, kTiles>(s, bias, sum, memory, tiles, tile, k_first, k_end, out);
    return;
  }
  const auto block_of = [&](int half) {
    const BlockPlace output = output_of(s, tiles, tile, tid / 32 * kWarpBlocks + own_row(half));
    return BlockPlace{output.n, output.y / 2, output.x / 2};
  };
  finish_blocks<T, kTiles>(s, bias, sum, memory + tid, own_channels<kTiles>(k_first, k_end), block_of, out);
}

}  // namespace
}  // namespace cnnrnn::cuda
