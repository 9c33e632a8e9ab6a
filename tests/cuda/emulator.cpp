#include "emulator.h"

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fastbert::emulator {
namespace {

constexpr size_t kStack = 256 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf context;
  unsigned thread;
  bool started, done;
  std::vector<Copy> open;                  // cp.async not yet in a group
  std::deque<std::vector<Copy>> groups;
  int collectives;                         // how many this lane has taken part in
};

struct Warp {
  Offer offers[2][32];
  const char* operation[2];
  int arrived[2];
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<char> shared;
char* shared_begin;
jmp_buf scheduler;
Fiber* running;
const std::function<void()>* body;
std::exception_ptr failure;
int at_barrier, barriers, alive, living_lanes[64];
bool progress;
int64_t conflicts;

void yield() {
  Fiber* self = running;
  if (_setjmp(self->context) == 0) _longjmp(scheduler, 1);
}

// Whatever changes what another fiber may wait for counts as progress.
template <class Condition>
void wait_until(const Condition& condition) {
  while (!condition()) yield();
  progress = true;
}

void entry() {
  try {
    (*body)();
    if (!running->open.empty()) throw std::runtime_error("a thread ended with copies that it had not committed");
  } catch (...) {
    if (!failure) failure = std::current_exception();
  }
  running->done = true;
  progress = true;
  --alive;
  --living_lanes[running->thread / 32];
  _longjmp(scheduler, 1);
}

void resume(Fiber* fiber) {
  running = fiber;
  threadIdx = dim3(fiber->thread);
  if (_setjmp(scheduler) != 0) return;
  if (fiber->started) _longjmp(fiber->context, 1);
  fiber->started = true;
  setcontext(&fiber->start);
}

enum class Order { kForward, kReverse, kAhead };

void run_block(const char* name, int threads, Order order) {
  std::memset(shared_begin, 0xff, shared.size() - 256);
  at_barrier = barriers = 0, alive = threads;
  warps.assign((threads + 31) / 32, Warp{});
  for (size_t w = 0; w < warps.size(); ++w) living_lanes[w] = 32;
  for (int t = 0; t < threads; ++t) {
    Fiber& f = *fibers[t];
    f.thread = t, f.started = f.done = false, f.collectives = 0;
    f.open.clear(), f.groups.clear();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = kStack, f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
  while (alive > 0 && !failure) {
    bool any = false;
    for (int w = 0; w < threads / 32; ++w) {
      do {
        progress = false;
        for (int i = 32 * w; i < 32 * w + 32 && !failure; ++i) {
          Fiber* f = fibers[order == Order::kReverse ? threads - 1 - i : i].get();
          if (!f->done) resume(f);
        }
        any |= progress;
      } while (order == Order::kAhead && progress);
    }
    if (!any) throw std::runtime_error(std::string(name) + ": threads wait for each other for ever");
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace

void run(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads % 32 != 0 || threads > 1024) throw std::runtime_error("a block must be of whole warps, at most 1024 threads");
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  shared.resize(shared_bytes + 256);
  shared_begin = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(shared.data()) + 255) / 256 * 256);
  const char* wish = std::getenv("FASTBERT_EMULATOR_ORDER");
  const std::string named = wish == nullptr ? "forward" : wish;
  const Order order = named == "reverse" ? Order::kReverse : named == "ahead" ? Order::kAhead : Order::kForward;
  body = &kernel, failure = nullptr, gridDim = grid, blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(name, threads, order);
    }
}

char* shared_memory() { return shared_begin; }

void barrier() {
  const int mine = barriers;
  progress = true;
  if (++at_barrier == static_cast<int>(blockDim.x)) {
    at_barrier = 0, ++barriers;
  } else {
    if (alive < static_cast<int>(blockDim.x)) throw std::runtime_error("a barrier after some threads have ended");
    wait_until([mine] { return barriers > mine; });
  }
}

const Offer* exchange(const char* operation, const Offer& mine) {
  Fiber* self = running;
  Warp& warp = warps[self->thread / 32];
  const int lane = static_cast<int>(self->thread % 32), which = self->collectives++ % 2;
  if (living_lanes[self->thread / 32] < 32) throw std::runtime_error("a collective after some lanes have ended");
  if (warp.arrived[which] % 32 != 0 && std::strcmp(warp.operation[which], operation) != 0)
    throw std::runtime_error(std::string("lanes of a warp meet in different operations, ") + operation + " and " +
                             warp.operation[which]);
  warp.operation[which] = operation;
  warp.offers[which][lane] = mine;
  progress = true;
  const int round = warp.arrived[which]++ / 32;
  wait_until([&warp, which, round] { return warp.arrived[which] / 32 > round; });
  return warp.offers[which];
}

void copy_async(void* to, const void* from, int bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    throw std::runtime_error("cp.async: an address is not a multiple of 16");
  std::memset(to, 0xff, 16);
  running->open.push_back({to, from, bytes});
}

void commit_copies() {
  running->groups.push_back(std::move(running->open));
  running->open.clear();
}

void wait_for_copies(int pending_groups) {
  auto& groups = running->groups;
  while (static_cast<int>(groups.size()) > pending_groups) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, 16);
      if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

int64_t take_bank_conflicts() {
  const int64_t found = conflicts;
  conflicts = 0;
  return found;
}

void load_matrices(bool transposed, const void* row, uint32_t (&to)[4]) {
  const char* address = static_cast<const char*>(row);
  if (address < shared_begin || address + 16 > shared.data() + shared.size())
    throw std::runtime_error("ldmatrix: a row lies outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("ldmatrix: a row is not at a multiple of 16");
  const Offer* offers = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", {{}, row});
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int r, int c) {
      return static_cast<uint32_t>(static_cast<const uint16_t*>(offers[8 * matrix + r].address)[c]);
    };
    to[matrix] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                            : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    bool taken[8] = {};
    for (int r = 0; r < 8 && lane() == 0; ++r) {
      bool& bank = taken[reinterpret_cast<uintptr_t>(offers[8 * matrix + r].address) / 16 % 8];
      conflicts += bank;
      bank = true;
    }
  }
}

void multiply_add(bool is_bf16, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const Offer* offers = exchange("mma", {{a[0], a[1], a[2], a[3], b0, b1}, nullptr});
  const auto half = [&](uint32_t word, int k) {
    const uint16_t bits = static_cast<uint16_t>(k % 2 ? word >> 16 : word);
    return is_bf16 ? bf16_value(bits) : fp16_value(bits);
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    float sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int owner = k % 8 / 2;
      const uint32_t left = offers[row % 8 * 4 + owner].words[row / 8 + k / 8 * 2];
      const uint32_t right = offers[column * 4 + owner].words[4 + k / 8];
      sum += half(left, k) * half(right, k);
    }
    c[i] = sum;
  }
}

uint16_t bf16_bits(float value) { return c10::BFloat16(value).x; }
uint16_t fp16_bits(float value) { return c10::Half(value).x; }
float bf16_value(uint16_t bits) { return c10::BFloat16(bits, c10::BFloat16::from_bits()); }
float fp16_value(uint16_t bits) { return c10::Half(bits, c10::Half::from_bits()); }

}  // namespace fastbert::emulator

// For tests, through ctypes.
extern "C" __attribute__((visibility("default"))) int64_t fastbert_take_bank_conflicts() {
  return fastbert::emulator::take_bank_conflicts();
}
