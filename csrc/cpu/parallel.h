// Tasks of uneven cost over the workers of an Executor: each worker goes through a range of its own, in order, so that
// what it fetches ahead is what it needs next, and then helps the others.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

constexpr int kMaxRanges = 64;

template <class F>
void parallel_tasks(const Executor& executor, int64_t tasks, const F& task) {
  const int workers = tasks < executor.workers ? static_cast<int>(tasks) : executor.workers;
  if (workers <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i, 0);
    return;
  }
  struct alignas(64) Range {
    int64_t next, end;
  };
  struct Context {
    const F* task;
    int count;
    Range ranges[kMaxRanges];
  } context;
  context.task = &task;
  context.count = workers < kMaxRanges ? workers : kMaxRanges;
  for (int i = 0; i < context.count; ++i)
    context.ranges[i] = {tasks * i / context.count, tasks * (i + 1) / context.count};
  executor.run(
      workers,
      [](void* p, int worker) {
        Context& c = *static_cast<Context*>(p);
        for (int i = 0; i < c.count; ++i) {
          Range& range = c.ranges[(worker + i) % c.count];
          for (int64_t t; (t = __atomic_fetch_add(&range.next, 1, __ATOMIC_RELAXED)) < range.end;) (*c.task)(t, worker);
        }
      },
      &context);
}

FASTBERT_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTBERT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTBERT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace FASTBERT_ISA
}  // namespace fastbert
