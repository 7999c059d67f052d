// The instructions of csrc/cuda/ptx.cuh in plain C++, with the fragment layouts of the PTX manual
// ("Matrix fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8"). Written
// from the manual's formulas, one element at a time, and independently of the kernels' loads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace emulation {

struct MmaOperands {
  float c[4];
  uint32_t a[4], b[2];
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// d = a b + c of one warp. K elements are summed; `Get` reads element i of a register array.
template <int K, class GetA, class GetB>
void multiply(const void* const* operands, void* const* results, GetA get_a, GetB get_b) {
  float a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    get_a(own, lane, a);
    get_b(own, lane, b);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, col = (lane & 3) * 2 + (i & 1);
      double sum = own.c[i];
      for (int k = 0; k < K; ++k) sum += double(a[row][k]) * b[k][col];
      static_cast<float*>(results[lane])[i] = static_cast<float>(sum);
    }
  }
}

inline void multiply_bf16(const void* const* operands, void* const* results) {
  multiply<16>(
      operands, results,
      [](const MmaOperands& own, int lane, float (&a)[16][16]) {
        for (int i = 0; i < 8; ++i) {  // a_i: register i / 2, its low half first
          const int row = (i < 2 || (i >= 4 && i < 6)) ? lane >> 2 : (lane >> 2) + 8;
          const int col = (lane & 3) * 2 + (i & 1) + (i >= 4 ? 8 : 0);
          a[row][col] = bits_to_float((i & 1 ? own.a[i / 2] >> 16 : own.a[i / 2] & 0xffff) << 16);
        }
      },
      [](const MmaOperands& own, int lane, float (&b)[16][8]) {
        for (int i = 0; i < 4; ++i) {
          const int row = (lane & 3) * 2 + (i & 1) + (i >= 2 ? 8 : 0), col = lane >> 2;
          b[row][col] = bits_to_float((i & 1 ? own.b[i / 2] >> 16 : own.b[i / 2] & 0xffff) << 16);
        }
      });
}

// The hardware reads the upper 19 bits of a tf32 operand.
inline float tf32(uint32_t bits) { return bits_to_float(bits & 0xffffe000u); }

inline void multiply_tf32(const void* const* operands, void* const* results) {
  multiply<8>(
      operands, results,
      [](const MmaOperands& own, int lane, float (&a)[16][8]) {
        for (int i = 0; i < 4; ++i) {
          const int row = (i == 0 || i == 2) ? lane >> 2 : (lane >> 2) + 8;
          const int col = i < 2 ? lane & 3 : (lane & 3) + 4;
          a[row][col] = tf32(own.a[i]);
        }
      },
      [](const MmaOperands& own, int lane, float (&b)[8][8]) {
        for (int i = 0; i < 2; ++i) b[(lane & 3) + 4 * i][lane >> 2] = tf32(own.b[i]);
      });
}

__attribute__((no_sanitize("thread"))) inline void mma(const char* name, Combine combine,
                                                       float (&c)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
  MmaOperands own;
  for (int i = 0; i < 4; ++i) own.c[i] = c[i], own.a[i] = a[i];
  for (int i = 0; i < 2; ++i) own.b[i] = b[i];
  float result[4];
  collective(name, 0xffffffffu, &own, result, combine);
  for (int i = 0; i < 4; ++i) c[i] = result[i];
}

}  // namespace emulation

namespace fastattn::cuda {

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma("mma_bf16", emulation::multiply_bf16, c, a, b);
}

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::mma("mma_tf32", emulation::multiply_tf32, c, a, b);
}

// cvt.rna.tf32.f32: to the nearest, ties away from zero.
__attribute__((no_sanitize("thread"))) inline uint32_t round_to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

__attribute__((no_sanitize("thread"))) inline float bits_as_float(uint32_t bits) {
  return emulation::bits_to_float(bits);
}

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16(low).bits | uint32_t{__float2bfloat16(high).bits} << 16;
}

inline void copy_async_16(void* shared, const void* global) {
  emulation::copy_async(shared, global, 16);
}
inline void commit_copies() { emulation::commit_copies(); }
inline void wait_for_copies() { emulation::wait_copies(0); }

}  // namespace fastattn::cuda
