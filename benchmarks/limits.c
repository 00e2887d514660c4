// The machine's own limits, measured from plain C: what the FMA units and the caches can deliver at most.
// Compiled at run time for the very machine it measures, so `vec` is as wide as its registers.
#include <stddef.h>

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float vec __attribute__((vector_size(WIDTH)));
enum { LANES = WIDTH / sizeof(float) };

#if defined(__aarch64__)
#define IN_REGISTER "+w"
#else
#define IN_REGISTER "+x"
#endif

// 12 independent chains hide the latency of two FMA units and still fit 16 registers with the operands.
enum { CHAINS = 12 };

static float sum(vec v) {
  float s = 0;
  for (int i = 0; i < LANES; i++) s += v[i];
  return s;
}

// Floating-point operations in one iteration of fma_loop.
int flop_per_iteration(void) { return 2 * CHAINS * LANES; }

float fma_loop(long iterations) {
  vec a0 = {0}, a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0;
  vec a6 = a0, a7 = a0, a8 = a0, a9 = a0, a10 = a0, a11 = a0;
  vec x = a0 + 0.999f, y = a0 + 0.001f;
  for (long i = 0; i < iterations; i++) {
    a0 = a0 * x + y, a1 = a1 * x + y, a2 = a2 * x + y, a3 = a3 * x + y;
    a4 = a4 * x + y, a5 = a5 * x + y, a6 = a6 * x + y, a7 = a7 * x + y;
    a8 = a8 * x + y, a9 = a9 * x + y, a10 = a10 * x + y, a11 = a11 * x + y;
    // Equal chains would be merged into one: the compiler must not know that they are equal.
    __asm__ volatile("" : IN_REGISTER(a0), IN_REGISTER(a1), IN_REGISTER(a2), IN_REGISTER(a3));
    __asm__ volatile("" : IN_REGISTER(a4), IN_REGISTER(a5), IN_REGISTER(a6), IN_REGISTER(a7));
    __asm__ volatile("" : IN_REGISTER(a8), IN_REGISTER(a9), IN_REGISTER(a10), IN_REGISTER(a11));
  }
  return sum(a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7 + a8 + a9 + a10 + a11);
}

// Reads count floats (a multiple of 8 vectors, aligned to one) `repeats` times over.
float read_loop(const float* data, size_t count, long repeats) {
  const vec* p = (const vec*)data;
  const size_t n = count / LANES;
  vec a0 = {0}, a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
  for (long r = 0; r < repeats; r++) {
    for (size_t i = 0; i + 8 <= n; i += 8) {
      a0 += p[i], a1 += p[i + 1], a2 += p[i + 2], a3 += p[i + 3];
      a4 += p[i + 4], a5 += p[i + 5], a6 += p[i + 6], a7 += p[i + 7];
    }
    __asm__ volatile("" : : "r"(p) : "memory");  // a second pass must read again
  }
  return sum(a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7);
}
