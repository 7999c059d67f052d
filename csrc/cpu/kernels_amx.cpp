// Products of bf16 on AMX tiles. What does not fit tiles, and everything that is not bf16, is done as
// on AVX-512.
#include <chrono>

#include "kernels.h"
#include "passes.h"

namespace fastattn {
namespace avx512 {
extern const Kernels kernels;
}

namespace FASTATTN_ISA {
namespace {

// Features and values are summed over two by two, in whole tiles.
bool fits_tiles(const Problem& problem) {
  return problem.dtype == DType::bf16 && problem.feature_dim() % (2 * kTile) == 0 &&
         problem.value_dim % (2 * kTile) == 0;
}

void forward(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  if (!fits_tiles(problem))
    return avx512::kernels.forward(problem, args, std::move(sequences));
  forward_as<float, Bf16Tiles>(problem, args, std::move(sequences));
}

void backward(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  const auto without_tiles = [&](std::vector<Sequence> list) {
    avx512::kernels.backward(problem, args, std::move(list));
  };
  if (!fits_tiles(problem)) return without_tiles(std::move(sequences));
  split_by_precision(problem, std::move(sequences), without_tiles, [&](std::vector<Sequence> list) {
    backward_as<float, Bf16Tiles>(problem, args, std::move(list));
  });
}

void step(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  avx512::kernels.step(problem, args, std::move(sequences));
}

double multiply_add(double seconds, bool in_bf16) {
  if (!in_bf16) return avx512::kernels.multiply_add(seconds, false);
  constexpr int repeats = 4096;
  const TileRegisters registers;
  unroll<8>([](auto i) { clear_tile<i>(); });
  double operations = 0;
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    for (int i = 0; i < repeats; ++i)
      unroll<4>([](auto j) FASTATTN_INLINE_LAMBDA { multiply_tiles<j, 4 + j / 2, 6 + j % 2>(); });
    operations += 2.0 * kTile * kTile * 2 * kTile * 4 * repeats;
  }
  return operations;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_ISA_NAME, forward, backward, step, multiply_add};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
