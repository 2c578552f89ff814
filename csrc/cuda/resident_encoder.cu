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
#include "resident_product.h"

namespace albert {

template <class T, class S>
struct Encoder {
  static constexpr int kWarps = S::kWarps, kThreads = S::kThreads;

  const Arguments<T>& args;
  Block<T, S> block;

  ALBERT_DEVICE explicit Encoder(const Arguments<T>& a) : args(a), block(a) {}

  ALBERT_DEVICE decltype(auto) layout() const { return block.layout(); }

  // ---- once ----
  // Where row `row` of a matrix [out][in] lies, of query, key and value one after the other for kQkv: the place of its
  // weight among the parameters; row becomes one of that weight.
  ALBERT_DEVICE int weight_of(int matrix, int& row) const {
    constexpr int kPlaces[kMatrices] = {kQuery, kDenseWeight, kFfnWeight, kFfnOutputWeight};
    if (matrix != kQkv) return matrix == kDense ? kPlaces[1] : matrix == kFfn ? kPlaces[2] : kPlaces[3];
    const int part = row / layout().hidden;
    row -= part * layout().hidden;
    return part == 0 ? kQuery : part == 1 ? kKey : kValue;
  }
  ALBERT_DEVICE float parameter(int which, int i) const {
    const void* p = args.parameters[which];
    return args.float_parameters ? static_cast<const float*>(p)[i] : to_float(static_cast<const T*>(p)[i]);
  }

  // Eight elements that lie one after the other, into shared memory as T.
  ALBERT_DEVICE static void bring(char* to, const float* from) {
    Eight y;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Eight x = load_constant(from + 4 * half);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        y.pair[2 * half + i] = pack_pair(float_of(x.pair[2 * i]), float_of(x.pair[2 * i + 1]), T{});
    }
    *reinterpret_cast<Eight*>(to) = y;
  }

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
          int row = first + column;
          const void* weight = args.parameters[weight_of(matrix, row)];
          const long at = static_cast<long>(row) * layout().inputs(matrix) + (begin + chunk) * kChunk + quad * 8;
          if (args.float_parameters)
            bring(to, static_cast<const float*>(weight) + at);
          else
            copy_async(to, static_cast<const T*>(weight) + at);
        }
      }
    }
  }

  // Of the block's own columns the biases, and weight and bias of the residuals' LayerNorms: a vector a warp, so that they
  // are on their way at the same time.
  ALBERT_DEVICE void load_vectors() {
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const bool has_norm = matrix == kDense || matrix == kFfnOutput;
#pragma unroll
      for (int which = 0; which < (has_norm ? 3 : 1); ++which) {
        if (block.warp != (matrix + which * kMatrices) % kWarps) continue;
        for (int i = block.lane; i < layout().units[matrix] * kUnit; i += kWarp) {
          int column = layout().column(matrix, block.index, i / kUnit);
          if (column < 0) continue;
          column += i % kUnit;
          int parameters = (matrix == kDense ? kNorm : kAttentionNorm) + which - 1;  // of the residual
          if (which == 0) parameters = weight_of(matrix, column) + 1;
          block.vector(matrix, which)[i] = parameter(parameters, column);
        }
      }
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
        weight[i] = parameter(norm, chunk * kChunk + block.quad * 8 + i);
        bias[i] = parameter(norm + 1, chunk * kChunk + block.quad * 8 + i);
      }
#pragma unroll
      for (int unit = 0; unit < kMostUnits; ++unit) {
        if (unit >= units) break;
        Eight& at = *reinterpret_cast<Eight*>(block.shared + layout().weights[kMatrix] +
                                              (unit * chunks + chunk) * kChunkBytes +
                                              block.lane * static_cast<int>(sizeof(Eight)));
        Eight w = at;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float first = low<T>(w.pair[i]), second = high<T>(w.pair[i]);
          c[unit] += first * bias[2 * i] + second * bias[2 * i + 1];
          w.pair[i] = pack_pair(first * weight[2 * i], second * weight[2 * i + 1], T{});
          u[unit] += low<T>(w.pair[i]) + high<T>(w.pair[i]);
        }
        at = w;
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

  // Of every row its sequence, none beyond the last; offsets that are no offsets are brought into the tokens' range.
  ALBERT_DEVICE void find_sequences() {
    const auto offset = [&](int i) {
      const int x = args.cu_seqlens[i];
      return x < 0 ? 0 : x > args.tokens ? args.tokens : x;
    };
    // By the last warp first, which has no vector to load.
    for (int r = kThreads - 1 - block.thread; r < (S::kOneTile ? kTile : kMostTokens); r += kThreads) {
      Sequence s{0, 0};
      for (int i = 0; i < args.batch && r < args.tokens; ++i)
        if (offset(i) <= r && r < offset(i + 1)) s = {static_cast<uint8_t>(offset(i)), static_cast<uint8_t>(offset(i + 1))};
      block.sequences()[r] = s;
    }
    if (S::kOneTile) return;  // whose keys are all the tokens
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
      const Norm s = block.norm_of(block.statistics(kQkv, r), block.lane, kWarp);
      for (int column = 2 * block.lane; column < layout().hidden; column += 2 * kWarp) {
        const uint32_t x = load_pair_shared_by_blocks(args.summed + r * layout().hidden + column);
        const auto one = [&](float value, int i) {
          return (value - s.mean) * s.scale * parameter(kNorm, i) + parameter(kNorm + 1, i);
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
      block.pass = pass;
      if constexpr (S::kWords)
        if (pass == args.passes) return Product<T, S, kDense>(block, nullptr, false).write_last();
      Product<T, S, kQkv> qkv(block, first ? args.hidden : block.before(args.summed), first);
      if (first) {
        qkv.prepare(0);
      } else {
        block.sync_grid([&] { qkv.prepare(0); });
        if constexpr (!S::kWords) {
          if (args.return_all || pass == args.passes)
            write_output(args.output +
                         (args.return_all ? static_cast<long>(pass - 1) * args.tokens * layout().hidden : 0));
          if (pass == args.passes) return;
        }
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
      run<kFfn>(block.now(args.attended), first);
      run<kFfnOutput>(block.now(args.inner), first);
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
ALBERT_KERNEL(S::kThreads) void resident_encoder(ALBERT_ARGUMENT Arguments<T> args) {
  if constexpr ((kHasClusters || !S::kInClusters) && (kHasWords || !S::kWords)) Encoder<T, S>(args).run();
}

}  // namespace albert

#include "resident_launch.h"
