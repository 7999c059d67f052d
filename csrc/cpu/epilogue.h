// What becomes of a product's sums before they are written: an epilogue is given a vector of them, in
// row i from column j on, and gives what is stored in the result.
#pragma once

#include "simd.h"

namespace fastattn {
namespace FASTATTN_ISA {

// `reads_result`: it reads what was in the result before.
struct AsItIs {
  static constexpr bool reads_result = false;

  template <class Value>
  FASTATTN_INLINE Value operator()(int64_t, int64_t, Value sum) const {
    return sum;
  }
};

// Each row times a number.
template <class Real>
struct Scaled {
  static constexpr bool reads_result = false;
  const Real* factors;

  FASTATTN_INLINE Vector<Real> operator()(int64_t i, int64_t, Vector<Real> sum) const {
    return sum * factors[i];
  }
};

// The same row added to all.
template <class Real>
struct AddedRow {
  static constexpr bool reads_result = false;
  const Real* row;

  FASTATTN_INLINE Vector<Real> operator()(int64_t, int64_t j, Vector<Real> sum) const {
    return sum + load(row + j);
  }
};

// Added to the result, and to another matrix if there is one.
template <class Real>
struct AddedTo {
  static constexpr bool reads_result = true;
  const Real* result;
  Real* other;
  int64_t ld;  // of both

  FASTATTN_INLINE Vector<Real> operator()(int64_t i, int64_t j, Vector<Real> sum) const {
    const int64_t at = i * ld + j;
    if (other) store(other + at, load(other + at) + sum);
    return load(result + at) + sum;
  }
};

// What lies above the diagonal cleared, where row i is row first + i of the triangle; if `added`, a
// number is added to each row before.
template <class Real>
struct KeptLower {
  static constexpr bool reads_result = false;
  int64_t first;
  const Real* added;

  FASTATTN_INLINE Vector<Real> operator()(int64_t i, int64_t j, Vector<Real> sum) const {
    if (added) sum += added[i];
    return first_lanes<Real>(first + i + 1 - j, sum);
  }
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
