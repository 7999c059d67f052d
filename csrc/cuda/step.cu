// The recurrent form: one token after another, the state updated before it is read.
//
//   S += phi(k) v^T     z += phi(k)     out = phi(q) S / max(phi(q) . z, eps)
//
// One block per kv head. The decode step reads and writes the caller's float32 state once, in
// place: 8 bytes for each of its F Dv numbers, and nothing else worth counting. For a handful of
// tokens the state stays in shared memory in between.
#include "call.cuh"
#include "kernels.h"

namespace fastattn::cuda {
namespace {

// One token in float32, and partial sums of an output.
struct TokenTiles {
  float *phi_k, *phi_q, *value, *z, *partial, *scalars, *S;

  __host__ __device__ TokenTiles(const Plan& n, bool holds_state, unsigned char* base, size_t* bytes) {
    Carve carve{base};
    phi_k = carve.take<float>(n.feature_width);
    phi_q = carve.take<float>(n.feature_width);
    value = carve.take<float>(n.value_width);
    z = carve.take<float>(n.feature_width);
    partial = carve.take<float>(n.threads);
    scalars = carve.take<float>(4);
    S = holds_state ? carve.take<float>(n.features * n.values) : nullptr;
    if (bytes) *bytes = carve.used;
  }
};

template <class C>
class Token {
  using T = typename C::T;
  using Row = typename C::Row;

 public:
  __device__ Token(const C& c, const TokenTiles& t)
      : c_(c), t_(t), phi_(c.p, c.n) {
    // A thread has one column v of S (or every `columns`-th) and every `parts`-th row.
    columns_ = (c.n.values + 31) / 32 * 32;
    parts_ = blockDim.x / columns_;
    column_ = threadIdx.x % columns_;
    part_ = threadIdx.x / columns_;
  }

  // S: (F, Dv), contiguous.
  __device__ void advance(int64_t batch, int64_t kv_head, int64_t query_token, int64_t key_token,
                          float* S) const {
    const int64_t first = kv_head * c_.n.group;
    if (warp_index() == 0) load_key(batch, kv_head, key_token);
    if (warp_index() == 1) load_query(batch, first, query_token);
    if (warp_index() == 2) load_value(batch, kv_head, key_token);
    __syncthreads();
    for (int f = threadIdx.x; f < c_.n.features; f += blockDim.x) t_.z[f] += t_.phi_k[f];
    for (int64_t q = first; q < first + c_.n.group; ++q) {
      if (q > first) {
        __syncthreads();
        if (warp_index() == 1) load_query(batch, q, query_token);
        __syncthreads();
      }
      t_.partial[threadIdx.x] = q == first ? read<true>(S) : read<false>(S);
      __syncthreads();
      emit(batch, q, query_token);
    }
    __syncthreads();
  }

 private:
  __device__ void load_key(int64_t batch, int64_t head, int64_t token) const {
    if (c_.keeps(batch, token)) {
      Row row = load_row(c_.a.key, batch, head, token, c_.n.head_dim);
      phi_.of_key(row, {}, t_.phi_k, t_.scalars);
    } else {
      phi_.zero(t_.phi_k, t_.scalars);
    }
  }
  __device__ void load_query(int64_t batch, int64_t head, int64_t token) const {
    Row row = load_row(c_.a.query, batch, head, token, c_.n.head_dim);
    phi_.of_query(row, t_.phi_q, t_.scalars + 1);
  }
  __device__ void load_value(int64_t batch, int64_t head, int64_t token) const {
    const bool kept = c_.keeps(batch, token);
    Row row = load_row(c_.a.value, batch, head, token, c_.n.values);
    row.each(c_.n.values, [&](int i, float& x) { t_.value[i] = kept ? x : 0.0f; });
  }
  __device__ static Row load_row(const Strided& s, int64_t batch, int64_t head, int64_t token, int n) {
    const T* from = static_cast<const T*>(s.data) + s.offset(batch, head, token);
    Row row;
    row.each(n, [&](int i, float& x) { x = to_float(from[i * s.feature]); });
    return row;
  }

  // This thread's share of phi(q) S, after S += phi(k) v^T where `Update`.
  template <bool Update>
  __device__ __forceinline__ float read(float* S) const {
    float sum = 0;
    if (part_ >= parts_ || column_ >= c_.n.values) return sum;
    const float value = t_.value[column_];
    // Loads of several rows before the first store: the compiler may not move them across it.
    for (int first = part_; first < c_.n.features; first += kAhead * parts_) {
      float state[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int f = first + i * parts_;
        state[i] = f < c_.n.features ? S[f * c_.n.values + column_] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        const int f = first + i * parts_;
        if (f >= c_.n.features) break;
        if (Update) {
          state[i] += t_.phi_k[f] * value;
          S[f * c_.n.values + column_] = state[i];
        }
        sum += t_.phi_q[f] * state[i];
      }
    }
    return sum;
  }

  __device__ void emit(int64_t batch, int64_t head, int64_t token) const {
    const int warps = (c_.n.values + 31) / 32;
    if (warp_index() >= warps) return;
    float inverse = 1;
    if (c_.divides())
      inverse = inverse_denominator(dot_row(t_.phi_q, t_.z, c_.n.features), c_.eps());
    const int v = threadIdx.x;
    if (v >= c_.n.values) return;
    float sum = 0;
    for (int part = 0; part < parts_; ++part) sum += t_.partial[part * columns_ + v];
    T* out = static_cast<T*>(c_.a.out.data) + c_.a.out.offset(batch, head, token);
    out[v * c_.a.out.feature] = from_float<T>(sum * inverse);
  }

  static constexpr int kAhead = 16;  // rows of S that a thread has on their way

  const C& c_;
  const TokenTiles& t_;
  Features<float, typename C::Sizes> phi_;
  int columns_, parts_, column_, part_;
};

template <class C>
__global__ void step_kernel(const __grid_constant__ C c) {
  const TokenTiles t(c.n, false, shared_memory, nullptr);
  const int64_t head = blockIdx.x;
  const StateAddress state = state_at(c.a.initial, c.n, head);
  for (int f = threadIdx.x; f < c.n.features; f += blockDim.x) t.z[f] = state.z[f];
  Token<C>(c, t).advance(head / c.p.num_kv_heads, head % c.p.num_kv_heads, 0, 0, state.S);
  for (int f = threadIdx.x; f < c.n.features; f += blockDim.x) state.z[f] = t.z[f];
}

// saved: states at the start of every segment but the first, for the chunked backward.
template <class C>
__global__ void recurrent_kernel(const __grid_constant__ C c) {
  const TokenTiles t(c.n, true, shared_memory, nullptr);
  const LocalState own{{t.S, c.n.values}, t.z};
  const int64_t row = blockIdx.x / c.p.num_kv_heads, head = blockIdx.x % c.p.num_kv_heads;
  const StateAddress initial = state_at(c.a.initial, c.n, blockIdx.x);
  for (int i = threadIdx.x; i < c.n.features * c.n.values; i += blockDim.x)
    t.S[i] = initial.S ? initial.S[i] : 0.0f;
  for (int f = threadIdx.x; f < c.n.features; f += blockDim.x)
    t.z[f] = initial.z ? initial.z[f] : 0.0f;
  __syncthreads();
  const Segment first = first_segment(c.p, c.a.cu_seqlens_k, c.p.key_length, row);
  const Token<C> token(c, t);
  for (int64_t i = 0; i < first.count; ++i) {
    if (i > 0 && c.p.needs_grad) {
      store_state(c.n, own,
                  state_at(static_cast<float*>(c.a.saved), c.n,
                           (first.anchor + i) * c.p.num_kv_heads + head, c.p.state_size()));
      __syncthreads();
    }
    const Segment s = segment_at(c.p, c.a.cu_seqlens_k, c.p.key_length, first.slot + i);
    for (int64_t k = s.begin; k < s.begin + s.tokens; ++k)
      token.advance(s.batch, head, k, k, t.S);
  }
  store_state(c.n, own, state_at(c.a.final, c.n, blockIdx.x));
}

size_t shared_bytes(const Plan& n, bool holds_state) {
  size_t bytes;
  TokenTiles(n, holds_state, nullptr, &bytes);
  return bytes;
}

}  // namespace

template <class T>
void step(const Problem& problem, const Arguments& args, Launcher& launch) {
  const auto call = make_call<Call<T, 0>>(problem, args);
  launch("step", step_kernel<Call<T, 0>>, problem.batch * problem.num_kv_heads, call.n.threads,
         shared_bytes(call.n, false), call);
}

template <class T>
void recurrent_forward(const Problem& problem, const Arguments& args, Launcher& launch) {
  const auto call = make_call<Call<T, 0>>(problem, args);
  launch("recurrent_forward", recurrent_kernel<Call<T, 0>>, problem.state_batch() * problem.num_kv_heads,
         call.n.threads, shared_bytes(call.n, true), call);
}

template <class T>
cudaError_t why_not_here() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, step_kernel<Call<T, 0>>);
}

template cudaError_t why_not_here<FASTATTN_DTYPE>();
template void step<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);
template void recurrent_forward<FASTATTN_DTYPE>(const Problem&, const Arguments&, Launcher&);

}  // namespace fastattn::cuda
