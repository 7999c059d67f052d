// What the kernels of every form share: the call, which tokens a block works on, and states.
#pragma once

#include "features.cuh"

namespace fastattn::cuda {

// T: of the tensors. Width: of the tiles where the compiler knows it, else 0; see plan.h.
template <class T_, int Width>
struct Call {
  static constexpr int kWidth = Width;
  using T = T_;
  using E = Element<T>;
  using Sizes = SizedPlan<Width, sizeof(E)>;
  using Phi = Features<E, Sizes>;
  using Row = cuda::Row<Sizes::kColumns>;

  Problem p;
  Arguments a;
  Sizes n;

  // The softmax over tokens of `efficient` already is a normaliser.
  __device__ __forceinline__ bool divides() const {
    return p.normalize && p.feature_map != FeatureMap::efficient;
  }
  __device__ __forceinline__ float eps() const { return static_cast<float>(p.eps); }
  __device__ __forceinline__ bool keeps(int64_t batch, int64_t token) const {
    return !a.key_mask || a.key_mask[batch * a.key_mask_batch + token * a.key_mask_token];
  }
};

template <class C>
C make_call(const Problem& problem, const Arguments& args) {
  return {problem, args, make_plan<C::kWidth, sizeof(typename C::E)>(problem)};
}

// ---- segments -----------------------------------------------------------------------------------

// A run of tokens of one sequence: a row of the batch, or one of the packed sequences.
struct Segment {
  int64_t state;   // row in the states
  int64_t batch;   // row in query, key, value
  int64_t begin;   // first token
  int64_t tokens;
  int64_t index, count;  // its number; segments of its sequence, at least 1
  int64_t slot;    // among the segments of all sequences
  int64_t anchor;  // causal, index > 0: where the state at its start is kept; see plan.h

  __device__ __forceinline__ bool exists() const { return index >= 0 && index < count; }
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Sequence `i` as its first segment. Offsets that were not valid still stay inside the tensors.
__device__ __forceinline__ Segment first_segment(const Problem& p, const int32_t* cu_seqlens,
                                                 int64_t length, int64_t i) {
  Segment s{};
  s.state = i;
  int64_t tokens = length;
  if (p.num_sequences) {
    s.begin = clamp(cu_seqlens[i], 0, length);
    tokens = clamp(cu_seqlens[i + 1], s.begin, length) - s.begin;
    s.slot = s.begin / kSegmentTokens + i;
    s.anchor = s.begin / kSegmentTokens - 1;
  } else {
    s.batch = i;
  }
  s.count = divide_up(tokens, kSegmentTokens);
  if (s.count == 0) s.count = 1;
  if (!p.num_sequences) {
    s.slot = i * s.count;
    s.anchor = i * (s.count - 1) - 1;
  }
  s.tokens = tokens < kSegmentTokens ? tokens : kSegmentTokens;
  return s;
}

// Segment `index` of the sequence of which `first` is the first.
__device__ __forceinline__ Segment later_segment(Segment s, int64_t length_left, int64_t index) {
  s.index = index;
  s.begin += index * kSegmentTokens;
  s.slot += index;
  s.anchor += index;
  s.tokens = clamp(length_left - index * kSegmentTokens, 0, kSegmentTokens);
  return s;
}

// The segment that owns a slot; not every slot has one.
__device__ __forceinline__ Segment segment_at(const Problem& p, const int32_t* cu_seqlens,
                                              int64_t length, int64_t slot) {
  int64_t i = 0;
  if (p.num_sequences) {
    // The last sequence whose first slot is at most this one: they rise by one or more each.
    int64_t high = p.num_sequences - 1;
    while (i < high) {
      const int64_t middle = (i + high + 1) / 2;
      if (clamp(cu_seqlens[middle], 0, length) / kSegmentTokens + middle <= slot)
        i = middle;
      else
        high = middle - 1;
    }
  } else {
    const int64_t each = divide_up(length, kSegmentTokens);
    i = slot / (each > 1 ? each : 1);
  }
  const Segment first = first_segment(p, cu_seqlens, length, i);
  int64_t tokens = length;
  if (p.num_sequences) tokens = clamp(cu_seqlens[i + 1], first.begin, length) - first.begin;
  return later_segment(first, tokens, slot - first.slot);
}

template <class C>
__device__ __forceinline__ Segment query_segment(const C& c, int64_t slot) {
  return segment_at(c.p, c.a.cu_seqlens, c.p.query_length, slot);
}
template <class C>
__device__ __forceinline__ Segment key_segment(const C& c, int64_t slot) {
  return segment_at(c.p, c.a.cu_seqlens_k, c.p.key_length, slot);
}

// Tokens of the tile that starts at `token`.
__device__ __forceinline__ int tokens_from(const Segment& s, int64_t token, int rows) {
  const int64_t left = s.begin + s.tokens - token;
  return static_cast<int>(left < rows ? left : rows);
}

// body(first token, tokens, tokens rounded up to whole matrix instructions) for each tile.
template <class Body>
__device__ __forceinline__ void for_tiles(const Segment& s, int rows, const Body& body) {
#pragma unroll 1
  for (int64_t token = s.begin; token < s.begin + s.tokens; token += rows) {
    const int valid = tokens_from(s, token, rows);
    body(token, valid, (valid + 15) / 16 * 16);
  }
}

// ---- states -------------------------------------------------------------------------------------

// S (F, Dv) and z (F) of one head, padded, in shared memory or in a block's share of the workspace.
struct LocalState {
  Tile<float> S;
  float* z;
};

// Of the caller or of the workspace: S (F, Dv) then z (F), or apart, contiguous.
struct StateAddress {
  float* S = nullptr;
  float* z = nullptr;
};

__device__ __forceinline__ StateAddress state_at(const State& state, const Plan& n, int64_t index) {
  if (!state) return {};
  return {static_cast<float*>(state.S) + index * n.features * n.values,
          static_cast<float*>(state.z) + index * n.features};
}

__device__ __forceinline__ StateAddress state_at(float* data, const Plan& n, int64_t index,
                                                 int64_t stride) {
  float* S = data + index * stride;
  return {S, S + n.features * n.values};
}

// Reads a state, or zeros where there is none; zeros in the padding. A row by a warp.
template <class P>
__device__ __forceinline__ void load_state(const P& n, StateAddress from, LocalState to) {
  for (int f = warp_index(); f < n.feature_width; f += warp_count())
    for (int v = lane_index(); v < n.value_width; v += 32)
      to.S.row(f)[v] = from.S && f < n.features && v < n.values ? from.S[f * n.values + v] : 0.0f;
  for (int f = threadIdx.x; f < n.feature_width; f += blockDim.x)
    to.z[f] = from.z && f < n.features ? from.z[f] : 0.0f;
}

// own = from + own: a state merged into the sum of all before it.
__device__ __forceinline__ void merge_state(const Plan& n, StateAddress from, LocalState own) {
  if (!from.S) return;
  for (int f = warp_index(); f < n.features; f += warp_count())
    for (int v = lane_index(); v < n.values; v += 32) own.S.row(f)[v] += from.S[f * n.values + v];
  for (int f = threadIdx.x; f < n.features; f += blockDim.x) own.z[f] += from.z[f];
}

__device__ __forceinline__ void merge_state(const Plan& n, LocalState from, LocalState own) {
  for (int f = warp_index(); f < n.features; f += warp_count())
    for (int v = lane_index(); v < n.values; v += 32) own.S.row(f)[v] += from.S.row(f)[v];
  for (int f = threadIdx.x; f < n.features; f += blockDim.x) own.z[f] += from.z[f];
}

__device__ __forceinline__ void store_state(const Plan& n, LocalState from, StateAddress to) {
  if (!to.S) return;
  for (int f = warp_index(); f < n.features; f += warp_count())
    for (int v = lane_index(); v < n.values; v += 32) to.S[f * n.values + v] = from.S.row(f)[v];
  for (int f = threadIdx.x; f < n.features; f += blockDim.x) to.z[f] = from.z[f];
}

// S += phi^T v and z += weight_r phi_r over the first `depth` rows of a tile; to a second state too
// if asked.
template <bool Twice = false, class C>
__device__ __forceinline__ void update_state(const C& c, Tile<typename C::E> phi,
                                             Tile<typename C::E> v, int depth, const float* weight,
                                             LocalState state, LocalState second = {}) {
  const auto& n = c.n;
  for_blocks(n.feature_width, n.value_width, [&](Sums& sums) {
    multiply<C>(sums, across_rows(phi), across_rows(v), 0, depth);
    sums.each([&](int f, int v, float x) {
      state.S.row(f)[v] += x;
      if (Twice) second.S.row(f)[v] += x;
    });
  });
  for (int f = threadIdx.x; f < n.features; f += blockDim.x) {
    float sum = 0;
    for (int r = 0; r < depth; ++r)
      sum += weight ? weight[r] * to_float(phi.row(r)[f]) : to_float(phi.row(r)[f]);
    state.z[f] += sum;
    if (Twice) second.z[f] += sum;
  }
}

// ---- tiles --------------------------------------------------------------------------------------

template <class C>
__device__ __forceinline__ void keys_to_features(const C& c, const typename C::Phi& phi,
                                                 const Segment& s, int64_t token, int valid,
                                                 int active, Tile<typename C::T> stage, const Columns& columns,
                                                 Tile<typename C::E> tile, float* inverse_norm) {
  for (int r = warp_index(); r < active; r += warp_count()) {
    if (r < valid && c.keeps(s.batch, token + r)) {
      typename C::Row row;
      row.load(stage.row(r), c.n.head_dim);
      phi.of_key(row, columns, tile.row(r), inverse_norm + r);
    } else {
      phi.zero(tile.row(r), inverse_norm + r);
    }
  }
}

template <class C>
__device__ __forceinline__ void queries_to_features(const C& c, const typename C::Phi& phi,
                                                    int valid, int active, Tile<typename C::T> stage,
                                                    Tile<typename C::E> tile, float* inverse_norm) {
  for (int r = warp_index(); r < active; r += warp_count()) {
    if (r < valid) {
      typename C::Row row;
      row.load(stage.row(r), c.n.head_dim);
      phi.of_query(row, tile.row(r), inverse_norm + r);
    } else {
      phi.zero(tile.row(r), inverse_norm + r);
    }
  }
}

// Rows of values; zeros where masked, past the end, and in the padding.
template <class C>
__device__ __forceinline__ void values_to_tile(const C& c, const Segment& s, int64_t token,
                                               int valid, int active, Tile<typename C::T> stage,
                                               Tile<typename C::E> tile) {
  for (int r = warp_index(); r < active; r += warp_count()) {
    const bool kept = r < valid && c.keeps(s.batch, token + r);
    for (int i = lane_index(); i < c.n.value_width; i += 32)
      tile.row(r)[i] = from_float<typename C::E>(kept && i < c.n.values ? to_float(stage.row(r)[i]) : 0.0f);
  }
}

// Writes dk and dv of a tile from d/dphi(k) and dv; a masked key has gradients of zero.
template <class C>
__device__ __forceinline__ void write_key_gradients(const C& c, const typename C::Phi& phi,
                                                    const Segment& s, int64_t head, int64_t token,
                                                    int valid, Tile<typename C::E> tile,
                                                    const float* inverse_norm,
                                                    const float* column_sums, Tile<float> dphi,
                                                    Tile<float> dvalue) {
  for (int r = warp_index(); r < valid; r += warp_count()) {
    const bool kept = c.keeps(s.batch, token + r);
    typename C::Row row;
    phi.chain_key(tile.row(r), dphi.row(r), inverse_norm + r, column_sums, row);
    row.each(c.n.head_dim, [&](int, float& x) { x = kept ? x : 0.0f; });
    store_row<typename C::T>(c.a.grad_key, s.batch, head, token + r, c.n.head_dim, row);
    row.load(dvalue.row(r), c.n.values);
    row.each(c.n.values, [&](int, float& x) { x = kept ? x : 0.0f; });
    store_row<typename C::T>(c.a.grad_value, s.batch, head, token + r, c.n.values, row);
  }
}

// Sum of phi_i z_i, by a warp.
template <class E>
__device__ __forceinline__ float dot_row(const E* phi, const float* z, int n) {
  float sum = 0;
  for (int i = lane_index(); i < n; i += 32) sum += to_float(phi[i]) * z[i];
  return warp_sum(sum);
}

}  // namespace fastattn::cuda
