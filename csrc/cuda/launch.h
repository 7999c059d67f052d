// Launching: errors become exceptions that name the kernel and the problem, and workspace is asked
// for by running the same plan without launching anything.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "../problem.h"

namespace fastattn::cuda {

std::string describe(const Problem& problem);

inline void check(cudaError_t error, const char* what, const Problem& problem) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // it is reported here, and not by whoever asks next
  throw std::runtime_error(std::string("CUDA kernel ") + what + " failed on " + describe(problem) +
                           ": " + cudaGetErrorString(error));
}

// What of a GPU a launch depends on: bytes of shared memory that a block may have, multiprocessors.
struct Limits {
  int shared_bytes, multiprocessors;
};

class Launcher {
 public:
  Launcher(const Problem& problem, cudaStream_t stream, float* workspace, Limits limits)
      : problem_(problem), stream_(stream), workspace_(workspace), limits_(limits) {}

  // Nothing is launched: for asking workspace_floats.
  static Launcher planning(const Problem& problem, Limits limits) {
    Launcher launcher(problem, nullptr, nullptr, limits);
    launcher.plans_ = true;
    return launcher;
  }

  int64_t workspace_floats() const { return used_; }

  // Scratch of the caller's, for as long as the call's kernels run.
  float* take(int64_t floats) {
    float* piece = workspace_ + used_;
    used_ += (floats + 31) / 32 * 32;
    return piece;
  }

  // Where each block of a kernel keeps its state: nullptr, in shared memory, if that has room for
  // the tiles and it; else in the workspace. `shared_bytes(in_shared)` says what the tiles take.
  template <class SharedBytes>
  float* place_states(int64_t blocks, int64_t floats, const SharedBytes& shared_bytes) {
    return fits(shared_bytes(true)) ? nullptr : take(blocks * floats);
  }

  bool fits(size_t shared_bytes) const {
    return shared_bytes <= static_cast<size_t>(limits_.shared_bytes);
  }

  // Whether so many equal blocks, one to a multiprocessor at a time, are done in at most half as much
  // again as the work would take in even shares.
  bool shares_evenly(int64_t blocks) const {
    const int64_t each = limits_.multiprocessors, waves = (blocks + each - 1) / each;
    return blocks >= each && 2 * waves * each <= 3 * blocks;
  }

  template <class... Parameters, class... Given>
  void operator()(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads,
                  size_t shared_bytes, Given&&... given) {
    run(name, kernel, blocks, 1, threads, shared_bytes, std::forward<Given>(given)...);
  }

  template <class... Parameters, class... Given>
  void run(const char* name, void (*kernel)(Parameters...), int64_t blocks, int64_t rows,
           int threads, size_t shared_bytes, Given&&... given) {
    if (plans_ || blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("too many blocks for " + describe(problem_));
    if (shared_bytes > (48 << 10))  // always the same number: other threads launch it, too
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 limits_.shared_bytes),
            name, problem_);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3{static_cast<unsigned>(blocks), static_cast<unsigned>(rows), 1};
    config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...), name, problem_);
  }

 private:
  const Problem& problem_;
  cudaStream_t stream_;
  float* workspace_;
  Limits limits_;
  int64_t used_ = 0;
  bool plans_ = false;
};

}  // namespace fastattn::cuda
