// Tiles: a few dozen tokens of one head, in the accumulator type, rows padded with zeros to whole
// vectors. Everything that touches a user's tensor (any strides, any of the four types) is here.
#pragma once

#include "../problem.h"
#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>;
}

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// ---- rows ---------------------------------------------------------------------------------------

template <class Real>
FASTATTN_INLINE Real read_element(const void* data, int64_t index, DType dtype) {
  switch (dtype) {
    case DType::f32:
      return static_cast<Real>(static_cast<const float*>(data)[index]);
    case DType::f64:
      return static_cast<Real>(static_cast<const double*>(data)[index]);
    case DType::bf16:
      return static_cast<Real>(bf16_to_float(static_cast<const uint16_t*>(data)[index]));
    default:
      return static_cast<Real>(f16_to_float(static_cast<const uint16_t*>(data)[index]));
  }
}

template <class Real>
FASTATTN_INLINE void write_element(void* data, int64_t index, DType dtype, Real x) {
  switch (dtype) {
    case DType::f32:
      static_cast<float*>(data)[index] = static_cast<float>(x);
      break;
    case DType::f64:
      static_cast<double*>(data)[index] = static_cast<double>(x);
      break;
    case DType::bf16:
      static_cast<uint16_t*>(data)[index] = float_to_bf16(static_cast<float>(x));
      break;
    default:
      static_cast<uint16_t*>(data)[index] = float_to_f16(static_cast<float>(x));
  }
}

// float kernels read float32, bf16 and f16; double kernels read float64: whole vectors of those.
FASTATTN_INLINE Vector<float> read_vector(const float*, const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return load(static_cast<const float*>(data) + i);
  if (dtype == DType::bf16) return load_bf16(static_cast<const uint16_t*>(data) + i);
  return load_f16(static_cast<const uint16_t*>(data) + i);
}

FASTATTN_INLINE Vector<double> read_vector(const double*, const void* data, int64_t i, DType) {
  return load(static_cast<const double*>(data) + i);
}

FASTATTN_INLINE void write_vector(void* data, int64_t i, DType dtype, Vector<float> v) {
  if (dtype == DType::f32) return store(static_cast<float*>(data) + i, v);
  if (dtype == DType::bf16) return store_bf16(static_cast<uint16_t*>(data) + i, v);
  store_f16(static_cast<uint16_t*>(data) + i, v);
}

FASTATTN_INLINE void write_vector(void* data, int64_t i, DType, Vector<double> v) {
  store(static_cast<double*>(data) + i, v);
}

// n numbers at `offset` of a strided tensor, zeros up to `width`.
template <class Real>
void read_row(const Strided& source, int64_t offset, DType dtype, int64_t n,
                              Real* row, int64_t width) {
  int64_t i = 0;
  if (source.feature == 1)
    for (; i + kLanes<Real> <= n; i += kLanes<Real>)
      store(row + i, read_vector(row, source.data, offset + i, dtype));
  for (; i < n; ++i)
    row[i] = read_element<Real>(source.data, offset + i * source.feature, dtype);
  for (; i < width; ++i) row[i] = 0;
}

template <class Real>
void write_row(const Strided& target, int64_t offset, DType dtype, int64_t n,
                               const Real* row) {
  int64_t i = 0;
  if (target.feature == 1)
    for (; i + kLanes<Real> <= n; i += kLanes<Real>)
      write_vector(target.data, offset + i, dtype, load(row + i));
  for (; i < n; ++i) write_element(target.data, offset + i * target.feature, dtype, row[i]);
}

template <class Real>
void write_tile(const Strided& target, int64_t offset, DType dtype, int64_t rows, int64_t n,
                const Real* tile, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r)
    write_row(target, offset + r * target.token, dtype, n, tile + r * ld);
}

// Bytes of the key mask of one run of tokens; absent: everybody takes part.
struct MaskRow {
  const uint8_t* data = nullptr;
  int64_t stride = 0;

  FASTATTN_INLINE bool keeps(int64_t token) const { return !data || data[token * stride]; }
};

// A tile that may lie in the user's own memory: no copy where the layout already fits.
template <class Real>
struct TileView {
  const Real* data;
  int64_t ld;
};

// Rows of values. A masked key's value is read as zero, so that nothing in it (a NaN) can spread.
template <class Real>
TileView<Real> read_values(const Strided& source, int64_t offset, DType dtype, int64_t rows,
                           int64_t n, MaskRow mask, Real* tile, int64_t ld) {
  constexpr DType own = sizeof(Real) == 8 ? DType::f64 : DType::f32;
  if (dtype == own && source.feature == 1 && n == ld && !mask.data)
    return {static_cast<const Real*>(source.data) + offset, source.token};
  for (int64_t r = 0; r < rows; ++r) {
    if (mask.keeps(r))
      read_row(source, offset + r * source.token, dtype, n, tile + r * ld, ld);
    else
      for (int64_t i = 0; i < ld; ++i) tile[r * ld + i] = 0;
  }
  return {tile, ld};
}

// ---- small vector helpers -----------------------------------------------------------------------
// All on padded rows: n is a multiple of the vector length.

template <class Real>
FASTATTN_INLINE Real dot(const Real* a, const Real* b, int64_t n) {
  Vector<Real> sum{};
  for (int64_t i = 0; i < n; i += kLanes<Real>) sum = load(a + i) * load(b + i) + sum;
  return sum_lanes<Real>(sum);
}

// y += a x
template <class Real>
FASTATTN_INLINE void add_scaled(Real* y, const Real* x, Real a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(y + i, load(x + i) * a + load(y + i));
}

template <class Real>
FASTATTN_INLINE void add(Real* y, const Real* x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(y + i, load(x + i) + load(y + i));
}

// y = a + b
template <class Real>
FASTATTN_INLINE void sum_of(Real* y, const Real* a, const Real* b, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(y + i, load(a + i) + load(b + i));
}

template <class Real>
FASTATTN_INLINE void scale_row(Real* y, Real a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(y + i, load(y + i) * a);
}

template <class Real>
FASTATTN_INLINE void zero(Real* y, int64_t n) {
  __builtin_memset(y, 0, static_cast<size_t>(n) * sizeof(Real));
}

template <class Real>
FASTATTN_INLINE void copy(Real* y, const Real* x, int64_t n) {
  __builtin_memcpy(y, x, static_cast<size_t>(n) * sizeof(Real));
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
