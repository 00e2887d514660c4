// The matrix instructions of a warp: mma.sync and ldmatrix, with the register layouts of the PTX manual.
// A lane is g = lane / 4, t = lane % 4.

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstring>

#include "emulator.h"
#include "internal.h"

namespace emulator {
namespace {

constexpr int kLanes = 32, kRows = 16, kColumns = 8;

// 32 bits hold two elements of a 16-bit type or one TF32 number, whose last 13 bits the hardware ignores.
template <Element kElement>
float element_of(uint32_t word, int index) {
  if constexpr (kElement == Element::kTf32) {
    word &= 0xFFFFE000u;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  } else {
    const auto bits = static_cast<uint16_t>(word >> (16 * index));
    if constexpr (kElement == Element::kHalf) return c10::Half(bits, c10::Half::from_bits());
    return c10::BFloat16(bits, c10::BFloat16::from_bits());
  }
}

struct Mma {
  float* d;
  const uint32_t *a, *b;
};

// m16n8k16 of a 16-bit type, m16n8k8 of TF32. In both a row of A is 8 words of 32 bits: lane (g, t) holds
// words t and t + 4 of rows g and g + 8 of A and of column g of B, and columns 2t, 2t + 1 of rows g and g + 8
// of D.
template <Element kElement>
void multiply(void* const* operands) {
  constexpr int kOfWord = kElement == Element::kTf32 ? 1 : 2, kWords = 8;
  const auto lane = [&](int g, int t) { return static_cast<const Mma*>(operands[4 * g + t]); };
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float& d = lane(row % 8, column / 2)->d[row / 8 * 2 + column % 2];
      for (int word = 0; word < kWords; ++word) {
        const uint32_t a = lane(row % 8, word % 4)->a[word / 4 * 2 + row / 8];
        const uint32_t b = lane(column, word % 4)->b[word / 4];
        for (int i = 0; i < kOfWord; ++i) d += element_of<kElement>(a, i) * element_of<kElement>(b, i);
      }
    }
  }
}

struct SparseMma {
  float* d;
  const uint32_t *a, *b;
  uint32_t metadata;
};

// m16n8k32 whose A is stored half, selector 0: a chunk of 4 elements of a row of A is two elements, and 4
// bits of metadata that tell their places. See primitives_sparse.cuh for where a lane has them.
template <Element kElement>
void multiply_sparse(void* const* operands) {
  constexpr int kChunks = 8;
  const auto lane = [&](int g, int t) { return static_cast<const SparseMma*>(operands[4 * g + t]); };
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      float& d = lane(row % 8, column / 2)->d[row / 8 * 2 + column % 2];
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        const uint32_t a = lane(row % 8, chunk % 4)->a[chunk / 4 * 2 + row / 8];
        const uint32_t word = lane(row % 8, chunk / 4)->metadata;
        const uint32_t places = word >> (16 * (row / 8) + 4 * (chunk % 4)) & 15;
        if ((places & 3) >= places >> 2) fail("metadata out of order in a sparse product");
        for (int i = 0; i < 2; ++i) {
          const int depth = 4 * chunk + static_cast<int>(places >> (2 * i) & 3);
          const uint32_t b = lane(column, depth % 8 / 2)->b[depth / 8];
          d += element_of<kElement>(a, i) * element_of<kElement>(b, depth % 2);
        }
      }
    }
  }
}

struct Load {
  uint32_t* registers;
  uint16_t row[8];
};

// ldmatrix.x4: lane l brings row l % 8 of matrix l / 8; register m of lane (g, t) gets elements 2t, 2t + 1 of
// row g of matrix m, or rows 2t, 2t + 1 of its column g.
template <bool kTransposed>
void distribute(void* const* operands) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const auto element = [&](int i) -> uint32_t {
        const int row = kTransposed ? i : g, column = kTransposed ? g : i;
        return static_cast<const Load*>(operands[8 * m + row])->row[column];
      };
      static_cast<Load*>(operands[lane])->registers[m] = element(2 * t) | element(2 * t + 1) << 16;
    }
  }
}

}  // namespace

void mma(Site site, Element element, float* d, const uint32_t* a, const uint32_t* b) {
  Mma operand{d, a, b};
  switch (element) {
    case Element::kHalf:
      return exchange(site, &operand, multiply<Element::kHalf>);
    case Element::kBFloat16:
      return exchange(site, &operand, multiply<Element::kBFloat16>);
    case Element::kTf32:
      return exchange(site, &operand, multiply<Element::kTf32>);
  }
}

void mma_sparse(Site site, Element element, float* d, const uint32_t* a, const uint32_t* b,
                uint32_t metadata) {
  SparseMma operand{d, a, b, metadata};
  exchange(site, &operand,
           element == Element::kHalf ? multiply_sparse<Element::kHalf> : multiply_sparse<Element::kBFloat16>);
}

void load_matrices(Site site, uint32_t* registers, const void* row, bool transposed) {
  Load operand{registers, {}};
  check_alignment(row, sizeof(operand.row));
  check_read(row, sizeof(operand.row));
  std::memcpy(operand.row, row, sizeof(operand.row));
  exchange(site, &operand, transposed ? distribute<true> : distribute<false>);
}

}  // namespace emulator
