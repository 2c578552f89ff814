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
  static constexpr int kTiles = S::kTilesOfWarp;
  // Chunks that are loaded while as many are multiplied.
  static constexpr int kBatch = kMatrix == kDense ? 2 : S::kBatch;

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

  ALBERT_DEVICE void multiply(Four (&sums)[kTiles][kMostUnits], const Eight (&now)[kTiles][2], int chunk) const {
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
    const Norm s = block.norm_of(block.real_row(r), place, lanes);
    if (place == 0) block.row_norms()[r] = s;
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
          multiply(sums, now.x[j], p.first + (i + j) * p.step);
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
          float* to = block.sums() + r * units * kUnit + u * kUnit + block.quad * 2;
          const Four s = sums[t][u];
          *reinterpret_cast<Two*>(to) = {{s.value[0], s.value[1]}};
          *reinterpret_cast<Two*>(to + 8 * units * kUnit) = {{s.value[2], s.value[3]}};
        }
  }

  // The same of one tile's context, which no block wrote: a warp computes heads of it, and multiplies them as they are.
  ALBERT_DEVICE void add_heads(int rows_of_part) const {
    constexpr int kChunks = S::kHeadChunks;
    HeadOfTile<T, kChunks> heads[S::kHeadRounds];
    Eight values[S::kHeadRounds][kChunks][2];
    const auto head_of = [&](int i) { return i * kWarps + block.warp; };
    const int hidden = layout().hidden;
#pragma unroll
    for (int i = 0; i < S::kHeadRounds; ++i) {
      if (head_of(i) >= layout().heads) break;
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const T* at = args.qkv + (block.row + half * 8) * 3 * hidden + head_of(i) * layout().head_dim() + chunk * kChunk +
                        block.quad * 8;
          heads[i].query[chunk][half] = load_shared_by_blocks(at);
          heads[i].key[chunk][half] = load_shared_by_blocks(at + hidden);
          values[i][chunk][half] = load_shared_by_blocks(at + 2 * hidden);
        }
    }
    Four sums[kTiles][kMostUnits] = {};
#pragma unroll
    for (int i = 0; i < S::kHeadRounds; ++i) {
      if (head_of(i) >= layout().heads) break;
      heads[i].attend({block.sequences()[block.row], block.sequences()[block.row + 8]}, block.quad);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint32_t value[4][2];
        TwoPairs pairs[4];
#pragma unroll
        for (int j = 0; j < 8; ++j) value[j / 2][j % 2] = values[i][chunk][j % 2].pair[j / 2];
        heads[i].context(value, pairs, block.sequences(), args.tokens, block.row, block.quad);
        Eight context[kTiles][2] = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) context[0][j % 2].pair[j / 2] = pairs[j / 2].half[j % 2];
        multiply(sums, context, head_of(i) * kChunks + chunk);
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
      const float* from = block.sums() + j * units * kUnit + place * 4;
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
#pragma unroll
      for (int i = 0; i < 2; ++i) load_residual(i, residual[i]);
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
        const Norm s = product.block.row_norms()[least(r, kMostTokens - 1)];
        a = (a - s.mean * weight[0]) * s.scale + shift[0];
        b = (b - s.mean * weight[1]) * s.scale + shift[1];
      } else {
        a += bias[0];
        b += bias[1];
      }
      if constexpr (!kHasResidual) {
        if (!on) return;
        T* to = kMatrix == kQkv ? args.qkv : args.inner;
        if (kMatrix == kFfn) {
          float both[2] = {a, b};
          activate(both, args.activation);
          a = both[0], b = both[1];
        }
        *reinterpret_cast<uint32_t*>(to + r * l.outputs(kMatrix) + column) = pack_pair(a, b, T{});
      } else {
        float x = low<T>(residual[0]), y = high<T>(residual[0]);
        residual[0] = residual[1];
        load_residual(i + 2, residual[1]);
        if (product.normalizes || kMatrix == kFfnOutput) {
          const Norm s = product.block.row_norms()[least(r, kMostTokens - 1)];
          x = (x - s.mean) * s.scale * weight[0] + shift[0];
          y = (y - s.mean) * s.scale * weight[1] + shift[1];
        }
        const uint32_t pair = pack_pair(x + a, y + b, T{});
        T* to = kMatrix == kDense ? args.attended : args.summed;
        if (on) *reinterpret_cast<uint32_t*>(to + r * l.hidden + column) = pair;
        leave_statistics(on, r, low<T>(pair), high<T>(pair));
      }
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
      store_two(product.args.partial + r * l.norm_parts() + part, origin + mean, fmaxf(squares - sum * mean, 0.0f));
    }
  };

  // After prepare(0).
  ALBERT_DEVICE void run() {
    static_assert(kMostUnits * 4 <= kWarp, "a warp has a row");
    for (int first = 0; first < block.tiles; first += at_once) {
      const int tiles_here = least(block.tiles - first, at_once);
      const int parts = 1 << log_parts, rows_of_part = kTiles * kTile * kWarps >> log_parts;
      if constexpr (kMatrix == kDense && S::kOneTile)
        add_heads(rows_of_part);
      else
        add_chunks(first, rows_of_part);
      Finish end(*this, first, tiles_here);
      sync_block();
      const float* from = block.sums();
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
