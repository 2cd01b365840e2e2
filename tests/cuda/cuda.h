// What kernels in CUDA need to be C++ for a processor: included where their source includes cuda.h.
//
// The threads of a block are fibers that take turns at barriers, in rising order in every other
// block and in falling order in the rest, so that a missing barrier shows in the results.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <ucontext.h>

struct Index {
  int x, y, z;
};
static Index threadIdx, blockIdx;

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static inline float max(float a, float b) { return a > b ? a : b; }
static inline float min(float a, float b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int min(int a, int b) { return a < b ? a : b; }
template <class T>
static inline T __ldg(const T* p) {
  return *p;
}

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fibers {
const int kMost = 1024, kStack = 256 << 10;
enum State { kReady, kAtBarrier, kDone };
struct Fiber {
  ucontext_t context;
  Index index;
  State state;
  float shuffled;
};
static Fiber fibers[kMost];
static char* stacks;
static ucontext_t scheduler;
static int current;
static void (*body)(void**);
static void** arguments;

static void start() {
  body(arguments);
  fibers[current].state = kDone;
}

static void yield(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

// Resume every thread that is ready once; returns how many are at a barrier then.
static int turn(int count, bool falling) {
  int waiting = 0;
  for (int i = 0; i < count; i++) {
    current = falling ? count - 1 - i : i;
    threadIdx = fibers[current].index;
    if (fibers[current].state == kReady) swapcontext(&scheduler, &fibers[current].context);
    waiting += fibers[current].state == kAtBarrier;
  }
  return waiting;
}

static void run_block(void (*kernel)(void**), void** params, const unsigned* block, bool falling) {
  if (!stacks) stacks = static_cast<char*>(malloc(static_cast<size_t>(kMost) * kStack));
  body = kernel;
  arguments = params;
  int count = block[0] * block[1] * block[2];
  for (int i = 0; i < count; i++) {
    Fiber& fiber = fibers[i];
    fiber.state = kReady;
    fiber.index = {int(i % block[0]), int(i / block[0] % block[1]), int(i / block[0] / block[1])};
    getcontext(&fiber.context);
    fiber.context.uc_stack = {stacks + static_cast<size_t>(i) * kStack, 0, kStack};
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, start, 0);
  }
  int waiting = 0, ready = count;
  while (ready || waiting) {
    waiting = turn(count, falling);
    ready = 0;
    for (int i = 0; i < count; i++) ready += fibers[i].state == kReady;
    if (ready || !waiting) continue;
    if (waiting < count) {
      fprintf(stderr, "a barrier that %d of %d threads do not reach\n", count - waiting, count);
      abort();
    }
    for (int i = 0; i < count; i++) fibers[i].state = kReady;
  }
}

static void run_loop(void (*kernel)(void**), void** params, const unsigned* block, bool falling) {
  int count = block[0] * block[1] * block[2];
  for (int i = 0; i < count; i++) {
    int at = falling ? count - 1 - i : i;
    threadIdx = {int(at % block[0]), int(at / block[0] % block[1]), int(at / block[0] / block[1])};
    kernel(params);
  }
}

static void run_grid(void (*kernel)(void**), void** params, const unsigned* dims, bool barriers) {
  bool falling = false;
  for (unsigned z = 0; z < dims[2]; z++)
    for (unsigned y = 0; y < dims[1]; y++)
      for (unsigned x = 0; x < dims[0]; x++, falling = !falling) {
        blockIdx = {int(x), int(y), int(z)};
        (barriers ? run_block : run_loop)(kernel, params, dims + 3, falling);
      }
}
}  // namespace fibers

static inline void __syncthreads() { fibers::yield(fibers::kAtBarrier); }
static inline unsigned __activemask() { return ~0u; }

// The threads of a warp get here in the same turn, or not at all.
static inline float __shfl_sync(unsigned, float value, int lane, int = 32) {
  fibers::fibers[fibers::current].shuffled = value;
  int mine = fibers::current;
  fibers::yield(fibers::kReady);
  float result = fibers::fibers[mine / 32 * 32 + lane % 32].shuffled;
  fibers::yield(fibers::kReady);
  return result;
}
static inline float __shfl_down_sync(unsigned mask, float value, int delta, int width = 32) {
  int lane = fibers::current % 32;
  return __shfl_sync(mask, value, lane + delta < 32 ? lane + delta : lane, width);
}

// What a warp's threads multiply together, as the PTX ISA says who has what.
namespace tensor {
struct Words {
  unsigned at[4];
};
struct Sums {
  float at[4];
};
struct Lane {
  Words a, b;
  unsigned places;
};
static Lane lanes[fibers::kMost];

// To the nearest, ties to even; what is too large becomes the largest.
static unsigned as_half(float value) {
  if (value != value) return 0x7fff;
  unsigned sign = signbit(value) ? 0x8000 : 0;
  value = fabsf(value);
  if (value >= 65504) return sign | 0x7bff;
  int exponent;
  frexpf(value, &exponent);
  if (value == 0 || exponent < -13) return sign | static_cast<unsigned>(rintf(ldexpf(value, 24)));
  float fraction = rintf(ldexpf(value, 11 - exponent));  // 1024 to 2048
  return sign + (exponent + 13) * 1024 + static_cast<unsigned>(fraction);
}
static float half(unsigned word, int which) {
  unsigned bits = word >> 16 * which & 0xffff;
  int exponent = bits >> 10 & 31;
  float fraction = (bits & 1023) + (exponent ? 1024 : 0);
  if (exponent == 31) fraction = bits & 1023 ? NAN : INFINITY;
  return ldexpf(bits & 0x8000 ? -fraction : fraction, (exponent ? exponent : 1) - 25);
}

// Row (tap) k and column (pixel) n of B.
static float b_at(const Lane* warp, int k, int n) {
  return half(warp[4 * n + k % 8 / 2].b.at[k / 8], k % 2);
}
static float dense_at(const Lane* warp, int row, int n) {
  double sum = 0;
  for (int k = 0; k < 16; k++) {
    unsigned word = warp[row % 8 * 4 + k % 8 / 2].a.at[row / 8 + k / 8 * 2];
    sum += static_cast<double>(half(word, k % 2)) * b_at(warp, k, n);
  }
  return sum;
}
static float sparse_at(const Lane* warp, int row, int n, int selector) {
  double sum = 0;
  for (int chunk = 0; chunk < 8; chunk++) {
    const Lane* group = warp + row % 8 * 4;
    unsigned word = group[chunk % 4].a.at[row / 8 + chunk / 4 * 2];
    unsigned places = group[2 * selector + chunk / 4].places >> (row / 8 * 16 + chunk % 4 * 4);
    if ((places & 3) >= (places >> 2 & 3)) {
      fprintf(stderr, "places %u and %u do not rise\n", places & 3, places >> 2 & 3);
      abort();
    }
    for (int i = 0; i < 2; i++)
      sum += static_cast<double>(half(word, i)) * b_at(warp, chunk * 4 + (places >> 2 * i & 3), n);
  }
  return sum;
}

// The threads of a warp get here in the same turn.
template <class At>
static void together(float** d, const Lane& mine, const Sums& c, At at) {
  int me = fibers::current;
  lanes[me] = mine;
  fibers::yield(fibers::kReady);
  Sums sums;
  for (int i = 0; i < 4; i++)
    sums.at[i] = c.at[i] + at(lanes + me / 32 * 32, me % 32 / 4 + i / 2 * 8, me % 4 * 2 + i % 2);
  fibers::yield(fibers::kReady);
  for (int i = 0; i < 4; i++) *d[i] = sums.at[i];
}
static void dense(float& d0, float& d1, float& d2, float& d3, Words a, Words b, Sums c) {
  float* d[] = {&d0, &d1, &d2, &d3};
  together(d, {a, b, 0}, c, dense_at);
}
static void sparse(float& d0, float& d1, float& d2, float& d3, Words a, Words b, Sums c,
                   unsigned places, int selector) {
  float* d[] = {&d0, &d1, &d2, &d3};
  together(d, {a, b, places}, c, [selector](const Lane* warp, int row, int n) {
    return sparse_at(warp, row, n, selector);
  });
}
}  // namespace tensor
