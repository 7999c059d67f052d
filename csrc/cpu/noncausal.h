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
class NonCausal : private Call<Real, Arith> {
  using Exact = Plain<Real>;
  using Element = typename Arith::Element;
  using Pack = Operand<Arith>;
  using Base = Call<Real, Arith>;
  using typename Base::Buffer;
  using Base::a_, Base::n_, Base::p_, Base::phi_;
  using Base::divides, Base::head, Base::heads, Base::mask_at;
  using typename Base::HeadRun;
  using Base::kRows;
  using Base::for_heads, Base::for_key_segments, Base::for_query_segments, Base::for_runs_of_heads;

 public:
  NonCausal(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences)
      : Base(problem, args, std::move(sequences)) {}

  void forward() {
    if (Base::whole_heads()) {
      for_runs_of_heads([&](const Sequence& s, HeadRun run) {
        Scratch scratch;
        const auto part = n_.take_state(scratch);
        const auto total = Base::take_states(scratch, run);
        Real* maxima = scratch.template take<Real>(run.count() * n_.feature_width);
        const ForwardTile tile(n_, scratch);
        const auto maximum = [&](int64_t h) { return maxima + (h - run.first) * n_.feature_width; };
        run.each([&](int64_t h) {
          n_.read(a_.initial, head(s, h), total(h));
          find_maximum(s, h, 0, s.keys.count, maximum(h), tile);
        });
        for (int64_t i = 0; i < s.keys.count; ++i)
          run.each([&](int64_t h) {
            sum_keys(s, run, h, i, maximum(h), part, tile);
            n_.merge(total(h), part);
          });
        run.each([&](int64_t h) { finish(s, h, total(h), maximum(h)); });
        for (int64_t i = 0; i < s.queries.count; ++i)
          run.each([&](int64_t h) {
            prepare_state(total(h), tile);
            emit(s, run, h, i, total(h), tile);
          });
      });
      return;
    }
    // Few heads: segments are summed in parallel, then folded in the order above.
    const int64_t most = Base::most_segments(), fw = n_.feature_width;
    Buffer parts(heads() * most * n_.state_stride()), totals(heads() * n_.state_stride());
    Buffer maxima(heads() * most * fw);
    const auto maximum = [&](const Sequence& s, int64_t h, int64_t i) {
      return maxima.data() + (head(s, h) * most + i) * fw;
    };
    const auto part = [&](const Sequence& s, int64_t h, int64_t i) {
      return n_.state_at(parts.data(), head(s, h) * most + i);
    };
    const auto total = [&](const Sequence& s, int64_t h) {
      return n_.state_at(totals.data(), head(s, h));
    };
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      find_maximum(s, h, i, i + 1, maximum(s, h, i), ForwardTile(n_, scratch));
    });
    for_heads([&](const Sequence& s, int64_t h) {
      if (p_.feature_map != FeatureMap::efficient) return;
      Real* first = maximum(s, h, 0);
      for (int64_t i = 1; i < s.keys.count; ++i)
        for (int64_t f = 0; f < fw; ++f) first[f] = std::max(first[f], first[i * fw + f]);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      sum_keys(s, {h, h + 1}, h, i, maximum(s, h, 0), part(s, h, i), ForwardTile(n_, scratch));
    });
    for_heads([&](const Sequence& s, int64_t h) {
      n_.read(a_.initial, head(s, h), total(s, h));
      for (int64_t i = 0; i < s.keys.count; ++i) n_.merge(total(s, h), part(s, h, i));
      finish(s, h, total(s, h), maximum(s, h, 0));
    });
    for_query_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(n_, scratch);
      prepare_state(total(s, h), tile);
      emit(s, {h, h + 1}, h, i, total(s, h), tile);
    });
  }

  void backward() {
    if (Base::whole_heads()) {
      for_runs_of_heads([&](const Sequence& s, HeadRun run) {
        Scratch scratch;
        const auto part = n_.take_state(scratch);
        const auto gradient = Base::take_states(scratch, run);
        const BackwardTile tile(n_, scratch);
        run.each([&](int64_t h) { n_.read(a_.grad_final, head(s, h), gradient(h)); });
        for (int64_t i = 0; i < s.queries.count; ++i)
          run.each([&](int64_t h) {
            restore(s, h, tile);
            backward_queries(s, run, h, i, part, tile);
            n_.merge(gradient(h), part);
          });
        run.each([&](int64_t h) { n_.write(a_.grad_initial, head(s, h), gradient(h)); });
        for (int64_t i = 0; i < s.keys.count; ++i)
          run.each([&](int64_t h) {
            restore(s, h, tile);
            prepare_gradient(gradient(h), tile);
            backward_keys(s, run, h, i, gradient(h), tile);
          });
      });
      return;
    }
    const int64_t most = Base::most_segments();
    Buffer parts(heads() * most * n_.state_stride()), gradients(heads() * n_.state_stride());
    const auto part = [&](const Sequence& s, int64_t h, int64_t i) {
      return n_.state_at(parts.data(), head(s, h) * most + i);
    };
    const auto gradient = [&](const Sequence& s, int64_t h) {
      return n_.state_at(gradients.data(), head(s, h));
    };
    for_query_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(n_, scratch);
      restore(s, h, tile);
      backward_queries(s, {h, h + 1}, h, i, part(s, h, i), tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      n_.read(a_.grad_final, head(s, h), gradient(s, h));
      for (int64_t i = 0; i < s.queries.count; ++i) n_.merge(gradient(s, h), part(s, h, i));
      n_.write(a_.grad_initial, head(s, h), gradient(s, h));
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(n_, scratch);
      restore(s, h, tile);
      prepare_gradient(gradient(s, h), tile);
      backward_keys(s, {h, h + 1}, h, i, gradient(s, h), tile);
    });
  }

 private:
  // ---- forward ----------------------------------------------------------------------------------

  // A tile of tokens, and for 16-bit arithmetic its operands.
  struct ForwardTile {
    ForwardTile(const Sizes<Real>& n, Scratch& scratch) {
      const auto elements = [&](int64_t size) { return Pack::take(scratch, size); };
      phi = scratch.template take<Real>(kRows * n.feature_width);
      value = scratch.template take<Real>(kRows * n.value_width);  // or the outputs
      inverse_norm = scratch.template take<Real>(kRows);
      phi_pairs = elements(kRows * n.feature_width);
      value_pairs = elements(kRows * n.value_width);
      state_pairs = elements(n.feature_width * n.value_width);
    }
    Real *phi, *value, *inverse_norm;
    Element *phi_pairs, *value_pairs, *state_pairs;
  };

  // part = sums over the keys of segment i, from zero.
  void sum_keys(const Sequence& s, HeadRun run, int64_t h, int64_t i, const Real* maximum,
                LocalState<Real> part, const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    n_.clear(part);
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t);
      const MaskRow mask = mask_at(s.batch, s.key_begin + t);
      phi_.of_keys(rows, mask, {maximum, nullptr}, Base::keys(s, h, t, rows, mask, tile.phi),
                   tile.phi, tile.inverse_norm);
      const Element* A = Pack::pair_rows(tile.phi, rows, fw, tile.phi_pairs);
      const Element* B =
          Base::value_operand(s, h, t, rows, mask, tile.value, tile.value_pairs);
      auto ahead = Base::template keys_ahead<false>(s, Base::next_tile(s.keys, run, h, i, t));
      matmul<Arith, true>(n_.features, vw, Pack::elements(rows), A, 1, fw, B, vw, part.S, vw, ahead);
      add_rows(part.z, tile.phi, rows, fw);
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

  // S, z and for `efficient` the maxima of one head, kept for backward.
  State saved_at(const Sequence& s, int64_t h) const {
    return n_.saved_state(a_.saved, saved_size(p_) / heads(), head(s, h));
  }

  void prepare_state(LocalState<Real> total, const ForwardTile& tile) const {
    Pack::pair_rows(total.S, n_.features, n_.value_width, tile.state_pairs);
  }

  // Writes the outputs of segment i.
  void emit(const Sequence& s, HeadRun run, int64_t h, int64_t i, LocalState<Real> total,
            const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const Element* S = Pack::either(total.S, tile.state_pairs);
    for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.queries.end(i) - t);
      Base::for_query_heads(h, [&](int64_t q) {
        phi_.of_queries(rows, Base::queries(s, q, t, rows, tile.phi), tile.phi, tile.inverse_norm);
        const Element* A = Pack::pair_columns(tile.phi, rows, fw, tile.phi_pairs);
        const auto next = Base::next_tile(s.queries, run, h, i, t);
        auto ahead = Base::template queries_ahead<true>(s, next, q - h * n_.group);
        const auto product = [&](const auto& finish) {
          matmul<Arith, false>(rows, vw, Pack::elements(n_.features), A, Pack::elements(fw), 1, S,
                               vw, tile.value, vw, ahead, finish);
        };
        if (divides()) {
          Real inverse[kRows];
          dots(tile.phi, total.z, 0, rows, fw, inverse);
          invert_denominators(inverse, rows, p_.eps);
          product(Scaled<Real>{inverse});
        } else {
          product(AsItIs{});
        }
        Base::write_out(s, q, t, rows, tile.value);
      });
    }
  }

  // max over the keys of segments [first, last), for `efficient`.
  void find_maximum(const Sequence& s, int64_t h, int64_t first, int64_t last, Real* maximum,
                    const ForwardTile& tile) const {
    if (p_.feature_map != FeatureMap::efficient) return;
    std::fill_n(maximum, n_.feature_width, -std::numeric_limits<Real>::max());
    for (int64_t i = first; i < last; ++i)
      for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
        const int64_t rows = std::min(kRows, s.keys.end(i) - t);
        const MaskRow mask = mask_at(s.batch, s.key_begin + t);
        phi_.raise_to_maximum(rows, mask, Base::keys(s, h, t, rows, mask, tile.phi), maximum);
      }
  }

  // ---- backward ---------------------------------------------------------------------------------

  // What both passes share: a tile of tokens, the saved state, and S transposed in the pass over
  // queries, dS in the one over keys.
  struct BackwardTile {
    BackwardTile(const Sizes<Real>& n, Scratch& scratch) : state(n.take_state(scratch)) {
      const auto reals = [&](int64_t size) { return scratch.template take<Real>(size); };
      const auto elements = [&](int64_t size) { return Pack::take(scratch, size); };
      transposed = reals(n.value_width * n.feature_width);
      maximum = reals(n.feature_width);
      column_sums = reals(n.feature_width);
      phi = reals(kRows * n.feature_width);
      dphi = reals(kRows * n.feature_width);
      value = reals(kRows * n.value_width);  // or g = do / den
      dvalue = reals(kRows * n.value_width);
      inverse_norm = reals(kRows);
      phi_pairs = elements(kRows * n.feature_width);
      value_pairs = elements(kRows * n.value_width);
      transposed_pairs = elements(n.value_width * n.feature_width);
      gradient_pairs = elements(n.value_width * n.feature_width);
    }
    LocalState<Real> state;
    Real *transposed, *maximum, *column_sums;
    Real *phi, *dphi, *value, *dvalue, *inverse_norm;
    Element *phi_pairs, *value_pairs, *transposed_pairs, *gradient_pairs;
  };

  void restore(const Sequence& s, int64_t h, const BackwardTile& tile) const {
    const State saved = saved_at(s, h);
    n_.read(saved, 0, tile.state);
    transpose<Real>(n_.features, n_.values, tile.state.S, n_.value_width, tile.transposed,
                    n_.feature_width);
    Pack::pair_rows(tile.transposed, n_.values, n_.feature_width, tile.transposed_pairs);
    zero(tile.maximum, n_.feature_width);
    if (p_.feature_map == FeatureMap::efficient)
      copy(tile.maximum, static_cast<const Real*>(saved.z) + n_.features, n_.features);
  }

  // For the pass over keys: dS transposed, and sum_j phi(k_j) dphi(k_j) = rows of dS . rows of S.
  void prepare_gradient(LocalState<Real> gradient, const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    transpose<Real>(n_.features, n_.values, gradient.S, vw, tile.transposed, fw);
    Pack::pair_rows(tile.transposed, n_.values, fw, tile.transposed_pairs);
    Pack::pair_rows(gradient.S, n_.features, vw, tile.gradient_pairs);
    dots(gradient.S, tile.state.S, vw, n_.features, vw, tile.column_sums);
  }

  // Writes dq of segment i; part = its sums of phi(q) g^T and delta phi(q), from zero.
  void backward_queries(const Sequence& s, HeadRun run, int64_t h, int64_t i, LocalState<Real> part,
                        const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    Real *phi = tile.phi, *dphi = tile.dphi, *g = tile.value;
    const Real* z = tile.state.z;
    const Element* S_transposed = Pack::either(tile.transposed, tile.transposed_pairs);
    n_.clear(part);
    for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.queries.end(i) - t);
      Base::for_query_heads(h, [&](int64_t q) {
        phi_.of_queries(rows, Base::queries(s, q, t, rows, phi), phi, tile.inverse_norm);
        typename Base::Denominators den;
        if (divides()) {
          dots(phi, z, 0, rows, fw, den.inverse);
          den.of_gradient(rows, p_.eps);
        }
        Base::read_gradients(s, q, t, rows, den.inverse, g);
        const auto next = Base::next_tile(s.queries, run, h, i, t);
        auto ahead = Base::template queries_ahead<true>(s, next, q - h * n_.group);
        const Element* g_values = Pack::pair_columns(g, rows, vw, tile.value_pairs);
        matmul<Arith, false>(rows, fw, Pack::elements(n_.values), g_values, Pack::elements(vw), 1,
                             S_transposed, fw, dphi, fw, ahead);
        if (divides()) {
          Real delta[kRows];
          dots(phi, dphi, fw, rows, fw, delta);
          den.negate_and_scale(rows, delta);
          for (int64_t r = 0; r < rows; ++r) add_scaled(dphi + r * fw, z, delta[r], fw);
          matmul<Exact, true>(1, fw, rows, delta, 0, 1, phi, fw, part.z, fw);
        }
        const Element* A = Pack::pair_rows(phi, rows, fw, tile.phi_pairs);
        const Element* B = Pack::pair_rows(g, rows, vw, tile.value_pairs);
        matmul<Arith, true>(n_.features, vw, Pack::elements(rows), A, 1, fw, B, vw, part.S, vw,
                            ahead);
        phi_.chain_queries(phi, tile.inverse_norm, rows, dphi);
        Base::write_query_gradients(s, q, t, rows, dphi);
      });
    }
  }

  // Writes dk and dv of segment i.
  void backward_keys(const Sequence& s, HeadRun run, int64_t h, int64_t i, LocalState<Real> gradient,
                     const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    Real *phi = tile.phi, *dphi = tile.dphi;
    const Element* dS = Pack::either(gradient.S, tile.gradient_pairs);
    const Element* dS_transposed = Pack::either(tile.transposed, tile.transposed_pairs);
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t);
      const MaskRow mask = mask_at(s.batch, s.key_begin + t);
      phi_.of_keys(rows, mask, {tile.maximum, tile.state.z}, Base::keys(s, h, t, rows, mask, phi),
                   phi, tile.inverse_norm);
      const Real* value = Base::values(s, h, t, rows, mask, tile.value);
      auto ahead = Base::template keys_ahead<true>(s, Base::next_tile(s.keys, run, h, i, t));
      const Element* value_columns = Pack::pair_columns(value, rows, vw, tile.value_pairs);
      matmul<Arith, false>(rows, fw, Pack::elements(n_.values), value_columns, Pack::elements(vw),
                           1, dS_transposed, fw, dphi, fw, ahead);
      for (int64_t r = 0; r < rows; ++r) add(dphi + r * fw, gradient.z, fw);
      const Element* phi_columns = Pack::pair_columns(phi, rows, fw, tile.phi_pairs);
      matmul<Arith, false>(rows, vw, Pack::elements(n_.features), phi_columns, Pack::elements(fw),
                           1, dS, vw, tile.dvalue, vw, ahead);
      phi_.chain_keys(phi, tile.inverse_norm, rows, mask, tile.column_sums, dphi);
      Base::write_key_gradients(s, h, t, rows, dphi, tile.dvalue);
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
