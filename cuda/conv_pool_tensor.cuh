// The tensor-core core of conv_pool: 3x3 convolutions of stride 1 as implicit GEMM, by 2x2 blocks of outputs.
//
// A block of 8 warps makes a tile of 128 2x2 blocks in 8 * kTiles output channels; a warp 16 of the 2x2
// blocks in all of the channels. The rows of its four accumulator tiles are its 2x2 blocks, one tile for each
// of the four positions, so that pooling is a maximum between the registers of a thread. The four share every
// weight operand, and 4 positions x 9 taps touch only 4 x 4 input pixels: 16 fragments of x serve 36 products
// with a weight tile.
//
// Operands pass through shared memory in chunks of 64 bytes of input channels:
//   halo     [rows][pairs of pixels][2 pixels][4 units of 16 bytes], units permuted within the 128 bytes of a
//            pair so that the 8 rows of a matrix that ldmatrix reads, 8 neighbouring pairs, are in different
//            banks
//   weights  [tap][step of 32 bytes][pair of channel tiles][lane][16 bytes]: two fragments by one load
// Column n of tile j is channel 2 * kTiles * (n / 2) + 2 * j + n % 2: a thread owns 2 * kTiles adjacent
// channels.
#pragma once

#include "conv_pool_windows.cuh"
#include "primitives_mma.cuh"
#include "primitives_tiles.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kTensorThreads = 256, kTensorWarps = kTensorThreads / 32;
constexpr int kWarpBlocks = 16;                          // 2x2 blocks of a warp
constexpr int kTileBlocks = kTensorWarps * kWarpBlocks;  // of a tile
constexpr int kUnitBytes = 16, kUnits = 4, kChunkBytes = kUnits * kUnitBytes;
constexpr int kSteps = 2;  // of 32 bytes of channels, in a chunk
constexpr int kTaps = 9;

// The elements a type's products are made of.
template <typename T>
struct MmaElement {
  using type = T;
};
template <>
struct MmaElement<float> {
  using type = Tf32;
};

// A tile kWide 2x2 blocks wide, with the input pixels it needs.
template <int kWide>
struct Halo {
  static constexpr int kBlocksX = kWide, kBlocksY = kTileBlocks / kWide;
  static constexpr int kCols = 2 * kBlocksX + 2, kRows = 2 * kBlocksY + 2;
  static constexpr int kPairs = kCols / 2, kRowBytes = kPairs * 2 * kChunkBytes;
  static constexpr int kBytes = kRows * kRowBytes;
  static __device__ __forceinline__ int offset(int y, int x, int unit) {
    const int pair = x / 2;
    return y * kRowBytes + pair * 2 * kChunkBytes + ((x % 2 * kUnits + unit) ^ (pair % 8)) * kUnitBytes;
  }
};

template <int kTiles>
constexpr int kTapBytes = kSteps * kTiles * 32 * 8;  // weights of a tap and chunk
template <int kTiles>
constexpr int kWeightBytes = kTaps * kTapBytes<kTiles>;  // of a chunk

template <int kTiles, int kWide>
constexpr int kStageBytes = Halo<kWide>::kBytes + kWeightBytes<kTiles>;

// [position of the 2x2 block][channel tile][register of the fragment]
template <int kTiles>
using BlockSums = float[4][kTiles][4];

// Which 2x2 block of the tile is row `row` of a warp's fragments.
template <int kWide>
__device__ __forceinline__ Size2 block_of_row(int warp, int row) {
  return {warp * (kWarpBlocks / kWide) + row / kWide, row % kWide};
}

// The fragments of x for the pixels (y, 0..3) of this warp's 2x2 blocks, bytes 32 * step of the chunk.
template <typename T, int kWide>
__device__ __forceinline__ void load_row(uint32_t (&a)[4][4], const unsigned char* (&pairs)[2],
                                         const int (&units)[2], int y, int step) {
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    load_matrices(a[x], pairs[x / 2] + y * Halo<kWide>::kRowBytes +
                            (units[x / 2] ^ (x % 2 * kUnits + step * 2)) * kUnitBytes);
    if constexpr (std::is_same_v<T, float>)
#pragma unroll
      for (int r = 0; r < 4; ++r) a[x][r] = to_tf32(bits_to_float(a[x][r]));
  }
}

// Adds the products of one chunk.
template <typename T, int kTiles, int kWide>
__device__ __forceinline__ void multiply_chunk(BlockSums<kTiles>& sum, const unsigned char* halo,
                                               const unsigned char* weights, int warp, int lane) {
  using Element = typename MmaElement<T>::type;
  const Size2 block = block_of_row<kWide>(warp, lane % 16);
  // What this lane loads: of pixels (2 * block + (y, x)) the unit lane / 16 of each step.
  const unsigned char* pairs[2];
  int units[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pairs[i] = halo + 2 * block.h * Halo<kWide>::kRowBytes + (block.w + i) * 2 * kChunkBytes;
    units[i] = lane / 16 ^ ((block.w + i) % 8);
  }
  weights += lane * 16;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    uint32_t a[2][4][4];  // two rows of pixels; the next one takes the place of the older
    load_row<T, kWide>(a[0], pairs, units, 0, step);
#pragma unroll
    for (int ky = 0; ky < 3; ++ky) {
      load_row<T, kWide>(a[(ky + 1) % 2], pairs, units, ky + 1, step);
#pragma unroll
      for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
        for (int j = 0; j < kTiles; j += 2) {
          const auto b = *pack_at<const Pack<uint32_t, 4>>(reinterpret_cast<const uint32_t*>(
              weights + (((ky * 3 + kx) * kSteps + step) * kTiles + j) * 256));
#pragma unroll
          for (int position = 0; position < 4; ++position) {
            const auto& pixel = a[(ky + position / 2) % 2][kx + position % 2];
            mma<Element>(sum[position][j], pixel[0], pixel[1], pixel[2], pixel[3], b.v[0], b.v[1]);
            mma<Element>(sum[position][j + 1], pixel[0], pixel[1], pixel[2], pixel[3], b.v[2], b.v[3]);
          }
        }
      }
    }
  }
}

// ---- packing ----
constexpr int kPackThreads = 256;

// How many chunks and channel tiles a convolution has.
struct TensorGrid {
  int chunks, tiles_k;
};
template <typename T, int kTiles>
__host__ __device__ __forceinline__ TensorGrid tensor_grid(int channels, int outputs) {
  return {ceil_div(channels * static_cast<int>(sizeof(T)), kChunkBytes), ceil_div(outputs, 8 * kTiles)};
}

// Weights as a product takes them: of each group `outputs` columns, `channels` of depth for every tap.
struct WeightOrder {
  int groups, channels, outputs, taps;
  bool of_gradient;  // those of grad_x: the depth is the outputs of the convolution
  bool turned;       // the last tap first
};

// In the order of shared memory, [group][tile][chunk][tap][kTapBytes], zeros where there are none. A thread
// writes one word of 32 bits.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kPackThreads)
    pack_weights(const T* weight, WeightOrder order, uint32_t* packed) {
  constexpr int kOfWord = 4 / sizeof(T), kWords = kTapBytes<kTiles> / 4;
  const TensorGrid grid = tensor_grid<T, kTiles>(order.channels, order.outputs);
  const int64_t index = int64_t(blockIdx.x) * kPackThreads + threadIdx.x, unit = index / kWords;
  if (unit >= int64_t(order.groups) * grid.tiles_k * grid.chunks * order.taps) return;
  const int word = static_cast<int>(index % kWords), at_tap = static_cast<int>(unit % order.taps);
  const int chunk = static_cast<int>(unit / order.taps % grid.chunks);
  const int tile_k = static_cast<int>(unit / order.taps / grid.chunks % grid.tiles_k);
  const int64_t group = unit / order.taps / grid.chunks / grid.tiles_k;
  const int r = word % 4, lane = word / 4 % 32, j = word / 128 % (kTiles / 2) * 2 + r / 2;
  const int step = word / 128 / (kTiles / 2), g = lane / 4, t = lane % 4;
  const int k = tile_k * 8 * kTiles + g / 2 * 2 * kTiles + 2 * j + g % 2;
  const int first = ((chunk * kSteps + step) * 8 + t + r % 2 * 4) * kOfWord;
  const int tap = order.turned ? order.taps - 1 - at_tap : at_tap;
  Pack<T, kOfWord> elements;
#pragma unroll
  for (int i = 0; i < kOfWord; ++i) {
    const int c = first + i;
    const int64_t pair = order.of_gradient ? (group * order.channels + c) * order.outputs + k
                                           : (group * order.outputs + k) * order.channels + c;
    elements.v[i] =
        k < order.outputs && c < order.channels ? weight[pair * order.taps + tap] : narrow_to<T>(0.0f);
  }
  if constexpr (std::is_same_v<T, float>) {
    packed[index] = to_tf32(elements.v[0]);
  } else {
    *pack_at<Pack<T, kOfWord>>(reinterpret_cast<T*>(packed + index)) = elements;
  }
}

// A map of any strides as pixels of adjacent channels, those of each group padded with zeros.
constexpr int kPixelTile = 32;

struct PixelChannels {
  int groups, of_group, padded;  // the last two: channels of a group
};

// Bytes pass through shared memory in twos: a word written by several threads is a conflict.
template <typename T>
using Staged = std::conditional_t<sizeof(T) == 1, uint16_t, T>;

template <typename T>
__global__ void __launch_bounds__(kPackThreads)
    pack_pixels(Map map, PixelChannels channels, Size2 size, T* packed) {
  auto* tile = shared_memory<Staged<T>>();  // [kPixelTile channels][kPixelTile + 2 pixels]
  constexpr int kStride = kPixelTile + 2;
  const int64_t pixels = int64_t(size.h) * size.w, tiles = ceil_div(pixels, int64_t(kPixelTile));
  const int64_t n = blockIdx.x / tiles, pixel_begin = blockIdx.x % tiles * kPixelTile;
  const int c_begin = blockIdx.y * kPixelTile, column = threadIdx.x % 32, row = threadIdx.x / 32;
  const int padded = channels.groups * channels.padded;
  for (int i = row; i < kPixelTile; i += kPackThreads / 32) {
    const int64_t pixel = pixel_begin + column;
    if (pixel >= pixels || c_begin + i >= padded) continue;
    const int group = (c_begin + i) / channels.padded, c = (c_begin + i) % channels.padded;
    tile[i * kStride + column] = c < channels.of_group ? *at<const T>(map, n, group * channels.of_group + c,
                                                                      pixel / size.w, pixel % size.w)
                                                       : T();
  }
  block_barrier();
  for (int i = row; i < kPixelTile; i += kPackThreads / 32) {
    const int64_t pixel = pixel_begin + i;
    if (pixel < pixels && c_begin + column < padded)
      packed[(n * pixels + pixel) * padded + c_begin + column] = static_cast<T>(tile[column * kStride + i]);
  }
}

}  // namespace
}  // namespace cnnrnn::cuda
