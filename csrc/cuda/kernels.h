// What each .cu file offers, per dtype T of the tensors and width of the tiles that it is compiled
// for (0: any; see plan.h). All take a Launcher that either launches or only adds up the workspace.
#pragma once

#include <type_traits>

#include "launch.h"

// The widths that there are kernels for, by size of dtype: from CMake, and fewer in the emulation.
#if !defined(FASTATTN_WIDTHS_16_BIT)
#define FASTATTN_WIDTHS_16_BIT 32, 64, 128
#endif
#if !defined(FASTATTN_WIDTHS_32_BIT)
#define FASTATTN_WIDTHS_32_BIT 32, 64, 128
#endif

namespace fastattn::cuda {

template <class T>
constexpr bool is_compiled(int width) {
  if (sizeof(T) == 2) {
    for (const int compiled : {FASTATTN_WIDTHS_16_BIT})
      if (width == compiled) return true;
  } else {
    for (const int compiled : {FASTATTN_WIDTHS_32_BIT})
      if (width == compiled) return true;
  }
  return false;
}

template <class T, int Width>
void noncausal_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T, int Width>
void noncausal_backward(const Problem& problem, const Arguments& args, Launcher& launch);

template <class T, int Width>
void causal_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T, int Width>
void causal_backward(const Problem& problem, const Arguments& args, Launcher& launch);

// The causal form one token after another, and the decode step, which updates args.initial.
template <class T>
void recurrent_forward(const Problem& problem, const Arguments& args, Launcher& launch);
template <class T>
void step(const Problem& problem, const Arguments& args, Launcher& launch);

// Why no kernel here can run on the current device, if so: it is of an architecture that none was
// compiled for, or its driver is older than the runtime.
template <class T>
cudaError_t why_not_here();

}  // namespace fastattn::cuda
