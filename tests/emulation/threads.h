// Threads of a block as fibers, and what the two halves of the emulator know of each other:
// emulator.cpp runs threads, memory.cpp checks what they touch.
#pragma once

#include <string>
#include <vector>

#include "include/emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Dynamic shared memory; the kernels declare it `extern`.
constexpr size_t kSharedBytes = 228 << 10;
extern unsigned char shared_memory[kSharedBytes];

namespace emulation {

constexpr size_t kStackBytes = 64 << 10;

// ---- fibers -------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
using Context = void*;
inline void switch_to(Context& from, Context& to) { emulation_switch(&from, to); }
inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // the stack is 16-byte aligned at a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
inline void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, group;
};

struct Fiber {
  Context context;
  State state;
  Index index;
  int number;
  const char* file;
  int line;
  const char* operation;  // of a warp, that it waits in
  unsigned mask;
  const void* operand;
  void* result;
  std::vector<Copy> copies;
  int committed;  // groups
};

struct Warp {
  uint32_t epoch = 0;  // __syncwarp of all lanes, so far
};

// ---- the grid that runs -------------------------------------------------------------------------

extern std::vector<Fiber> fibers;
extern std::vector<Warp> warps;
extern Fiber* current;  // null: host code, or the emulator's own
extern size_t the_shared_bytes;
extern uint32_t serial, launch_serial, epoch;  // of the block; at the launch; of barriers, so far
extern int launches;                           // since memory was cleared

// Reports a fault of the current thread, and leaves it for good.
[[noreturn]] void fail(const std::string& what);

// Memory that a thread may use unchecked: its stack, and the kernel's arguments.
bool is_own(const unsigned char* address);

}  // namespace emulation
