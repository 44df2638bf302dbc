// What a call of the kernel that chooses blocks is told, where its rows and summaries lie, and what a rule takes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "products.h"

// What a call is told; the same fields in the same order in choosing.py. Summaries are of block / subs tokens.
struct Choosing {
  const void *queries, *keys;  // [B, H, query_summaries, E], [B or sequences, Hk, key_summaries, E]
  float* scores;               // [B, H, rows, columns], or null where blocks are chosen
  int32_t* bits;               // [B, H, rows, words], or null
  const int64_t* lengths;      // [sequences, 2], (queries, keys)
  const double* values;        // [sequences, H], the rule's bounds
  int64_t batch, heads, kv_heads, dim, sequences, query_summaries, key_summaries, rows, columns, words;
  int64_t block_q, block_k, subs_q, subs_k, causal, shares, kind, sink, local, dense_rows, dtype, threads;
  double scale, exponent;
};

namespace {

enum Kind { SHARE, COUNT, MASS };

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One sequence: where it lies among all, in summaries and in rows.
struct Sequence {
  int64_t query, queries, keys;  // its first summary of queries, how many, and how many of keys
  int64_t tokens, past;          // query tokens, and keys before the first
  int64_t row, rows;             // its first row, and how many
};

std::vector<Sequence> sequences_of(const Choosing& call) {
  std::vector<Sequence> found;
  int64_t query = 0, row = 0;
  for (int64_t s = 0; s < call.sequences; ++s) {
    const int64_t tokens = call.lengths[2 * s], keys = call.lengths[2 * s + 1];
    const int64_t queries = ceil_div(tokens, call.block_q / call.subs_q), rows = ceil_div(tokens, call.block_q);
    found.push_back({query, queries, ceil_div(keys, call.block_k / call.subs_k), tokens, keys - tokens, row, rows});
    query += queries;
    row += rows;
  }
  return found;
}

// The blocks that a row sees, of which those before `sink` and from `own` on are read whatever the scores.
struct Seen {
  int64_t blocks, sink, own;
};

Seen seen_of(const Choosing& call, const Sequence& of, int64_t row) {
  if (!call.causal) return {ceil_div(of.keys, call.subs_k), 0, 0};
  const int64_t first = row * call.block_q + of.past;
  const int64_t last = std::min((row + 1) * call.block_q, of.tokens) - 1 + of.past;
  const int64_t blocks = last / call.block_k + 1, own = first / call.block_k - (call.local - 1);
  const bool dense = row >= of.rows - call.dense_rows;
  return {blocks, std::min(call.sink, blocks), dense ? 0 : std::max<int64_t>(0, own)};
}

// Integers in the order of floats, -0 and 0 alike.
uint32_t order(float x) {
  uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Exponentials of differences from the row's largest score, and their sum; scores have room for whole registers.
float exponentials(const float* scores, int64_t blocks, float* to) {
  const float largest = *std::max_element(scores, scores + blocks);
  float sum = 0;
  for (int64_t n = 0; n < blocks; n += LANES)
    store(to + n, exp2<false>(mul(sub(load(scores + n), all(largest)), all(float(LOG2E)))));
  for (int64_t n = 0; n < blocks; ++n) sum += to[n];
  return sum;
}

// Set the bits of what a row reads. A block is known by its key: what it is ranked by, then the lower one first.
void choose_row(const Choosing& call, const Seen& seen, double value, const float* scores, float* shares,
                uint64_t* keys, int32_t* bits) {
  const auto set = [&](int64_t block) { bits[block / 32] |= int32_t(1u << (block % 32)); };
  const auto key = [](uint32_t rank, int64_t block) { return uint64_t(rank) << 32 | uint32_t(~block); };
  const auto block_of = [](uint64_t of) { return int64_t(uint32_t(~of)); };
  std::memset(bits, 0, size_t(call.words) * 4);
  const int64_t last = std::max(seen.sink, seen.own);
  for (int64_t n = 0; n < seen.sink; ++n) set(n);
  for (int64_t n = last; n < seen.blocks; ++n) set(n);
  if (call.kind == COUNT) {
    const int64_t free = last - seen.sink;
    for (int64_t n = 0; n < free; ++n) keys[n] = key(order(scores[seen.sink + n]), seen.sink + n);
    const int64_t room = std::min(free, int64_t(value) - (seen.blocks - free));
    if (room <= 0) return;
    std::nth_element(keys, keys + room - 1, keys + free, std::greater<>());
    for (int64_t n = 0; n < room; ++n) set(block_of(keys[n]));
    return;
  }
  const float sum = exponentials(scores, seen.blocks, shares);
  if (call.kind == SHARE) {
    const float limit = float(value * std::pow(double(seen.blocks), call.exponent));
    for (int64_t n = 0; n < seen.blocks; ++n)
      if (shares[n] / sum > limit) set(n);
    return;
  }
  for (int64_t n = 0; n < seen.blocks; ++n) keys[n] = key(order(shares[n] / sum), n);
  std::make_heap(keys, keys + seen.blocks);
  double before = 0;
  for (int64_t left = seen.blocks; left && before < value; --left) {
    const int64_t block = block_of(keys[0]);
    set(block);
    before += double(shares[block] / sum);
    std::pop_heap(keys, keys + left);
  }
}

}  // namespace
