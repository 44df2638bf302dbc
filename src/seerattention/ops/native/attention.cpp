// Block-sparse attention forward on x86-64, see "`native`" in docs/kernels.md.
//
// Queries lie along a register's lanes, so that a query's maximum and sum are elementwise and no register is ever
// added up across. Scores of a tile are S^T = K Q^T and its output is O^T = V^T P^T: the left factors, keys and values,
// are broadcast, one number or one pair of bfloat16 at a time.

#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

namespace {

// What one thread works in.
struct Room {
  alignas(64) float scores[TILE_K * TILE_Q];
  alignas(64) uint32_t shares[TILE_K / 2 * TILE_Q];  // pairs of bfloat16
  alignas(64) float out[MOST_DIM * TILE_Q];
  alignas(64) float queries[MOST_DIM * TILE_Q];      // or pairs
  alignas(64) float positions[TILE_Q];
};

// Ask for words that are needed soon: selected blocks lie apart, where no CPU guesses them.
template <typename W>
INLINE void prefetch(const W* from, int64_t words) {
  for (int64_t word = 0; word < words; word += 16) _mm_prefetch(reinterpret_cast<const char*>(from + word), _MM_HINT_T0);
}

// Attention of up to VECS registers of queries of one head. VECS registers are a power of two.
template <typename T, int VECS>
struct Tile {
  static constexpr bool PAIR = BY_PAIRS<T>;
  static constexpr int PER = PER_WORD<PAIR>, WIDTH = VECS * LANES;
  // Registers of sums, V across and M down: 16 of 32, or 12 of 16; one addition takes as long as 8.
  static constexpr int SUMS = LANES == 16 ? 16 : 12, V = LANES == 16 ? VECS : std::min(VECS, 2), M = SUMS / V;
  using W = Word<PAIR>;

  const Call& call;
  Room& room;
  Vec most[VECS], total[VECS], shrink[VECS];

  W* queries() { return reinterpret_cast<W*>(room.queries); }

  void take_queries(const T* q, int64_t count, int64_t position) {
    const uint32_t signs = call.scale < 0 ? (PAIR ? 0x80008000u : 0x80000000u) : 0;
    for (int lane = 0; lane < WIDTH; ++lane) room.positions[lane] = float(position + std::min<int64_t>(lane, count - 1));
    for (int v = 0; v < VECS; ++v) {
      // Missing queries are the last one again.
      const auto row = [&](int i) { return q + std::min<int64_t>(v * LANES + i, count - 1) * call.q_strides[2]; };
      transpose_rows<T>(row, call.dim / PER, queries() + v * LANES, WIDTH, signs);
    }
  }

  // Call for ROWS rows of a panel at a time, and for what is left of it.
  template <int ROWS, typename Do>
  INLINE static void by_rows(int64_t count, const Do& with) {
    for (int64_t n = 0; n < count; n += PANEL) {
#pragma GCC unroll 1
      for (int64_t m = 0; m + ROWS <= PANEL; m += ROWS) with(std::integral_constant<int, ROWS>(), n, m);
      if constexpr (PANEL % ROWS)
        with(std::integral_constant<int, PANEL % ROWS>(), n, int64_t(PANEL / ROWS * ROWS));
    }
  }

  // Scores of keys before the scale for ACROSS registers of queries, and each query's largest.
  template <int ROWS, int ACROSS>
  APART void score(const W* keys, int64_t count, int v0, Vec* largest, const W* soon) {
    const int64_t words = call.dim / PER;
    by_rows<ROWS>(count, [&](auto rows, int64_t n, int64_t m0) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::value;
      Vec sums[R][ACROSS];
      prefetch(soon + (n + m0) * words, R * words);
      multiply<R, ACROSS>(sums, keys + n * words + m0, words, queries() + v0 * LANES, WIDTH);
      float* at = room.scores + (n + m0) * WIDTH + v0 * LANES;
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < ACROSS; ++v) {
          store(at + m * WIDTH + v * LANES, sums[m][v]);
          largest[v0 + v] = larger(largest[v0 + v], sums[m][v]);
        }
    });
  }

  // Cap scores and hide those of keys later than their query; find the largest anew.
  void change(int64_t first_key, const int64_t (&counts)[VECS], bool late, float scale, Vec (&largest)[VECS]) {
    const float cap = float(call.softcap);
    for (int v = 0; v < VECS; ++v) {
      largest[v] = all(MINUS_INFINITY);
      const Vec position = load(room.positions + v * LANES);
      for (int64_t n = 0; n < counts[v]; ++n) {
        float* at = room.scores + n * WIDTH + v * LANES;
        Vec x = load(at);
        if (cap > 0) x = mul(tanh(mul(x, all(scale / cap))), all(cap));
        if (late) x = where_less(position, all(float(first_key + n)), all(MINUS_INFINITY), x);
        store(at, x);
        largest[v] = larger(largest[v], x);
      }
    }
  }

  // Turn scores into shares of the softmax so far.
  void share(const int64_t (&counts)[VECS], Vec factor, const Vec (&largest)[VECS]) {
    for (int v = 0; v < VECS; ++v) {
      const int64_t count = counts[v];
      const Vec before = most[v];
      most[v] = larger(before, mul(largest[v], factor));
      // A query that has seen nothing yet has no largest score to subtract.
      const Vec less = where_less(most[v], all(std::numeric_limits<float>::lowest()), all(0.0f), most[v]);
      const Vec minus = sub(all(0.0f), less);
      shrink[v] = exp2<false>(add(before, minus));
      // Several sums: fewer roundings each, and no addition waits for the one before.
      Vec sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
      float* at = room.scores + v * LANES;
      if constexpr (PAIR) {
#ifdef __AVX512BF16__
        const __m512i braid = _mm512_set_epi16(
            31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17,
            1, 16, 0
        );
        uint32_t* to = room.shares + v * LANES;
        for (int64_t n = 0; n < count; n += 8)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i, at += 2 * WIDTH, to += WIDTH) {
            const Vec low = exp2<true>(fma(load(at), factor, minus));
            const Vec high = exp2<true>(fma(load(at + WIDTH), factor, minus));
            sums[i] = add(sums[i], add(low, high));
            const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
            _mm512_storeu_si512(to, _mm512_permutexvar_epi16(braid, both));
          }
#endif
      } else {
        for (int64_t n = 0; n < count; n += 4)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i, at += WIDTH) {
            const Vec x = exp2<false>(fma(load(at), factor, minus));
            sums[i] = add(sums[i], x);
            store(at, x);
          }
      }
      total[v] = fma(total[v], shrink[v], add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    }
  }

  // Add what shares of values are for ACROSS registers of queries; values are of all keys, count are read.
  template <int ROWS, int ACROSS>
  APART void gather(const W* values, int64_t all_keys, int64_t count, int v0, const W* soon) {
    const W* shares;
    if constexpr (PAIR) shares = room.shares;
    else shares = room.scores;
    const int64_t depth = all_keys / PER;
    by_rows<ROWS>(call.dim, [&](auto rows, int64_t d, int64_t m0) __attribute__((always_inline)) {
      constexpr int R = decltype(rows)::value;
      Vec sums[R][ACROSS];
      prefetch(soon + (d + m0) * depth, R * depth);
      multiply<R, ACROSS>(sums, values + d * depth + m0, count / PER, shares + v0 * LANES, WIDTH);
      float* at = room.out + (d + m0) * WIDTH + v0 * LANES;
#pragma GCC unroll 16
      for (int m = 0; m < R; ++m)
#pragma GCC unroll 4
        for (int v = 0; v < ACROSS; ++v) {
          float* to = at + m * WIDTH + v * LANES;
          store(to, fma(load(to), shrink[v0 + v], sums[m][v]));
        }
    });
  }

  // Attend to keys that lie behind one another, of which the first is at first_key; those at soon are next.
  void read(const W* keys, const W* values, const W* soon, int64_t first_key, int64_t count, int64_t position,
            int64_t last, float scale, Vec factor) {
    Vec largest[VECS];
    int64_t counts[VECS];
    const bool late = first_key + count - 1 > position;
    for (int v = 0; v < VECS; ++v) {
      largest[v] = all(MINUS_INFINITY);
      // What a register's last query sees, in steps of 16 keys.
      const int64_t seen = std::min(position + (v + 1) * LANES - 1, last) - first_key + 1;
      counts[v] = std::min(count, std::max<int64_t>(0, (seen + 15) / 16 * 16));
    }
    if (late)
      for (int v = 0; v < VECS; ++v) score<SUMS, 1>(keys, counts[v], v, largest, values);
    else
      for (int v = 0; v < VECS; v += V) score<M, V>(keys, count, v, largest, values);
    if (late || call.softcap > 0) change(first_key, counts, late, scale, largest);
    share(counts, factor, largest);
    if (late)
      for (int v = 0; v < VECS; ++v) gather<SUMS, 1>(values, count, counts[v], v, soon);
    else
      for (int v = 0; v < VECS; v += V) gather<M, V>(values, count, count, v, soon);
  }

  void give(T* out, float* lse, int64_t count) {
    alignas(64) float sums[WIDTH], mosts[WIDTH];
    for (int v = 0; v < VECS; ++v) {
      store(sums + v * LANES, total[v]);
      store(mosts + v * LANES, most[v]);
      // A query that saw nothing gets zeros.
      const Vec some = where_less(all(0.0f), total[v], total[v], add(total[v], all(1.0f)));
      const Vec part = divide(all(1.0f), some);
      for (int64_t d = 0; d < call.dim; d += LANES) {
        Vec rows[LANES];
        for (int i = 0; i < LANES; ++i) rows[i] = mul(load(room.out + (d + i) * WIDTH + v * LANES), part);
        transpose(rows);
        for (int i = 0; i < LANES && v * LANES + i < count; ++i)
          store_narrow(out + (v * LANES + i) * call.out_strides[2] + d, rows[i]);
      }
    }
    if (lse)
      for (int64_t lane = 0; lane < count; ++lane)
        lse[lane] = float(mosts[lane] / LOG2E + std::log(double(sums[lane])));
  }

  void run(const Row& row, int64_t skip, int64_t count, int64_t b, int64_t head, const int32_t* bits, const W* keys,
           const W* values) {
    const int64_t position = row.position + skip, query = row.query + skip, last = position + count - 1;
    take_queries(
        static_cast<const T*>(call.q) + b * call.q_strides[0] + head * call.q_strides[1] + query * call.q_strides[2],
        count, position
    );
    const Vec start = all(call.sinks ? float(call.sinks[head] * LOG2E) : MINUS_INFINITY);
    for (int v = 0; v < VECS; ++v) {
      most[v] = start;
      total[v] = all(call.sinks ? 1.0f : 0.0f);
    }
    std::memset(room.out, 0, size_t(call.dim * WIDTH) * sizeof(float));
    // A scale of zero: minus infinity times it must stay what it is.
    const float scale = std::max(float(std::abs(call.scale)), std::numeric_limits<float>::min());
    const Vec factor = all(float(LOG2E * (call.softcap > 0 ? 1.0 : double(scale))));
    const int64_t size = call.block_k * call.dim / PER;
    for (int64_t block = next_block(bits, row, 0); block < row.blocks;) {
      const int64_t next = next_block(bits, row, block + 1);
      const W *k = keys + (row.block + block) * size, *v = values + (row.block + block) * size;
      for (int64_t n = 0; n < call.block_k; n += TILE_K) {
        const int64_t key = block * call.block_k + n, some = std::min<int64_t>(TILE_K, call.block_k - n);
        if (key > last) break;
        const bool more = n + TILE_K < call.block_k;
        const int64_t at = n * call.dim / PER, soon = more ? at + TILE_K * call.dim / PER : (next - block) * size;
        read(k + at, v + at, k + soon, key, some, position, last, scale, factor);
      }
      block = next;
    }
    T* out = static_cast<T*>(call.out) + b * call.out_strides[0] + head * call.out_strides[1];
    float* lse = call.lse ? call.lse + (b * call.heads + head) * call.queries + query : nullptr;
    give(out + query * call.out_strides[2], lse, count);
  }
};

template <typename T>
void attend(const Call& call) {
  using W = Word<BY_PAIRS<T>>;
  const Plan plan = plan_of(call);
  const int64_t group = call.heads / call.kv_heads, pairs = call.batch * call.kv_heads;
  const int64_t blocks = int64_t(plan.blocks.size()), per_block = call.block_k * call.dim / PER_WORD<BY_PAIRS<T>>;
  // As few KV heads at a time as keep all threads busy: the packed ones stay in cache.
  const int64_t wanted = (16 * call.threads + group * call.rows - 1) / (group * call.rows);
  const int64_t together = std::min(pairs, std::max<int64_t>(1, wanted));
  std::unique_ptr<W[]> keys(new W[size_t(together * blocks * per_block)]);
  std::unique_ptr<W[]> values(new W[size_t(together * blocks * per_block)]);
  std::vector<uint8_t> read(size_t(together * blocks));
  std::unique_ptr<Room[]> rooms(new Room[size_t(call.threads)]);
  for (int64_t first = 0; first < pairs; first += together) {
    const int64_t now = std::min(together, pairs - first);
    std::fill(read.begin(), read.end(), uint8_t(0));
    for (int64_t p = 0; p < now; ++p)
      mark_read(call, plan, (first + p) / call.kv_heads, (first + p) % call.kv_heads, read.data() + p * blocks);
#pragma omp parallel num_threads(int(call.threads))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < now * blocks; ++i) {
        if (!read[size_t(i)]) continue;
        const int64_t b = (first + i / blocks) / call.kv_heads, h = (first + i / blocks) % call.kv_heads;
        const Block& at = plan.blocks[size_t(i % blocks)];
        with_tokens<T>(call, call.k, call.k_strides, b, h, at, [&](const auto& token) {
          pack_keys<T>(token, at.count, call.block_k, call.dim, keys.get() + i * per_block);
        });
        with_tokens<T>(call, call.v, call.v_strides, b, h, at, [&](const auto& token) {
          pack_values<T>(token, at.count, call.block_k, call.dim, values.get() + i * per_block);
        });
      }
      Room& room = rooms[size_t(omp_get_thread_num())];
      // Late rows first: they read most, and the end should consist of short ones.
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < now * group * call.rows; ++i) {
        const int64_t row = call.rows - 1 - i / (now * group), p = i % (now * group) / group;
        const int64_t b = (first + p) / call.kv_heads, h = (first + p) % call.kv_heads * group + i % group;
        const int32_t* bits = bits_of(call, b, h, row);
        const W *k = keys.get() + p * blocks * per_block, *v = values.get() + p * blocks * per_block;
        const Row& at = plan.rows[size_t(row)];
        for (int64_t skip = 0; skip < at.count; skip += TILE_Q) {
          const int64_t count = std::min<int64_t>(TILE_Q, at.count - skip);
          const auto with = [&](auto vecs) {
            Tile<T, decltype(vecs)::value>{call, room, {}, {}, {}}.run(at, skip, count, b, h, bits, k, v);
          };
          if (count <= LANES) with(std::integral_constant<int, 1>());
          else if (count <= 2 * LANES) with(std::integral_constant<int, 2>());
          else if (count <= 4 * LANES) with(std::integral_constant<int, 4>());
          else with(std::integral_constant<int, MOST_VECS>());
        }
      }
    }
  }
}

}  // namespace

// Returns 0, or 1 where memory is short.
extern "C" int seerattention_attend(const Call* call) try {
  switch (call->dtype) {
    case 0: attend<float>(*call); break;
    case 1: attend<Bfloat>(*call); break;
    default: attend<Half>(*call); break;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
