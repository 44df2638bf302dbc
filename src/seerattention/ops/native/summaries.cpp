// Summaries of blocks of tokens, see "The gate's scores on a CPU" in docs/kernels.md: a few blocks of one head at a
// time are pooled, projected, normalised and rotated, so that tokens are read once and nothing between is kept.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "vectors.h"

// What a call is told; the same fields in the same order in summarise_blocks/native.py.
struct Summaries {
  const void* x;          // [B, H, T, D]
  void* out;              // [B, Ho, N, E]
  const float* weight;    // [Ho, merge * pools * D, padded], or null
  const float* norm;      // [E], or null
  const float *cos, *sin; // [B or 1, N, E], or null
  const int32_t* edges;   // [2, N], where blocks begin and end, or null where they have one size
  int64_t strides[3];
  int64_t batch, heads, tokens, dim, heads_out, blocks, width, padded, size, merge, turn_stride;
  int64_t max_at, min_at, avg_at, pools, x_dtype, out_dtype, threads;
  double eps;
};

namespace {

// Blocks that are projected together: 16 registers of sums of 32, or 8 of 16.
constexpr int TOGETHER = LANES == 16 ? 8 : 4;

// Some of the lanes, from or to memory that ends after them.
template <typename T>
INLINE Vec load_some(const T* from, int64_t count) {
  if (count >= LANES) return load_wide(from);
  T lanes[LANES] = {};
  std::copy_n(from, count, lanes);
  return load_wide(lanes);
}
template <typename T>
INLINE void store_some(T* to, Vec x, int64_t count) {
  if (count >= LANES) return store_narrow(to, x);
  T lanes[LANES];
  store_narrow(lanes, x);
  std::copy_n(lanes, count, to);
}

// The pools of one block of one head, behind one another as they are wanted.
template <typename T>
void pool(const Summaries& call, const T* x, int64_t first, int64_t end, float* to) {
  const Vec share = all(1.0f / float(end - first));
  const T* block = x + first * call.strides[2];
  for (int64_t d = 0; d < call.dim; d += LANES) {
    const int64_t count = call.dim - d;
    Vec high = load_some(block + d, count), low = high, total = high;
    for (int64_t token = 1; token < end - first; ++token) {
      const Vec next = load_some(block + token * call.strides[2] + d, count);
      high = larger(high, next);
      low = smaller(low, next);
      total = add(total, next);
    }
    if (call.max_at >= 0) store_some(to + call.max_at * call.dim + d, high, count);
    if (call.min_at >= 0) store_some(to + call.min_at * call.dim + d, low, count);
    if (call.avg_at >= 0) store_some(to + call.avg_at * call.dim + d, mul(total, share), count);
  }
}

// V registers of columns of the product of TOGETHER rows and a matrix.
template <int V>
APART void project(const float* rows, int64_t depth, const float* weight, int64_t padded, float* to) {
  Vec sums[TOGETHER][V];
#pragma GCC unroll 8
  for (int m = 0; m < TOGETHER; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[m][v] = all(0.0f);
  for (int64_t n = 0; n < depth; ++n, weight += padded) {
#pragma GCC unroll 8
    for (int m = 0; m < TOGETHER; ++m)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[m][v] = fma(all(rows[m * depth + n]), load(weight + v * LANES), sums[m][v]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < TOGETHER; ++m)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(to + m * padded + v * LANES, sums[m][v]);
}

// Normalise and rotate one summary and round it.
template <typename O>
void finish(const Summaries& call, float* x, const float* cos, const float* sin, O* to) {
  const int64_t width = call.width, half = width / 2;
  if (call.norm) {
    double square = 0;
    for (int64_t e = 0; e < width; ++e) square += double(x[e]) * x[e];
    const float factor = float(1 / std::sqrt(square / double(width) + call.eps));
    for (int64_t e = 0; e < width; ++e) x[e] *= factor * call.norm[e];
  }
  if (call.cos)
    for (int64_t e = 0; e < half; ++e) {
      const float first = x[e], second = x[half + e];
      x[e] = first * cos[e] - second * sin[e];
      x[half + e] = second * cos[half + e] + first * sin[half + e];
    }
  for (int64_t e = 0; e < width; e += LANES) store_some(to + e, load_some(x + e, width - e), width - e);
}

// What one thread works in.
struct Room {
  std::vector<float> pools, projected;
};

template <typename T, typename O>
void summarise_some(const Summaries& call, int64_t b, int64_t head, int64_t first, int64_t count, Room& room) {
  const int64_t depth = call.merge * call.pools * call.dim, heads = call.heads / call.merge;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t m = 0; m < call.merge; ++m) {
      const int64_t block = first + i, begin = call.edges ? call.edges[block] : block * call.size;
      const int64_t end = call.edges ? call.edges[call.blocks + block] : std::min(begin + call.size, call.tokens);
      const T* x = static_cast<const T*>(call.x) + b * call.strides[0] + (head * call.merge + m) * call.strides[1];
      pool(call, x, begin, end, room.pools.data() + i * depth + m * call.pools * call.dim);
    }
  const int64_t each = call.weight ? call.heads_out / heads : 1;
  for (int64_t group = 0; group < each; ++group) {
    const int64_t head_out = head * each + group, row = call.weight ? call.padded : depth;
    float* made = call.weight ? room.projected.data() : room.pools.data();
    if (call.weight) {
      const float* weight = call.weight + head_out * depth * call.padded;
      int64_t e = 0;
      for (; e + 2 * LANES <= call.padded; e += 2 * LANES)
        project<2>(room.pools.data(), depth, weight + e, call.padded, made + e);
      for (; e < call.padded; e += LANES) project<1>(room.pools.data(), depth, weight + e, call.padded, made + e);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = ((b * call.heads_out + head_out) * call.blocks + first + i) * call.width;
      const int64_t turn = b * call.turn_stride + (first + i) * call.width;
      finish(call, made + i * row, call.cos + (call.cos ? turn : 0), call.sin + (call.sin ? turn : 0),
             static_cast<O*>(call.out) + at);
    }
  }
}

template <typename T, typename O>
void summarise(const Summaries& call) {
  const int64_t depth = call.merge * call.pools * call.dim, heads = call.heads / call.merge;
  const int64_t parts = (call.blocks + TOGETHER - 1) / TOGETHER;
  const Room empty{std::vector<float>(size_t(TOGETHER * depth)), std::vector<float>(size_t(TOGETHER * call.padded))};
  std::vector<Room> rooms(size_t(call.threads), empty);
#pragma omp parallel for num_threads(int(call.threads)) schedule(dynamic, 8)
  for (int64_t i = 0; i < call.batch * heads * parts; ++i) {
    const int64_t first = i % parts * TOGETHER, pair = i / parts;
    summarise_some<T, O>(call, pair / heads, pair % heads, first, std::min<int64_t>(TOGETHER, call.blocks - first),
                         rooms[size_t(omp_get_thread_num())]);
  }
}

template <typename T>
void summarise_to(const Summaries& call) {
  switch (call.out_dtype) {
    case 0: summarise<T, float>(call); break;
    case 1: summarise<T, Bfloat>(call); break;
    default: summarise<T, Half>(call); break;
  }
}

}  // namespace

// Returns 0, or 1 where memory is short.
extern "C" int seerattention_summarise(const Summaries* call) try {
  switch (call->x_dtype) {
    case 0: summarise_to<float>(*call); break;
    case 1: summarise_to<Bfloat>(*call); break;
    default: summarise_to<Half>(*call); break;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
