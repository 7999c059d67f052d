// phi on rows of tokens, a warp to a row, and the chain rule back through it. The elementwise part
// is csrc/feature_maps.h, shared with the CPU kernels.
//
// The tile's own phi gives the derivative, so a backward pass needs no second copy of its input. A
// masked key, and a row past the end, is a row of zeros: all that a kernel needs to know of masks.
#pragma once

#include "tile.cuh"

namespace fastattn::cuda {

// What the columns of keys share in the `efficient` map (softmax over the tokens): the maximum of
// every feature and, once it is known, 1 / sum of exp.
struct Columns {
  const float* maximum = nullptr;
  const float* inverse_sum = nullptr;
};

template <class E, class P>
struct Features {
  using Row = cuda::Row<P::kColumns>;

  FeatureMap map;
  const P& n;
  float scale;
  bool normalize;

  __device__ Features(const Problem& p, const P& plan)
      : map(p.feature_map), n(plan), scale(static_cast<float>(p.scale)), normalize(p.normalize) {}

  // The clamp of `exp` as the tile holds it, and a number that rounds to less: phi == top says
  // "clamped" and nothing else does.
  __device__ __forceinline__ static float top() {
    return to_float(from_float<E>(static_cast<float>(kExpOfClamp)));
  }
  __device__ __forceinline__ static float below_top() {
    return top() * (sizeof(E) == 2 ? 1 - 0x1p-7f : 1 - 0x1p-23f);
  }

  // phi(scale x) of one query to `out`; inverse_norm: 1 / |scale q| for cosine.
  __device__ __forceinline__ void of_query(Row& row, E* out, float* inverse_norm) const {
    row.each(n.head_dim, [&](int, float& x) { x *= scale; });
    if (map == FeatureMap::exp && normalize) {
      const float shift = largest(row);
      row.each(n.head_dim, [&](int, float& x) { x = expf(x - shift); });
    } else if (map == FeatureMap::exp) {
      clamped_exp(row);
    } else if (map == FeatureMap::efficient) {
      softmax(row);
    } else {
      apply(row, inverse_norm);
    }
    write(row, out);
  }

  __device__ __forceinline__ void of_key(Row& row, const Columns& columns, E* out,
                                         float* inverse_norm) const {
    if (map == FeatureMap::exp)
      clamped_exp(row);
    else if (map == FeatureMap::efficient)
      row.each(n.head_dim, [&](int i, float& x) {
        x = expf(x - columns.maximum[i]);
        if (columns.inverse_sum) x *= columns.inverse_sum[i];
      });
    else
      apply(row, inverse_norm);
    write(row, out);
  }

  __device__ __forceinline__ void zero(E* out, float* inverse_norm) const {
    for (int i = lane_index(); i < n.feature_width; i += 32) out[i] = from_float<E>(0.0f);
    if (lane_index() == 0) *inverse_norm = 0;
  }

  // The chain rule: dphi holds d/dphi, row receives d/dq.
  __device__ __forceinline__ void chain_query(const E* phi, const float* dphi, const float* inverse_norm,
                                              Row& row) const {
    if (map == FeatureMap::exp && normalize)  // the maximum cancels in num / den
      row.each(n.head_dim, [&](int i, float& d) { d = to_float(phi[i]) * dphi[i]; });
    else if (map == FeatureMap::exp)
      chain_clamped_exp(phi, dphi, row);
    else if (map == FeatureMap::efficient)
      chain_softmax(phi, dphi, row);
    else
      chain(phi, dphi, inverse_norm, row);
    row.each(n.head_dim, [&](int, float& d) { d *= scale; });
  }

  // column_sum[i] = sum_j phi(k_j)_i dphi(k_j)_i, for `efficient` only.
  __device__ __forceinline__ void chain_key(const E* phi, const float* dphi, const float* inverse_norm,
                                            const float* column_sum, Row& row) const {
    if (map == FeatureMap::exp)
      chain_clamped_exp(phi, dphi, row);
    else if (map == FeatureMap::efficient)
      row.each(n.head_dim, [&](int i, float& d) {
        d = to_float(phi[i]) * (dphi[i] - column_sum[i]);
      });
    else
      chain(phi, dphi, inverse_norm, row);
  }

 private:
  // Maps that treat queries and keys alike.
  __device__ __forceinline__ void apply(Row& row, float* inverse_norm) const {
    switch (map) {
      case FeatureMap::elu:
        row.each(n.head_dim, [&](int, float& x) {
          x = phi_elu(expf(x > 0 ? 0.0f : x), x > 0 ? x : 0.0f);
        });
        break;
      case FeatureMap::relu:
        row.each(n.head_dim, [&](int, float& x) { x = phi_relu(x, 0.0f); });
        break;
      case FeatureMap::softmax:
        softmax(row);
        break;
      case FeatureMap::cosine:
        direction(row, inverse_norm);
        break;
      default:  // identity
        break;
    }
  }

  __device__ __forceinline__ void chain(const E* phi, const float* dphi, const float* inverse_norm,
                                        Row& row) const {
    switch (map) {
      case FeatureMap::elu:
        row.each(n.head_dim, [&](int i, float& d) {
          d = slope_elu(to_float(phi[i]), 1.0f) * dphi[i];
        });
        break;
      case FeatureMap::relu:
        row.each(n.head_dim, [&](int i, float& d) {
          d = slope_relu(to_float(phi[i]), 0.0f, 1.0f) * dphi[i];
        });
        break;
      case FeatureMap::softmax:
        chain_softmax(phi, dphi, row);
        break;
      case FeatureMap::cosine: {  // (d - u (u . d)) / |x|; the constant feature has no x
        float along = 0;
        row.each(n.head_dim, [&](int i, float&) { along += to_float(phi[i + 1]) * dphi[i + 1]; });
        along = warp_sum(along);
        row.each(n.head_dim, [&](int i, float& d) {
          d = (dphi[i + 1] - to_float(phi[i + 1]) * along) * *inverse_norm;
        });
        break;
      }
      default:
        row.each(n.head_dim, [&](int i, float& d) { d = dphi[i]; });
    }
  }

  // Features to the tile; cosine's first is the constant 1. Zeros in the padding.
  __device__ __forceinline__ void write(Row& row, E* out) const {
    const int first = n.features - n.head_dim;
    row.each(n.head_dim, [&](int i, float& x) { out[first + i] = from_float<E>(x); });
    if (first && lane_index() == 0) out[0] = from_float<E>(1.0f);
    for (int i = n.features + lane_index(); i < n.feature_width; i += 32) out[i] = from_float<E>(0.0f);
  }

  __device__ __forceinline__ float largest(Row& row) const {
    float m = -INFINITY;
    row.each(n.head_dim, [&](int, float& x) { m = fmaxf(m, x); });
    return warp_max(m);
  }

  __device__ __forceinline__ void clamped_exp(Row& row) const {
    row.each(n.head_dim, [&](int, float& x) {
      const float e = expf(x);
      x = x > static_cast<float>(kExpClamp) ? top() : e > below_top() ? below_top() : e;
    });
  }

  __device__ __forceinline__ void chain_clamped_exp(const E* phi, const float* dphi,
                                                    Row& row) const {
    row.each(n.head_dim, [&](int i, float& d) {
      d = slope_exp(to_float(phi[i]), 0.0f, top()) * dphi[i];
    });
  }

  __device__ __forceinline__ void softmax(Row& row) const {
    const float shift = largest(row);
    float sum = 0;
    row.each(n.head_dim, [&](int, float& x) {
      x = expf(x - shift);
      sum += x;
    });
    const float inverse = 1.0f / warp_sum(sum);
    row.each(n.head_dim, [&](int, float& x) { x *= inverse; });
  }

  __device__ __forceinline__ void chain_softmax(const E* phi, const float* dphi, Row& row) const {
    float mean = 0;
    row.each(n.head_dim, [&](int i, float&) { mean += to_float(phi[i]) * dphi[i]; });
    mean = warp_sum(mean);
    row.each(n.head_dim, [&](int i, float& d) { d = to_float(phi[i]) * (dphi[i] - mean); });
  }

  // x / |x|; a zero vector has no direction. The row is divided by its largest magnitude first, so
  // that squares neither overflow nor vanish.
  __device__ __forceinline__ void direction(Row& row, float* inverse_norm) const {
    float largest = 0;
    row.each(n.head_dim, [&](int, float& x) { largest = fmaxf(largest, fabsf(x)); });
    largest = warp_max(largest);
    float inverse = 0;
    if (largest > 0) {
      float sum = 0;
      row.each(n.head_dim, [&](int, float& x) { sum += (x / largest) * (x / largest); });
      const float norm = largest * sqrtf(warp_sum(sum));
      inverse = norm > 1e-12f ? 1.0f / norm : 0.0f;
    }
    row.each(n.head_dim, [&](int, float& x) { x *= inverse; });
    if (lane_index() == 0) *inverse_norm = inverse;
  }
};

}  // namespace fastattn::cuda
