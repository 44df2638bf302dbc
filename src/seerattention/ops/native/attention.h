// What a call of the kernel is told, where its blocks lie, and keys and values packed for it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "products.h"

// What a call is told; the same fields in the same order in block_sparse_attention/native.py.
struct Call {
  const void *q, *k, *v;
  void* out;
  float* lse;                // [B, Hq, Tq], or null
  const int32_t* bits;       // [selections, selection_heads, rows, words]
  const float* sinks;        // [Hq], or null
  const int64_t* lengths;    // [sequences, 2], (queries, keys)
  const int32_t* pages;      // [sequences or batch, pages_each], or null
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  int64_t batch, heads, kv_heads, dim, sequences, selections, selection_heads, rows, words, block_q, block_k;
  int64_t queries, dtype, threads, page_tokens, pages_each;
  double scale, softcap;     // no softcap: 0
};

namespace {

// Queries computed together, and keys whose scores are held at a time.
constexpr int TILE_Q = 64, TILE_K = 64;
constexpr int MOST_VECS = TILE_Q / LANES;
constexpr int MOST_DIM = 256;

// One row of the selection's map: a query block.
struct Row {
  int64_t query, count;      // its first query, and how many
  int64_t position;          // of the first one among the sequence's keys
  int64_t block, blocks;     // the sequence's first block of all, and how many it has
};

// One KV block of all sequences.
struct Block {
  int64_t key, count;        // its first key, and how many
  int64_t sequence, position;
};

struct Plan {
  std::vector<Row> rows;
  std::vector<Block> blocks;
};

Plan plan_of(const Call& call) {
  Plan plan;
  int64_t query = 0, key = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t queries = call.lengths[2 * s], keys = call.lengths[2 * s + 1];
    const int64_t block = int64_t(plan.blocks.size()), blocks = (keys + call.block_k - 1) / call.block_k;
    for (int64_t at = 0; at < queries; at += call.block_q)
      plan.rows.push_back({query + at, std::min(call.block_q, queries - at), keys - queries + at, block, blocks});
    for (int64_t at = 0; at < keys; at += call.block_k)
      plan.blocks.push_back({key + at, std::min(call.block_k, keys - at), s, at});
    query += queries;
    key += keys;
  }
  return plan;
}

const int32_t* bits_of(const Call& call, int64_t b, int64_t head, int64_t row) {
  const int64_t of = call.selections == 1 ? 0 : b, h = head / (call.heads / call.selection_heads);
  return call.bits + ((of * call.selection_heads + h) * call.rows + row) * call.words;
}

// The first selected block from one on; as many as there are where there is none.
int64_t next_block(const int32_t* bits, const Row& row, int64_t from) {
  for (int64_t word = from / 32; word * 32 < row.blocks; ++word) {
    const uint32_t left = uint32_t(bits[word]) >> (from % 32) << (from % 32);
    if (left) return std::min(row.blocks, word * 32 + __builtin_ctz(left));
    from = 0;
  }
  return row.blocks;
}

// Mark the blocks that some query head of a KV head reads.
void mark_read(const Call& call, const Plan& plan, int64_t b, int64_t kv_head, uint8_t* read) {
  const int64_t group = call.heads / call.kv_heads;
  const int64_t step = std::max<int64_t>(1, call.heads / call.selection_heads);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head += std::min(step, group))
    for (int64_t row = 0; row < call.rows; ++row) {
      const int32_t* bits = bits_of(call, b, head, row);
      const Row& at = plan.rows[size_t(row)];
      for (int64_t block = next_block(bits, at, 0); block < at.blocks; block = next_block(bits, at, block + 1))
        read[at.block + block] = 1;
    }
}

// Call with what returns where the n-th token of a block lies, of one head of a batch entry.
template <typename T, typename Do>
INLINE void with_tokens(const Call& call, const void* x, const int64_t* strides, int64_t b, int64_t head,
                        const Block& block, const Do& with) {
  const T* from = static_cast<const T*>(x) + head * strides[1];
  if (call.pages) {
    // Either the batch or the packed sequences are one.
    const int32_t* pages = call.pages + (b + block.sequence) * call.pages_each;
    with([=, &call, &block](int64_t n) {
      const int64_t at = block.position + n;
      return from + pages[at / call.page_tokens] * strides[0] + at % call.page_tokens * strides[2];
    });
  } else {
    from += b * strides[0] + block.key * strides[2];
    with([=](int64_t n) { return from + n * strides[2]; });
  }
}

// Lay a block's keys out in panels; missing ones are zero.
template <typename T, typename Token>
void pack_keys(const Token& token, int64_t count, int64_t size, int64_t dim, Word<BY_PAIRS<T>>* to) {
  const int64_t words = dim / PER_WORD<BY_PAIRS<T>>;
  const T nothing[MOST_DIM] = {};
  for (int64_t n = 0; n < size; n += LANES) {
    const auto row = [&](int i) { return n + i < count ? token(n + i) : nothing; };
    transpose_rows<T>(row, words, to + n / PANEL * PANEL * words + n % PANEL, PANEL, 0);
  }
}

// The same of values, TILE_K tokens by themselves; a pair is of two tokens.
template <typename T, typename Token>
void pack_values(const Token& token, int64_t count, int64_t size, int64_t dim, Word<BY_PAIRS<T>>* to) {
  const T nothing[MOST_DIM] = {};
  const auto row = [&](int64_t n) { return n < count ? token(n) : nothing; };
  for (int64_t first = 0; first < size; first += TILE_K) {
    const int64_t end = std::min<int64_t>(size, first + TILE_K);
    for (int64_t d = 0; d < dim; d += PANEL)
      if constexpr (BY_PAIRS<T>) {
        for (int64_t n = first; n < end; n += 2, to += PANEL) {
          const T *low = row(n) + d, *high = row(n + 1) + d;
          for (int i = 0; i < PANEL; ++i) to[i] = low[i].bits | uint32_t(high[i].bits) << 16;
        }
      } else {
        for (int64_t n = first; n < end; ++n, to += PANEL)
          for (int i = 0; i < PANEL; i += LANES) store(to + i, load_wide(row(n) + d + i));
      }
  }
}

}  // namespace
