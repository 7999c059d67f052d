// The one small matrix product that every kernel is made of: C (+)= A B on tiles in cache.
//
// B and C are row-major with rows padded to whole vectors; A is read one element at a time, so any
// row and column stride serves and a transposed A costs nothing. A block of C (up to 6 rows of 4
// vectors with 32 registers, more rows where there are fewer vectors) lives in registers while k
// runs. Each element of C is one running sum over k in order, so blocking never changes a bit.
#pragma once

#include <algorithm>

#include "epilogue.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

#if FASTATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kBlockRows = 6, kBlockVectors = 4;  // 32 registers: 24 sums, 4 of B, 1 of A
#else
constexpr int kBlockRows = 6, kBlockVectors = 2;  // 16 registers: 12 sums, 2 of B, 1 of A
#endif

// Between the steps of a product memory is asked for: a line for every eight numbers of a whole block
// in its 48 steps or so, enough for all that the next tile touches.
template <int Lanes>
constexpr int kStepsPerLine = std::max(1, 8 * 48 / (kBlockRows * kBlockVectors * Lanes));

// Nothing that a thread has to hold while it multiplies.
struct NoRegisters {
  NoRegisters() {}
};

// Sizes of products whose blocks are vectors: tokens of a tile (eight blocks of six rows) and of a
// chunk of the causal form (whole vectors; fewer of them are fewer scores), and rows of a block where
// the lower triangle of scores is formed.
struct InVectors {
  using Registers = NoRegisters;
  static constexpr bool in_tiles = false;
  static constexpr int64_t tile_rows = 48, chunk_rows = 32, score_rows = 16;
};

// What one step of k multiplies: plain numbers, or with AVX512-BF16 two bf16 at a time (with AMX
// whole tiles of them: tiles.h). And how well e^x must be known for it.
template <class Real>
struct Plain : InVectors {
  using Element = Real;
  using Accumulator = Real;
  static FASTATTN_INLINE Vector<Real> load_b(const Real* p) { return load(p); }
  static FASTATTN_INLINE Vector<Real> broadcast(const Real* p) { return splat(*p); }
  static FASTATTN_INLINE Vector<Real> multiply_add(Vector<Real> a, Vector<Real> b, Vector<Real> c) {
    return a * b + c;
  }
  static FASTATTN_INLINE Vector<Real> exp(Vector<Real> x) { return FASTATTN_ISA::exp(x); }
};

#if defined(__AVX512BF16__)
// Elements are pairs of bf16 that are neighbours along k; products are summed in float32.
struct Bf16Pairs : InVectors {
  using Element = uint32_t;
  using Accumulator = float;
  static FASTATTN_INLINE __m512i load_b(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static FASTATTN_INLINE __m512i broadcast(const uint32_t* p) {
    return _mm512_set1_epi32(static_cast<int>(*p));
  }
  static FASTATTN_INLINE Vector<float> multiply_add(__m512i a, __m512i b, Vector<float> c) {
    return (Vector<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static FASTATTN_INLINE Vector<float> exp(Vector<float> x) { return exp_for_bf16(x); }
};
#endif

// What a product does at each step of k: nothing, or ask for memory that will be needed (see
// lookahead.h).
struct Nothing {
  FASTATTN_INLINE Nothing take(int64_t) const { return {}; }
  FASTATTN_INLINE int64_t count() const { return 0; }
  FASTATTN_INLINE void operator()() const {}
};

// A second product whose terms go into the same sums: nothing,
struct NoMore {
  static constexpr bool is_nothing = true;
  int64_t count(int64_t, int64_t) const { return 0; }
};

// or that of a lower triangle, which is zero above its diagonal to the end of the matrix, or of its
// transpose: rows from i on need only some k. `per` is the number of tokens in one element of k.
template <class Arith>
struct Triangle {
  static constexpr bool is_nothing = false;
  using Element = typename Arith::Element;
  const Element* A;
  int64_t row_stride, k_stride;
  const Element* B;
  int64_t ldb, K, per;
  bool transposed;

  int64_t first(int64_t i) const { return transposed ? i / per : 0; }
  int64_t count(int64_t i, int64_t rows) const {
    return (transposed ? K : std::min(K, (i + rows + per - 1) / per)) - first(i);
  }
};

// sum[i][j] += A[i, k] B[k, j] for K steps.
template <class Arith, int BlockRows, int Vectors, class Ask>
FASTATTN_INLINE void multiply_steps(int64_t K, const typename Arith::Element* A, int64_t row_stride,
                                    int64_t k_stride, const typename Arith::Element* B, int64_t ldb,
                                    Vector<typename Arith::Accumulator> (&sum)[BlockRows][Vectors],
                                    Ask& ask) {
  constexpr int L = kLanes<typename Arith::Accumulator>;
  for (int64_t k = 0; k < K; ++k) {
    if (k % kStepsPerLine<L> == 0) ask();
    decltype(Arith::load_b(B)) b[Vectors];
    unroll<Vectors>([&](auto j) FASTATTN_INLINE_LAMBDA { b[j] = Arith::load_b(B + j * L); });
    unroll<BlockRows>([&](auto i) FASTATTN_INLINE_LAMBDA {
      const auto a = Arith::broadcast(A + i * row_stride);
      unroll<Vectors>([&](auto j) FASTATTN_INLINE_LAMBDA {
        sum[i][j] = Arith::multiply_add(a, b[j], sum[i][j]);
      });
    });
    A += k_stride;
    B += ldb;
  }
}

// `finish` is given places from (row, column) on, and `more` has B from that column on.
template <class Arith, int BlockRows, int Vectors, bool Accumulate, class Between, class Finish,
          class More>
FASTATTN_INLINE void matmul_block(int64_t K, const typename Arith::Element* A, int64_t row_stride,
                                  int64_t k_stride, const typename Arith::Element* B, int64_t ldb,
                                  typename Arith::Accumulator* C, int64_t ldc, Between& between,
                                  const Finish& finish, const More& more, int64_t row,
                                  int64_t column) {
  using Real = typename Arith::Accumulator;
  constexpr int L = kLanes<Real>;
  const int64_t steps_more = more.count(row, BlockRows);
  auto ask = between.take((K + steps_more) / kStepsPerLine<L>);
  Vector<Real> sum[BlockRows][Vectors];
  unroll<BlockRows>([&](auto i) FASTATTN_INLINE_LAMBDA {
    unroll<Vectors>([&](auto j) FASTATTN_INLINE_LAMBDA {
      sum[i][j] = Accumulate ? load(C + i * ldc + j * L) : Vector<Real>{};
    });
  });
  multiply_steps<Arith>(K, A, row_stride, k_stride, B, ldb, sum, ask);
  if constexpr (!More::is_nothing) {
    const int64_t k = more.first(row);
    multiply_steps<Arith>(steps_more, more.A + row * more.row_stride + k * more.k_stride,
                          more.row_stride, more.k_stride, more.B + column + k * more.ldb, more.ldb,
                          sum, ask);
  }
  unroll<BlockRows>([&](auto i) FASTATTN_INLINE_LAMBDA {
    unroll<Vectors>([&](auto j) FASTATTN_INLINE_LAMBDA {
      store(C + i * ldc + j * L, finish(row + i, column + j * L, sum[i][j]));
    });
  });
}

// One panel of `Vectors` columns: a narrower one takes more rows, to keep as many sums in flight.
// The last rows take a smaller block.
template <class Arith, int Vectors, bool Accumulate, class Between, class Finish, class More>
void matmul_panel(int64_t M, int64_t K, const typename Arith::Element* A, int64_t row_stride,
                  int64_t k_stride, const typename Arith::Element* B, int64_t ldb,
                  typename Arith::Accumulator* C, int64_t ldc, Between& between,
                  const Finish& finish, const More& more, int64_t column) {
  constexpr int rows = std::min(2 * kBlockRows, kBlockRows * kBlockVectors / Vectors);
  int64_t i = 0;
  const auto block = [&](auto count) FASTATTN_INLINE_LAMBDA {
    matmul_block<Arith, count, Vectors, Accumulate>(K, A + i * row_stride, row_stride, k_stride, B,
                                                    ldb, C + i * ldc, ldc, between, finish,
                                                    more, i, column);
    i += count;
  };
  while (i + rows <= M) block(std::integral_constant<int, rows>{});
  if (rows > kBlockRows && i + kBlockRows <= M) block(std::integral_constant<int, kBlockRows>{});
  switch (M - i) {
#define FASTATTN_ROWS(n)                       \
  case n:                                      \
    block(std::integral_constant<int, n>{});   \
    break;
    FASTATTN_ROWS(1)
    FASTATTN_ROWS(2)
    FASTATTN_ROWS(3)
    FASTATTN_ROWS(4)
    FASTATTN_ROWS(5)
#undef FASTATTN_ROWS
  }
}

// C (M, N) = A B, or += with Accumulate; `more` may add to it, and `finish`, an epilogue, has the last
// word. N is a multiple of the vector length. A[i, k] is A[i * row_stride + k * k_stride].
template <class Arith, bool Accumulate, class Between = Nothing, class Finish = AsItIs,
          class More = NoMore>
void matmul(int64_t M, int64_t N, int64_t K, const typename Arith::Element* A, int64_t row_stride,
            int64_t k_stride, const typename Arith::Element* B, int64_t ldb,
            typename Arith::Accumulator* C, int64_t ldc, Between&& between = {},
            const Finish& finish = {}, const More& more = {}) {
  if constexpr (Arith::in_tiles) {
    Arith::template multiply<Accumulate>(M, N, K, A, row_stride, k_stride, B, ldb, C, ldc, between,
                                         finish, more);
  } else {
    constexpr int L = kLanes<typename Arith::Accumulator>;
    const auto panel = [&](int64_t j, auto vectors) FASTATTN_INLINE_LAMBDA {
      matmul_panel<Arith, vectors, Accumulate>(M, K, A, row_stride, k_stride, B + j, ldb, C + j,
                                               ldc, between, finish, more, j);
    };
    int64_t j = 0;
    for (; j + kBlockVectors * L <= N; j += kBlockVectors * L)
      panel(j, std::integral_constant<int, kBlockVectors>{});
    unroll<kBlockVectors - 1>([&](auto i) FASTATTN_INLINE_LAMBDA {
      if ((N - j) / L == i + 1) panel(j, std::integral_constant<int, i + 1>{});
    });
  }
}

// Scores of a chunk: C[i, j] = sum_k A[i, k] B[k, j] + added[i] for j <= i, zero above the diagonal to
// the nearest block of rows. What is past those blocks is not written.
template <class Arith, class Between = Nothing>
void matmul_to_lower(int64_t rows, int64_t K, const typename Arith::Element* A, int64_t row_stride,
                     int64_t k_stride, const typename Arith::Element* B, int64_t ldb,
                     typename Arith::Accumulator* C, int64_t ldc,
                     const typename Arith::Accumulator* added = nullptr, Between&& between = {}) {
  using Real = typename Arith::Accumulator;
  constexpr int L = kLanes<Real>;
  constexpr int64_t step = Arith::score_rows;
  for (int64_t i = 0; i < rows; i += step) {
    const int64_t count = rows - i < step ? rows - i : step;
    const int64_t columns = (i + count + L - 1) / L * L;
    matmul<Arith, false>(count, columns, K, A + i * row_stride, row_stride, k_stride, B, ldb,
                         C + i * ldc, ldc, between,
                         KeptLower<Real>{i, added ? added + i : nullptr});
  }
}

// C (N, M) = A^T for A (M, N); C's rows are padded with zeros to ldc. Element is as wide as Real.
template <class Real, class Element>
void transpose(int64_t M, int64_t N, const Element* A, int64_t lda, Element* C, int64_t ldc) {
  constexpr int L = kLanes<Real>;
  static_assert(sizeof(Element) == sizeof(Real), "moved in registers of Real");
  const int64_t whole_M = M / L * L, whole_N = N / L * L;
  for (int64_t i = 0; i < whole_M; i += L)
    for (int64_t j = 0; j < whole_N; j += L) {
      Vector<Real> block[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        __builtin_memcpy(&block[r], A + (i + r) * lda + j, sizeof block[r]);
      transpose_lanes<Real, 1>(block);
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r)
        __builtin_memcpy(C + (j + r) * ldc + i, &block[r], sizeof block[r]);
    }
  for (int64_t j = 0; j < N; ++j) {
    for (int64_t i = j < whole_N ? whole_M : 0; i < M; ++i) C[j * ldc + i] = A[i * lda + j];
    for (int64_t i = M; i < ldc; ++i) C[j * ldc + i] = 0;
  }
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
