// Laying tiles out as operands of matmul. For plain arithmetic a tile already is one. For bf16
// pairs, two neighbours along the summed dimension share an element: neighbours along tokens (the
// sums S += phi(k)^T v) or along features (out = phi(q) S).
#pragma once

#include "matmul.h"
#include "tile.h"
#include "tiles.h"

namespace fastattn {
namespace FASTATTN_ISA {

template <class Arith>
struct Operand;

template <class Real>
struct Operand<Plain<Real>> {
  static constexpr int64_t per_element = 1;
  static constexpr bool copies = false;
  static constexpr int64_t elements(int64_t n) { return n; }
  // Room for packed copies, where there are any.
  template <class Scratch>
  static Real* take(Scratch&, int64_t) {
    return nullptr;
  }
  // The operand made of a tile earlier on: the tile, or its packed copy.
  static const Real* either(const Real* tile, const Real*) { return tile; }

  static const Real* pair_rows(const Real* tile, int64_t, int64_t, Real*) { return tile; }
  static const Real* pair_columns(const Real* tile, int64_t, int64_t, Real*) { return tile; }
  static const Real* pair_columns_transposed(const Real* tile, int64_t rows, int64_t columns,
                                             int64_t ld, Real* transposed, Real*, int64_t ldc) {
    transpose<Real>(rows, columns, tile, ld, transposed, ldc);
    return transposed;
  }
};

#if defined(__AVX512BF16__)
// Rows of pairs are padded with zeros to a multiple of Unit.
template <int64_t Unit>
struct PairedOperand {
  static constexpr int64_t per_element = 2;
  static constexpr bool copies = true;
  static constexpr int64_t elements(int64_t n) { return (n + 1) / 2; }
  template <class Scratch>
  static uint32_t* take(Scratch& scratch, int64_t size) {
    return scratch.template take<uint32_t>(size);
  }
  static const uint32_t* either(const float*, const uint32_t* packed) { return packed; }

  static FASTATTN_INLINE __m512i widen(Vector<float> v) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)v));
  }

  // packed[r][i] = (row 2r, row 2r + 1)[i], where row(r, i) is 16 bf16 in halves of 32 bits; past the
  // last row there are zeros.
  template <class Row>
  static const uint32_t* pair(int64_t rows, int64_t width, uint32_t* packed, const Row& row) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t i = 0; i < width; i += 16) {
        const __m512i low = row(r, i), high = r + 1 < rows ? row(r + 1, i) : _mm512_setzero_si512();
        _mm512_storeu_si512(packed + (r / 2) * width + i,
                            _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    const int64_t whole = (elements(rows) + Unit - 1) / Unit * Unit;
    __builtin_memset(packed + elements(rows) * width, 0,
                     static_cast<size_t>((whole - elements(rows)) * width) * sizeof *packed);
    return packed;
  }

  static const uint32_t* pair_rows(const float* tile, int64_t rows, int64_t width,
                                   uint32_t* packed) {
    return pair(rows, width, packed, [&](int64_t r, int64_t i) FASTATTN_INLINE_LAMBDA {
      return widen(load(tile + r * width + i));
    });
  }

  // Of a tensor's rows, where they lie.
  static const uint32_t* pair_rows(Rows<const uint16_t> source, int64_t rows, int64_t width,
                                   uint32_t* packed) {
    return pair(rows, width, packed, [&](int64_t r, int64_t i) FASTATTN_INLINE_LAMBDA {
      return _mm512_cvtepu16_epi32(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source[r] + i)));
    });
  }

  // packed[r][i] = (tile[r][2i], tile[r][2i + 1])
  static const uint32_t* pair_columns(const float* tile, int64_t rows, int64_t width,
                                      uint32_t* packed) {
    for (int64_t i = 0; i < rows * width; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(packed + i / 2),
                          (__m256i)_mm512_cvtneps_pbh((__m512)load(tile + i)));
    return packed;
  }

  // packed[i][r] = (tile[r][2i], tile[r][2i + 1]), in `pairs` behind what pair_columns gives.
  static const uint32_t* pair_columns_transposed(const float* tile, int64_t rows, int64_t,
                                                 int64_t ld, float*, uint32_t* pairs, int64_t ldc) {
    uint32_t* transposed = pairs + rows * (ld / 2);
    transpose<float>(rows, ld / 2, pair_columns(tile, rows, ld, pairs), ld / 2, transposed, ldc);
    return transposed;
  }
};

template <>
struct Operand<Bf16Pairs> : PairedOperand<1> {};
#endif

#if defined(FASTATTN_TILES)
template <>
struct Operand<Bf16Tiles> : PairedOperand<kTile> {};
#endif

// ---- a state held by a kernel -------------------------------------------------------------------

// S (F, Dv) with padded rows and z (F), in scratch.
template <class Real>
struct LocalState {
  Real* S;
  Real* z;
};

// Sizes every kernel needs, once.
template <class Real>
struct Sizes {
  explicit Sizes(const Problem& p)
      : group(p.group()),
        features(p.feature_dim()),
        values(p.value_dim),
        feature_width(padded<Real>(p.feature_dim())),
        value_width(padded<Real>(p.value_dim)) {}

  int64_t state_elements() const { return features * value_width; }

  // S has feature_width rows so that its transpose has whole vectors.
  int64_t state_stride() const { return feature_width * (value_width + 1); }

  // The state at `index` of an array of them, or in scratch.
  LocalState<Real> state_at(Real* data, int64_t index) const {
    Real* S = data + index * state_stride();
    return {S, S + feature_width * value_width};
  }

  void copy_state(LocalState<Real> target, LocalState<Real> source) const {
    copy(target.S, source.S, state_elements());
    copy(target.z, source.z, feature_width);
  }

  template <class Scratch>
  LocalState<Real> take_state(Scratch& scratch) const {
    return state_at(scratch.template take<Real>(state_stride()), 0);
  }

  void clear(LocalState<Real> state) const {
    zero(state.S, feature_width * value_width);
    zero(state.z, feature_width);
  }

  // sum += part
  void merge(LocalState<Real> sum, LocalState<Real> part) const {
    add(sum.S, part.S, state_elements());
    add(sum.z, part.z, feature_width);
  }

  // One step of an exclusive fold: part becomes the sum of all before it.
  void exchange_and_add(LocalState<Real> running, LocalState<Real> part) const {
    const auto each = [](Real* sum, Real* own, int64_t size) {
      for (int64_t i = 0; i < size; ++i) {
        const Real before = sum[i];
        sum[i] += own[i];
        own[i] = before;
      }
    };
    each(running.S, part.S, state_elements());
    each(running.z, part.z, feature_width);
  }

  // Reads head `index` of a contiguous (S, z), or zeros where there is none.
  void read(const State& source, int64_t index, LocalState<Real> state) const {
    clear(state);
    if (!source) return;
    const Real* S = static_cast<const Real*>(source.S) + index * features * values;
    for (int64_t f = 0; f < features; ++f) copy(state.S + f * value_width, S + f * values, values);
    copy(state.z, static_cast<const Real*>(source.z) + index * features, features);
  }

  void write(const State& target, int64_t index, LocalState<Real> state) const {
    if (!target) return;
    Real* S = static_cast<Real*>(target.S) + index * features * values;
    for (int64_t f = 0; f < features; ++f) copy(S + f * values, state.S + f * value_width, values);
    copy(static_cast<Real*>(target.z) + index * features, state.z, features);
  }

  // `saved` holds S and z of one head after another.
  State saved_state(void* saved, int64_t stride, int64_t index) const {
    Real* base = static_cast<Real*>(saved) + index * stride;
    return {base, base + features * values};
  }

  int64_t group, features, values, feature_width, value_width;
};

}  // namespace FASTATTN_ISA
}  // namespace fastattn
