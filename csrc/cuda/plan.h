// How a call is cut for the GPU: sizes of tiles, segments of the sequence, and who holds what. A
// function of the lengths and head sizes alone, so the same input gives the same bits whatever the
// batch or the number of multiprocessors.
#pragma once

#include "../problem.h"

namespace fastattn::cuda {

// Sums over tokens are formed per segment from zero and folded in order; segments of a sequence are
// computed in parallel. fastattn/backends/cuda.py knows this number too.
constexpr int64_t kSegmentTokens = 512;
constexpr int64_t kMaxDim = 128;       // of the head sizes; cosine has one feature more
constexpr int64_t divide_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

constexpr int rows_of_tile(int width, int element_bytes) {
  return width * element_bytes <= 128 ? 64 : width * element_bytes <= 256 ? 32 : 16;
}
constexpr int threads_of_block(int width) { return width <= 64 ? 128 : 256; }

// Sizes of a call. Widths: F and Dv padded, for whole matrix instructions or to a compiled width.
struct Plan {
  int head_dim, features, values;      // D, F, Dv
  int feature_width, value_width;
  int rows;                            // tokens of a tile
  int threads;
  int group;                           // query heads of a kv head
  int64_t query_slots, key_slots;      // upper bounds on segments, over all sequences

  static constexpr int kColumns = kMaxDim / 32;  // numbers of a row that a lane of a warp holds
  constexpr int stage_width() const { return (head_dim + 15) / 16 * 16; }
  constexpr int state_stride() const { return value_width + 4; }  // of a row of S; shifts the banks
  constexpr int state_elements() const { return feature_width * state_stride(); }
};

// A plan whose widths the compiler knows, Width = feature_width = value_width; 0: it does not.
template <int Width, int ElementBytes>
struct SizedPlan : Plan {
  static constexpr int feature_width = Width, value_width = Width;
  static constexpr int rows = rows_of_tile(Width, ElementBytes), threads = threads_of_block(Width);
  static constexpr int kColumns = Width / 32;
  static constexpr int stage_width() { return Width; }
  static constexpr int state_stride() { return Width + 4; }
  static constexpr int state_elements() { return Width * state_stride(); }
};
template <int ElementBytes>
struct SizedPlan<0, ElementBytes> : Plan {};

// Which kernels a call takes: those compiled for a width that both sizes are padded to, if that
// wastes less than half of either; otherwise those for any widths.
constexpr int compiled_width(const Problem& p) {
  const int64_t larger = p.feature_dim() > p.value_dim ? p.feature_dim() : p.value_dim;
  const int64_t smaller = p.feature_dim() > p.value_dim ? p.value_dim : p.feature_dim();
  for (const int width : {32, 64, 128})
    if (larger <= width) return 2 * smaller > width ? width : 0;
  return 0;
}

// Upper bound on the segments of all sequences. Packed sequences: sequence i, which starts at token
// cu[i], owns the slots from cu[i] / L + i on, so nobody needs to know the lengths on the host.
constexpr int64_t segment_slots(const Problem& p, int64_t tokens) {
  if (p.num_sequences) return tokens / kSegmentTokens + p.num_sequences;
  const int64_t each = divide_up(tokens, kSegmentTokens);
  return p.batch * (each > 1 ? each : 1);
}

// Causal: states at the start of every segment of a sequence but its first.
constexpr int64_t anchor_slots(const Problem& p) {
  if (p.num_sequences) return p.key_length / kSegmentTokens;
  const int64_t each = divide_up(p.key_length, kSegmentTokens);
  return p.batch * (each > 1 ? each - 1 : 0);
}

template <int Width, int ElementBytes>
SizedPlan<Width, ElementBytes> make_plan(const Problem& p) {
  const auto padded = [](int64_t n) { return Width ? Width : static_cast<int>(divide_up(n, 16) * 16); };
  SizedPlan<Width, ElementBytes> sized{};
  Plan& plan = sized;
  plan.head_dim = static_cast<int>(p.head_dim);
  plan.features = static_cast<int>(p.feature_dim());
  plan.values = static_cast<int>(p.value_dim);
  plan.feature_width = padded(plan.features);
  plan.value_width = padded(plan.values);
  plan.group = static_cast<int>(p.group());
  const int width = plan.feature_width > plan.value_width ? plan.feature_width : plan.value_width;
  plan.rows = rows_of_tile(width, ElementBytes);
  plan.threads = threads_of_block(width);
  plan.query_slots = segment_slots(p, p.query_length);
  plan.key_slots = segment_slots(p, p.key_length);
  return sized;
}

}  // namespace fastattn::cuda
