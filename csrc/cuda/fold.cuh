// Summing the segments of a sequence: keys to states, and states to totals. Both chunked forms use
// these kernels; each of their files has its own copy (nothing is shared between device objects).
#pragma once

#include <cfloat>

#include "call.cuh"
#include "kernels.h"

namespace fastattn::cuda {
namespace {

// What a block that sums keys, or emits outputs, holds. One stage each for the rows in flight.
template <class C>
struct SumTiles {
  using T = typename C::T;
  using E = typename C::E;

  Tile<T> stage_k, stage_v;
  Tile<E> phi, value;
  float *inverse_norm, *maximum;
  LocalState state;

  __host__ __device__ SumTiles(const typename C::Sizes& n, float* spilled, Carve& carve) {
    stage_k = take_tile<T>(carve, n.rows, n.stage_width());
    stage_v = take_tile<T>(carve, n.rows, n.value_width);
    phi = take_tile<E>(carve, n.rows, n.feature_width);
    value = take_tile<E>(carve, n.rows, n.value_width);
    inverse_norm = carve.take<float>(n.rows);
    maximum = carve.take<float>(n.feature_width);
    state.z = carve.take<float>(n.feature_width);
    state.S = {spilled ? spilled : carve.take<float>(n.state_elements()), n.state_stride()};
  }
};

// For `efficient`: the maximum of every feature over the keys of a segment that take part. A warp to a
// token; `partial` has room for the maxima of every warp.
template <class C>
__device__ void find_maximum(const C& c, const Segment& s, int64_t head, float* partial,
                             float* maximum) {
  const auto* keys = static_cast<const typename C::T*>(c.a.key.data);
  typename C::Row row;
  row.each(c.n.features, [&](int, float& m) { m = -FLT_MAX; });
#pragma unroll 4
  for (int64_t t = s.begin + warp_index(); t < s.begin + s.tokens; t += warp_count())
    if (c.keeps(s.batch, t))
      row.each(c.n.features, [&](int f, float& m) {
        m = fmaxf(m, to_float(keys[c.a.key.offset(s.batch, head, t) + f * c.a.key.feature]));
      });
  row.each(c.n.features, [&](int f, float& m) { partial[warp_index() * c.n.features + f] = m; });
  __syncthreads();
  for (int f = threadIdx.x; f < c.n.features; f += blockDim.x) {
    float m = -FLT_MAX;
    for (int w = 0; w < warp_count(); ++w) m = fmaxf(m, partial[w * c.n.features + f]);
    maximum[f] = m;
  }
  __syncthreads();
}

// state = sums over the keys of a segment, from zero. While one tile is summed the next arrives.
template <class C>
__device__ void sum_keys(const C& c, const typename C::Phi& phi, const Segment& s, int64_t head,
                         const SumTiles<C>& t) {
  const auto& n = c.n;
  load_state(n, {}, t.state);
  if (c.p.feature_map == FeatureMap::efficient)
    find_maximum(c, s, head, reinterpret_cast<float*>(t.stage_k.data), t.maximum);
  const auto start = [&](int64_t token) {
    const int valid = tokens_from(s, token, n.rows);
    fetch(t.stage_k, c.a.key, s.batch, head, token, valid, n.head_dim);
    fetch(t.stage_v, c.a.value, s.batch, head, token, valid, n.values);
    commit_copies();
  };
  const int64_t end = s.begin + s.tokens;
  if (s.tokens) start(s.begin);
  for_tiles(s, n.rows, [&](int64_t token, int valid, int active) {
    wait_for_copies();
    __syncthreads();
    keys_to_features(c, phi, s, token, valid, active, t.stage_k, {t.maximum, nullptr}, t.phi,
                     t.inverse_norm);
    values_to_tile(c, s, token, valid, active, t.stage_v, t.value);
    __syncthreads();
    if (token + n.rows < end) start(token + n.rows);
    update_state(c, t.phi, t.value, active, nullptr, t.state);
  });
  __syncthreads();
}

// One block per kv head and segment. Non-causal: the sums of every segment, and its maxima. Causal:
// the sums of all but the last of a sequence, kept where the state of the next one will be.
template <class C>
__global__ void sum_kernel(const __grid_constant__ C c, float* sums, int64_t stride, float* spill) {
  const int64_t slot = blockIdx.x / c.p.num_kv_heads, head = blockIdx.x % c.p.num_kv_heads;
  const Segment s = key_segment(c, slot);
  if (!s.exists() || (c.p.is_causal && s.index + 1 == s.count)) return;
  Carve carve{shared_memory};
  const SumTiles<C> t(c.n, spill ? spill + int64_t{blockIdx.x} * c.n.state_elements() : nullptr, carve);
  const typename C::Phi phi(c.p, c.n);
  sum_keys(c, phi, s, head, t);
  const int64_t index = (c.p.is_causal ? s.anchor + 1 : slot) * c.p.num_kv_heads + head;
  store_state(c.n, t.state, state_at(sums, c.n, index, stride));
  if (c.p.feature_map == FeatureMap::efficient)
    for (int f = threadIdx.x; f < c.n.features; f += blockDim.x)
      sums[index * stride + c.p.state_size() + f] = t.maximum[f];
}

template <class C>
size_t sum_bytes(const C& c, bool holds_state) {
  Carve carve{nullptr};
  float elsewhere;
  SumTiles<C>(c.n, holds_state ? nullptr : &elsewhere, carve);
  return carve.used;
}

template <class C>
void launch_sums(Launcher& launch, const C& c, float* sums, int64_t stride) {
  const int64_t blocks = c.n.key_slots * c.p.num_kv_heads;
  float* spill = launch.place_states(blocks, c.n.state_elements(),
                                     [&](bool holds) { return sum_bytes(c, holds); });
  launch("sum_keys", sum_kernel<C>, blocks, c.n.threads,
         sum_bytes(c, launch.fits(sum_bytes(c, true))), c, sums, stride, spill);
}

// ---- folds: one thread per number of a state, segments in order ---------------------------------

constexpr int kFoldThreads = 256;

// Calls body(sequence's row, head, index of a number in its state).
template <class C, class Body>
__device__ __forceinline__ void for_own_number(const C& c, const Body& body) {
  const int64_t i = int64_t{blockIdx.y} * kFoldThreads + threadIdx.x;
  if (i < c.p.state_size())
    body(blockIdx.x / c.p.num_kv_heads, blockIdx.x % c.p.num_kv_heads, static_cast<int>(i));
}

// The number `i` of a state that is given as S and z apart.
template <class C>
__device__ __forceinline__ float* number_of(const State& state, const C& c, int64_t row,
                                            int64_t head, int i) {
  if (!state) return nullptr;
  const StateAddress address = state_at(state, c.n, row * c.p.num_kv_heads + head);
  const int matrix = c.n.features * c.n.values;
  return i < matrix ? address.S + i : address.z + (i - matrix);
}

// totals = initial + sum of the segments' sums; `efficient`: sums of exp, which are brought to the
// maximum of all segments, and z becomes 1 / sum, by which S is divided.
template <class C>
__global__ void fold_keys_kernel(const __grid_constant__ C c, const float* sums, int64_t stride,
                                 float* totals) {
  for_own_number(c, [&](int64_t row, int64_t head, int i) {
    const Segment first = first_segment(c.p, c.a.cu_seqlens_k, c.p.key_length, row);
    const float* own = sums + (first.slot * c.p.num_kv_heads + head) * stride;
    const int64_t step = c.p.num_kv_heads * stride;
    const int size = static_cast<int>(c.p.state_size());
    const int matrix = c.n.features * c.n.values;
    float* total = totals + (row * c.p.num_kv_heads + head) * stride;
    if (c.p.feature_map == FeatureMap::efficient) {
      const int f = i < matrix ? i / c.n.values : i - matrix;
      float largest = -FLT_MAX;
      for (int64_t k = 0; k < first.count; ++k) largest = fmaxf(largest, own[k * step + size + f]);
      float sum = 0, z = 0;
      for (int64_t k = 0; k < first.count; ++k) {
        const float factor = expf(own[k * step + size + f] - largest);
        sum += factor * own[k * step + i];
        z += factor * own[k * step + matrix + f];
      }
      const float inverse = z > 0 ? 1.0f / z : 0.0f;
      total[i] = i < matrix ? sum * inverse : inverse;
      if (i >= matrix) total[size + f] = largest;
      return;
    }
    const float* initial = number_of(c.a.initial, c, row, head, i);
    float sum = initial ? *initial : 0.0f;
    for (int64_t k = 0; k < first.count; ++k) sum += own[k * step + i];
    total[i] = sum;
    if (float* final = number_of(c.a.final, c, row, head, i)) *final = sum;
  });
}

template <class C>
void launch_fold(Launcher& launch, const char* name, const C& c,
                 void (*kernel)(const C, const float*, int64_t, float*), const float* sums,
                 int64_t stride, float* totals) {
  launch.run(name, kernel, c.p.state_batch() * c.p.num_kv_heads,
             divide_up(c.p.state_size(), kFoldThreads), kFoldThreads, 0, c, sums, stride, totals);
}

}  // namespace
}  // namespace fastattn::cuda
