// The kernel's instances: sizes that the compiler knows, so that divisions, addresses and loops fold, or any.
#pragma once
#include "resident_layout.h"

namespace albert {

struct AnySizes {
  static constexpr bool kInClusters = false;  // alone: serves both
  static constexpr bool kOneTile = false;
  static constexpr int kTilesOfWarp = 1, kBatch = 4;
  ALBERT_DEVICE static const Layout& layout(const Layout& given) { return given; }
};

// Of a layer on kBlocks blocks: more of them may run, and have nothing to multiply with.
template <int kInstance, int kHidden, int kInner, int kHeads, int kBlocks, int kCluster, int kTiles, bool kOne = false>
struct Sizes {
  static constexpr bool kInClusters = kCluster > 1;
  static constexpr bool kOneTile = kOne;  // of tokens: every block then computes all of attention itself
  // A warp's share of ffn_output's inputs is 12 chunks: of one tile they are all on their way at once.
  static constexpr int kTilesOfWarp = kTiles, kBatch = kOne ? 12 : 6 / kTiles, kLeastBlocks = kBlocks;
  static constexpr int kHeadChunks = kHidden / kHeads / kChunk, kHeadRounds = divide_up(kHeads, kWarps);
  ALBERT_BOTH static constexpr Layout make() {
    return make_layout(kInstance, kHidden, kInner, kHeads, kBlocks, kCluster, kTiles, kMostTiles);
  }
  ALBERT_DEVICE static Layout layout(const Layout&) {
    constexpr Layout l = make();
    return l;
  }
};

// Those of resident_words.h, of a layer on kBlocks blocks in clusters.
template <int kHiddenSize, int kInnerSize, int kHeadCount, int kBlockCount, int kClusterSize, int kWarpCount>
struct WordSizes {
  static constexpr int kHidden = kHiddenSize, kInner = kInnerSize, kHeads = kHeadCount, kHeadDim = kHidden / kHeads;
  static constexpr int kBlocks = kBlockCount, kCluster = kClusterSize;
  static constexpr int kWarps = kWarpCount, kThreads = kWarps * kWarp;

  ALBERT_BOTH static constexpr int inputs(int matrix) { return matrix == kFfnOutput ? kInner : kHidden; }
  ALBERT_BOTH static constexpr int outputs(int matrix) {
    return matrix == kQkv ? 3 * kHidden : matrix == kFfn ? kInner : kHidden;
  }
  ALBERT_BOTH static constexpr int units(int matrix) { return outputs(matrix) / kUnit / kBlocks; }    // of a block
  ALBERT_BOTH static constexpr int chunks(int matrix) { return inputs(matrix) / kChunk / kCluster; }  // the same
  static constexpr int kMostOfUnits = most(most(units(kQkv), units(kDense)), units(kFfn));
  // A product's warps are as many as the cluster has blocks. Each multiplies the block's inputs with the units of one of
  // them; but with those of all of them a part of the inputs where there are more inputs than columns.
  ALBERT_BOTH static constexpr int groups(int matrix) { return matrix == kFfnOutput ? kCluster : 1; }
  ALBERT_BOTH static constexpr int parts(int matrix) { return kCluster * groups(matrix); }  // of a unit's sum
  static constexpr int kFoldGroups = kWarps / kCluster;
  static constexpr int kHeadChunks = kHeadDim / kChunk, kHeadsOfBlock = kHeads / kCluster;
  static constexpr int kWarpsOfHead = kWarps / kHeadsOfBlock;
  static constexpr int kPairsOfWarp = kHeadChunks * 4 / kWarpsOfHead;  // of a lane's 4 of a chunk

  // ---- shared memory, bytes ----
  ALBERT_BOTH static constexpr int weight_bytes(int matrix) {
    return kCluster * units(matrix) * chunks(matrix) * kChunkBytes;
  }
  ALBERT_BOTH static constexpr int weights(int matrix) {  // [block of the cluster][unit][chunk]
    int at = 0;
    for (int before = kQkv; before < kMatrices; ++before) at += before < matrix ? weight_bytes(before) : 0;
    return at;
  }
  ALBERT_BOTH static constexpr int sum_bytes(int matrix) { return parts(matrix) * units(matrix) * kWarp * 16; }
  static constexpr int kSums = weights(kMatrices);  // [2][part][unit][lane] Four
  static constexpr int kSumsBytes = most(most(sum_bytes(kQkv), sum_bytes(kFfn)), sum_bytes(kFfnOutput));
  static constexpr int kFragment = kWarp * 16;  // a lane's Eight
  // Fragments [chunk][rows 0 and up, 8 and up]: see take_words. Each of two products in turn has its own.
  static constexpr int kRows = kSums + 2 * kSumsBytes;
  static constexpr int kHeadRows = kRows + 2 * chunks(kQkv) * kFragment, kInnerRows = kHeadRows;
  static constexpr int kContext = kHeadRows + 6 * kHeadsOfBlock * kHeadChunks * kFragment;
  static constexpr int kRowsEnd =
      most(kContext + 2 * kHeadsOfBlock * kHeadChunks * kFragment, kInnerRows + 2 * chunks(kFfnOutput) * kFragment);
  static constexpr int kFolded = kRowsEnd;  // [qkv, ffn][part][unit][8] Two: u and c
  static constexpr int kFoldedBytes = kWarps * kMostOfUnits * kUnit * 8;
  static constexpr int kChunkStatistics = kFolded + 2 * kFoldedBytes;                  // [chunk][row]
  static constexpr int kRankStatistics = kChunkStatistics + chunks(kQkv) * kTile * 8;  // [block of the cluster][row]
  static constexpr int kArrivals = kRankStatistics + kCluster * kTile * 8;  // [4]: of sums in turns, these, folded
  static constexpr int kNorms = kArrivals + 4 * 8;  // [weight and bias of both LayerNorms][the block's inputs] floats
  static constexpr int kNormInputs = kHidden / kCluster;
  static constexpr int kSequences = kNorms + 4 * kNormInputs * 4;
  static constexpr int kVectors = kSequences + kTile * 2;  // [matrix][3][units][8] floats: see Layout
  static constexpr int kVectorBytes = 3 * kMostOfUnits * kUnit * 4;
  static constexpr int kSharedBytes = kVectors + kMatrices * kVectorBytes;

  // ---- what clusters tell each other in a pass, elements: [unit][16 rows][8] ----
  static constexpr int kQkvWords = 0, kAttended = 3 * kHidden * kTile, kInnerWords = kAttended + kHidden * kTile;
  static constexpr int kSummed = kInnerWords + kInner * kTile, kPassElements = kSummed + kHidden * kTile;

  static constexpr bool same(int matrix) {
    return outputs(matrix) % (kUnit * kBlocks) == 0 && inputs(matrix) % (kChunk * kCluster * kFoldGroups) == 0 &&
           chunks(matrix) % groups(matrix) == 0 && units(matrix) <= kWarps;
  }
  static_assert(same(kQkv) && same(kDense) && same(kFfn) && same(kFfnOutput), "products are not cut into equal parts");
  static_assert(units(kQkv) >= units(kDense) && units(kFfn) >= units(kDense), "a residual's LayerNorm is not known");
  static_assert(kBlocks % kCluster == 0 && kWarps % kCluster == 0 && kHeads % kCluster == 0 &&
                    kWarps % kHeadsOfBlock == 0 && kPairsOfWarp * kWarpsOfHead == kHeadChunks * 4 && 4 % kPairsOfWarp == 0,
                "heads are not cut into equal parts");
  static_assert(kThreads >= kCluster * (kWarp + kTile), "a product's warps have no time for statistics");
};

#if defined(__CUDACC__) || defined(ALBERT_SIZES_OF_BASE)
// ALBERT base, from 16 clusters on; as an A100 has room for it; of 16 tokens, from 24 clusters on
using InClusters = Sizes<1, 768, 3072, 12, 128, 8, 2>;
using Alone = Sizes<2, 768, 3072, 12, 96, 1, 1>;
using OneTile = Sizes<3, 768, 3072, 12, 96, 1, 1, true>;
using Words = WordSizes<768, 3072, 12, 96, 4, 12>;
static_assert(InClusters::make().shared_bytes <= 227 << 10 && Alone::make().shared_bytes <= 163 << 10 &&
                  Words::kSharedBytes <= 227 << 10,
              "no room");
#else  // as little, for tests
using InClusters = Sizes<1, 64, 96, 2, 8, 8, 2>;
using Alone = Sizes<2, 64, 96, 2, 3, 1, 1>;
using OneTile = Sizes<3, 64, 96, 2, 3, 1, 1, true>;
using Words = WordSizes<128, 256, 2, 16, 2, 4>;
#endif

}  // namespace albert
