#include "emulator.h"

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks
#include <setjmp.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
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

// A multiplication that was started, and what the thread had of a in its registers then.
struct Product : Multiplication {
  uint32_t kept[4];

  bool is_like(const Product& other) const {
    return is_bf16 == other.is_bf16 && (words == nullptr) == (other.words == nullptr) && add == other.add && n == other.n &&
           is_same(a, other.a) && is_same(b, other.b);
  }
  static bool is_same(const Operand& one, const Operand& other) {
    return one.descriptor == other.descriptor && one.by_rows == other.by_rows;
  }
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf context;
  unsigned thread;
  bool started, done;
  std::vector<Copy> open;                  // cp.async not yet in a group
  std::deque<std::vector<Copy>> groups;
  bool begun;                              // begin_products since the last wait
  std::vector<Product> open_products;
  std::deque<std::vector<Product>> products;
  std::map<float*, std::vector<float>> results;  // of products, until they are waited for
  int collectives;                         // how many this lane has taken part in
  std::vector<const char*> unpublished;    // 16 bytes each that it wrote, for wgmma to read
};

struct Warp {
  Offer offers[2][32];
  const char* operation[2];
  int arrived[2];
};

struct Box {
  TensorMap map;
  char* to;
  int row, column;
};

struct PhasedBarrier {
  int arrivals, missing;   // to a phase, in this one
  int64_t bytes;           // announced in this phase and not there
  uint32_t phase;
  std::vector<Box> boxes;  // under way
};

struct NamedBarrier {
  int threads, arrived, waiting;
  int64_t rounds;
};

// What a block may have at most, and a place for it where the lower 18 bits of an address are those of a GPU's.
constexpr size_t kShared = 227 << 10, kWindow = 1 << 18;

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::map<const void*, PhasedBarrier> phased_barriers;
NamedBarrier named_barriers[16];
std::multiset<const char*> unpublished;  // of all threads
int64_t group_waits[8];  // threads of each warp group that have come to wait for products
char* const window = static_cast<char*>(std::aligned_alloc(kWindow, kWindow));
char *shared_begin, *shared_end;
jmp_buf scheduler;
Fiber* running;
const std::function<void()>* body;
std::exception_ptr failure;
int at_barrier, barriers, alive, living_lanes[64];
bool progress;
int64_t conflicts, boxes_landed;

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
    if (!running->results.empty()) throw std::runtime_error("a thread ended with products that it had not waited for");
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

enum class Order { kForward, kReverse, kAhead, kPriority, kLate };

void run_block(const char* name, int threads, Order order, int late) {
  std::memset(shared_begin, 0xff, shared_end - shared_begin);
  phased_barriers.clear();
  unpublished.clear();
  for (NamedBarrier& barrier : named_barriers) barrier = {};
  for (int64_t& waits : group_waits) waits = 0;
  at_barrier = barriers = 0, alive = threads;
  warps.assign((threads + 31) / 32, Warp{});
  for (size_t w = 0; w < warps.size(); ++w) living_lanes[w] = 32;
  for (int t = 0; t < threads; ++t) {
    Fiber& f = *fibers[t];
    f.thread = t, f.started = f.done = false, f.collectives = 0;
    f.open.clear(), f.groups.clear(), f.open_products.clear(), f.products.clear(), f.results.clear();
    f.begun = false, f.unpublished.clear();
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get(), f.start.uc_stack.ss_size = kStack, f.start.uc_link = nullptr;
    makecontext(&f.start, entry, 0);
  }
  const int count = threads / 32;
  while (alive > 0 && !failure) {
    bool any = false;
    for (int i = 0; i < count; ++i) {
      const bool is_last = i == count - 1;
      const int w = order == Order::kPriority ? count - 1 - i
                    : order == Order::kLate   ? (is_last ? late % count : i + (i >= late % count))
                                              : i;
      if (order == Order::kLate && is_last && any) break;
      do {
        progress = false;
        for (int j = 32 * w; j < 32 * w + 32 && !failure; ++j) {
          Fiber* f = fibers[order == Order::kReverse ? threads - 1 - j : j].get();
          if (!f->done) resume(f);
        }
        any |= progress;
      } while (order == Order::kAhead && progress);
      if (order == Order::kPriority && any) break;
    }
    if (!any) throw std::runtime_error(std::string(name) + ": threads wait for each other for ever");
  }
  if (failure) std::rethrow_exception(failure);
  for (const auto& [where, barrier] : phased_barriers)
    if (!barrier.boxes.empty()) throw std::runtime_error(std::string(name) + ": a box was under way when its block ended");
  for (const NamedBarrier& barrier : named_barriers)
    if (barrier.arrived > 0) throw std::runtime_error(std::string(name) + ": a block ended within a round of a barrier");
}

bool inside_shared(const void* p, int64_t bytes) { return p >= shared_begin && static_cast<const char*>(p) + bytes <= shared_end; }

// The place in shared memory where TMA and wgmma have the byte of an unexchanged layout, whose rows are `pitch` bytes.
char* exchanged(const char* p, int pitch) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(p), mask = pitch / 16 - 1;
  return reinterpret_cast<char*>(at ^ ((at >> 7 & mask) << 4));
}

void land(const Box& box) {
  ++boxes_landed;
  const int pitch = 2 * box.map.box_columns;
  for (int r = 0; r < box.map.box_rows; ++r)
    for (int c = 0; c < box.map.box_columns; ++c) {
      const int64_t row = box.row + r, column = box.column + c;
      const bool inside = row >= 0 && row < box.map.rows && column >= 0 && column < box.map.columns;
      const uint16_t value =
          inside ? static_cast<const uint16_t*>(box.map.data)[row * box.map.columns + column] : uint16_t(0);
      std::memcpy(exchanged(box.to + r * pitch + 2 * c, pitch), &value, 2);
    }
}

PhasedBarrier& phased_barrier(const void* where) {
  const auto found = phased_barriers.find(where);
  if (found == phased_barriers.end()) throw std::runtime_error("a barrier that was not made");
  return found->second;
}

void end_phase_if_complete(PhasedBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.missing = barrier.arrivals;
  ++barrier.phase;
  progress = true;
}

// wgmma's operand, at row (or column) `row` and k, by its descriptor: the canonical layouts of CuTe's
// mma_traits_sm90_gmma.hpp.
uint16_t described(const Operand& operand, int row, int k) {
  const auto [descriptor, by_rows] = operand;
  const int kind = static_cast<int>(descriptor >> 62);
  if (kind != 1 && kind != 2) throw std::runtime_error("wgmma: an operand that is not exchanged by 128 or 64 bytes");
  const int pitch = kind == 1 ? 128 : 64;
  const auto field = [&](int bit) { return static_cast<int64_t>(descriptor >> bit & 0x3fff) * 16; };
  const int64_t leading = field(16), stride = field(32);
  if ((descriptor & 0x3fffc000c000c000) != 0) throw std::runtime_error("wgmma: a field of a descriptor that is not ours");
  const int64_t offset = by_rows ? row / 8 * stride + row % 8 * pitch + k * 2
                                 : row * 2 / pitch * leading + row * 2 % pitch + k / 8 * stride + k % 8 * pitch;
  const char* at = exchanged(window + field(0) + offset, pitch);
  if (!inside_shared(at, 2)) throw std::runtime_error("wgmma: an operand lies outside shared memory");
  if (unpublished.count(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(at) & ~uintptr_t{15})) > 0)
    throw std::runtime_error("wgmma: an operand that its writer has not published");
  uint16_t value;
  std::memcpy(&value, at, 2);
  return value;
}

// One product of the warp group whose threads begin with `first`; `which` of their oldest group.
void form(int first, size_t which) {
  const Product& product = fibers[first]->products.front()[which];
  const int columns = 8 * product.n;
  const auto value = [&](uint16_t bits) { return product.is_bf16 ? bf16_value(bits) : fp16_value(bits); };
  std::vector<float> a(64 * 16), b(16 * columns);
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      uint16_t bits;
      if (product.words != nullptr) {
        const Fiber& owner = *fibers[first + row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
        const uint32_t word = owner.products.front()[which].kept[row % 16 / 8 + k / 8 * 2];
        bits = static_cast<uint16_t>(k % 2 ? word >> 16 : word);
      } else {
        bits = described(product.a, row, k);
      }
      a[row * 16 + k] = value(bits);
    }
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < columns; ++column)
      b[k * columns + column] = value(described(product.b, column, k));
  std::vector<float> sums(columns);
  for (int row = 0; row < 64; ++row) {
    sums.assign(columns, 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < columns; ++column) sums[column] += a[row * 16 + k] * b[k * columns + column];
    for (int column = 0; column < columns; ++column) {
      Fiber& owner = *fibers[first + row / 16 * 32 + row % 8 * 4 + column % 8 / 2];
      const Product& own = owner.products.front()[which];
      if (!own.is_like(product)) throw std::runtime_error("wgmma: threads of a warp group differ in what they multiply");
      float& c = owner.results.at(own.c)[column / 8 * 4 + row % 16 / 8 * 2 + column % 2];
      c = own.add ? c + sums[column] : sums[column];
    }
  }
}

}  // namespace

int capability() {
  const char* wish = std::getenv("FASTBERT_EMULATOR_CAPABILITY");
  return wish == nullptr ? 80 : std::atoi(wish);
}

void run(const char* name, dim3 grid, int threads, int shared_bytes, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads % 32 != 0 || threads > 1024) throw std::runtime_error("a block must be of whole warps, at most 1024 threads");
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  if (static_cast<size_t>(shared_bytes) > kShared) throw std::runtime_error(std::string(name) + ": too much shared memory");
  shared_begin = window + 256, shared_end = shared_begin + shared_bytes;
  const char* wish = std::getenv("FASTBERT_EMULATOR_ORDER");
  const std::string named = wish == nullptr ? "forward" : wish;
  const Order order = named == "reverse"            ? Order::kReverse
                      : named == "ahead"            ? Order::kAhead
                      : named == "priority"         ? Order::kPriority
                      : named.rfind("late", 0) == 0 ? Order::kLate
                                                    : Order::kForward;
  const int late = order == Order::kLate ? std::atoi(named.c_str() + 4) : 0;
  body = &kernel, failure = nullptr, gridDim = grid, blockDim = dim3(threads);
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned block = order == Order::kReverse ? blocks - 1 - i : i;
    blockIdx = dim3(block % grid.x, block / grid.x);
    run_block(name, threads, order, late);
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

int64_t take_bank_conflicts() { return std::exchange(conflicts, 0); }
int64_t take_boxes() { return std::exchange(boxes_landed, 0); }

// Of four times eight rows that a warp reads or writes.
void count_conflicts(const Offer* offers) {
  for (int matrix = 0; matrix < 4 && lane() == 0; ++matrix) {
    bool taken[8] = {};
    for (int r = 0; r < 8; ++r) {
      bool& bank = taken[reinterpret_cast<uintptr_t>(offers[8 * matrix + r].address) / 16 % 8];
      conflicts += bank;
      bank = true;
    }
  }
}

void load_matrices(bool transposed, const void* row, uint32_t (&to)[4]) {
  const char* address = static_cast<const char*>(row);
  if (!inside_shared(address, 16)) throw std::runtime_error("ldmatrix: a row lies outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("ldmatrix: a row is not at a multiple of 16");
  const Offer* offers = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", {{}, row});
  const int g = lane() / 4, t = lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](int r, int c) {
      return static_cast<uint32_t>(static_cast<const uint16_t*>(offers[8 * matrix + r].address)[c]);
    };
    to[matrix] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                            : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
  count_conflicts(offers);
}

void store_matrices(void* row, const uint32_t (&from)[4]) {
  if (!inside_shared(row, 16)) throw std::runtime_error("stmatrix: a row lies outside shared memory");
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) throw std::runtime_error("stmatrix: a row is not at a multiple of 16");
  const Offer* offers = exchange("stmatrix", {{from[0], from[1], from[2], from[3]}, row});
  for (int matrix = 0; matrix < 4; ++matrix) {
    char* const to = static_cast<char*>(const_cast<void*>(offers[8 * matrix + lane() / 4].address));
    std::memcpy(to + lane() % 4 * 4, &from[matrix], 4);
  }
  running->unpublished.push_back(static_cast<const char*>(row));
  unpublished.insert(static_cast<const char*>(row));
  count_conflicts(offers);
}

void add_to_memory(float* to, float4 value) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) throw std::runtime_error("red: an address is not a multiple of 16");
  to[0] += value.x, to[1] += value.y, to[2] += value.z, to[3] += value.w;
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

void init_barrier(const void* where, int arrivals) {
  if (!inside_shared(where, 8) || reinterpret_cast<uintptr_t>(where) % 8 != 0)
    throw std::runtime_error("a barrier that is not at a multiple of 8 in shared memory");
  if (!phased_barriers.emplace(where, PhasedBarrier{arrivals, arrivals, 0, 0, {}}).second)
    throw std::runtime_error("a barrier was made twice");
}

void arrive(const void* where, int bytes) {
  PhasedBarrier& barrier = phased_barrier(where);
  if (barrier.missing == 0) throw std::runtime_error("more arrivals at a barrier than it was made for");
  barrier.bytes += bytes;
  --barrier.missing;
  progress = true;
  end_phase_if_complete(barrier);
}

void wait_for_phase(const void* where, uint32_t parity) {
  PhasedBarrier& barrier = phased_barrier(where);
  wait_until([&] {
    for (const Box& box : barrier.boxes) {
      land(box);
      barrier.bytes -= 2 * box.map.box_rows * box.map.box_columns;
    }
    const bool landed = !barrier.boxes.empty();
    barrier.boxes.clear();
    if (landed) end_phase_if_complete(barrier);
    return (barrier.phase & 1) != parity;
  });
}

void named_barrier(int number, int threads, bool waits) {
  NamedBarrier& barrier = named_barriers[number];
  if (barrier.arrived > 0 && barrier.threads != threads) throw std::runtime_error("a barrier with two numbers of threads");
  barrier.threads = threads;
  progress = true;
  const int64_t round = barrier.rounds;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.rounds;
  if (waits) wait_until([&barrier, round] { return barrier.rounds > round; });
}

void load_box(const TensorMap& map, const void* where, void* to, int row, int column) {
  const int pitch = 2 * map.box_columns, bytes = map.box_rows * pitch;
  if ((pitch != 128 && pitch != 64) || map.box_rows > 256 || map.columns % 8 != 0 ||
      reinterpret_cast<uintptr_t>(map.data) % 16 != 0)
    throw std::runtime_error("a matrix, or a box of it, that TMA does not take");
  if (!inside_shared(to, bytes) || reinterpret_cast<uintptr_t>(to) % 128 != 0)
    throw std::runtime_error("a box for a place that is not at a multiple of 128 in shared memory");
  std::memset(to, 0xff, bytes);
  phased_barrier(where).boxes.push_back({map, static_cast<char*>(to), row, column});
}

void publish_to_async() {
  for (const char* row : running->unpublished) unpublished.erase(unpublished.find(row));
  running->unpublished.clear();
}

void begin_products() { running->begun = true; }

void multiply_async(const Multiplication& multiplication) {
  Fiber* self = running;
  if (!self->begun) throw std::runtime_error("wgmma: registers that were not fenced");
  Product product{multiplication, {}};
  if (product.words != nullptr) std::memcpy(product.kept, product.words, sizeof product.kept);
  float* const c = product.c;
  if (self->results.find(c) == self->results.end()) {
    self->results[c].assign(c, c + 4 * product.n);
    std::memset(c, 0xff, sizeof(float) * 4 * product.n);
  }
  self->open_products.push_back(product);
}

void commit_products() {
  running->products.push_back(std::move(running->open_products));
  running->open_products.clear();
  running->begun = false;
}

// The last thread of a warp group to come forms the products of all. A GPU's warps need not wait for each other here.
void wait_for_products(int pending_groups) {
  Fiber* self = running;
  if (!self->open_products.empty()) throw std::runtime_error("wgmma: a wait with products that were not committed");
  const int first = static_cast<int>(self->thread / 128 * 128);
  int64_t& waits = group_waits[first / 128];
  const int64_t round = waits / 128;
  progress = true;
  if (++waits % 128 == 0) {
    while (static_cast<int>(fibers[first]->products.size()) > pending_groups) {
      const size_t count = fibers[first]->products.front().size();
      for (int t = first; t < first + 128; ++t)
        if (fibers[t]->products.size() != fibers[first]->products.size() || fibers[t]->products.front().size() != count)
          throw std::runtime_error("wgmma: threads of a warp group differ in how much they multiply");
      for (size_t which = 0; which < count; ++which) form(first, which);
      for (int t = first; t < first + 128; ++t) fibers[t]->products.pop_front();
    }
  }
  wait_until([&waits, round] { return waits / 128 > round; });
  const auto under_way = [self](const float* c) {
    for (const auto& group : self->products)
      for (const Product& product : group)
        if (product.c == c) return true;
    return false;
  };
  for (auto result = self->results.begin(); result != self->results.end();) {
    if (under_way(result->first)) {
      ++result;
    } else {
      std::copy(result->second.begin(), result->second.end(), result->first);
      result = self->results.erase(result);
    }
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
extern "C" __attribute__((visibility("default"))) int64_t fastbert_take_boxes() { return fastbert::emulator::take_boxes(); }
