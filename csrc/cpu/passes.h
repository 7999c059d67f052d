// The passes of every form, for one arithmetic; and which gradients bear products in bf16.
#pragma once

#include <utility>
#include <vector>

#include "causal.h"
#include "noncausal.h"
#include "recurrent.h"

namespace fastattn {
namespace FASTATTN_ISA {

// Up to so many tokens, one after another beats a chunk's set-up (_RECURRENT_TOKENS in native.py).
constexpr int64_t kRecurrentTokens = 4;

template <class Real, class Arith = Plain<Real>>
void forward_as(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  if (!problem.is_causal)
    return NonCausal<Real, Arith>(problem, args, std::move(sequences)).forward();
  // Each sequence by itself: what is packed with it must not change its bits.
  std::vector<Sequence> in_chunks, one_by_one;
  for (const Sequence& s : sequences) {
    const bool is_short = problem.form == Form::automatic && s.keys.tokens <= kRecurrentTokens;
    (is_short || problem.form == Form::recurrent ? one_by_one : in_chunks).push_back(s);
  }
  if (!in_chunks.empty()) Causal<Real, Arith>(problem, args, std::move(in_chunks)).forward();
  if (!one_by_one.empty()) Recurrent<Real>(problem, args, std::move(one_by_one)).forward();
}

template <class Real, class Arith = Plain<Real>>
void backward_as(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences) {
  if (problem.is_causal)
    Causal<Real, Arith>(problem, args, std::move(sequences)).backward();
  else
    NonCausal<Real, Arith>(problem, args, std::move(sequences)).backward();
}

// Gradients are differences, of which little is left with few keys, in a softmax over tokens and
// where 1 + cosine is close to 0: there the rounding of products to bf16 would show.
constexpr int64_t kFewKeys = 48;

// Calls in_float32 with the sequences that need it, and in_bf16 with the others.
template <class Exact, class Rounded>
void split_by_precision(const Problem& problem, std::vector<Sequence> sequences,
                        const Exact& in_float32, const Rounded& in_bf16) {
  const bool all_cancel = problem.feature_map == FeatureMap::efficient ||
                          problem.feature_map == FeatureMap::cosine;
  std::vector<Sequence> exact, rounded;
  for (const Sequence& s : sequences)
    (all_cancel || s.keys.tokens <= kFewKeys ? exact : rounded).push_back(s);
  if (!exact.empty()) in_float32(std::move(exact));
  if (!rounded.empty()) in_bf16(std::move(rounded));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
