// The tile registers of AMX behind plain names: eight of 16 rows x 64 bytes, products of bfloat16 pairs
// summed in float32.
//
// Instructions are named to the assembler, so that no compiler flag is needed. The process must have been
// granted the registers (capability.cpp), and a thread must hold a TileSession.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

namespace {

// Rows begin at cache lines: a load whose rows cross lines takes seven times as long (2.3 and 15.8 ns; a
// product takes 4.9).
constexpr int kTileSide = 16;   // rows of a tile; columns of float32
constexpr int kTileDepth = 32;  // bfloat16 values in a row
constexpr int kTileValues = kTileSide * kTileDepth;
constexpr int64_t kTileBytes = 64;  // a row

#if defined(CNNRNN_EMULATE_AMX)

// To test the kernels on any machine.
struct Tile {
  float value[kTileSide][kTileSide];
};
static Tile tiles[8];

CNNRNN_INLINE void tiles_begin() { std::memset(tiles, 0xff, sizeof tiles); }
CNNRNN_INLINE void tiles_end() { std::memset(tiles, 0xff, sizeof tiles); }

template <int t>
CNNRNN_INLINE void tile_zero() {
  tiles[t] = Tile{};
}

template <int t>
CNNRNN_INLINE void tile_load(const void* p, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    std::memcpy(tiles[t].value[row], static_cast<const char*>(p) + row * stride, kTileBytes);
}

template <int t>
CNNRNN_INLINE void tile_store(void* p, int64_t stride) {
  for (int row = 0; row < kTileSide; ++row)
    std::memcpy(static_cast<char*>(p) + row * stride, tiles[t].value[row], kTileBytes);
}

template <int c, int a, int b>
CNNRNN_INLINE void tile_multiply() {
  const auto half = [](float pair, int i) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, pair);
    return __builtin_bit_cast(float, i == 0 ? bits << 16 : bits & 0xffff0000u);
  };
  for (int row = 0; row < kTileSide; ++row)
    for (int pair = 0; pair < kTileSide; ++pair)
      for (int column = 0; column < kTileSide; ++column)
        for (int i = 0; i < 2; ++i)
          tiles[c].value[row][column] +=
              half(tiles[a].value[row][pair], i) * half(tiles[b].value[pair][column], i);
}

#else

CNNRNN_INLINE void tiles_begin() {
  alignas(64) static constexpr struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } whole;
  asm volatile("ldtilecfg %0" ::"m"(whole));
}
CNNRNN_INLINE void tiles_end() { asm volatile("tilerelease"); }

template <int t>
CNNRNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}

template <int t>
CNNRNN_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}

template <int t>
CNNRNN_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}

// c += a b: a holds [16][32], b [16 pairs of depths][16 columns][2].
template <int c, int a, int b>
CNNRNN_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#endif

// A store now and then keeps the way out of the registers awake: after some 130 products without one the next
// takes 240 ns longer, as much as 50 products (measured on one processor). Any tile will do.
template <int t>
CNNRNN_INLINE void tiles_stay_awake() {
  alignas(64) char row[kTileBytes];
  tile_store<t>(row, 0);
}

// The registers, held from construction to destruction.
struct TileSession {
  TileSession() { tiles_begin(); }
  ~TileSession() { tiles_end(); }
};

}  // namespace
