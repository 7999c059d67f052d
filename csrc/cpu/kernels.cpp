// Compiled once per instruction set, with FASTATTN_ISA naming it and its namespace.
#include "kernels.h"

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "causal.h"
#include "noncausal.h"
#include "recurrent.h"

namespace fastattn {
namespace FASTATTN_ISA {
namespace {

#if defined(__AVX512BF16__)
using Bf16 = Bf16Pairs;
#else
using Bf16 = Plain<float>;  // no bf16 products: computed in float32
#endif

template <class Real, class Arith>
void forward_as(const Problem& problem, const Arguments& args) {
  auto sequences = sequences_of(problem, args);
  if (!problem.is_causal)
    NonCausal<Real, Arith>(problem, args, std::move(sequences)).forward();
  else if (problem.form == Form::recurrent)
    Recurrent<Real>(problem, args, std::move(sequences)).forward();
  else
    Causal<Real, Arith>(problem, args, std::move(sequences)).forward();
}

template <class Real, class Arith = Plain<Real>>
void backward_as(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  if (problem.is_causal)
    Causal<Real, Arith>(problem, args, std::move(sequences)).backward();
  else
    NonCausal<Real, Arith>(problem, args, std::move(sequences)).backward();
}

// Gradients are differences, of which little is left with few keys, in a softmax over tokens and where
// 1 + cosine is close to 0: there the rounding of products to bf16 would show, so they are float32.
void backward_of_bf16(const Problem& problem, const Arguments& args) {
  const bool all_cancel = problem.feature_map == FeatureMap::efficient ||
                          problem.feature_map == FeatureMap::cosine;
  std::vector<Sequence> exact, rounded;
  for (const Sequence& s : sequences_of(problem, args))
    (all_cancel || s.keys.tokens <= kTileRows ? exact : rounded).push_back(s);
  if (!exact.empty()) backward_as<float>(problem, args, std::move(exact));
  if (!rounded.empty()) backward_as<float, Bf16>(problem, args, std::move(rounded));
}

void forward(const Problem& problem, const Arguments& args) {
  switch (problem.dtype) {
    case DType::f64:
      return forward_as<double, Plain<double>>(problem, args);
    case DType::bf16:
      return forward_as<float, Bf16>(problem, args);
    default:
      return forward_as<float, Plain<float>>(problem, args);
  }
}

void backward(const Problem& problem, const Arguments& args) {
  switch (problem.dtype) {
    case DType::f64:
      return backward_as<double>(problem, args, sequences_of(problem, args));
    case DType::bf16:
      return backward_of_bf16(problem, args);
    default:
      return backward_as<float>(problem, args, sequences_of(problem, args));
  }
}

void step(const Problem& problem, const Arguments& args) {
  auto sequences = sequences_of(problem, args);
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
