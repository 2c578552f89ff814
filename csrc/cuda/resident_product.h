// A product x . weightᵀ of the resident encoder: the block's units of the weight are in its shared memory, x comes from
// L2, straight into the registers that the matrix instruction takes it from. The warps share the sum's chunks out among
// them; their sums are added in the order of the warps, so that the same bits come out each time.
#pragma once
#include "resident_block.h"

namespace albert {

// x [tokens][columns], through LayerNorm where `weight` is given.
template <class T, class P>
struct Rows {
  const T* data;
  int columns;
  const P* weight;
  const P* bias;
};

// Of a warp's step: its chunks, each with rows `row` and `row + 8` of the tile.
struct Batch {
  Eight x[kBatch][2];
};

template <class T, class P>
struct Product {
  Block<T, P>& block;
  Rows<T, P> x;
  Share share;
  int chunks;   // of this block
  int batches;  // of every warp: all take part in the barriers

  ALBERT_DEVICE Product(Block<T, P>& b, int matrix, const Rows<T, P>& rows)
      : block(b), x(rows), share{b.layout, matrix, b.index}, chunks(share.chunk_end() - share.chunk_begin()),
        batches(most(divide_up(chunks, kBatch * kWarps), 1)) {}

  // The warp's i-th chunk of a batch, counted from the block's first; chunks and more: there is none.
  ALBERT_DEVICE int chunk(int batch, int i) const { return (batch * kBatch + i) * kWarps + block.warp; }

  ALBERT_DEVICE void load(Batch& to, int tile, int batch) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = chunk(batch, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int r = tile * kTile + block.row + half * 8;
        to.x[i][half] = Eight{};
        if (c < chunks && r < block.args.tokens)
          to.x[i][half] = load_shared_by_blocks(x.data + static_cast<long>(r) * x.columns +
                                                (share.chunk_begin() + c) * kChunk + block.quad * 8);
      }
    }
  }

  // Mean and rstd of rows `row` and `row + 8` of the tile, from each warp's mean and squared deviations of its part
  // (Chan, Golub and LeVeque, 1979): no difference of large numbers, and one barrier.
  ALBERT_DEVICE void statistics(const Batch& now, int tile, Statistics (&of)[2]) const {
    int count = 0;
    for (int i = 0; i < kBatch; ++i) count += chunk(0, i) < chunks ? kChunk : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum += element<T>(now.x[i][half], j);  // zeros where there is no chunk
      for (int mask = 1; mask < 4; mask *= 2) sum += shuffle_xor(sum, mask);
      const float mean = count == 0 ? 0.0f : sum / static_cast<float>(count);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float d = element<T>(now.x[i][half], j) - mean;
          squares += chunk(0, i) < chunks ? d * d : 0.0f;
        }
      for (int mask = 1; mask < 4; mask *= 2) squares += shuffle_xor(squares, mask);
      if (block.quad == 0) block.partial_statistics()[block.warp * kTile + block.row + half * 8] = {mean, squares};
    }
    sync_block();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float n = 0, mean = 0, squares = 0;
      for (int w = 0; w < kWarps; ++w) {
        const Statistics part = block.partial_statistics()[w * kTile + block.row + half * 8];
        const int of_warp = chunks > w ? (chunks - w - 1) / kWarps + 1 : 0;
        if (of_warp == 0) continue;
        const float m = static_cast<float>(of_warp * kChunk), d = part.mean - mean;
        mean += d * m / (n + m);
        squares += part.rstd + d * d * n * m / (n + m);
        n += m;
      }
      of[half] = {mean, 1.0f / sqrtf(squares / n + block.args.eps)};
      if (block.warp == 0 && block.quad == 0) block.statistics()[tile * kTile + block.row + half * 8] = of[half];
    }
  }

  ALBERT_DEVICE void normalize(Batch& now, const Statistics (&of)[2]) const {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = chunk(0, i);
      if (c >= chunks) continue;
      float weight[8], bias[8];
      load_parameters(x.weight + c * kChunk + block.quad * 8, weight);
      load_parameters(x.bias + c * kChunk + block.quad * 8, bias);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const auto at = [&](int j) {
            return (element<T>(now.x[i][half], j) - of[half].mean) * of[half].rstd * weight[j] + bias[j];
          };
          now.x[i][half].pair[pair] = pack_pair<T>(at(2 * pair), at(2 * pair + 1));
        }
    }
  }

  ALBERT_DEVICE void multiply(const Batch& now, int batch, Four (&sums)[kMostUnits]) const {
    const int units = block.layout.units[share.matrix];
    const char* weights = block.weights(share.matrix) + block.lane * static_cast<int>(sizeof(Eight));
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int c = chunk(batch, i);
      if (c >= chunks) continue;
      const Eight(&a)[2] = now.x[i];
      const uint32_t first[4] = {a[0].pair[0], a[1].pair[0], a[0].pair[1], a[1].pair[1]};
      const uint32_t second[4] = {a[0].pair[2], a[1].pair[2], a[0].pair[3], a[1].pair[3]};
#pragma unroll
      for (int u = 0; u < kMostUnits; ++u) {
        if (u >= units) break;
        const Eight b = *reinterpret_cast<const Eight*>(weights + (u * chunks + c) * kChunkBytes);
        multiply_add(sums[u], first, b.pair[0], b.pair[1], T{});
        multiply_add(sums[u], second, b.pair[2], b.pair[3], T{});
      }
    }
  }

  // The sum over all warps of unit `block.warp`: there are as many warps as units at most.
  ALBERT_DEVICE Four add_warps(const Four (&sums)[kMostUnits]) const {
    const int units = block.layout.units[share.matrix];
    Four* of_warps = block.warp_sums();
#pragma unroll
    for (int u = 0; u < kMostUnits; ++u) {
      if (u >= units) break;
      of_warps[(u * kWarps + block.warp) * kWarp + block.lane] = sums[u];
    }
    sync_block();
    Four sum{};
    if (block.warp < units)
      for (int w = 0; w < kWarps; ++w) add(sum, of_warps[(block.warp * kWarps + w) * kWarp + block.lane]);
    return sum;
  }
  ALBERT_DEVICE static void add(Four& sum, const Four& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.value[i] += x.value[i];
  }

  // Calls finish(row, column, two values) for the lane's part of a tile's unit.
  template <class Finish>
  ALBERT_DEVICE void hand_over(const Four& sum, int tile, Finish finish) const {
    const int unit = block.warp < block.layout.units[share.matrix] ? share.unit(block.warp) : -1;
    if (unit < 0) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      finish(tile * kTile + block.row + half * 8, unit * kUnit + block.quad * 2, sum.value[2 * half],
             sum.value[2 * half + 1]);
  }

  // The cluster's sums, tile by tile, once each block has left its own: of as many tiles at a time as there are slots, or
  // of half as many, so that a block that is ahead does not write where others still read.
  template <class Finish>
  ALBERT_DEVICE void add_blocks(const Four& sum, int tile, Finish finish) const {
    const int slots = block.layout.slots, tiles = block.tiles(), group = slots >= tiles ? tiles : slots / 2;
    const int place = block.warp * kWarp + block.lane;
    const auto slot = [&](int t) { return block.cluster_sums(t / group % 2 * group + t % group) + place; };
    if (block.warp < block.layout.units[share.matrix]) *slot(tile) = sum;
    if (tile % group != group - 1 && tile != tiles - 1) return;
    sync_cluster();
    if (block.warp >= block.layout.units[share.matrix] || block.warp % block.layout.cluster != share.rank()) return;
    for (int t = tile / group * group; t <= tile; ++t) {
      Four total{};
      for (int rank = 0; rank < block.layout.cluster; ++rank) add(total, load_of_cluster(slot(t), rank));
      hand_over(total, t, finish);
    }
  }

  template <class Finish>
  ALBERT_DEVICE void run(Finish finish) {
    static_assert(kMostUnits <= kWarps, "a warp adds up one unit");
    Batch now, next;
    Four sums[kMostUnits];
    load(next, 0, 0);
    for (int tile = 0; tile < block.tiles(); ++tile) {
#pragma unroll
      for (int u = 0; u < kMostUnits; ++u) sums[u] = Four{};
      for (int batch = 0; batch < batches; ++batch) {
        now = next;
        // The next batch is on its way while this one is multiplied with.
        if (batch + 1 < batches)
          load(next, tile, batch + 1);
        else if (tile + 1 < block.tiles())
          load(next, tile + 1, 0);
        if (x.weight != nullptr) {
          Statistics of[2];
          statistics(now, tile, of);
          normalize(now, of);
        }
        multiply(now, batch, sums);
      }
      // Sums of the tile before may still be read; a product with LayerNorm has had its barrier.
      if (x.weight == nullptr && tile > 0) sync_block();
      const Four sum = add_warps(sums);
      if (share.split())
        add_blocks(sum, tile, finish);
      else
        hand_over(sum, tile, finish);
    }
  }
};

}  // namespace albert
