// Tasks of uneven cost over the workers of an Executor: each worker takes the next undone one.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace fastbert {
namespace FASTBERT_ISA {

template <class F>
void parallel_tasks(const Executor& executor, int64_t tasks, const F& task) {
  struct Context {
    const F* task;
    int64_t next, tasks;
  } context{&task, 0, tasks};
  const auto body = [](void* p, int worker) {
    Context& c = *static_cast<Context*>(p);
    for (int64_t i; (i = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED)) < c.tasks;) (*c.task)(i, worker);
  };
  const int workers = tasks < executor.workers ? static_cast<int>(tasks) : executor.workers;
  if (workers <= 1) {
    body(&context, 0);
  } else {
    executor.run(workers, body, &context);
  }
}

FASTBERT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
FASTBERT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FASTBERT_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace FASTBERT_ISA
}  // namespace fastbert
