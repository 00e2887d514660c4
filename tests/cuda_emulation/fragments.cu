// One product of 16x8 outputs by a warp, to test primitives_mma.cuh and primitives_tiles.cuh.

#include "primitives_mma.cuh"
#include "primitives_sparse.cuh"
#include "primitives_tiles.cuh"

namespace cnnrnn::cuda {
namespace {

constexpr int kWordsOfRow = 8;

// a [16, 8 words], or [16, 16] of 16-bit elements by columns if kTransposed; b [8 columns, 8 words].
template <typename T, bool kTransposed>
__global__ void product(const uint32_t* a, const uint32_t* b, float* d, bool loaded) {
  auto* shared = shared_memory<uint32_t>();
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) shared[4 * lane + i] = a[4 * lane + i];
  block_barrier();
  uint32_t fragment[4];
  const int first = lane % 8 + lane / 8 % 2 * 8, half = lane / 16;  // of matrix lane / 8
  if (kTransposed) {                                                // a row of memory is a column of A
    load_matrices_transposed(fragment, shared + (lane % 8 + 8 * half) * kWordsOfRow + lane / 8 % 2 * 4);
  } else if (loaded) {
    load_matrices(fragment, shared + first * kWordsOfRow + 4 * half);
  } else {
    for (int r = 0; r < 4; ++r) fragment[r] = shared[(g + 8 * (r % 2)) * kWordsOfRow + t + 4 * (r / 2)];
  }
  float sum[4] = {};
  mma<T>(sum, fragment[0], fragment[1], fragment[2], fragment[3], b[g * kWordsOfRow + t],
         b[g * kWordsOfRow + t + 4]);
  for (int r = 0; r < 4; ++r) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sum[r];
}

// The same of a [16, 32] with at most one element other than zero in every 4 of a row, b [8 columns, 32].
__global__ void sparse_product(const uint32_t* a_words, const uint32_t* b, float* d, bool) {
  const auto* a = reinterpret_cast<const uint16_t*>(a_words);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto place_in = [&](int row, int chunk) {
    int place = 0;
    for (int i = 0; i < 4; ++i)
      if (a[row * 32 + 4 * chunk + i] != 0) place = i;
    return place;
  };
  uint32_t fragment[4], columns[4], metadata = 0;
  for (int r = 0; r < 4; ++r) {
    const int row = g + r % 2 * 8, chunk = t + r / 2 * 4, place = place_in(row, chunk);
    fragment[r] = uint32_t(a[row * 32 + 4 * chunk + place]) << (place % 2 * 16);
    columns[r] = b[g * 16 + 4 * r + t];
  }
  for (int i = 0; i < 8; ++i)
    metadata |= (place_in(g + i / 4 * 8, t % 2 * 4 + i % 4) < 2 ? kFirstPlaces : kLastPlaces) << (4 * i);
  float sum[4] = {};
  mma_sparse<Half>(sum, fragment, columns, metadata);
  for (int r = 0; r < 4; ++r) d[(g + 8 * (r / 2)) * 8 + 2 * t + r % 2] = sum[r];
}

std::string report;

}  // namespace
}  // namespace cnnrnn::cuda

// which: float16, bfloat16, TF32, float16 with a by columns, sparse float16 of twice the depth. Returns the
// emulator's report, "" if none.
extern "C" __attribute__((visibility("default"))) const char* run_fragments(int which, uint32_t* a,
                                                                            uint32_t* b, float* d,
                                                                            bool loaded) {
  using namespace cnnrnn::cuda;
  void (*const kernels[])(const uint32_t*, const uint32_t*, float*, bool) = {
      product<Half, false>, product<BFloat16, false>, product<Tf32, false>, product<Half, true>,
      sparse_product};
  report.clear();
  const int depth = which == 4 ? 2 : 1;
  emulator::announce_memory(a, 16 * 32 * depth, 2);
  emulator::announce_memory(b, 8 * 32 * depth, 2);
  emulator::announce_memory(d, 16 * 8 * sizeof(float), 4);
  try {
    launch(kernels[which], dim3(1), 32, 16 * 32, nullptr, a, b, d, loaded);
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::forget_memory();
  return report.c_str();
}
