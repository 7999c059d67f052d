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
  using Base::divides, Base::head, Base::heads, Base::mask_at;
  using Base::for_head_blocks, Base::for_heads, Base::for_key_segments;

 public:
  Causal(const Problem& problem, const Arguments& args) : Base(problem, args) {}

  void forward() {
    if (Base::whole_heads()) {
      const int64_t per_head = 2 * n_.state_stride() + 2 * kChunk * (n_.feature_width + n_.value_width);
      for_head_blocks(Base::heads_together(per_head), [&](const Sequence& s, HeadBlock block) {
        Scratch scratch;
        const auto starts = n_.take_states(scratch, block.size());
        const auto locals = n_.take_states(scratch, block.size());
        const ForwardTile tile(*this, block.size(), scratch);
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.read(a_.initial, head(s, h), starts[h - block.begin]);
        for (int64_t i = 0; i < s.keys.count; ++i) {
          emit_segment(s, block, i, starts, locals, tile);
          for (int64_t h = 0; h < block.size(); ++h) n_.merge(starts[h], locals[h]);
        }
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.write(a_.final, head(s, h), starts[h - block.begin]);
      });
      return;
    }
    // Few heads: segment sums in parallel, an exclusive fold, then the outputs in parallel.
    const int64_t most = Base::most_segments();
    Buffer buffer(heads() * most * n_.state_stride());
    const auto states = n_.states_at(buffer.data());
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(*this, 1, scratch);
      const auto local = states[head(s, block.begin) * most + i];
      n_.clear(local);
      for_chunks(s, i, [&](int64_t t, int64_t rows) {
        load_keys(s, block, t, rows, tile);
        auto ahead = Base::template keys_ahead<false>(s, block.begin, t + kChunk);
        accumulate(0, rows, local, tile, ahead);
      });
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_states(scratch, 1)[0];
      n_.read(a_.initial, head(s, h), running);
      for (int64_t i = 0; i < s.keys.count; ++i)
        exchange_and_add(running, states[head(s, h) * most + i]);
      n_.write(a_.final, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(*this, 1, scratch);
      emit_segment(s, block, i, n_.states_at(states[head(s, block.begin) * most + i].S),
                   n_.take_states(scratch, 1), tile);
    });
  }

  void backward() {
    int64_t longest = 0;
    for (const auto& s : Base::sequences_) longest = std::max(longest, s.keys.length);
    const int64_t factors_size = 2 * n_.group * longest;
    if (Base::whole_heads()) {
      const int64_t per_head = 5 * n_.state_stride() + 4 * kChunk * (n_.feature_width + n_.value_width);
      for_head_blocks(Base::heads_together(per_head), [&](const Sequence& s, HeadBlock block) {
        Scratch scratch;
        const auto gradients = n_.take_states(scratch, block.size());
        const auto locals = n_.take_states(scratch, block.size());
        const BackwardTile tile(*this, block.size(), scratch);
        Real* rows = scratch.template take<Real>(block.size() * factors_size);
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.read(a_.grad_final, head(s, h), gradients[h - block.begin]);
        for (int64_t i = s.keys.count - 1; i >= 0; --i) {
          const RowFactors factors{rows, longest, s.keys.begin(i)};
          sweep_forward(s, block, i, tile, factors);
          sweep_reverse<true>(s, block, i, gradients, locals, tile, factors);
          for (int64_t h = 0; h < block.size(); ++h) n_.merge(gradients[h], locals[h]);
        }
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.write(a_.grad_initial, head(s, h), gradients[h - block.begin]);
      });
      return;
    }
    // Few heads: dq and the segments' sums in parallel, a fold from the end, then dk and dv.
    const int64_t most = Base::most_segments();
    Buffer buffer(heads() * most * n_.state_stride()), rows(heads() * most * factors_size);
    const auto states = n_.states_at(buffer.data());
    const auto factors_of = [&](const Sequence& s, HeadBlock block, int64_t i) {
      return RowFactors{rows.data() + (head(s, block.begin) * most + i) * factors_size, longest,
                        s.keys.begin(i)};
    };
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, 1, scratch);
      const auto local = n_.states_at(states[head(s, block.begin) * most + i].S);
      sweep_forward(s, block, i, tile, factors_of(s, block, i));
      sweep_reverse<false>(s, block, i, local, local, tile, factors_of(s, block, i));
    });
    for_heads([&](const Sequence& s, int64_t h) {
      Scratch scratch;
      const auto running = n_.take_states(scratch, 1)[0];
      n_.read(a_.grad_final, head(s, h), running);
      for (int64_t i = s.keys.count - 1; i >= 0; --i)
        exchange_and_add(running, states[head(s, h) * most + i]);
      n_.write(a_.grad_initial, head(s, h), running);
    });
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, 1, scratch);
      sweep_reverse<true>(s, block, i, n_.states_at(states[head(s, block.begin) * most + i].S),
                          n_.take_states(scratch, 1), tile, factors_of(s, block, i));
    });
  }

 private:
  // body(first token of the chunk, rows), in order.
  template <class Body>
  static void for_chunks(const Sequence& s, int64_t segment, const Body& body) {
    for (int64_t t = s.keys.begin(segment); t < s.keys.end(segment); t += kChunk)
      body(t, std::min(kChunk, s.keys.end(segment) - t));
  }

  // One step of an exclusive fold: part becomes the sum of all before it.
  void exchange_and_add(LocalState<Real> running, LocalState<Real> part) const {
    const auto each = [](Real* sum, Real* own, int64_t size) {
      for (int64_t i = 0; i < size; ++i) {
        const Real before = sum[i];
        sum[i] += own[i];
        own[i] = before;
      }
    };
    each(running.S, part.S, n_.state_elements());
    each(running.z, part.z, n_.feature_width);
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

  // Clears scores above the diagonal, as far as a product that starts within a block of rows or a
  // sum of whole vectors reads them.
  static void keep_lower(Real* scores, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t end = std::min(kChunk, padded<Real>(r + kBlockRows + 1));
      for (int64_t c = r + 1; c < end; ++c) scores[r * kChunk + c] = 0;
    }
  }

  // ---- forward ----------------------------------------------------------------------------------

  // Tiles of every head of a block; what one head needs in turn; operands of 16-bit arithmetic,
  // paired along tokens or features.
  struct ForwardTile {
    ForwardTile(const Causal& kernel, int64_t count, Scratch& scratch) {
      const Sizes<Real>& n = kernel.n_;
      const int64_t queries = kernel.query_room(count), matrix = n.feature_width * n.value_width;
      const auto elements = [&](int64_t size) {
        return Pack::copies ? scratch.template take<Element>(size) : nullptr;
      };
      phi_k = kernel.take_tiles(scratch, count, kChunk, n.feature_width);
      value = kernel.take_tiles(scratch, count, kChunk, n.value_width);
      phi_q = kernel.take_tiles(scratch, queries, kChunk, n.feature_width);
      out = kernel.take_tiles(scratch, queries, kChunk, n.value_width);
      phi_k_transposed = scratch.template take<Real>(n.feature_width * kChunk);
      scores = scratch.template take<Real>(kChunk * kChunk);
      inverse_norm = scratch.template take<Real>(kChunk);
      state = n.take_states(scratch, 1)[0];
      phi_k_tokens = elements(kChunk * n.feature_width);
      phi_k_features = elements(kChunk * n.feature_width);  // packed, then transposed
      value_tokens = elements(count * kChunk * n.value_width);
      phi_q_features = elements(kChunk * n.feature_width);
      scores_tokens = elements(kChunk * kChunk);
      state_features = elements(matrix);
    }
    Tiles<Real> phi_k, value, phi_q, out;
    Real *phi_k_transposed, *scores, *inverse_norm;
    LocalState<Real> state;  // P + L
    Element *phi_k_tokens, *phi_k_features, *value_tokens, *phi_q_features, *scores_tokens,
        *state_features;
  };

  // Outputs of segment i; locals end as its sums.
  void emit_segment(const Sequence& s, HeadBlock block, int64_t i, LocalStates<Real> starts,
                    LocalStates<Real> locals, const ForwardTile& tile) const {
    for (int64_t h = block.begin; h < block.end; ++h) {
      save(s, h, i, starts[h - block.begin]);
      n_.clear(locals[h - block.begin]);
    }
    for_chunks(s, i, [&](int64_t t, int64_t rows) {
      load_keys(s, block, t, rows, tile);
      Base::for_query_heads(block, [&](HeadBlock queries) {
        Base::read_queries(s, queries, t, rows, tile.phi_q);
        KeyOperands operands{};
        for (int64_t q = queries.begin; q < queries.end; ++q) {
          const int64_t b = q / n_.group - block.begin;
          if (q == queries.begin || q % n_.group == 0)
            operands = prepare(b, rows, starts[b], locals[b], tile);
          auto ahead = Base::template queries_ahead<true>(s, q, t + kChunk);
          emit(rows, operands, tile.phi_q[q - queries.begin], tile.out[q - queries.begin], tile,
               ahead);
        }
        write_tiles(a_.out, s.batch, queries, s.query_begin + t, rows, p_.dtype, n_.values,
                    tile.out);
      });
      for (int64_t b = 0; b < block.size(); ++b) {
        auto ahead = Base::template keys_ahead<false>(s, block.begin + b, t + kChunk);
        accumulate(b, rows, locals[b], tile, ahead);
      }
    });
  }

  void load_keys(const Sequence& s, HeadBlock block, int64_t t, int64_t rows,
                 const ForwardTile& tile) const {
    const MaskRow mask = mask_at(s.batch, s.key_begin + t);
    Base::read_keys(s, block, t, rows, mask, tile.phi_k);
    Base::read_values(s, block, t, rows, mask, tile.value);
    for (int64_t b = 0; b < block.size(); ++b) {
      phi_.of_keys(rows, mask, {}, tile.phi_k[b], tile.inverse_norm);
      Pack::pair_rows(tile.value[b], rows, n_.value_width, n_.value_width, value_pairs(b, tile));
    }
  }

  Element* value_pairs(int64_t b, const ForwardTile& tile) const {
    return tile.value_tokens + b * kChunk * n_.value_width;
  }

  // local += phi(k)^T v of the chunk.
  void accumulate(int64_t b, int64_t rows, LocalState<Real> local, const ForwardTile& tile,
                  Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const Element* A = Pack::pair_rows(tile.phi_k[b], rows, fw, fw, tile.phi_k_tokens);
    matmul<Arith, true>(n_.features, vw, Pack::elements(rows), A, 1, fw,
                        Pack::either(tile.value[b], value_pairs(b, tile)), vw, local.S, vw, ahead);
    for (int64_t r = 0; r < rows; ++r) add(local.z, tile.phi_k[b] + r * fw, fw);
  }

  // Right operands that all query heads of one kv head share.
  struct KeyOperands {
    const Element *state, *keys, *values;
  };

  KeyOperands prepare(int64_t b, int64_t rows, LocalState<Real> start, LocalState<Real> local,
                      const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    sum_of(tile.state.S, start.S, local.S, n_.state_elements());
    sum_of(tile.state.z, start.z, local.z, fw);
    return {Pack::pair_rows(tile.state.S, n_.features, vw, vw, tile.state_features),
            Pack::pair_columns_transposed(tile.phi_k[b], rows, n_.features, fw,
                                          tile.phi_k_transposed, tile.phi_k_features, kChunk),
            Pack::either(tile.value[b], value_pairs(b, tile))};
  }

  // Outputs of the chunk for one query head.
  void emit(int64_t rows, const KeyOperands& operands, Real* phi_q, Real* out,
            const ForwardTile& tile, Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    phi_.of_queries(rows, phi_q, tile.inverse_norm);
    const Element* A_query = Pack::pair_columns(phi_q, rows, fw, tile.phi_q_features);
    matmul_to_lower<Arith>(rows, Pack::elements(n_.features), A_query, Pack::elements(fw), 1,
                           operands.keys, kChunk, tile.scores, kChunk);
    keep_lower(tile.scores, rows);
    if (divides()) {
      for (int64_t r = 0; r < rows; ++r) {
        Real* scores = tile.scores + r * kChunk;
        Real* phi = phi_q + r * fw;
        const Real den = dot(phi, tile.state.z, fw) + sum_row(scores, r + 1);
        const Real inverse = inverse_denominator<Real>(den, p_.eps);
        scale_row(phi, inverse, fw);
        scale_row(scores, inverse, padded<Real>(r + 1));
      }
      A_query = Pack::pair_columns(phi_q, rows, fw, tile.phi_q_features);
    }
    const Element* A_scores = Pack::pair_columns(tile.scores, rows, kChunk, tile.scores_tokens);
    matmul<Arith, false>(rows, vw, Pack::elements(n_.features), A_query, Pack::elements(fw), 1,
                         operands.state, vw, out, vw, ahead);
    matmul_from_lower<Arith>(rows, vw, A_scores, Pack::elements(kChunk), operands.values, vw, out,
                             vw, Pack::per_element);
  }

  // Sum of the first n numbers of a row that is zero up to the next whole vector.
  static Real sum_row(const Real* row, int64_t n) {
    Vector<Real> sum{};
    for (int64_t i = 0; i < n; i += kLanes<Real>) sum += load(row + i);
    return sum_lanes<Real>(sum);
  }

  // ---- backward ---------------------------------------------------------------------------------

  // 1 / den and delta of every query row of one segment, for each query head of a block.
  struct RowFactors {
    Real* data;
    int64_t length;  // room for tokens
    int64_t begin;   // first token of the segment

    Real* inverse(int64_t head_in_block, int64_t t) const {
      return data + 2 * head_in_block * length + (t - begin);
    }
    Real* delta(int64_t head_in_block, int64_t t) const {
      return inverse(head_in_block, t) + length;
    }
  };

  // Tiles of every head of a block, its states of the forward sweep, and what one head needs in turn.
  struct BackwardTile {
    BackwardTile(const Causal& kernel, int64_t count, Scratch& scratch)
        : matrix(kernel.n_.value_width * kernel.n_.feature_width),
          state(kernel.n_.take_states(scratch, 1)[0]),
          starts(kernel.n_.take_states(scratch, count)) {
      const Sizes<Real>& n = kernel.n_;
      const int64_t queries = kernel.query_room(count), fw = n.feature_width, vw = n.value_width;
      const auto reals = [&](int64_t size) { return scratch.template take<Real>(size); };
      phi_k = kernel.take_tiles(scratch, count, kChunk, fw);
      value = kernel.take_tiles(scratch, count, kChunk, vw);
      dphi_k = kernel.take_tiles(scratch, count, kChunk, fw);
      dvalue = kernel.take_tiles(scratch, count, kChunk, vw);
      phi_q = kernel.take_tiles(scratch, queries, kChunk, fw);
      g = kernel.take_tiles(scratch, queries, kChunk, vw);
      dphi_q = kernel.take_tiles(scratch, queries, kChunk, fw);
      phi_k_transposed = reals(fw * kChunk);
      value_transposed = reals(vw * kChunk);
      scores = reals(kChunk * kChunk);
      inverse_norm_k = reals(count * kChunk);
      inverse_norm_q = reals(kChunk);
      z_running = reals(fw);
      state_transposed = reals(matrix);
      starts_transposed = reals(count * matrix);
      locals_transposed = reals(count * matrix);
    }
    int64_t matrix;  // elements of a transposed state (Dv, F)
    LocalState<Real> state;
    LocalStates<Real> starts;
    Tiles<Real> phi_k, value, dphi_k, dvalue, phi_q, g, dphi_q;
    Real *phi_k_transposed, *value_transposed, *scores, *inverse_norm_k, *inverse_norm_q;
    Real *z_running, *state_transposed, *starts_transposed, *locals_transposed;
  };

  void load_keys(const Sequence& s, HeadBlock block, int64_t t, int64_t rows,
                 const BackwardTile& tile) const {
    const MaskRow mask = mask_at(s.batch, s.key_begin + t);
    Base::read_keys(s, block, t, rows, mask, tile.phi_k);
    Base::read_values(s, block, t, rows, mask, tile.value);
    for (int64_t b = 0; b < block.size(); ++b)
      phi_.of_keys(rows, mask, {}, tile.phi_k[b], tile.inverse_norm_k + b * kChunk);
  }

  // g = do / den, in place, given 1 / den of each row.
  void divide_gradient(int64_t rows, const Real* inverse, Real* g) const {
    if (divides())
      for (int64_t r = 0; r < rows; ++r) scale_row(g + r * n_.value_width, inverse[r], n_.value_width);
  }

  // Writes dq of a segment, and its row factors.
  void sweep_forward(const Sequence& s, HeadBlock block, int64_t segment, const BackwardTile& tile,
                     const RowFactors& factors) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width, matrix = tile.matrix;
    for (int64_t b = 0; b < block.size(); ++b) {
      restore(s, block.begin + b, segment, tile.starts[b]);
      transpose<Real>(n_.features, n_.values, tile.starts[b].S, vw, tile.starts_transposed + b * matrix,
                fw);
      zero(tile.locals_transposed + b * matrix, n_.values * fw);
    }
    for_chunks(s, segment, [&](int64_t t, int64_t rows) {
      load_keys(s, block, t, rows, tile);
      Base::for_query_heads(block, [&](HeadBlock queries) {
        Base::read_queries(s, queries, t, rows, tile.phi_q);
        Base::read_gradients(s, queries, t, rows, tile.g);
        for (int64_t q = queries.begin; q < queries.end; ++q) {
          const int64_t b = q / n_.group - block.begin, in_block = q - block.begin * n_.group;
          if (q == queries.begin || q % n_.group == 0) {
            transpose<Real>(rows, n_.values, tile.value[b], vw, tile.value_transposed, kChunk);
            sum_of(tile.state_transposed, tile.starts_transposed + b * matrix,
                   tile.locals_transposed + b * matrix, n_.values * fw);
          }
          auto ahead = Base::template queries_ahead<true>(s, q, t + kChunk);
          query_gradient(b, q - queries.begin, rows, factors.inverse(in_block, t),
                         factors.delta(in_block, t), tile, ahead);
        }
        write_tiles(a_.grad_query, s.batch, queries, s.query_begin + t, rows, p_.dtype,
                    p_.head_dim, tile.dphi_q);
      });
      for (int64_t b = 0; b < block.size(); ++b) {
        auto ahead = Base::template keys_ahead<false>(s, block.begin + b, t + kChunk);
        matmul<Exact, true>(n_.values, fw, rows, tile.value[b], 1, vw, tile.phi_k[b], fw,
                            tile.locals_transposed + b * matrix, fw, ahead);
        for (int64_t r = 0; r < rows; ++r) add(tile.starts[b].z, tile.phi_k[b] + r * fw, fw);
      }
    });
  }

  // dq of one chunk: through the state before it, then through its own keys. starts[b].z holds z up
  // to the previous chunk. Sets the chunk's row factors.
  void query_gradient(int64_t b, int64_t own, int64_t rows, Real* inverse, Real* delta,
                      const BackwardTile& tile, Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    Real *phi_q = tile.phi_q[own], *g = tile.g[own], *dphi_q = tile.dphi_q[own];
    Real slope[kChunk];
    phi_.of_queries(rows, phi_q, tile.inverse_norm_q);
    if (divides())
      for_running_z(b, rows, tile, [&](int64_t r, const Real* z) {
        const Real den = dot(phi_q + r * fw, z, fw);
        inverse[r] = inverse_denominator_of_gradient<Real>(den, p_.eps);
        slope[r] = denominator_slope<Real>(den, p_.eps);
      });
    divide_gradient(rows, inverse, g);
    matmul<Exact, false>(rows, fw, n_.values, g, vw, 1, tile.state_transposed, fw, dphi_q, fw,
                         ahead);
    matmul_to_lower<Exact>(rows, n_.values, g, vw, 1, tile.value_transposed, kChunk, tile.scores,
                           kChunk);
    keep_lower(tile.scores, rows);
    matmul_from_lower<Exact>(rows, fw, tile.scores, kChunk, tile.phi_k[b], fw, dphi_q, fw);
    if (divides())
      for_running_z(b, rows, tile, [&](int64_t r, const Real* z) {
        Real* u = dphi_q + r * fw;
        delta[r] = -dot(phi_q + r * fw, u, fw) * slope[r];
        add_scaled(u, z, delta[r], fw);
      });
    phi_.chain_queries(phi_q, tile.inverse_norm_q, rows, dphi_q);
  }

  // body(row, z up to and including that row's key)
  template <class Body>
  void for_running_z(int64_t b, int64_t rows, const BackwardTile& tile, const Body& body) const {
    copy(tile.z_running, tile.starts[b].z, n_.feature_width);
    for (int64_t r = 0; r < rows; ++r) {
      add(tile.z_running, tile.phi_k[b] + r * n_.feature_width, n_.feature_width);
      body(r, tile.z_running);
    }
  }

  // locals = the segment's sums of phi(q) g^T and delta phi(q), from zero, last chunk first. With
  // `Writes`, dk and dv as well; `after` then holds the sums of all later segments.
  template <bool Writes>
  void sweep_reverse(const Sequence& s, HeadBlock block, int64_t segment, LocalStates<Real> after,
                     LocalStates<Real> locals, const BackwardTile& tile,
                     const RowFactors& factors) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    const int64_t begin = s.keys.begin(segment), end = s.keys.end(segment);
    for (int64_t b = 0; b < block.size(); ++b) n_.clear(locals[b]);
    for (int64_t t = begin + (end - begin - 1) / kChunk * kChunk; t >= begin; t -= kChunk) {
      const int64_t rows = std::min(kChunk, end - t);
      if constexpr (Writes) load_keys(s, block, t, rows, tile);
      Base::for_query_heads(block, [&](HeadBlock queries) {
        Base::read_queries(s, queries, t, rows, tile.phi_q);
        Base::read_gradients(s, queries, t, rows, tile.g);
        for (int64_t q = queries.begin; q < queries.end; ++q) {
          const int64_t b = q / n_.group - block.begin, in_block = q - block.begin * n_.group;
          const Real* delta = factors.delta(in_block, t);
          Real *phi_q = tile.phi_q[q - queries.begin], *g = tile.g[q - queries.begin];
          phi_.of_queries(rows, phi_q, tile.inverse_norm_q);
          divide_gradient(rows, factors.inverse(in_block, t), g);
          if constexpr (Writes) {
            if (q % n_.group == 0) {
              auto ahead = Base::template keys_ahead<true>(s, block.begin + b, t - kChunk);
              key_gradient_of_later_chunks(b, rows, after[b], locals[b], tile, ahead);
            }
            if (q == queries.begin || q % n_.group == 0) transpose_keys_and_values(b, rows, tile);
            key_gradient_of_this_chunk(b, rows, phi_q, g, delta, tile);
          }
          auto ahead = Base::template queries_ahead<false>(s, q, t - kChunk);
          matmul<Exact, true>(n_.features, vw, rows, phi_q, 1, fw, g, vw, locals[b].S, vw, ahead);
          if (divides())
            for (int64_t r = 0; r < rows; ++r)
              add_scaled(locals[b].z, phi_q + r * fw, delta[r], fw);
        }
      });
      if constexpr (Writes) {
        const MaskRow mask = mask_at(s.batch, s.key_begin + t);
        for (int64_t b = 0; b < block.size(); ++b)
          phi_.chain_keys(tile.phi_k[b], tile.inverse_norm_k + b * kChunk, rows, mask, nullptr,
                          tile.dphi_k[b]);
        write_tiles(a_.grad_key, s.batch, block, s.key_begin + t, rows, p_.dtype, p_.head_dim,
                    tile.dphi_k);
        write_tiles(a_.grad_value, s.batch, block, s.key_begin + t, rows, p_.dtype, n_.values,
                    tile.dvalue);
      }
    }
  }

  void transpose_keys_and_values(int64_t b, int64_t rows, const BackwardTile& tile) const {
    transpose<Real>(rows, n_.values, tile.value[b], n_.value_width, tile.value_transposed, kChunk);
    transpose<Real>(rows, n_.features, tile.phi_k[b], n_.feature_width, tile.phi_k_transposed, kChunk);
  }

  // dphi(k) and dv from the queries of all later chunks: through dS and dz.
  void key_gradient_of_later_chunks(int64_t b, int64_t rows, LocalState<Real> after,
                                    LocalState<Real> local, const BackwardTile& tile,
                                    Lookahead& ahead) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    sum_of(tile.state.S, after.S, local.S, n_.state_elements());
    sum_of(tile.state.z, after.z, local.z, fw);
    transpose<Real>(n_.features, n_.values, tile.state.S, vw, tile.state_transposed, fw);
    matmul<Exact, false>(rows, fw, n_.values, tile.value[b], vw, 1, tile.state_transposed, fw,
                         tile.dphi_k[b], fw, ahead);
    for (int64_t r = 0; r < rows; ++r) add(tile.dphi_k[b] + r * fw, tile.state.z, fw);
    matmul<Exact, false>(rows, vw, n_.features, tile.phi_k[b], fw, 1, tile.state.S, vw,
                         tile.dvalue[b], vw, ahead);
  }

  // The same from the queries i >= j of this chunk, through the scores.
  void key_gradient_of_this_chunk(int64_t b, int64_t rows, const Real* phi_q, const Real* g,
                                  const Real* delta, const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    matmul_to_lower<Exact>(rows, n_.features, phi_q, fw, 1, tile.phi_k_transposed, kChunk,
                           tile.scores, kChunk);
    keep_lower(tile.scores, rows);
    matmul_from_lower_transposed<Exact>(rows, vw, tile.scores, kChunk, g, vw, tile.dvalue[b], vw);
    matmul_to_lower<Exact>(rows, n_.values, g, vw, 1, tile.value_transposed, kChunk, tile.scores,
                           kChunk);
    if (divides())
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c <= r; ++c) tile.scores[r * kChunk + c] += delta[r];
    keep_lower(tile.scores, rows);
    matmul_from_lower_transposed<Exact>(rows, fw, tile.scores, kChunk, phi_q, fw, tile.dphi_k[b],
                                        fw);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
