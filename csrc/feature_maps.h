// The elementwise part of every feature map phi and of its derivative, written once for scalars
// and vectors: `Value` is float or double, or a vector of them, on the host or on a device. What a
// map needs beyond elements (row or column reductions) is with the tile helpers that own rows.
//
// phi' is expressed in phi, not in x, so a backward pass needs no second copy of its input.
#pragma once

#include "problem.h"

#if defined(__CUDACC__)
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FASTATTN_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace fastattn {

// exp is taken of at most this, for keys and for unnormalised queries: sums of e^40 over millions
// of tokens stay far inside float32. Below exp(-87) a float32 is denormal; see exp in simd.h.
constexpr double kExpClamp = 40.0;
constexpr double kExpOfClamp = 2.3538526683701998541e17;

// A NaN must come out as one, not as a feature of 0 or 1: comparisons below are written so that it
// takes the branch that keeps it.

// elu(x) + 1 = e^min(x, 0) + max(x, 0): x + 1 for x > 0, else e^x (Katharopoulos et al. 2020). Never
// expm1(x) + 1: it cancels for negative x. `exponential` is the first term, NaN for a NaN.
template <class Value>
FASTATTN_HOST_DEVICE Value phi_elu(Value exponential, Value positive) {
  return exponential + positive;
}

template <class Value>
FASTATTN_HOST_DEVICE Value slope_elu(Value phi, Value one) {
  return phi < one ? phi : one;
}

template <class Value>
FASTATTN_HOST_DEVICE Value phi_relu(Value x, Value zero) {
  return x < zero ? zero : x;
}

template <class Value>
FASTATTN_HOST_DEVICE Value slope_relu(Value phi, Value zero, Value one) {
  return phi > zero ? one : zero;
}

// d exp(min(x, clamp)) / dx: nothing flows where the clamp holds.
template <class Value>
FASTATTN_HOST_DEVICE Value slope_exp(Value phi, Value zero, Value exp_of_clamp) {
  return phi < exp_of_clamp ? phi : zero;
}

}  // namespace fastattn
