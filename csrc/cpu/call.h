// What the kernels of every form share: the call, its sizes, and the loops over heads and segments
// that hand out work. Also the denominator, whose cases all kernels must treat alike.
#pragma once

#include <memory>
#include <utility>

#include "features.h"
#include "lookahead.h"
#include "operand.h"
#include "parallel.h"
#include "segments.h"

namespace fastattn {
namespace FASTATTN_ISA {

// 1 / max(den, eps), which divides an output. A NaN stays one.
template <class Real>
FASTATTN_INLINE Real inverse_denominator(Real den, double eps) {
  const Real floor = static_cast<Real>(eps);
  return Real{1} / (den < floor ? floor : den);
}

// In place, for whole vectors that hold n numbers.
template <class Real>
FASTATTN_INLINE void invert_denominators(Real* den, int64_t n, double eps) {
  const Vector<Real> floor = splat(static_cast<Real>(eps)), one = splat(Real{1});
  for (int64_t i = 0; i < n; i += kLanes<Real>) {
    const Vector<Real> d = load(den + i);
    store(den + i, one / (d < floor ? floor : d));
  }
}

// What gradients need of the denominators of a tile of queries.
template <class Real, int64_t Rows>
struct RowDenominators {
  Real inverse[Rows];  // 1 / max(den, eps), or 0 where there is nothing to attend to
  Real slope[Rows];    // -d log(1 / max(den, eps)) / d den: 1 / den, or 0 where eps holds

  // From `inverse` holding the denominators themselves.
  void of_gradient(int64_t n, double eps) {
    const Vector<Real> floor = splat(static_cast<Real>(eps)), one = splat(Real{1}), nil{};
    for (int64_t i = 0; i < n; i += kLanes<Real>) {
      const Vector<Real> den = load(inverse + i);
      store(slope + i, den < floor ? nil : one / den);
      store(inverse + i, den <= nil ? nil : one / (den < floor ? floor : den));
    }
  }

  // delta = -(phi(q) . u) / den, given phi(q) . u.
  void negate_and_scale(int64_t n, Real* delta) const {
    for (int64_t i = 0; i < n; i += kLanes<Real>)
      store(delta + i, -load(delta + i) * load(slope + i));
  }
};

template <class Real, class Arith = Plain<Real>, int64_t TileRows = Arith::tile_rows>
class Call {
 protected:
  static constexpr int64_t kRows = TileRows;
  static_assert(kRows % kLanes<Real> == 0, "numbers of a tile's rows are whole vectors");
  using Denominators = RowDenominators<Real, kRows>;

  // Heads from `first` to before `end`.
  struct HeadRun {
    int64_t first, end;

    int64_t count() const { return end - first; }
    template <class Body>
    void each(const Body& body) const {
      for (int64_t h = first; h < end; ++h) body(h);
    }
  };

  // Of all sequences of the problem, or some.
  Call(const Problem& problem, const Arguments& args, std::vector<Sequence> sequences)
      : p_(problem), a_(args), n_(problem), phi_(problem), sequences_(std::move(sequences)) {}

  // ---- handing out work -------------------------------------------------------------------------

  bool whole_heads() const { return takes_whole_heads(p_, sequences_, a_.threads); }

  // body(sequence, kv head)
  template <class Body>
  void for_heads(const Body& body) const {
    parallel_for(tasks(), a_.threads, [&](int64_t task) {
      const typename Arith::Registers registers;
      body(sequences_[static_cast<size_t>(task / p_.num_kv_heads)], task % p_.num_kv_heads);
    });
  }

  // body(sequence, kv heads), of neighbouring heads that one thread takes segment by segment: their
  // rows lie in the same pages, which are then looked up once and not once for every head.
  template <class Body>
  void for_runs_of_heads(const Body& body) const {
    const int64_t length = run_length(), runs = (p_.num_kv_heads + length - 1) / length;
    const auto count = static_cast<int64_t>(sequences_.size()) * runs;
    parallel_for(count, a_.threads, [&](int64_t task) {
      const typename Arith::Registers registers;
      const int64_t first = task % runs * length;
      body(sequences_[static_cast<size_t>(task / runs)],
           HeadRun{first, std::min(first + length, p_.num_kv_heads)});
    });
  }

  // body(sequence, kv head, segment)
  template <class Body>
  void for_key_segments(const Body& body) const {
    for_segments(&Sequence::keys, body);
  }

  template <class Body>
  void for_query_segments(const Body& body) const {
    for_segments(&Sequence::queries, body);
  }

  int64_t most_segments() const {
    int64_t most = 1;
    for (const auto& s : sequences_) most = std::max({most, s.keys.count, s.queries.count});
    return most;
  }

  // ---- addressing -------------------------------------------------------------------------------

  int64_t heads() const { return p_.state_batch() * p_.num_kv_heads; }
  int64_t head(const Sequence& s, int64_t h) const { return s.state * p_.num_kv_heads + h; }

  // The softmax over tokens of `efficient` already is a normaliser.
  bool divides() const { return p_.normalize && p_.feature_map != FeatureMap::efficient; }

  // ---- tiles: used where they lie if they can be, else copied ------------------------------------

  // What phi is taken of: read once, so rows may lie apart.
  Rows<const Real> keys(const Sequence& s, int64_t h, int64_t t, int64_t rows, MaskRow mask,
                        Real* tile) const {
    return features(a_.key, s.batch, h, s.key_begin + t, rows, mask, tile);
  }

  Rows<const Real> queries(const Sequence& s, int64_t q, int64_t t, int64_t rows,
                           Real* tile) const {
    return features(a_.query, s.batch, q, s.query_begin + t, rows, {}, tile);
  }

  // With rows of value_width numbers.
  const Real* values(const Sequence& s, int64_t h, int64_t t, int64_t rows, MaskRow mask,
                     Real* tile) const {
    if (!mask.data && is_like_tile<Real>(a_.value, p_.dtype, n_.values))
      return row_of<Real>(a_.value, s.batch, h, s.key_begin + t);
    read_tile(a_.value, s.batch, h, s.key_begin + t, rows, p_.dtype, n_.values, mask, tile,
              n_.value_width);
    return tile;
  }

  // The same as an operand, paired along tokens.
  const typename Arith::Element* value_operand(const Sequence& s, int64_t h, int64_t t,
                                               int64_t rows, MaskRow mask, Real* tile,
                                               typename Arith::Element* pairs) const {
    if constexpr (Operand<Arith>::copies)  // its elements are those of the tensor
      if (!mask.data && a_.value.feature == 1 && n_.values == n_.value_width) {
        const uint16_t* first = row_of<uint16_t>(a_.value, s.batch, h, s.key_begin + t);
        return Operand<Arith>::pair_rows({first, a_.value.token}, rows, n_.values, pairs);
      }
    return Operand<Arith>::pair_rows(values(s, h, t, rows, mask, tile), rows, n_.value_width,
                                     pairs);
  }

  // tile = grad_out, each row multiplied by its factor where the outputs were divided.
  void read_gradients(const Sequence& s, int64_t q, int64_t t, int64_t rows, const Real* factors,
                      Real* tile) const {
    const int64_t token = s.query_begin + t;
    if (divides() && has_whole_vectors<Real>(a_.grad_out, p_.dtype, n_.values))
      return scale_rows<Real>({row_of<Real>(a_.grad_out, s.batch, q, token), a_.grad_out.token},
                              factors, rows, n_.value_width, tile);
    read_tile(a_.grad_out, s.batch, q, token, rows, p_.dtype, n_.values, {}, tile, n_.value_width);
    if (divides()) scale_rows<Real>({tile, n_.value_width}, factors, rows, n_.value_width, tile);
  }

  // Where causal outputs are formed: in place if they can be; `finish_out` copies those in the tile.
  Rows<Real> place_for_out(const Sequence& s, int64_t q, int64_t t, Real* tile) const {
    if (has_whole_vectors<Real>(a_.out, p_.dtype, n_.values))
      return {row_of<Real>(a_.out, s.batch, q, s.query_begin + t), a_.out.token};
    return {tile, n_.value_width};
  }

  void finish_out(const Sequence& s, int64_t q, int64_t t, int64_t rows, Rows<Real> out,
                  const Real* tile) const {
    if (out.data == tile) write_out(s, q, t, rows, tile);
  }

  void write_out(const Sequence& s, int64_t q, int64_t t, int64_t rows, const Real* tile) const {
    write_tile(a_.out, s.batch, q, s.query_begin + t, rows, p_.dtype, n_.values, tile,
               n_.value_width);
  }

  void write_query_gradients(const Sequence& s, int64_t q, int64_t t, int64_t rows,
                             const Real* tile) const {
    write_tile(a_.grad_query, s.batch, q, s.query_begin + t, rows, p_.dtype, p_.head_dim, tile,
               n_.feature_width);
  }

  void write_key_gradients(const Sequence& s, int64_t h, int64_t t, int64_t rows,
                           const Real* dphi, const Real* dvalue) const {
    write_tile(a_.grad_key, s.batch, h, s.key_begin + t, rows, p_.dtype, p_.head_dim, dphi,
               n_.feature_width);
    write_tile(a_.grad_value, s.batch, h, s.key_begin + t, rows, p_.dtype, n_.values, dvalue,
               n_.value_width);
  }

  // The first token of a tile, and its kv head.
  struct Place {
    int64_t head, token;
  };

  // What follows tile t of segment i where a run takes the segment of one head after the other's.
  static Place next_tile(const Segments& segments, HeadRun run, int64_t h, int64_t i, int64_t t) {
    if (t + kRows < segments.end(i)) return {h, t + kRows};
    if (h + 1 < run.end) return {h + 1, segments.begin(i)};
    return {run.first, segments.end(i)};
  }

  // The same where a segment's tiles are taken last one first, and segments, too.
  static Place next_tile_in_reverse(const Segments& segments, HeadRun run, int64_t h, int64_t i,
                                    int64_t t) {
    if (t > segments.begin(i)) return {h, t - kRows};
    if (h + 1 < run.end) return {h + 1, segments.begin(i)};
    return {run.first, segments.begin(std::max<int64_t>(i - 1, 0))};
  }

  // What a tile will touch: asked for while the one before is multiplied. `Writes`: also where its
  // results go.
  template <bool Writes>
  Lookahead keys_ahead(const Sequence& s, Place tile) const {
    Lookahead ahead;
    const auto add = [&](const Strided& tensor, int64_t n) {
      ahead.add(tensor, s.batch, tile.head, s.key_begin + tile.token, kRows, p_.dtype, n);
    };
    if constexpr (Writes) {
      add(a_.grad_key, p_.head_dim);
      add(a_.grad_value, n_.values);
    }
    add(a_.key, p_.head_dim);
    add(a_.value, n_.values);
    return ahead;
  }

  // Of query head `in_group` of those that share the kv head.
  template <bool Writes>
  Lookahead queries_ahead(const Sequence& s, Place tile, int64_t in_group) const {
    const int64_t q = tile.head * n_.group + in_group;
    Lookahead ahead;
    const auto add = [&](const Strided& tensor, int64_t n) {
      ahead.add(tensor, s.batch, q, s.query_begin + tile.token, kRows, p_.dtype, n);
    };
    if constexpr (Writes) {
      add(a_.out, n_.values);
      add(a_.grad_query, p_.head_dim);
    }
    add(a_.query, p_.head_dim);
    add(a_.grad_out, n_.values);
    return ahead;
  }

  // body(query head), for those that share kv head h.
  template <class Body>
  void for_query_heads(int64_t h, const Body& body) const {
    for (int64_t q = h * n_.group; q < (h + 1) * n_.group; ++q) body(q);
  }

  MaskRow mask_at(int64_t batch, int64_t token) const {
    if (!a_.key_mask) return {};
    return {a_.key_mask + batch * a_.key_mask_batch + token * a_.key_mask_token, a_.key_mask_token};
  }

  // States of many heads or segments, for when segments are shared out.
  struct Buffer {
    explicit Buffer(int64_t count) : numbers(new Real[static_cast<size_t>(count)]) {}
    Real* data() const { return numbers.get(); }
    std::unique_ptr<Real[]> numbers;
  };

  // States of the heads of a run, in scratch, as a function of the head.
  auto take_states(Scratch& scratch, HeadRun run) const {
    Real* data = scratch.template take<Real>(run.count() * n_.state_stride());
    return [this, data, run](int64_t h) { return n_.state_at(data, h - run.first); };
  }

  Problem p_;
  Arguments a_;
  Sizes<Real> n_;
  Features<Real, Arith> phi_;
  std::vector<Sequence> sequences_;

 private:
  int64_t tasks() const { return static_cast<int64_t>(sequences_.size()) * p_.num_kv_heads; }

  // As many as leave a run for each thread and whose states stay in its cache, evenly.
  int64_t run_length() const {
    constexpr int64_t most = 6, most_bytes = int64_t{256} << 10;
    const int64_t fit = most_bytes / (n_.state_stride() * static_cast<int64_t>(sizeof(Real)));
    const int64_t share = std::min(tasks() / a_.threads, p_.num_kv_heads);
    const int64_t length = std::max<int64_t>(std::min({most, fit, share}), 1);
    const int64_t runs = (p_.num_kv_heads + length - 1) / length;
    return (p_.num_kv_heads + runs - 1) / runs;
  }

  Rows<const Real> features(const Strided& tensor, int64_t batch, int64_t head, int64_t token,
                            int64_t rows, MaskRow mask, Real* tile) const {
    if (!mask.data && n_.feature_width == p_.head_dim &&
        has_whole_vectors<Real>(tensor, p_.dtype, p_.head_dim))
      return {row_of<Real>(tensor, batch, head, token), tensor.token};
    read_tile(tensor, batch, head, token, rows, p_.dtype, p_.head_dim, mask, tile,
              n_.feature_width);
    return {tile, n_.feature_width};
  }

  template <class Body>
  void for_segments(Segments Sequence::*kind, const Body& body) const {
    const int64_t most = most_segments();
    parallel_for(tasks() * most, a_.threads, [&](int64_t task) {
      const typename Arith::Registers registers;
      const int64_t index = task / most, segment = task % most;
      const Sequence& s = sequences_[static_cast<size_t>(index / p_.num_kv_heads)];
      const int64_t h = index % p_.num_kv_heads;
      if (segment < (s.*kind).count) body(s, h, segment);
    });
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
