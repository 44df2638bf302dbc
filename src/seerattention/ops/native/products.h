// Products of what was packed in words: floats, or pairs of bfloat16 where the CPU multiplies these.
#pragma once

#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace {

constexpr double LOG2E = 1.4426950408889634;

// Rows of a panel: of 16 keys, or 16 numbers of values, each next to the other's, so that a row is an offset.
constexpr int PANEL = 16;

#ifdef __AVX512BF16__
constexpr bool PAIRS = true;
#else
constexpr bool PAIRS = false;
#endif

// Whether products are of pairs of bfloat16, or of floats.
template <typename T>
constexpr bool BY_PAIRS = PAIRS && std::is_same_v<T, Bfloat>;

// A word of packed keys and values: a float, or a pair.
template <bool PAIR>
using Word = std::conditional_t<PAIR, uint32_t, float>;

template <bool PAIR>
constexpr int PER_WORD = PAIR ? 2 : 1;

// c + a b, where a is one word for all lanes and b a register in memory.
INLINE Vec product(Vec c, float a, const float* b) { return fma(all(a), load(b), c); }
#ifdef __AVX512BF16__
INLINE Vec product(Vec c, uint32_t a, const uint32_t* b) {
  return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
}
#endif

// Return in sums the sum over n of left[n][m] right[n][lanes], for M rows of a panel and V registers of lanes.
template <int M, int V, typename W>
INLINE void multiply(Vec (&sums)[M][V], const W* left, int64_t count, const W* right, int64_t stride) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[m][v] = all(0.0f);
  for (int64_t n = 0; n < count; ++n, left += PANEL, right += stride) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[m][v] = product(sums[m][v], left[m], right + v * LANES);
    }
  }
}

// Lay LANES rows of words side by side, to[word * stride + row], with bits flipped.
template <typename T, typename RowAt>
INLINE void transpose_rows(const RowAt& row, int64_t words, Word<BY_PAIRS<T>>* to, int64_t stride, uint32_t flipped) {
  constexpr bool PAIR = BY_PAIRS<T>;
  int64_t word = 0;
  for (; word + LANES <= words; word += LANES) {
    Vec rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      const T* from = row(i) + word * PER_WORD<PAIR>;
      if constexpr (PAIR) rows[i] = load(reinterpret_cast<const float*>(from));
      else rows[i] = load_wide(from);
    }
    transpose(rows);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i)
      store(reinterpret_cast<float*>(to + (word + i) * stride), flip_bits(rows[i], flipped));
  }
  for (; word < words; ++word)
    for (int i = 0; i < LANES; ++i) {
      uint32_t bits;
      if constexpr (PAIR) std::memcpy(&bits, row(i) + 2 * word, 4);
      else {
        const float wide = widen(row(i)[word]);
        std::memcpy(&bits, &wide, 4);
      }
      bits ^= flipped;
      std::memcpy(to + word * stride + i, &bits, 4);
    }
}

}  // namespace
