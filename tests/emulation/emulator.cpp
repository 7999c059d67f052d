// Runs kernels on the CPU: blocks one after another, threads as fibers that switch at barriers and
// warp collectives. Every load and store of a kernel arrives here through the compiler's hooks and
// is checked: bounds, alignment, shared memory never written, copies still in flight, and races
// (two threads on one address, one of them writing, with no barrier in between). The first fault
// stops the grid, and says block, thread and address.
#include <cxxabi.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "include/emulator.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// Dynamic shared memory; the kernels declare it `extern`.
constexpr size_t kSharedBytes = 228 << 10;
alignas(128) unsigned char shared_memory[kSharedBytes];

namespace emulation {

const char* report = nullptr;
int shared_limit = 227 << 10;  // of sm_90
int multiprocessors = 132;

namespace {

constexpr size_t kStackBytes = 64 << 10;

// ---- fibers -------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
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
  ret
.size emulation_switch, .-emulation_switch
)");
using Context = void*;
void switch_to(Context& from, Context& to) { emulation_switch(&from, to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // the stack is 16-byte aligned at a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }
void prepare(Context& context, unsigned char* stack, void (*entry)()) {
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

// ---- what is known of memory --------------------------------------------------------------------

// Of every two bytes: who touched them last, and when.
struct Cell {
  uint32_t serial;  // block; 0: never touched
  uint32_t write_epoch, write_warp_epoch, read_epoch, read_warp_epoch;
  uint16_t writer, reader;
  bool written, read, many_lanes, many_warps, in_flight;
};

struct Region {
  const unsigned char *begin, *end;
  bool writable;
  Cell* cells;  // of writable ones
};

constexpr size_t kCellBytes = 2;

std::vector<Region> regions;
const Region* last_region = nullptr;
Region arguments_region;
Cell shared_cells[kSharedBytes / kCellBytes];

// ---- the grid that runs -------------------------------------------------------------------------

std::vector<unsigned char*> stacks;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Context scheduler;
Fiber *current = nullptr, *computing = nullptr;  // the second: for the whole warp
Index the_block, the_block_size, the_grid;
size_t the_shared_bytes;
uint32_t serial = 0, launch_serial = 0, epoch = 0;
Body the_body;
void* the_arguments;
std::string message;
bool failed;
int launches = 0;

void report_fault(const Fiber& who, const std::string& what) {
  char where[160];
  std::snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", the_block.x,
                the_block.y, the_block.z, who.index.x, who.index.y, who.index.z);
  message = where + what;
  failed = true;
}

[[noreturn]] void fail(const std::string& what) {
  if (!failed) report_fault(*current, what);
  switch_to(current->context, scheduler);
  std::abort();
}

void enter() {
  the_body(the_arguments);
  current->state = State::done;
  switch_to(current->context, scheduler);
  std::abort();
}

std::string other_thread(int number) {
  const Index& i = fibers[static_cast<size_t>(number)].index;
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u)", i.x, i.y, i.z);
  return text;
}

// ---- checks -------------------------------------------------------------------------------------

struct Place {
  Cell* cells;
  const unsigned char* begin;
  bool is_shared;
};

std::string describe(const char* what, const void* address, size_t bytes) {
  char text[160];
  const auto* p = static_cast<const unsigned char*>(address);
  if (p >= shared_memory && p < shared_memory + kSharedBytes)
    std::snprintf(text, sizeof text, "%s of %zu bytes of shared memory at byte %zu", what, bytes,
                  static_cast<size_t>(p - shared_memory));
  else
    std::snprintf(text, sizeof text, "%s of %zu bytes of global memory at %p", what, bytes, address);
  return text;
}

const Region* region_of(const unsigned char* p) {
  if (last_region && p >= last_region->begin && p < last_region->end) return last_region;
  for (const Region& region : regions)
    if (p >= region.begin && p < region.end) return last_region = &region;
  return nullptr;
}

Place locate(const unsigned char* p, size_t bytes, bool is_write) {
  const char* what = is_write ? "write" : "read";
  if (p >= shared_memory && p < shared_memory + kSharedBytes) {
    if (p + bytes > shared_memory + the_shared_bytes)
      fail(describe(what, p, bytes) + ", out of bounds: the block has " +
           std::to_string(the_shared_bytes));
    return {shared_cells, shared_memory, true};
  }
  const Region* region = region_of(p);
  if (!region || p + bytes > region->end)
    fail(describe(what, p, bytes) + ", out of bounds of every tensor of the call");
  if (is_write && !region->writable)
    fail(describe(what, p, bytes) + ", into a tensor that is only to be read");
  return {region->cells, region->begin, false};
}

void check_race(const Cell& cell, bool is_write, const char* what, const void* p, size_t bytes) {
  const int me = current->number, my_warp = me / 32;
  const uint32_t now = warps[static_cast<size_t>(my_warp)].epoch;
  if (cell.written && cell.writer != me && cell.write_epoch == epoch &&
      !(cell.writer / 32 == my_warp && cell.write_warp_epoch < now))
    fail(describe(what, p, bytes) + ", a race: " + other_thread(cell.writer) +
         " wrote it and no barrier lies between");
  if (!is_write || !cell.read || cell.read_epoch != epoch) return;
  const bool other_warp = cell.many_warps || cell.reader / 32 != my_warp;
  const bool other_lane =
      (cell.many_lanes || cell.reader != me) && cell.read_warp_epoch == now;
  if (other_warp || other_lane)
    fail(describe(what, p, bytes) + ", a race: " + other_thread(cell.reader) +
         (cell.many_lanes || cell.many_warps ? " and others" : "") +
         " read it and no barrier lies between");
}

void touch(const unsigned char* p, size_t bytes, bool is_write, bool in_flight) {
  const char* what = is_write ? "write" : "read";
  const Place place = locate(p, bytes, is_write);
  if (!place.cells) return;
  const int me = current->number;
  const uint32_t now = warps[static_cast<size_t>(me / 32)].epoch;
  const size_t first = static_cast<size_t>(p - place.begin) / kCellBytes;
  const size_t last = static_cast<size_t>(p - place.begin + static_cast<ptrdiff_t>(bytes) - 1) / kCellBytes;
  for (size_t i = first; i <= last; ++i) {
    Cell& cell = place.cells[i];
    if (cell.serial != serial) {
      if (!place.is_shared && cell.serial > launch_serial && cell.written)
        fail(describe(what, p, bytes) + ", a race: another block of this grid wrote it");
      if (place.is_shared && !is_write)
        fail(describe(what, p, bytes) + ", which nobody has written");
      cell = Cell{};
      cell.serial = serial;
    }
    if (place.is_shared && !is_write && !cell.written)
      fail(describe(what, p, bytes) + ", which nobody has written");
    if (cell.in_flight)
      fail(describe(what, p, bytes) + ", while an asynchronous copy into it has not been waited for");
    check_race(cell, is_write, what, p, bytes);
    if (is_write) {
      cell.written = true;
      cell.writer = static_cast<uint16_t>(me);
      cell.write_epoch = epoch;
      cell.write_warp_epoch = now;
      cell.in_flight = in_flight;
      continue;
    }
    if (!cell.read || cell.read_epoch != epoch) {
      cell.many_lanes = cell.many_warps = false;
      cell.reader = static_cast<uint16_t>(me);
    } else if (cell.reader != me) {
      if (cell.reader / 32 != me / 32) cell.many_warps = true;
      cell.many_lanes = true;
    }
    cell.read = true;
    cell.read_epoch = epoch;
    cell.read_warp_epoch = now;
  }
}

void access(const void* address, size_t bytes, bool is_write) {
  if (!current) return;  // host code
  const auto* p = static_cast<const unsigned char*>(address);
  const unsigned char* stack = stacks[static_cast<size_t>(current->number)];
  if (p >= stack && p < stack + kStackBytes) return;
  if (p >= arguments_region.begin && p < arguments_region.end) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(describe(is_write ? "write" : "read", p, bytes) + ", misaligned");
  touch(p, bytes, is_write, false);
}

// The lane that a fiber in an operation of its warp waits for; -1: none. A lane in another operation
// may still arrive.
int missing_lane(const Fiber& fiber) {
  const Fiber* lanes = &fibers[static_cast<size_t>(fiber.number / 32 * 32)];
  for (int i = 0; i < 32; ++i)
    if (fiber.mask >> i & 1 &&
        !(lanes[i].state == State::in_warp && lanes[i].mask == fiber.mask &&
          std::strcmp(lanes[i].operation, fiber.operation) == 0))
      return i;
  return -1;
}

void run_block() {
  ++serial;
  epoch = 0;
  const int count = static_cast<int>(fibers.size());
  for (auto& warp : warps) warp = Warp{};
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = fibers[static_cast<size_t>(i)];
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.committed = 0;
    prepare(fiber.context, stacks[static_cast<size_t>(i)], enter);
  }
  while (true) {
    bool progress = false;
    for (auto& fiber : fibers) {
      if (fiber.state != State::ready) continue;
      progress = true;
      current = &fiber;
      switch_to(scheduler, fiber.context);
      current = nullptr;
      if (failed) return;
    }
    if (progress) continue;
    int done = 0, waiting = 0;
    const Fiber* example = nullptr;
    for (auto& fiber : fibers) {
      done += fiber.state == State::done;
      if (fiber.state != State::at_barrier) continue;
      ++waiting;
      if (example && (example->line != fiber.line || std::strcmp(example->file, fiber.file)))
        waiting = -2 * count;  // at different barriers
      example = &fiber;
    }
    if (done == count) return;
    if (waiting == count) {
      for (auto& fiber : fibers) fiber.state = State::ready;
      ++epoch;
      continue;
    }
    for (auto& fiber : fibers) {
      if (fiber.state == State::done) continue;
      char text[256];
      if (fiber.state == State::at_barrier)
        std::snprintf(text, sizeof text,
                      "barrier divergence: it waits at line %d of %s, where not all threads of the "
                      "block arrive", fiber.line, fiber.file);
      else
        std::snprintf(text, sizeof text,
                      "warp divergence: it waits in %s, where lane %d, which its mask names, does not "
                      "arrive", fiber.operation, missing_lane(fiber));
      report_fault(fiber, text);
      return;
    }
  }
}

}  // namespace

Index thread_index() { return current->index; }
Index block_index() { return the_block; }
Index block_size() { return the_block_size; }
Index grid_size() { return the_grid; }
int lane() { return current->number % 32; }

void block_barrier(const char* file, int line) {
  current->file = file;
  current->line = line;
  current->state = State::at_barrier;
  switch_to(current->context, scheduler);
}

void collective(const char* name, unsigned mask, const void* operand, void* result,
                Combine combine) {
  Fiber* lanes = &fibers[static_cast<size_t>(current->number / 32 * 32)];
  const std::string in = std::string("warp divergence: it is in ") + name;
  if (!(mask >> current->number % 32 & 1)) fail(in + " with a mask that does not name its lane");
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && lanes[i].state == State::done)
      fail(in + ", and lane " + std::to_string(i) + ", which its mask names, has left the kernel");
  current->operation = name;
  current->mask = mask;
  current->operand = operand;
  current->result = result;
  current->state = State::in_warp;
  if (missing_lane(*current) >= 0) {
    switch_to(current->context, scheduler);
    return;
  }
  const void* operands[32] = {};
  void* results[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    operands[i] = lanes[i].operand;
    results[i] = lanes[i].result;
    lanes[i].state = State::ready;
  }
  // A barrier of some lanes is not known to the checks for races: they may report too much.
  if (!combine) {
    if (mask == 0xffffffffu) ++warps[static_cast<size_t>(current->number / 32)].epoch;
    return;
  }
  computing = std::exchange(current, nullptr);  // what it touches is the emulator's
  combine(operands, results);
  current = std::exchange(computing, nullptr);
  if (failed) fail("");
}

void warp_barrier(unsigned mask) { collective("__syncwarp", mask, nullptr, nullptr, nullptr); }

void complain(int lane, const char* what) {
  if (lane < 0) fail(what);
  if (!failed) report_fault(fibers[static_cast<size_t>(computing->number / 32 * 32 + lane)], what);
}

unsigned exchange(const char* name, unsigned mask, unsigned bits, int argument, Combine combine) {
  struct {
    unsigned bits;
    int argument;
  } offer{bits, argument};
  unsigned result = 0;
  collective(name, mask, &offer, &result, combine);
  return result;
}

void copy_async(void* shared, const void* global, int bytes) {
  auto* to = static_cast<unsigned char*>(shared);
  const auto* from = static_cast<const unsigned char*>(global);
  const auto size = static_cast<size_t>(bytes);
  if (to < shared_memory || to >= shared_memory + kSharedBytes)
    fail("asynchronous copy to memory that is not shared");
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    fail(describe("asynchronous copy", global, size) + ", misaligned");
  touch(from, size, false, false);
  touch(to, size, true, true);
  std::memset(to, 0xff, size);
  current->copies.push_back({shared, global, bytes, current->committed});
}

void commit_copies() { ++current->committed; }

void wait_copies(int groups_in_flight) {
  auto& copies = current->copies;
  const uint32_t now = warps[static_cast<size_t>(current->number / 32)].epoch;
  size_t kept = 0;
  for (const Copy& copy : copies) {
    if (copy.group >= current->committed - groups_in_flight) {
      copies[kept++] = copy;
      continue;
    }
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    const size_t first = static_cast<size_t>(static_cast<unsigned char*>(copy.to) - shared_memory) / kCellBytes;
    for (size_t i = 0; i < static_cast<size_t>(copy.bytes) / kCellBytes; ++i) {
      Cell& cell = shared_cells[first + i];
      cell.in_flight = false;
      cell.write_epoch = epoch;
      cell.write_warp_epoch = now;
    }
  }
  copies.resize(kept);
}

const char* launch(Index grid, Index block, size_t shared_bytes, Body body, void* arguments,
                   size_t argument_bytes) {
  const size_t count = size_t{block.x} * block.y * block.z;
  if (count == 0 || count > 1024 || count % 32) return "bad number of threads in a block";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    return "bad grid size";
  if (shared_bytes > static_cast<size_t>(shared_limit)) return "too much shared memory";
  while (stacks.size() < count) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return "no memory for a fiber";
    stacks.push_back(static_cast<unsigned char*>(stack));
  }
  fibers.resize(count);
  warps.resize(count / 32);
  for (size_t i = 0; i < count; ++i) {
    fibers[i].number = static_cast<int>(i);
    fibers[i].index = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                       static_cast<unsigned>(i / block.x / block.y)};
  }
  the_block_size = block;
  the_grid = grid;
  the_shared_bytes = shared_bytes;
  the_body = body;
  the_arguments = arguments;
  const auto* bytes = static_cast<const unsigned char*>(arguments);
  arguments_region = {bytes, bytes + argument_bytes, false, nullptr};
  failed = false;
  ++launches;
  launch_serial = serial;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        the_block = {x, y, z};
        run_block();
        if (failed) return message.c_str();
      }
  return nullptr;
}

}  // namespace emulation

// ---- for Python: which memory a call may touch --------------------------------------------------

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulation_clear_memory() {
  using namespace emulation;
  launches = 0;
  for (Region& region : regions)
    if (region.cells)
      munmap(region.cells, (static_cast<size_t>(region.end - region.begin) / kCellBytes + 2) * sizeof(Cell));
  regions.clear();
  last_region = nullptr;
}

EXPORT void emulation_add_memory(void* address, size_t bytes, bool writable) {
  using namespace emulation;
  if (!bytes) return;
  const auto* begin = static_cast<unsigned char*>(address);
  Cell* cells = nullptr;
  if (writable)  // untouched pages of the map cost nothing
    cells = static_cast<Cell*>(mmap(nullptr, (bytes / kCellBytes + 2) * sizeof(Cell),
                                    PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  regions.push_back({begin, begin + bytes, writable, cells});
  last_region = nullptr;
}

// Since memory was cleared.
EXPORT int emulation_launches() { return emulation::launches; }

EXPORT void emulation_set_limits(int shared_bytes, int multiprocessors) {
  emulation::shared_limit = shared_bytes;
  emulation::multiprocessors = multiprocessors;
}

// ---- the compiler's hooks -----------------------------------------------------------------------

#define HOOKS(n)                                                                             \
  EXPORT void __tsan_read##n(void* p) { emulation::access(p, n, false); }                    \
  EXPORT void __tsan_write##n(void* p) { emulation::access(p, n, true); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
#define UNALIGNED_HOOKS(n)                                                                   \
  EXPORT void __tsan_unaligned_read##n(void* p) { emulation::access(p, n, false); }          \
  EXPORT void __tsan_unaligned_write##n(void* p) { emulation::access(p, n, true); }
UNALIGNED_HOOKS(2) UNALIGNED_HOOKS(4) UNALIGNED_HOOKS(8) UNALIGNED_HOOKS(16)
EXPORT void __tsan_read_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emulation::access(static_cast<char*>(p) + i, 1, false);
}
EXPORT void __tsan_write_range(void* p, size_t n) {
  for (size_t i = 0; i < n; ++i) emulation::access(static_cast<char*>(p) + i, 1, true);
}
EXPORT void __tsan_init() {}
EXPORT void __tsan_vptr_update(void**, void*) {}
EXPORT void __tsan_vptr_read(void**) {}
EXPORT void __tsan_func_entry(void*) {}
EXPORT void __tsan_func_exit() {}
