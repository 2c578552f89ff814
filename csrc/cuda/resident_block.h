// What a thread of the resident encoder knows: its place, the arguments, its block's shared memory, and how blocks wait
// for each other.
#pragma once
#include "device.h"
#include "resident_layout.h"

namespace albert {

// Two numbers a row: mean and rstd, or what they are made of.
struct Statistics {
  float mean, rstd;
};
struct Sequence {
  uint8_t begin, end;  // of the row's sequence among the tokens; end is at most 128
};

// T: of hidden states; P: of parameters.
template <class T, class P>
struct Arguments {
  Layout layout;
  int tokens, batch, passes, activation;
  bool return_all;
  float eps;
  const T* hidden;
  const int32_t* cu_seqlens;
  const P* parameters[16];
  T* output;
  // Workspace.
  uint32_t* arrivals;  // of blocks at the grid's barrier, zero at first
  T* query_key;        // [tokens][2 hidden]
  T* value;            // [hidden][value_stride()]: transposed, so that pairs of tokens are one load
  T* context;          // [tokens][hidden]
  T* attended;         // [tokens][hidden], before the first LayerNorm
  T* inner;            // [tokens][inner], after the activation
  T* summed;           // [tokens][hidden], before the second LayerNorm

  ALBERT_BOTH int value_stride() const { return divide_up(tokens, kChunk) * kChunk; }
};

// Places among a layer's parameters.
enum { kQuery = 0, kKey = 2, kValue = 4, kDenseWeight = 6, kAttentionNorm = 8, kFfnWeight = 10, kFfnOutputWeight = 12,
       kNorm = 14 };

template <class T, class P>
struct Block {
  const Arguments<T, P>& args;
  const Layout& layout;
  char* shared;
  int thread, warp, lane, index;
  int row, quad;  // of a matrix instruction's operands: lane = 4 row + quad
  uint32_t arrived = 0;

  ALBERT_DEVICE explicit Block(const Arguments<T, P>& a)
      : args(a), layout(a.layout), shared(shared_memory()), thread(thread_index()), warp(thread / kWarp),
        lane(thread % kWarp), index(block_index()), row(lane / 4), quad(lane % 4) {}

  ALBERT_DEVICE int tiles() const { return divide_up(args.tokens, kTile); }
  ALBERT_DEVICE const char* weights(int matrix) const { return shared + layout.offset[matrix]; }
  ALBERT_DEVICE Four* warp_sums() const { return reinterpret_cast<Four*>(shared + layout.scratch); }
  ALBERT_DEVICE Four* cluster_sums(int slot) const {
    return reinterpret_cast<Four*>(shared + layout.scratch + warp_sum_bytes(layout) + slot * cluster_sum_bytes(layout));
  }
  ALBERT_DEVICE Statistics* partial_statistics() const { return reinterpret_cast<Statistics*>(cluster_sums(layout.slots)); }
  ALBERT_DEVICE Statistics* statistics() const { return partial_statistics() + kWarps * kTile; }
  ALBERT_DEVICE Sequence* sequences() const { return reinterpret_cast<Sequence*>(statistics() + kMostTokens); }

  // All blocks. The count only grows, and begins at zero with each launch.
  ALBERT_DEVICE void sync_grid() {
    arrived += static_cast<uint32_t>(layout.blocks);
    sync_block();
    if (thread == 0) {
      add_release(args.arrivals, 1);
      while (load_acquire(args.arrivals) < arrived) pause();
    }
    sync_block();
  }
};

template <class T>
ALBERT_DEVICE float element(const Eight& x, int i) {
  const uint32_t pair = x.pair[i / 2];
  return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? pair : pair >> 16)});
}
template <class P>
ALBERT_DEVICE void load_parameters(const P* p, float (&to)[8]) {
  const Eight x = load_constant(p);
#pragma unroll
  for (int i = 0; i < 8; ++i) to[i] = element<P>(x, i);
}
ALBERT_DEVICE void load_parameters(const float* p, float (&to)[8]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Eight x = load_constant(p + 4 * half);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[4 * half + i] = float_of(x.pair[i]);
  }
}
template <class T>
ALBERT_DEVICE uint32_t pack_pair(float low, float high) {
  T a, b;
  from_float(low, a);
  from_float(high, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}
template <class T>
ALBERT_DEVICE void load_pair(const T* p, float& low, float& high) {
  const uint32_t pair = load_pair_shared_by_blocks(p);
  low = to_float(T{static_cast<uint16_t>(pair)});
  high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}
template <class T>
ALBERT_DEVICE void store_pair(T* p, float low, float high) {
  *reinterpret_cast<uint32_t*>(p) = pack_pair<T>(low, high);
}

}  // namespace albert
