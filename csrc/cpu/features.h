// phi on tiles of tokens, and the chain rule back through it.
//
// A tile of features has rows of F numbers padded with zeros. A masked key is a row of zeros: that
// is all a kernel needs to know of masks. phi is applied once, on the way from the source (which may
// be the tile itself) to the tile; the backward uses phi(x) itself (and, for cosine, 1/|x|) to form
// the derivative.
#pragma once

#include <cmath>
#include <limits>

#include "../feature_maps.h"
#include "matmul.h"
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

template <class Real, class Arith>
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

  // tile[r] = phi(scale source[r]); inverse_norm[r] = 1 / |scale q[r]| for cosine.
  void of_queries(int64_t rows, Rows<const Real> source, Real* tile, Real* inverse_norm) const {
    if (scale_ != Real{1}) {
      map(rows, source, tile, [=](V x) { return x * scale_; });
      source = {tile, width_};
    }
    if (map_ == FeatureMap::efficient)
      for_rows(rows, tile, [&](int64_t r, Real* row) { softmax_row(source[r], row); });
    else if (map_ == FeatureMap::exp && normalize_)
      for_rows(rows, tile,
               [&](int64_t r, Real* row) { exp_row(source[r], largest(source[r]), row); });
    else
      apply(rows, source, tile, inverse_norm);
  }

  // tile[r] = phi(source[r]), or 0 where masked.
  void of_keys(int64_t rows, MaskRow mask, const ColumnStatistics<Real>& columns,
               Rows<const Real> source, Real* tile, Real* inverse_norm) const {
    if (map_ == FeatureMap::efficient)
      for_rows(rows, tile, [&](int64_t r, Real* row) {
        for (int64_t i = 0; i < width_; i += L) {
          V x = Arith::exp(load(source[r] + i) - load(columns.maximum + i));
          if (columns.inverse_sum) x *= load(columns.inverse_sum + i);
          store(row + i, x);
        }
        clear_padding(row);
      });
    else
      apply(rows, source, tile, inverse_norm);
    if (!mask.data) return;
    for_rows(rows, tile, [&](int64_t r, Real* row) {
      if (mask.keeps(r)) return;
      zero(row, width_);
      inverse_norm[r] = 0;
    });
  }

  // maximum[i] = max over unmasked rows: exact, so its order does not matter.
  void raise_to_maximum(int64_t rows, MaskRow mask, Rows<const Real> source, Real* maximum) const {
    for (int64_t r = 0; r < rows; ++r) {
      if (!mask.keeps(r)) continue;
      const Real* row = source[r];
      for (int64_t i = 0; i < width_; i += L)
        store(maximum + i, fastattn::FASTATTN_ISA::maximum<Real>(load(maximum + i), load(row + i)));
    }
  }

  // Chain rule, in place: gradient holds d/dphi on entry and d/dq on return.
  void chain_queries(const Real* tile, const Real* inverse_norm, int64_t rows,
                     Real* gradient) const {
    if (map_ == FeatureMap::efficient)
      for_rows(rows, gradient, [&](int64_t r, Real* g) { chain_softmax(tile + r * width_, g); });
    else if (map_ == FeatureMap::exp && normalize_)  // the maximum cancels in num / den
      each(rows * width_, tile, gradient, [](V p, V d) { return p * d; });
    else
      chain(rows, tile, inverse_norm, gradient);
    if (scale_ != Real{1}) scale_row(gradient, scale_, rows * width_);
  }

  // The same for keys. column_sum[i] = sum_j phi(k_j)_i dphi(k_j)_i, for `efficient` only.
  void chain_keys(const Real* tile, const Real* inverse_norm, int64_t rows, MaskRow mask,
                  const Real* column_sum, Real* gradient) const {
    if (map_ == FeatureMap::efficient)
      for_rows(rows, gradient, [&](int64_t r, Real* g) {
        const Real* phi = tile + r * width_;
        for (int64_t i = 0; i < width_; i += L)
          store(g + i, load(phi + i) * (load(g + i) - load(column_sum + i)));
      });
    else
      chain(rows, tile, inverse_norm, gradient);
    if (!mask.data) return;
    for_rows(rows, gradient, [&](int64_t r, Real* g) {
      if (!mask.keeps(r)) zero(g, width_);
    });
  }

 private:
  // Maps that treat queries and keys alike.
  void apply(int64_t rows, Rows<const Real> source, Real* tile, Real* inverse_norm) const {
    const V nil{};
    switch (map_) {
      case FeatureMap::elu:
        map(rows, source, tile, [=](V x) {
          return phi_elu(Arith::exp(minimum<Real>(nil, x)), maximum<Real>(x, nil));
        });
        return clear_padding(rows, tile);
      case FeatureMap::relu:
        return map(rows, source, tile, [=](V x) { return phi_relu(x, nil); });
      case FeatureMap::exp:
        map(rows, source, tile, clamped_exp);
        return clear_padding(rows, tile);
      case FeatureMap::softmax:
        return for_rows(rows, tile, [&](int64_t r, Real* row) { softmax_row(source[r], row); });
      case FeatureMap::cosine:
        return for_rows(rows, tile, [&](int64_t r, Real* row) {
          cosine_row(source[r], row, inverse_norm + r);
        });
      default:  // identity
        if (source.data != tile) map(rows, source, tile, [](V x) { return x; });
    }
  }

  void chain(int64_t rows, const Real* tile, const Real* inverse_norm, Real* gradient) const {
    const V nil{}, one = splat(Real{1}), top = splat(static_cast<Real>(kExpOfClamp));
    switch (map_) {
      case FeatureMap::elu:
        return each(rows * width_, tile, gradient, [=](V p, V d) { return slope_elu(p, one) * d; });
      case FeatureMap::relu:
        return each(rows * width_, tile, gradient,
                    [=](V p, V d) { return slope_relu(p, nil, one) * d; });
      case FeatureMap::exp:
        return each(rows * width_, tile, gradient,
                    [=](V p, V d) { return slope_exp(p, nil, top) * d; });
      case FeatureMap::softmax:
        return for_rows(rows, gradient,
                        [&](int64_t r, Real* g) { chain_softmax(tile + r * width_, g); });
      case FeatureMap::cosine:
        return for_rows(rows, gradient, [&](int64_t r, Real* g) {
          chain_cosine(tile + r * width_, inverse_norm[r], g);
        });
      default:
        return;
    }
  }

  // body(r, row r of the tile)
  template <class Body>
  void for_rows(int64_t rows, Real* tile, const Body& body) const {
    for (int64_t r = 0; r < rows; ++r) body(r, tile + r * width_);
  }

  // tile = f(source), rows side by side as one long row.
  template <class Function>
  void map(int64_t rows, Rows<const Real> source, Real* tile, Function f) const {
    const bool one = source.stride == width_;
    const int64_t count = one ? 1 : rows, n = one ? rows * width_ : width_;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < n; i += L) store(tile + r * width_ + i, f(load(source[r] + i)));
  }

  // g = f(phi, g) for n numbers
  template <class Function>
  static void each(int64_t n, const Real* phi, Real* g, Function f) {
    for (int64_t i = 0; i < n; i += L) store(g + i, f(load(phi + i), load(g + i)));
  }

  void clear_padding(Real* row) const {
    for (int64_t i = features_; i < width_; ++i) row[i] = 0;
  }

  void clear_padding(int64_t rows, Real* tile) const {
    if (features_ == width_) return;
    for_rows(rows, tile, [&](int64_t, Real* row) { clear_padding(row); });
  }

  // max f(row[i]) over the features proper, not their padding. A NaN may be passed over.
  template <class Function>
  Real largest(const Real* row, Function f) const {
    const int64_t whole = head_dim_ / L * L;
    V top = f(load(row + (whole < head_dim_ ? whole : 0)));
    for (int64_t i = head_dim_ - whole; whole < head_dim_ && i < L; ++i) top[i] = top[0];
    for (int64_t i = 0; i < whole; i += L) top = maximum<Real>(f(load(row + i)), top);
    return max_lanes<Real>(top);
  }

  Real largest(const Real* row) const {
    return largest(row, [](V x) { return x; });
  }

  void exp_row(const Real* x, Real shift, Real* row) const {
    for (int64_t i = 0; i < width_; i += L) store(row + i, Arith::exp(load(x + i) - shift));
    clear_padding(row);
  }

  static FASTATTN_INLINE V clamped_exp(V x) {
    const V top = splat(static_cast<Real>(kExpOfClamp));
    return x > splat(static_cast<Real>(kExpClamp)) ? top : minimum<Real>(below(top), Arith::exp(x));
  }

  // The largest number under `top`, so that phi == top says "clamped" and nothing else does.
  static V below(V top) { return top * (Real{1} - std::numeric_limits<Real>::epsilon()); }

  void softmax_row(const Real* x, Real* row) const {
    exp_row(x, largest(x), row);
    V sum{};
    for (int64_t i = 0; i < width_; i += L) sum += load(row + i);
    scale_row(row, Real{1} / sum_lanes<Real>(sum), width_);
  }

  void chain_softmax(const Real* phi, Real* g) const {
    const Real mean = dot(phi, g, width_);
    each(width_, phi, g, [=](V p, V d) { return p * (d - mean); });
  }

  // Features [1, x / |x|]; a zero vector has no direction: [1, 0, ...], gradient 0. The row is
  // divided by its largest magnitude first, so that squares neither overflow nor vanish.
  void cosine_row(const Real* x, Real* row, Real* inverse_norm) const {
    const Real top = largest(x, [](V v) { return maximum<Real>(v, -v); });
    Real inverse = 0;
    if (top > static_cast<Real>(1e-12) / 32) {  // else the norm of up to 256 numbers is below 1e-12
      const Real scale = Real{1} / top;
      V sum{};
      for (int64_t i = 0; i < width_; i += L) sum += (load(x + i) * scale) * (load(x + i) * scale);
      const Real norm = top * std::sqrt(sum_lanes<Real>(sum));
      inverse = norm > static_cast<Real>(1e-12) ? Real{1} / norm : Real{0};
    }
    for (int64_t i = head_dim_; i > 0; --i) row[i] = x[i - 1] * inverse;  // x may be the row
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
