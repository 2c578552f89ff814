// Who holds what: how the layer's matrices are cut into units of 8 output columns, and dealt out to blocks.
//
// A unit of a matrix [out][in] lies in shared memory by chunks of 32 along `in`: [chunk][lane 4 g + t][8 elements], where
// the 8 are in = 32 chunk + 8 t + 0 … 7 of column g. A lane then has its operands of two matrix instructions in one load
// of 16 bytes, and the same 8 of a row of the other operand in another: which of the 32 goes into which place of an
// instruction does not matter, so long as both agree.
#pragma once
#include "device.h"
#include "resident_encoder.h"

namespace albert {

constexpr int kTile = 16;     // rows of a matrix instruction
constexpr int kUnit = 8;      // columns of it
constexpr int kChunk = 32;    // elements along the sum that two of them take
constexpr int kChunkBytes = kChunk * kUnit * 2;
constexpr int kMostUnits = 8;  // of one matrix that a block multiplies with: their sums are in registers
constexpr int kMostTokens = ALBERT_CUDA_MOST_TOKENS;
constexpr int kBatch = 4;      // chunks that a warp loads before it multiplies
constexpr int kMostNormalized = kBatch * kWarps * kChunk;  // columns of a row that a block's warps hold in registers

enum { kQkv, kDense, kFfn, kFfnOutput, kMatrices };

struct Layout {
  int hidden, inner, heads, blocks, cluster;
  int units[kMatrices];   // that a block multiplies with, at most
  int chunks[kMatrices];  // of each that it holds, at most
  int offset[kMatrices];  // of its units in shared memory, bytes
  int slots;              // for sums that a cluster's other blocks read: of so many tiles
  int scratch;            // what follows them: see below
  int shared_bytes;

  ALBERT_BOTH int head_dim() const { return hidden / heads; }
  ALBERT_BOTH int clusters() const { return blocks / cluster; }
  ALBERT_BOTH int inputs(int matrix) const { return matrix == kFfnOutput ? inner : hidden; }
};

// Scratch: sums of each warp (attention's scores and probabilities lie there, too), sums for the other blocks of a
// cluster, each warp's statistics of a tile's rows, mean and rstd of all rows, the rows' sequences.
constexpr int kScoreStride = kMostTokens + 4, kProbabilityStride = kMostTokens + 8;  // so that rows do not share banks
constexpr int kScoreBytes = kTile * kScoreStride * 4, kProbabilityBytes = kTile * kProbabilityStride * 2;
constexpr int kAttentionBytes = kScoreBytes + kProbabilityBytes + kTile * 4;
constexpr int kUnitSumBytes = kWarp * static_cast<int>(sizeof(Four));
constexpr int kPartialStatisticsBytes = kWarps * kTile * 8, kStatisticsBytes = kMostTokens * 8,
              kSequenceBytes = kMostTokens * 2;

ALBERT_BOTH int most(int a, int b) { return a > b ? a : b; }
ALBERT_BOTH int divide_up(int a, int b) { return (a + b - 1) / b; }

// Bytes of the warps' sums, and of those for other blocks.
ALBERT_BOTH int warp_sum_bytes(const Layout& l) {
  int units = 0;
  for (int matrix = 0; matrix < kMatrices; ++matrix) units = most(units, l.units[matrix]);
  return most(units * kWarps * kUnitSumBytes, kAttentionBytes);
}
ALBERT_BOTH int cluster_sum_bytes(const Layout& l) {
  return l.cluster == 1 ? 0 : most(l.units[kDense], l.units[kFfnOutput]) * kUnitSumBytes;
}

// Without clusters each block has whole units of every matrix, every blocks-th. In clusters
//   - query, key and value of a head are one cluster's, so that its attention waits for no other;
//   - dense and ffn_output are cut along their inputs: a cluster's blocks have a part of the same units each, read only
//     that part of the activations, and add up through each other's shared memory.
//
// slots: 2 at least; as many as tiles spare all but one of a product's cluster barriers.
inline Layout make_layout(int hidden, int inner, int heads, int blocks, int cluster, int slots) {
  Layout l{};
  l.slots = slots;
  l.hidden = hidden;
  l.inner = inner;
  l.heads = heads;
  l.blocks = blocks;
  l.cluster = cluster;
  const int clusters = l.clusters();
  const int head_units = 3 * l.head_dim() / kUnit;
  l.units[kQkv] = cluster == 1 ? divide_up(3 * hidden / kUnit, blocks)
                               : divide_up(heads, clusters) * divide_up(head_units, cluster);
  l.units[kDense] = l.units[kFfnOutput] = divide_up(hidden / kUnit, clusters);
  l.units[kFfn] = divide_up(inner / kUnit, blocks);
  l.chunks[kQkv] = l.chunks[kFfn] = hidden / kChunk;
  l.chunks[kDense] = divide_up(hidden / kChunk, cluster);
  l.chunks[kFfnOutput] = divide_up(inner / kChunk, cluster);
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    l.offset[matrix] = l.scratch;
    l.scratch += l.units[matrix] * l.chunks[matrix] * kChunkBytes;
  }
  l.shared_bytes = l.scratch + warp_sum_bytes(l) + l.slots * cluster_sum_bytes(l) + kPartialStatisticsBytes +
                   kStatisticsBytes + kSequenceBytes;
  return l;
}

// Why the kernel does not serve these sizes, whatever the device; null where it does.
inline bool serves(const Layout& l) {
  for (int units : l.units)
    if (units > kMostUnits) return false;
  const int head_dim = l.head_dim();
  return l.hidden % l.heads == 0 && l.hidden % kChunk == 0 && l.inner % kChunk == 0 && head_dim % kChunk == 0 &&
         head_dim <= 128 && l.hidden <= kMostNormalized;
}

// The units of a matrix that a block multiplies with, and its part of the chunks. -1: there is no i-th.
struct Share {
  const Layout& l;
  int matrix, block;

  ALBERT_BOTH bool split() const { return l.cluster > 1 && (matrix == kDense || matrix == kFfnOutput); }
  ALBERT_BOTH int rank() const { return block % l.cluster; }
  ALBERT_BOTH int unit(int i) const {
    if (matrix == kQkv && l.cluster > 1) {
      const int head_columns = l.head_dim() / kUnit, per_head = divide_up(3 * head_columns, l.cluster);
      const int head = block / l.cluster + i / per_head * l.clusters(), j = rank() + i % per_head * l.cluster;
      if (head >= l.heads || j >= 3 * head_columns) return -1;
      return j / head_columns * (l.hidden / kUnit) + head * head_columns + j % head_columns;
    }
    const int all = (matrix == kQkv ? 3 * l.hidden : matrix == kFfn ? l.inner : l.hidden) / kUnit;
    const int u = split() ? block / l.cluster + i * l.clusters() : block + i * l.blocks;
    return u < all ? u : -1;
  }
  ALBERT_BOTH int chunk_begin() const {
    return split() ? l.inputs(matrix) / kChunk * rank() / l.cluster : 0;
  }
  ALBERT_BOTH int chunk_end() const {
    return split() ? l.inputs(matrix) / kChunk * (rank() + 1) / l.cluster : l.inputs(matrix) / kChunk;
  }
};

}  // namespace albert
