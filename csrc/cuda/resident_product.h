// A product x . weightᵀ of the resident encoder: the block's units of the weight are in its shared memory, x comes from
// L2, straight into the registers that the matrix instruction takes it from.
//
// All tiles of 16 rows go side by side: each group of warps has its own, and the warps of a group share the sum's chunks
// out among them. Parts of a sum are added in a fixed order, so that the same bits come out each time.
#pragma once
#include "resident_attention.h"

namespace albert {

template <class T, class S, int kMatrix>
struct Product {
  static constexpr bool kNormalizes = kMatrix == kQkv || kMatrix == kFfn;
  static constexpr bool kHasResidual = !kNormalizes;
  static constexpr int kWarps = S::kWarps, kThreads = S::kThreads, kTiles = S::kTilesOfWarp;
  // Chunks that are loaded while as many are multiplied; of words all of a warp's.
  static constexpr int kBatch = S::kWords ? divide_up(S::chunks_of(kMatrix), kWarps) : kMatrix == kDense ? 2 : S::kBatch;

  // A warp's part of the sum: chunks `first`, `first + step`, … of the block's, for its tiles.
  struct Part {
    int first, step, count, tile, tiles;
    uint32_t rows[kTiles][2];  // how far from x they lie, bytes
  };

  Block<T, S>& block;
  const Arguments<T>& args;
  const bool normalizes;  // the first pass takes its input, and adds it, as it is
  const T* x;             // [tokens][inputs]
  const int units, inputs, chunks, chunk_begin;
  const int at_once;    // tiles of a round: all, but in clusters whose blocks have little room
  const int log_parts;  // of a sum: one a warp of its group
  Part part;

  ALBERT_DEVICE Product(Block<T, S>& b, const T* rows, bool is_first)
      : block(b), args(b.args), normalizes(kMatrix == kFfn || !is_first), x(rows),
        units(layout().units[kMatrix]), inputs(layout().inputs(kMatrix)), chunks(layout().chunk_count(kMatrix, b.rank)),
        chunk_begin(layout().chunk_begin(kMatrix, b.rank)),
        at_once(layout().split(kMatrix) ? layout().tiles_at_once : kMostTiles),
        log_parts(log2_up(kWarps) - most(least(b.log_tiles, log2_up(at_once)) - log2_up(kTiles), 0)) {}

  ALBERT_DEVICE decltype(auto) layout() const { return block.layout(); }

  // ---- the sum ----
  // What a warp multiplies at a time: of each chunk and tile the rows `row` and `row + 8`.
  struct Batch {
    Eight x[kBatch][kTiles][2];
  };
  ALBERT_DEVICE void load(Batch& to, const Part& p, int i) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
        if (i + j < p.count && t < p.tiles)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            to.x[j][t][half] = load_shared_by_blocks(reinterpret_cast<const char*>(x) +
                                                     (p.rows[t][half] + (i + j) * p.step * kChunk * 2u));
  }

  ALBERT_DEVICE void multiply(Four (&sums)[kTiles][kMostUnits], const Eight (&now)[kTiles][2], const Part& p,
                              int chunk) const {
    const char* weights = block.weights(kMatrix) + block.lane * static_cast<int>(sizeof(Eight)) + chunk * kChunkBytes;
#pragma unroll
    for (int u = 0; u < kMostUnits; ++u) {
      if (u >= units) break;
      const Eight b = *reinterpret_cast<const Eight*>(weights + u * layout().chunks[kMatrix] * kChunkBytes);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const Eight(&a)[2] = now[t];
        multiply_add(sums[t][u], {a[0].pair[0], a[1].pair[0], a[0].pair[1], a[1].pair[1]}, b.pair[0], b.pair[1], T{});
        multiply_add(sums[t][u], {a[0].pair[2], a[1].pair[2], a[0].pair[3], a[1].pair[3]}, b.pair[2], b.pair[3], T{});
      }
    }
  }

  // The rows' LayerNorms, for this product and for the residual of the next one: as many lanes a row as there are.
  ALBERT_DEVICE void find_norms() const {
    const int log_lanes = log2_up(kThreads / kTile) - block.log_tiles, lanes = 1 << log_lanes;
    const int r = block.thread >> log_lanes, place = block.thread & (lanes - 1);
    const Norm s = block.norm_of(block.statistics(kMatrix, block.real_row(r)), place, lanes);
    if (place == 0) block.row_norms(kMatrix)[r] = s;
  }

  ALBERT_DEVICE int row_of(int first_tile, int t, int half) const {
    return (first_tile + part.tile + t) * kTile + block.row + half * 8;
  }
  // What a round needs to know of the warp's part, before there is anything to read.
  ALBERT_DEVICE void prepare(int first_tile) {
    part.first = block.warp & ((1 << log_parts) - 1);
    part.step = 1 << log_parts;
    part.tile = S::kOneTile ? 0 : (block.warp >> log_parts) * kTiles;
    part.tiles = least(block.tiles - first_tile, at_once) - part.tile;
    // The same for all warps where it can be: the compiler then knows it.
    const int count = chunks % part.step == 0 ? chunks >> log_parts : (chunks - part.first + part.step - 1) >> log_parts;
    part.count = part.tiles <= 0 ? 0 : count;
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        part.rows[t][half] = opaque((block.real_row(row_of(first_tile, t, half)) * inputs +
                                     (chunk_begin + part.first) * kChunk + block.quad * 8) * 2);
  }

  // The warps' parts of a round's sums, each left at [part][row][column]; there is room for so many rows.
  ALBERT_DEVICE void add_chunks(int first_tile, int rows_of_part) {
    if (first_tile != 0) prepare(first_tile);
    const Part& p = part;
    Batch next{};
    load(next, p, 0);
    if (kNormalizes && normalizes && first_tile == 0) find_norms();  // while the rows are on their way
    Four sums[kTiles][kMostUnits] = {};
#pragma unroll 1
    for (int i = 0; i < p.count; i += kBatch) {
      Batch now = next;
      load(next, p, i + kBatch);
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        if (i + j < p.count) {
          multiply(sums, now.x[j], p, p.first + (i + j) * p.step);
        }
    }
    leave(sums, p, rows_of_part);
  }
  ALBERT_DEVICE void leave(const Four (&sums)[kTiles][kMostUnits], const Part& p, int rows_of_part) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
      if (t < p.tiles)
#pragma unroll
        for (int u = 0; u < kMostUnits; ++u) {
          if (u >= units) break;
          const int r = p.first * rows_of_part + (p.tile + t) * kTile + block.row;
          float* to = block.sums(kMatrix) + r * units * kUnit + u * kUnit + block.quad * 2;
          const Four s = sums[t][u];
          *reinterpret_cast<Two*>(to) = {{s.value[0], s.value[1]}};
          *reinterpret_cast<Two*>(to + 8 * units * kUnit) = {{s.value[2], s.value[3]}};
        }
  }

  // The same of words. A row's statistics are spread over lanes, as in find_norms.
  static constexpr int kLanes = kThreads / kTile;
  template <bool kHasRows>
  ALBERT_DEVICE void take_rows(Eight (&to)[kBatch][kTiles][2], bool has_norms, bool waits) const {
    constexpr int kParts = divide_up(S::make().norm_parts(), kLanes);
    const int r = block.thread / kLanes, place = block.thread % kLanes;
    const Statistics* of_row = has_norms ? block.statistics(kMatrix, block.real_row(r)) + place : nullptr;
    Two parts[kParts] = {};
    take_words(
        [&](auto use) {
          if constexpr (kHasRows) {
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
#pragma unroll
              for (int half = 0; half < 2; ++half)
                if (i < part.count)
                  use(to[i][0][half],
                      reinterpret_cast<const char*>(x) + (part.rows[0][half] + i * part.step * kChunk * 2u));
          }
          if (!has_norms) return;
#pragma unroll
          for (int i = 0; i < kParts; ++i)
            if (place + i * kLanes < layout().norm_parts()) use(parts[i], of_row + i * kLanes);
        },
        waits);
    if (!has_norms) return;
    const float origin = shuffle_from(parts[0].value[0], block.lane - place);
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < kParts; ++i) block.add_part(parts[i], place + i * kLanes, origin, sum, squares);
    const Norm s = block.norm_of(origin, sum, squares, kLanes);
    if (place == 0) block.row_norms(kMatrix)[r] = s;
  }
  ALBERT_DEVICE void add_words(int rows_of_part) const {
    Eight rows[kBatch][kTiles][2] = {};
    // The first pass takes what was there before the launch, whatever it is.
    take_rows<true>(rows, kNormalizes && normalizes, kMatrix != kQkv || normalizes);
    Four sums[2][kTiles][kMostUnits] = {};  // two, for shorter chains of instructions
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (i < part.count) multiply(sums[i % 2], rows[i], part, part.first + i * part.step);
#pragma unroll
    for (int u = 0; u < kMostUnits; ++u) add(sums[0][0][u], sums[1][0][u]);
    leave(sums[0], part, rows_of_part);
  }

  // The same of one tile's context, which no block wrote: a warp computes heads of it, and multiplies them as they are.
  ALBERT_DEVICE void add_heads(int rows_of_part) const {
    HeadOfTile<T, S> heads[S::kHeadRounds];
    const auto head_of = [&](int i) { return i * kWarps + block.warp; };
#pragma unroll
    for (int i = 0; i < S::kHeadRounds; ++i)
      if (head_of(i) < layout().heads) heads[i].load(block, head_of(i));
    Four sums[kTiles][kMostUnits] = {};
#pragma unroll
    for (int i = 0; i < S::kHeadRounds; ++i) {
      if (head_of(i) >= layout().heads) break;
      heads[i].attend(block);
#pragma unroll
      for (int chunk = 0; chunk < S::kHeadChunks; ++chunk) {
        Eight context[kTiles][2] = {};
        heads[i].context(block, chunk, context[0]);
        multiply(sums, context, part, head_of(i) * S::kHeadChunks + chunk);
      }
    }
    leave(sums, part, rows_of_part);
  }

  // ---- from part to part ----
  // A cluster's block finishes so many rows of each tile.
  ALBERT_DEVICE int rows_of_tile() const { return layout().split(kMatrix) ? kTile / layout().cluster : kTile; }

  // The block's sum, to those of the cluster that finish the rows: [rank][row][column].
  ALBERT_DEVICE void send(int tiles_here, int parts, int rows_of_part) const {
    const int log_width = log2_up(units * 2), place = block.thread & ((1 << log_width) - 1), of_tile = rows_of_tile();
    if (place >= units * 2) return;
    for (int j = block.thread >> log_width; j < tiles_here * kTile; j += kThreads >> log_width) {
      const float* from = block.sums(kMatrix) + j * units * kUnit + place * 4;
      Four of_part[kWarps] = {}, total{};
#pragma unroll
      for (int p = 0; p < kWarps; ++p)
        if (p < parts) of_part[p] = *reinterpret_cast<const Four*>(from + p * rows_of_part * units * kUnit);
#pragma unroll
      for (int p = 0; p < kWarps; ++p) add(total, of_part[p]);
      const int r = (block.rank * layout().tiles_at_once + j / kTile) * of_tile + j % of_tile;
      Four* to = reinterpret_cast<Four*>(block.received() + r * units * kUnit + place * 4);
      albert::send(to, block.arrivals(), j % kTile / of_tile, total);
    }
  }
  ALBERT_DEVICE static void add(Four& sum, const Four& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.value[i] += x.value[i];
  }

  // ---- what becomes of it ----
  // Lanes take pairs of columns of a row, and a power of two of them a row; warps take rows. `steps` go over all rows.
  struct Finish {
    const Product& product;
    int first_tile, rows, log_width, width, place, column, step, steps;
    float share;  // one over the columns
    float bias[2], weight[2], shift[2];  // of the columns: see Layout::vectors
    uint32_t residual[2];

    ALBERT_DEVICE Finish(const Product& p, int first, int tiles_here)
        : product(p), first_tile(first), rows(tiles_here * p.rows_of_tile()), log_width(log2_up(p.units * 4)),
          width(1 << log_width), place(p.block.lane & (width - 1)), step(kThreads >> log_width),
          steps((rows + step - 1) >> (log2_up(kThreads) - log_width)),
          share(1.0f / static_cast<float>(p.layout().norm_columns(p.block.index / p.layout().cluster))), bias{},
          weight{}, shift{}, residual{} {
      const int u = place / 4, begin = p.layout().column(kMatrix, p.block.index, u);
      column = begin < 0 ? -1 : begin + p.block.quad * 2;
      if (column < 0) return;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        bias[i] = p.block.vector(kMatrix, 0)[place * 2 + i];
        if (!kHasResidual && !p.normalizes) continue;
        weight[i] = p.block.vector(kMatrix, 1)[place * 2 + i];
        shift[i] = p.block.vector(kMatrix, 2)[place * 2 + i];
      }
      load_residuals();
    }

    // Of a step the lane's row among the round's, and among the tokens.
    ALBERT_DEVICE int place_of(int i) const { return i * step + (product.block.thread >> log_width); }
    ALBERT_DEVICE int row_of(int j) const {
      const int of_tile = product.rows_of_tile(), split = product.layout().split(kMatrix);
      return (first_tile + j / of_tile) * kTile + (split ? product.block.rank * of_tile : 0) + j % of_tile;
    }
    ALBERT_DEVICE bool has(int j) const { return column >= 0 && j < rows && row_of(j) < product.args.tokens; }

    // Two steps ahead: what the first two take is on its way while the sums meet.
    ALBERT_DEVICE void load_residual(int i, uint32_t& to) const {
      const int j = place_of(i);
      if (!kHasResidual || !has(j)) return;
      const T* from = kMatrix == kFfnOutput ? product.args.attended
                      : product.normalizes  ? product.args.summed
                                            : product.args.hidden;
      to = load_pair_shared_by_blocks(from + row_of(j) * product.layout().hidden + column);
    }
    // What this thread wrote, if it did, it still has.
    ALBERT_DEVICE void load_residuals() {
      if constexpr (S::kWords && kHasResidual) {
        static_assert(S::make().units[kMatrix] * 4 * kTile <= kThreads, "a thread has more than one pair");
        if (product.normalizes || kMatrix == kFfnOutput) {
          residual[0] = kMatrix == kDense ? product.block.own_summed : product.block.own_attended;
          return;
        }
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) load_residual(i, residual[i]);
    }

    ALBERT_DEVICE float activate(float x) const {
      switch (product.args.activation) {
        case ALBERT_CUDA_GELU_TANH: {  // 1 + tanh(y) = 2 / (1 + exp(-2 y)); log2(e) is in the factor
          const float y = x * (1.0f + 0.044715f * x * x);
          return x * inverse(1.0f + exp2_fast(-2.302208198f * y));
        }
        case ALBERT_CUDA_GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
        default: return x < 0.0f ? 0.0f : x;
      }
    }

    // Of a step: the sum of `terms`, which lie at [term][row][column].
    ALBERT_DEVICE void finish(int i, const float* from, int terms, int rows_of_term) {
      if (i * step + (product.block.warp << (log2_up(kWarp) - log_width)) >= rows) return;
      const auto& l = product.layout();
      const Arguments<T>& args = product.args;
      const int j = place_of(i), r = row_of(j), columns = product.units * kUnit;
      const bool on = has(j);
      Two part[kWarps] = {};
#pragma unroll
      for (int t = 0; t < kWarps; ++t)
        if (on && t < terms)
          part[t] = *reinterpret_cast<const Two*>(from + (t * rows_of_term + j) * columns + place * 2);
      float a = 0, b = 0;
#pragma unroll
      for (int t = 0; t < kWarps; ++t) a += part[t].value[0], b += part[t].value[1];
      if (kNormalizes && product.normalizes) {
        const Norm s = product.block.row_norms(kMatrix)[least(r, kMostTokens - 1)];
        a = (a - s.mean * weight[0]) * s.scale + shift[0];
        b = (b - s.mean * weight[1]) * s.scale + shift[1];
      } else {
        a += bias[0];
        b += bias[1];
      }
      if constexpr (!kHasResidual) {
        T* to = product.block.now(kMatrix == kQkv ? args.qkv : args.inner);
        if (kMatrix == kFfn) a = activate(a), b = activate(b);
        product.block.tell(on, to + r * l.outputs(kMatrix) + column, pack_pair(a, b, T{}));
      } else {
        Two x{{low<T>(residual[0]), high<T>(residual[0])}};
        if (!S::kWords) {
          residual[0] = residual[1];
          load_residual(i + 2, residual[1]);
        }
        if (product.normalizes || kMatrix == kFfnOutput) x = normalized(x, r);
        const uint32_t pair = pack_pair(x.value[0] + a, x.value[1] + b, T{});
        T* to = product.block.now(kMatrix == kDense ? args.attended : args.summed);
        product.block.tell(on, to + r * l.hidden + column, pair);
        leave_statistics(on, r, low<T>(pair), high<T>(pair));
        if constexpr (S::kWords) {
          (kMatrix == kDense ? product.block.own_attended : product.block.own_summed) = pair;
          const bool wanted = kMatrix == kDense && product.normalizes && args.return_all;
          if (wanted && on) write(args.output, product.block.pass - 1, r, x);  // what the pass before gives
        }
      }
    }
    ALBERT_DEVICE Two normalized(const Two& x, int r) const {
      const Norm s = product.block.row_norms(kMatrix)[least(r, kMostTokens - 1)];
      return {{(x.value[0] - s.mean) * s.scale * weight[0] + shift[0],
               (x.value[1] - s.mean) * s.scale * weight[1] + shift[1]}};
    }
    ALBERT_DEVICE void write(T* output, int state, int r, const Two& x) const {
      T* to = output + (state * product.args.tokens + r) * product.layout().hidden + column;
      *reinterpret_cast<uint32_t*>(to) = pack_pair(x.value[0], x.value[1], T{});
    }

    // Mean and squared deviations of the block's columns of a row, with the first element as origin: see norm_of.
    ALBERT_DEVICE void leave_statistics(bool on, int r, float a, float b) const {
      const float origin = shuffle_from(a, product.block.lane - place);
      float sum = on ? (a - origin) + (b - origin) : 0.0f;
      float squares = on ? (a - origin) * (a - origin) + (b - origin) * (b - origin) : 0.0f;
#pragma unroll
      for (int mask = 1; mask < kWarp; mask *= 2)
        if (mask < width) {
          sum += shuffle_xor(sum, mask);
          squares += shuffle_xor(squares, mask);
        }
      if (!on || place != 0) return;
      const auto& l = product.layout();
      const int part = product.block.index / l.cluster;
      const float mean = sum * share;
      Statistics* to = product.block.now(product.args.partial[kMatrix == kDense ? 0 : 1]) + r * l.norm_parts() + part;
      product.block.tell(to, origin + mean, fmaxf(squares - sum * mean, 0.0f));
    }
  };

  // For who called, the block's columns of what the last pass gives: its output is that of dense's residual.
  ALBERT_DEVICE void write_last() const {
    static_assert(kMatrix == kDense && S::kWords, "of words");
    Eight none[kBatch][kTiles][2] = {};
    take_rows<false>(none, true, true);
    Finish end(*this, 0, 1);
    sync_block();
    const int r = end.place_of(0);
    if (!end.has(r)) return;
    const Two x{{low<T>(block.own_summed), high<T>(block.own_summed)}};
    end.write(args.output, args.return_all ? args.passes - 1 : 0, r, end.normalized(x, r));
  }

  // After prepare(0).
  ALBERT_DEVICE void run() {
    static_assert(kMostUnits * 4 <= kWarp, "a warp has a row");
    for (int first = 0; first < block.tiles; first += at_once) {
      const int tiles_here = least(block.tiles - first, at_once);
      const int parts = 1 << log_parts, rows_of_part = kTiles * kTile * kWarps >> log_parts;
      if constexpr (kMatrix == kDense && S::kOneTile)
        add_heads(rows_of_part);
      else if constexpr (S::kWords)
        add_words(rows_of_part);
      else
        add_chunks(first, rows_of_part);
      Finish end(*this, first, tiles_here);
      sync_block();
      const float* from = block.sums(kMatrix);
      int terms = parts, rows_of_term = rows_of_part;
      if (layout().split(kMatrix)) {
        send(tiles_here, parts, rows_of_part);
        if (block.thread == 0) expect(block.arrivals(), tiles_here * kTile * units * kUnit * 4);
        wait(block.arrivals(), block.phases++);
        from = block.received();
        terms = layout().cluster;
        rows_of_term = at_once * rows_of_tile();
      }
#pragma unroll 1
      for (int i = 0; i < end.steps; ++i) end.finish(i, from, terms, rows_of_term);
      // What the next round writes has been read.
      if (at_once == kMostTiles) break;
      if (first + at_once < block.tiles) sync_cluster();
    }
  }
};

}  // namespace albert
