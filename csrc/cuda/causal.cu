// Causal linear attention, in chunks: query i attends to keys j <= i.
//
//   S_i = S_0 + sum_{j<=i} phi(k_j) v_j^T     out_i = phi(q_i) S_i / max(phi(q_i) . z_i, eps)
//
// Within a chunk the sum is a masked matrix product, A = tril(phi(q) phi(k)^T); everything before
// the chunk is in the state, in float32, in shared memory. Where there are heads enough for the whole
// GPU a block walks all segments of a sequence; else it walks one, and the sums of all segments and a
// fold come first (k and v are read twice: half as much again).
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
#include "chunk.cuh"

namespace fastattn::cuda {
namespace {

// Each number of a state becomes itself plus all before it (or after, backwards), in place.
template <class C, bool Backwards>
__global__ void fold_segments_kernel(const __grid_constant__ C c, const float*, int64_t stride,
                                     float* states) {
  for_own_number(c, [&](int64_t row, int64_t head, int i) {
    const Segment first = first_segment(c.p, c.a.cu_seqlens_k, c.p.key_length, row);
    const float* start = number_of(Backwards ? c.a.grad_final : c.a.initial, c, row, head, i);
    float sum = start ? *start : 0.0f;
    const auto at = [&](int64_t k) {
      const int64_t segment = Backwards ? first.count - k : k;
      return states + ((first.anchor + segment) * c.p.num_kv_heads + head) * stride + i;
    };
    // Several loads before the first store: the compiler may not move them across it.
    constexpr int kAhead = 8;
    for (int64_t k = 1; k < first.count; k += kAhead) {
      float own[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) own[j] = k + j < first.count ? *at(k + j) : 0.0f;
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        if (k + j >= first.count) break;
        sum += own[j];
        *at(k + j) = sum;
      }
    }
  });
}

// ---- forward ------------------------------------------------------------------------------------

// Outputs of a segment from the state at its start in t.state, to which its keys are added. While a
// chunk is computed the next one arrives.
template <class C, bool Walks>
__device__ void causal_segment(const C& c, const typename C::Phi& phi, const Segment& s,
                               int64_t head, const ForwardTiles<C>& t) {
  using T = typename C::T;
  const auto& n = c.n;
  const int64_t kv_head = head / n.group, end = s.begin + s.tokens;
  const auto start = [&](int64_t token) {
    const int valid = tokens_from(s, token, n.rows);
    fetch(t.stage_k, c.a.key, s.batch, kv_head, token, valid, n.head_dim);
    fetch(t.stage_v, c.a.value, s.batch, kv_head, token, valid, n.values);
    fetch(t.stage_q, c.a.query, s.batch, head, token, valid, n.head_dim);
    commit_copies();
  };
  if (s.tokens) start(s.begin);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    wait_for_copies();
    __syncthreads();
    keys_to_features(c, phi, s, token, valid, active, t.stage_k, {}, t.phi, t.inverse_norm);
    values_to_tile(c, s, token, valid, active, t.stage_v, t.value);
    queries_to_features(c, phi, valid, active, t.stage_q, t.phi_q, t.inverse_norm);
    __syncthreads();
    if (token + n.rows < end) start(token + n.rows);
    multiply_lower<C>(active, t.phi_q, t.phi, n.feature_width, t.scores);
    __syncthreads();
    for_blocks(active, n.value_width, [&](Sums& sums) {
      multiply<C>(sums, along_rows(t.phi_q), across_rows(t.state.S), 0, n.feature_width);
      multiply<C>(sums, along_rows(t.scores), across_rows(t.value), 0, sums.row + kBlockRows);
      sums.each([&](int r, int v, float x) { t.out.row(r)[v] = x; });
    });
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      float inverse = 1;
      if (c.divides()) {
        const float den = denominator(c, t.phi_q.row(r), t.state.z, t.scores.row(r), r);
        inverse = inverse_denominator(den, c.eps());
      }
      typename C::Row row;
      row.load(t.out.row(r), n.values);
      row.each(n.values, [&](int, float& x) { x *= inverse; });
      store_row<T>(c.a.out, s.batch, head, token + r, n.values, row);
    }
    __syncthreads();
    update_state<Walks>(c, t.phi, t.value, active, nullptr, t.state, t.sum);
  });
  __syncthreads();
}

// One block per query head and segment, from the states at the starts of segments.
template <class C>
__global__ void causal_kernel(const __grid_constant__ C c, float* anchors, float* spill) {
  const auto& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group;
  const Segment s = key_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const ForwardTiles<C> t(n, false, spill ? spill + int64_t{blockIdx.x} * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  load_state(n, start_of(c, s, kv_head, anchors), t.state);
  causal_segment<C, false>(c, phi, s, head, t);
  if (s.index + 1 == s.count && head % n.group == 0)
    store_state(n, t.state, state_at(c.a.final, n, s.state * c.p.num_kv_heads + kv_head));
}

// One block per query head, through all segments of its sequence: k and v are read once. The same
// sums in the same order as above: of a segment, from zero, then added to the state at its start,
// which waits in `starts` meanwhile (written and read by this block alone, so mostly in L2).
template <class C>
__global__ void causal_walk_kernel(const __grid_constant__ C c, float* anchors, float* starts) {
  const auto& n = c.n;
  const int64_t row = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group, size = c.p.state_size();
  Carve carve{shared_memory};
  const ForwardTiles<C> t(n, true, nullptr, carve);
  const typename C::Phi phi(c.p, n);
  const Segment first = first_segment(c.p, c.a.cu_seqlens_k, c.p.key_length, row);
  const StateAddress start = state_at(starts, n, blockIdx.x, size);
  const bool leads = head % n.group == 0;
  load_state(n, state_at(c.a.initial, n, row * c.p.num_kv_heads + kv_head), t.state);
  for (int64_t i = 0; i < first.count; ++i) {
    const Segment s = segment_at(c.p, c.a.cu_seqlens_k, c.p.key_length, first.slot + i);
    if (leads && i > 0 && c.p.needs_grad)
      store_state(n, t.state, state_at(anchors, n, s.anchor * c.p.num_kv_heads + kv_head, size));
    if (i + 1 < first.count) store_state(n, t.state, start);
    load_state(n, {}, t.sum);
    __syncthreads();
    causal_segment<C, true>(c, phi, s, head, t);
    if (i + 1 == first.count) break;
    load_state(n, start, t.state);
    merge_state(n, t.sum, t.state);
    __syncthreads();
  }
  if (leads)
    store_state(n, t.state, state_at(c.a.final, n, row * c.p.num_kv_heads + kv_head));
}

// ---- backward -----------------------------------------------------------------------------------

// One block per query head and segment: writes dq, and the row factors.
template <class C>
__global__ void query_gradient_kernel(const __grid_constant__ C c, float* anchors,
                                      RowFactors factors, bool ahead, float* spill) {
  using T = typename C::T;
  using E = typename C::E;
  const auto& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group;
  const Segment s = key_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const BackwardTiles<C> t(n, false, ahead,
                           spill ? spill + int64_t{blockIdx.x} * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  if (ahead && s.tokens) {
    start_keys(c, s, {kv_head, s.begin}, t);
    start_queries(c, s, {head, s.begin}, t);
  }
  load_state(n, start_of(c, s, kv_head, anchors), t.state);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    const int64_t next = token + n.rows;
    const bool more = next < s.begin + s.tokens;
    __syncthreads();
    load_keys(c, phi, s, {kv_head, token}, {more ? kv_head : -1, next}, valid, active, t);
    load_queries(c, phi, s, {head, token}, {more ? head : -1, next}, valid, active, t, ahead);
    multiply_lower<C>(active, t.phi_q, t.phi_k, n.feature_width, t.scores);
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      float inverse = 1, slope = 0;
      if (c.divides()) {
        const float den = denominator(c, t.phi_q.row(r), t.state.z, t.scores.row(r), r);
        inverse = inverse_denominator_of_gradient(den, c.eps());
        slope = denominator_slope(den, c.eps());
        divide_row(c, t, r, inverse);
      }
      if (lane_index() == 0) t.inverse[r] = inverse, t.slope[r] = slope;
    }
    __syncthreads();
    multiply_lower<C>(active, t.g, t.value, n.value_width, t.pairs);
    for_blocks(active, n.feature_width, [&](Sums& sums) {
      multiply<C>(sums, along_rows(t.g), along_rows(t.state.S), 0, n.value_width);
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
          t.pairs.row(r)[j] = from_float<E>(to_float(t.pairs.row(r)[j]) + delta);
      }
      if (lane_index() == 0) t.delta[r] = delta;
      if (lane_index() == 0 && r < valid)
        *factors.at(c, s.batch, head, token + r) = float2{t.inverse[r], delta};
    }
    __syncthreads();
    for_blocks(active, n.feature_width, [&](Sums& sums) {
      multiply<C>(sums, along_rows(t.pairs), across_rows(t.phi_k), 0, sums.row + kBlockRows);
      sums.each([&](int r, int f, float x) {
        t.dphi.row(r)[f] += x + t.delta[r] * t.state.z[f];
      });
    });
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      typename C::Row row;
      phi.chain_query(t.phi_q.row(r), t.dphi.row(r), t.inverse_norm_q + r, row);
      store_row<T>(c.a.grad_query, s.batch, head, token + r, n.head_dim, row);
    }
    update_state(c, t.phi_k, t.value, active, nullptr, t.state);
  });
}

// One block per kv head and segment, last chunk first. Without `Writes`: sums of phi(q) g^T and
// delta phi(q) over all segments but a sequence's first, kept where their own start's state is. With
// it, from the sum over all later segments: writes dk and dv, and the initial state's gradient.
template <class C, bool Writes>
__global__ void key_gradient_kernel(const __grid_constant__ C c, float* sums_of_segments,
                                    RowFactors factors, bool ahead, float* spill) {
  using T = typename C::T;
  using E = typename C::E;
  const auto& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_kv_heads, kv_head = blockIdx.x % c.p.num_kv_heads;
  const Segment s = key_segment(c, slot);
  if (!s.exists() || (!Writes && s.index == 0)) return;
  Carve carve{shared_memory};
  const BackwardTiles<C> t(n, true, ahead,
                           spill ? spill + int64_t{blockIdx.x} * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  const int64_t row = s.state * c.p.num_kv_heads + kv_head, size = c.p.state_size();
  const bool last = s.index + 1 == s.count;
  StateAddress after{};
  if (Writes && last) after = state_at(c.a.grad_final, n, row);
  if (Writes && !last)
    after = state_at(sums_of_segments, n, (s.anchor + 1) * c.p.num_kv_heads + kv_head, size);
  load_state(n, after, t.state);
  const int64_t first_head = kv_head * n.group, end_head = first_head + n.group;
  const int64_t last_token = s.begin + (s.tokens - 1) / n.rows * n.rows;
  if (ahead && s.tokens) {
    if (Writes) start_keys(c, s, {kv_head, last_token}, t);
    start_queries(c, s, {first_head, last_token}, t);
  }
  for (int64_t token = last_token; s.tokens && token >= s.begin; token -= n.rows) {
    const int valid = tokens_from(s, token, n.rows);
    const int active = (valid + 15) / 16 * 16;
    const int64_t before = token - n.rows;
    const bool more = before >= s.begin;
    __syncthreads();
    if (Writes) {
      load_keys(c, phi, s, {kv_head, token}, {more ? kv_head : -1, before}, valid, active, t);
      // From the queries of all later chunks: through dS and dz.
      for_blocks(active, n.feature_width, [&](Sums& sums) {
        multiply<C>(sums, along_rows(t.value), along_rows(t.state.S), 0, n.value_width);
        sums.each([&](int r, int f, float x) { t.dphi.row(r)[f] = x + t.state.z[f]; });
      });
      for_blocks(active, n.value_width, [&](Sums& sums) {
        multiply<C>(sums, along_rows(t.phi_k), across_rows(t.state.S), 0, n.feature_width);
        sums.each([&](int r, int v, float x) { t.dvalue.row(r)[v] = x; });
      });
    }
    for (int64_t head = first_head; head < end_head; ++head) {
      Rows next{more ? first_head : -1, before};
      if (head + 1 < end_head) next = {head + 1, token};
      __syncthreads();
      load_queries(c, phi, s, {head, token}, next, valid, active, t,
                   ahead && Writes && head == first_head);
      for (int r = warp_index(); r < active; r += warp_count()) {
        const float2 own = r < valid ? *factors.at(c, s.batch, head, token + r) : float2{0, 0};
        if (c.divides()) divide_row(c, t, r, own.x);
        if (lane_index() == 0) t.delta[r] = own.y;
      }
      __syncthreads();
      if (Writes) {
        // From the queries i >= j of this chunk.
        multiply_lower<C>(active, t.phi_q, t.phi_k, n.feature_width, t.scores);
        for_lower_blocks(active, [&](Sums& sums) {
          multiply<C>(sums, along_rows(t.g), along_rows(t.value), 0, n.value_width);
          sums.each([&](int i, int j, float x) {
            t.pairs.row(i)[j] = from_float<E>(j <= i ? x + t.delta[i] : 0.0f);
          });
        });
        __syncthreads();
        for_blocks(active, n.value_width, [&](Sums& sums) {
          multiply<C>(sums, across_rows(t.scores), across_rows(t.g), sums.row, active);
          sums.each([&](int r, int v, float x) { t.dvalue.row(r)[v] += x; });
        });
        for_blocks(active, n.feature_width, [&](Sums& sums) {
          multiply<C>(sums, across_rows(t.pairs), across_rows(t.phi_q), sums.row, active);
          sums.each([&](int r, int f, float x) { t.dphi.row(r)[f] += x; });
        });
      }
      update_state(c, t.phi_q, t.g, active, t.delta, t.state);
    }
    if (Writes) {
      __syncthreads();
      write_key_gradients(c, phi, s, kv_head, token, valid, t.phi_k, t.inverse_norm_k, nullptr,
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

template <class C>
size_t forward_bytes(const C& c, bool walks, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  ForwardTiles<C>(c.n, walks, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

// How a kernel of the backward pass uses shared memory: copies ahead, the state too, or neither.
template <class C>
struct BackwardPlace {
  bool ahead;
  size_t shared_bytes;
  float* spill;

  BackwardPlace(const C& c, bool keys, int64_t blocks, Launcher& launch) {
    const auto bytes = [&](bool ahead, bool holds_state) {
      Carve carve{nullptr};
      float elsewhere;
      BackwardTiles<C>(c.n, keys, ahead, holds_state ? nullptr : &elsewhere, carve);
      return carve.used;
    };
    ahead = launch.fits(bytes(true, true));
    const auto bytes_of = [&](bool holds_state) { return bytes(ahead, holds_state); };
    spill = launch.place_states(blocks, c.n.state_elements(), bytes_of);
    shared_bytes = bytes_of(launch.fits(bytes_of(true)));
  }
};

}  // namespace

template <class T, int Width>
void causal_forward(const Problem& problem, const Arguments& args, Launcher& launch) {
  using C = Call<T, Width>;
  const C call = make_call<C>(problem, args);
  const auto& n = call.n;
  const int64_t size = problem.state_size(), sequences = problem.batch * problem.num_heads;
  float* anchors = static_cast<float*>(args.saved);
  if (anchor_slots(problem) && !problem.num_sequences && launch.shares_evenly(sequences) &&
      launch.fits(forward_bytes(call, true, true))) {
    float* starts = launch.take(sequences * size);
    launch("causal_walk", causal_walk_kernel<C>, sequences, n.threads,
           forward_bytes(call, true, true), call, anchors, starts);
    return;
  }
  if (const int64_t count = anchor_slots(problem)) {
    if (!problem.needs_grad) anchors = launch.take(count * problem.num_kv_heads * size);
    launch_sums(launch, call, anchors, size);
    launch_fold(launch, "fold_segments", call, fold_segments_kernel<C, false>, anchors, size, anchors);
  }
  const auto bytes = [&](bool holds_state) { return forward_bytes(call, false, holds_state); };
  const int64_t blocks = n.key_slots * problem.num_heads;
  float* spill = launch.place_states(blocks, n.state_elements(), bytes);
  launch("causal_forward", causal_kernel<C>, blocks, n.threads, bytes(launch.fits(bytes(true))),
         call, anchors, spill);
}

template <class T, int Width>
void causal_backward(const Problem& problem, const Arguments& args, Launcher& launch) {
  using C = Call<T, Width>;
  const C call = make_call<C>(problem, args);
  const auto& n = call.n;
  float* anchors = static_cast<float*>(args.saved);
  const RowFactors factors{reinterpret_cast<float2*>(
      launch.take(2 * problem.batch * problem.num_heads * problem.query_length))};
  const int64_t query_blocks = n.key_slots * problem.num_heads;
  const int64_t key_blocks = n.key_slots * problem.num_kv_heads;

  const BackwardPlace<C> queries(call, false, query_blocks, launch);
  launch("causal_query_gradient", query_gradient_kernel<C>, query_blocks, n.threads,
         queries.shared_bytes, call, anchors, factors, queries.ahead, queries.spill);
  const BackwardPlace<C> keys(call, true, key_blocks, launch);
  float* sums = nullptr;
  if (const int64_t count = anchor_slots(problem)) {
    const int64_t size = problem.state_size();
    sums = launch.take(count * problem.num_kv_heads * size);
    launch("causal_gradient_sums", key_gradient_kernel<C, false>, key_blocks, n.threads,
           keys.shared_bytes, call, sums, factors, keys.ahead, keys.spill);
    launch_fold(launch, "fold_gradients", call, fold_segments_kernel<C, true>, sums, size, sums);
  }
  launch("causal_key_gradient", key_gradient_kernel<C, true>, key_blocks, n.threads,
         keys.shared_bytes, call, sums, factors, keys.ahead, keys.spill);
}

template void causal_forward<FASTATTN_DTYPE, FASTATTN_WIDTH>(const Problem&, const Arguments&,
                                                             Launcher&);
template void causal_backward<FASTATTN_DTYPE, FASTATTN_WIDTH>(const Problem&, const Arguments&,
                                                              Launcher&);

}  // namespace fastattn::cuda
