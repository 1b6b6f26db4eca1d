// CUDA C++ on the host: what the kernels under backends/cuda use of it, so that tests can run them without a GPU.
//
// The threads of a block are fibres of one thread of the host. Each runs until it reaches a barrier or its end, then the next
// one does: so a value that another thread has yet to write shows as wrong in one order or another. Blocks run one by one.
// A barrier of a warp holds up its 32 threads alone.
// Shared memory is filled with 0xff (NaN) before each block, where the object format lets us find it.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <type_traits>
#include <utility>

struct uint3 { unsigned x, y, z; };
struct dim3 { unsigned x, y, z; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }

#define EMULATED_MIN_MAX(T) \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
EMULATED_MIN_MAX(int)
EMULATED_MIN_MAX(unsigned)
EMULATED_MIN_MAX(long long)
EMULATED_MIN_MAX(unsigned long long)
#undef EMULATED_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
inline unsigned __float_as_uint(float x) { unsigned u; memcpy(&u, &x, 4); return u; }
inline float __uint_as_float(unsigned u) { float x; memcpy(&x, &u, 4); return x; }
template <typename T> inline T __ldg(const T* p) { return *p; }

namespace emulated {

enum Order { FORWARD, REVERSE, SHUFFLED };
enum Status { DONE, DIVERGED };
constexpr int DONE_MARK = -1, THREADS = 1024;
constexpr size_t STACK = 256 * 1024;  // of address space: only what is touched takes memory

struct Fibre { jmp_buf at; ucontext_t first; bool born; };

static Fibre fibres[THREADS];
static char* stacks;
static int turns[THREADS], position, running, threads, arrived, first_mark, other_mark;
static bool waits[THREADS], diverged;
static int gathered[THREADS / 32], warp_mark[THREADS / 32];  // at a barrier of their warp
static unsigned generation[THREADS / 32];  // how many such barriers were passed
static jmp_buf scheduler;
static Order order;
static unsigned long long random_state;
static void (*call)(void**);
static void** arguments;
extern uint3 thread, block;
extern dim3 block_size, grid_size;
uint3 thread, block;
dim3 block_size, grid_size;

inline unsigned draw(unsigned below) {  // splitmix64
  unsigned long long z = (random_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (unsigned)(((z ^ (z >> 31)) >> 32) * below >> 32);
}

// To the next barrier of the block, or its end.
inline void begin() {
  position = arrived = 0;
  memset(waits, 0, sizeof waits);
}

inline void arrange() {
  for (int i = 0; i < threads; i++) turns[i] = order == REVERSE ? threads - 1 - i : i;
  if (order == SHUFFLED)
    for (int i = threads - 1; i > 0; i--) std::swap(turns[i], turns[draw(i + 1)]);
}

void finish_or_wait(int mark);

inline void body() {
  for (;;) {  // a fibre that ended is used for the next block
    call(arguments);
    finish_or_wait(DONE_MARK);
  }
}

[[noreturn]] inline void stop() {
  diverged = true;
  _longjmp(scheduler, 1);
}

// The next one in turn that does not wait.
[[noreturn]] inline void resume() {
  for (int tried = 0; waits[turns[position]]; position = (position + 1) % threads) {
    if (++tried <= threads) continue;
    for (int mark : warp_mark)  // some of a warp are at its barrier, the others at the block's
      if (mark != DONE_MARK) other_mark = mark;
    stop();
  }
  running = turns[position];
  unsigned i = running;
  thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
  Fibre& f = fibres[i];
  if (f.born) _longjmp(f.at, 1);
  f.born = true;
  getcontext(&f.first);
  f.first.uc_stack.ss_sp = stacks + i * STACK;
  f.first.uc_stack.ss_size = STACK;
  f.first.uc_link = nullptr;
  makecontext(&f.first, body, 0);
  setcontext(&f.first);
  __builtin_unreachable();
}

// mark: the line of the barrier, or DONE_MARK. All threads of the block must come to the same.
__attribute__((noinline)) void finish_or_wait(int mark) {
  if (_setjmp(fibres[running].at)) return;
  if (arrived == 0) first_mark = other_mark = mark;
  if (mark != first_mark) other_mark = mark;
  waits[running] = true;
  if (++arrived == threads) {
    if (other_mark != first_mark) stop();
    if (first_mark == DONE_MARK) _longjmp(scheduler, 1);
    begin();
    if (order == SHUFFLED) arrange();
  }
  resume();
}

// All threads of the warp must come to the same.
__attribute__((noinline)) void wait_for_warp(int mark) {
  if (_setjmp(fibres[running].at)) return;
  const int warp = running / 32, first = warp * 32, lanes = min(32, threads - first);
  if (gathered[warp]++ && mark != warp_mark[warp]) {
    first_mark = warp_mark[warp], other_mark = mark;
    stop();
  }
  warp_mark[warp] = mark;
  waits[running] = true;
  if (gathered[warp] == lanes) {
    gathered[warp] = 0, warp_mark[warp] = DONE_MARK;
    generation[warp]++;
    memset(waits + first, 0, lanes * sizeof(bool));
  }
  resume();
}

#ifdef __ELF__
extern "C" char __start_emulated_shared[] __attribute__((weak)), __stop_emulated_shared[] __attribute__((weak));
#define EMULATED_SHARED static __attribute__((section("emulated_shared")))
inline void poison() {
  if (__start_emulated_shared)
    memset(__start_emulated_shared, 0xff, __stop_emulated_shared - __start_emulated_shared);
}
#else
#define EMULATED_SHARED static
inline void poison() {}
#endif

// sizes: grid x, y, z, block x, y, z. report: the block where it went wrong and the two marks that met.
inline int launch(void (*kernel)(void**), void** given, const unsigned* sizes, int how, unsigned long long seed, int* report) {
  call = kernel;
  arguments = given;
  grid_size = {sizes[0], sizes[1], sizes[2]};
  block_size = {sizes[3], sizes[4], sizes[5]};
  threads = sizes[3] * sizes[4] * sizes[5];
  order = (Order)how;
  random_state = seed;
  if (!stacks)
    stacks = (char*)mmap(nullptr, THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  static unsigned long long count, start, done;  // static: longjmp leaves them alone
  count = 1ull * sizes[0] * sizes[1] * sizes[2];
  start = order == SHUFFLED ? draw(count > 0xffffffffu ? 0xffffffffu : (unsigned)count) : 0;
  for (done = 0; done < count; done++) {
    unsigned long long i = order == REVERSE ? count - 1 - done : (done + start) % count;
    block = {(unsigned)(i % sizes[0]), (unsigned)(i / sizes[0] % sizes[1]), (unsigned)(i / sizes[0] / sizes[1])};
    poison();
    begin();
    diverged = false;
    for (int& mark : warp_mark) mark = DONE_MARK;
    arrange();
    if (_setjmp(scheduler) == 0) resume();
    if (diverged) {
      for (Fibre& f : fibres) f.born = false;  // they stand in the middle of a kernel
      memset(gathered, 0, sizeof gathered);
      int where[] = {(int)block.x, (int)block.y, (int)block.z, first_mark, other_mark};
      memcpy(report, where, sizeof where);
      return DIVERGED;
    }
  }
  return DONE;
}

// What a parameter takes, in three letters each: p pointer (P to what it may write), and of what; i integer, f floating
// point, b bool, - anything; and the size in bytes, of what it points to or its own.
template <typename T> constexpr char kind() {
  return std::is_same_v<T, bool> ? 'b' : std::is_floating_point_v<T> ? 'f' : std::is_integral_v<T> ? 'i' : '-';
}
template <typename T> constexpr void describe(char* out) {
  if constexpr (std::is_pointer_v<T>) {
    using To = std::remove_pointer_t<T>;
    out[0] = std::is_const_v<To> ? 'p' : 'P';
    out[1] = kind<std::remove_cv_t<To>>();
    if constexpr (std::is_void_v<To>) out[2] = '0'; else out[2] = (char)('0' + sizeof(To));
  } else {
    out[0] = out[1] = kind<T>();
    out[2] = (char)('0' + sizeof(T));
  }
}

template <auto kernel> struct Kernel;
template <typename... P, void (*kernel)(P...)> struct Kernel<kernel> {
  template <size_t... I> static void run(void** given, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_cv_t<P>*>(given[I])...);
  }
  static void enter(void** given) { run(given, std::index_sequence_for<P...>()); }
  static const char* signature() {
    static char letters[3 * sizeof...(P) + 1];
    char* at = letters;
    ((describe<std::remove_cv_t<P>>(at), at += 3), ...);
    return letters;
  }
};

}  // namespace emulated

#define EMULATED_KERNEL(name) \
  extern "C" const char* emulated_signature_##name() { return emulated::Kernel<&kernels::name>::signature(); } \
  extern "C" int emulated_launch_##name(void** given, const unsigned* sizes, int how, unsigned long long seed, int* report) { \
    return emulated::launch(emulated::Kernel<&kernels::name>::enter, given, sizes, how, seed, report); \
  }

#include "mma.h"

#define threadIdx (emulated::thread)
#define blockIdx (emulated::block)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)
#define __syncthreads() emulated::finish_or_wait(__LINE__)
#define __syncwarp() emulated::wait_for_warp(__LINE__)
#define __shared__ EMULATED_SHARED
#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
