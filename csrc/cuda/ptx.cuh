// The instructions that CUDA C++ has no name for: tensor-core products, tf32 rounding, asynchronous
// copies. All exist from sm_80 on. The tests put their own header in this one's place.
#pragma once

#if defined(FASTATTN_EMULATION)
#include <emulated_ptx.h>
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace fastattn::cuda {

// A register of a fragment and a sum: on a GPU numbers and no more. The emulator's remember which
// element they hold, and its products check that it is the one that the PTX manual wants there.
using Register = uint32_t;
using Sum = float;

// Bits of element (i, k) of an operand, or of (i, k) and (i, k + 1).
__device__ __forceinline__ Register holding(uint32_t bits, int /*i*/, int /*k*/) { return bits; }
// A sum, about to be taken for element (row, column).
__device__ __forceinline__ float taken_for(Sum sum, int /*row*/, int /*column*/) { return sum; }

// Matrices of 8 x 8 numbers of 16 bits from shared memory, four or two at once: lane l gives the row
// l % 8 of matrix l / 8, 16 bytes long and so aligned, whose first number is element (i, k). Lane
// 4 g + t gets elements (g, 2 t) and (g, 2 t + 1) of each; `transposed`, (2 t, g) and (2 t + 1, g).
template <bool Transposed>
__device__ __forceinline__ void load_matrices(Register (&x)[4], const void* row, int /*i*/,
                                              int /*k*/) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address));
}
template <bool Transposed>
__device__ __forceinline__ void load_matrices(Register (&x)[2], const void* row, int /*i*/,
                                              int /*k*/) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(address));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(address));
}

// c += a b for a (16 x 16), b (16 x 8): bf16 operands, two to a register, float32 sums.
__device__ __forceinline__ void mma_bf16(Sum (&c)[4], const Register (&a)[4],
                                         const Register (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += a b for a (16 x 8), b (8 x 8): tf32 operands, float32 sums.
__device__ __forceinline__ void mma_tf32(Sum (&c)[4], const Register (&a)[4],
                                         const Register (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// Two numbers, rounded to bf16, in one register.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

__device__ __forceinline__ float bits_as_float(uint32_t bits) { return __uint_as_float(bits); }

// 16 bytes from global to shared memory, both aligned to 16; there once waited for.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace fastattn::cuda

#endif
