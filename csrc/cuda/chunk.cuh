// A chunk of the causal form in shared memory: what the kernels of its two passes hold, how rows of k,
// v, q and do get there, and the products that stop at the diagonal.
#pragma once

#include "fold.cuh"

namespace fastattn::cuda {
namespace {

// A = tril(phi(q) phi(k)^T), row by row; no further right than the diagonal's 16 x 16 block.
template <class C, class E = typename C::E>
__device__ __forceinline__ void multiply_lower(int active, Tile<E> a, Tile<E> b, int depth,
                                               Tile<E> scores) {
  for_lower_blocks(active, [&](Sums& sums) {
    multiply<C>(sums, along_rows(a), along_rows(b), 0, depth);
    sums.each([&](int i, int j, float x) {
      scores.row(i)[j] = from_float<E>(j <= i ? x : 0.0f);
    });
  });
}

// den_i = phi(q_i) . z + sum_{j<=i} A_ij, by a warp.
template <class C>
__device__ __forceinline__ float denominator(const C& c, const typename C::E* phi, const float* z,
                                             const typename C::E* scores, int row) {
  float sum = 0;
  for (int i = lane_index(); i < c.n.features; i += 32) sum += to_float(phi[i]) * z[i];
  for (int j = lane_index(); j <= row; j += 32) sum += to_float(scores[j]);
  return warp_sum(sum);
}

// The state at the start of a segment: kept, or the caller's.
template <class C>
__device__ __forceinline__ StateAddress start_of(const C& c, const Segment& s, int64_t kv_head,
                                                 float* anchors) {
  if (s.index == 0) return state_at(c.a.initial, c.n, s.state * c.p.num_kv_heads + kv_head);
  return state_at(anchors, c.n, s.anchor * c.p.num_kv_heads + kv_head, c.p.state_size());
}

// ---- forward ------------------------------------------------------------------------------------

template <class C>
struct ForwardTiles : SumTiles<C> {
  using T = typename C::T;
  using E = typename C::E;

  Tile<T> stage_q;
  Tile<E> phi_q, scores;
  Tile<float> out;
  LocalState sum;  // of the segment alone, for a block that walks several

  __host__ __device__ ForwardTiles(const typename C::Sizes& n, bool walks, float* spilled,
                                   Carve& carve)
      : SumTiles<C>(n, spilled, carve) {
    stage_q = take_tile<T>(carve, n.rows, n.stage_width());
    phi_q = take_tile<E>(carve, n.rows, n.feature_width);
    scores = take_tile<E>(carve, n.rows, n.rows);
    out = take_tile<float>(carve, n.rows, n.value_width);
    if (!walks) return;
    sum.z = carve.take<float>(n.feature_width);
    sum.S = {carve.take<float>(n.state_elements()), n.state_stride()};
  }
};

// ---- backward -----------------------------------------------------------------------------------

// Stages hold rows on their way in. With room to spare each has its own place and the next rows are
// on their way while these are computed; else one stage serves for k and v, then q and do, and the
// scores take its place once the rows are there.
template <class C>
struct BackwardTiles {
  using T = typename C::T;
  using E = typename C::E;

  bool ahead;
  Tile<T> stage_k, stage_v, stage_q, stage_do;
  Tile<E> phi_k, value, phi_q, g, scores, pairs;  // pairs: tril(g v^T), then plus delta
  Tile<float> dphi, dvalue;
  float *inverse_norm_k, *inverse_norm_q, *inverse, *slope, *delta;
  LocalState state;  // forward sweep: S and z; reverse sweep: dS and dz

  __host__ __device__ BackwardTiles(const typename C::Sizes& n, bool keys, bool ahead,
                                    float* spilled, Carve& carve)
      : ahead(ahead) {
    Carve stage = carve;
    stage_k = stage_q = take_tile<T>(stage, n.rows, n.stage_width());
    stage_v = stage_do = take_tile<T>(stage, n.rows, n.value_width);
    if (ahead) {
      stage_q = take_tile<T>(stage, n.rows, n.stage_width());
      stage_do = take_tile<T>(stage, n.rows, n.value_width);
      carve = stage;
    }
    scores = take_tile<E>(carve, n.rows, n.rows);
    pairs = take_tile<E>(carve, n.rows, n.rows);
    if (stage.used > carve.used) carve.used = stage.used;
    phi_k = take_tile<E>(carve, n.rows, n.feature_width);
    value = take_tile<E>(carve, n.rows, n.value_width);
    phi_q = take_tile<E>(carve, n.rows, n.feature_width);
    g = take_tile<E>(carve, n.rows, n.value_width);
    dphi = take_tile<float>(carve, n.rows, n.feature_width);
    if (keys) dvalue = take_tile<float>(carve, n.rows, n.value_width);
    inverse_norm_k = carve.take<float>(n.rows);
    inverse_norm_q = carve.take<float>(n.rows);
    inverse = carve.take<float>(n.rows);
    slope = carve.take<float>(n.rows);
    delta = carve.take<float>(n.rows);
    state.z = carve.take<float>(n.feature_width);
    state.S = {spilled ? spilled : carve.take<float>(n.state_elements()), n.state_stride()};
  }
};

// 1 / den and delta of every query.
struct RowFactors {
  float2* data;

  template <class C>
  __device__ __forceinline__ float2* at(const C& c, int64_t batch, int64_t head,
                                        int64_t token) const {
    return data + (batch * c.p.num_heads + head) * c.p.query_length + token;
  }
};

// Which rows: a tile of the tokens of a head. Nowhere: head < 0.
struct Rows {
  int64_t head, token;
};

template <class C>
__device__ __forceinline__ void start_keys(const C& c, const Segment& s, Rows at,
                                           const BackwardTiles<C>& t) {
  const int valid = tokens_from(s, at.token, c.n.rows);
  fetch(t.stage_k, c.a.key, s.batch, at.head, at.token, valid, c.n.head_dim);
  fetch(t.stage_v, c.a.value, s.batch, at.head, at.token, valid, c.n.values);
  commit_copies();
}

template <class C>
__device__ __forceinline__ void start_queries(const C& c, const Segment& s, Rows at,
                                              const BackwardTiles<C>& t) {
  const int valid = tokens_from(s, at.token, c.n.rows);
  fetch(t.stage_q, c.a.query, s.batch, at.head, at.token, valid, c.n.head_dim);
  fetch(t.stage_do, c.a.grad_out, s.batch, at.head, at.token, valid, c.n.values);
  commit_copies();
}

// phi(k) and v of a tile; the rows after it are sent for if there is room.
template <class C>
__device__ __forceinline__ void load_keys(const C& c, const typename C::Phi& phi, const Segment& s,
                                          Rows at, Rows next, int valid, int active,
                                          const BackwardTiles<C>& t) {
  if (!t.ahead) start_keys(c, s, at, t);
  wait_for_copies();
  __syncthreads();
  keys_to_features(c, phi, s, at.token, valid, active, t.stage_k, {}, t.phi_k, t.inverse_norm_k);
  values_to_tile(c, s, at.token, valid, active, t.stage_v, t.value);
  __syncthreads();
  if (t.ahead && next.head >= 0) start_keys(c, s, next, t);
}

// phi(q), and do in g's place, still undivided (nothing is rounded yet). Arrived: load_keys has waited
// for these rows, and sent for the next keys, which nobody needs yet.
template <class C>
__device__ __forceinline__ void load_queries(const C& c, const typename C::Phi& phi,
                                             const Segment& s, Rows at, Rows next, int valid,
                                             int active, const BackwardTiles<C>& t, bool arrived) {
  if (!t.ahead) start_queries(c, s, at, t);
  if (!arrived) {
    wait_for_copies();
    __syncthreads();
  }
  queries_to_features(c, phi, valid, active, t.stage_q, t.phi_q, t.inverse_norm_q);
  for (int r = warp_index(); r < active; r += warp_count())
    for (int i = lane_index(); i < c.n.value_width; i += 32)
      t.g.row(r)[i] = from_float<typename C::E>(
          r < valid && i < c.n.values ? to_float(t.stage_do.row(r)[i]) : 0.0f);
  __syncthreads();
  if (t.ahead && next.head >= 0) start_queries(c, s, next, t);
}

// g = do times 1 / den, a row by a warp.
template <class C>
__device__ __forceinline__ void divide_row(const C& c, const BackwardTiles<C>& t, int r,
                                           float inverse) {
  for (int i = lane_index(); i < c.n.values; i += 32)
    t.g.row(r)[i] = from_float<typename C::E>(to_float(t.g.row(r)[i]) * inverse);
}

}  // namespace
}  // namespace fastattn::cuda
