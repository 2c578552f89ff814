// Attention of the resident encoder: a block takes 16 queries of a head at a time, whose sequences' keys are all among
// at most 128 tokens. The warps share out keys for the scores, rows for the softmax, columns for the sum over values.
#pragma once
#include "resident_block.h"

namespace albert {

template <class T, class P>
struct Attention {
  Block<T, P>& block;
  float* scores;        // [kTile][kScoreStride], scaled; -infinity outside a row's sequence
  T* probabilities;     // [kTile][kProbabilityStride], before they are divided by their sum
  float* inverse_sums;  // [kTile]

  ALBERT_DEVICE explicit Attention(Block<T, P>& b)
      : block(b), scores(reinterpret_cast<float*>(b.warp_sums())),
        probabilities(reinterpret_cast<T*>(scores + kTile * kScoreStride)),
        inverse_sums(reinterpret_cast<float*>(probabilities + kTile * kProbabilityStride)) {}

  // The keys that a tile's rows see, in whole chunks.
  struct Keys {
    int begin, end;
  };
  ALBERT_DEVICE Keys keys(int tile) const {
    int begin = kMostTokens, end = 0;
    for (int r = tile * kTile; r < (tile + 1) * kTile && r < block.args.tokens; ++r) {
      const Sequence s = block.sequences()[r];
      if (s.begin == s.end) continue;
      begin = s.begin < begin ? s.begin : begin;
      end = s.end > end ? s.end : end;
    }
    return {begin / kChunk * kChunk, divide_up(end, kChunk) * kChunk};
  }

  // A row of query or key, 8 elements of it; zeros beyond the tokens.
  ALBERT_DEVICE Eight row_of(int r, int column) const {
    if (r >= block.args.tokens) return Eight{};
    return load_shared_by_blocks(block.args.query_key + static_cast<long>(r) * 2 * block.layout.hidden + column);
  }

  ALBERT_DEVICE void score(int tile, int head, const Keys& all) {
    const int head_dim = block.layout.head_dim(), first = head * head_dim + block.quad * 8;
    const float scale = 1.0f / sqrtf(static_cast<float>(head_dim));
    for (int key = all.begin + block.warp * kUnit; key < all.end; key += kWarps * kUnit) {
      Four sum{};
      for (int column = first; column < first + head_dim; column += kChunk) {
        const Eight a = row_of(tile * kTile + block.row, column), a8 = row_of(tile * kTile + block.row + 8, column);
        const Eight b = row_of(key + block.row, block.layout.hidden + column);
        multiply_add(sum, {a.pair[0], a8.pair[0], a.pair[1], a8.pair[1]}, b.pair[0], b.pair[1], T{});
        multiply_add(sum, {a.pair[2], a8.pair[2], a.pair[3], a8.pair[3]}, b.pair[2], b.pair[3], T{});
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = block.row + i / 2 * 8, k = key + block.quad * 2 + i % 2;
        bool seen = false;
        if (tile * kTile + r < block.args.tokens) {
          const Sequence s = block.sequences()[tile * kTile + r];
          seen = k >= s.begin && k < s.end;
        }
        scores[r * kScoreStride + k] = seen ? sum.value[i] * scale : -INFINITY;
      }
    }
  }

  ALBERT_DEVICE void softmax(const Keys& all) {
    for (int r = block.warp; r < kTile; r += kWarps) {
      float largest = -INFINITY, sum = 0;
      for (int k = all.begin + block.lane; k < all.end; k += kWarp)
        largest = fmaxf(largest, scores[r * kScoreStride + k]);
      for (int mask = 1; mask < kWarp; mask *= 2) largest = fmaxf(largest, shuffle_xor(largest, mask));
      for (int k = all.begin + block.lane; k < all.end; k += kWarp) {
        const float s = scores[r * kScoreStride + k];
        const float p = s == -INFINITY ? 0.0f : expf(s - largest);  // a NaN stays one
        from_float(p, probabilities[r * kProbabilityStride + k]);
        sum += p;
      }
      for (int mask = 1; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
      if (block.lane == 0) inverse_sums[r] = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: no keys
    }
  }

  // Values of 8 tokens for one dimension; zeros outside the sequence, where a NaN times a probability of zero were one.
  ALBERT_DEVICE Eight values_of(long dim, int key, const Sequence& s) const {
    Eight v = load_shared_by_blocks(block.args.value + dim * block.args.value_stride() + key);
    if (key >= s.begin && key + 8 <= s.end) return v;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = key + 2 * i;
      if (k < s.begin || k >= s.end) v.pair[i] &= 0xffff0000u;
      if (k + 1 < s.begin || k + 1 >= s.end) v.pair[i] &= 0x0000ffffu;
    }
    return v;
  }

  // By the sequences that the tile's rows are of: each sees its own values alone.
  ALBERT_DEVICE void add_values(int tile, int head) {
    const int head_dim = block.layout.head_dim(), first = tile * kTile;
    const int last = first + kTile < block.args.tokens ? first + kTile : block.args.tokens;
    for (int column = block.warp * kUnit; column < head_dim; column += kWarps * kUnit) {
      const long dim = head * head_dim + column + block.row;
      Four total{};
      for (int token = first; token < last;) {
        const Sequence s = block.sequences()[token];
        Four sum{};
        for (int key = s.begin / kChunk * kChunk; key < s.end; key += kChunk) {
          const int k = key + block.quad * 8;
          const Eight a = *reinterpret_cast<const Eight*>(probabilities + block.row * kProbabilityStride + k);
          const Eight a8 = *reinterpret_cast<const Eight*>(probabilities + (block.row + 8) * kProbabilityStride + k);
          const Eight b = values_of(dim, k, s);
          multiply_add(sum, {a.pair[0], a8.pair[0], a.pair[1], a8.pair[1]}, b.pair[0], b.pair[1], T{});
          multiply_add(sum, {a.pair[2], a8.pair[2], a.pair[3], a8.pair[3]}, b.pair[2], b.pair[3], T{});
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
        const int r = block.row + half * 8;
        if (first + r >= last) continue;
        const float inverse = inverse_sums[r];
        store_pair(block.args.context + static_cast<long>(first + r) * block.layout.hidden + head * head_dim + column +
                       block.quad * 2,
                   total.value[2 * half] * inverse, total.value[2 * half + 1] * inverse);
      }
    }
  }

  // A cluster has the queries and keys of its own heads; without clusters any block takes any part.
  ALBERT_DEVICE void run() {
    const Layout& l = block.layout;
    const int tiles = block.tiles(), heads = divide_up(l.heads - block.index / l.cluster, l.clusters());
    const int parts = l.cluster == 1 ? l.heads * tiles : heads * tiles;
    const int first = l.cluster == 1 ? block.index : block.index % l.cluster;
    for (int part = first; part < parts; part += l.cluster == 1 ? l.blocks : l.cluster) {
      const int tile = part % tiles, i = part / tiles;
      const int head = l.cluster == 1 ? i : block.index / l.cluster + i * l.clusters();
      const Keys all = keys(tile);
      score(tile, head, all);  // the scores of the part before were read before its last barrier
      sync_block();
      softmax(all);
      sync_block();
      add_values(tile, head);
    }
  }
};

}  // namespace albert
