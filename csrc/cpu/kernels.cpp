// Compiled once per instruction set, with FASTATTN_ISA naming it and its namespace.
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "passes.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

#if defined(__AVX512BF16__)
using Bf16 = Bf16Pairs;
#else
using Bf16 = Plain<float>;  // no bf16 products: computed in float32
#endif

void forward(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  switch (problem.dtype) {
    case DType::f64:
      return forward_as<double>(problem, args, std::move(sequences));
    case DType::bf16:
      return forward_as<float, Bf16>(problem, args, std::move(sequences));
    default:
      return forward_as<float>(problem, args, std::move(sequences));
  }
}

void backward(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  const auto in_float32 = [&](std::vector<Sequence> list) {
    backward_as<float>(problem, args, std::move(list));
  };
  switch (problem.dtype) {
    case DType::f64:
      return backward_as<double>(problem, args, std::move(sequences));
    case DType::bf16:
      return split_by_precision(problem, std::move(sequences), in_float32,
                                [&](std::vector<Sequence> list) {
                                  backward_as<float, Bf16>(problem, args, std::move(list));
                                });
    default:
      return in_float32(std::move(sequences));
  }
}

void step(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  if (problem.dtype == DType::f64)
    Recurrent<double>(problem, args, std::move(sequences)).step();
  else
    Recurrent<float>(problem, args, std::move(sequences)).step();
}

template <class Arith>
double multiply_adds(double seconds, const typename Arith::Element& number) {
  constexpr int chains = 12, repeats = 4096;
  Vector<float> sum[chains] = {};
  typename Arith::Element row[kLanes<float>];
  std::fill_n(row, kLanes<float>, number);
  auto a = Arith::broadcast(row);
  auto b = Arith::load_b(row);
  asm volatile("" : "+m"(a), "+m"(b));  // not known at compile time
  double operations = 0;
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    for (int i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < chains; ++c) sum[c] = Arith::multiply_add(a, b, sum[c]);
    }
    operations += 2.0 * Operand<Arith>::per_element * kLanes<float> * chains * repeats;
  }
  for (auto& s : sum) asm volatile("" : "+m"(s));
  return operations;
}

double multiply_add(double seconds, bool in_bf16) {
  return in_bf16 ? multiply_adds<Bf16>(seconds, {}) : multiply_adds<Plain<float>>(seconds, {});
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_ISA_NAME, forward, backward, step, multiply_add};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
