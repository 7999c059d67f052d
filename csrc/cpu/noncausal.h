// Non-causal linear attention: every query attends to every key.
//
//   S = sum_j phi(k_j) v_j^T     z = sum_j phi(k_j)     out_i = phi(q_i) S / max(phi(q_i) . z, eps)
//
// Forward reads k, v once (S and z stay in cache), then q once. Backward, with g_i = do_i / den_i,
//
//   u_i = S g_i    delta_i = -phi(q_i) . u_i / den_i    dphi(q_i) = u_i + delta_i z
//   dS = sum_i phi(q_i) g_i^T    dz = sum_i delta_i phi(q_i)
//   dphi(k_j) = dS v_j + dz      dv_j = dS^T phi(k_j)
//
// reads q and do once, then k and v once, from the saved S and z alone.
#pragma once

#include "call.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real, class Arith>
class NonCausal : private Call<Real> {
  static constexpr int64_t kRows = 64;  // tokens of a tile
  using Element = typename Arith::Element;
  using Pack = Operand<Arith>;
  using Base = Call<Real>;
  using typename Base::Buffer;
  using Base::a_, Base::n_, Base::p_, Base::phi_, Base::sequences_;
  using Base::divides, Base::head, Base::heads, Base::mask_at, Base::state_at, Base::state_stride;
  using Base::for_heads, Base::for_key_segments, Base::for_query_segments;

 public:
  NonCausal(const Problem& problem, const Arguments& args) : Base(problem, args) {}

  void forward() {
    if (Base::whole_heads()) {
      for_heads([&](const Sequence& s, int64_t h) {
        Scratch scratch;
        const auto maximum = key_maximum(s, h, 0, s.keys.count, scratch);
        const auto total = n_.take_state(scratch), part = n_.take_state(scratch);
        const KeyTile tile(n_, scratch);
        n_.read(a_.initial, head(s, h), total);
        for (int64_t i = 0; i < s.keys.count; ++i) {
          sum_keys(s, h, i, maximum, part, tile);
          n_.merge(total, part);
        }
        finish(s, h, total, maximum);
        const QueryTile queries(n_, total.S, scratch);
        for (int64_t i = 0; i < s.queries.count; ++i) emit(s, h, i, total, queries);
      });
      return;
    }
    // Few heads: segments are summed in parallel, then folded in the order above.
    const int64_t most = Base::most_segments();
    Buffer parts(heads() * most * state_stride());
    Buffer maxima(heads() * most * n_.feature_width), totals(heads() * state_stride());
    if (p_.feature_map == FeatureMap::efficient) {
      for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
        Scratch scratch;
        const auto maximum = key_maximum(s, h, i, i + 1, scratch);
        copy(maxima.at((head(s, h) * most + i) * n_.feature_width), maximum, n_.feature_width);
      });
      for_heads([&](const Sequence& s, int64_t h) {
        Real* first = maxima.at(head(s, h) * most * n_.feature_width);
        for (int64_t i = 1; i < s.keys.count; ++i)
          for (int64_t f = 0; f < n_.feature_width; ++f)
            first[f] = std::max(first[f], first[i * n_.feature_width + f]);
      });
    }
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const KeyTile tile(n_, scratch);
      sum_keys(s, h, i, maxima.at(head(s, h) * most * n_.feature_width),
               state_at(parts, head(s, h) * most + i), tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      const auto total = state_at(totals, head(s, h));
      n_.read(a_.initial, head(s, h), total);
      for (int64_t i = 0; i < s.keys.count; ++i)
        n_.merge(total, state_at(parts, head(s, h) * most + i));
      finish(s, h, total, maxima.at(head(s, h) * most * n_.feature_width));
    });
    for_query_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const auto total = state_at(totals, head(s, h));
      const QueryTile queries(n_, total.S, scratch);
      emit(s, h, i, total, queries);
    });
  }

  void backward() {
    if (Base::whole_heads()) {
      for_heads([&](const Sequence& s, int64_t h) {
        Scratch scratch;
        const auto gradient = n_.take_state(scratch), part = n_.take_state(scratch);
        const BackwardTile tile(*this, s, h, scratch);
        n_.read(a_.grad_final, head(s, h), gradient);
        for (int64_t i = 0; i < s.queries.count; ++i) {
          backward_queries(s, h, i, part, tile);
          n_.merge(gradient, part);
        }
        n_.write(a_.grad_initial, head(s, h), gradient);
        tile.transpose_gradient(gradient);
        for (int64_t i = 0; i < s.keys.count; ++i) backward_keys(s, h, i, gradient, tile);
      });
      return;
    }
    const int64_t most = Base::most_segments();
    Buffer parts(heads() * most * state_stride()), gradients(heads() * state_stride());
    for_query_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, s, h, scratch);
      backward_queries(s, h, i, state_at(parts, head(s, h) * most + i), tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      const auto gradient = state_at(gradients, head(s, h));
      n_.read(a_.grad_final, head(s, h), gradient);
      for (int64_t i = 0; i < s.queries.count; ++i)
        n_.merge(gradient, state_at(parts, head(s, h) * most + i));
      n_.write(a_.grad_initial, head(s, h), gradient);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, s, h, scratch);
      const auto gradient = state_at(gradients, head(s, h));
      tile.transpose_gradient(gradient);
      backward_keys(s, h, i, gradient, tile);
    });
  }

 private:
  // ---- forward ----------------------------------------------------------------------------------

  struct KeyTile {
    template <class S>
    KeyTile(const Sizes<Real>& n, S& scratch)
        : phi(scratch.template take<Real>(kRows * n.feature_width)),
          value(scratch.template take<Real>(kRows * n.value_width)),
          inverse_norm(scratch.template take<Real>(kRows)),
          phi_pairs(Pack::copies ? scratch.template take<Element>(kRows * n.feature_width) : nullptr),
          value_pairs(Pack::copies ? scratch.template take<Element>(kRows * n.value_width)
                                   : nullptr) {}
    Real *phi, *value, *inverse_norm;
    Element *phi_pairs, *value_pairs;
  };

  // part = sums over the keys of segment i, from zero.
  void sum_keys(const Sequence& s, int64_t h, int64_t i, const Real* maximum,
                LocalState<Real> part, const KeyTile& tile) const {
    n_.clear(part);
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t), token = s.key_begin + t;
      const MaskRow mask = mask_at(s.batch, token);
      phi_.of_keys(a_.key, a_.key.offset(s.batch, h, token), rows, mask, {maximum, nullptr},
                   tile.phi, tile.inverse_norm);
      const auto value = read_values(a_.value, a_.value.offset(s.batch, h, token), p_.dtype, rows,
                                     n_.values, mask, tile.value, n_.value_width);
      const Element* A =
          Pack::pair_rows(tile.phi, rows, n_.feature_width, n_.feature_width, tile.phi_pairs);
      const Element* B =
          Pack::pair_rows(value.data, rows, n_.value_width, value.ld, tile.value_pairs);
      matmul<Arith, true>(n_.features, n_.value_width,
                          (rows + Pack::per_element - 1) / Pack::per_element, A, 1,
                          n_.feature_width, B, Pack::copies ? n_.value_width : value.ld, part.S,
                          n_.value_width);
      for (int64_t r = 0; r < rows; ++r)
        add(part.z, tile.phi + r * n_.feature_width, n_.feature_width);
    }
  }

  // Turns sums into the state proper, and hands it on.
  void finish(const Sequence& s, int64_t h, LocalState<Real> total, const Real* maximum) const {
    const bool efficient = p_.feature_map == FeatureMap::efficient;
    if (efficient) {  // z holds the sums of exp: the softmax over tokens divides each row by its own
      for (int64_t f = 0; f < n_.features; ++f) {
        total.z[f] = total.z[f] > 0 ? 1 / total.z[f] : 0;
        scale_row(total.S + f * n_.value_width, total.z[f], n_.value_width);
      }
    }
    n_.write(a_.final, head(s, h), total);
    if (!p_.needs_grad) return;
    const State saved = saved_at(s, h);
    n_.write(saved, 0, total);
    if (efficient) copy(static_cast<Real*>(saved.z) + n_.features, maximum, n_.features);
  }

  struct QueryTile {
    template <class S>
    QueryTile(const Sizes<Real>& n, const Real* state, S& scratch)
        : phi(scratch.template take<Real>(kRows * n.feature_width)),
          out(scratch.template take<Real>(kRows * n.value_width)),
          inverse_norm(scratch.template take<Real>(kRows)),
          phi_pairs(Pack::copies ? scratch.template take<Element>(kRows * n.feature_width) : nullptr),
          state_pairs(Pack::copies
                          ? scratch.template take<Element>(n.feature_width * n.value_width)
                          : nullptr) {
      S_operand = Pack::pair_rows(state, n.features, n.value_width, n.value_width, state_pairs);
    }
    Real *phi, *out, *inverse_norm;
    Element *phi_pairs, *state_pairs;
    const Element* S_operand;
  };

  void emit(const Sequence& s, int64_t h, int64_t i, LocalState<Real> total,
            const QueryTile& tile) const {
    const bool in_place = writes_in_place<Real>(a_.out, p_.dtype, n_.values, n_.value_width);
    for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q)
      for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
        const int64_t rows = std::min(kRows, s.queries.end(i) - t), token = s.query_begin + t;
        phi_.of_queries(a_.query, a_.query.offset(s.batch, q, token), rows, tile.phi,
                        tile.inverse_norm);
        if (divides())
          for (int64_t r = 0; r < rows; ++r) {
            Real* row = tile.phi + r * n_.feature_width;
            scale_row(row, inverse_denominator<Real>(dot(row, total.z, n_.feature_width), p_.eps),
                      n_.feature_width);
          }
        const int64_t offset = a_.out.offset(s.batch, q, token);
        Real* out = in_place ? static_cast<Real*>(a_.out.data) + offset : tile.out;
        const int64_t ld = in_place ? a_.out.token : n_.value_width;
        const Element* A = Pack::pair_columns(tile.phi, rows, n_.feature_width, tile.phi_pairs);
        matmul<Arith, false>(rows, n_.value_width,
                             (n_.features + Pack::per_element - 1) / Pack::per_element, A,
                             n_.feature_width / Pack::per_element, 1, tile.S_operand,
                             n_.value_width, out, ld);
        if (!in_place) write_tile(a_.out, offset, p_.dtype, rows, n_.values, tile.out, ld);
      }
  }

  // max over the keys of segments [first, last), for `efficient`; null for the other maps.
  template <class S>
  Real* key_maximum(const Sequence& s, int64_t h, int64_t first, int64_t last, S& scratch) const {
    if (p_.feature_map != FeatureMap::efficient) return nullptr;
    Real* maximum = scratch.template take<Real>(n_.feature_width);
    Real* row = scratch.template take<Real>(n_.feature_width);
    std::fill_n(maximum, n_.feature_width, -std::numeric_limits<Real>::max());
    for (int64_t i = first; i < last; ++i) {
      const int64_t token = s.key_begin + s.keys.begin(i);
      phi_.raise_to_maximum(a_.key, a_.key.offset(s.batch, h, token),
                            s.keys.end(i) - s.keys.begin(i), mask_at(s.batch, token), maximum, row);
    }
    return maximum;
  }

  // S, z and for `efficient` the maxima of one head, kept for backward.
  State saved_at(const Sequence& s, int64_t h) const {
    return n_.saved_state(a_.saved, saved_size(p_) / heads(), head(s, h));
  }

  // ---- backward ---------------------------------------------------------------------------------

  // What both backward passes of one head share: the saved state and tiles.
  struct BackwardTile {
    template <class Sc>
    BackwardTile(const NonCausal& kernel, const Sequence& s, int64_t h, Sc& scratch)
        : n(kernel.n_),
          state(n.take_state(scratch)),
          S_transposed(scratch.template take<Real>(n.value_width * n.feature_width)),
          dS_transposed(scratch.template take<Real>(n.value_width * n.feature_width)),
          maximum(scratch.template take<Real>(n.feature_width)),
          inverse_sum(scratch.template take<Real>(n.feature_width)),
          column_sum(scratch.template take<Real>(n.feature_width)),
          phi(scratch.template take<Real>(kRows * n.feature_width)),
          dphi(scratch.template take<Real>(kRows * n.feature_width)),
          value(scratch.template take<Real>(kRows * n.value_width)),
          dvalue(scratch.template take<Real>(kRows * n.value_width)),
          inverse_norm(scratch.template take<Real>(kRows)) {
      const State saved = kernel.saved_at(s, h);
      n.read(saved, 0, state);
      if (kernel.p_.feature_map == FeatureMap::efficient) {
        zero(maximum, n.feature_width);
        copy(maximum, static_cast<const Real*>(saved.z) + n.features, n.features);
        copy(inverse_sum, state.z, n.feature_width);
      }
      transpose(n.features, n.values, state.S, n.value_width, S_transposed, n.feature_width);
    }

    // Prepares the pass over keys.
    void transpose_gradient(LocalState<Real> gradient) const {
      transpose(n.features, n.values, gradient.S, n.value_width, dS_transposed, n.feature_width);
      zero(column_sum, n.feature_width);
      for (int64_t f = 0; f < n.features; ++f)
        column_sum[f] = dot(gradient.S + f * n.value_width, state.S + f * n.value_width,
                            n.value_width);
    }

    const Sizes<Real>& n;
    LocalState<Real> state;
    Real *S_transposed, *dS_transposed, *maximum, *inverse_sum, *column_sum;
    Real *phi, *dphi, *value, *dvalue, *inverse_norm;
  };

  // Writes dq of segment i for every query head of h; part = sums of phi(q) g^T and delta phi(q).
  void backward_queries(const Sequence& s, int64_t h, int64_t i, LocalState<Real> part,
                        const BackwardTile& tile) const {
    using Exact = Plain<Real>;
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    n_.clear(part);
    for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q)
      for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
        const int64_t rows = std::min(kRows, s.queries.end(i) - t), token = s.query_begin + t;
        phi_.of_queries(a_.query, a_.query.offset(s.batch, q, token), rows, tile.phi,
                        tile.inverse_norm);
        Real inverse[kRows], slope[kRows];
        for (int64_t r = 0; r < rows; ++r) {
          Real* g = tile.value + r * vw;
          read_row(a_.grad_out, a_.grad_out.offset(s.batch, q, token + r), p_.dtype, n_.values, g,
                   vw);
          inverse[r] = slope[r] = 1;
          if (!divides()) continue;
          const Real den = dot(tile.phi + r * fw, tile.state.z, fw);
          inverse[r] = inverse_denominator<Real>(den, p_.eps);
          slope[r] = denominator_slope<Real>(den, p_.eps);
          scale_row(g, inverse[r], vw);
        }
        matmul<Exact, false>(rows, fw, n_.values, tile.value, vw, 1, tile.S_transposed, fw,
                             tile.dphi, fw);
        if (divides())
          for (int64_t r = 0; r < rows; ++r) {
            Real* u = tile.dphi + r * fw;
            const Real delta = -dot(tile.phi + r * fw, u, fw) * slope[r];
            add_scaled(u, tile.state.z, delta, fw);
            add_scaled(part.z, tile.phi + r * fw, delta, fw);
          }
        matmul<Exact, true>(n_.features, vw, rows, tile.phi, 1, fw, tile.value, vw, part.S, vw);
        phi_.chain_queries(tile.phi, tile.inverse_norm, rows, tile.dphi);
        write_tile(a_.grad_query, a_.grad_query.offset(s.batch, q, token), p_.dtype, rows,
                   p_.head_dim, tile.dphi, fw);
      }
  }

  // Writes dk and dv of segment i.
  void backward_keys(const Sequence& s, int64_t h, int64_t i, LocalState<Real> gradient,
                     const BackwardTile& tile) const {
    using Exact = Plain<Real>;
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t), token = s.key_begin + t;
      const MaskRow mask = mask_at(s.batch, token);
      phi_.of_keys(a_.key, a_.key.offset(s.batch, h, token), rows, mask,
                   {tile.maximum, tile.inverse_sum}, tile.phi, tile.inverse_norm);
      const auto value = read_values(a_.value, a_.value.offset(s.batch, h, token), p_.dtype, rows,
                                     n_.values, mask, tile.value, vw);
      matmul<Exact, false>(rows, fw, n_.values, value.data, value.ld, 1, tile.dS_transposed, fw,
                           tile.dphi, fw);
      for (int64_t r = 0; r < rows; ++r) add(tile.dphi + r * fw, gradient.z, fw);
      matmul<Exact, false>(rows, vw, n_.features, tile.phi, fw, 1, gradient.S, vw, tile.dvalue, vw);
      phi_.chain_keys(tile.phi, tile.inverse_norm, rows, mask, tile.column_sum, tile.dphi);
      write_tile(a_.grad_key, a_.grad_key.offset(s.batch, h, token), p_.dtype, rows, p_.head_dim,
                 tile.dphi, fw);
      write_tile(a_.grad_value, a_.grad_value.offset(s.batch, h, token), p_.dtype, rows, n_.values,
                 tile.dvalue, vw);
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
