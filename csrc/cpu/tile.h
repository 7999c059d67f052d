// Tiles: a few dozen tokens of one head, in the accumulator type, rows padded with zeros to whole
// vectors. Everything that touches a user's tensor (any strides, any of the four types) is here.
#pragma once

#include <type_traits>

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

// Bytes of the key mask of one run of tokens; absent: everybody takes part.
struct MaskRow {
  const uint8_t* data = nullptr;
  int64_t stride = 0;

  FASTATTN_INLINE bool keeps(int64_t token) const { return !data || data[token * stride]; }
};

// Rows of whole vectors in the accumulator type, in a tile or where they lie in a tensor.
template <class Real>
struct Rows {
  Real* data;
  int64_t stride;

  FASTATTN_INLINE Real* operator[](int64_t r) const { return data + r * stride; }
};

// Whether rows of n numbers of a tensor can be used where they lie.
template <class Real>
bool has_whole_vectors(const Strided& tensor, DType dtype, int64_t n) {
  return tensor.feature == 1 && element_size(dtype) == sizeof(Real) && n % kLanes<Real> == 0;
}

// The same, and they lie side by side as in a tile: a product reads such rows many times over, and
// rows a multiple of 1 KB apart would fight for the same lines of the cache.
template <class Real>
bool is_like_tile(const Strided& tensor, DType dtype, int64_t n) {
  return has_whole_vectors<Real>(tensor, dtype, n) && tensor.token == n;
}

template <class Real>
FASTATTN_INLINE Real* row_of(const Strided& tensor, int64_t batch, int64_t head, int64_t token) {
  return static_cast<Real*>(tensor.data) + tensor.offset(batch, head, token);
}

// body(dtype as a constant), of the types that kernels of Real read and write.
template <class Real, class Body>
FASTATTN_INLINE void with_dtype(DType dtype, const Body& body) {
  if constexpr (sizeof(Real) == 8) {
    body(std::integral_constant<DType, DType::f64>{});
  } else {
    if (dtype == DType::f32) return body(std::integral_constant<DType, DType::f32>{});
    if (dtype == DType::bf16) return body(std::integral_constant<DType, DType::bf16>{});
    body(std::integral_constant<DType, DType::f16>{});
  }
}

// Reads `rows` tokens of one head into a tile with rows of `width` numbers: n of them from memory,
// then zeros. Rows of masked keys are read as zeros, so that nothing in them (a NaN) can spread.
template <class Real>
void read_tile(const Strided& source, int64_t batch, int64_t head, int64_t token, int64_t rows,
               DType dtype, int64_t n, MaskRow mask, Real* tile, int64_t width) {
  const int64_t whole = source.feature == 1 ? n / kLanes<Real> * kLanes<Real> : 0;
  with_dtype<Real>(dtype, [&](auto type) FASTATTN_INLINE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r) {
      Real* row = tile + r * width;
      const int64_t offset = source.offset(batch, head, token + r);
      int64_t i = 0;
      if (mask.keeps(r)) {
        for (; i < whole; i += kLanes<Real>)
          store(row + i, read_vector(row, source.data, offset + i, type));
        for (; i < n; ++i)
          row[i] = read_element<Real>(source.data, offset + i * source.feature, type);
      }
      for (; i < width; ++i) row[i] = 0;
    }
  });
}

template <class Real>
void write_tile(const Strided& target, int64_t batch, int64_t head, int64_t token, int64_t rows,
                DType dtype, int64_t n, const Real* tile, int64_t width) {
  const int64_t whole = target.feature == 1 ? n / kLanes<Real> * kLanes<Real> : 0;
  with_dtype<Real>(dtype, [&](auto type) FASTATTN_INLINE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r) {
      const Real* row = tile + r * width;
      const int64_t offset = target.offset(batch, head, token + r);
      int64_t i = 0;
      for (; i < whole; i += kLanes<Real>)
        write_vector(target.data, offset + i, type, load(row + i));
      for (; i < n; ++i) write_element(target.data, offset + i * target.feature, type, row[i]);
    }
  });
}

// ---- small vector helpers -----------------------------------------------------------------------
// All on padded rows: n is a multiple of the vector length.

template <class Real>
FASTATTN_INLINE Real dot(const Real* a, const Real* b, int64_t n) {
  Vector<Real> sum{};
  for (int64_t i = 0; i < n; i += kLanes<Real>) sum = load(a + i) * load(b + i) + sum;
  return sum_lanes<Real>(sum);
}

// sums[r] = a[r] . b[r] for r < count, and 0 up to the next whole vector. Rows have n numbers; those
// of b are `b_stride` apart: 0 takes one row for all. Vectors of rows share one tree of additions,
// so a row's sum never depends on its place.
template <class Real>
void dots(const Real* a, const Real* b, int64_t b_stride, int64_t count, int64_t n, Real* sums) {
  constexpr int L = kLanes<Real>;
  for (int64_t r = 0; r < count; r += L) {
    Vector<Real> partial[L]{};
    const int64_t end = count - r < L ? count - r : L;
    for (int64_t i = 0; i < end; ++i)
      for (int64_t j = 0; j < n; j += L)
        partial[i] += load(a + (r + i) * n + j) * load(b + (r + i) * b_stride + j);
    store(sums + r, sums_of_lanes<Real>(partial));
  }
}

// sums[r] = y + rows[0] + ... + rows[r], for `count` rows of n numbers; y becomes the last of them.
// Without `Keep` only y is wanted.
template <bool Keep, class Real>
void running_sums(Real* y, const Real* rows, int64_t count, int64_t n, Real* sums) {
  constexpr int L = kLanes<Real>;
  const auto columns = [&](int64_t i, auto vectors) FASTATTN_INLINE_LAMBDA {
    Vector<Real> sum[vectors];
    unroll<vectors>([&](auto j) FASTATTN_INLINE_LAMBDA { sum[j] = load(y + i + j * L); });
    for (int64_t r = 0; r < count; ++r)
      unroll<vectors>([&](auto j) FASTATTN_INLINE_LAMBDA {
        sum[j] += load(rows + r * n + i + j * L);
        if constexpr (Keep) store(sums + r * n + i + j * L, sum[j]);
      });
    unroll<vectors>([&](auto j) FASTATTN_INLINE_LAMBDA { store(y + i + j * L, sum[j]); });
  };
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) columns(i, std::integral_constant<int, 4>{});
  for (; i < n; i += L) columns(i, std::integral_constant<int, 1>{});
}

// y += the sum of `count` rows of n numbers.
template <class Real>
void add_rows(Real* y, const Real* rows, int64_t count, int64_t n) {
  running_sums<false>(y, rows, count, n, static_cast<Real*>(nullptr));
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

template <class Real>
FASTATTN_INLINE void scale_row(Real* y, Real a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<Real>) store(y + i, load(y + i) * a);
}

// tile[r] = factors[r] rows[r], for `count` rows of n numbers.
template <class Real>
void scale_rows(Rows<const Real> rows, const Real* factors, int64_t count, int64_t n, Real* tile) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t i = 0; i < n; i += kLanes<Real>)
      store(tile + r * n + i, load(rows[r] + i) * factors[r]);
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
