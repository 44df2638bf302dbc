// Scores of block pairs from summaries, and the blocks chosen by them, see "The gate's scores on a CPU" in
// docs/kernels.md.
//
// Summaries of queries lie along a register's lanes, so that maxima over a block's keys and sums over blocks are
// elementwise; those of keys are broadcast. What a summary of queries gives each block stays in cache until the row is
// chosen.

#include "choosing.h"

#include <omp.h>

#include <memory>
#include <new>

namespace {

// Summaries of queries whose products are computed together, and of keys: 16 registers of sums of 32, or 8 of 16.
constexpr int TILE = 64, MOST_DOWN = 4;
constexpr int MOST_VECS = TILE / LANES, MOST_ACROSS = LANES == 16 ? 4 : 2;

// Rows of a panel that a block of so many summaries takes: a product's keys are of one block and one panel.
int64_t padded(int64_t subs) { return subs < 3 ? subs : ceil_div(subs, MOST_DOWN) * MOST_DOWN; }

// Floats at the edge of a cache line.
struct Floats {
  explicit Floats(int64_t count) : at(static_cast<float*>(operator new(size_t(count) * 4, std::align_val_t(64)))) {}
  Floats(Floats&& other) noexcept : at(other.at) { other.at = nullptr; }
  ~Floats() { operator delete(at, std::align_val_t(64)); }
  float* at;
};

// What one thread works in, for rows of up to so many blocks.
struct Room {
  Room(const Choosing& call, int64_t together)
      : columns(ceil_div(call.columns, LANES) * LANES),
        queries(call.dim * TILE),
        best(columns * TILE),
        scores(columns * together),
        shares(columns),
        keys(size_t(columns)) {}

  int64_t columns;
  Floats queries, best, scores, shares;
  std::vector<uint64_t> keys;
};

// Keys of one head, packed, and how they are counted.
template <typename W>
struct Keys {
  const W* at;
  int64_t words, subs, padded, last;  // words and summaries of a block, rows that it takes, the last summary of all
};

// What up to VECS registers of summaries of queries of one head give the blocks that they see.
template <typename T, int VECS>
struct Tile {
  static constexpr int WIDTH = VECS * LANES, ACROSS = std::min(VECS, MOST_ACROSS);
  using W = Word<BY_PAIRS<T>>;

  const Choosing& call;
  Room& room;
  alignas(64) float seen[WIDTH];

  // Lay them along lanes; missing ones are the last one again. `first` counts from the sequence's first summary.
  void take_queries(const T* from, int64_t first, int64_t count, const Sequence& of) {
    const uint32_t signs = call.scale < 0 ? (BY_PAIRS<T> ? 0x80008000u : 0x80000000u) : 0;
    const int64_t size_q = call.block_q / call.subs_q, size_k = call.block_k / call.subs_k;
    W* to = reinterpret_cast<W*>(room.queries.at);
    for (int v = 0; v < VECS; ++v) {
      const auto row = [&](int i) { return from + std::min<int64_t>(v * LANES + i, count - 1) * call.dim; };
      transpose_rows<T>(row, call.dim / PER_WORD<BY_PAIRS<T>>, to + v * LANES, WIDTH, signs);
    }
    for (int lane = 0; lane < WIDTH; ++lane) {
      // It sees the summaries of keys that begin by its end.
      const int64_t end = of.past + (first + std::min<int64_t>(lane, count - 1) + 1) * size_q;
      seen[lane] = float(call.causal ? std::min(of.keys, ceil_div(end, size_k)) : of.keys);
    }
  }

  // Each one's largest product in some blocks, times a factor, DOWN summaries of keys at a time; with LATE among
  // those that it sees.
  template <int DOWN, bool LATE>
  APART void score(const Keys<W>& keys, int64_t first, int64_t stop, int v0, float scale) {
    const W* queries = reinterpret_cast<const W*>(room.queries.at) + v0 * LANES;
    const Vec factor = all(scale);
    for (int64_t block = first; block < stop; ++block) {
      Vec best[ACROSS];
#pragma GCC unroll 4
      for (int v = 0; v < ACROSS; ++v) best[v] = all(MINUS_INFINITY);
      for (int64_t sub = 0; sub < keys.padded; sub += DOWN) {
        const int64_t row = block * keys.padded + sub;
        Vec sums[DOWN][ACROSS];
        multiply<DOWN, ACROSS>(
            sums, keys.at + row / PANEL * PANEL * keys.words + row % PANEL, keys.words, queries, WIDTH
        );
#pragma GCC unroll 4
        for (int m = 0; m < DOWN; ++m) {
          const int64_t summary = std::min(block * keys.subs + std::min(sub + m, keys.subs - 1), keys.last);
#pragma GCC unroll 4
          for (int v = 0; v < ACROSS; ++v) {
            Vec x = sums[m][v];
            if (LATE) x = where_less(all(float(summary)), load(seen + (v0 + v) * LANES), x, all(MINUS_INFINITY));
            best[v] = larger(best[v], x);
          }
        }
      }
      float* at = room.best.at + block * WIDTH + v0 * LANES;
#pragma GCC unroll 4
      for (int v = 0; v < ACROSS; ++v) store(at + v * LANES, mul(best[v], factor));
    }
  }

  template <int DOWN>
  void score_all(const Keys<W>& keys, int64_t blocks, float scale) {
    // Blocks of which every one sees all; where products are compared all that a row sees.
    const int64_t whole = call.shares ? std::min(blocks, int64_t(seen[0]) / keys.subs) : blocks;
    for (int v = 0; v < VECS; v += ACROSS) {
      score<DOWN, false>(keys, 0, whole, v, scale);
      score<DOWN, true>(keys, whole, blocks, v, scale);
    }
  }

  // Make logarithms of shares, to the base of two, of what lies in `best`.
  void share(int64_t blocks) {
    for (int v = 0; v < VECS; ++v) {
      float* at = room.best.at + v * LANES;
      Vec most = all(MINUS_INFINITY);
      for (int64_t block = 0; block < blocks; ++block) most = larger(most, load(at + block * WIDTH));
      // Several sums: no addition waits for the one before.
      Vec sums[4] = {all(0.0f), all(0.0f), all(0.0f), all(0.0f)};
      int64_t block = 0;
      for (; block + 4 <= blocks; block += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = add(sums[i], exp2<false>(sub(load(at + (block + i) * WIDTH), most)));
      for (int i = 0; block < blocks; ++block, ++i)
        sums[i] = add(sums[i], exp2<false>(sub(load(at + block * WIDTH), most)));
      alignas(64) float lanes[LANES];
      store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
      for (float& x : lanes) x = float(std::log2(double(x)));
      const Vec all_of_it = load(lanes);
      for (block = 0; block < blocks; ++block)
        store(at + block * WIDTH, sub(sub(load(at + block * WIDTH), most), all_of_it));
    }
  }

  // Raise a row's scores to the largest of the lanes from one to another.
  void reduce(int64_t from, int64_t to, int64_t blocks, float factor, float* scores) {
    const bool whole = from % LANES == 0 && to % LANES == 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const float* at = room.best.at + block * WIDTH;
      float most;
      if (whole) {
        Vec x = load(at + from);
        for (int64_t lane = from + LANES; lane < to; lane += LANES) x = larger(x, load(at + lane));
        most = largest_lane(x);
      } else {
        most = *std::max_element(at + from, at + to);
      }
      scores[block] = std::max(scores[block], most * factor);
    }
  }

  void run(const T* queries, int64_t first, int64_t count, const Sequence& of, const Keys<W>& keys, int64_t blocks) {
    take_queries(queries, first, count, of);
    // A scale of zero: minus infinity times it must stay what it is.
    const double scale = std::max(std::abs(call.scale), double(std::numeric_limits<float>::min()));
    const float factor = float(call.shares ? scale * LOG2E : scale);
    if (keys.padded == 1) score_all<1>(keys, blocks, factor);
    else if (keys.padded == 2) score_all<2>(keys, blocks, factor);
    else score_all<MOST_DOWN>(keys, blocks, factor);
    if (call.shares) share(blocks);
  }
};

// Rows whose summaries of queries are those of one tile; where a row has more than a tile it is one row.
struct Group {
  int64_t sequence, row, count;
};

template <typename T>
struct Chooser {
  using W = Word<BY_PAIRS<T>>;

  const Choosing& call;
  std::vector<Sequence> sequences = sequences_of(call);
  int64_t words = call.dim / PER_WORD<BY_PAIRS<T>>, rows_of_block = padded(call.subs_k);
  int64_t panels = ceil_div(ceil_div(call.key_summaries, call.subs_k) * rows_of_block, PANEL);
  int64_t together = std::max<int64_t>(1, TILE / call.subs_q);
  Floats packed{std::max(call.batch, call.sequences) * call.kv_heads * panels * PANEL * words};
  std::vector<Group> groups = {};

  W* keys_of(int64_t index, int64_t head) {
    return reinterpret_cast<W*>(packed.at) + (index * call.kv_heads + head) * panels * PANEL * words;
  }

  // Lay a panel of keys out: every block has as many rows, missing ones are its last one again.
  void pack(int64_t index, int64_t head, int64_t panel) {
    const int64_t last = sequences[size_t(call.sequences == 1 ? 0 : index)].keys - 1;
    const T* from = static_cast<const T*>(call.keys) + (index * call.kv_heads + head) * call.key_summaries * call.dim;
    if (last < 0) return;
    for (int n = 0; n < PANEL; n += LANES) {
      const auto row = [&](int i) {
        const int64_t at = panel * PANEL + n + i, sub = std::min(at % rows_of_block, call.subs_k - 1);
        return from + std::min(at / rows_of_block * call.subs_k + sub, last) * call.dim;
      };
      transpose_rows<T>(row, words, keys_of(index, head) + panel * PANEL * words + n, PANEL, 0);
    }
  }

  // Score the rows of a group for one head of a batch entry, and choose or store them.
  void run(const Group& group, int64_t b, int64_t head, Room& room) {
    const Sequence& of = sequences[size_t(group.sequence)];
    const Keys<W> keys{keys_of(b + group.sequence, head / (call.heads / call.kv_heads)), words, call.subs_k,
                       rows_of_block, of.keys - 1};
    const int64_t first = group.row * call.subs_q, stop = std::min(of.queries, first + group.count * call.subs_q);
    const int64_t blocks = seen_of(call, of, group.row + group.count - 1).blocks;
    const T* queries = static_cast<const T*>(call.queries);
    queries += ((b * call.heads + head) * call.query_summaries + of.query) * call.dim;
    std::fill_n(room.scores.at, group.count * room.columns, MINUS_INFINITY);
    for (int64_t at = first; at < stop; at += TILE) {
      const int64_t count = std::min<int64_t>(TILE, stop - at);
      const auto with = [&](auto vecs) {
        Tile<T, decltype(vecs)::value> tile{call, room, {}};
        tile.run(queries + at * call.dim, at, count, of, keys, blocks);
        for (int64_t i = 0; i < group.count; ++i) {
          const int64_t from = std::max(i * call.subs_q, at - first) - (at - first);
          const int64_t to = std::min((i + 1) * call.subs_q - (at - first), count);
          const int64_t seen = seen_of(call, of, group.row + i).blocks;
          tile.reduce(from, to, seen, call.shares ? float(1 / LOG2E) : 1.0f, room.scores.at + i * room.columns);
        }
      };
      if (count <= LANES) with(std::integral_constant<int, 1>());
      else if (count <= 2 * LANES) with(std::integral_constant<int, 2>());
      else if (count <= 4 * LANES) with(std::integral_constant<int, 4>());
      else with(std::integral_constant<int, MOST_VECS>());
    }
    for (int64_t i = 0; i < group.count; ++i) finish(group, i, b, head, room);
  }

  void finish(const Group& group, int64_t i, int64_t b, int64_t head, Room& room) {
    const Sequence& of = sequences[size_t(group.sequence)];
    const Seen seen = seen_of(call, of, group.row + i);
    const float* scores = room.scores.at + i * room.columns;
    const int64_t at = (b * call.heads + head) * call.rows + of.row + group.row + i;
    if (call.bits) {
      const double value = call.values[group.sequence * call.heads + head];
      choose_row(call, seen, value, scores, room.shares.at, room.keys.data(), call.bits + at * call.words);
    } else {
      float* to = call.scores + at * call.columns;
      std::fill(std::copy(scores, scores + seen.blocks, to), to + call.columns, 0.0f);
    }
  }

  void run() {
    for (int64_t s = 0; s < call.sequences; ++s)
      for (int64_t row = 0; row < sequences[size_t(s)].rows; row += together)
        groups.push_back({s, row, std::min(together, sequences[size_t(s)].rows - row)});
    std::vector<Room> rooms;
    for (int64_t thread = 0; thread < call.threads; ++thread) rooms.emplace_back(call, together);
    const int64_t all_keys = std::max(call.batch, call.sequences) * call.kv_heads, pairs = call.batch * call.heads;
#pragma omp parallel num_threads(int(call.threads))
    {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < all_keys * panels; ++i)
        pack(i / panels / call.kv_heads, i / panels % call.kv_heads, i % panels);
      Room& room = rooms[size_t(omp_get_thread_num())];
      // Late rows first: they see most, and the end should consist of short ones.
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < int64_t(groups.size()) * pairs; ++i) {
        const int64_t pair = i % pairs;
        run(groups[groups.size() - 1 - size_t(i / pairs)], pair / call.heads, pair % call.heads, room);
      }
    }
  }
};

}  // namespace

// Returns 0, or 1 where memory is short.
extern "C" int seerattention_choose(const Choosing* call) try {
  switch (call->dtype) {
    case 0: Chooser<float>{*call}.run(); break;
    case 1: Chooser<Bfloat>{*call}.run(); break;
    default: Chooser<Half>{*call}.run(); break;
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
