// The kernels of one instruction set, as a table. kernels.cpp is compiled once per set; which table
// serves is decided at load, from what the processor can run.
#pragma once

#include <string>
#include <vector>

#include "../problem.h"

namespace fastattn {

struct Kernels {
  const char* name;
  void (*forward)(const Problem&, const Arguments&);
  void (*backward)(const Problem&, const Arguments&);
  void (*step)(const Problem&, const Arguments&);
  // Multiply-adds in registers for about `seconds`, on the calling thread: the floating-point
  // operations done, to measure the machine's peak. In the arithmetic of bf16 or float32.
  double (*multiply_add)(double seconds, bool in_bf16);
};

// Compiled in and runnable here, weakest first.
std::vector<const Kernels*> runnable_kernels();

}  // namespace fastattn
