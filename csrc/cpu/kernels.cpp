// Compiled once per instruction set, with FASTATTN_ISA naming it and its namespace.
#include "kernels.h"

#include <chrono>

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
  if (!problem.is_causal)
    NonCausal<Real, Arith>(problem, args).forward();
  else if (problem.form == Form::recurrent)
    Recurrent<Real>(problem, args).forward();
  else
    Causal<Real, Arith>(problem, args).forward();
}

template <class Real, class Arith>
void backward_as(const Problem& problem, const Arguments& args) {
  if (problem.is_causal)
    Causal<Real, Arith>(problem, args).backward();
  else
    NonCausal<Real, Arith>(problem, args).backward();
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
      return backward_as<double, Plain<double>>(problem, args);
    case DType::bf16:
      // The gradient of a softmax over tokens is a difference, which rounded products would leave.
      if (problem.feature_map != FeatureMap::efficient)
        return backward_as<float, Bf16>(problem, args);
      [[fallthrough]];
    default:
      return backward_as<float, Plain<float>>(problem, args);
  }
}

void step(const Problem& problem, const Arguments& args) {
  if (problem.dtype == DType::f64) return Recurrent<double>(problem, args).step();
  Recurrent<float>(problem, args).step();
}

double multiply_add(double seconds) {
  constexpr int chains = 12, repeats = 4096;
  Vector<float> sum[chains] = {};
  Vector<float> a = splat(0.999f), b = splat(1e-3f);
  asm volatile("" : "+m"(a), "+m"(b));  // not known at compile time
  double operations = 0;
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    for (int i = 0; i < repeats; ++i) {
#pragma GCC unroll 12
      for (int c = 0; c < chains; ++c) sum[c] = sum[c] * a + b;
    }
    operations += 2.0 * kLanes<float> * chains * repeats;
  }
  for (auto& s : sum) asm volatile("" : "+m"(s));
  return operations;
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {FASTATTN_ISA_NAME, forward, backward, step, multiply_add};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
