// What emulated device code calls: thread and block indices, barriers, warp collectives, copies.
//
// The CUDA sources are compiled by g++ with -fsanitize=thread, but linked without its runtime: the
// compiler then calls a hook before every load and store, and memory.cpp answers those hooks with
// checks of its own. So device code needs no wrappers, and no access goes unseen.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

// Out of line, so that the emulator's own memory is never taken for an access of a kernel.
Index thread_index();
Index block_index();
Index block_size();
Index grid_size();
int lane();

void block_barrier(const char* file, int line);
void warp_barrier(unsigned mask);

// One operation of the lanes of a warp that a mask names: the last to arrive computes every lane's
// result. What a lane offers is null where the mask does not name it.
using Combine = void (*)(const void* const* operands, void* const* results);
void collective(const char* name, unsigned mask, const void* operand, void* result,
                Combine combine);

// A fault that kernels' own checks found: of a lane of the warp that computes, or (-1) of the thread
// that runs. Does not return in the second case; in the first the operation is finished first.
void complain(int lane, const char* what);

// Asynchronous copies: the bytes arrive when the group they were committed to is waited for.
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int groups_in_flight);

// Runs every block of a grid; nullptr, or what went wrong.
using Body = void (*)(void* arguments);
const char* launch(Index grid, Index block, size_t shared_bytes, Body body, void* arguments,
                   size_t argument_bytes);

}  // namespace emulation
