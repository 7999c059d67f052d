// What the kernels of every form share: the call, its sizes, and the loops over heads and segments
// that hand out work. Also the denominator, whose three cases all kernels must treat alike.
#pragma once

#include <memory>

#include "features.h"
#include "operand.h"
#include "parallel.h"
#include "segments.h"

namespace fastattn {
namespace FASTATTN_ISA {

// 1 / max(den, eps); 0 where there is nothing to attend to, so that the row's output and gradients
// are 0. A NaN stays one.
template <class Real>
FASTATTN_INLINE Real inverse_denominator(Real den, double eps) {
  const Real floor = static_cast<Real>(eps);
  return den <= 0 ? Real{0} : Real{1} / (den < floor ? floor : den);
}

// -d log(1 / max(den, eps)) / d den: 1 / den, or 0 where eps holds.
template <class Real>
FASTATTN_INLINE Real denominator_slope(Real den, double eps) {
  return den < static_cast<Real>(eps) ? Real{0} : Real{1} / den;
}

// Whether results can be written straight to the user's memory.
template <class Real>
bool writes_in_place(const Strided& out, DType dtype, int64_t values, int64_t width) {
  return dtype == (sizeof(Real) == 8 ? DType::f64 : DType::f32) && out.feature == 1 &&
         values == width;
}

template <class Real>
class Call {
 protected:
  Call(const Problem& problem, const Arguments& args)
      : p_(problem), a_(args), n_(problem), phi_(problem), sequences_(sequences_of(problem, args)) {}

  // ---- handing out work -------------------------------------------------------------------------

  bool whole_heads() const { return takes_whole_heads(p_, sequences_, a_.threads); }

  // body(sequence, kv head)
  template <class Body>
  void for_heads(const Body& body) const {
    parallel_for(heads(), a_.threads, [&](int64_t task) {
      body(sequences_[static_cast<size_t>(task / p_.num_kv_heads)], task % p_.num_kv_heads);
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

  MaskRow mask_at(int64_t batch, int64_t token) const {
    if (!a_.key_mask) return {};
    return {a_.key_mask + batch * a_.key_mask_batch + token * a_.key_mask_token, a_.key_mask_token};
  }

  // States of many heads or segments, for when segments are shared out.
  struct Buffer {
    explicit Buffer(int64_t count) : data(new Real[static_cast<size_t>(count)]) {}
    Real* at(int64_t i) const { return data.get() + i; }
    std::unique_ptr<Real[]> data;
  };

  int64_t state_stride() const { return n_.feature_width * (n_.value_width + 1); }

  LocalState<Real> state_at(const Buffer& buffer, int64_t index) const {
    Real* base = buffer.at(index * state_stride());
    return {base, base + n_.feature_width * n_.value_width};
  }

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
      if (segment < (s.*kind).count) body(s, index % p_.num_kv_heads, segment);
    });
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
