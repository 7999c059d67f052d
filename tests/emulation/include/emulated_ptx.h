// The instructions of csrc/cuda/ptx.cuh in plain C++, with the fragment layouts of the PTX manual
// ("Matrix fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k8"). Written
// from the manual's formulas, one element at a time, and independently of the kernels' loads, which
// it checks: a register that holds another element than the manual wants there is a fault.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

namespace emulation {

// A register that knows which element of its operand it holds: row of A or column of B, and depth.
struct Register {
  uint32_t bits = 0;
  int16_t i = -1, k = -1;
  operator uint32_t() const { return bits; }
};

// A sum that knows which element of the product it is; before the first product it is none.
struct Sum {
  float value = 0;
  int16_t row = -1, column = -1;
};

struct MmaOperands {
  Sum c[4];
  Register a[4], b[2];
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

struct Place {
  int i, k;
};

// Where the manual wants the elements of a fragment: of A (16 x K) the row and the depth, of B (K x 8)
// the column and the depth, of the sums (16 x 8) the row and the column. A register of bf16 holds two
// neighbours in depth.
struct Bf16Layout {
  static constexpr int kDepth = 16, kHalves = 2;
  static Place a(int lane, int element) {
    const bool upper = element < 2 || (element >= 4 && element < 6);
    return {upper ? lane >> 2 : (lane >> 2) + 8,
            (lane & 3) * 2 + (element & 1) + (element >= 4 ? 8 : 0)};
  }
  static Place b(int lane, int element) {
    return {lane >> 2, (lane & 3) * 2 + (element & 1) + (element >= 2 ? 8 : 0)};
  }
  static float value(uint32_t bits, int half) {  // the low half comes first
    return bits_to_float((half ? bits >> 16 : bits & 0xffff) << 16);
  }
};

struct Tf32Layout {
  static constexpr int kDepth = 8, kHalves = 1;
  static Place a(int lane, int element) {
    return {element == 0 || element == 2 ? lane >> 2 : (lane >> 2) + 8,
            element < 2 ? lane & 3 : (lane & 3) + 4};
  }
  static Place b(int lane, int element) { return {lane >> 2, (lane & 3) + 4 * element}; }
  static float value(uint32_t bits, int) {  // the hardware reads the upper 19 bits
    return bits_to_float(bits & 0xffffe000u);
  }
};

inline Place of_sum(int lane, int element) {
  return {element < 2 ? lane >> 2 : (lane >> 2) + 8, (lane & 3) * 2 + (element & 1)};
}

// Complains unless a register holds the element `wanted` away from `origin`.
inline void check_place(int lane, const char* matrix, int number, Place held, Place origin,
                        Place wanted) {
  if (held.i == origin.i + wanted.i && held.k == origin.k + wanted.k) return;
  char text[200];
  std::snprintf(text, sizeof text,
                "a wrong fragment: register %d of %s must hold element (%d, %d) of its tile, and "
                "holds (%d, %d)",
                number, matrix, wanted.i, wanted.k, held.i - origin.i, held.k - origin.k);
  complain(lane, text);
}

// d = a b + c of one warp.
template <class Layout>
void multiply(const void* const* operands, void* const* results) {
  constexpr int kHalves = Layout::kHalves;
  float a[16][Layout::kDepth], b[Layout::kDepth][8];
  // The tiles' places in their matrices: lane 0 holds the first element of both.
  const auto& first = *static_cast<const MmaOperands*>(operands[0]);
  const Place origin_a{first.a[0].i, first.a[0].k}, origin_b{first.b[0].i, first.b[0].k};
  if (origin_a.k != origin_b.k) complain(0, "a wrong fragment: A and B do not start at one depth");
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    for (int e = 0; e < 4 * kHalves; ++e) {
      const Place at = Layout::a(lane, e);
      const Register& held = own.a[e / kHalves];
      if (e % kHalves == 0) check_place(lane, "A", e / kHalves, {held.i, held.k}, origin_a, at);
      a[at.i][at.k] = Layout::value(held.bits, e % kHalves);
    }
    for (int e = 0; e < 2 * kHalves; ++e) {
      const Place at = Layout::b(lane, e);
      const Register& held = own.b[e / kHalves];
      if (e % kHalves == 0) check_place(lane, "B", e / kHalves, {held.i, held.k}, origin_b, at);
      b[at.k][at.i] = Layout::value(held.bits, e % kHalves);
    }
  }
  const Place origin{origin_a.i, origin_b.i};
  for (int lane = 0; lane < 32; ++lane) {
    const auto& own = *static_cast<const MmaOperands*>(operands[lane]);
    for (int i = 0; i < 4; ++i) {
      const Place at = of_sum(lane, i);
      if (own.c[i].row >= 0)
        check_place(lane, "the sums", i, {own.c[i].row, own.c[i].column}, origin, at);
      double sum = own.c[i].value;
      for (int k = 0; k < Layout::kDepth; ++k) sum += double(a[at.i][k]) * b[k][at.k];
      static_cast<Sum*>(results[lane])[i] = {static_cast<float>(sum),
                                             static_cast<int16_t>(origin.i + at.i),
                                             static_cast<int16_t>(origin.k + at.k)};
    }
  }
}

__attribute__((no_sanitize("thread"))) inline void mma(const char* name, Combine combine,
                                                       Sum (&c)[4], const Register (&a)[4],
                                                       const Register (&b)[2]) {
  MmaOperands own;
  for (int i = 0; i < 4; ++i) own.c[i] = c[i], own.a[i] = a[i];
  for (int i = 0; i < 2; ++i) own.b[i] = b[i];
  Sum result[4];
  collective(name, 0xffffffffu, &own, result, combine);
  for (int i = 0; i < 4; ++i) c[i] = result[i];
}

// ldmatrix: what a lane gives, and where in shared memory its elements of each matrix lie.
struct MatrixRow {
  const uint16_t* data;
  Place first;
};

template <bool Transposed, int Count>
struct MatrixElements {
  const uint16_t *low[Count], *high[Count];
  Place place[Count];

  static void find(const void* const* operands, void* const* results) {
    const auto row = [&](int lane) { return *static_cast<const MatrixRow*>(operands[lane]); };
    for (int lane = 0; lane < 32; ++lane) {
      auto& own = *static_cast<MatrixElements*>(results[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int m = 0; m < Count; ++m) {
        const MatrixRow a = row(8 * m + (Transposed ? 2 * t : g));
        const MatrixRow b = Transposed ? row(8 * m + 2 * t + 1) : a;
        if (reinterpret_cast<uintptr_t>(a.data) % 16) complain(lane, "ldmatrix: a misaligned row");
        own.low[m] = a.data + (Transposed ? g : 2 * t);
        own.high[m] = b.data + (Transposed ? g : 2 * t + 1);
        // Rows run along k, or (transposed) along i.
        own.place[m] = Transposed ? Place{a.first.i + g, a.first.k}
                                  : Place{a.first.i, a.first.k + 2 * t};
        const Place next = Transposed ? Place{b.first.i + g, b.first.k}
                                      : Place{b.first.i, b.first.k + 2 * t + 1};
        if (next.i != own.place[m].i || next.k != own.place[m].k + 1)
          complain(lane, "a wrong fragment: two elements that are no neighbours in one register");
      }
    }
  }
};

template <bool Transposed, int Count>
__attribute__((no_sanitize("thread"))) inline void find_elements(
    MatrixElements<Transposed, Count>& found, const void* row, int i, int k) {
  const MatrixRow own{static_cast<const uint16_t*>(row), {i, k}};
  collective("ldmatrix", 0xffffffffu, &own, &found, MatrixElements<Transposed, Count>::find);
}

}  // namespace emulation

namespace fastattn::cuda {

using emulation::Register;
using emulation::Sum;

__attribute__((no_sanitize("thread"))) inline Register holding(uint32_t bits, int i, int k) {
  return {bits, static_cast<int16_t>(i), static_cast<int16_t>(k)};
}

__attribute__((no_sanitize("thread"))) inline float taken_for(const Sum& sum, int row, int column) {
  if (sum.row >= 0 && (sum.row != row || sum.column != column)) {
    char text[160];
    std::snprintf(text, sizeof text,
                  "a wrong fragment: element (%d, %d) of a product is taken for (%d, %d)", sum.row,
                  sum.column, row, column);
    emulation::complain(-1, text);
  }
  return sum.value;
}

// (Each lane reads its elements itself, so that these accesses are checked like all others.)
template <bool Transposed, int Count>
inline void load_matrices(Register (&x)[Count], const void* row, int i, int k) {
  emulation::MatrixElements<Transposed, Count> found;
  emulation::find_elements(found, row, i, k);
  for (int m = 0; m < Count; ++m)
    x[m] = holding(*found.low[m] | uint32_t{*found.high[m]} << 16, found.place[m].i,
                   found.place[m].k);
}

inline void mma_bf16(Sum (&c)[4], const Register (&a)[4], const Register (&b)[2]) {
  emulation::mma("mma_bf16", emulation::multiply<emulation::Bf16Layout>, c, a, b);
}

inline void mma_tf32(Sum (&c)[4], const Register (&a)[4], const Register (&b)[2]) {
  emulation::mma("mma_tf32", emulation::multiply<emulation::Tf32Layout>, c, a, b);
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
