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
  static constexpr int64_t kRows = kTileRows;
  using Exact = Plain<Real>;
  using Element = typename Arith::Element;
  using Pack = Operand<Arith>;
  using Base = Call<Real>;
  using typename Base::Buffer;
  using Base::a_, Base::n_, Base::p_, Base::phi_;
  using Base::divides, Base::head, Base::heads, Base::mask_at;
  using Base::for_head_blocks, Base::for_heads, Base::for_key_segments, Base::for_query_segments;

 public:
  NonCausal(const Problem& problem, const Arguments& args) : Base(problem, args) {}

  void forward() {
    if (Base::whole_heads()) {
      const int64_t per_head = 3 * n_.state_stride() + 2 * kRows * (n_.feature_width + n_.value_width);
      for_head_blocks(Base::heads_together(per_head), [&](const Sequence& s, HeadBlock block) {
        Scratch scratch;
        const auto totals = n_.take_states(scratch, block.size());
        const auto parts = n_.take_states(scratch, block.size());
        Real* maxima = scratch.template take<Real>(block.size() * n_.feature_width);
        const ForwardTile tile(*this, block.size(), scratch);
        for (int64_t h = block.begin; h < block.end; ++h) {
          n_.read(a_.initial, head(s, h), totals[h - block.begin]);
          find_maximum(s, h, 0, s.keys.count, maxima + (h - block.begin) * n_.feature_width, tile);
        }
        for (int64_t i = 0; i < s.keys.count; ++i) {
          sum_keys(s, block, i, maxima, parts, tile);
          for (int64_t h = 0; h < block.size(); ++h) n_.merge(totals[h], parts[h]);
        }
        for (int64_t h = block.begin; h < block.end; ++h)
          finish(s, h, totals[h - block.begin], maxima + (h - block.begin) * n_.feature_width);
        prepare_states(totals, block.size(), tile);
        for (int64_t i = 0; i < s.queries.count; ++i) emit(s, block, i, totals, tile);
      });
      return;
    }
    // Few heads: segments are summed in parallel, then folded in the order above.
    const int64_t most = Base::most_segments(), fw = n_.feature_width;
    Buffer part_buffer(heads() * most * n_.state_stride()), total_buffer(heads() * n_.state_stride());
    Buffer maxima(heads() * most * fw);
    const auto parts = n_.states_at(part_buffer.data()), totals = n_.states_at(total_buffer.data());
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(*this, 1, scratch);
      find_maximum(s, block.begin, i, i + 1,
                   maxima.data() + (head(s, block.begin) * most + i) * fw, tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      if (p_.feature_map != FeatureMap::efficient) return;
      Real* first = maxima.data() + head(s, h) * most * fw;
      for (int64_t i = 1; i < s.keys.count; ++i)
        for (int64_t f = 0; f < fw; ++f) first[f] = std::max(first[f], first[i * fw + f]);
    });
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(*this, 1, scratch);
      const int64_t first = head(s, block.begin) * most;
      sum_keys(s, block, i, maxima.data() + first * fw, n_.states_at(parts[first + i].S), tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      const auto total = totals[head(s, h)];
      n_.read(a_.initial, head(s, h), total);
      for (int64_t i = 0; i < s.keys.count; ++i) n_.merge(total, parts[head(s, h) * most + i]);
      finish(s, h, total, maxima.data() + head(s, h) * most * fw);
    });
    for_query_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const ForwardTile tile(*this, 1, scratch);
      const auto total = n_.states_at(totals[head(s, block.begin)].S);
      prepare_states(total, 1, tile);
      emit(s, block, i, total, tile);
    });
  }

  void backward() {
    if (Base::whole_heads()) {
      const int64_t per_head = 5 * n_.state_stride() + 3 * kRows * (n_.feature_width + n_.value_width);
      for_head_blocks(Base::heads_together(per_head), [&](const Sequence& s, HeadBlock block) {
        Scratch scratch;
        const auto gradients = n_.take_states(scratch, block.size());
        const auto parts = n_.take_states(scratch, block.size());
        const BackwardTile tile(*this, block.size(), scratch);
        restore(s, block, tile);
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.read(a_.grad_final, head(s, h), gradients[h - block.begin]);
        for (int64_t i = 0; i < s.queries.count; ++i) {
          backward_queries(s, block, i, parts, tile);
          for (int64_t h = 0; h < block.size(); ++h) n_.merge(gradients[h], parts[h]);
        }
        for (int64_t h = block.begin; h < block.end; ++h)
          n_.write(a_.grad_initial, head(s, h), gradients[h - block.begin]);
        prepare_gradients(gradients, block.size(), tile);
        for (int64_t i = 0; i < s.keys.count; ++i) backward_keys(s, block, i, gradients, tile);
      });
      return;
    }
    const int64_t most = Base::most_segments();
    Buffer part_buffer(heads() * most * n_.state_stride());
    Buffer gradient_buffer(heads() * n_.state_stride());
    const auto parts = n_.states_at(part_buffer.data());
    const auto gradients = n_.states_at(gradient_buffer.data());
    for_query_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, 1, scratch);
      restore(s, block, tile);
      backward_queries(s, block, i, n_.states_at(parts[head(s, block.begin) * most + i].S), tile);
    });
    for_heads([&](const Sequence& s, int64_t h) {
      const auto gradient = gradients[head(s, h)];
      n_.read(a_.grad_final, head(s, h), gradient);
      for (int64_t i = 0; i < s.queries.count; ++i)
        n_.merge(gradient, parts[head(s, h) * most + i]);
      n_.write(a_.grad_initial, head(s, h), gradient);
    });
    for_key_segments([&](const Sequence& s, HeadBlock block, int64_t i) {
      Scratch scratch;
      const BackwardTile tile(*this, 1, scratch);
      const auto gradient = n_.states_at(gradients[head(s, block.begin)].S);
      restore(s, block, tile);
      prepare_gradients(gradient, 1, tile);
      backward_keys(s, block, i, gradient, tile);
    });
  }

 private:
  // ---- forward ----------------------------------------------------------------------------------

  // Tiles of every head of a block, and for 16-bit arithmetic its operands.
  struct ForwardTile {
    ForwardTile(const NonCausal& kernel, int64_t count, Scratch& scratch) {
      const Sizes<Real>& n = kernel.n_;
      const int64_t heads = std::max(count, kernel.query_room(count));
      const auto elements = [&](int64_t size) {
        return Pack::copies ? scratch.template take<Element>(size) : nullptr;
      };
      phi = kernel.take_tiles(scratch, heads, kRows, n.feature_width);
      value = kernel.take_tiles(scratch, heads, kRows, n.value_width);  // or the outputs
      inverse_norm = scratch.template take<Real>(kRows);
      phi_pairs = elements(kRows * n.feature_width);
      value_pairs = elements(kRows * n.value_width);
      state_pairs = elements(count * n.feature_width * n.value_width);
    }
    Tiles<Real> phi, value;
    Real* inverse_norm;
    Element *phi_pairs, *value_pairs, *state_pairs;
  };

  // parts = sums over the keys of segment i, from zero.
  void sum_keys(const Sequence& s, HeadBlock block, int64_t i, const Real* maxima,
                LocalStates<Real> parts, const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t b = 0; b < block.size(); ++b) n_.clear(parts[b]);
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t);
      const MaskRow mask = mask_at(s.batch, s.key_begin + t);
      Base::read_keys(s, block, t, rows, mask, tile.phi);
      Base::read_values(s, block, t, rows, mask, tile.value);
      for (int64_t b = 0; b < block.size(); ++b) {
        phi_.of_keys(rows, mask, {maxima + b * fw, nullptr}, tile.phi[b], tile.inverse_norm);
        const Element* A = Pack::pair_rows(tile.phi[b], rows, fw, fw, tile.phi_pairs);
        const Element* B = Pack::pair_rows(tile.value[b], rows, vw, vw, tile.value_pairs);
        auto ahead = Base::template keys_ahead<false>(s, block.begin + b, t + kRows);
        matmul<Arith, true>(n_.features, vw, Pack::elements(rows), A, 1, fw, B, vw, parts[b].S, vw,
                            ahead);
        for (int64_t r = 0; r < rows; ++r) add(parts[b].z, tile.phi[b] + r * fw, fw);
      }
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

  Element* state_pairs(int64_t b, const ForwardTile& tile) const {
    return tile.state_pairs + b * n_.feature_width * n_.value_width;
  }

  void prepare_states(LocalStates<Real> states, int64_t count, const ForwardTile& tile) const {
    for (int64_t b = 0; b < count; ++b)
      Pack::pair_rows(states[b].S, n_.features, n_.value_width, n_.value_width,
                      state_pairs(b, tile));
  }

  void emit(const Sequence& s, HeadBlock block, int64_t i, LocalStates<Real> totals,
            const ForwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.queries.end(i) - t);
      Base::for_query_heads(block, [&](HeadBlock queries) {
        Base::read_queries(s, queries, t, rows, tile.phi);
        for (int64_t q = queries.begin; q < queries.end; ++q) {
          const int64_t b = q / n_.group - block.begin;
          Real* phi = tile.phi[q - queries.begin];
          phi_.of_queries(rows, phi, tile.inverse_norm);
          if (divides())
            for (int64_t r = 0; r < rows; ++r) {
              const Real den = dot(phi + r * fw, totals[b].z, fw);
              scale_row(phi + r * fw, inverse_denominator<Real>(den, p_.eps), fw);
            }
          const Element* A = Pack::pair_columns(phi, rows, fw, tile.phi_pairs);
          auto ahead = Base::template queries_ahead<true>(s, q, t + kRows);
          matmul<Arith, false>(rows, vw, Pack::elements(n_.features), A, Pack::elements(fw), 1,
                               Pack::either(totals[b].S, state_pairs(b, tile)), vw,
                               tile.value[q - queries.begin], vw, ahead);
        }
        write_tiles(a_.out, s.batch, queries, s.query_begin + t, rows, p_.dtype, n_.values,
                    tile.value);
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
        Base::read_keys(s, {h, h + 1}, t, rows, mask, tile.phi);
        phi_.raise_to_maximum(rows, mask, tile.phi[0], maximum);
      }
  }

  // ---- backward ---------------------------------------------------------------------------------

  // What both passes share: tiles of every head, the saved states and their transposed matrices.
  struct BackwardTile {
    BackwardTile(const NonCausal& kernel, int64_t count, Scratch& scratch)
        : matrix(kernel.n_.value_width * kernel.n_.feature_width),
          states(kernel.n_.take_states(scratch, count)) {
      const Sizes<Real>& n = kernel.n_;
      const int64_t heads = std::max(count, kernel.query_room(count));
      S_transposed = scratch.template take<Real>(count * matrix);
      dS_transposed = scratch.template take<Real>(count * matrix);
      maxima = scratch.template take<Real>(count * n.feature_width);
      column_sums = scratch.template take<Real>(count * n.feature_width);
      phi = kernel.take_tiles(scratch, heads, kRows, n.feature_width);
      dphi = kernel.take_tiles(scratch, heads, kRows, n.feature_width);
      value = kernel.take_tiles(scratch, heads, kRows, n.value_width);  // or g = do / den
      dvalue = kernel.take_tiles(scratch, count, kRows, n.value_width);
      inverse_norm = scratch.template take<Real>(kRows);
    }
    int64_t matrix;
    LocalStates<Real> states;
    Real *S_transposed, *dS_transposed, *maxima, *column_sums;
    Tiles<Real> phi, dphi, value, dvalue;
    Real* inverse_norm;
  };

  void restore(const Sequence& s, HeadBlock block, const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width;
    for (int64_t h = 0; h < block.size(); ++h) {
      const State saved = saved_at(s, block.begin + h);
      n_.read(saved, 0, tile.states[h]);
      transpose<Real>(n_.features, n_.values, tile.states[h].S, n_.value_width,
                tile.S_transposed + h * tile.matrix, fw);
      zero(tile.maxima + h * fw, fw);
      if (p_.feature_map == FeatureMap::efficient)
        copy(tile.maxima + h * fw, static_cast<const Real*>(saved.z) + n_.features, n_.features);
    }
  }

  // For the pass over keys: dS transposed, and sum_j phi(k_j) dphi(k_j) = rows of dS . rows of S.
  void prepare_gradients(LocalStates<Real> gradients, int64_t count,
                         const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t h = 0; h < count; ++h) {
      transpose<Real>(n_.features, n_.values, gradients[h].S, vw, tile.dS_transposed + h * tile.matrix,
                fw);
      Real* sums = tile.column_sums + h * fw;
      zero(sums, fw);
      for (int64_t f = 0; f < n_.features; ++f)
        sums[f] = dot(gradients[h].S + f * vw, tile.states[h].S + f * vw, vw);
    }
  }

  // Writes dq of segment i; parts = its sums of phi(q) g^T and delta phi(q), from zero.
  void backward_queries(const Sequence& s, HeadBlock block, int64_t i, LocalStates<Real> parts,
                        const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t b = 0; b < block.size(); ++b) n_.clear(parts[b]);
    for (int64_t t = s.queries.begin(i); t < s.queries.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.queries.end(i) - t);
      Base::for_query_heads(block, [&](HeadBlock queries) {
        Base::read_queries(s, queries, t, rows, tile.phi);
        Base::read_gradients(s, queries, t, rows, tile.value);
        for (int64_t q = queries.begin; q < queries.end; ++q) {
          const int64_t b = q / n_.group - block.begin, own = q - queries.begin;
          Real *phi = tile.phi[own], *dphi = tile.dphi[own], *g = tile.value[own];
          const Real* z = tile.states[b].z;
          phi_.of_queries(rows, phi, tile.inverse_norm);
          Real slope[kRows];
          if (divides())
            for (int64_t r = 0; r < rows; ++r) {
              const Real den = dot(phi + r * fw, z, fw);
              slope[r] = denominator_slope<Real>(den, p_.eps);
              scale_row(g + r * vw, inverse_denominator_of_gradient<Real>(den, p_.eps), vw);
            }
          auto ahead = Base::template queries_ahead<true>(s, q, t + kRows);
          matmul<Exact, false>(rows, fw, n_.values, g, vw, 1, tile.S_transposed + b * tile.matrix,
                               fw, dphi, fw, ahead);
          if (divides())
            for (int64_t r = 0; r < rows; ++r) {
              Real* u = dphi + r * fw;
              const Real delta = -dot(phi + r * fw, u, fw) * slope[r];
              add_scaled(u, z, delta, fw);
              add_scaled(parts[b].z, phi + r * fw, delta, fw);
            }
          matmul<Exact, true>(n_.features, vw, rows, phi, 1, fw, g, vw, parts[b].S, vw, ahead);
          phi_.chain_queries(phi, tile.inverse_norm, rows, dphi);
        }
        write_tiles(a_.grad_query, s.batch, queries, s.query_begin + t, rows, p_.dtype,
                    p_.head_dim, tile.dphi);
      });
    }
  }

  // Writes dk and dv of segment i.
  void backward_keys(const Sequence& s, HeadBlock block, int64_t i, LocalStates<Real> gradients,
                     const BackwardTile& tile) const {
    const int64_t fw = n_.feature_width, vw = n_.value_width;
    for (int64_t t = s.keys.begin(i); t < s.keys.end(i); t += kRows) {
      const int64_t rows = std::min(kRows, s.keys.end(i) - t), token = s.key_begin + t;
      const MaskRow mask = mask_at(s.batch, token);
      Base::read_keys(s, block, t, rows, mask, tile.phi);
      Base::read_values(s, block, t, rows, mask, tile.value);
      for (int64_t b = 0; b < block.size(); ++b) {
        Real *phi = tile.phi[b], *dphi = tile.dphi[b];
        phi_.of_keys(rows, mask, {tile.maxima + b * fw, tile.states[b].z}, phi, tile.inverse_norm);
        auto ahead = Base::template keys_ahead<true>(s, block.begin + b, t + kRows);
        matmul<Exact, false>(rows, fw, n_.values, tile.value[b], vw, 1,
                             tile.dS_transposed + b * tile.matrix, fw, dphi, fw, ahead);
        for (int64_t r = 0; r < rows; ++r) add(dphi + r * fw, gradients[b].z, fw);
        matmul<Exact, false>(rows, vw, n_.features, phi, fw, 1, gradients[b].S, vw, tile.dvalue[b],
                             vw, ahead);
        phi_.chain_keys(phi, tile.inverse_norm, rows, mask, tile.column_sums + b * fw, dphi);
      }
      write_tiles(a_.grad_key, s.batch, block, token, rows, p_.dtype, p_.head_dim, tile.dphi);
      write_tiles(a_.grad_value, s.batch, block, token, rows, p_.dtype, n_.values, tile.dvalue);
    }
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
