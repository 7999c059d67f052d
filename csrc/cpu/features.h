// phi on tiles of tokens, and the chain rule back through it.
//
// A tile of features has rows of F numbers padded with zeros. A masked key is a row of zeros: that
// is all a kernel needs to know of masks. phi is applied once, on load; the backward uses phi(x)
// itself (and, for cosine, 1/|x|) to form the derivative.
#pragma once

#include <cmath>
#include <limits>

#include "../feature_maps.h"
#include "tile.h"

namespace fastattn {
namespace FASTATTN_ISA {

// What the columns of keys share in the `efficient` map (softmax over the tokens): the maximum of
// every feature and, once it is known, 1 / sum of exp. Null for the other maps.
template <class Real>
struct ColumnStatistics {
  const Real* maximum = nullptr;
  const Real* inverse_sum = nullptr;
};

template <class Real>
class Features {
 public:
  static constexpr int L = kLanes<Real>;
  using V = Vector<Real>;

  explicit Features(const Problem& problem)
      : map_(problem.feature_map),
        head_dim_(problem.head_dim),
        features_(problem.feature_dim()),
        width_(padded<Real>(problem.feature_dim())),
        scale_(static_cast<Real>(problem.scale)),
        normalize_(problem.normalize) {}

  // In place: tile[r] = phi(scale tile[r]); inverse_norm[r] = 1 / |scale q[r]| for cosine.
  void of_queries(int64_t rows, Real* tile, Real* inverse_norm) const {
    for (int64_t r = 0; r < rows; ++r) {
      Real* row = tile + r * width_;
      if (scale_ != Real{1}) scale_row(row, scale_, width_);
      switch (map_) {
        case FeatureMap::exp:
          if (normalize_)
            exp_row(row, largest(row));
          else
            clamped_exp_row(row);
          break;
        case FeatureMap::efficient:
          softmax_row(row);
          break;
        default:
          apply(row, inverse_norm + r);
      }
    }
  }

  // In place: tile[r] = phi(tile[r]), or 0 where masked.
  void of_keys(int64_t rows, MaskRow mask, const ColumnStatistics<Real>& columns, Real* tile,
               Real* inverse_norm) const {
    for (int64_t r = 0; r < rows; ++r) {
      Real* row = tile + r * width_;
      if (!mask.keeps(r)) {
        zero(row, width_);
        inverse_norm[r] = 0;
        continue;
      }
      switch (map_) {
        case FeatureMap::exp:
          clamped_exp_row(row);
          break;
        case FeatureMap::efficient:
          for (int64_t i = 0; i < width_; i += L) {
            V x = exp(load(row + i) - load(columns.maximum + i));
            if (columns.inverse_sum) x *= load(columns.inverse_sum + i);
            store(row + i, x);
          }
          clear_padding(row);
          break;
        default:
          apply(row, inverse_norm + r);
      }
    }
  }

  // maximum[i] = max over unmasked rows: exact, so its order does not matter.
  void raise_to_maximum(int64_t rows, MaskRow mask, const Real* tile, Real* maximum) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (!mask.keeps(r)) continue;
      const Real* row = tile + r * width_;
      for (int64_t i = 0; i < width_; i += L)
        store(maximum + i, fastattn::FASTATTN_ISA::maximum<Real>(load(maximum + i), load(row + i)));
    }
  }

  // Chain rule, in place: gradient holds d/dphi on entry and d/dq on return.
  void chain_queries(const Real* tile, const Real* inverse_norm, int64_t rows,
                     Real* gradient) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Real* phi = tile + r * width_;
      Real* g = gradient + r * width_;
      switch (map_) {
        case FeatureMap::exp:
          if (normalize_)
            each(phi, g, [](V p, V d) { return p * d; });  // the maximum cancels in num / den
          else
            chain_clamped_exp(phi, g);
          break;
        case FeatureMap::efficient:
          chain_softmax(phi, g);
          break;
        default:
          chain(phi, inverse_norm[r], g);
      }
      if (scale_ != Real{1}) scale_row(g, scale_, width_);
    }
  }

  // The same for keys. column_sum[i] = sum_j phi(k_j)_i dphi(k_j)_i, for `efficient` only.
  void chain_keys(const Real* tile, const Real* inverse_norm, int64_t rows, MaskRow mask,
                  const Real* column_sum, Real* gradient) const {
    for (int64_t r = 0; r < rows; ++r) {
      const Real* phi = tile + r * width_;
      Real* g = gradient + r * width_;
      if (!mask.keeps(r)) {
        zero(g, width_);
        continue;
      }
      switch (map_) {
        case FeatureMap::exp:
          chain_clamped_exp(phi, g);
          break;
        case FeatureMap::efficient:
          for (int64_t i = 0; i < width_; i += L)
            store(g + i, load(phi + i) * (load(g + i) - load(column_sum + i)));
          break;
        default:
          chain(phi, inverse_norm[r], g);
      }
    }
  }

 private:
  // Maps that treat queries and keys alike.
  void apply(Real* row, Real* inverse_norm) const {
    const V nil{}, one = splat(Real{1});
    switch (map_) {
      case FeatureMap::elu:
        for (int64_t i = 0; i < width_; i += L) {
          const V x = load(row + i);
          store(row + i, phi_elu(x, exp(minimum<Real>(x, nil)), nil, one));
        }
        clear_padding(row);
        break;
      case FeatureMap::relu:
        for (int64_t i = 0; i < width_; i += L) store(row + i, phi_relu(load(row + i), nil));
        break;
      case FeatureMap::softmax:
        softmax_row(row);
        break;
      case FeatureMap::cosine:
        cosine_row(row, inverse_norm);
        break;
      default:  // identity
        break;
    }
  }

  void chain(const Real* phi, Real inverse_norm, Real* g) const {
    const V nil{}, one = splat(Real{1});
    switch (map_) {
      case FeatureMap::elu:
        each(phi, g, [=](V p, V d) { return slope_elu(p, one) * d; });
        break;
      case FeatureMap::relu:
        each(phi, g, [=](V p, V d) { return slope_relu(p, nil, one) * d; });
        break;
      case FeatureMap::softmax:
        chain_softmax(phi, g);
        break;
      case FeatureMap::cosine:
        chain_cosine(phi, inverse_norm, g);
        break;
      default:
        break;
    }
  }

  template <class Function>
  void each(const Real* phi, Real* g, Function f) const {
    for (int64_t i = 0; i < width_; i += L) store(g + i, f(load(phi + i), load(g + i)));
  }

  void clear_padding(Real* row) const {
    for (int64_t i = features_; i < width_; ++i) row[i] = 0;
  }

  Real largest(const Real* row) const {
    Real m = row[0];
    for (int64_t i = 1; i < head_dim_; ++i) m = row[i] > m ? row[i] : m;
    return m;
  }

  void exp_row(Real* row, Real shift) const {
    for (int64_t i = 0; i < width_; i += L) store(row + i, exp(load(row + i) - shift));
    clear_padding(row);
  }

  void clamped_exp_row(Real* row) const {
    const V clamp = splat(static_cast<Real>(kExpClamp));
    const V top = splat(static_cast<Real>(kExpOfClamp));
    for (int64_t i = 0; i < width_; i += L) {
      const V x = load(row + i);
      store(row + i, x > clamp ? top : minimum<Real>(exp(x), below(top)));
    }
    clear_padding(row);
  }

  // The largest number under `top`, so that phi == top says "clamped" and nothing else does.
  static V below(V top) { return top * (Real{1} - std::numeric_limits<Real>::epsilon()); }

  void chain_clamped_exp(const Real* phi, Real* g) const {
    const V nil{}, top = splat(static_cast<Real>(kExpOfClamp));
    each(phi, g, [=](V p, V d) { return slope_exp(p, nil, top) * d; });
  }

  void softmax_row(Real* row) const {
    exp_row(row, largest(row));
    V sum{};
    for (int64_t i = 0; i < width_; i += L) sum += load(row + i);
    scale_row(row, Real{1} / sum_lanes<Real>(sum), width_);
  }

  void chain_softmax(const Real* phi, Real* g) const {
    const Real mean = dot(phi, g, width_);
    each(phi, g, [=](V p, V d) { return p * (d - mean); });
  }

  // Features [1, x / |x|]; a zero vector has no direction: [1, 0, ...], gradient 0. The row is
  // divided by its largest magnitude first, so that squares neither overflow nor vanish.
  void cosine_row(Real* row, Real* inverse_norm) const {
    Real top = 0;
    for (int64_t i = 0; i < head_dim_; ++i) top = std::fabs(row[i]) > top ? std::fabs(row[i]) : top;
    Real inverse = 0;
    if (top > 0) {
      Real sum = 0;
      for (int64_t i = 0; i < head_dim_; ++i) sum += (row[i] / top) * (row[i] / top);
      const Real norm = top * std::sqrt(sum);
      inverse = norm > static_cast<Real>(1e-12) ? Real{1} / norm : Real{0};
    }
    for (int64_t i = head_dim_; i > 0; --i) row[i] = row[i - 1] * inverse;
    row[0] = 1;
    *inverse_norm = inverse;
  }

  // d/dx = (d - u (u . d)) / |x| for u = x / |x|; the constant feature has no x.
  void chain_cosine(const Real* phi, Real inverse_norm, Real* g) const {
    Real along = 0;
    for (int64_t i = 1; i <= head_dim_; ++i) along += phi[i] * g[i];
    for (int64_t i = 0; i < head_dim_; ++i)
      g[i] = (g[i + 1] - phi[i + 1] * along) * inverse_norm;
    for (int64_t i = head_dim_; i < width_; ++i) g[i] = 0;
  }

  FeatureMap map_;
  int64_t head_dim_, features_, width_;
  Real scale_;
  bool normalize_;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
