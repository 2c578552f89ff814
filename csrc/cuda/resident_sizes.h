// The kernel's instances: sizes that the compiler knows, so that divisions, addresses and loops fold, or any.
#pragma once
#include "resident_layout.h"

namespace albert {

struct AnySizes {
  static constexpr bool kInClusters = false;  // alone: serves both
  static constexpr bool kOneTile = false, kWords = false;
  static constexpr int chunks_of(int) { return 0; }  // asked of words alone
  static constexpr int kWarps = kFewWarps, kThreads = kWarps * kWarp;
  static constexpr int kTilesOfWarp = 1, kBatch = 4;
  ALBERT_DEVICE static const Layout& layout(const Layout& given) { return given; }
};

// Of a layer on kBlocks blocks: more of them may run, and have nothing to multiply with. kWordWarps: of a block that waits
// for the other blocks' words, not at barriers; 0: at barriers.
template <int kInstance, int kHidden, int kInner, int kHeads, int kBlocks, int kCluster, int kTiles, bool kOne = false,
          int kWordWarps = 0>
struct Sizes {
  static constexpr bool kInClusters = kCluster > 1;
  static constexpr bool kOneTile = kOne;  // of tokens: every block then computes all of attention itself
  static constexpr bool kWords = kWordWarps > 0;
  static constexpr int kWarps = kWords ? kWordWarps : kFewWarps, kThreads = kWarps * kWarp;
  // A warp's share of ffn_output's inputs is 12 chunks: of one tile they are all on their way at once.
  static constexpr int kTilesOfWarp = kTiles, kBatch = kOne ? 12 : 6 / kTiles, kLeastBlocks = kBlocks;
  ALBERT_BOTH static constexpr int chunks_of(int matrix) { return make().chunks[matrix]; }
  static constexpr int kHeadChunks = kHidden / kHeads / kChunk, kHeadRounds = divide_up(kHeads, kWarps);
  ALBERT_BOTH static constexpr Layout make() {
    return make_layout(kInstance, kHidden, kInner, kHeads, kBlocks, kCluster, kTiles, kMostTiles, kWarps, kWords ? 2 : 1);
  }
  ALBERT_DEVICE static Layout layout(const Layout&) {
    constexpr Layout l = make();
    return l;
  }
};

#ifdef __CUDACC__  // ALBERT base, from 16 clusters on; and as an A100 has room for it
using InClusters = Sizes<1, 768, 3072, 12, 128, 8, 2>;
using Alone = Sizes<2, 768, 3072, 12, 96, 1, 1>;
using OneTile = Sizes<3, 768, 3072, 12, 96, 1, 1, true>;
using Words = Sizes<4, 768, 3072, 12, 96, 1, 1, true, 16>;
static_assert(InClusters::make().shared_bytes <= 227 << 10 && Alone::make().shared_bytes <= 163 << 10 &&
                  Words::make().shared_bytes <= 227 << 10,
              "no room");
#else  // as little, for tests
using InClusters = Sizes<1, 64, 96, 2, 8, 8, 2>;
using Alone = Sizes<2, 64, 96, 2, 3, 1, 1>;
using OneTile = Sizes<3, 64, 96, 2, 3, 1, 1, true>;
using Words = Sizes<4, 128, 288, 2, 16, 1, 1, true, 4>;
#endif

}  // namespace albert
