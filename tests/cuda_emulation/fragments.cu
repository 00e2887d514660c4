// One product of 16x8 outputs by a warp, to test primitives_mma.cuh and primitives_tiles.cuh.

#include "primitives_mma.cuh"
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

std::string report;

}  // namespace
}  // namespace cnnrnn::cuda

// which: float16, bfloat16, TF32, float16 with a by columns. Returns the emulator's report, "" if none.
extern "C" __attribute__((visibility("default"))) const char* run_fragments(int which, uint32_t* a,
                                                                            uint32_t* b, float* d,
                                                                            bool loaded) {
  using namespace cnnrnn::cuda;
  void (*const kernels[])(const uint32_t*, const uint32_t*, float*, bool) = {
      product<Half, false>, product<BFloat16, false>, product<Tf32, false>, product<Half, true>};
  report.clear();
  emulator::announce_memory(a, 16 * 32, 2);
  emulator::announce_memory(b, 8 * 32, 2);
  emulator::announce_memory(d, 16 * 8 * sizeof(float), 4);
  try {
    launch(kernels[which], dim3(1), 32, 16 * 32, nullptr, a, b, d, loaded);
  } catch (const std::exception& error) {
    report = error.what();
  }
  emulator::forget_memory();
  return report.c_str();
}
