// Every load and store of a kernel arrives here through the compiler's hooks and is checked: bounds,
// alignment, shared memory never written, copies still in flight, and races (two threads on one
// address, one of them writing, with no barrier in between).
#include <sys/mman.h>

#include <cstdio>
#include <cstring>

#include "threads.h"

namespace emulation {
namespace {

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
Cell shared_cells[kSharedBytes / kCellBytes];

// ---- checks -------------------------------------------------------------------------------------

std::string other_thread(int number) {
  const Index& i = fibers[static_cast<size_t>(number)].index;
  char text[64];
  std::snprintf(text, sizeof text, "thread (%u, %u, %u)", i.x, i.y, i.z);
  return text;
}

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
  if (is_own(p)) return;
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(describe(is_write ? "write" : "read", p, bytes) + ", misaligned");
  touch(p, bytes, is_write, false);
}

}  // namespace

// ---- asynchronous copies ------------------------------------------------------------------------

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
