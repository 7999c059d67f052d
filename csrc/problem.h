// One description of a call, shared by every native kernel; it mirrors fastattn/ops/problem.py.
// Kernels take raw addresses, strides and sizes, so the library builds without torch and one
// build serves every torch version.
#pragma once

#include <cstdint>

namespace fastattn {

enum class DType : int32_t { f32, bf16, f16, f64 };

enum class FeatureMap : int32_t { elu, relu, identity, exp, softmax, cosine, efficient };

// automatic: each sequence as suits its length, where a kernel can tell them apart.
enum class Form : int32_t { automatic, chunked, recurrent };

// Sizes, types and switches of a call; no addresses. Names follow the Python Problem.
struct Problem {
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t query_length = 0;
  int64_t key_length = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  int64_t num_sequences = 0;  // packed sequences; 0: the batch is not packed
  DType dtype = DType::f32;
  FeatureMap feature_map = FeatureMap::elu;
  Form form = Form::automatic;
  bool is_causal = false;
  bool normalize = true;
  bool return_state = false;
  bool needs_grad = false;
  double scale = 1.0;
  double eps = 1e-6;

  constexpr int64_t feature_dim() const { return feature_map == FeatureMap::cosine ? head_dim + 1 : head_dim; }
  constexpr int64_t group() const { return num_heads / num_kv_heads; }
  constexpr int64_t state_batch() const { return num_sequences ? num_sequences : batch; }
  // Elements of one head's state: S (F, Dv) followed by z (F).
  constexpr int64_t state_size() const { return feature_dim() * (value_dim + 1); }
};

// A (batch, head, token, feature) tensor: address and strides in elements.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0, head = 0, token = 0, feature = 0;

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr int64_t offset(int64_t b, int64_t h, int64_t t) const { return b * batch + h * head + t * token; }
};

// S (state_batch, kv head, F, Dv) and z (state_batch, kv head, F), contiguous, accumulator type.
struct State {
  void* S = nullptr;
  void* z = nullptr;

  constexpr explicit operator bool() const { return S != nullptr; }
};

// Every address of a call. Null means absent.
struct Arguments {
  Strided query, key, value, out;                           // read; out: written by forward, step
  Strided grad_out, grad_query, grad_key, grad_value;       // backward
  const uint8_t* key_mask = nullptr;                        // bool (B, M)
  int64_t key_mask_batch = 0, key_mask_token = 0;           // its strides
  const int32_t* cu_seqlens = nullptr;                      // (num_sequences + 1)
  const int32_t* cu_seqlens_k = nullptr;
  State initial, final;                                     // step updates `initial` in place
  State grad_initial, grad_final;
  void* saved = nullptr;                                    // forward -> backward, see segments.h
  int threads = 1;
};

}  // namespace fastattn
