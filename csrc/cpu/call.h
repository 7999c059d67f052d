// What the kernels of every form share: the call, its sizes, and the loops over heads and segments
// that hand out work. Also the denominator, whose cases all kernels must treat alike.
#pragma once

#include <memory>

#include "features.h"
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

// The same for gradients, which are 0 where there is nothing to attend to.
template <class Real>
FASTATTN_INLINE Real inverse_denominator_of_gradient(Real den, double eps) {
  return den <= 0 ? Real{0} : inverse_denominator(den, eps);
}

// -d log(1 / max(den, eps)) / d den: 1 / den, or 0 where eps holds.
template <class Real>
FASTATTN_INLINE Real denominator_slope(Real den, double eps) {
  return den < static_cast<Real>(eps) ? Real{0} : Real{1} / den;
}

constexpr int64_t kTileRows = 64;  // tokens of a tile

template <class Real>
class Call {
  static constexpr int64_t kCacheBytes = 640 << 10;  // of L2 that a block of heads may fill

 protected:
  Call(const Problem& problem, const Arguments& args)
      : p_(problem), a_(args), n_(problem), phi_(problem), sequences_(sequences_of(problem, args)) {}

  // ---- handing out work -------------------------------------------------------------------------

  bool whole_heads() const { return takes_whole_heads(p_, sequences_, a_.threads); }

  // The query heads of a block of kv heads.
  HeadBlock query_heads(HeadBlock block) const {
    return {block.begin * n_.group, block.end * n_.group};
  }

  // How many kv heads a thread walks together: in (B, N, H, D) memory as many as its cache holds,
  // given the numbers that a kernel keeps per head.
  int64_t heads_together(int64_t numbers_per_head) const {
    if (a_.key.head > a_.key.token) return 1;
    const int64_t room = kCacheBytes / (numbers_per_head * static_cast<int64_t>(sizeof(Real)));
    return std::clamp<int64_t>(room, 1, p_.num_kv_heads);
  }

  // body(sequence, head block); as many blocks as keep all threads busy.
  template <class Body>
  void for_head_blocks(int64_t together, const Body& body) const {
    int64_t blocks = (p_.num_kv_heads + together - 1) / together;
    while (blocks < p_.num_kv_heads && p_.state_batch() * blocks % a_.threads != 0) ++blocks;
    parallel_for(p_.state_batch() * blocks, a_.threads, [&](int64_t task) {
      const int64_t block = task % blocks;
      body(sequences_[static_cast<size_t>(task / blocks)],
           HeadBlock{block * p_.num_kv_heads / blocks, (block + 1) * p_.num_kv_heads / blocks});
    });
  }

  // body(sequence, kv head)
  template <class Body>
  void for_heads(const Body& body) const {
    parallel_for(heads(), a_.threads, [&](int64_t task) {
      body(sequences_[static_cast<size_t>(task / p_.num_kv_heads)], task % p_.num_kv_heads);
    });
  }

  // body(sequence, block of one kv head, segment)
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

  // ---- tiles ------------------------------------------------------------------------------------

  Tiles<Real> take_tiles(Scratch& scratch, int64_t heads, int64_t rows, int64_t width) const {
    return {scratch.template take<Real>(heads * rows * width), width, rows * width};
  }

  void read_keys(const Sequence& s, HeadBlock block, int64_t t, int64_t rows, MaskRow mask,
                 Tiles<Real> tiles) const {
    read_tiles(a_.key, s.batch, block, s.key_begin + t, rows, p_.dtype, p_.head_dim, mask, tiles);
  }

  void read_values(const Sequence& s, HeadBlock block, int64_t t, int64_t rows, MaskRow mask,
                   Tiles<Real> tiles) const {
    read_tiles(a_.value, s.batch, block, s.key_begin + t, rows, p_.dtype, n_.values, mask, tiles);
  }

  void read_queries(const Sequence& s, HeadBlock queries, int64_t t, int64_t rows,
                    Tiles<Real> tiles) const {
    read_tiles(a_.query, s.batch, queries, s.query_begin + t, rows, p_.dtype, p_.head_dim, {},
               tiles);
  }

  void read_gradients(const Sequence& s, HeadBlock queries, int64_t t, int64_t rows,
                      Tiles<Real> tiles) const {
    read_tiles(a_.grad_out, s.batch, queries, s.query_begin + t, rows, p_.dtype, n_.values, {},
               tiles);
  }

  // What the tile of tokens from t on will touch, of one kv head or one query head: asked for while
  // the present tile is multiplied. `Writes`: also where its results go.
  template <bool Writes>
  Lookahead keys_ahead(const Sequence& s, int64_t h, int64_t t) const {
    Lookahead ahead;
    const auto add = [&](const Strided& tensor, int64_t n) {
      ahead.add(tensor, s.batch, h, s.key_begin + t, kTileRows, p_.dtype, n);
    };
    if constexpr (Writes) {
      add(a_.grad_key, p_.head_dim);
      add(a_.grad_value, n_.values);
    }
    add(a_.key, p_.head_dim);
    add(a_.value, n_.values);
    return ahead;
  }

  template <bool Writes>
  Lookahead queries_ahead(const Sequence& s, int64_t q, int64_t t) const {
    Lookahead ahead;
    const auto add = [&](const Strided& tensor, int64_t n) {
      ahead.add(tensor, s.batch, q, s.query_begin + t, kTileRows, p_.dtype, n);
    };
    if constexpr (Writes) {
      add(a_.out, n_.values);
      add(a_.grad_query, p_.head_dim);
    }
    add(a_.query, p_.head_dim);
    add(a_.grad_out, n_.values);
    return ahead;
  }

  // body(queries): the query heads of a block, a few at a time where a group is large.
  static constexpr int64_t kQueryHeads = 8;
  template <class Body>
  void for_query_heads(HeadBlock block, const Body& body) const {
    const HeadBlock all = query_heads(block);
    const int64_t step = query_room(block.size());
    for (int64_t q = all.begin; q < all.end; q += step)
      body(HeadBlock{q, std::min(q + step, all.end)});
  }

  // Tiles of query heads that are held at once for a block of kv heads: all of them, unless it is a
  // single head with a large group.
  int64_t query_room(int64_t block_size) const {
    return block_size > 1 ? block_size * n_.group : std::min(n_.group, kQueryHeads);
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

  int64_t state_stride() const { return n_.state_stride(); }

  Problem p_;
  Arguments a_;
  Sizes<Real> n_;
  Features<Real> phi_;
  std::vector<Sequence> sequences_;

 private:
  template <class Body>
  void for_segments(Segments Sequence::*kind, const Body& body) const {
    const int64_t most = most_segments();
    parallel_for(heads() * most, a_.threads, [&](int64_t task) {
      const int64_t index = task / most, segment = task % most;
      const Sequence& s = sequences_[static_cast<size_t>(index / p_.num_kv_heads)];
      const int64_t h = index % p_.num_kv_heads;
      if (segment < (s.*kind).count) body(s, HeadBlock{h, h + 1}, segment);
    });
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
