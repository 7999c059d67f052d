// The part of the CUDA runtime and of its language extensions that csrc/cuda uses, for g++.
#pragma once

#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define __grid_constant__

#define __syncthreads() emulation::block_barrier(__FILE__, __LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::warp_barrier(mask); }

using dim3 = emulation::Index;
struct alignas(8) float2 {
  float x, y;
};

namespace emulation {

// threadIdx.x and its kin: reading one is a call, not a load that the hooks would see.
template <Index (*Get)()>
struct BuiltIn {
  struct {
    operator unsigned() const { return Get().x; }
  } x;
  struct {
    operator unsigned() const { return Get().y; }
  } y;
};

}  // namespace emulation

inline constexpr emulation::BuiltIn<emulation::thread_index> threadIdx{};
inline constexpr emulation::BuiltIn<emulation::block_index> blockIdx{};
inline constexpr emulation::BuiltIn<emulation::block_size> blockDim{};
using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };

namespace emulation {

extern const char* report;        // of the launch that failed last
extern int shared_limit;          // bytes of shared memory that a block may ask for
extern int multiprocessors;
unsigned exchange(const char* name, unsigned mask, unsigned bits, int argument, Combine combine);

struct Offer {
  unsigned bits;
  int argument;
};

// Every lane gets what another offers: `Other` of its own number and argument.
template <int (*Other)(int lane, int argument)>
void exchange_with(const void* const* operands, void* const* results) {
  for (int i = 0; i < 32; ++i) {
    if (!operands[i]) continue;
    const int other = Other(i, static_cast<const Offer*>(operands[i])->argument) & 31;
    if (operands[other])
      *static_cast<unsigned*>(results[i]) = static_cast<const Offer*>(operands[other])->bits;
    else
      complain(i, "a shuffle from a lane that its mask does not name");
  }
}

inline int by_xor(int lane, int argument) { return lane ^ argument; }
inline int by_index(int, int argument) { return argument; }

inline void vote_any(const void* const* operands, void* const* results) {
  unsigned any = 0;
  for (int i = 0; i < 32; ++i)
    if (operands[i]) any |= static_cast<const Offer*>(operands[i])->bits;
  for (int i = 0; i < 32; ++i)
    if (operands[i]) *static_cast<unsigned*>(results[i]) = any;
}

template <class T>
__attribute__((no_sanitize("thread"))) T shuffle(const char* name, unsigned mask, T value,
                                                 int argument, Combine combine) {
  static_assert(sizeof(T) == 4);
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  bits = exchange(name, mask, bits, argument, combine);
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, lanes,
                            emulation::exchange_with<emulation::by_xor>);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::shuffle("__shfl_sync", mask, value, lane,
                            emulation::exchange_with<emulation::by_index>);
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulation::shuffle("__any_sync", mask, unsigned(predicate != 0), 0,
                                             emulation::vote_any));
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

// As the template of that name in the CUDA runtime; here it returns when the grid has finished.
template <class... Parameters, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Given&&... given) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {std::forward<Given>(given)...}};
  emulation::report = emulation::launch(
      config->gridDim, config->blockDim, config->dynamicSmemBytes,
      [](void* data) {
        auto& c = *static_cast<Call*>(data);
        std::apply(c.kernel, c.arguments);
      },
      &call, sizeof(call));
  return emulation::report ? cudaErrorLaunchFailure : cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulation::shared_limit ? cudaSuccess : cudaErrorInvalidConfiguration;
}

struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulation::multiprocessors
                                                       : emulation::shared_limit;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorLaunchFailure) return emulation::report;
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}
