// A chunk of the causal form: what the kernels of its two passes hold in scratch. Scores are zero above
// the diagonal: products clear their blocks, and nothing else is ever written there.
#pragma once

#include "operand.h"
#include "parallel.h"
#include "segments.h"

namespace fastattn {
namespace FASTATTN_ISA {

// sums[r] += the sum of row r of the scores, which are zero above the diagonal.
template <class Arith, class Real>
void add_sums_of_lower(const Real* scores, int64_t rows, Real* sums) {
  constexpr int64_t kChunk = Arith::chunk_rows;
  constexpr int L = kLanes<Real>;
  for (int64_t r = 0; r < rows; r += L) {
    Vector<Real> partial[L]{};
    for (int64_t i = 0; i < std::min<int64_t>(L, rows - r); ++i)
      for (int64_t c = 0; c < r + L; c += L)
        partial[i] += load(scores + (r + i) * kChunk + c);
    store(sums + r, load(sums + r) + sums_of_lanes<Real>(partial));
  }
}

// The product of scores, paired along columns, and rows of the chunk; or of their transpose, paired
// along rows.
template <class Arith, class Element>
Triangle<Arith> of_scores(int64_t rows, const Element* A, const Element* B, int64_t ldb) {
  using Pack = Operand<Arith>;
  const int64_t lda = Pack::elements(Arith::chunk_rows);
  return {A, lda, 1, B, ldb, Pack::elements(rows), Pack::per_element, false};
}

template <class Arith, class Element>
Triangle<Arith> of_scores_transposed(int64_t rows, const Element* A, const Element* B,
                                     int64_t ldb) {
  using Pack = Operand<Arith>;
  return {A, 1, Arith::chunk_rows, B, ldb, Pack::elements(rows), Pack::per_element, true};
}

// One chunk, and operands of 16-bit arithmetic, paired along tokens or features.
template <class Real, class Arith>
struct ForwardChunk {
  using Pack = Operand<Arith>;
  using Element = typename Arith::Element;
  static constexpr int64_t kChunk = Arith::chunk_rows;

  ForwardChunk(const Sizes<Real>& n, Scratch& scratch) : state(n.take_state(scratch)) {
    const auto reals = [&](int64_t size) { return scratch.template take<Real>(size); };
    const auto elements = [&](int64_t size) { return Pack::take(scratch, size); };
    phi_k = reals(kChunk * n.feature_width);
    value = reals(kChunk * n.value_width);
    phi_q = reals(kChunk * n.feature_width);
    out = reals(kChunk * n.value_width);
    phi_k_transposed = reals(n.feature_width * kChunk);
    scores = reals(kChunk * kChunk);
    zero(scores, kChunk * kChunk);
    inverse_norm = reals(kChunk);
    phi_k_tokens = elements(kChunk * n.feature_width);
    phi_k_features = elements(kChunk * n.feature_width);  // packed, then transposed
    value_tokens = elements(kChunk * n.value_width);
    phi_q_features = elements(kChunk * n.feature_width);
    scores_tokens = elements(kChunk * kChunk);
    state_features = elements(n.feature_width * n.value_width);
    z = reals(n.feature_width);
  }
  LocalState<Real> state;  // of all tokens before the chunk
  Real *phi_k, *value, *phi_q, *out, *phi_k_transposed, *scores, *inverse_norm;
  Real* z;  // sums of the chunk's phi(k)
  Element *phi_k_tokens, *phi_k_features, *value_tokens, *phi_q_features, *scores_tokens,
      *state_features;
};

// 1 / den and delta of every query row of one segment, for each query head of a kv head.
template <class Real>
struct RowFactors {
  Real* data;
  int64_t length;  // room for tokens
  int64_t begin;   // first token of the segment

  Real* inverse(int64_t head_in_group, int64_t t) const {
    return data + 2 * head_in_group * length + (t - begin);
  }
  Real* delta(int64_t head_in_group, int64_t t) const {
    return inverse(head_in_group, t) + length;
  }
};

// The same of the backward sweeps: one chunk, its operands, and the states around it.
template <class Real, class Arith>
struct BackwardChunk {
  using Pack = Operand<Arith>;
  using Element = typename Arith::Element;
  static constexpr int64_t kChunk = Arith::chunk_rows;

  BackwardChunk(const Sizes<Real>& n, Scratch& scratch)
      : state(n.take_state(scratch)) {
    const auto reals = [&](int64_t size) { return scratch.template take<Real>(size); };
    const auto elements = [&](int64_t size) { return Pack::take(scratch, size); };
    const int64_t fw = n.feature_width, vw = n.value_width;
    phi_k = reals(kChunk * fw);
    value = reals(kChunk * vw);
    dphi_k = reals(kChunk * fw);
    dvalue = reals(kChunk * vw);
    phi_q = reals(kChunk * fw);
    g = reals(kChunk * vw);
    dphi_q = reals(kChunk * fw);
    z = reals(kChunk * fw);
    phi_k_transposed = reals(fw * kChunk);
    value_transposed = reals(vw * kChunk);
    scores = reals(kChunk * kChunk);
    zero(scores, kChunk * kChunk);
    inverse_norm_k = reals(kChunk);
    inverse_norm_q = reals(kChunk);
    state_transposed = reals(vw * fw);
    phi_k_tokens = elements(kChunk * fw);
    phi_k_features = elements(kChunk * fw);  // packed, then transposed
    value_tokens = elements(kChunk * vw);
    value_features = elements(kChunk * vw);  // the same
    phi_q_tokens = elements(kChunk * fw);
    phi_q_features = elements(kChunk * fw);
    g_tokens = elements(kChunk * vw);
    g_features = elements(kChunk * vw);
    scores_tokens = elements(kChunk * kChunk);
    state_features = elements(fw * vw);
    gradient_features = elements(fw * vw);
  }
  LocalState<Real> state;  // or its gradient, of all tokens before the chunk (after it)
  Real *phi_k, *value, *dphi_k, *dvalue, *phi_q, *g, *dphi_q;
  Real* z;  // up to and including every key of the chunk
  Real *phi_k_transposed, *value_transposed, *scores, *inverse_norm_k, *inverse_norm_q;
  Real* state_transposed;
  Element *phi_k_tokens, *phi_k_features, *value_tokens, *value_features, *phi_q_tokens,
      *phi_q_features, *g_tokens, *g_features, *scores_tokens, *state_features, *gradient_features;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
