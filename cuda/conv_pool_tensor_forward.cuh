// conv_pool forward on tensor cores, many channels: see conv_pool_tensor.cuh for the tiles.
#pragma once

#include "conv_pool_tensor.cuh"

namespace cnnrnn::cuda {
namespace {

// Which tile a block of the grid makes. The channel tiles of one place are neighbours in the grid: they read
// the same pixels.
template <int kWide>
struct TilePlace {
  int64_t n;
  int tile_k, block_y, block_x;  // block_*: its first 2x2 block
  __device__ __forceinline__ TilePlace(Size2 blocks, int tiles_k) {
    const int tiles_x = ceil_div(blocks.w, Halo<kWide>::kBlocksX);
    const int tiles_y = ceil_div(blocks.h, Halo<kWide>::kBlocksY);
    tile_k = blockIdx.x % tiles_k;
    const unsigned tile = blockIdx.x / tiles_k;
    block_x = tile % tiles_x * Halo<kWide>::kBlocksX;
    block_y = tile / tiles_x % tiles_y * Halo<kWide>::kBlocksY;
    n = tile / tiles_x / tiles_y;
  }
};

// Begins to copy a chunk of the weights. `packed` is that of the tile and chunk.
template <int kTiles>
__device__ __forceinline__ void copy_weights(unsigned char* weights, const unsigned char* packed) {
#pragma unroll
  for (int i = threadIdx.x; i < kWeightBytes<kTiles> / kUnitBytes; i += kTensorThreads)
    async_copy(weights + i * kUnitBytes, packed + i * kUnitBytes, true);
}

// Begins to copy the pixels of a chunk; x has adjacent channels and starts of pixels that are multiples of 16
// bytes.
template <typename T, int kWide>
__device__ __forceinline__ void copy_pixels(unsigned char* halo, const ConvPoolShape& s, const Map& x,
                                            const TilePlace<kWide>& place, int chunk) {
  using Tile = Halo<kWide>;
  constexpr int kOfUnit = kUnitBytes / sizeof(T);
  const int in_y = 2 * place.block_y - s.padding.h, in_x = 2 * place.block_x - s.padding.w;
  const T* image = at<const T>(x, place.n, 0, 0, 0);
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kCols * kUnits; i += kTensorThreads) {
    const int unit = i % kUnits, col = i / kUnits % Tile::kCols, row = i / kUnits / Tile::kCols;
    const int h = in_y + row, w = in_x + col, c = (chunk * kUnits + unit) * kOfUnit;
    const bool inside = h >= 0 && h < s.in.h && w >= 0 && w < s.in.w && c < s.c;
    async_copy(halo + Tile::offset(row, col, unit), inside ? image + h * x.h + w * x.w + c : image, inside);
  }
}

// values[i] to channel k + i of a pixel, of those below k_end; one wide store where alignment permits.
template <typename T, int kCount>
__device__ __forceinline__ void store_channels(const Map& map, int64_t n, int k, int h, int w, int k_end,
                                               const T (&values)[kCount]) {
  constexpr int kOfPack = sizeof(T) * kCount < 16 ? kCount : 16 / sizeof(T);
  T* to = at<T>(map, n, k, h, w);
  if (map.c == 1 && (map.n | map.h | map.w | k) % kCount == 0 && k + kCount <= k_end) {
#pragma unroll
    for (int i = 0; i < kCount; i += kOfPack) {
      Pack<T, kOfPack> pack;
#pragma unroll
      for (int j = 0; j < kOfPack; ++j) pack.v[j] = values[i + j];
      *pack_at<Pack<T, kOfPack>>(to + i) = pack;
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (k + i < k_end) to[i * map.c] = values[i];
}

// A 2x2 block of outputs, of an image n; none if n < 0.
struct BlockPlace {
  int64_t n;
  int y, x;
};

// Which results are a thread's: 2 * kTiles channels from `begin` on, as far as they are below `end`.
struct OwnChannels {
  int begin, end;
};
template <int kTiles>
__device__ __forceinline__ OwnChannels own_channels(int k_first, int k_end) {
  return {k_first + static_cast<int>(threadIdx.x) % 4 * 2 * kTiles, k_end};
}
// Of the two blocks of a thread: its row of the fragments of its warp.
__device__ __forceinline__ int own_row(int half) { return threadIdx.x % 32 / 4 + 8 * half; }

// Bias, activation and pool of a thread's sums. keys: this thread's column of kTensorThreads, unused unless
// has_keys(). block_of(half): the place of its first or second 2x2 block, found out only when it is wanted.
template <typename T, int kTiles, typename BlockOf>
__device__ __forceinline__ void finish_blocks(const ConvPoolShape& s, const T* bias, BlockSums<kTiles>& sum,
                                              float* keys, const OwnChannels& own, const BlockOf& block_of,
                                              const ConvPoolResults& out) {
  constexpr int kOwned = 2 * kTiles;
  // Channel i of one position of the thread's first or second 2x2 block stands in this register.
  const auto register_of = [](int i, int half) { return 2 * half + i % 2; };
  if (bias) {
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
      const float b = own.begin + i < own.end ? widen(bias[own.begin + i]) : 0.0f;
#pragma unroll
      for (int position = 0; position < 4; ++position)
#pragma unroll
        for (int half = 0; half < 2; ++half) sum[position][i / 2][register_of(i, half)] += b;
    }
  }
  if (has_keys(s.activation))
    compute_keys<4 * kTiles * 4>(
        s.activation, [&](int i) { return sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4]; }, keys,
        kTensorThreads);
  with_block_windows(s.pool, [&](auto windows) {
    using Windows = decltype(windows);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const BlockPlace block = block_of(half);
#pragma unroll
      for (int window = 0; window < Windows::kCount; ++window) {
        const int h = block.y * Windows::kDown + window / Windows::kAcross;
        const int w = block.x * Windows::kAcross + window % Windows::kAcross;
        if (block.n < 0 || h >= s.out.h || w >= s.out.w) continue;
        T y[kOwned], kept[kOwned];
        uint8_t code[kOwned];
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
          const auto value = [&](int dy, int dx) { return sum[2 * dy + dx][i / 2][register_of(i, half)]; };
          const auto key = [&](int dy, int dx) {
            const int place_of_key = ((2 * dy + dx) * kTiles + i / 2) * 4 + register_of(i, half);
            return has_keys(s.activation) ? keys[place_of_key * kTensorThreads] : value(dy, dx);
          };
          const auto winner = Windows::template winner<float>(s, window, block.y, block.x, key, value);
          y[i] = narrow_to<T>(winner.key);
          kept[i] = narrow_to<T>(winner.value);
          code[i] = static_cast<uint8_t>(winner.code);
        }
        store_channels(out.y, block.n, own.begin, h, w, own.end, y);
        if (out.code.data) store_channels(out.code, block.n, own.begin, h, w, own.end, code);
        if (out.kept.data) store_channels(out.kept, block.n, own.begin, h, w, own.end, kept);
      }
    }
  });
}

// The same of a tile.
template <typename T, int kTiles, int kWide>
__device__ __forceinline__ void finish_tile(const ConvPoolShape& s, const T* bias, BlockSums<kTiles>& sum,
                                            float* keys, const TilePlace<kWide>& place,
                                            const ConvPoolResults& out) {
  const auto block_of = [&](int half) {
    const Size2 of_tile = block_of_row<kWide>(threadIdx.x / 32, own_row(half));
    return BlockPlace{place.n, place.block_y + of_tile.h, place.block_x + of_tile.w};
  };
  finish_blocks<T, kTiles>(s, bias, sum, keys, own_channels<kTiles>(place.tile_k * 8 * kTiles, s.k), block_of,
                           out);
}

template <typename T, int kTiles, int kWide>
__global__ void __launch_bounds__(kTensorThreads, 1)
    tensor_forward(ConvPoolShape s, Map x, const unsigned char* packed, const T* bias, ConvPoolResults out) {
  auto* shared = shared_memory<unsigned char>();  // two stages
  const TensorGrid grid = tensor_grid<T, kTiles>(s.c, s.k);
  const TilePlace<kWide> place(blocks_of(s), grid.tiles_k);
  packed += int64_t(place.tile_k) * grid.chunks * kWeightBytes<kTiles>;
  const auto begin_copies = [&](int chunk) {
    unsigned char* stage = shared + chunk % 2 * kStageBytes<kTiles, kWide>;
    copy_pixels<T>(stage, s, x, place, chunk);
    copy_weights<kTiles>(stage + Halo<kWide>::kBytes, packed + int64_t(chunk) * kWeightBytes<kTiles>);
  };

  BlockSums<kTiles> sum;
#pragma unroll
  for (int i = 0; i < 4 * kTiles * 4; ++i) sum[i / (kTiles * 4)][i / 4 % kTiles][i % 4] = 0.0f;
  begin_copies(0);
  for (int chunk = 0; chunk < grid.chunks; ++chunk) {
    async_commit();
    async_wait<0>();
    block_barrier();  // this chunk has landed, and the stage of the one before has been read
    if (chunk + 1 < grid.chunks) begin_copies(chunk + 1);
    const unsigned char* stage = shared + chunk % 2 * kStageBytes<kTiles, kWide>;
    multiply_chunk<T, kTiles, kWide>(sum, stage, stage + Halo<kWide>::kBytes, threadIdx.x / 32,
                                     threadIdx.x % 32);
  }
  if (has_keys(s.activation)) block_barrier();  // the last stage has been read
  finish_tile<T, kTiles, kWide>(s, bias, sum, shared_memory<float>() + threadIdx.x, place, out);
}

}  // namespace
}  // namespace cnnrnn::cuda
