// The encoder in one kernel. A pass is
//
//   query, key, value | attention | dense + residual | ffn, gelu | ffn_output + residual
//
// with a barrier of the whole grid at each |, and at the first one of a cluster where there are clusters; of up to 16 tokens
// every block computes all of attention itself, in place of the second barrier. LayerNorm has no step of its own: who
// writes a row leaves the statistics of its columns, and who reads it adds those up on the way. Its weight is multiplied
// into that of the product that follows it, whose sums are then
//
//   LN(x) Wᵀ + b = ((x - mean) / deviation * weight + bias) Wᵀ + b = (x W'ᵀ - mean u) / deviation + c
//
// with W' = W weight, u its rows' sums and c = W bias + b, so that no product waits for statistics.
#include "resident_parameters.h"
#include "resident_product.h"

namespace albert {

template <class T, class S>
struct Encoder {
  const Arguments<T>& args;
  Block<T, S> block;
  const Parameters<T> parameters;

  ALBERT_DEVICE explicit Encoder(const Arguments<T>& a)
      : args(a), block(a), parameters{a, layout().hidden, layout().inner} {}

  ALBERT_DEVICE decltype(auto) layout() const { return block.layout(); }

  // ---- once ----
  ALBERT_DEVICE void load_weights() {
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const int begin = layout().chunk_begin(matrix, block.rank), chunks = layout().chunk_count(matrix, block.rank);
      for (int u = 0; u < layout().units[matrix]; ++u) {
        const int first = layout().column(matrix, block.index, u);
        if (first < 0) continue;
        // Consecutive threads take what lies together in a row: 4 of them a chunk.
        for (int i = block.thread; i < kUnit * chunks * 4; i += kThreads) {
          const int column = i / (chunks * 4), chunk = i / 4 % chunks, quad = i % 4;
          char* to = block.shared + layout().weights[matrix] + (u * layout().chunks[matrix] + chunk) * kChunkBytes +
                     (column * 4 + quad) * static_cast<int>(sizeof(Eight));
          parameters.bring(to, matrix, first + column, (begin + chunk) * kChunk + quad * 8);
        }
      }
    }
  }

  // Of the block's own columns the biases, and weight and bias of the residuals' LayerNorms.
  ALBERT_DEVICE void load_vectors() {
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix)
      for (int i = block.thread; i < layout().units[matrix] * kUnit; i += kThreads) {
        const int column = layout().column(matrix, block.index, i / kUnit);
        if (column < 0) continue;
        for (int which = 0; which < (matrix == kDense || matrix == kFfnOutput ? 3 : 1); ++which)
          block.vector(matrix, which)[i] = parameters.vector(matrix, which, column + i % kUnit);
      }
  }

  // Of a matrix after a LayerNorm W', u and c (see above), in place; who calls has no sums in shared memory.
  template <int kMatrix>
  ALBERT_DEVICE void fold() {
    const int norm = kMatrix == kQkv ? kNorm : kAttentionNorm, units = layout().units[kMatrix];
    const int chunks = layout().chunks[kMatrix];
    float u[kMostUnits] = {}, c[kMostUnits] = {};
    for (int chunk = block.warp; chunk < chunks; chunk += kWarps) {
      float weight[8], bias[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        weight[i] = parameters.value(norm, chunk * kChunk + block.quad * 8 + i);
        bias[i] = parameters.value(norm + 1, chunk * kChunk + block.quad * 8 + i);
      }
#pragma unroll
      for (int unit = 0; unit < kMostUnits; ++unit) {
        if (unit >= units) break;
        Eight& at = *reinterpret_cast<Eight*>(block.shared + layout().weights[kMatrix] +
                                              (unit * chunks + chunk) * kChunkBytes +
                                              block.lane * static_cast<int>(sizeof(Eight)));
        at = folded_weight<T>(at, weight, bias, u[unit], c[unit]);
      }
    }
    float* sums = block.sums();  // [warp][u, c][units][8]
#pragma unroll
    for (int unit = 0; unit < kMostUnits; ++unit) {
      if (unit >= units) break;
      for (int mask = 1; mask < 4; mask *= 2) {
        u[unit] += shuffle_xor(u[unit], mask);
        c[unit] += shuffle_xor(c[unit], mask);
      }
      if (block.quad != 0) continue;
      sums[(block.warp * 2 * units + unit) * kUnit + block.row] = u[unit];
      sums[((block.warp * 2 + 1) * units + unit) * kUnit + block.row] = c[unit];
    }
    sync_block();
    for (int i = block.thread; i < 2 * units * kUnit; i += kThreads) {
      const bool is_c = i >= units * kUnit;
      float total = is_c ? block.vector(kMatrix, 0)[i - units * kUnit] : 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) total += sums[warp * 2 * units * kUnit + i];
      block.vector(kMatrix, 1)[i] = total;  // u, and c after it
    }
    sync_block();
  }

  // Of every row its sequence, and of every tile the keys that its rows see.
  ALBERT_DEVICE void find_sequences() {
    for (int r = block.thread; r < kMostTokens; r += kThreads) block.sequences()[r] = sequence_of(args, r);
    sync_block();
    for (int tile = block.thread; tile < kMostTiles; tile += kThreads) {
      int begin = kMostTokens, end = 0;
      for (int r = tile * kTile; r < (tile + 1) * kTile; ++r) {
        const Sequence s = block.sequences()[r];
        if (s.begin == s.end) continue;
        begin = least(begin, s.begin);
        end = most(end, s.end);
      }
      block.keys()[tile] = {static_cast<uint8_t>(begin / kTile * kTile), static_cast<uint8_t>(divide_up(end, kTile) * kTile)};
    }
  }

  // ---- each pass ----
  // The second LayerNorm for who called: a row a warp.
  ALBERT_DEVICE void write_output(T* output) const {
    for (int r = block.index * kWarps + block.warp; r < args.tokens; r += block_count() * kWarps) {
      const Norm s = block.norm_of(r, block.lane, kWarp);
      for (int column = 2 * block.lane; column < layout().hidden; column += 2 * kWarp) {
        const uint32_t x = load_pair_shared_by_blocks(args.summed + r * layout().hidden + column);
        const auto one = [&](float value, int i) {
          return (value - s.mean) * s.scale * parameters.value(kNorm, i) + parameters.value(kNorm + 1, i);
        };
        *reinterpret_cast<uint32_t*>(output + r * layout().hidden + column) =
            pack_pair(one(low<T>(x), column), one(high<T>(x), column + 1), T{});
      }
    }
  }

  ALBERT_DEVICE void run() {
    if (layout().cluster > 1 && block.thread == 0) make_arrivals(block.arrivals());
    load_weights();
    load_vectors();
    find_sequences();
    wait_copies();
    sync_block();
    fold<kFfn>();
    // Each product prepares while the blocks wait for each other.
#pragma unroll 1
    for (int pass = 0;; ++pass) {
      const bool first = pass == 0;
      block.begin();
      Product<T, S, kQkv> qkv(block, first ? args.hidden : args.summed, first);
      if (first) {
        qkv.prepare(0);
      } else {
        block.sync_grid([&] { qkv.prepare(0); });
        if (args.return_all || pass == args.passes)
          write_output(args.output + (args.return_all ? static_cast<long>(pass - 1) * args.tokens * layout().hidden : 0));
        if (pass == args.passes) return;
      }
      block.mark();
      qkv.run();
      if (first) {  // which has no LayerNorm before it
        sync_block();
        fold<kQkv>();
      }
      block.mark();
      if constexpr (!S::kOneTile) {
        if (layout().cluster > 1)
          sync_cluster();
        else
          block.sync_grid([] {});
        block.begin();
        block.mark();
        Attention<T, S>(block).run();
        block.mark();
      }
      run<kDense>(args.context, first);
      run<kFfn>(args.attended, first);
      run<kFfnOutput>(args.inner, first);
    }
  }

  template <int kMatrix>
  ALBERT_DEVICE void run(const T* rows, bool first) {
    block.begin();
    Product<T, S, kMatrix> product(block, rows, first);
    block.sync_grid([&] { product.prepare(0); });
    block.mark();
    product.run();
    block.mark();
  }
};

template <class T, class S>
ALBERT_KERNEL(kThreads) void resident_encoder(ALBERT_ARGUMENT Arguments<T> args) {
  if constexpr (kHasClusters || !S::kInClusters) Encoder<T, S>(args).run();
}

}  // namespace albert

#include "resident_launch.h"
