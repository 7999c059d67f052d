// The recurrent form: one token after another, the state updated before it is read.
//
//   S += phi(k) v^T     z += phi(k)     out = phi(q) S / max(phi(q) . z, eps)
//
// One pass over S per token, which is all the memory traffic there is: this is the decode step,
// and the causal form for a handful of tokens.
#pragma once

#include "call.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real>
class Recurrent : private Call<Real> {
  static constexpr int L = kLanes<Real>;
  static constexpr int kVectors = 4;
  using Base = Call<Real>;
  using Base::a_, Base::n_, Base::p_, Base::phi_;

 public:
  Recurrent(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences)
      : Base(problem, args, std::move(sequences)) {}

  // One token; the caller's state is updated in place.
  void step() {
    Base::for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const Token token(n_, scratch);
      const int64_t head = Base::head(s, h);
      const LocalState<Real> state{
          static_cast<Real*>(a_.initial.S) + head * n_.features * n_.values,
          static_cast<Real*>(a_.initial.z) + head * n_.features};
      advance(s, h, 0, state, n_.values, token);
    });
  }

  void forward() {
    Base::for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const Token token(n_, scratch);
      const auto state = n_.take_state(scratch);
      n_.read(a_.initial, Base::head(s, h), state);
      for (int64_t i = 0; i < s.keys.count; ++i) {
        if (p_.needs_grad && i > 0)
          n_.write(n_.saved_state(a_.saved, p_.state_size(),
                                  (s.first_anchor + i - 1) * p_.num_kv_heads + h),
                   0, state);
        for (int64_t t = s.keys.begin(i); t < s.keys.end(i); ++t)
          advance(s, h, t, state, n_.value_width, token);
      }
      n_.write(a_.final, Base::head(s, h), state);
    });
  }

 private:
  struct Token {
    template <class S>
    Token(const Sizes<Real>& n, S& scratch)
        : phi_k(scratch.template take<Real>(n.feature_width)),
          phi_q(scratch.template take<Real>(n.feature_width)),
          value(scratch.template take<Real>(n.value_width)),
          out(scratch.template take<Real>(n.value_width)) {}
    Real *phi_k, *phi_q, *value, *out;
  };

  void advance(const Sequence& s, int64_t h, int64_t t, LocalState<Real> state, int64_t ld,
               const Token& token) const {
    const MaskRow mask = Base::mask_at(s.batch, s.key_begin + t);
    Real inverse_norm;
    phi_.of_keys(1, mask, {}, Base::keys(s, h, t, 1, mask, token.phi_k), token.phi_k,
                 &inverse_norm);
    const Real* value = Base::values(s, h, t, 1, mask, token.value);
    for (int64_t f = 0; f < n_.features; ++f) state.z[f] += token.phi_k[f];
    Base::for_query_heads(h, [&](int64_t q) {
      phi_.of_queries(1, Base::queries(s, q, t, 1, token.phi_q), token.phi_q, &inverse_norm);
      const Rows<Real> out = Base::place_for_out(s, q, t, token.out);
      if (q == h * n_.group)
        update_and_read<true>(state.S, ld, value, token, out.data);
      else
        update_and_read<false>(state.S, ld, value, token, out.data);
      if (Base::divides()) {
        Real den = 0;
        for (int64_t f = 0; f < n_.features; ++f) den += token.phi_q[f] * state.z[f];
        scale_row(out.data, inverse_denominator<Real>(den, p_.eps), n_.value_width);
      }
      Base::finish_out(s, q, t, 1, out, token.out);
    });
  }

  // out = phi(q) S, after S += phi(k) v^T where `Update`.
  template <bool Update>
  void update_and_read(Real* S, int64_t ld, const Real* value, const Token& token,
                       Real* out) const {
    int64_t j = 0;
    for (; j + kVectors * L <= n_.values; j += kVectors * L)
      columns<Update, kVectors>(S + j, ld, value + j, token, out + j);
    for (; j + L <= n_.values; j += L) columns<Update, 1>(S + j, ld, value + j, token, out + j);
    for (; j < n_.values; ++j) {
      out[j] = 0;
      for (int64_t f = 0; f < n_.features; ++f) {
        if (Update) S[f * ld + j] += token.phi_k[f] * value[j];
        out[j] += token.phi_q[f] * S[f * ld + j];
      }
    }
  }

  template <bool Update, int Vectors>
  void columns(Real* S, int64_t ld, const Real* value, const Token& token, Real* out) const {
    Vector<Real> sum[Vectors] = {};
    for (int64_t f = 0; f < n_.features; ++f) {
      Real* row = S + f * ld;
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) {
        Vector<Real> state = load(row + j * L);
        if (Update) {
          state += load(value + j * L) * token.phi_k[f];
          store(row + j * L, state);
        }
        sum[j] += state * token.phi_q[f];
      }
    }
    for (int j = 0; j < Vectors; ++j) store(out + j * L, sum[j]);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
