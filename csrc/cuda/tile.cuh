// Tiles in shared memory and products of them on tensor cores: what the chunked kernels are made of.
//
// A tile holds a few dozen tokens of one head, rows padded with zeros to whole matrix instructions.
// Its element type follows the precision that a user's dtype asks for:
//
//   bfloat16   bf16 operands, m16n8k16
//   float16    tf32 operands (as many digits as float16, and no overflow), m16n8k8
//   float32    tf32 operands in three products, high x high + low x high + high x low
//
// Sums are float32 everywhere. The fragment layouts are those of the PTX manual: lane = 4 g + t
// holds rows g and g + 8 of A and of the sums, and column g of B.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../feature_maps.h"
#include "plan.h"
#include "ptx.cuh"

extern __shared__ __align__(128) unsigned char shared_memory[];

namespace fastattn::cuda {

using Bf16 = __nv_bfloat16;
using Half = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, Bf16>)
    return __float2bfloat16(x);
  else
    return __float2half(x);
}

// ---- shared memory ------------------------------------------------------------------------------

// Hands out memory piece by piece. The host runs the same code from address 0 to learn the size.
struct Carve {
  unsigned char* base;
  size_t used = 0;

  template <class E>
  __host__ __device__ E* take(int64_t count) {
    E* piece = reinterpret_cast<E*>(base + used);
    used += (static_cast<size_t>(count) * sizeof(E) + 15) / 16 * 16;
    return piece;
  }
};

// Rows of numbers in shared memory, `stride` apart.
template <class E>
struct Tile {
  E* data = nullptr;
  int stride = 0;

  __device__ __forceinline__ E* row(int r) const { return data + r * stride; }
};

// Padded so that the eight rows of a fragment fall into different banks.
template <class E>
__host__ __device__ __forceinline__ Tile<E> take_tile(Carve& carve, int rows, int width) {
  const int stride = width + 16 / static_cast<int>(sizeof(E));
  return {carve.take<E>(rows * stride), stride};
}

// ---- warps --------------------------------------------------------------------------------------

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_index() { return threadIdx.x >> 5; }
__device__ __forceinline__ int warp_count() { return blockDim.x >> 5; }

__device__ __forceinline__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1) x += __shfl_xor_sync(0xffffffffu, x, lanes);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
  for (int lanes = 16; lanes > 0; lanes >>= 1)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
  return x;
}

// ---- operands -----------------------------------------------------------------------------------

// A matrix in memory as an operand of a product: element (i, k), where k is summed over and i is a
// row of A or a column of B. In memory, k runs along rows or across them.
template <class E, bool AlongRows>
struct Operand {
  const E* data;
  int stride;

  __device__ __forceinline__ float at(int i, int k) const {
    return to_float(data[AlongRows ? i * stride + k : k * stride + i]);
  }

  // Four blocks of 8 x 8 elements as bf16, two neighbours along k to a register: at (i, k), 8 further
  // along i, 8 along k, along both. Or two, 8 apart along k.
  template <int Count>
  __device__ __forceinline__ void load(Register (&x)[Count], int i, int k) const {
    const int lane = lane_index();
    if constexpr (sizeof(E) == 2) {  // a tile in shared memory
      const int block = lane / 8 % Count, row = lane % 8;
      const int right = Count == 4 ? block % 2 * 8 : 0, down = block / (Count / 2) * 8;
      if constexpr (AlongRows)
        load_at<false>(x, i + right + row, k + down);
      else
        load_at<true>(x, i + right, k + down + row);
    } else {
      const int g = lane / 4, t = 2 * (lane % 4);
#pragma unroll
      for (int block = 0; block < Count; ++block) {
        const int right = Count == 4 ? block % 2 * 8 : 0, down = block / (Count / 2) * 8;
        x[block] = pair(i + right + g, k + down + t);
      }
    }
  }

 private:
  template <bool Transposed, int Count>
  __device__ __forceinline__ void load_at(Register (&x)[Count], int i, int k) const {
    load_matrices<Transposed>(x, data + (AlongRows ? i * stride + k : k * stride + i), i, k);
  }

  __device__ __forceinline__ Register pair(int i, int k) const {
    return holding(pack_bf16(at(i, k), at(i, k + 1)), i, k);
  }
};

template <class E>
__device__ __forceinline__ Operand<E, true> along_rows(Tile<E> tile) {
  return {tile.data, tile.stride};
}
template <class E>
__device__ __forceinline__ Operand<E, false> across_rows(Tile<E> tile) {
  return {tile.data, tile.stride};
}

// ---- arithmetic ---------------------------------------------------------------------------------

struct Bf16Products {
  using Element = Bf16;
  static constexpr int kDepth = 16;
  struct A {
    Register x[4];
  };
  struct B {
    Register x[2];
  };

  template <class Operand>
  static __device__ __forceinline__ A load_a(const Operand& a, int row, int k) {
    A f;
    a.load(f.x, row, k);
    return f;
  }
  template <class Operand>
  static __device__ __forceinline__ B load_b(const Operand& b, int col, int k) {
    B f;
    b.load(f.x, col, k);
    return f;
  }
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const A& a, const B& b) {
    mma_bf16(c, a.x, b.x);
  }
  // A number as a product sees it.
  static __device__ __forceinline__ float rounded(float x) {
    return to_float(from_float<Bf16>(x));
  }
};

// Exact: x = high + low to 22 bits, and the product of two low parts is below float32's last bit.
template <bool Exact>
struct Tf32Products {
  using Element = float;
  static constexpr int kDepth = 8;
  struct A {
    Register high[4], low[4];
  };
  struct B {
    Register high[2], low[2];
  };

  static __device__ __forceinline__ float rounded(float x) {
    return Exact ? x : bits_as_float(round_to_tf32(x));
  }
  // Element (i, k) in two parts.
  template <class Operand>
  static __device__ __forceinline__ void load(const Operand& from, int i, int k, Register& high,
                                              Register& low) {
    const float x = from.at(i, k);
    high = holding(round_to_tf32(x), i, k);
    low = holding(Exact ? round_to_tf32(x - bits_as_float(high)) : 0, i, k);
  }
  template <class Operand>
  static __device__ __forceinline__ A load_a(const Operand& a, int row, int k) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    A f;
    load(a, row + g, k + t, f.high[0], f.low[0]);
    load(a, row + g + 8, k + t, f.high[1], f.low[1]);
    load(a, row + g, k + t + 4, f.high[2], f.low[2]);
    load(a, row + g + 8, k + t + 4, f.high[3], f.low[3]);
    return f;
  }
  template <class Operand>
  static __device__ __forceinline__ B load_b(const Operand& b, int col, int k) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    B f;
    load(b, col + g, k + t, f.high[0], f.low[0]);
    load(b, col + g, k + t + 4, f.high[1], f.low[1]);
    return f;
  }
  static __device__ __forceinline__ void multiply(Sum (&c)[4], const A& a, const B& b) {
    if constexpr (Exact) {
      mma_tf32(c, a.low, b.high);
      mma_tf32(c, a.high, b.low);
    }
    mma_tf32(c, a.high, b.high);
  }
};

template <class T>
struct ArithmeticOf;
template <>
struct ArithmeticOf<Bf16> {
  using Type = Bf16Products;
};
template <>
struct ArithmeticOf<Half> {
  using Type = Tf32Products<false>;
};
template <>
struct ArithmeticOf<float> {
  using Type = Tf32Products<true>;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::Type;
template <class T>
using Element = typename Arithmetic<T>::Element;

// ---- products -----------------------------------------------------------------------------------

constexpr int kBlockRows = 16, kBlockColumns = 32;

// A block of 16 x 32 sums, held by one warp.
struct Sums {
  Sum x[kBlockColumns / 8][4] = {};
  int row, col, columns;  // its place; columns that the matrix has

  // body(row, column, sum) for the elements of this lane
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    const int r = row + (lane_index() >> 2), c = col + 2 * (lane_index() & 3);
#pragma unroll
    for (int j = 0; j < kBlockColumns / 8; ++j) {
      if (col + 8 * j >= columns) break;
      const auto give = [&](int i, int r, int c) { body(r, c, taken_for(x[j][i], r, c)); };
      give(0, r, c + 8 * j);
      give(1, r, c + 8 * j + 1);
      give(2, r + 8, c + 8 * j);
      give(3, r + 8, c + 8 * j + 1);
    }
  }
};

// sums += A B over k in [begin, end), whole matrix instructions, for a call of type C. Where widths
// are known one step's operands are read while the last one's are multiplied.
template <class C, class A, class B>
__device__ __forceinline__ void multiply(Sums& sums, const A& a, const B& b, int begin, int end) {
  using Products = Arithmetic<typename C::T>;
  constexpr int kUnroll = C::kWidth ? 2 : 1;
#pragma unroll kUnroll
  for (int k = begin; k < end; k += Products::kDepth) {
    const auto fragment = Products::load_a(a, sums.row, k);
#pragma unroll
    for (int j = 0; j < kBlockColumns / 8; ++j)
      if (sums.col + 8 * j < sums.columns)
        Products::multiply(sums.x[j], fragment, Products::load_b(b, sums.col + 8 * j, k));
  }
}

// body(sums) for every block of a rows x columns matrix, shared out over the warps.
template <class Body>
__device__ __forceinline__ void for_blocks(int rows, int columns, const Body& body) {
  const int across = (columns + kBlockColumns - 1) / kBlockColumns;
  const int blocks = rows / kBlockRows * across;
  __syncwarp();  // matrix instructions take a whole warp, and loops before may have parted it
#pragma unroll 1
  for (int i = warp_index(); i < blocks; i += warp_count()) {
    Sums sums;
    sums.row = i / across * kBlockRows;
    sums.col = i % across * kBlockColumns;
    sums.columns = columns;
    body(sums);
  }
}

// The same for the lower triangle of a square matrix: blocks end at the diagonal's 16 x 16 block.
template <class Body>
__device__ __forceinline__ void for_lower_blocks(int size, const Body& body) {
  for_blocks(size, size, [&](Sums& sums) {
    sums.columns = sums.row + kBlockRows;
    if (sums.col < sums.columns) body(sums);
  });
}

// ---- rows of user tensors -----------------------------------------------------------------------

template <class T>
__device__ __forceinline__ bool copies_in_16_bytes(const Strided& s, int n) {
  constexpr int64_t unit = 16 / sizeof(T);
  return s.feature == 1 && n % unit == 0 && s.token % unit == 0 && s.head % unit == 0 &&
         s.batch % unit == 0 && reinterpret_cast<uintptr_t>(s.data) % 16 == 0;
}

// Starts reading `rows` tokens, n numbers each, into `stage`; there after wait_for_copies and a
// barrier. Rows that cannot be copied 16 bytes at a time are read at once.
template <class T>
__device__ __forceinline__ void fetch(Tile<T> stage, const Strided& source, int64_t batch,
                                      int64_t head, int64_t token, int rows, int n) {
  const T* from = static_cast<const T*>(source.data) + source.offset(batch, head, token);
  if (copies_in_16_bytes<T>(source, n)) {
    constexpr int unit = 16 / sizeof(T);
    const int pieces = n / unit;
    for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
      const int r = i / pieces, c = i % pieces * unit;
      copy_async_16(stage.row(r) + c, from + r * source.token + c);
    }
  } else if (source.feature <= source.token || source.token == 0) {
    for (int r = warp_index(); r < rows; r += warp_count())
      for (int c = lane_index(); c < n; c += 32)
        stage.row(r)[c] = from[r * source.token + c * source.feature];
  } else {  // tokens lie closer than features
    for (int c = warp_index(); c < n; c += warp_count())
      for (int r = lane_index(); r < rows; r += 32)
        stage.row(r)[c] = from[r * source.token + c * source.feature];
  }
}

// A row spread over a warp: element lane + 32 j.
template <int Columns>
struct Row {
  float x[Columns];

  template <class Body>
  __device__ __forceinline__ void each(int n, const Body& body) {
#pragma unroll
    for (int j = 0; j < Columns; ++j)
      if (lane_index() + 32 * j < n) body(lane_index() + 32 * j, x[j]);
  }
  template <class E>
  __device__ __forceinline__ void load(const E* from, int n) {
    each(n, [&](int i, float& value) { value = to_float(from[i]); });
  }
};

template <class T, int Columns>
__device__ __forceinline__ void store_row(const Strided& target, int64_t batch, int64_t head,
                                          int64_t token, int n, Row<Columns>& row) {
  T* to = static_cast<T*>(target.data) + target.offset(batch, head, token);
  row.each(n, [&](int i, float& value) { to[i * target.feature] = from_float<T>(value); });
}

// ---- the denominator ----------------------------------------------------------------------------

__device__ __forceinline__ float inverse_denominator(float den, float eps) {
  return 1.0f / (den < eps ? eps : den);
}
// The same for gradients, which are 0 where there is nothing to attend to.
__device__ __forceinline__ float inverse_denominator_of_gradient(float den, float eps) {
  return den <= 0 ? 0.0f : inverse_denominator(den, eps);
}
// -d log(1 / max(den, eps)) / d den: 1 / den, or 0 where eps holds.
__device__ __forceinline__ float denominator_slope(float den, float eps) {
  return den < eps ? 0.0f : 1.0f / den;
}

}  // namespace fastattn::cuda
