// Causal linear attention, in chunks: query i attends to keys j <= i.
//
//   S_i = S_0 + sum_{j<=i} phi(k_j) v_j^T     out_i = phi(q_i) S_i / max(phi(q_i) . z_i, eps)
//
// Within a chunk the sum is a masked matrix product, A = tril(phi(q) phi(k)^T); everything before
// the chunk is in the state. The state of a chunk is P + L: P at the start of its segment, L summed
// from zero since. So a segment needs only its P, and threads may take segments in any order.
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

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real, class Arith>
class Causal : private Call<Real> {
  static constexpr int64_t kChunk = 64;
  using Exact = Plain<Real>;
  using Element = typename Arith::Element;
  using Pack = Operand<Arith>;
  using Base = Call<Real>;
  using typename Base::Buffer;
  using Base::a_, Base::n_, Base::p_, Base::phi_;
  using Base::divides, Base::head, Base::heads, Base::mask_at, Base::state_at, Base::state_stride;
  using Base::for_heads, Base::for_key_segments;

 public:
  Causal(const Problem& problem, const Arguments& args) : Base(problem, args) {}

  void forward() {
    if (Base::whole_heads()) {
      for_heads([&](const Sequence& s, int64_t h) {
        Scratch scratch;
        const auto start = n_.take_state(scratch), local = n_.take_state(scratch);
        const ForwardTile tile(n_, scratch);
        n_.read(a_.initial, head(s, h), start);
        for (int64_t i = 0; i < s.keys.count; ++i) {
          save(s, h, i, start);
          n_.clear(local);
          for_chunks(s, i, [&](int64_t t, int64_t rows) {
            load_keys(s, h, t, rows, tile);
            emit(s, h, t, rows, start, local, tile);
            accumulate(rows, local, tile);
          });
          n_.merge(start, local);
        }
        n_.write(a_.final, head(s, h), start);
      });
      return;
    }
    // Few heads: segment sums in parallel, an exclusive fold, then the outputs in parallel.
    const int64_t most = Base::most_segments();
    Buffer states(heads() * most * state_stride());
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(n_, scratch);
      const auto local = state_at(states, head(s, h) * most + i);
      n_.clear(local);
      for_chunks(s, i, [&](int64_t t, int64_t rows) {
        load_keys(s, h, t, rows, tile);
        accumulate(rows, local, tile);
      });
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_state(scratch);
      n_.read(a_.initial, head(s, h), running);
      fold_exclusive(running, s.keys.count, [&](int64_t i) {
        return state_at(states, head(s, h) * most + i);
      });
      n_.write(a_.final, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const auto start = state_at(states, head(s, h) * most + i);
      const auto local = n_.take_state(scratch);
      const ForwardTile tile(n_, scratch);
      save(s, h, i, start);
      n_.clear(local);
      for_chunks(s, i, [&](int64_t t, int64_t rows) {
        load_keys(s, h, t, rows, tile);
        emit(s, h, t, rows, start, local, tile);
        accumulate(rows, local, tile);
      });
    });
  }

  void backward() {
    if (Base::whole_heads()) {
      for_heads([&](const Sequence& s, int64_t h) {
        Scratch scratch;
        const auto gradient = n_.take_state(scratch), local = n_.take_state(scratch);
        const BackwardTile tile(n_, scratch);
        Real* rows = scratch.template take<Real>(2 * n_.group * s.keys.length);
        n_.read(a_.grad_final, head(s, h), gradient);
        for (int64_t i = s.keys.count - 1; i >= 0; --i) {
          const RowFactors factors{rows, s.keys.length, s.keys.begin(i)};
          sweep_forward(s, h, i, tile, factors);
          sweep_reverse(s, h, i, gradient, local, tile, factors, true);
          n_.merge(gradient, local);
        }
        n_.write(a_.grad_initial, head(s, h), gradient);
      });
      return;
    }
    // Few heads: dq and the segments' sums in parallel, a fold from the end, then dk and dv.
    const int64_t most = Base::most_segments();
    int64_t longest = 0;
    for (const auto& s : Base::sequences_) longest = std::max(longest, s.keys.length);
    Buffer states(heads() * most * state_stride());
    Buffer rows(heads() * most * 2 * n_.group * longest);
    const auto factors_of = [&](const Sequence& s, int64_t h, int64_t i) {
      return RowFactors{rows.at((head(s, h) * most + i) * 2 * n_.group * longest), s.keys.length,
                        s.keys.begin(i)};
    };
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(n_, scratch);
      const auto local = state_at(states, head(s, h) * most + i);
      sweep_forward(s, h, i, tile, factors_of(s, h, i));
      sweep_reverse(s, h, i, local, local, tile, factors_of(s, h, i), false);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_state(scratch);
      n_.read(a_.grad_final, head(s, h), running);
      fold_exclusive(running, s.keys.count, [&](int64_t i) {
        return state_at(states, head(s, h) * most + s.keys.count - 1 - i);
      });
      n_.write(a_.grad_initial, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, int64_t h, int64_t i) {
      Scratch scratch;
      const auto local = n_.take_state(scratch);
      const BackwardTile tile(n_, scratch);
      sweep_reverse(s, h, i, state_at(states, head(s, h) * most + i), local, tile,
                    factors_of(s, h, i), true);
    });
  }

 private:
  // body(first token of the chunk, rows), in order.
  template <class Body>
  static void for_chunks(const Sequence& s, int64_t segment, const Body& body) {
    for (int64_t t = s.keys.begin(segment); t < s.keys.end(segment); t += kChunk)
      body(t, std::min(kChunk, s.keys.end(segment) - t));
  }

  // Replaces each part by the sum of `running` and all parts before it; running ends as the total.
  template <class PartAt>
  void fold_exclusive(LocalState<Real> running, int64_t count, const PartAt& part_at) const {
    for (int64_t i = 0; i < count; ++i) {
      const LocalState<Real> part = part_at(i);
      for (int64_t e = 0; e < n_.state_elements(); ++e) {
        const Real before = running.S[e];
        running.S[e] += part.S[e];
        part.S[e] = before;
      }
      for (int64_t f = 0; f < n_.feature_width; ++f) {
        const Real before = running.z[f];
        running.z[f] += part.z[f];
        part.z[f] = before;
      }
    }
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

  // Clears scores above the diagonal: the products wrote whole blocks.
  static void keep_lower(Real* scores, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = r + 1; c < kChunk; ++c) scores[r * kChunk + c] = 0;
  }

  // ---- forward ----------------------------------------------------------------------------------

  struct ForwardTile {
    template <class S>
    ForwardTile(const Sizes<Real>& n, S& scratch) {
      const auto reals = [&](int64_t count) { return scratch.template take<Real>(count); };
      const auto elements = [&](int64_t count) {
        return Pack::copies ? scratch.template take<Element>(count) : nullptr;
      };
      phi_k = reals(kChunk * n.feature_width);
      phi_q = reals(kChunk * n.feature_width);
      phi_k_transposed = reals(n.feature_width * kChunk);
      scores = reals(kChunk * kChunk);
      out = reals(kChunk * n.value_width);
      value_copy = reals(kChunk * n.value_width);
      inverse_norm = reals(kChunk);
      state = n.take_state(scratch);
      phi_k_tokens = elements(kChunk * n.feature_width);
      phi_k_features = elements(kChunk * n.feature_width);  // packed, then transposed
      value_tokens = elements(kChunk * n.value_width);
      phi_q_features = elements(kChunk * n.feature_width);
      scores_tokens = elements(kChunk * kChunk);
      state_features = elements(n.feature_width * n.value_width);
    }
    Real *phi_k, *phi_q, *phi_k_transposed, *scores, *out, *value_copy, *inverse_norm;
    LocalState<Real> state;  // P + L
    // Operands of 16-bit arithmetic, paired along tokens or features.
    Element *phi_k_tokens, *phi_k_features, *value_tokens, *phi_q_features, *scores_tokens,
        *state_features;
    // Set by load_keys.
    mutable const Element *A_keys, *B_values, *B_keys;
    mutable int64_t values_ld;
  };

  void load_keys(const Sequence& s, int64_t h, int64_t t, int64_t rows,
                 const ForwardTile& tile) const {
    const int64_t token = s.key_begin + t, fw = n_.feature_width, vw = n_.value_width;
    const MaskRow mask = mask_at(s.batch, token);
    phi_.of_keys(a_.key, a_.key.offset(s.batch, h, token), rows, mask, {}, tile.phi_k,
                 tile.inverse_norm);
    const auto value = read_values(a_.value, a_.value.offset(s.batch, h, token), p_.dtype, rows,
                                   n_.values, mask, tile.value_copy, vw);
    tile.A_keys = Pack::pair_rows(tile.phi_k, rows, fw, fw, tile.phi_k_tokens);
    tile.B_values = Pack::pair_rows(value.data, rows, vw, value.ld, tile.value_tokens);
    tile.values_ld = Pack::copies ? vw : value.ld;
  }

  // local += phi(k)^T v of the chunk.
  void accumulate(int64_t rows, LocalState<Real> local, const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width;
    matmul<Arith, true>(n_.features, n_.value_width,
                        (rows + Pack::per_element - 1) / Pack::per_element, tile.A_keys, 1, fw,
                        tile.B_values, tile.values_ld, local.S, n_.value_width);
    for (int64_t r = 0; r < rows; ++r) add(local.z, tile.phi_k + r * fw, fw);
  }

  // Outputs of the chunk, for every query head of h.
  void emit(const Sequence& s, int64_t h, int64_t t, int64_t rows, LocalState<Real> start,
            LocalState<Real> local, const ForwardTile& tile) const {
    constexpr int64_t per = Pack::per_element;
    const int64_t fw = n_.feature_width, vw = n_.value_width, token = s.query_begin + t;
    const bool in_place = writes_in_place<Real>(a_.out, p_.dtype, n_.values, vw);
    sum_of(tile.state.S, start.S, local.S, n_.state_elements());
    sum_of(tile.state.z, start.z, local.z, fw);
    const Element* B_state = Pack::pair_rows(tile.state.S, n_.features, vw, vw, tile.state_features);
    const Element* B_keys = Pack::pair_columns_transposed(tile.phi_k, rows, n_.features, fw,
                                                          tile.phi_k_transposed,
                                                          tile.phi_k_features, kChunk);
    for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q) {
      phi_.of_queries(a_.query, a_.query.offset(s.batch, q, token), rows, tile.phi_q,
                      tile.inverse_norm);
      const Element* A_query = Pack::pair_columns(tile.phi_q, rows, fw, tile.phi_q_features);
      matmul_to_lower<Arith>(rows, (n_.features + per - 1) / per, A_query, fw / per, 1, B_keys,
                             kChunk, tile.scores, kChunk);
      keep_lower(tile.scores, rows);
      if (divides()) {
        for (int64_t r = 0; r < rows; ++r) {
          Real* scores = tile.scores + r * kChunk;
          Real* phi = tile.phi_q + r * fw;
          const Real den = dot(phi, tile.state.z, fw) + sum_row(scores, r + 1);
          const Real inverse = inverse_denominator<Real>(den, p_.eps);
          scale_row(phi, inverse, fw);
          scale_row(scores, inverse, padded<Real>(r + 1));
        }
        A_query = Pack::pair_columns(tile.phi_q, rows, fw, tile.phi_q_features);
      }
      const Element* A_scores =
          Pack::pair_columns(tile.scores, rows, kChunk, tile.scores_tokens);
      const int64_t offset = a_.out.offset(s.batch, q, token);
      Real* out = in_place ? static_cast<Real*>(a_.out.data) + offset : tile.out;
      const int64_t ld = in_place ? a_.out.token : vw;
      matmul<Arith, false>(rows, vw, (n_.features + per - 1) / per, A_query, fw / per, 1, B_state,
                           vw, out, ld);
      matmul_from_lower<Arith>(rows, vw, A_scores, kChunk / per, tile.B_values, tile.values_ld, out,
                               ld, per);
      if (!in_place) write_tile(a_.out, offset, p_.dtype, rows, n_.values, tile.out, ld);
    }
  }

  // Sum of the first n numbers of a row that is zero up to the next whole vector.
  static Real sum_row(const Real* row, int64_t n) {
    Vector<Real> sum{};
    for (int64_t i = 0; i < n; i += kLanes<Real>) sum += load(row + i);
    return sum_lanes<Real>(sum);
  }

  // ---- backward ---------------------------------------------------------------------------------

  // 1 / den and delta of every query row of one segment, for each query head of a kv head.
  struct RowFactors {
    Real* data;
    int64_t length;  // tokens of a segment
    int64_t begin;   // its first token

    Real* inverse(int64_t head_in_group, int64_t t) const {
      return data + 2 * head_in_group * length + (t - begin);
    }
    Real* delta(int64_t head_in_group, int64_t t) const {
      return inverse(head_in_group, t) + length;
    }
  };

  struct BackwardTile {
    template <class S>
    BackwardTile(const Sizes<Real>& n, S& scratch) {
      const auto reals = [&](int64_t count) { return scratch.template take<Real>(count); };
      phi_k = reals(kChunk * n.feature_width);
      phi_q = reals(kChunk * n.feature_width);
      dphi_q = reals(kChunk * n.feature_width);
      dphi_k = reals(kChunk * n.feature_width);
      phi_k_transposed = reals(n.feature_width * kChunk);
      value_copy = reals(kChunk * n.value_width);
      value_transposed = reals(n.value_width * kChunk);
      g = reals(kChunk * n.value_width);
      dvalue = reals(kChunk * n.value_width);
      scores = reals(kChunk * kChunk);
      inverse_norm_k = reals(kChunk);
      inverse_norm_q = reals(kChunk);
      z_running = reals(n.feature_width);
      start = n.take_state(scratch);
      state = n.take_state(scratch);
      local_transposed = reals(n.value_width * n.feature_width);
      start_transposed = reals(n.value_width * n.feature_width);
      state_transposed = reals(n.value_width * n.feature_width);
    }
    Real *phi_k, *phi_q, *dphi_q, *dphi_k, *phi_k_transposed;
    Real *value_copy, *value_transposed, *g, *dvalue, *scores;
    Real *inverse_norm_k, *inverse_norm_q, *z_running;
    LocalState<Real> start, state;
    Real *local_transposed, *start_transposed, *state_transposed;  // (Dv, F)
  };

  TileView<Real> load_keys_and_values(const Sequence& s, int64_t h, int64_t t, int64_t rows,
                                      MaskRow mask, const BackwardTile& tile) const {
    const int64_t token = s.key_begin + t;
    phi_.of_keys(a_.key, a_.key.offset(s.batch, h, token), rows, mask, {}, tile.phi_k,
                 tile.inverse_norm_k);
    return read_values(a_.value, a_.value.offset(s.batch, h, token), p_.dtype, rows, n_.values,
                       mask, tile.value_copy, n_.value_width);
  }

  // tile.g = do / den, given 1 / den of each row.
  void load_gradient(const Sequence& s, int64_t q, int64_t t, int64_t rows, const Real* inverse,
                     const BackwardTile& tile) const {
    for (int64_t r = 0; r < rows; ++r) {
      Real* g = tile.g + r * n_.value_width;
      read_row(a_.grad_out, a_.grad_out.offset(s.batch, q, s.query_begin + t + r), p_.dtype,
               n_.values, g, n_.value_width);
      if (divides()) scale_row(g, inverse[r], n_.value_width);
    }
  }

  // Writes dq of a segment, and its row factors.
  void sweep_forward(const Sequence& s, int64_t h, int64_t segment, const BackwardTile& tile,
                     const RowFactors& factors) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    restore(s, h, segment, tile.start);
    transpose(n_.features, n_.values, tile.start.S, vw, tile.start_transposed, fw);
    zero(tile.local_transposed, n_.values * fw);
    Real* z_start = tile.start.z;  // z is exact per token: it moves with the chunks
    for_chunks(s, segment, [&](int64_t t, int64_t rows) {
      const MaskRow mask = mask_at(s.batch, s.key_begin + t);
      const auto value = load_keys_and_values(s, h, t, rows, mask, tile);
      transpose(rows, n_.values, value.data, value.ld, tile.value_transposed, kChunk);
      sum_of(tile.state_transposed, tile.start_transposed, tile.local_transposed, n_.values * fw);
      for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q) {
        Real* inverse = factors.inverse(q - h * n_.group, t);
        Real* delta = factors.delta(q - h * n_.group, t);
        Real slope[kChunk];
        const int64_t token = s.query_begin + t;
        phi_.of_queries(a_.query, a_.query.offset(s.batch, q, token), rows, tile.phi_q,
                        tile.inverse_norm_q);
        if (divides())
          for_running_z(rows, z_start, tile, [&](int64_t r, const Real* z) {
            const Real den = dot(tile.phi_q + r * fw, z, fw);
            inverse[r] = inverse_denominator<Real>(den, p_.eps);
            slope[r] = denominator_slope<Real>(den, p_.eps);
          });
        load_gradient(s, q, t, rows, inverse, tile);
        matmul<Exact, false>(rows, fw, n_.values, tile.g, vw, 1, tile.state_transposed, fw,
                             tile.dphi_q, fw);
        matmul_to_lower<Exact>(rows, n_.values, tile.g, vw, 1, tile.value_transposed, kChunk,
                               tile.scores, kChunk);
        keep_lower(tile.scores, rows);
        matmul_from_lower<Exact>(rows, fw, tile.scores, kChunk, tile.phi_k, fw, tile.dphi_q, fw);
        if (divides())
          for_running_z(rows, z_start, tile, [&](int64_t r, const Real* z) {
            Real* u = tile.dphi_q + r * fw;
            delta[r] = -dot(tile.phi_q + r * fw, u, fw) * slope[r];
            add_scaled(u, z, delta[r], fw);
          });
        phi_.chain_queries(tile.phi_q, tile.inverse_norm_q, rows, tile.dphi_q);
        write_tile(a_.grad_query, a_.grad_query.offset(s.batch, q, token), p_.dtype, rows,
                   p_.head_dim, tile.dphi_q, fw);
      }
      matmul<Exact, true>(n_.values, fw, rows, value.data, 1, value.ld, tile.phi_k, fw,
                          tile.local_transposed, fw);
      for (int64_t r = 0; r < rows; ++r) add(z_start, tile.phi_k + r * fw, fw);
    });
  }

  // body(row, z up to and including that row's key)
  template <class Body>
  void for_running_z(int64_t rows, const Real* z_start, const BackwardTile& tile,
                     const Body& body) const {
    copy(tile.z_running, z_start, n_.feature_width);
    for (int64_t r = 0; r < rows; ++r) {
      add(tile.z_running, tile.phi_k + r * n_.feature_width, n_.feature_width);
      body(r, tile.z_running);
    }
  }

  // local = the segment's sums of phi(q) g^T and delta phi(q), from zero, last chunk first. With
  // `writes`, dk and dv as well; `after` then holds the sums of all later segments.
  void sweep_reverse(const Sequence& s, int64_t h, int64_t segment, LocalState<Real> after,
                     LocalState<Real> local, const BackwardTile& tile, const RowFactors& factors,
                     bool writes) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const int64_t begin = s.keys.begin(segment), end = s.keys.end(segment);
    n_.clear(local);
    for (int64_t t = begin + (end - begin - 1) / kChunk * kChunk; t >= begin; t -= kChunk) {
      const int64_t rows = std::min(kChunk, end - t);
      const MaskRow mask = mask_at(s.batch, s.key_begin + t);
      TileView<Real> value{};
      if (writes) {
        value = load_keys_and_values(s, h, t, rows, mask, tile);
        transpose(rows, n_.values, value.data, value.ld, tile.value_transposed, kChunk);
        transpose(rows, n_.features, tile.phi_k, fw, tile.phi_k_transposed, kChunk);
        // Contributions of later chunks.
        sum_of(tile.state.S, after.S, local.S, n_.state_elements());
        sum_of(tile.state.z, after.z, local.z, fw);
        transpose(n_.features, n_.values, tile.state.S, vw, tile.state_transposed, fw);
        matmul<Exact, false>(rows, fw, n_.values, value.data, value.ld, 1, tile.state_transposed,
                             fw, tile.dphi_k, fw);
        for (int64_t r = 0; r < rows; ++r) add(tile.dphi_k + r * fw, tile.state.z, fw);
        matmul<Exact, false>(rows, vw, n_.features, tile.phi_k, fw, 1, tile.state.S, vw,
                             tile.dvalue, vw);
      }
      for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q) {
        const Real* inverse = factors.inverse(q - h * n_.group, t);
        const Real* delta = factors.delta(q - h * n_.group, t);
        phi_.of_queries(a_.query, a_.query.offset(s.batch, q, s.query_begin + t), rows, tile.phi_q,
                        tile.inverse_norm_q);
        load_gradient(s, q, t, rows, inverse, tile);
        if (writes) {  // contributions of this chunk, i >= j
          matmul_to_lower<Exact>(rows, n_.features, tile.phi_q, fw, 1, tile.phi_k_transposed,
                                 kChunk, tile.scores, kChunk);
          keep_lower(tile.scores, rows);
          matmul_from_lower_transposed<Exact>(rows, vw, tile.scores, kChunk, tile.g, vw,
                                              tile.dvalue, vw);
          matmul_to_lower<Exact>(rows, n_.values, tile.g, vw, 1, tile.value_transposed, kChunk,
                                 tile.scores, kChunk);
          if (divides())
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t c = 0; c <= r; ++c) tile.scores[r * kChunk + c] += delta[r];
          keep_lower(tile.scores, rows);
          matmul_from_lower_transposed<Exact>(rows, fw, tile.scores, kChunk, tile.phi_q, fw,
                                              tile.dphi_k, fw);
        }
        matmul<Exact, true>(n_.features, vw, rows, tile.phi_q, 1, fw, tile.g, vw, local.S, vw);
        if (divides())
          for (int64_t r = 0; r < rows; ++r)
            add_scaled(local.z, tile.phi_q + r * fw, delta[r], fw);
      }
      if (writes) {
        const int64_t token = s.key_begin + t;
        phi_.chain_keys(tile.phi_k, tile.inverse_norm_k, rows, mask, nullptr, tile.dphi_k);
        write_tile(a_.grad_key, a_.grad_key.offset(s.batch, h, token), p_.dtype, rows, p_.head_dim,
                   tile.dphi_k, fw);
        write_tile(a_.grad_value, a_.grad_value.offset(s.batch, h, token), p_.dtype, rows,
                   n_.values, tile.dvalue, vw);
      }
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
