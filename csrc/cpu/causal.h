// Causal linear attention, in chunks: query i attends to keys j <= i.
//
//   S_i = S_0 + sum_{j<=i} phi(k_j) v_j^T     out_i = phi(q_i) S_i / max(phi(q_i) . z_i, eps)
//
// Within a chunk the sum is a masked matrix product, A = tril(phi(q) phi(k)^T); everything before
// the chunk is in the state, which starts as P at the start of its segment. P of the next segment is
// P + L, with L summed from zero along with the state. So a segment needs only its P, and threads
// may take segments in any order.
//
// Backward, with g_i = do_i / den_i, u_i = S_i g_i, delta_i = -phi(q_i) . u_i / den_i:
//
//   forward sweep:   dphi(q_i) = u_i + delta_i z_i
//   reverse sweep:   dS_j = sum_{i>=j} phi(q_i) g_i^T        dphi(k_j) = dS_j v_j + dz_j
//                    dz_j = sum_{i>=j} delta_i phi(q_i)      dv_j = dS_j^T phi(k_j)
//
// Both sweeps run segment by segment, last segment first, from the states that forward saved, so
// that the second finds its tokens in cache; 1 / den and delta of one segment are kept in between.
#pragma once

#include "call.h"
#include "chunk.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real, class Arith>
class Causal : private Call<Real, Arith, Arith::chunk_rows> {
  static constexpr int64_t kChunk = Arith::chunk_rows;
  using Exact = Plain<Real>;
  using Element = typename Arith::Element;
  using Pack = Operand<Arith>;
  using ForwardTile = ForwardChunk<Real, Arith>;
  using BackwardTile = BackwardChunk<Real, Arith>;
  using Factors = RowFactors<Real>;
  using Base = Call<Real, Arith, Arith::chunk_rows>;
  using typename Base::Buffer;
  using Base::a_, Base::n_, Base::p_, Base::phi_;
  using Base::divides, Base::head, Base::heads, Base::mask_at;
  using typename Base::HeadRun;
  using Base::for_heads, Base::for_key_segments, Base::for_runs_of_heads;

 public:
  Causal(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences)
      : Base(problem, args, std::move(sequences)) {}

  void forward() {
    if (Base::whole_heads()) {
      for_runs_of_heads([&](const Sequence& s, HeadRun run) {
        Scratch scratch;
        const auto local = n_.take_state(scratch);
        const auto start = Base::take_states(scratch, run);
        const ForwardTile tile(n_, scratch);
        run.each([&](int64_t h) { n_.read(a_.initial, head(s, h), start(h)); });
        for (int64_t i = 0; i < s.keys.count; ++i)
          run.each([&](int64_t h) {
            emit_segment(s, run, h, i, start(h), local, tile);
            n_.merge(start(h), local);
          });
        run.each([&](int64_t h) { n_.write(a_.final, head(s, h), start(h)); });
      });
      return;
    }
    // Few heads: segment sums in parallel, an exclusive fold, then the outputs in parallel.
    const int64_t most = Base::most_segments();
    Buffer buffer(heads() * most * n_.state_stride());
    const auto state = [&](const Sequence& s, int64_t h, int64_t i) {
      return n_.state_at(buffer.data(), head(s, h) * most + i);
    };
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(n_, scratch);
      n_.clear(state(s, h, i));
      for_chunks(s, i, [&](int64_t t, int64_t rows) {
        const Element* values = load_keys(s, h, t, rows, tile);
        const auto next = Base::next_tile(s.keys, {h, h + 1}, h, i, t);
        auto ahead = Base::template keys_ahead<false>(s, next);
        accumulate(rows, values, state(s, h, i), {}, tile, ahead);
      });
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_state(scratch);
      n_.read(a_.initial, head(s, h), running);
      for (int64_t i = 0; i < s.keys.count; ++i) n_.exchange_and_add(running, state(s, h, i));
      n_.write(a_.final, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      emit_segment(s, {h, h + 1}, h, i, state(s, h, i), {}, ForwardTile(n_, scratch));
    });
  }

  void backward() {
    int64_t longest = 0;
    for (const auto& s : Base::sequences_) longest = std::max(longest, s.keys.length);
    const int64_t factors_size = 2 * n_.group * longest;
    if (Base::whole_heads()) {
      for_runs_of_heads([&](const Sequence& s, HeadRun run) {
        Scratch scratch;
        const auto local = n_.take_state(scratch);
        const auto gradient = Base::take_states(scratch, run);
        const BackwardTile tile(n_, scratch);
        Real* rows = scratch.template take<Real>(factors_size);
        run.each([&](int64_t h) { n_.read(a_.grad_final, head(s, h), gradient(h)); });
        for (int64_t i = s.keys.count - 1; i >= 0; --i)
          run.each([&](int64_t h) {
            const Factors factors{rows, longest, s.keys.begin(i)};
            sweep_forward(s, h, i, tile, factors);
            sweep_reverse<true>(s, run, h, i, gradient(h), local, tile, factors);
            n_.merge(gradient(h), local);
          });
        run.each([&](int64_t h) { n_.write(a_.grad_initial, head(s, h), gradient(h)); });
      });
      return;
    }
    // Few heads: dq and the segments' sums in parallel, a fold from the end, then dk and dv.
    const int64_t most = Base::most_segments();
    Buffer buffer(heads() * most * n_.state_stride()), rows(heads() * most * factors_size);
    const auto state = [&](const Sequence& s, int64_t h, int64_t i) {
      return n_.state_at(buffer.data(), head(s, h) * most + i);
    };
    const auto factors_of = [&](const Sequence& s, int64_t h, int64_t i) {
      return Factors{rows.data() + (head(s, h) * most + i) * factors_size, longest,
                     s.keys.begin(i)};
    };
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(n_, scratch);
      sweep_forward(s, h, i, tile, factors_of(s, h, i));
      sweep_reverse<false>(s, {h, h + 1}, h, i, {}, state(s, h, i), tile, factors_of(s, h, i));
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_state(scratch);
      n_.read(a_.grad_final, head(s, h), running);
      for (int64_t i = s.keys.count - 1; i >= 0; --i) n_.exchange_and_add(running, state(s, h, i));
      n_.write(a_.grad_initial, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(n_, scratch);
      sweep_reverse<true>(s, {h, h + 1}, h, i, state(s, h, i), {}, tile, factors_of(s, h, i));
    });
  }

 private:
  // body(first token of the chunk, rows), in order.
  template <class Body>
  static void for_chunks(const Sequence& s, int64_t segment, const Body& body) {
    for (int64_t t = s.keys.begin(segment); t < s.keys.end(segment); t += kChunk)
      body(t, std::min(kChunk, s.keys.end(segment) - t));
  }

  // Saved states: of every segment of a sequence but its first, whose state is the initial one.
  State anchor(const Sequence& s, int64_t h, int64_t segment) const {
    return n_.saved_state(a_.saved, p_.state_size(),
                          (s.first_anchor + segment - 1) * p_.num_kv_heads + h);
  }

  void save(const Sequence& s, int64_t h, int64_t segment, LocalState<Real> start) const {
    if (p_.needs_grad && segment > 0) n_.write(anchor(s, h, segment), 0, start);
  }

  void restore(const Sequence& s, int64_t h, int64_t segment, LocalState<Real> start) const {
    if (segment > 0)
      n_.read(anchor(s, h, segment), 0, start);
    else
      n_.read(a_.initial, head(s, h), start);
  }

  // ---- forward ----------------------------------------------------------------------------------

  // Outputs of segment i; local, if given, ends as its sums.
  void emit_segment(const Sequence& s, HeadRun run, int64_t h, int64_t i, LocalState<Real> start,
                    LocalState<Real> local, const ForwardTile& tile) const {
    save(s, h, i, start);
    n_.copy_state(tile.state, start);
    if (local.S) n_.clear(local);
    for_chunks(s, i, [&](int64_t t, int64_t rows) {
      const Element* values = load_keys(s, h, t, rows, tile);
      const KeyOperands operands = prepare(rows, values, tile);
      const auto next = Base::next_tile(s.keys, run, h, i, t);
      Base::for_query_heads(h, [&](int64_t q) {
        phi_.of_queries(rows, Base::queries(s, q, t, rows, tile.phi_q), tile.phi_q,
                        tile.inverse_norm);
        const Rows<Real> out = Base::place_for_out(s, q, t, tile.out);
        auto ahead = Base::template queries_ahead<true>(s, next, q - h * n_.group);
        emit(rows, operands, tile, out, ahead);
        Base::finish_out(s, q, t, rows, out, tile.out);
      });
      auto ahead = Base::template keys_ahead<false>(s, next);
      accumulate(rows, values, tile.state, local, tile, ahead);
    });
  }

  // phi(k) into the tile; returns the values as an operand.
  const Element* load_keys(const Sequence& s, int64_t h, int64_t t, int64_t rows,
                           const ForwardTile& tile) const {
    const MaskRow mask = mask_at(s.batch, s.key_begin + t);
    phi_.of_keys(rows, mask, {}, Base::keys(s, h, t, rows, mask, tile.phi_k), tile.phi_k,
                 tile.inverse_norm);
    return Base::value_operand(s, h, t, rows, mask, tile.value, tile.value_tokens);
  }

  // state += the sums of the chunk's phi(k) v^T and phi(k); also += them, if given.
  void accumulate(int64_t rows, const Element* values, LocalState<Real> state,
                  LocalState<Real> also, const ForwardTile& tile, Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const Element* A = Pack::pair_rows(tile.phi_k, rows, fw, tile.phi_k_tokens);
    matmul<Arith, false>(n_.features, vw, Pack::elements(rows), A, 1, fw, values, vw, state.S, vw,
                         ahead, AddedTo<Real>{state.S, also.S, vw});
    zero(tile.z, fw);
    add_rows(tile.z, tile.phi_k, rows, fw);
    add(state.z, tile.z, fw);
    if (also.z) add(also.z, tile.z, fw);
  }

  // Right operands that all query heads of one kv head share.
  struct KeyOperands {
    const Element *state, *keys, *values;
  };

  KeyOperands prepare(int64_t rows, const Element* values, const ForwardTile& tile) const {
    return {Pack::pair_rows(tile.state.S, n_.features, n_.value_width, tile.state_features),
            Pack::pair_columns_transposed(tile.phi_k, rows, n_.features, n_.feature_width,
                                          tile.phi_k_transposed, tile.phi_k_features, kChunk),
            values};
  }

  // Outputs of the chunk for one query head, whose phi(q) is in the tile.
  void emit(int64_t rows, const KeyOperands& operands, const ForwardTile& tile, Rows<Real> out,
            Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const Real* phi_q = tile.phi_q;
    const Element* A_query = Pack::pair_columns(phi_q, rows, fw, tile.phi_q_features);
    matmul_to_lower<Arith>(rows, Pack::elements(n_.features), A_query, Pack::elements(fw), 1,
                           operands.keys, kChunk, tile.scores, kChunk, nullptr, ahead);
    const Element* A_scores = Pack::pair_columns(tile.scores, rows, kChunk, tile.scores_tokens);
    Real inverse[kChunk];
    if (divides()) {
      dots(phi_q, tile.state.z, 0, rows, fw, inverse);
      add_sums_of_lower<Arith>(tile.scores, rows, inverse);
      invert_denominators(inverse, rows, p_.eps);
    }
    const auto product = [&](const auto& finish) {
      matmul<Arith, false>(rows, vw, Pack::elements(n_.features), A_query, Pack::elements(fw), 1,
                           operands.state, vw, out.data, out.stride, ahead, finish,
                           of_scores<Arith>(rows, A_scores, operands.values, vw));
    };
    if (divides())
      product(Scaled<Real>{inverse});
    else
      product(AsItIs{});
  }

  // ---- backward ---------------------------------------------------------------------------------

  // phi(k) into the tile; returns the values.
  const Real* load_keys(const Sequence& s, int64_t h, int64_t t, int64_t rows,
                        const BackwardTile& tile) const {
    const MaskRow mask = mask_at(s.batch, s.key_begin + t);
    phi_.of_keys(rows, mask, {}, Base::keys(s, h, t, rows, mask, tile.phi_k), tile.phi_k,
                 tile.inverse_norm_k);
    return Base::values(s, h, t, rows, mask, tile.value);
  }

  void load_queries(const Sequence& s, int64_t q, int64_t t, int64_t rows,
                    const BackwardTile& tile) const {
    phi_.of_queries(rows, Base::queries(s, q, t, rows, tile.phi_q), tile.phi_q,
                    tile.inverse_norm_q);
  }

  // Writes dq of a segment, and its row factors.
  void sweep_forward(const Sequence& s, int64_t h, int64_t segment, const BackwardTile& tile,
                     const Factors& factors) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    restore(s, h, segment, tile.state);
    transpose<Real>(n_.features, n_.values, tile.state.S, vw, tile.state_transposed, fw);
    for_chunks(s, segment, [&](int64_t t, int64_t rows) {
      // (After the last chunk the other sweep begins, with what is in cache.)
      const typename Base::Place next{h, t + kChunk};
      const Real* value = load_keys(s, h, t, rows, tile);
      running_sums<true>(tile.state.z, tile.phi_k, rows, fw, tile.z);
      const KeysBefore operands = {
          Pack::pair_rows(tile.state_transposed, n_.values, fw, tile.state_features),
          Pack::pair_rows(tile.phi_k, rows, fw, tile.phi_k_tokens),
          values_transposed(rows, value, tile)};
      Base::for_query_heads(h, [&](int64_t q) {
        const int64_t in_group = q - h * n_.group;
        load_queries(s, q, t, rows, tile);
        auto ahead = Base::template queries_ahead<true>(s, next, in_group);
        typename Base::Denominators den;
        if (divides()) {
          dots(tile.phi_q, tile.z, fw, rows, fw, den.inverse);
          den.of_gradient(rows, p_.eps);
          copy(factors.inverse(in_group, t), den.inverse, rows);
        }
        Base::read_gradients(s, q, t, rows, den.inverse, tile.g);
        query_gradient(rows, operands, den, factors.delta(in_group, t), tile, ahead);
        Base::write_query_gradients(s, q, t, rows, tile.dphi_q);
      });
      auto ahead = Base::template keys_ahead<false>(s, next);
      const Element* A = Pack::pair_rows(value, rows, vw, tile.value_tokens);
      matmul<Arith, false>(n_.values, fw, Pack::elements(rows), A, 1, vw, operands.keys, fw,
                           tile.state_transposed, fw, ahead,
                           AddedTo<Real>{tile.state_transposed, nullptr, fw});
    });
  }

  // Right operands of dq that all query heads of one kv head share.
  struct KeysBefore {
    const Element *state_transposed, *keys, *values_transposed;
  };

  const Element* values_transposed(int64_t rows, const Real* value, const BackwardTile& tile) const {
    return Pack::pair_columns_transposed(value, rows, n_.values, n_.value_width,
                                         tile.value_transposed, tile.value_features, kChunk);
  }

  // dq of one chunk: through the state before it, then through its own keys. Sets delta of its rows.
  void query_gradient(int64_t rows, const KeysBefore& operands,
                      const typename Base::Denominators& den, Real* delta,
                      const BackwardTile& tile, Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    Real *phi_q = tile.phi_q, *dphi_q = tile.dphi_q;
    const Element* g = Pack::pair_columns(tile.g, rows, vw, tile.g_features);
    matmul_to_lower<Arith>(rows, Pack::elements(n_.values), g, Pack::elements(vw), 1,
                           operands.values_transposed, kChunk, tile.scores, kChunk, nullptr, ahead);
    const Element* scores = Pack::pair_columns(tile.scores, rows, kChunk, tile.scores_tokens);
    matmul<Arith, false>(rows, fw, Pack::elements(n_.values), g, Pack::elements(vw), 1,
                         operands.state_transposed, fw, dphi_q, fw, ahead, AsItIs{},
                         of_scores<Arith>(rows, scores, operands.keys, fw));
    if (divides()) {
      Real along[kChunk];
      dots(phi_q, dphi_q, fw, rows, fw, along);
      den.negate_and_scale(rows, along);
      copy(delta, along, rows);
      for (int64_t r = 0; r < rows; ++r) add_scaled(dphi_q + r * fw, tile.z + r * fw, along[r], fw);
    }
    phi_.chain_queries(phi_q, tile.inverse_norm_q, rows, dphi_q);
  }

  // local, if given, = the segment's sums of phi(q) g^T and delta phi(q), from zero, last chunk
  // first. With `Writes`, dk and dv as well; `after` then holds the sums of all later segments.
  template <bool Writes>
  void sweep_reverse(const Sequence& s, HeadRun run, int64_t h, int64_t segment,
                     LocalState<Real> after, LocalState<Real> local, const BackwardTile& tile,
                     const Factors& factors) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const int64_t begin = s.keys.begin(segment), end = s.keys.end(segment);
    if (local.S) n_.clear(local);
    if constexpr (Writes) n_.copy_state(tile.state, after);
    const LocalState<Real> sums = Writes ? tile.state : local, also = Writes ? local : LocalState<Real>{};
    for (int64_t t = begin + (end - begin - 1) / kChunk * kChunk; t >= begin; t -= kChunk) {
      const int64_t rows = std::min(kChunk, end - t);
      const auto next = Base::next_tile_in_reverse(s.keys, run, h, segment, t);
      KeysAndLater operands{};
      Lookahead ahead_of_keys;
      if constexpr (Writes) {
        const Real* value = load_keys(s, h, t, rows, tile);
        operands = prepare(rows, value, tile);
        ahead_of_keys = Base::template keys_ahead<true>(s, next);
      }
      Base::for_query_heads(h, [&](int64_t q) {
        const int64_t in_group = q - h * n_.group;
        const Real* delta = factors.delta(in_group, t);
        load_queries(s, q, t, rows, tile);
        Base::read_gradients(s, q, t, rows, factors.inverse(in_group, t), tile.g);
        const Element* queries = Pack::pair_rows(tile.phi_q, rows, fw, tile.phi_q_tokens);
        const Element* g = Pack::pair_rows(tile.g, rows, vw, tile.g_tokens);
        if constexpr (Writes)
          key_gradient(rows, operands, in_group == 0, queries, g, delta, tile, ahead_of_keys);
        auto ahead = Base::template queries_ahead<false>(s, next, in_group);
        matmul<Arith, false>(n_.features, vw, Pack::elements(rows), queries, 1, fw, g, vw, sums.S,
                             vw, ahead, AddedTo<Real>{sums.S, also.S, vw});
        if (divides())
          matmul<Exact, false>(1, fw, rows, delta, 0, 1, tile.phi_q, fw, sums.z, fw, Nothing{},
                               AddedTo<Real>{sums.z, also.z, fw});
      });
      if constexpr (Writes) {
        phi_.chain_keys(tile.phi_k, tile.inverse_norm_k, rows, mask_at(s.batch, s.key_begin + t),
                        nullptr, tile.dphi_k);
        Base::write_key_gradients(s, h, t, rows, tile.dphi_k, tile.dvalue);
      }
    }
  }

  // Operands of dk and dv that all query heads of one kv head share: the chunk, and the gradient of
  // the state that comes from all later ones.
  struct KeysAndLater {
    const Element *values, *values_transposed, *keys, *keys_transposed, *dS, *dS_transposed;
  };

  KeysAndLater prepare(int64_t rows, const Real* value, const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    transpose<Real>(n_.features, n_.values, tile.state.S, vw, tile.state_transposed, fw);
    const Element* values_turned = values_transposed(rows, value, tile);
    const Element* keys_turned =
        Pack::pair_columns_transposed(tile.phi_k, rows, n_.features, fw, tile.phi_k_transposed,
                                      tile.phi_k_features, kChunk);
    return {Pack::either(value, tile.value_features),
            values_turned,
            Pack::either(tile.phi_k, tile.phi_k_features),
            keys_turned,
            Pack::pair_rows(tile.state.S, n_.features, vw, tile.gradient_features),
            Pack::pair_rows(tile.state_transposed, n_.values, fw, tile.state_features)};
  }

  // dphi(k) and dv: from the queries i >= j of this chunk through the scores, and with those of the
  // first query head from all later chunks.
  void key_gradient(int64_t rows, const KeysAndLater& operands, bool is_first,
                    const Element* queries, const Element* g, const Real* delta,
                    const BackwardTile& tile, Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const auto add = [&](const Element* left, int64_t K, int64_t lda, const Element* later,
                         const Element* own, int64_t width, const auto& finish, Real* sums) {
      const Element* scores = Pack::pair_rows(tile.scores, rows, kChunk, tile.scores_tokens);
      const auto more = of_scores_transposed<Arith>(rows, scores, own, width);
      if (is_first)
        matmul<Arith, false>(rows, width, K, left, lda, 1, later, width, sums, width, ahead, finish,
                             more);
      else
        matmul<Arith, true>(rows, width, 0, left, lda, 1, later, width, sums, width, ahead,
                            AsItIs{}, more);
    };
    const int64_t features = Pack::elements(n_.features), values = Pack::elements(n_.values);
    const int64_t lda_features = Pack::elements(fw), lda_values = Pack::elements(vw);
    const Element* A_query = Pack::pair_columns(tile.phi_q, rows, fw, tile.phi_q_features);
    matmul_to_lower<Arith>(rows, features, A_query, lda_features, 1, operands.keys_transposed,
                           kChunk, tile.scores, kChunk, nullptr, ahead);
    add(operands.keys, features, lda_features, operands.dS, g, vw, AsItIs{}, tile.dvalue);
    const Element* A_g = Pack::pair_columns(tile.g, rows, vw, tile.g_features);
    matmul_to_lower<Arith>(rows, values, A_g, lda_values, 1, operands.values_transposed, kChunk,
                           tile.scores, kChunk, divides() ? delta : nullptr, ahead);
    add(operands.values, values, lda_values, operands.dS_transposed, queries, fw,
        AddedRow<Real>{tile.state.z}, tile.dphi_k);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
