// Vectors of 32-bit floats of one register, and what the kernel does with them: AVX-512 or AVX2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))
// A loop by itself, so that what is around it takes none of its registers.
#define APART __attribute__((noinline))

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();

#ifdef __AVX512F__

constexpr int LANES = 16;
using Vec = __m512;

INLINE Vec load(const float* from) { return _mm512_loadu_ps(from); }
INLINE void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
INLINE Vec all(float x) { return _mm512_set1_ps(x); }
INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
INLINE Vec divide(Vec a, Vec b) { return _mm512_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Of two of which one is NaN the second: NaN must not vanish there.
INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
INLINE Vec smaller(Vec a, Vec b) { return _mm512_min_ps(a, b); }
INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^whole, zero where the exponent is below -127: what there is of a query that sees nothing.
INLINE Vec times_power(Vec x, Vec whole, Vec exponent) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(exponent, all(-127.0f), _CMP_NLT_UQ), x, whole);
}
INLINE Vec exponent_of(Vec x) { return x; }
INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

// One stage of a transposition: the two by two parts of HALF lanes of a and b change places.
template <int HALF>
INLINE void swap_parts(Vec& a, Vec& b) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(HALF));
  // Lanes from 16 on are those of b.
  const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - HALF));
  const __m512i high = _mm512_mask_add_epi32(
      _mm512_add_epi32(lane, _mm512_set1_epi32(HALF)), upper, lane, _mm512_set1_epi32(16)
  );
  const Vec first = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, high, b);
  a = first;
}
INLINE float largest_lane(Vec x) { return _mm512_reduce_max_ps(x); }
INLINE Vec flip_bits(Vec x, uint32_t which) {
  return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(x), _mm512_set1_epi32(int(which))));
}

#else

constexpr int LANES = 8;
using Vec = __m256;

INLINE Vec load(const float* from) { return _mm256_loadu_ps(from); }
INLINE void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
INLINE Vec all(float x) { return _mm256_set1_ps(x); }
INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
INLINE Vec divide(Vec a, Vec b) { return _mm256_div_ps(a, b); }
INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
INLINE Vec smaller(Vec a, Vec b) { return _mm256_min_ps(a, b); }
INLINE Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec times_power(Vec x, Vec whole, Vec) {
  // The power of two by its bits; -127 is zero.
  __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23)));
}
INLINE Vec exponent_of(Vec x) { return larger(all(-127.0f), x); }
INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
template <int HALF>
INLINE void swap_parts(Vec& a, Vec& b) {
  const Vec first = a, second = b;
  if constexpr (HALF == 4) {
    a = _mm256_permute2f128_ps(first, second, 0x20);
    b = _mm256_permute2f128_ps(first, second, 0x31);
  } else if constexpr (HALF == 2) {
    const __m256d x = _mm256_castps_pd(first), y = _mm256_castps_pd(second);
    a = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
    b = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
  } else {
    a = _mm256_blend_ps(first, _mm256_moveldup_ps(second), 0xAA);
    b = _mm256_blend_ps(_mm256_movehdup_ps(first), second, 0xAA);
  }
}
INLINE float largest_lane(Vec x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}
INLINE Vec flip_bits(Vec x, uint32_t which) { return _mm256_xor_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(int(which)))); }

#endif

template <int HALF>
INLINE void transpose_parts(Vec (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    if (!(i & HALF)) swap_parts<HALF>(rows[i], rows[i + HALF]);
  if constexpr (HALF > 1) transpose_parts<HALF / 2>(rows);
}
INLINE void transpose(Vec (&rows)[LANES]) { transpose_parts<LANES / 2>(rows); }

// 2^x of x <= 0 and little above; zero below -127. Polynomials of least relative error on [-1/2, 1/2]: 2e-9, and
// 3e-6 where the result is rounded to bfloat16.
template <bool ROUGH>
INLINE Vec exp2(Vec x) {
  x = exponent_of(x);
  const Vec whole = nearest(x), r = sub(x, whole);
  Vec y;
  if (ROUGH) {
    y = fma(all(0.009570102f), r, all(0.05591786f));
    y = fma(y, r, all(0.24024744f));
    y = fma(y, r, all(0.69312179f));
    y = fma(y, r, all(0.99999928f));
  } else {
    y = fma(all(1.53458119e-4f), r, all(1.33999314e-3f));
    y = fma(y, r, all(9.61848896e-3f));
    y = fma(y, r, all(5.55032878e-2f));
    y = fma(y, r, all(0.240226469f));
    y = fma(y, r, all(0.693147206f));
    y = fma(y, r, all(1.0f));
  }
  return times_power(y, whole, x);
}

// By its series near zero, elsewhere from e^(-2 |x|).
INLINE Vec tanh(Vec x) {
  const Vec square = mul(x, x), size = larger(sub(all(0.0f), x), x);
  Vec y = all(21844.0f / 6081075.0f);
  y = fma(y, square, all(-1382.0f / 155925.0f));
  y = fma(y, square, all(62.0f / 2835.0f));
  y = fma(y, square, all(-17.0f / 315.0f));
  y = fma(y, square, all(2.0f / 15.0f));
  y = fma(y, square, all(-1.0f / 3.0f));
  y = fma(mul(y, square), x, x);
  const Vec e = exp2<false>(mul(size, all(-2.885390082f)));
  const Vec far = divide(sub(all(1.0f), e), add(all(1.0f), e));
  return where_less(size, all(0.4f), y, where_less(x, all(0.0f), sub(all(0.0f), far), far));
}

// Elements as they lie in memory, and how they become floats and come from them.
struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

INLINE float widen(float x) { return x; }
INLINE float widen(Half x) { return _cvtsh_ss(x.bits); }
INLINE float widen(Bfloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

INLINE Vec load_wide(const float* from) { return load(from); }
INLINE void store_narrow(float* to, Vec x) { store(to, x); }

#ifdef __AVX512F__

INLINE Vec load_wide(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
INLINE Vec load_wide(const Bfloat* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
INLINE void store_narrow(Half* to, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

INLINE Vec load_wide(const Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
INLINE Vec load_wide(const Bfloat* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
INLINE void store_narrow(Half* to, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#endif

// To the nearest, ties to even; NaN stays one.
INLINE void store_narrow(Bfloat* to, Vec x) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x));
#else
  alignas(64) float wide[LANES];
  store(wide, x);
  for (int i = 0; i < LANES; ++i) {
    uint32_t bits;
    std::memcpy(&bits, wide + i, 4);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[i].bits = wide[i] == wide[i] ? uint16_t(rounded) : uint16_t(0x7FC0);
  }
#endif
}
