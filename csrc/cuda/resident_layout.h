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
constexpr int kMostTiles = kMostTokens / kTile;
constexpr int kScoreStride = kMostTokens + 8;  // of attention's scores: 8 rows do not share banks

enum { kQkv, kDense, kFfn, kFfnOutput, kMatrices };

ALBERT_BOTH constexpr int most(int a, int b) { return a > b ? a : b; }
ALBERT_BOTH constexpr int least(int a, int b) { return a < b ? a : b; }
ALBERT_BOTH constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

// The exponent of the least power of two that is not below x, of up to 256.
ALBERT_BOTH constexpr int log2_up(int x) {
  return x <= 1 ? 0 : x <= 2 ? 1 : x <= 4 ? 2 : x <= 8 ? 3 : x <= 16 ? 4 : x <= 32 ? 5 : x <= 64 ? 6 : x <= 128 ? 7 : 8;
}

struct Layout {
  int instance;  // of the kernel: see resident_sizes.h
  int hidden, inner, heads, blocks, cluster;
  int units[kMatrices];   // that a block multiplies with, at most
  int chunks[kMatrices];  // of each that it holds, at most
  int tiles_of_warp;
  int tiles_at_once;  // whose sums a cluster's blocks have room for
  // Where what lies in shared memory, bytes.
  int weights[kMatrices];
  int vectors[kMatrices];  // [3][units][8] floats: the bias; of a residual's LayerNorm weight and bias; of a LayerNorm
                           // before the product what Encoder::fold finds
  int sums;                // [part of the sum][row][units][8] floats; attention's scores lie there, too
  int received;            // [rank][row][units][8] floats: from the cluster's other blocks
  int arrivals;            // of what is received
  int row_norms, sequences, keys;
  int shared_bytes;

  ALBERT_BOTH constexpr int head_dim() const { return hidden / heads; }
  ALBERT_BOTH constexpr int inputs(int matrix) const { return matrix == kFfnOutput ? inner : hidden; }
  ALBERT_BOTH constexpr int outputs(int matrix) const {
    return matrix == kQkv ? 3 * hidden : matrix == kFfn ? inner : hidden;
  }
  // In clusters dense and ffn_output are cut along their inputs, too.
  ALBERT_BOTH constexpr bool split(int matrix) const {
    return cluster > 1 && (matrix == kDense || matrix == kFfnOutput);
  }
  ALBERT_BOTH constexpr int chunk_begin(int matrix, int rank) const {
    if (!split(matrix)) return 0;
    const int all = inputs(matrix) / kChunk;
    return all % cluster == 0 ? all / cluster * rank : all * rank / cluster;
  }
  ALBERT_BOTH constexpr int chunk_count(int matrix, int rank) const {
    const int all = inputs(matrix) / kChunk;
    if (!split(matrix)) return all;
    return all % cluster == 0 ? all / cluster : chunk_begin(matrix, rank + 1) - chunk_begin(matrix, rank);
  }
  // A row before a LayerNorm is made in so many parts, of so many columns each but the last.
  ALBERT_BOTH constexpr int norm_columns() const { return units[kDense] * kUnit; }
  ALBERT_BOTH constexpr int norm_parts() const { return divide_up(hidden, norm_columns()); }
  ALBERT_BOTH constexpr int norm_columns(int part) const {
    return hidden % norm_columns() == 0 ? norm_columns() : least(norm_columns(), hidden - part * norm_columns());
  }
  // In clusters a head's columns of query, key and value are one cluster's, which has so many heads.
  ALBERT_BOTH constexpr int head_units() const { return divide_up(3 * head_dim() / kUnit, cluster); }
  ALBERT_BOTH constexpr int heads_of_cluster() const { return units[kQkv] / head_units(); }

  // The first column of a block's i-th unit; -1: there is no i-th.
  ALBERT_BOTH constexpr int column(int matrix, int block, int i) const {
    if (matrix == kQkv && cluster > 1) {
      const int head = block / cluster * heads_of_cluster() + i / head_units();
      const int j = (block % cluster * head_units() + i % head_units()) * kUnit;
      if (i >= units[kQkv] || head >= heads || j >= 3 * head_dim()) return -1;
      return j / head_dim() * hidden + head * head_dim() + j % head_dim();
    }
    const int column = ((split(matrix) ? block / cluster : block) * units[matrix] + i) * kUnit;
    return i < units[matrix] && column < outputs(matrix) ? column : -1;
  }
};

// Of some columns of a row: their mean, and the sum of their squared deviations from it.
struct Statistics {
  float mean, squares;
};
// What LayerNorm does to a row: (x - mean) scale, before weight and bias.
struct Norm {
  float mean, scale;
};
struct Sequence {
  uint8_t begin, end;  // of the row's sequence among the tokens; end is at most 128
};

// Without clusters each block has whole units of every matrix. In clusters
//   - query, key and value of a head are one cluster's, so that its attention waits for no other;
//   - dense and ffn_output are cut along their inputs: a cluster's blocks have a part of the same units each, read only
//     that part of the activations, and send their sums to the block of the cluster that finishes the row.
ALBERT_BOTH constexpr Layout make_layout(int instance, int hidden, int inner, int heads, int blocks, int cluster,
                                         int tiles_of_warp, int tiles_at_once) {
  Layout l{};
  l.instance = instance;
  l.hidden = hidden;
  l.inner = inner;
  l.heads = heads;
  l.blocks = blocks;
  l.cluster = cluster;
  l.tiles_of_warp = tiles_of_warp;
  l.tiles_at_once = tiles_at_once;
  const int clusters = blocks / cluster;
  l.units[kQkv] = cluster == 1 ? divide_up(3 * hidden / kUnit, blocks) : divide_up(heads, clusters) * l.head_units();
  l.units[kDense] = l.units[kFfnOutput] = divide_up(hidden / kUnit, clusters);
  l.units[kFfn] = divide_up(inner / kUnit, blocks);
  const auto take = [&](int bytes) {
    const int at = l.shared_bytes;
    l.shared_bytes += divide_up(bytes, 16) * 16;
    return at;
  };
  int widest = 0;
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    const int inputs = l.inputs(matrix) / kChunk;
    l.chunks[matrix] = l.split(matrix) ? divide_up(inputs, cluster) : inputs;
    l.weights[matrix] = take(l.units[matrix] * l.chunks[matrix] * kChunkBytes);
    l.vectors[matrix] = take(3 * l.units[matrix] * kUnit * 4);
    widest = most(widest, l.units[matrix] * kUnit);
  }
  l.sums = take(most(kWarps * tiles_of_warp * kTile * widest * 4, kTile * kScoreStride * 4));
  l.received = take(cluster == 1 ? 0 : tiles_at_once * kTile * l.units[kDense] * kUnit * 4);
  l.arrivals = take(cluster == 1 ? 0 : static_cast<int>(sizeof(Arrivals)));
  l.row_norms = take(kMostTokens * static_cast<int>(sizeof(Norm)));
  l.sequences = take(kMostTokens * static_cast<int>(sizeof(Sequence)));
  l.keys = take(kMostTiles * static_cast<int>(sizeof(Sequence)));
  return l;
}

constexpr int kClusterBlocks = 8;  // the most that every device with clusters has

struct Device {
  int index, multiprocessors, shared_bytes;  // that a block may have
  int has_clusters;
};

// Whether the kernel serves these sizes, if there is room.
inline bool serves(const Layout& l) {
  for (int units : l.units)
    if (units > kMostUnits) return false;
  const int head_dim = l.head_dim();
  return l.hidden % l.heads == 0 && l.hidden % kChunk == 0 && l.inner % kChunk == 0 && head_dim % kChunk == 0 &&
         head_dim <= 128;
}

}  // namespace albert
