// How a call is cut: sequences, and segments of each sequence.
//
// Sums over tokens are formed per segment from zero and folded in order. Segments depend on the
// length of the sequence alone, so the same input gives the same bits whatever the batch or the
// number of threads; those only decide whether a thread takes whole heads, or segments of one.
#pragma once

#include <algorithm>
#include <vector>

#include "../problem.h"

namespace fastattn {

constexpr int64_t kSegmentUnit = 96;  // tokens: whole tiles of 48 and chunks of 32
constexpr int64_t kSegmentTokens = 6 * kSegmentUnit;  // at least
constexpr int64_t kMaxSegments = 64;                   // bounds the states kept for one sequence

struct Segments {
  int64_t length = 0, count = 0, tokens = 0;

  explicit Segments(int64_t n = 0) : tokens(n) {
    const int64_t share = (n + kMaxSegments - 1) / kMaxSegments;
    length = std::max(kSegmentTokens, (share + kSegmentUnit - 1) / kSegmentUnit * kSegmentUnit);
    count = (n + length - 1) / length;
  }
  int64_t begin(int64_t segment) const { return segment * length; }
  int64_t end(int64_t segment) const { return std::min(tokens, (segment + 1) * length); }
};

// One independent run of tokens: a row of the batch, or one of the packed sequences.
struct Sequence {
  int64_t state = 0;  // row in the states
  int64_t batch = 0;  // row in query, key, value
  int64_t query_begin = 0, key_begin = 0;
  Segments queries, keys;
  int64_t first_anchor = 0;  // causal: index of its first saved segment state
};

inline std::vector<Sequence> sequences_of(const Problem& problem, const Arguments& args) {
  std::vector<Sequence> list(static_cast<size_t>(problem.state_batch()));
  int64_t anchors = 0;
  for (int64_t i = 0; i < problem.state_batch(); ++i) {
    Sequence& s = list[static_cast<size_t>(i)];
    s.state = i;
    if (problem.num_sequences) {
      s.query_begin = args.cu_seqlens[i];
      s.key_begin = args.cu_seqlens_k[i];
      s.queries = Segments(args.cu_seqlens[i + 1] - s.query_begin);
      s.keys = Segments(args.cu_seqlens_k[i + 1] - s.key_begin);
    } else {
      s.batch = i;
      s.queries = Segments(problem.query_length);
      s.keys = Segments(problem.key_length);
    }
    s.first_anchor = anchors;
    anchors += std::max<int64_t>(s.keys.count - 1, 0);
  }
  return list;
}

// Elements that forward hands to backward. Causal: the state at the start of every segment but a
// sequence's first. Non-causal: the final state of every head, and for `efficient` the maximum of
// every feature. A function of the problem alone, so packed causal takes the bound.
inline int64_t saved_size(const Problem& problem) {
  if (!problem.needs_grad) return 0;
  if (problem.is_causal) {
    const int64_t anchors =
        problem.num_sequences
            ? problem.key_length / kSegmentTokens
            : problem.batch * std::max<int64_t>(Segments(problem.key_length).count - 1, 0);
    return anchors * problem.num_kv_heads * problem.state_size();
  }
  const int64_t statistics =
      problem.feature_map == FeatureMap::efficient ? problem.feature_dim() : 0;
  return problem.state_batch() * problem.num_kv_heads * (problem.state_size() + statistics);
}

// Whether each thread takes whole heads (no second reading of keys and values), or the segments of
// a head are shared out because there are too few heads to keep the threads busy.
inline bool takes_whole_heads(const Problem& problem, const std::vector<Sequence>& sequences,
                              int threads) {
  const int64_t heads = problem.state_batch() * problem.num_kv_heads;
  if (threads <= 1 || heads >= 4 * threads || (heads >= threads && heads % threads == 0))
    return true;
  for (const auto& s : sequences)
    if (s.keys.count > 1 || s.queries.count > 1) return false;
  return true;
}

}  // namespace fastattn
