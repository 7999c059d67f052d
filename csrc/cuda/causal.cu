// Causal linear attention, in chunks: query i attends to keys j <= i.
//
//   S_i = S_0 + sum_{j<=i} phi(k_j) v_j^T     out_i = phi(q_i) S_i / max(phi(q_i) . z_i, eps)
//
// Within a chunk the sum is a masked matrix product, A = tril(phi(q) phi(k)^T); everything before
// the chunk is in the state, in float32, in shared memory. A block walks one segment of a sequence;
// where there are more, the sums of all segments and a fold come first (k and v are read twice).
//
// Backward, with g_i = do_i / den_i, u_i = S_i g_i, delta_i = -phi(q_i) . u_i / den_i:
//
//   forward sweep:   dphi(q_i) = u_i + delta_i z_i
//   reverse sweep:   dS_j = sum_{i>=j} phi(q_i) g_i^T        dphi(k_j) = dS_j v_j + dz_j
//                    dz_j = sum_{i>=j} delta_i phi(q_i)      dv_j = dS_j^T phi(k_j)
//
// From the states at the starts of segments, which forward saved. The reverse sweep of a segment
// starts from the sum of all later ones, formed as in forward; 1 / den and delta of every query
// pass from one sweep to the other.
#include "fold.cuh"

namespace fastattn::cuda {
namespace {

// A = tril(phi(q) phi(k)^T), row by row; no further right than the diagonal's 16 x 16 block.
template <class T>
__device__ __forceinline__ void multiply_lower(int active, Tile<Element<T>> a, Tile<Element<T>> b,
                                               int depth, Tile<Element<T>> scores) {
  for_lower_blocks(active, [&](Sums& sums) {
    multiply<T>(sums, along_rows(a), along_rows(b), 0, depth);
    sums.each([&](int i, int j, float x) {
      scores.row(i)[j] = from_float<Element<T>>(j <= i ? x : 0.0f);
    });
  });
}

// den_i = phi(q_i) . z + sum_{j<=i} A_ij, by a warp.
template <class T>
__device__ __forceinline__ float denominator(const Call& c, const Element<T>* phi, const float* z,
                                             const Element<T>* scores, int row) {
  float sum = 0;
  for (int i = lane_index(); i < c.n.features; i += 32) sum += to_float(phi[i]) * z[i];
  for (int j = lane_index(); j <= row; j += 32) sum += to_float(scores[j]);
  return warp_sum(sum);
}

// Each number of a state becomes itself plus all before it (or after, backwards), in place.
template <bool Backwards>
__global__ void fold_segments_kernel(const __grid_constant__ Call c, const float*, int64_t stride,
                                     float* states) {
  for_own_number(c, [&](int64_t row, int64_t head, int i) {
    const Segment first = first_segment(c.p, c.a.cu_seqlens_k, c.p.key_length, row);
    const float* start = number_of(Backwards ? c.a.grad_final : c.a.initial, c, row, head, i);
    float sum = start ? *start : 0.0f;
    for (int64_t k = 1; k < first.count; ++k) {
      const int64_t segment = Backwards ? first.count - k : k;
      float* own = states + ((first.anchor + segment) * c.p.num_kv_heads + head) * stride + i;
      sum += *own;
      *own = sum;
    }
  });
}

// The state at the start of a segment: kept, or the caller's.
__device__ __forceinline__ StateAddress start_of(const Call& c, const Segment& s, int64_t kv_head,
                                                 float* anchors) {
  if (s.index == 0) return state_at(c.a.initial, c.n, s.state * c.p.num_kv_heads + kv_head);
  return state_at(anchors, c.n, s.anchor * c.p.num_kv_heads + kv_head, c.p.state_size());
}

// ---- forward ------------------------------------------------------------------------------------

template <class T>
struct ForwardTiles : SumTiles<T> {
  Tile<T> stage_q;
  Tile<Element<T>> phi_q, scores;
  Tile<float> out;

  __host__ __device__ ForwardTiles(const Plan& n, float* spilled, Carve& carve)
      : SumTiles<T>(n, spilled, carve) {
    stage_q = take_tile<T>(carve, n.rows, n.stage_width());
    phi_q = take_tile<Element<T>>(carve, n.rows, n.feature_width);
    scores = take_tile<Element<T>>(carve, n.rows, n.rows);
    out = take_tile<float>(carve, n.rows, n.value_width);
  }
};

// One block per query head and segment. While a chunk is computed the next one arrives.
template <class T>
__global__ void causal_kernel(const __grid_constant__ Call c, float* anchors, float* spill) {
  const Plan& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group;
  const Segment s = key_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const ForwardTiles<T> t(n, spill ? spill + blockIdx.x * n.state_elements() : nullptr, carve);
  const Features<T> phi(c.p, n);
  const auto start = [&](int64_t token, int valid) {
    fetch(t.stage_k, c.a.key, s.batch, kv_head, token, valid, n.head_dim);
    fetch(t.stage_v, c.a.value, s.batch, kv_head, token, valid, n.values);
    fetch(t.stage_q, c.a.query, s.batch, head, token, valid, n.head_dim);
    commit_copies();
  };
  const int64_t end = s.begin + s.tokens;
  if (s.tokens) start(s.begin, static_cast<int>(s.tokens < n.rows ? s.tokens : n.rows));
  load_state(n, start_of(c, s, kv_head, anchors), t.state);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    wait_for_copies();
    __syncthreads();
    keys_to_features<T>(c, phi, s, token, valid, active, t.stage_k, {}, t.phi, t.inverse_norm);
    values_to_tile<T>(c, s, token, valid, active, t.stage_v, t.value);
    queries_to_features<T>(c, phi, valid, active, t.stage_q, t.phi_q, t.inverse_norm);
    __syncthreads();
    const int64_t next = token + n.rows;
    if (next < end) start(next, static_cast<int>(end - next < n.rows ? end - next : n.rows));
    multiply_lower<T>(active, t.phi_q, t.phi, n.feature_width, t.scores);
    __syncthreads();
    for_blocks(active, n.value_width, [&](Sums& sums) {
      multiply<T>(sums, along_rows(t.phi_q), across_rows(t.state.S), 0, n.feature_width);
      multiply<T>(sums, along_rows(t.scores), across_rows(t.value), 0, sums.row + kBlockRows);
      sums.each([&](int r, int v, float x) { t.out.row(r)[v] = x; });
    });
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      float inverse = 1;
      if (c.divides()) {
        const float den = denominator<T>(c, t.phi_q.row(r), t.state.z, t.scores.row(r), r);
        inverse = inverse_denominator(den, c.eps());
      }
      Row row;
      row.load(t.out.row(r), n.values);
      row.each(n.values, [&](int, float& x) { x *= inverse; });
      store_row<T>(c.a.out, s.batch, head, token + r, n.values, row);
    }
    __syncthreads();
    update_state<T>(n, t.phi, t.value, active, nullptr, t.state);
  });
  __syncthreads();
  if (s.index + 1 == s.count && head % n.group == 0)
    store_state(n, t.state, state_at(c.a.final, n, s.state * c.p.num_kv_heads + kv_head));
}

// ---- backward -----------------------------------------------------------------------------------

// The stage holds rows on their way in; scores take its place once they are there.
template <class T>
struct BackwardTiles {
  Tile<T> stage_a, stage_b;
  Tile<Element<T>> phi_k, value, phi_q, g, scores, pairs;  // pairs: tril(g v^T), then plus delta
  Tile<float> dphi, dvalue;
  float *inverse_norm_k, *inverse_norm_q, *inverse, *slope, *delta;
  LocalState state;  // forward sweep: S and z; reverse sweep: dS and dz

  __host__ __device__ BackwardTiles(const Plan& n, bool keys, float* spilled, Carve& carve) {
    Carve stage = carve;
    stage_a = take_tile<T>(stage, n.rows, n.stage_width());
    stage_b = take_tile<T>(stage, n.rows, n.value_width);
    scores = take_tile<Element<T>>(carve, n.rows, n.rows);
    pairs = take_tile<Element<T>>(carve, n.rows, n.rows);
    if (stage.used > carve.used) carve.used = stage.used;
    phi_k = take_tile<Element<T>>(carve, n.rows, n.feature_width);
    value = take_tile<Element<T>>(carve, n.rows, n.value_width);
    phi_q = take_tile<Element<T>>(carve, n.rows, n.feature_width);
    g = take_tile<Element<T>>(carve, n.rows, n.value_width);
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

  __device__ __forceinline__ float2* at(const Call& c, int64_t batch, int64_t head,
                                        int64_t token) const {
    return data + (batch * c.p.num_heads + head) * c.p.query_length + token;
  }
};

template <class T>
__device__ __forceinline__ void load_keys(const Call& c, const Features<T>& phi, const Segment& s,
                                          int64_t head, int64_t token, int valid, int active,
                                          const BackwardTiles<T>& t) {
  fetch(t.stage_a, c.a.key, s.batch, head, token, valid, c.n.head_dim);
  fetch(t.stage_b, c.a.value, s.batch, head, token, valid, c.n.values);
  commit_copies();
  wait_for_copies();
  __syncthreads();
  keys_to_features<T>(c, phi, s, token, valid, active, t.stage_a, {}, t.phi_k, t.inverse_norm_k);
  values_to_tile<T>(c, s, token, valid, active, t.stage_b, t.value);
  __syncthreads();
}

// phi(q), and do in g's place, still undivided (nothing is rounded yet).
template <class T>
__device__ __forceinline__ void load_queries(const Call& c, const Features<T>& phi,
                                             const Segment& s, int64_t head, int64_t token,
                                             int valid, int active, const BackwardTiles<T>& t) {
  fetch(t.stage_a, c.a.query, s.batch, head, token, valid, c.n.head_dim);
  fetch(t.stage_b, c.a.grad_out, s.batch, head, token, valid, c.n.values);
  commit_copies();
  wait_for_copies();
  __syncthreads();
  queries_to_features<T>(c, phi, valid, active, t.stage_a, t.phi_q, t.inverse_norm_q);
  for (int r = warp_index(); r < active; r += warp_count())
    for (int i = lane_index(); i < c.n.value_width; i += 32)
      t.g.row(r)[i] = from_float<Element<T>>(
          r < valid && i < c.n.values ? to_float(t.stage_b.row(r)[i]) : 0.0f);
  __syncthreads();
}

// g = do times 1 / den, a row by a warp.
template <class T>
__device__ __forceinline__ void divide_row(const Call& c, const BackwardTiles<T>& t, int r,
                                           float inverse) {
  for (int i = lane_index(); i < c.n.values; i += 32)
    t.g.row(r)[i] = from_float<Element<T>>(to_float(t.g.row(r)[i]) * inverse);
}

// One block per query head and segment: writes dq, and the row factors.
template <class T>
__global__ void query_gradient_kernel(const __grid_constant__ Call c, float* anchors,
                                      RowFactors factors, float* spill) {
  const Plan& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group;
  const Segment s = key_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const BackwardTiles<T> t(n, false, spill ? spill + blockIdx.x * n.state_elements() : nullptr, carve);
  const Features<T> phi(c.p, n);
  load_state(n, start_of(c, s, kv_head, anchors), t.state);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    __syncthreads();
    load_keys<T>(c, phi, s, kv_head, token, valid, active, t);
    load_queries<T>(c, phi, s, head, token, valid, active, t);
    multiply_lower<T>(active, t.phi_q, t.phi_k, n.feature_width, t.scores);
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      float inverse = 1, slope = 0;
      if (c.divides()) {
        const float den = denominator<T>(c, t.phi_q.row(r), t.state.z, t.scores.row(r), r);
        inverse = inverse_denominator_of_gradient(den, c.eps());
        slope = denominator_slope(den, c.eps());
        divide_row<T>(c, t, r, inverse);
      }
      if (lane_index() == 0) t.inverse[r] = inverse, t.slope[r] = slope;
    }
    __syncthreads();
    multiply_lower<T>(active, t.g, t.value, n.value_width, t.pairs);
    for_blocks(active, n.feature_width, [&](Sums& sums) {
      multiply<T>(sums, along_rows(t.g), along_rows(t.state.S), 0, n.value_width);
      sums.each([&](int r, int f, float x) { t.dphi.row(r)[f] = x; });
    });
    __syncthreads();
    for (int r = warp_index(); r < active; r += warp_count()) {
      float delta = 0;
      if (c.divides() && r < valid) {
        const float along = dot_row(t.phi_q.row(r), t.dphi.row(r), n.features);
        float within = 0;
        for (int j = lane_index(); j <= r; j += 32)
          within += to_float(t.scores.row(r)[j]) * to_float(t.pairs.row(r)[j]);
        delta = -(along + warp_sum(within)) * t.slope[r];
        for (int j = lane_index(); j <= r; j += 32)
          t.pairs.row(r)[j] = from_float<Element<T>>(to_float(t.pairs.row(r)[j]) + delta);
      }
      if (lane_index() == 0) t.delta[r] = delta;
      if (lane_index() == 0 && r < valid)
        *factors.at(c, s.batch, head, token + r) = float2{t.inverse[r], delta};
    }
    __syncthreads();
    for_blocks(active, n.feature_width, [&](Sums& sums) {
      multiply<T>(sums, along_rows(t.pairs), across_rows(t.phi_k), 0, sums.row + kBlockRows);
      sums.each([&](int r, int f, float x) {
        t.dphi.row(r)[f] += x + t.delta[r] * t.state.z[f];
      });
    });
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      Row row;
      phi.chain_query(t.phi_q.row(r), t.dphi.row(r), t.inverse_norm_q + r, row);
      store_row<T>(c.a.grad_query, s.batch, head, token + r, n.head_dim, row);
    }
    update_state<T>(n, t.phi_k, t.value, active, nullptr, t.state);
  });
}

// One block per kv head and segment, last chunk first. Without `Writes`: sums of phi(q) g^T and
// delta phi(q) over all segments but a sequence's first, kept where their own start's state is. With
// it, from the sum over all later segments: writes dk and dv, and the initial state's gradient.
template <class T, bool Writes>
__global__ void key_gradient_kernel(const __grid_constant__ Call c, float* sums_of_segments,
                                    RowFactors factors, float* spill) {
  const Plan& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_kv_heads, kv_head = blockIdx.x % c.p.num_kv_heads;
  const Segment s = key_segment(c, slot);
  if (!s.exists() || (!Writes && s.index == 0)) return;
  Carve carve{shared_memory};
  const BackwardTiles<T> t(n, true, spill ? spill + blockIdx.x * n.state_elements() : nullptr, carve);
  const Features<T> phi(c.p, n);
  const int64_t row = s.state * c.p.num_kv_heads + kv_head, size = c.p.state_size();
  const bool last = s.index + 1 == s.count;
  StateAddress after{};
  if (Writes && last) after = state_at(c.a.grad_final, n, row);
  if (Writes && !last)
    after = state_at(sums_of_segments, n, (s.anchor + 1) * c.p.num_kv_heads + kv_head, size);
  load_state(n, after, t.state);
  for (int64_t first = (s.tokens - 1) / n.rows * n.rows; s.tokens && first >= 0; first -= n.rows) {
    const int64_t token = s.begin + first;
    const int valid = static_cast<int>(s.tokens - first < n.rows ? s.tokens - first : n.rows);
    const int active = (valid + 15) / 16 * 16;
    __syncthreads();
    if (Writes) {
      load_keys<T>(c, phi, s, kv_head, token, valid, active, t);
      // From the queries of all later chunks: through dS and dz.
      for_blocks(active, n.feature_width, [&](Sums& sums) {
        multiply<T>(sums, along_rows(t.value), along_rows(t.state.S), 0, n.value_width);
        sums.each([&](int r, int f, float x) { t.dphi.row(r)[f] = x + t.state.z[f]; });
      });
      for_blocks(active, n.value_width, [&](Sums& sums) {
        multiply<T>(sums, along_rows(t.phi_k), across_rows(t.state.S), 0, n.feature_width);
        sums.each([&](int r, int v, float x) { t.dvalue.row(r)[v] = x; });
      });
    }
    for (int64_t head = kv_head * n.group; head < (kv_head + 1) * n.group; ++head) {
      __syncthreads();
      load_queries<T>(c, phi, s, head, token, valid, active, t);
      for (int r = warp_index(); r < active; r += warp_count()) {
        const float2 own = r < valid ? *factors.at(c, s.batch, head, token + r) : float2{0, 0};
        if (c.divides()) divide_row<T>(c, t, r, own.x);
        if (lane_index() == 0) t.delta[r] = own.y;
      }
      __syncthreads();
      if (Writes) {
        // From the queries i >= j of this chunk.
        multiply_lower<T>(active, t.phi_q, t.phi_k, n.feature_width, t.scores);
        for_lower_blocks(active, [&](Sums& sums) {
          multiply<T>(sums, along_rows(t.g), along_rows(t.value), 0, n.value_width);
          sums.each([&](int i, int j, float x) {
            t.pairs.row(i)[j] = from_float<Element<T>>(j <= i ? x + t.delta[i] : 0.0f);
          });
        });
        __syncthreads();
        for_blocks(active, n.value_width, [&](Sums& sums) {
          multiply<T>(sums, across_rows(t.scores), across_rows(t.g), sums.row, active);
          sums.each([&](int r, int v, float x) { t.dvalue.row(r)[v] += x; });
        });
        for_blocks(active, n.feature_width, [&](Sums& sums) {
          multiply<T>(sums, across_rows(t.pairs), across_rows(t.phi_q), sums.row, active);
          sums.each([&](int r, int f, float x) { t.dphi.row(r)[f] += x; });
        });
      }
      update_state<T>(n, t.phi_q, t.g, active, t.delta, t.state);
    }
    if (Writes) {
      __syncthreads();
      write_key_gradients<T>(c, phi, s, kv_head, token, valid, t.phi_k, t.inverse_norm_k, nullptr,
                             t.dphi, t.dvalue);
    }
  }
  __syncthreads();
  if (!Writes)
    store_state(n, t.state,
                state_at(sums_of_segments, n, s.anchor * c.p.num_kv_heads + kv_head, size));
  else if (s.index == 0)
    store_state(n, t.state, state_at(c.a.grad_initial, n, row));
}

template <class T>
size_t forward_bytes(const Plan& n, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  ForwardTiles<T>(n, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

template <class T>
size_t backward_bytes(const Plan& n, bool keys, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  BackwardTiles<T>(n, keys, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

}  // namespace

template <class T>
void causal_forward(const Problem& problem, const Arguments& args, Launcher& launch) {
  const Call call{problem, args, make_plan(problem, sizeof(Element<T>))};
  const Plan& n = call.n;
  float* anchors = nullptr;
  if (const int64_t count = anchor_slots(problem)) {
    const int64_t size = problem.state_size();
    anchors = problem.needs_grad ? static_cast<float*>(args.saved)
                                 : launch.take(count * problem.num_kv_heads * size);
    launch_sums<T>(launch, call, anchors, size);
    launch_fold(launch, "fold_segments", call, fold_segments_kernel<false>, anchors, size, anchors);
  }
  const auto bytes = [&](bool holds_state) { return forward_bytes<T>(n, holds_state); };
  const int64_t blocks = n.key_slots * problem.num_heads;
  float* spill = launch.place_states(blocks, n.state_elements(), bytes);
  launch("causal_forward", causal_kernel<T>, blocks, n.threads, bytes(launch.fits(bytes(true))),
         call, anchors, spill);
}

template <class T>
void causal_backward(const Problem& problem, const Arguments& args, Launcher& launch) {
  const Call call{problem, args, make_plan(problem, sizeof(Element<T>))};
  const Plan& n = call.n;
  float* anchors = static_cast<float*>(args.saved);
  const RowFactors factors{reinterpret_cast<float2*>(
      launch.take(2 * problem.batch * problem.num_heads * problem.query_length))};
  const auto query_bytes = [&](bool holds) { return backward_bytes<T>(n, false, holds); };
  const auto key_bytes = [&](bool holds) { return backward_bytes<T>(n, true, holds); };
  const int64_t query_blocks = n.key_slots * problem.num_heads;
  const int64_t key_blocks = n.key_slots * problem.num_kv_heads;
  const size_t key_shared = key_bytes(launch.fits(key_bytes(true)));

  float* spill = launch.place_states(query_blocks, n.state_elements(), query_bytes);
  launch("causal_query_gradient", query_gradient_kernel<T>, query_blocks, n.threads,
         query_bytes(launch.fits(query_bytes(true))), call, anchors, factors, spill);
  spill = launch.place_states(key_blocks, n.state_elements(), key_bytes);
  float* sums = nullptr;
  if (const int64_t count = anchor_slots(problem)) {
    const int64_t size = problem.state_size();
    sums = launch.take(count * problem.num_kv_heads * size);
    launch("causal_gradient_sums", key_gradient_kernel<T, false>, key_blocks, n.threads, key_shared,
           call, sums, factors, spill);
    launch_fold(launch, "fold_gradients", call, fold_segments_kernel<true>, sums, size, sums);
  }
  launch("causal_key_gradient", key_gradient_kernel<T, true>, key_blocks, n.threads, key_shared,
         call, sums, factors, spill);
}

template void causal_forward<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);
template void causal_backward<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);

}  // namespace fastattn::cuda
