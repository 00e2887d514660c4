// What the test of the recurrent kernels needs beside them: buffers that end where a page without access
// begins, random values, the oracle's gates, the count of checks.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "rnn.h"

using cnnrnn::Bf16;
using cnnrnn::StateRows;

static uint64_t seed = 1;
static double uniform() {  // in [-1, 1)
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(seed >> 11) / static_cast<double>(1ull << 52) - 1;
}

template <typename T>
struct BeforeAPage {
  using value_type = T;
  BeforeAPage() = default;
  template <typename U>
  BeforeAPage(const BeforeAPage<U>&) {}
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t whole(size_t n) { return (n * sizeof(T) + page() - 1) / page() * page(); }
  T* allocate(size_t n) {
    void* pages =
        mmap(nullptr, whole(n) + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    char* end = static_cast<char*>(pages) + whole(n);
    if (mprotect(end, page(), PROT_NONE)) std::abort();
    return reinterpret_cast<T*>(end - n * sizeof(T));
  }
  void deallocate(T* p, size_t n) { munmap(reinterpret_cast<char*>(p + n) - whole(n), whole(n) + page()); }
  friend bool operator==(const BeforeAPage&, const BeforeAPage&) { return true; }
  friend bool operator!=(const BeforeAPage&, const BeforeAPage&) { return false; }
};
template <typename T>
using Buffer = std::vector<T, BeforeAPage<T>>;

template <typename T>
Buffer<T> random(int64_t count, double scale = 1) {
  Buffer<T> values(count);
  for (T& v : values) v = static_cast<T>(scale * uniform());
  return values;
}
static Buffer<uint8_t> flags(int64_t count) {
  Buffer<uint8_t> values(count);
  for (uint8_t& v : values) v = uniform() < -0.3;
  return values;
}

// The values cut to bfloat16, which stay in place.
template <typename T>
Buffer<Bf16> narrowed(Buffer<T>& values) {
  Buffer<Bf16> halves;
  for (T& v : values) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(v)) & 0xffff0000u;
    halves.push_back({static_cast<uint16_t>(bits >> 16)});
    v = static_cast<T>(__builtin_bit_cast(float, bits));
  }
  return halves;
}

static int64_t checks = 0, failures = 0;
static bool halves = false;  // products of bfloat16: what is where still shows
template <typename T>
void check(const char* what, int cell, int64_t rows, int64_t hidden, T got, double wanted, double scale = 1) {
  const double limit = (halves ? 0.06 : sizeof(T) == 4 ? 2e-5 : 1e-12) * std::max(scale, std::abs(wanted));
  ++checks;
  if (std::isnan(wanted) ? std::isnan(got) : got == static_cast<T>(wanted)) return;
  if (std::abs(static_cast<double>(got) - wanted) <= limit) return;
  if (++failures <= 20)
    std::printf("%s, %zu-byte elements, cell %d, %ld rows, %ld units: %g, expected %g\n", what, sizeof(T),
                cell, static_cast<long>(rows), static_cast<long>(hidden), static_cast<double>(got), wanted);
}

static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// States with strides of their own, of which the first `carried` rows come from `before`.
template <typename T>
struct States {
  int64_t rows, hidden, carried;
  Buffer<T> before, initial, zeros;
  Buffer<uint8_t> reset;

  States(int64_t rows, int64_t hidden, int64_t carried, bool resets)
      : rows(rows),
        hidden(hidden),
        carried(carried),
        before(random<T>(carried * (hidden + 3))),
        initial(random<T>(rows * hidden)),
        zeros(hidden),
        reset(flags(resets ? std::max<int64_t>(rows - 1, 0) : 0)) {}
  StateRows<T> view() const {
    StateRows<T> s{};
    s.before = before.data(), s.before_stride = hidden + 3, s.carried = carried;
    s.initial = initial.data(), s.initial_stride = hidden;
    s.reset = reset.empty() ? nullptr : reset.data(), s.flagged = static_cast<int64_t>(reset.size());
    s.zeros = zeros.data();
    return s;
  }
  bool is_reset(int64_t row) const { return row < static_cast<int64_t>(reset.size()) && reset[row]; }
  double at(int64_t row, int64_t unit) const {
    if (is_reset(row)) return 0;
    return row < carried ? before[row * (hidden + 3) + unit] : initial[row * hidden + unit];
  }
};

struct Gates {  // activated, and the new states
  double kept[4], c, h;
};

static Gates step_of(int cell, const double* a, double h, double c) {
  Gates y{};
  if (cell == cnnrnn::kLstm) {
    const double i = sigmoid(a[0]), f = sigmoid(a[1]), g = std::tanh(a[2]), o = sigmoid(a[3]);
    const double c_1 = f * c + i * g;
    return {{i, f, g, o}, c_1, o * std::tanh(c_1)};
  }
  if (cell == cnnrnn::kGru) {
    const double r = sigmoid(a[0]), z = sigmoid(a[1]), n = std::tanh(a[2] + r * a[3]);
    return {{r, z, n, a[3]}, 0, (1 - z) * n + z * h};
  }
  y.h = cell == cnnrnn::kRnnTanh ? std::tanh(a[0]) : std::max(a[0], 0.0);
  return y;
}

// Which of the parts of the pre-activations gate g of the input, or of the state, belongs to.
static int input_part(int, int gate) { return gate; }
static int state_part(int cell, int gate) { return cell == cnnrnn::kGru && gate == 2 ? 3 : gate; }

// Where what is kept of a row's unit lies: vectors of units, rows, values, units of the vector.
static int64_t kept_at(int64_t rows, int64_t row, int64_t hidden, int64_t K, int64_t value, int64_t unit,
                       int64_t lanes) {
  const int64_t begin = unit / lanes * lanes, width = std::min(hidden - begin, lanes);
  return begin * rows * K + (row * K + value) * width + unit - begin;
}
