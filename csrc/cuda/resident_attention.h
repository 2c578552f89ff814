// Attention of the resident encoder, in two ways. Attention: a block takes 16 queries of a head at a time, whose
// sequences' keys are all among at most 128 tokens. The warps share out keys for the scores, and columns for the sum over
// values, for which each has the probabilities of all rows and keys in its registers. HeadOfTile: a warp has a head's
// scores of the only tile.
#pragma once
#include "resident_block.h"

namespace albert {

// A pair of values, zeros outside the sequence, where a NaN times a probability of zero were one.
ALBERT_DEVICE uint32_t masked(uint32_t pair, int key, const Sequence& s) {
  if (key < s.begin || key >= s.end) pair &= 0xffff0000u;
  if (key + 1 < s.begin || key + 1 >= s.end) pair &= 0x0000ffffu;
  return pair;
}

template <class T, class S>
struct Attention {
  static constexpr int kSteps = kMostTokens / kTile;       // keys of a matrix instruction
  static constexpr int kKeys = kMostTokens / (kWarps * kUnit);  // units of keys of a warp

  Block<T, S>& block;
  const Arguments<T>& args;
  const int head_dim;
  float* scores;  // [kTile][kScoreStride], times log2(e); -infinity outside a row's sequence

  ALBERT_DEVICE explicit Attention(Block<T, S>& b)
      : block(b), args(b.args), head_dim(layout().head_dim()), scores(b.sums()) {}

  ALBERT_DEVICE decltype(auto) layout() const { return block.layout(); }
  // Part 0, 1 or 2 of a token: query, key, value. Beyond the tokens lies anything: there is room for whole tiles.
  ALBERT_DEVICE const T* row_of(int r, int part, int head) const {
    return args.qkv + static_cast<uint32_t>((r * 3 + part) * layout().hidden + head * head_dim);
  }

  // For each pair of 8 tokens the second operand of a matrix instruction: 8 tokens by the unit's 8 columns.
  ALBERT_DEVICE void load_values(uint32_t (&values)[kSteps][2], int head, int unit, const Sequence& all) const {
    const T* from = row_of(block.row, 2, head) + unit * kUnit + block.quad * 2;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[i][half] = 0;
        if (i * kTile >= all.begin && i * kTile < all.end)
          values[i][half] = load_pair_shared_by_blocks(from + (i * kTile + half * 8) * 3 * layout().hidden);
      }
  }

  ALBERT_DEVICE void score(int tile, int head, const Sequence& all) const {
    Four sums[kKeys] = {};
    const T* a = row_of(tile * kTile + block.row, 0, head) + block.quad * 8;
    const int eight_rows = 8 * 3 * layout().hidden;
    const auto key_of = [&](int i) { return all.begin + (i * kWarps + block.warp) * kUnit; };
    const T* b = row_of(key_of(0) + block.row, 1, head) + block.quad * 8;
#pragma unroll 2
    for (int column = 0; column < head_dim; column += kChunk) {
      const Eight q[2] = {load_shared_by_blocks(a + column), load_shared_by_blocks(a + eight_rows + column)};
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        if (key_of(i) >= all.end) break;
        const Eight k = load_shared_by_blocks(b + i * kWarps * eight_rows + column);
        multiply_add(sums[i], {q[0].pair[0], q[1].pair[0], q[0].pair[1], q[1].pair[1]}, k.pair[0], k.pair[1], T{});
        multiply_add(sums[i], {q[0].pair[2], q[1].pair[2], q[0].pair[3], q[1].pair[3]}, k.pair[2], k.pair[3], T{});
      }
    }
    const float scale = 1.4426950408889634f / sqrtf(static_cast<float>(head_dim));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = block.row + half * 8;
      const Sequence s = block.sequences()[tile * kTile + r];
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const int k = key_of(i) + block.quad * 2;
        if (k >= all.end) break;
        const auto seen = [&](int j) {
          return k + j >= s.begin && k + j < s.end ? sums[i].value[2 * half + j] * scale : -INFINITY;
        };
        *reinterpret_cast<Two*>(scores + r * kScoreStride + k) = {{seen(0), seen(1)}};
      }
    }
  }

  // Probabilities before they are divided by their sum, as the first operand of matrix instructions, and one over the sum,
  // of rows `row` and `row + 8`.
  ALBERT_DEVICE void softmax(uint32_t (&p)[kSteps][4], float (&inverse_sums)[2], const Sequence& all) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Two s[kSteps][2];
      float largest = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          s[i][j] = {{-INFINITY, -INFINITY}};
          if (i * kTile >= all.begin && i * kTile < all.end)
            s[i][j] = *reinterpret_cast<const Two*>(scores + (block.row + half * 8) * kScoreStride + i * kTile + j * 8 +
                                                    block.quad * 2);
          largest = fmaxf(largest, fmaxf(s[i][j].value[0], s[i][j].value[1]));
        }
      for (int mask = 1; mask < 4; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
      if (largest == -INFINITY) largest = 0;  // no keys, or none but NaN, which stay
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          p[i][2 * j + half] = 0;
          if (!(i * kTile >= all.begin && i * kTile < all.end)) continue;
          const float a = exp2_fast(s[i][j].value[0] - largest), b = exp2_fast(s[i][j].value[1] - largest);
          sum += a + b;
          p[i][2 * j + half] = pack_pair(a, b, T{});
        }
      for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
      inverse_sums[half] = sum == 0.0f ? 0.0f : inverse(sum);  // 0: no keys
    }
  }

  // By the sequences that the tile's rows are of: each sees its own values alone.
  ALBERT_DEVICE void add_values(int tile, int head, int unit, const uint32_t (&p)[kSteps][4],
                                const uint32_t (&values)[kSteps][2], const float (&inverse_sums)[2]) const {
    const int first = tile * kTile, last = least(first + kTile, args.tokens);
    Four total{};
    for (int token = first; token < last;) {
      const Sequence s = block.sequences()[token];
      Four sum{};
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (i * kTile + kTile <= s.begin || i * kTile >= s.end) continue;
        const int key = i * kTile + block.quad * 2;
        multiply_add(sum, p[i], masked(values[i][0], key, s), masked(values[i][1], key + 8, s), T{});
      }
      const int end = s.begin == s.end ? token + 1 : s.end;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = first + block.row + i / 2 * 8;
        if (r >= token && r < end) total.value[i] = sum.value[i];
      }
      token = end;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = first + block.row + half * 8;
      if (r >= last) continue;
      T* to = args.context + r * layout().hidden + head * head_dim + unit * kUnit + block.quad * 2;
      *reinterpret_cast<uint32_t*>(to) =
          pack_pair(total.value[2 * half] * inverse_sums[half], total.value[2 * half + 1] * inverse_sums[half], T{});
    }
  }

  ALBERT_DEVICE void run_part(int tile, int head) const {
    const Sequence all = block.keys()[tile];
    uint32_t values[kSteps][2], p[kSteps][4];
    float inverse_sums[2];
    int unit = block.warp;
    const bool has_values = unit * kUnit < head_dim;
    if (has_values) load_values(values, head, unit, all);
    score(tile, head, all);
    sync_block();
    if (!has_values) return;
    softmax(p, inverse_sums, all);
    for (;;) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (!(i * kTile >= all.begin && i * kTile < all.end)) continue;
        for (int half = 0; half < 2; ++half) values[i][half] = transpose(values[i][half]);
      }
      add_values(tile, head, unit, p, values, inverse_sums);
      unit += kWarps;
      if (unit * kUnit >= head_dim) break;
      load_values(values, head, unit, all);
    }
  }

  // A cluster has the queries and keys of its own heads; without clusters any block takes any part.
  ALBERT_DEVICE void run() const {
    const bool clusters = layout().cluster > 1;
    const int first_head = clusters ? block.index / layout().cluster * layout().heads_of_cluster() : 0;
    const int heads = clusters ? least(layout().heads - first_head, layout().heads_of_cluster()) : layout().heads;
    const int first = clusters ? block.rank : block.index, step = clusters ? layout().cluster : block_count();
    for (int part = first; part < heads << block.log_tiles; part += step) {
      const int tile = part & ((1 << block.log_tiles) - 1);
      if (part != first) sync_block();  // the scores of the part before were read
      if (tile < block.tiles) run_part(tile, first_head + (part >> block.log_tiles));
    }
  }
};

// Pairs of columns of rows `row` and `row + 8`.
struct TwoPairs {
  uint32_t half[2];
};

// A head of the first 16 tokens, when there are no others, in a warp's registers.
template <class T, int kChunks>
struct HeadOfTile {
  Eight query[kChunks][2], key[kChunks][2];  // of tokens `row` and `row + 8`
  uint32_t p[4];                             // probabilities before they are divided by their sum
  float inverse_sums[2];                     // of rows `row` and `row + 8`; 0: no keys

  // own: the sequences of rows `row` and `row + 8`.
  ALBERT_DEVICE void attend(const Sequence (&own)[2], int quad) {
    Four sums[2][2] = {};  // of keys 0 to 7 and 8 to 15; in two parts, for shorter chains of instructions
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const Eight(&q)[2] = query[chunk];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Eight& k = key[chunk][i];
        multiply_add(sums[i][0], {q[0].pair[0], q[1].pair[0], q[0].pair[1], q[1].pair[1]}, k.pair[0], k.pair[1], T{});
        multiply_add(sums[i][1], {q[0].pair[2], q[1].pair[2], q[0].pair[3], q[1].pair[3]}, k.pair[2], k.pair[3], T{});
      }
    }
    const float scale = 1.4426950408889634f / sqrtf(static_cast<float>(kChunks * kChunk));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Sequence s = own[half];
      float x[4], largest = -INFINITY, sum = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int k = i / 2 * 8 + quad * 2 + i % 2, at = 2 * half + i % 2;
        x[i] = k >= s.begin && k < s.end ? (sums[i / 2][0].value[at] + sums[i / 2][1].value[at]) * scale : -INFINITY;
        largest = fmaxf(largest, x[i]);
      }
      for (int mask = 1; mask < 4; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
      if (largest == -INFINITY) largest = 0;  // no keys, or none but NaN, which stay
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += x[i] = exp2_fast(x[i] - largest);
#pragma unroll
      for (int i = 0; i < 2; ++i) p[2 * i + half] = pack_pair(x[2 * i], x[2 * i + 1], T{});
      for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
      inverse_sums[half] = sum == 0.0f ? 0.0f : inverse(sum);
    }
  }

  // Pairs of columns of the context: of the values' rows `row` and `row + 8` a lane has columns 2 i and 2 i + 1 of its
  // eight. They count as columns 2 quad and 2 quad + 1 of a unit: so they come out where the next product wants them.
  template <int kPairs>
  ALBERT_DEVICE void context(const uint32_t (&value)[kPairs][2], TwoPairs (&to)[kPairs], const Sequence* sequences,
                             int tokens, int row, int quad) const {
    uint32_t transposed[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) transposed[i][half] = transpose(value[i][half]);
    Four total[kPairs] = {};
    for (int token = 0; token < tokens;) {  // by sequences: each row sees its own values alone
      const Sequence s = sequences[token];
      const int end = s.begin == s.end ? token + 1 : s.end;
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        uint32_t v[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) v[half] = masked(transposed[i][half], half * 8 + quad * 2, s);
        Four sum{};
        multiply_add(sum, p, v[0], v[1], T{});
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row + j / 2 * 8;
          if (r >= token && r < end) total[i].value[j] = sum.value[j] * inverse_sums[j / 2];
        }
      }
      token = end;
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
      to[i] = {{pack_pair(total[i].value[0], total[i].value[1], T{}), pack_pair(total[i].value[2], total[i].value[3], T{})}};
  }
};

}  // namespace albert
