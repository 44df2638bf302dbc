// Vectors of 32-bit floats of one register, and what the kernel does with them: AVX-512 or AVX2.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define INLINE inline __attribute__((always_inline))

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
INLINE Vec nearest(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec times_power(Vec x, Vec whole) { return _mm512_scalef_ps(x, whole); }
INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
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
INLINE Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
INLINE Vec times_power(Vec x, Vec whole) {
  // The power of two by its exponent; -127 is zero.
  __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return mul(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

#endif

// 2^x of x <= 0 and little above; zero below -127. Polynomials of least relative error on [-1/2, 1/2]: 2e-9, and
// 3e-6 where the result is rounded to bfloat16.
template <bool ROUGH>
INLINE Vec exp2(Vec x) {
  x = larger(all(-127.0f), x);
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
  return times_power(y, whole);
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

INLINE void narrow(float x, float* to) { *to = x; }
INLINE void narrow(float x, Half* to) { to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
INLINE void narrow(float x, Bfloat* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To the nearest, ties to even; NaN stays one.
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  to->bits = x == x ? uint16_t(rounded) : uint16_t(0x7FC0);
}
