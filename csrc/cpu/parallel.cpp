#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace fastattn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using ThreadNumber = int (*)();

GompParallel gomp_parallel = nullptr;
ThreadNumber thread_number = nullptr;
std::string joined_path;

// Tasks [next, end), on a cache line of its own.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t end;
};

struct Team {
  Team(int64_t tasks, int threads, const std::function<void(int64_t)>& work)
      : body(work), ranges(static_cast<size_t>(threads)) {
    for (int i = 0; i < threads; ++i) {
      Range& range = ranges[static_cast<size_t>(i)];
      range.next.store(tasks * i / threads, std::memory_order_relaxed);
      range.end = tasks * (i + 1) / threads;
    }
  }

  // Thread `number` does its own range, then what the others have left.
  void work(size_t number) {
    try {
      for (size_t i = 0; i < ranges.size(); ++i) {
        Range& range = ranges[(number + i) % ranges.size()];
        for (int64_t task; (task = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;)
          body(task);
      }
    } catch (...) {
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
      for (Range& range : ranges) range.next.store(range.end, std::memory_order_relaxed);
    }
  }

  const std::function<void(int64_t)>& body;
  std::vector<Range> ranges;
  std::mutex failure_lock;
  std::exception_ptr failure;
};

void enter(void* team) {
  static_cast<Team*>(team)->work(static_cast<size_t>(thread_number()));
}

}  // namespace

bool join_openmp(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  void* parallel = dlsym(library, "GOMP_parallel");
  void* number = dlsym(library, "omp_get_thread_num");
  if (!parallel || !number) {
    dlclose(library);
    return false;
  }
  gomp_parallel = reinterpret_cast<GompParallel>(parallel);
  thread_number = reinterpret_cast<ThreadNumber>(number);
  joined_path = path;
  return true;  // the handle is kept: the runtime must outlive us
}

const std::string& openmp_path() { return joined_path; }

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  const int64_t team_size = std::min<int64_t>(tasks, threads);
  if (team_size <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(task);
    return;
  }
  Team team(tasks, threads, body);
  if (gomp_parallel) {
    // The full number of threads, even for fewer tasks: a team of another size than torch's makes
    // the runtime rebuild its pool.
    gomp_parallel(enter, &team, static_cast<unsigned>(threads), 0);
  } else {
    std::vector<std::thread> others;
    try {
      for (int64_t i = 1; i < team_size; ++i) others.emplace_back(&Team::work, &team, i);
    } catch (const std::exception&) {
      // The system has no more threads: those there are take the others' tasks.
    }
    team.work(0);
    for (auto& thread : others) thread.join();
  }
  if (team.failure) std::rethrow_exception(team.failure);
}

// ---- scratch ------------------------------------------------------------------------------------
// A list of blocks: growing never moves what was handed out. When a kernel ends, several blocks are
// replaced by one of their total size, so a steady state is one block and no allocation.

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

struct Block {
  std::unique_ptr<void, Free> memory;
  int64_t size = 0;
};

struct Arena {
  std::vector<Block> blocks;
  int64_t used = 0;  // of the last block

  void grow(int64_t size) {
    void* memory = std::aligned_alloc(64, static_cast<size_t>(size));
    if (!memory) throw std::bad_alloc();
    blocks.push_back({std::unique_ptr<void, Free>(memory), size});
    used = 0;
  }
};

thread_local Arena arena;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

Scratch::Scratch() = default;

Scratch::~Scratch() {
  if (arena.blocks.size() > 1) {
    int64_t total = 0;
    for (const auto& block : arena.blocks) total += block.size;
    arena.blocks.clear();
    try {
      arena.grow(total);
    } catch (const std::bad_alloc&) {
      // The next kernel asks again and reports it.
    }
  }
  arena.used = 0;
}

void* Scratch::take_bytes(int64_t bytes) {
  const int64_t size = round_up(std::max<int64_t>(bytes, 1), 64);
  if (arena.blocks.empty() || arena.used + size > arena.blocks.back().size)
    arena.grow(std::max(size, int64_t{1} << 18));
  void* address = static_cast<char*>(arena.blocks.back().memory.get()) + arena.used;
  arena.used += size;
  return address;
}

}  // namespace fastattn
