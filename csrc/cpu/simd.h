// The vector register of the instruction set this file is compiled for, as a plain value type.
// GCC/Clang vector extensions give arithmetic, comparison and selection; what is added here is
// loading, exp, reductions and the 16-bit formats. One source serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define FASTATTN_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTATTN_VECTOR_BYTES 32
#else
#define FASTATTN_VECTOR_BYTES 16
#endif

#define FASTATTN_INLINE inline __attribute__((always_inline))
#define FASTATTN_INLINE_LAMBDA __attribute__((always_inline))

namespace fastattn {
namespace FASTATTN_ISA {

template <class Real>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = FASTATTN_VECTOR_BYTES / 4;
  typedef float Vector __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
  typedef uint16_t Half __attribute__((vector_size(FASTATTN_VECTOR_BYTES / 2)));
};

template <>
struct Simd<double> {
  static constexpr int lanes = FASTATTN_VECTOR_BYTES / 8;
  typedef double Vector __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
  typedef int64_t Bits __attribute__((vector_size(FASTATTN_VECTOR_BYTES)));
};

template <class Real>
using Vector = typename Simd<Real>::Vector;

template <class Real>
constexpr int kLanes = Simd<Real>::lanes;

template <class Real>
FASTATTN_INLINE Vector<Real> load(const Real* p) {
  Vector<Real> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class Real>
FASTATTN_INLINE void store(Real* p, Vector<Real> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// x - 0 is x for every x, so this is one broadcast; x + 0 is not (of -0), and would be computed.
// v in the first n lanes, 0 in the others.
template <class Real>
FASTATTN_INLINE Vector<Real> first_lanes(int64_t n, Vector<Real> v) {
  using Bits = typename Simd<Real>::Bits;
  Bits lane;
  for (int i = 0; i < kLanes<Real>; ++i) lane[i] = i;
  const Bits end = Bits{} + static_cast<decltype(lane[0] + 0)>(n);
  return lane < end ? v : Vector<Real>{};
}

template <class Real>
FASTATTN_INLINE Vector<Real> splat(Real x) {
  return x - Vector<Real>{};
}

// body(0), ..., body(n - 1), each with its number as a constant: unrolled before the compiler
// decides what lives in registers.
template <class Body, int... I>
FASTATTN_INLINE void unroll(const Body& body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

template <int n, class Body>
FASTATTN_INLINE void unroll(const Body& body) {
  unroll(body, std::make_integer_sequence<int, n>{});
}

// a > b ? a : b, and a < b ? a : b: of a NaN and b, b. One instruction on x86, which GCC does not
// find by itself where b is zero.
template <class Real>
FASTATTN_INLINE Vector<Real> maximum(Vector<Real> a, Vector<Real> b) {
#if FASTATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm512_max_ps((__m512)a, (__m512)b);
  else return (Vector<Real>)_mm512_max_pd((__m512d)a, (__m512d)b);
#elif FASTATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm256_max_ps((__m256)a, (__m256)b);
  else return (Vector<Real>)_mm256_max_pd((__m256d)a, (__m256d)b);
#else
  return a > b ? a : b;
#endif
}

template <class Real>
FASTATTN_INLINE Vector<Real> minimum(Vector<Real> a, Vector<Real> b) {
#if FASTATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm512_min_ps((__m512)a, (__m512)b);
  else return (Vector<Real>)_mm512_min_pd((__m512d)a, (__m512d)b);
#elif FASTATTN_VECTOR_BYTES == 32
  if constexpr (sizeof(Real) == 4) return (Vector<Real>)_mm256_min_ps((__m256)a, (__m256)b);
  else return (Vector<Real>)_mm256_min_pd((__m256d)a, (__m256d)b);
#else
  return a < b ? a : b;
#endif
}

// Lanes of a and b, which count on from the last lane of a.
template <class Real, int... Lane>
FASTATTN_INLINE Vector<Real> shuffle(Vector<Real> a, Vector<Real> b,
                                     std::integer_sequence<int, Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Lane...);
#else
  return __builtin_shuffle(a, b, typename Simd<Real>::Bits{Lane...});
#endif
}

// One stage of a transpose: of two rows `Step` apart, the lanes that must change places do.
template <class Real, int Step, int... Lane>
FASTATTN_INLINE void exchange(Vector<Real>& a, Vector<Real>& b,
                              std::integer_sequence<int, Lane...>) {
  constexpr int L = kLanes<Real>;
  using Upper = std::integer_sequence<int, (Lane & Step ? L + (Lane ^ Step) : Lane)...>;
  using Lower = std::integer_sequence<int, (Lane & Step ? L + Lane : Lane ^ Step)...>;
  const Vector<Real> upper = shuffle<Real>(a, b, Upper{});
  b = shuffle<Real>(a, b, Lower{});
  a = upper;
}

template <class Real, int Step>
FASTATTN_INLINE void transpose_lanes(Vector<Real> (&rows)[kLanes<Real>]) {
  if constexpr (Step < kLanes<Real>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<Real>; ++i)
      if (!(i & Step))
        exchange<Real, Step>(rows[i], rows[i + Step],
                             std::make_integer_sequence<int, kLanes<Real>>{});
    transpose_lanes<Real, 2 * Step>(rows);
  }
}

// Reductions fold halves, so their order is fixed and the tree is shallow.
template <class Real>
FASTATTN_INLINE Real sum_lanes(Vector<Real> v) {
  Real x[kLanes<Real>];
  __builtin_memcpy(x, &v, sizeof v);
  for (int width = kLanes<Real> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

// Lane r is the sum of the lanes of rows[r]: a tree that halves the number of vectors at each stage.
template <class Real, int Step = 1>
FASTATTN_INLINE Vector<Real> sums_of_lanes(Vector<Real> (&rows)[kLanes<Real>]) {
  if constexpr (Step == kLanes<Real>) {
    return rows[0];
  } else {
    unroll<kLanes<Real> / (2 * Step)>([&](auto i) FASTATTN_INLINE_LAMBDA {
      Vector<Real>&a = rows[2 * i * Step], &b = rows[(2 * i + 1) * Step];
      exchange<Real, Step>(a, b, std::make_integer_sequence<int, kLanes<Real>>{});
      a += b;
    });
    return sums_of_lanes<Real, 2 * Step>(rows);
  }
}

template <class Real>
FASTATTN_INLINE Real max_lanes(Vector<Real> v) {
  Real x[kLanes<Real>];
  __builtin_memcpy(x, &v, sizeof v);
  for (int width = kLanes<Real> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
}

// e^x for x <= 88 (float) or 709 (double), 0 below the smallest normal number; within 1 ulp of the
// rounded result. x = n ln2 + r, e^x = 2^n p(r); adding 1.5 * 2^mantissa rounds n to an integer and
// leaves it in the low bits, from where it is added to the exponent of p. A NaN stays one: the maximum
// passes it on, whose own bits would end up in the exponent. The polynomial is summed in pairs: how long
// one exp takes bounds how many are under way.
FASTATTN_INLINE Vector<float> exp(Vector<float> x) {
  using V = Vector<float>;
  using Bits = Simd<float>::Bits;
  const V shifter = splat(12582912.0f);
  const V t = x * 1.44269504088896341f + shifter;
  const V n = t - shifter;
  V r = x - n * 0.693145751953125f;
  r = r - n * 1.428606765330187045e-06f;
  const V r2 = r * r;
  const V high = r * 1.9875691500e-4f + 1.3981999507e-3f;
  const V middle = r * 8.3334519073e-3f + 4.1665795894e-2f;
  const V low = r * 1.6666665459e-1f + 5.0000001201e-1f;
  const V p = ((high * r2 + middle) * r2 + low) * r2 + r + 1.0f;
  Bits bits, exponent;
  __builtin_memcpy(&bits, &p, sizeof p);
  __builtin_memcpy(&exponent, &t, sizeof t);
  bits += exponent << 23;  // the shifter's own bits leave on the left
  V result;
  __builtin_memcpy(&result, &bits, sizeof bits);
  return x >= -87.33f ? result : maximum<float>(V{}, x);
}

// e^x within 4e-6 of itself, for what is rounded to bf16 (2e-3) anyway; otherwise as above, but of
// x < -87 it is e^-87. Half of the work.
FASTATTN_INLINE Vector<float> exp_for_bf16(Vector<float> x) {
  using V = Vector<float>;
  using Bits = Simd<float>::Bits;
  const V shifter = splat(12582912.0f);
  x = maximum<float>(splat(-87.0f), x);
  const V t = x * 1.44269504088896341f + shifter;
  const V r = x - (t - shifter) * 0.693147180559945309f;
  const V p = (((r * 4.1513683e-2f + 0.16787592f) * r + 0.5000302f) * r + 0.99996677f) * r + 1.0f;
  Bits bits, exponent;
  __builtin_memcpy(&bits, &p, sizeof p);
  __builtin_memcpy(&exponent, &t, sizeof t);
  bits += exponent << 23;
  V result;
  __builtin_memcpy(&result, &bits, sizeof bits);
  return result;
}

FASTATTN_INLINE Vector<double> exp(Vector<double> x) {
  using V = Vector<double>;
  using Bits = Simd<double>::Bits;
  const V shifter = splat(6755399441055744.0);
  const V t = x * 1.4426950408889634074 + shifter;
  const V n = t - shifter;
  V r = x - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  V p = splat(1.0 / 6227020800.0);
  constexpr double coefficient[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                    1.0 / 40320,     1.0 / 5040,     1.0 / 720,     1.0 / 120,
                                    1.0 / 24,        1.0 / 6,        1.0 / 2};
  for (double c : coefficient) p = p * r + c;
  p = p * (r * r) + r + 1.0;
  Bits exponent;
  __builtin_memcpy(&exponent, &t, sizeof t);
  exponent = (exponent << 52) + (int64_t{1023} << 52);
  V power;
  __builtin_memcpy(&power, &exponent, sizeof power);
  return x < -708.0 ? V{} : p * power;
}

// ---- 16-bit formats -----------------------------------------------------------------------------

FASTATTN_INLINE float bf16_to_float(uint16_t h) {
  const uint32_t bits = uint32_t{h} << 16;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

FASTATTN_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

FASTATTN_INLINE Vector<float> load_bf16(const uint16_t* p) {
  Simd<float>::Half half;
  __builtin_memcpy(&half, p, sizeof half);
  const auto bits = __builtin_convertvector(half, Simd<float>::Unsigned) << 16;
  Vector<float> v;
  __builtin_memcpy(&v, &bits, sizeof v);
  return v;
}

// Round to nearest even, NaN kept quiet.
FASTATTN_INLINE Simd<float>::Unsigned round_to_bf16(Vector<float> v) {
  Simd<float>::Unsigned bits;
  __builtin_memcpy(&bits, &v, sizeof v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto quiet = (bits >> 16) | 0x40u;
  return v == v ? rounded : quiet;
}

FASTATTN_INLINE void store_bf16(uint16_t* p, Vector<float> v) {
#if defined(__AVX512BF16__)
  const auto half = _mm512_cvtneps_pbh((__m512)v);  // numbers below 1.2e-38 become 0
#else
  const auto half = __builtin_convertvector(round_to_bf16(v), Simd<float>::Half);
#endif
  __builtin_memcpy(p, &half, sizeof half);
}

#if defined(__F16C__)
FASTATTN_INLINE float f16_to_float(uint16_t h) { return _cvtsh_ss(h); }
FASTATTN_INLINE uint16_t float_to_f16(float x) {
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
FASTATTN_INLINE float f16_to_float(uint16_t h) {
  __fp16 x;
  __builtin_memcpy(&x, &h, sizeof h);
  return static_cast<float>(x);
}
FASTATTN_INLINE uint16_t float_to_f16(float value) {
  const __fp16 x = static_cast<__fp16>(value);
  uint16_t h;
  __builtin_memcpy(&h, &x, sizeof h);
  return h;
}
#else
// No conversion instruction: exponents are re-based by a multiplication, which also makes
// subnormals right; overflow and NaN are handled apart.
FASTATTN_INLINE float f16_to_float(uint16_t h) {
  uint32_t bits = uint32_t{h & 0x7fffu} << 13;
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  x *= 0x1p112f;
  __builtin_memcpy(&bits, &x, sizeof x);
  if ((h & 0x7c00u) == 0x7c00u) bits |= 0x7f800000u;
  bits |= uint32_t{h & 0x8000u} << 16;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}
FASTATTN_INLINE uint16_t float_to_f16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal in half: let the float adder round
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    x += 0.5f;
    __builtin_memcpy(&bits, &x, sizeof x);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | (bits >> 13));
}
#endif

FASTATTN_INLINE Vector<float> load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  __m256i half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vector<float>)_mm512_cvtph_ps(half);
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  __m128i half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vector<float>)_mm256_cvtph_ps(half);
#else
  float x[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) x[i] = f16_to_float(p[i]);
  return load(x);
#endif
}

FASTATTN_INLINE void store_f16(uint16_t* p, Vector<float> v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &half, sizeof half);
#elif defined(__F16C__) && FASTATTN_VECTOR_BYTES == 32
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  __builtin_memcpy(p, &half, sizeof half);
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = float_to_f16(v[i]);
#endif
}

}  // namespace FASTATTN_ISA
}  // namespace fastattn
