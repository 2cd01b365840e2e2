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
