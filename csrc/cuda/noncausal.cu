// Non-causal linear attention: every query attends to every key.
//
//   S = sum_j phi(k_j) v_j^T     z = sum_j phi(k_j)     out_i = phi(q_i) S / max(phi(q_i) . z, eps)
//
// Up to a segment of tokens: one launch, one block per query head, k, v, q read once. Longer: sums
// of segments, a fold, outputs; k, v, q are still read once. Backward, with g_i = do_i / den_i,
//
//   u_i = S g_i    delta_i = -phi(q_i) . u_i / den_i    dphi(q_i) = u_i + delta_i z
//   dS = sum_i phi(q_i) g_i^T    dz = sum_i delta_i phi(q_i)
//   dphi(k_j) = dS v_j + dz      dv_j = dS^T phi(k_j)
//
// reads q and do once, then k and v once, from the saved S and z alone: again in one launch, one block
// per key head, up to a segment of tokens.
#include "fold.cuh"

namespace fastattn::cuda {
namespace {

// ---- forward ------------------------------------------------------------------------------------

template <class C>
struct ForwardTiles : SumTiles<C> {  // queries take the place of keys
  Tile<float> out;

  __host__ __device__ ForwardTiles(const typename C::Sizes& n, float* spilled, Carve& carve)
      : SumTiles<C>(n, spilled, carve), out(take_tile<float>(carve, n.rows, n.value_width)) {}
};

// Outputs of the queries of a segment from the state in t.
template <class C>
__device__ void emit(const C& c, const typename C::Phi& phi, const Segment& s, int64_t head,
                     const ForwardTiles<C>& t) {
  using T = typename C::T;
  const auto& n = c.n;
  const auto start = [&](int64_t token) {
    fetch(t.stage_k, c.a.query, s.batch, head, token, tokens_from(s, token, n.rows), n.head_dim);
    commit_copies();
  };
  const int64_t end = s.begin + s.tokens;
  if (s.tokens) start(s.begin);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    wait_for_copies();
    __syncthreads();
    queries_to_features(c, phi, valid, active, t.stage_k, t.phi, t.inverse_norm);
    __syncthreads();
    if (token + n.rows < end) start(token + n.rows);
    for_blocks(active, n.value_width, [&](Sums& sums) {
      multiply<C>(sums, along_rows(t.phi), across_rows(t.state.S), 0, n.feature_width);
      sums.each([&](int r, int v, float x) { t.out.row(r)[v] = x; });
    });
    __syncthreads();
    for (int r = warp_index(); r < valid; r += warp_count()) {
      float inverse = 1;
      if (c.divides())
        inverse = inverse_denominator(dot_row(t.phi.row(r), t.state.z, n.features), c.eps());
      typename C::Row row;
      row.load(t.out.row(r), n.values);
      row.each(n.values, [&](int, float& x) { x *= inverse; });
      store_row<T>(c.a.out, s.batch, head, token + r, n.values, row);
    }
  });
}

// One block per query head: sums its keys, then emits.
template <class C>
__global__ void noncausal_kernel(const __grid_constant__ C c, float* spill) {
  const auto& n = c.n;
  const int64_t batch = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const int64_t kv_head = head / n.group, index = batch * c.p.num_kv_heads + kv_head;
  Carve carve{shared_memory};
  const ForwardTiles<C> t(n, spill ? spill + int64_t{blockIdx.x} * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  const bool efficient = c.p.feature_map == FeatureMap::efficient;
  sum_keys(c, phi, key_segment(c, batch), kv_head, t);
  if (efficient) {  // z holds sums of exp, by which each row of S is divided
    for (int f = threadIdx.x; f < n.features; f += blockDim.x)
      t.state.z[f] = t.state.z[f] > 0 ? 1.0f / t.state.z[f] : 0.0f;
    __syncthreads();
    for (int f = warp_index(); f < n.features; f += warp_count())
      for (int v = lane_index(); v < n.values; v += 32) t.state.S.row(f)[v] *= t.state.z[f];
  } else {
    merge_state(n, state_at(c.a.initial, n, index), t.state);
  }
  __syncthreads();
  if (head % n.group == 0) {
    store_state(n, t.state, state_at(c.a.final, n, index));
    if (c.p.needs_grad) {
      const int64_t stride = c.p.state_size() + (efficient ? n.features : 0);
      float* saved = static_cast<float*>(c.a.saved);
      store_state(n, t.state, state_at(saved, n, index, stride));
      if (efficient)
        for (int f = threadIdx.x; f < n.features; f += blockDim.x)
          saved[index * stride + c.p.state_size() + f] = t.maximum[f];
    }
  }
  emit(c, phi, query_segment(c, batch), head, t);
}

// One block per query head and segment.
template <class C>
__global__ void emit_kernel(const __grid_constant__ C c, float* totals, int64_t stride, float* spill) {
  const int64_t slot = blockIdx.x / c.p.num_heads, head = blockIdx.x % c.p.num_heads;
  const Segment s = query_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const ForwardTiles<C> t(c.n, spill ? spill + int64_t{blockIdx.x} * c.n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, c.n);
  load_state(c.n,
             state_at(totals, c.n, s.state * c.p.num_kv_heads + head / c.n.group, stride), t.state);
  emit(c, phi, s, head, t);
}

template <class C>
size_t forward_bytes(const C& c, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  ForwardTiles<C>(c.n, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

// ---- backward -----------------------------------------------------------------------------------

// Queries read the state S and z and add to its gradient; keys read the gradient. Where one block has
// those first and then these, gradients of values take the place of S.
template <class C>
struct BackwardTiles {
  using T = typename C::T;
  using E = typename C::E;

  Tile<T> stage_a, stage_b;  // q and do, or k and v
  Tile<E> phi, value;        // of queries with g, or of keys with v
  Tile<float> dphi, dvalue;
  float *inverse_norm, *slope, *delta, *columns;  // columns: maxima, then column sums
  LocalState state, gradient;

  __host__ __device__ BackwardTiles(const typename C::Sizes& n, bool queries, bool keys,
                                    float* spilled, Carve& carve) {
    stage_a = take_tile<T>(carve, n.rows, n.stage_width());
    stage_b = take_tile<T>(carve, n.rows, n.value_width);
    phi = take_tile<E>(carve, n.rows, n.feature_width);
    value = take_tile<E>(carve, n.rows, n.value_width);
    dphi = take_tile<float>(carve, n.rows, n.feature_width);
    inverse_norm = carve.take<float>(n.rows);
    slope = carve.take<float>(n.rows);
    delta = carve.take<float>(n.rows);
    columns = carve.take<float>(2 * n.feature_width);
    state.z = carve.take<float>(n.feature_width);
    gradient.z = carve.take<float>(n.feature_width);
    gradient.S = {spilled ? spilled : carve.take<float>(n.state_elements()), n.state_stride()};
    Carve same = carve;
    if (keys) dvalue = take_tile<float>(same, n.rows, n.value_width);
    if (queries)
      state.S = {spilled ? spilled + n.state_elements() : carve.take<float>(n.state_elements()),
                 n.state_stride()};
    if (same.used > carve.used) carve.used = same.used;
  }
};

// g = do / den of a tile of queries, and d log den where it counts.
template <class C>
__device__ __forceinline__ void load_gradients(const C& c, const BackwardTiles<C>& t, int valid,
                                               int active) {
  for (int r = warp_index(); r < active; r += warp_count()) {
    float inverse = r < valid ? 1.0f : 0.0f;
    if (c.divides() && r < valid) {
      const float den = dot_row(t.phi.row(r), t.state.z, c.n.features);
      inverse = inverse_denominator_of_gradient(den, c.eps());
      if (lane_index() == 0) t.slope[r] = denominator_slope(den, c.eps());
    }
    for (int i = lane_index(); i < c.n.value_width; i += 32)
      t.value.row(r)[i] = from_float<typename C::E>(
          r < valid && i < c.n.values ? to_float(t.stage_b.row(r)[i]) * inverse : 0.0f);
  }
}

// Writes dq of a segment's queries in all heads of a group; t.gradient = their sums of dS and dz.
// While one tile is computed the next arrives.
template <class C>
__device__ void query_gradients(const C& c, const typename C::Phi& phi, const Segment& s,
                                int64_t kv_head, const BackwardTiles<C>& t) {
  using T = typename C::T;
  const auto& n = c.n;
  const int64_t last = (kv_head + 1) * n.group, end = s.begin + s.tokens;
  const auto start = [&](int64_t head, int64_t token) {
    const int valid = tokens_from(s, token, n.rows);
    fetch(t.stage_a, c.a.query, s.batch, head, token, valid, n.head_dim);
    fetch(t.stage_b, c.a.grad_out, s.batch, head, token, valid, n.values);
    commit_copies();
  };
  if (s.tokens) start(kv_head * n.group, s.begin);
  load_state(n, {}, t.gradient);
  for (int64_t head = kv_head * n.group; head < last; ++head)
    for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
      wait_for_copies();
      __syncthreads();
      queries_to_features(c, phi, valid, active, t.stage_a, t.phi, t.inverse_norm);
      __syncwarp();  // a warp reads the rows that it wrote
      load_gradients(c, t, valid, active);
      __syncthreads();
      if (token + n.rows < end)
        start(head, token + n.rows);
      else if (head + 1 < last)
        start(head + 1, s.begin);
      for_blocks(active, n.feature_width, [&](Sums& block) {
        multiply<C>(block, along_rows(t.value), along_rows(t.state.S), 0, n.value_width);
        block.each([&](int r, int f, float x) { t.dphi.row(r)[f] = x; });
      });
      __syncthreads();
      for (int r = warp_index(); r < active; r += warp_count()) {
        float delta = 0;
        if (c.divides() && r < valid) {
          delta = -dot_row(t.phi.row(r), t.dphi.row(r), n.features) * t.slope[r];
          for (int f = lane_index(); f < n.features; f += 32)
            t.dphi.row(r)[f] += delta * t.state.z[f];
          __syncwarp();
        }
        if (lane_index() == 0) t.delta[r] = delta;
        if (r >= valid) continue;
        typename C::Row row;
        phi.chain_query(t.phi.row(r), t.dphi.row(r), t.inverse_norm + r, row);
        store_row<T>(c.a.grad_query, s.batch, head, token + r, n.head_dim, row);
      }
      __syncthreads();
      update_state(c, t.phi, t.value, active, t.delta, t.gradient);
    });
  __syncthreads();
}

// Writes dk and dv of a segment's keys from t.gradient, dS and dz of the whole sequence.
template <class C>
__device__ void key_gradients(const C& c, const typename C::Phi& phi, const Segment& s, int64_t head,
                              const float* saved, const BackwardTiles<C>& t) {
  using T = typename C::T;
  const auto& n = c.n;
  const int64_t end = s.begin + s.tokens;
  const auto start = [&](int64_t token) {
    const int valid = tokens_from(s, token, n.rows);
    fetch(t.stage_a, c.a.key, s.batch, head, token, valid, n.head_dim);
    fetch(t.stage_b, c.a.value, s.batch, head, token, valid, n.values);
    commit_copies();
  };
  if (s.tokens) start(s.begin);
  float *maxima = t.columns, *column_sums = t.columns + n.feature_width;
  if (c.p.feature_map == FeatureMap::efficient) {
    // sum_j phi(k_j) dphi(k_j) = rows of dS . rows of S; dz is 0. It is subtracted from dphi(k_j),
    // and cancels with it where a key stands alone, so dS is rounded as in the product below.
    for (int f = threadIdx.x; f < n.features; f += blockDim.x) {
      float sum = 0;
      for (int v = 0; v < n.values; ++v)
        sum += Arithmetic<T>::rounded(t.gradient.S.row(f)[v]) * saved[f * n.values + v];
      column_sums[f] = sum;
      t.state.z[f] = saved[n.features * n.values + f];
      maxima[f] = saved[c.p.state_size() + f];
    }
  }
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    wait_for_copies();
    __syncthreads();
    keys_to_features(c, phi, s, token, valid, active, t.stage_a, {maxima, t.state.z}, t.phi,
                     t.inverse_norm);
    values_to_tile(c, s, token, valid, active, t.stage_b, t.value);
    __syncthreads();
    if (token + n.rows < end) start(token + n.rows);
    for_blocks(active, n.feature_width, [&](Sums& block) {
      multiply<C>(block, along_rows(t.value), along_rows(t.gradient.S), 0, n.value_width);
      block.each([&](int r, int f, float x) { t.dphi.row(r)[f] = x + t.gradient.z[f]; });
    });
    for_blocks(active, n.value_width, [&](Sums& block) {
      multiply<C>(block, along_rows(t.phi), across_rows(t.gradient.S), 0, n.feature_width);
      block.each([&](int r, int v, float x) { t.dvalue.row(r)[v] = x; });
    });
    __syncthreads();
    write_key_gradients(c, phi, s, head, token, valid, t.phi, t.inverse_norm, column_sums, t.dphi,
                        t.dvalue);
  });
}

// One block per kv head: dq of its group, then dk and dv.
template <class C>
__global__ void noncausal_gradient_kernel(const __grid_constant__ C c, int64_t saved_stride,
                                          float* spill) {
  const auto& n = c.n;
  const int64_t batch = blockIdx.x / c.p.num_kv_heads, kv_head = blockIdx.x % c.p.num_kv_heads;
  Carve carve{shared_memory};
  const BackwardTiles<C> t(n, true, true,
                           spill ? spill + int64_t{blockIdx.x} * 2 * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  float* saved = static_cast<float*>(c.a.saved);
  load_state(n, state_at(saved, n, blockIdx.x, saved_stride), t.state);
  query_gradients(c, phi, query_segment(c, batch), kv_head, t);
  merge_state(n, state_at(c.a.grad_final, n, blockIdx.x), t.gradient);
  __syncthreads();
  store_state(n, t.gradient, state_at(c.a.grad_initial, n, blockIdx.x));
  key_gradients(c, phi, key_segment(c, batch), kv_head, saved + blockIdx.x * saved_stride, t);
}

// One block per kv head and segment of queries: writes dq of its group, and sums of dS and dz.
template <class C>
__global__ void query_gradient_kernel(const __grid_constant__ C c, float* sums, int64_t saved_stride,
                                      float* spill) {
  const auto& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_kv_heads, kv_head = blockIdx.x % c.p.num_kv_heads;
  const Segment s = query_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const BackwardTiles<C> t(n, true, false,
                           spill ? spill + int64_t{blockIdx.x} * 2 * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  load_state(n,
             state_at(static_cast<float*>(c.a.saved), n, s.state * c.p.num_kv_heads + kv_head,
                      saved_stride),
             t.state);
  query_gradients(c, phi, s, kv_head, t);
  store_state(n, t.gradient,
              state_at(sums, n, slot * c.p.num_kv_heads + kv_head, c.p.state_size()));
}

// totals = gradient of the returned state + sums of the segments, which is also that of the initial.
template <class C>
__global__ void fold_queries_kernel(const __grid_constant__ C c, const float* sums, int64_t stride,
                                    float* totals) {
  for_own_number(c, [&](int64_t row, int64_t head, int i) {
    const Segment first = first_segment(c.p, c.a.cu_seqlens, c.p.query_length, row);
    const float* own = sums + (first.slot * c.p.num_kv_heads + head) * stride;
    const float* given = number_of(c.a.grad_final, c, row, head, i);
    float sum = given ? *given : 0.0f;
    for (int64_t k = 0; k < first.count; ++k) sum += own[k * c.p.num_kv_heads * stride + i];
    totals[(row * c.p.num_kv_heads + head) * stride + i] = sum;
    if (float* initial = number_of(c.a.grad_initial, c, row, head, i)) *initial = sum;
  });
}

// One block per kv head and segment of keys: writes dk and dv.
template <class C>
__global__ void key_gradient_kernel(const __grid_constant__ C c, float* totals, int64_t saved_stride,
                                    float* spill) {
  const auto& n = c.n;
  const int64_t slot = blockIdx.x / c.p.num_kv_heads, head = blockIdx.x % c.p.num_kv_heads;
  const Segment s = key_segment(c, slot);
  if (!s.exists()) return;
  Carve carve{shared_memory};
  const BackwardTiles<C> t(n, false, true,
                           spill ? spill + int64_t{blockIdx.x} * n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, n);
  const int64_t index = s.state * c.p.num_kv_heads + head;
  load_state(n, state_at(totals, n, index, c.p.state_size()), t.gradient);
  __syncthreads();
  key_gradients(c, phi, s, head, static_cast<const float*>(c.a.saved) + index * saved_stride, t);
}

template <class C>
size_t backward_bytes(const C& c, bool queries, bool keys, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  BackwardTiles<C>(c.n, queries, keys, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

// Both passes in one launch: nobody else sums over the same sequence.
bool is_one_segment(const Problem& p) {
  return !p.num_sequences && p.query_length <= kSegmentTokens && p.key_length <= kSegmentTokens;
}

// Numbers of a head's state as backward wants it: for `efficient`, with maxima.
int64_t saved_size(const Problem& p) {
  return p.state_size() + (p.feature_map == FeatureMap::efficient ? p.feature_dim() : 0);
}

}  // namespace

template <class T, int Width>
void noncausal_forward(const Problem& problem, const Arguments& args, Launcher& launch) {
  using C = Call<T, Width>;
  const C call = make_call<C>(problem, args);
  const auto& n = call.n;
  const int64_t stride = saved_size(problem);
  const auto bytes = [&](bool holds_state) { return forward_bytes(call, holds_state); };
  if (is_one_segment(problem)) {
    const int64_t blocks = problem.batch * problem.num_heads;
    float* spill = launch.place_states(blocks, n.state_elements(), bytes);
    launch("noncausal_forward", noncausal_kernel<C>, blocks, n.threads,
           bytes(launch.fits(bytes(true))), call, spill);
    return;
  }
  float* sums = launch.take(n.key_slots * problem.num_kv_heads * stride);
  float* totals = problem.needs_grad
                      ? static_cast<float*>(args.saved)
                      : launch.take(problem.state_batch() * problem.num_kv_heads * stride);
  launch_sums(launch, call, sums, stride);
  launch_fold(launch, "fold_keys", call, fold_keys_kernel<C>, sums, stride, totals);
  const int64_t blocks = n.query_slots * problem.num_heads;
  float* spill = launch.place_states(blocks, n.state_elements(), bytes);
  launch("noncausal_emit", emit_kernel<C>, blocks, n.threads, bytes(launch.fits(bytes(true))), call,
         totals, stride, spill);
}

template <class T, int Width>
void noncausal_backward(const Problem& problem, const Arguments& args, Launcher& launch) {
  using C = Call<T, Width>;
  const C call = make_call<C>(problem, args);
  const auto& n = call.n;
  const int64_t saved_stride = saved_size(problem), size = problem.state_size();
  const int64_t heads = problem.num_kv_heads;
  const auto bytes_of = [&](bool queries, bool keys) {
    return [&call, queries, keys](bool holds) { return backward_bytes(call, queries, keys, holds); };
  };
  if (is_one_segment(problem)) {
    const auto bytes = bytes_of(true, true);
    float* spill = launch.place_states(problem.batch * heads, 2 * n.state_elements(), bytes);
    launch("noncausal_gradient", noncausal_gradient_kernel<C>, problem.batch * heads, n.threads,
           bytes(launch.fits(bytes(true))), call, saved_stride, spill);
    return;
  }
  float* sums = launch.take(n.query_slots * heads * size);
  float* totals = launch.take(problem.state_batch() * heads * size);
  const auto query_bytes = bytes_of(true, false), key_bytes = bytes_of(false, true);
  float* spill = launch.place_states(n.query_slots * heads, 2 * n.state_elements(), query_bytes);
  launch("noncausal_query_gradient", query_gradient_kernel<C>, n.query_slots * heads, n.threads,
         query_bytes(launch.fits(query_bytes(true))), call, sums, saved_stride, spill);
  launch_fold(launch, "fold_queries", call, fold_queries_kernel<C>, sums, size, totals);
  spill = launch.place_states(n.key_slots * heads, n.state_elements(), key_bytes);
  launch("noncausal_key_gradient", key_gradient_kernel<C>, n.key_slots * heads, n.threads,
         key_bytes(launch.fits(key_bytes(true))), call, totals, saved_stride, spill);
}

template void noncausal_forward<FASTATTN_DTYPE, FASTATTN_WIDTH>(const Problem&, const Arguments&,
                                                                Launcher&);
template void noncausal_backward<FASTATTN_DTYPE, FASTATTN_WIDTH>(const Problem&, const Arguments&,
                                                                 Launcher&);

}  // namespace fastattn::cuda
