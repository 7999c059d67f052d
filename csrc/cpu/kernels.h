// The kernels of one instruction set, as a table. kernels.cpp is compiled once per set of vectors and
// kernels_amx.cpp for AMX; which table serves is decided at load, from what the processor can run.
#pragma once

#include <string>
#include <vector>

#include "segments.h"

namespace fastattn {

struct Kernels {
  const char* name;
  void (*forward)(const Problem&, const Arguments&, std::vector<Sequence>);
  void (*backward)(const Problem&, const Arguments&, std::vector<Sequence>);
  void (*step)(const Problem&, const Arguments&, std::vector<Sequence>);
  // Multiply-adds in registers for about `seconds`, on the calling thread: the floating-point
  // operations done, to measure the machine's peak. In the arithmetic of bf16 or float32.
  double (*multiply_add)(double seconds, bool in_bf16);
};

// Compiled in and runnable here, slowest first.
std::vector<const Kernels*> runnable_kernels();

}  // namespace fastattn
