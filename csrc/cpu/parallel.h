/* How the kernels run in parallel: the caller lends its threads. torch's pool, std::thread and a plain loop all fit.
 *
 * run(context, tasks, task, argument) calls task(argument, i) exactly once for each i in [0, tasks), in any order, on
 * any threads, and returns when all are done. Tasks never wait for one another, so one thread may run them all.
 * The kernels ask for at most `threads` tasks. run == NULL: the calling thread runs everything.
 */
#pragma once

typedef struct albert_parallel {
  void* context;
  int threads;
  void (*run)(void* context, int tasks, void (*task)(void* argument, int index), void* argument);
} albert_parallel;

#ifdef __cplusplus
namespace albert {

inline int thread_count(const albert_parallel* parallel) {
  return parallel == nullptr || parallel->run == nullptr || parallel->threads < 1 ? 1 : parallel->threads;
}

// Calls body(i) for each i in [0, tasks). Static, so that each instruction set compiles its own.
template <class Body>
static void parallel_tasks(const albert_parallel* parallel, int tasks, Body& body) {
  if (tasks == 1 || thread_count(parallel) == 1) {
    for (int i = 0; i < tasks; ++i) body(i);
    return;
  }
  parallel->run(parallel->context, tasks, [](void* argument, int i) { (*static_cast<Body*>(argument))(i); }, &body);
}

}  // namespace albert
#endif
