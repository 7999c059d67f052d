// Intel AMX: the matrix product on whole tiles of bf16, sixteen rows of 64 bytes each.
//
//   C (16, 16) float32 += A (16, 16 pairs) B (16 pairs, 16)
//
// Operands lie as those of Bf16Pairs do, so one load is one tile; k is padded with zeros to whole
// tiles (Operand<Bf16Tiles> does that), and rows of C past the last are there to be overwritten.
// The instructions are written out: a compiler may move memory accesses across its own intrinsics,
// which do not say what they read.
#pragma once

#include <type_traits>

#include "matmul.h"

#if defined(FASTATTN_TILES)

namespace fastattn {
namespace FASTATTN_ISA {

constexpr int64_t kTile = 16;  // rows of a tile, its pairs of bf16, its float32

// All eight tile registers, 16 rows of 64 bytes, for as long as a thread multiplies. They are given
// back, so that whoever multiplies next (oneDNN) finds none that it did not ask for.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } configuration;
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

template <int Register>
FASTATTN_INLINE void load_tile(const void* data, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(data), "r"(stride), "i"(Register) : "memory");
}

template <int Register>
FASTATTN_INLINE void store_tile(void* data, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(data), "r"(stride), "i"(Register) : "memory");
}

template <int Register>
FASTATTN_INLINE void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}

template <int C, int A, int B>
FASTATTN_INLINE void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// A block of C, up to 2 by 2 tiles, in registers 0 to 3 while k runs; 4 and 5 hold A, 6 and 7 B.
template <int Rows, int Columns, bool Accumulate>
FASTATTN_INLINE void tile_block(int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B,
                                int64_t ldb, float* C, int64_t ldc) {
  const auto each = [&](const auto& body) FASTATTN_INLINE_LAMBDA {
    unroll<Rows>([&](auto i) FASTATTN_INLINE_LAMBDA {
      unroll<Columns>([&](auto j) FASTATTN_INLINE_LAMBDA { body(i, j); });
    });
  };
  each([&](auto i, auto j) FASTATTN_INLINE_LAMBDA {
    if constexpr (Accumulate)
      load_tile<2 * i + j>(C + i * kTile * ldc + j * kTile, ldc * 4);
    else
      clear_tile<2 * i + j>();
  });
  for (int64_t k = 0; k < K; k += kTile) {
    unroll<Columns>([&](auto j) FASTATTN_INLINE_LAMBDA {
      load_tile<6 + j>(B + k * ldb + j * kTile, ldb * 4);
    });
    unroll<Rows>([&](auto i) FASTATTN_INLINE_LAMBDA {
      load_tile<4 + i>(A + i * kTile * lda + k, lda * 4);
      unroll<Columns>([&](auto j) FASTATTN_INLINE_LAMBDA {
        multiply_tiles<2 * i + j, 4 + i, 6 + j>();
      });
    });
  }
  each([&](auto i, auto j) FASTATTN_INLINE_LAMBDA {
    store_tile<2 * i + j>(C + i * kTile * ldc + j * kTile, ldc * 4);
  });
}

// Two rows of tiles of C, or one, from A with its pairs side by side.
template <int Rows, bool Accumulate, class Between>
void tile_panel(int64_t N, int64_t K, const uint32_t* A, int64_t lda, const uint32_t* B,
                int64_t ldb, float* C, int64_t ldc, Between& between) {
  constexpr int64_t lines = Rows * 2 * kTile * kTile / 8;  // for every eight numbers, as in matmul.h
  int64_t j = 0;
  for (; j + 2 * kTile <= N; j += 2 * kTile) {
    auto ask = between.take(lines);
    for (int64_t i = 0; i < ask.count(); ++i) ask();
    tile_block<Rows, 2, Accumulate>(K, A, lda, B + j, ldb, C + j, ldc);
  }
  if (j < N) tile_block<Rows, 1, Accumulate>(K, A, lda, B + j, ldb, C + j, ldc);
}

// Pairs as in Bf16Pairs, multiplied by the tile.
struct Bf16Tiles {
  using Element = uint32_t;
  using Accumulator = float;
  using Registers = TileRegisters;
  static constexpr bool in_tiles = true;
  static constexpr int64_t tile_rows = 64, chunk_rows = 64, score_rows = 2 * kTile;
  static FASTATTN_INLINE Vector<float> exp(Vector<float> x) { return exp_for_bf16(x); }

  // What `matmul` is here, two tiles of rows at a time.
  template <bool Accumulate, class Between, class Finish, class More>
  static void multiply(int64_t M, int64_t N, int64_t K, const uint32_t* A, int64_t row_stride,
                       int64_t k_stride, const uint32_t* B, int64_t ldb, float* C, int64_t ldc,
                       Between& between, const Finish& finish, const More& more) {
    // Sums that are added to the result: tiles are stored whole, so they pass through here.
    constexpr int64_t most_columns = Finish::reads_result ? 256 : kTile;
    alignas(64) float sums[2 * kTile * most_columns];
    for (int64_t i = 0; i < M; i += 2 * kTile) {
      const int64_t rows = std::min(2 * kTile, M - i);
      float* out = C + i * ldc;
      float* to = Finish::reads_result ? sums : out;
      const int64_t ld = Finish::reads_result ? N : ldc;
      add_panel<Accumulate>(rows, N, K, A + i * row_stride, row_stride, k_stride, B, ldb, to, ld,
                            between);
      if constexpr (!More::is_nothing) {
        const int64_t k = more.first(i);
        add_panel<true>(rows, N, more.count(i, rows),
                        more.A + i * more.row_stride + k * more.k_stride, more.row_stride,
                        more.k_stride, more.B + k * more.ldb, more.ldb, to, ld, between);
      }
      if constexpr (!std::is_same_v<Finish, AsItIs>)
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t j = 0; j < N; j += kTile)
            store(out + r * ldc + j, finish(i + r, j, load(to + r * ld + j)));
    }
  }

 private:
  // Up to two tiles of rows. An A whose rows are columns in memory is turned; its K is at most a tile
  // of tokens.
  template <bool Accumulate, class Between>
  static void add_panel(int64_t rows, int64_t N, int64_t K, const uint32_t* A, int64_t row_stride,
                        int64_t k_stride, const uint32_t* B, int64_t ldb, float* C, int64_t ldc,
                        Between& between) {
    constexpr int64_t most = tile_rows / 2;
    alignas(64) uint32_t turned[2 * kTile * most];
    const bool two = rows > kTile;
    if (k_stride != 1) {
      const int64_t whole = (K + kTile - 1) / kTile * kTile;
      transpose<float>(whole, two ? 2 * kTile : kTile, A, k_stride, turned, most);
      A = turned;
      row_stride = most;
    }
    if (two)
      tile_panel<2, Accumulate>(N, K, A, row_stride, B, ldb, C, ldc, between);
    else
      tile_panel<1, Accumulate>(N, K, A, row_stride, B, ldb, C, ldc, between);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn

#endif
