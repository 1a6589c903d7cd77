// Enough of CUDA to run the kernels of csrc/cuda on a CPU, one block after the other, each thread a fiber.
//
// Fibers take turns at every shuffle and barrier. A shuffle that not all lanes of a warp reach together, or a barrier
// that not all threads reach, is an error here (on a GPU it would be undefined).
#pragma once

#include <ucontext.h>

#include <math.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static


struct uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
constexpr float CUDART_INF_F = INFINITY;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
inline float __half2float(__half x) { return static_cast<float>(x.value); }
template <typename T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) std::fprintf(stderr, "misaligned load\n"), std::abort();
  return *from;
}

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint32_t slots[2];  // of even and odd shuffles
  int64_t shuffles = 0;
  int64_t barriers = 0;
  bool done = false;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current = 0;
inline std::function<void()> body;

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void fail(const char* what) {
  std::fprintf(stderr, "thread %u: %s\n", current, what);
  std::abort();
}

inline void enter() {
  body();
  fibers[current].done = true;
  yield();
}

inline void run_block(unsigned threads) {
  constexpr size_t kStack = 1 << 16;
  fibers = std::vector<Fiber>(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.stack = std::make_unique<char[]>(kStack);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (bool alive = true; alive;) {
    alive = false;
    for (current = 0; current < threads; ++current) {
      if (fibers[current].done) continue;
      swapcontext(&scheduler, &fibers[current].context);
      alive = true;
    }
  }
}

}  // namespace emulator

struct ThreadIndex {
  struct X {
    operator unsigned() const { return emulator::current; }
  } x;
};
inline ThreadIndex threadIdx;
inline dim3 blockIdx, blockDim, gridDim;

inline void __syncthreads() {
  using namespace emulator;
  const int64_t mine = ++fibers[current].barriers;
  for (bool waiting = true; waiting;) {
    yield();
    waiting = false;
    for (const Fiber& fiber : fibers) {
      if (fiber.done && fiber.barriers < mine) fail("a thread left before the barrier");
      waiting |= fiber.barriers < mine;
    }
  }
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  using namespace emulator;
  static_assert(sizeof(T) == sizeof(uint32_t));
  const int64_t turn = fibers[current].shuffles++;
  std::memcpy(&fibers[current].slots[turn % 2], &value, sizeof value);
  yield();
  const Fiber& other = fibers[current ^ offset];
  // The other lane is in this shuffle, or already in the next one, never further.
  if (other.shuffles != turn + 1 && other.shuffles != turn + 2) fail("the lanes of a warp shuffle apart");
  std::memcpy(&value, &other.slots[turn % 2], sizeof value);
  return value;
}

// kernel<<<grid, block, 0, stream>>>(arguments) is rewritten to emulate(kernel)(grid, block)(arguments).
template <typename... Parameters>
auto emulate(void (*kernel)(Parameters...)) {
  return [kernel](dim3 grid, dim3 block) {
    return [=](auto... arguments) {
      gridDim = grid;
      blockDim = block;
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y);
          emulator::body = [=] { kernel(arguments...); };
          emulator::run_block(block.x);
        }
      }
    };
  };
}
