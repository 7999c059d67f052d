// Runs kernels on the CPU: blocks one after another, threads as fibers that switch at barriers and
// warp collectives. The first fault stops the grid, and says block and thread.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "threads.h"

#if defined(__x86_64__)
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
#endif

alignas(128) unsigned char shared_memory[kSharedBytes];

namespace emulation {

const char* report = nullptr;
int shared_limit = 227 << 10;  // of sm_90
int multiprocessors = 132;

std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber* current = nullptr;
size_t the_shared_bytes;
uint32_t serial = 0, launch_serial = 0, epoch = 0;
int launches = 0;

namespace {

std::vector<unsigned char*> stacks;
Context scheduler;
Fiber* computing = nullptr;  // for the whole warp
Index the_block, the_block_size, the_grid;
Body the_body;
const unsigned char *the_arguments, *end_of_arguments;
std::string message;
bool failed;

void report_fault(const Fiber& who, const std::string& what) {
  char where[160];
  std::snprintf(where, sizeof where, "block (%u, %u, %u), thread (%u, %u, %u): ", the_block.x,
                the_block.y, the_block.z, who.index.x, who.index.y, who.index.z);
  message = where + what;
  failed = true;
}

void enter() {
  the_body(const_cast<unsigned char*>(the_arguments));
  current->state = State::done;
  switch_to(current->context, scheduler);
  std::abort();
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

[[noreturn]] void fail(const std::string& what) {
  if (!failed) report_fault(*current, what);
  switch_to(current->context, scheduler);
  std::abort();
}

bool is_own(const unsigned char* address) {
  const unsigned char* stack = stacks[static_cast<size_t>(current->number)];
  return (address >= stack && address < stack + kStackBytes) ||
         (address >= the_arguments && address < end_of_arguments);
}

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
  the_arguments = static_cast<const unsigned char*>(arguments);
  end_of_arguments = the_arguments + argument_bytes;
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

extern "C" __attribute__((visibility("default"))) void emulation_set_limits(int shared_bytes,
                                                                            int multiprocessors) {
  emulation::shared_limit = shared_bytes;
  emulation::multiprocessors = multiprocessors;
}
