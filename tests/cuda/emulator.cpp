#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>

#include "emulation.h"
#include "cuda/launch.h"

uint3 threadIdx, blockIdx, blockDim, gridDim;

// Fibers. swapcontext() saves the signal mask, a system call, so there is a shorter way where that was written.
#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
extern "C" void emulator_swap(void** from, void* to);
asm(R"(
.text
.globl emulator_swap
.hidden emulator_swap
.type emulator_swap, @function
emulator_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
.size emulator_swap, .-emulator_swap
)");
using Context = void*;
void start_context(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + size);
  *--top = nullptr;  // entry's return address, by which entry finds the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  context = top;
}
void swap_context(Context& from, Context& to) { emulator_swap(&from, to); }
#else
#include <ucontext.h>
using Context = ucontext_t;
void start_context(Context& context, unsigned char* stack, size_t size, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = size;
  makecontext(&context, entry, 0);
}
void swap_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

namespace emulation {
namespace {

constexpr unsigned kThreads = 1024, kWarps = 32, kHost = kThreads;  // kHost: the context that called cuda_launch
constexpr size_t kStack = 256 * 1024, kMostShared = 227 * 1024;

// What a thread waits in, or is about to.
struct Call {
  const char* name;
  unsigned mask;  // the lanes of its warp that it needs; at a barrier only itself
  Site site;
};

// Lanes that wait for each other: those of `mask` that have arrived.
struct Group {
  const char* name;
  unsigned mask, arrived;
};

struct Warp {
  unsigned exited, waiting, at_barrier;
  unsigned named;    // the masks of all groups that wait, which have no lane in common
  Group groups[32];  // by the lowest lane of the mask
  Call calls[32];
  uint64_t values[32], results[32];
  unsigned char sources[32];
};

struct Barrier {
  unsigned arrived, votes, result;
  unsigned first;  // the thread that arrived first, and its call
  Call call;
};

std::mutex launching, mapping;
Schedule schedule = Schedule::kInOrder;
uint64_t random_state;
int multiprocessors = 3;

const Kernel* kernel;
void** params;
Context contexts[kThreads + 1];
unsigned char* stacks[kThreads];
Warp warps[kWarps];
Barrier barrier;
unsigned ready[kWarps], ready_warps;  // threads that could go on, and warps that have some
unsigned current = kHost, live;
unsigned char *all_shared, *shared;
char error[1024];
std::map<void*, std::pair<void*, size_t>> mappings;

unsigned random_bits() {  // splitmix64
  uint64_t bits = random_state += 0x9e3779b97f4a7c15;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
  return static_cast<unsigned>(bits >> 32);
}

unsigned choose(unsigned from) {
  if (schedule == Schedule::kInOrder) return __builtin_ctz(from);
  if (schedule == Schedule::kReversed) return 31 - __builtin_clz(from);
  const unsigned shift = random_bits() % 32;
  return (__builtin_ctz(from >> shift | from << (32 - shift) % 32) + shift) % 32;
}

void resume(unsigned next) {
  const unsigned from = current;
  current = threadIdx.x = next;
  swap_context(contexts[from], contexts[next]);
}

void make_ready(unsigned warp, unsigned lanes) {
  if (lanes == 0) return;
  warps[warp].waiting &= ~lanes;
  ready[warp] |= lanes;
  ready_warps |= 1u << warp;
}

// Lets others run until this thread is chosen again.
void yield() {
  // Not known to happen: lanes that wait for a lane that will not come are found when either arrives.
  if (ready_warps == 0) fail({}, "deadlock: no thread can go on");
  const unsigned warp = choose(ready_warps), lane = choose(ready[warp]);
  ready[warp] &= ~(1u << lane);
  if (ready[warp] == 0) ready_warps &= ~(1u << warp);
  if (warp * 32 + lane != current) resume(warp * 32 + lane);
}

void open_barrier() {
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    make_ready(w, warps[w].at_barrier);
    warps[w].at_barrier = 0;
  }
  barrier.result = barrier.votes;
  barrier.arrived = barrier.votes = 0;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

const char* file_name(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return slash == nullptr ? site.file : slash + 1;
}

[[noreturn]] void diverge(const Call& mine, unsigned thread, const Call& other) {
  fail(mine.site, "divergent collective: %s (mask %#x) while thread %u waits at %s (mask %#x), %s:%u", mine.name,
       mine.mask, thread, other.name, other.mask, file_name(other.site), other.site.line);
}

// A lane that this call needs, or that needs this lane, waits for something else.
[[noreturn]] void diverge(const Warp& warp, const Call& mine) {
  unsigned lane = 0;
  while (!(warp.waiting >> lane & 1) || !(warp.calls[lane].mask & mine.mask)) ++lane;
  diverge(mine, current / 32 * 32 + lane, warp.calls[lane]);
}

void exchange(Op op, Warp& warp, unsigned mask) {
  uint64_t all = op == Op::kMin || op == Op::kMax ? warp.values[__builtin_ctz(mask)] : 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const uint64_t value = warp.values[lane];
    const bool less = static_cast<int64_t>(value) < static_cast<int64_t>(all);
    if (op == Op::kShuffle) warp.results[lane] = warp.values[warp.sources[lane]];
    if (op == Op::kVote) all |= value << lane;
    if (op == Op::kAdd) all += value;
    if (op == Op::kMin ? less : op == Op::kMax && !less) all = value;
  }
  if (op == Op::kShuffle || op == Op::kSync) return;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) warp.results[__builtin_ctz(rest)] = all;
}

void run_thread() {
  bool threw = false;
  try {
    kernel->call(params);
  } catch (...) {  // left before fail() leaves this stack for good
    threw = true;
  }
  if (threw) fail({}, "an exception left the kernel");
  Warp& warp = warps[current / 32];
  const unsigned bit = 1u << current % 32;
  if (warp.named & bit) diverge(warp, {"the kernel's end", bit, {}});
  warp.exited |= bit;
  if (--live == 0) resume(kHost);
  if (barrier.arrived == live) open_barrier();
  yield();
}

void run_block(unsigned shared_bytes) {
  unsigned char* const end = all_shared + kMostShared;
  shared = end - (shared_bytes + 15) / 16 * 16;
  std::memset(shared, 0xff, end - shared);
  barrier = {};
  ready_warps = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    warps[w] = {};
    ready[w] = 0;
    make_ready(w, ~0u);
  }
  for (unsigned t = 0; t < blockDim.x; ++t) {
    if (stacks[t] == nullptr) stacks[t] = static_cast<unsigned char*>(guarded(kStack));
    // Tops at the same offset in every page would compete for a few sets of the cache.
    start_context(contexts[t], stacks[t], kStack - t % 61 * 320, run_thread);
  }
  live = blockDim.x;
  yield();
  for (const unsigned char* byte = shared + shared_bytes; byte < end && error[0] == 0; ++byte)
    if (*byte != 0xff) fail({}, "a write past the end of shared memory");
}

std::runtime_error refused(const gradsel::Launch& launch, const std::string& why) {
  return std::runtime_error("kernel " + std::string(launch.kernel) + ": " + why);
}

}  // namespace

void fail(Site here, const char* format, ...) {
  int length = std::snprintf(error, sizeof(error), "kernel %s, block %u, ", kernel->name, blockIdx.x);
  if (current != kHost) length += std::snprintf(error + length, sizeof(error) - length, "thread %u, ", current);
  if (here.file) length += std::snprintf(error + length, sizeof(error) - length, "%s:%u, ", file_name(here), here.line);
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error + length - 2, sizeof(error) - length + 2, (std::string(": ") + format).c_str(), arguments);
  va_end(arguments);
  if (current == kHost) throw std::runtime_error(error);
  resume(kHost);
  __builtin_unreachable();
}

uint64_t meet_warp(Op op, const char* name, unsigned mask, uint64_t value, unsigned source, Site here) {
  Warp& warp = warps[current / 32];
  const unsigned lane = current % 32, bit = 1u << lane;
  if (!(mask & bit)) fail(here, "%s with mask %#x, which has not the caller", name, mask);
  if (mask & warp.exited)
    fail(here, "%s with mask %#x, whose lane %d has exited", name, mask, __builtin_ctz(mask & warp.exited));
  if (op == Op::kShuffle && !(mask >> source & 1))
    fail(here, "%s from lane %u, which mask %#x has not", name, source, mask);
  Group& group = warp.groups[__builtin_ctz(mask)];
  warp.calls[lane] = {name, mask, here};
  if (group.arrived == 0) {
    if (mask & (warp.named | warp.at_barrier)) diverge(warp, warp.calls[lane]);
    group = {name, mask, 0};
    warp.named |= mask;
  } else if (group.mask != mask || !same(group.name, name)) {
    diverge(warp, warp.calls[lane]);
  }
  warp.values[lane] = value;
  warp.sources[lane] = static_cast<unsigned char>(source);
  warp.waiting |= bit;
  group.arrived |= bit;
  if (group.arrived == mask) {
    exchange(op, warp, mask);
    group.arrived = 0;
    warp.named &= ~mask;
    make_ready(current / 32, mask);
  }
  yield();
  return warp.results[lane];
}

unsigned meet_block(const char* name, bool predicate, Site here) {
  Warp& warp = warps[current / 32];
  const unsigned lane = current % 32, bit = 1u << lane;
  const Call& call = warp.calls[lane] = {name, bit, here};
  if (warp.named & bit) diverge(warp, call);
  if (barrier.arrived == 0) {
    barrier.first = current;
    barrier.call = call;
  } else if (barrier.call.site.line != here.line || !same(barrier.call.name, name) ||
             !same(barrier.call.site.file, here.file)) {
    diverge(call, barrier.first, barrier.call);
  }
  warp.waiting |= bit;
  warp.at_barrier |= bit;
  barrier.votes += predicate;
  if (++barrier.arrived == live) open_barrier();
  yield();
  return barrier.result;
}

void set_schedule(Schedule which, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(launching);
  schedule = which;
  random_state = seed;
}

void set_multiprocessors(int count) { multiprocessors = count; }

void* guarded(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), inside = (bytes + page - 1) / page * page;
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* mapped = mmap(nullptr, inside + 2 * page, PROT_NONE, flags, -1, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("no memory between unreadable pages is to be had");
  auto* begin = static_cast<unsigned char*>(mapped) + page;
  if (inside != 0 && mprotect(begin, inside, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect failed");
  const std::lock_guard<std::mutex> lock(mapping);
  mappings[begin + inside - bytes] = {mapped, inside + 2 * page};
  return begin + inside - bytes;
}

void release(void* memory) {
  const std::lock_guard<std::mutex> lock(mapping);
  const auto found = mappings.find(memory);
  if (found == mappings.end()) throw std::runtime_error("this memory did not come from guarded()");
  munmap(found->second.first, found->second.second);
  mappings.erase(found);
}

}  // namespace emulation

// The kernels are compiled with checks of what g++ and a GPU do differently, or only a GPU refuses. Not libubsan's
// functions, but these, are what a failed check calls.
#define CHECK(name, what)                                                              \
  extern "C" [[noreturn]] void __ubsan_handle_##name##_abort(const emulation::Site* site) { \
    emulation::fail(*site, what);                                                      \
  }
CHECK(type_mismatch_v1, "a misaligned address")
CHECK(out_of_bounds, "an index out of an array's bounds")
CHECK(shift_out_of_bounds, "a shift by as many bits as there are, or more")
CHECK(divrem_overflow, "a division by zero, or one that overflows")
CHECK(float_cast_overflow, "a float out of the range of the integer that it becomes")

unsigned char* emulated_shared_memory() { return emulation::shared; }

namespace gradsel {

void cuda_launch(const Launch& launch, void** params) {
  using namespace emulation;
  const std::lock_guard<std::mutex> lock(launching);
  kernel = kernels;
  while (kernel->name != nullptr && std::strcmp(kernel->name, launch.kernel) != 0) ++kernel;
  if (kernel->name == nullptr) throw refused(launch, "there is no such kernel");
  if (launch.block == 0 || launch.block > kThreads || launch.block % 32 != 0)
    throw refused(launch, "a block has " + std::to_string(launch.block) + " threads, not a multiple of 32 up to 1024");
  if (launch.grid == 0 || launch.grid > 0x7fffffff)
    throw refused(launch, "a grid has " + std::to_string(launch.grid) + " blocks, not 1 to 2^31 - 1");
  if (launch.shared_bytes > kMostShared)
    throw refused(launch, std::to_string(launch.shared_bytes) + " bytes of shared memory are more than 227 KiB");
  if (all_shared == nullptr) all_shared = static_cast<unsigned char*>(guarded(kMostShared));
  emulation::params = params;
  gridDim = {launch.grid, 1, 1};
  blockDim = {launch.block, 1, 1};
  error[0] = 0;
  // Steps that have no factor in common with the number of blocks come to every block once.
  const bool reversed = schedule == Schedule::kReversed;
  uint64_t step = reversed ? launch.grid - 1 : 1, block = reversed ? launch.grid - 1 : 0;
  if (schedule == Schedule::kRandom) {
    do step = random_bits();
    while (std::gcd<uint64_t>(step, launch.grid) != 1);
    block = random_bits() % launch.grid;
  }
  for (unsigned i = 0; i < launch.grid; ++i, block = (block + step) % launch.grid) {
    blockIdx = {static_cast<unsigned>(block), 0, 0};
    run_block(launch.shared_bytes);
    if (error[0] != 0) throw std::runtime_error(error);
  }
}

int cuda_multiprocessors(int) { return emulation::multiprocessors; }

}  // namespace gradsel
