// Threads. Work is handed out as numbered tasks; which thread takes which never changes a result,
// but it does change the time. Each thread has a share of neighbouring tasks, the same in every
// call: what it touches then is in its own caches, not in those of another core (on a processor
// whose cores do not share a cache, handing out tasks one by one takes up to a third longer). Who
// is done helps the others.
//
// A process that already has an OpenMP runtime (torch brings one) must not get a second pool of
// threads: the two would spin against each other. So we join the runtime that is there, through
// its GOMP_parallel entry point, and only without one start threads of our own.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

namespace fastattn {

// Runs body(task) for every task in [0, tasks) on at most `threads` threads. Exceptions thrown by
// the body are rethrown here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

// Joins the OpenMP runtime in the already loaded library at `path`. False if it is not loaded or
// has no GOMP_parallel and omp_get_thread_num.
bool join_openmp(const std::string& path);

// The path joined, or "" when threads are our own.
const std::string& openmp_path();

// Scratch memory of the calling thread, grown on demand and kept: 64-byte aligned.
class Scratch {
 public:
  // Starts a kernel's use of the thread's scratch; at most one is alive per thread.
  Scratch();
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(count * static_cast<int64_t>(sizeof(T))));
  }

 private:
  void* take_bytes(int64_t bytes);
};

}  // namespace fastattn
