// The resident encoder of one tile, where there are clusters: no barrier of the grid, but one when it begins.
//
// What clusters tell each other lies in memory that is all ones at first. A word, which is 8 columns of a row, is written
// once, whole, and does not begin with ones: who reads one that does reads it again. Nothing else has to be in order, and
// one trip to L2 takes the place of a barrier's and a load's. Each pass has its own memory.
//
// All of a row for everybody would be too much for L2, where all blocks ask for the same words at the same time. So each
// product is cut along its inputs, too: of a cluster's blocks each takes its share of the columns of all rows, multiplies
// it with the weights of all of them, and sends the sums to those whose columns they are. A pass is
//
//   words of summed -> query, key, value | words of them -> attention, dense + residual | words of attended -> ffn, gelu |
//   words of inner -> ffn_output + residual
//
// LayerNorm goes into the weights, as in resident_encoder.cu; the rows' statistics come from who takes the words.
//
// Blocks of a cluster wait for each other by arrivals alone. Who sends sums of a product has finished its columns of the
// one before, and for that it needed what all the others sent of it: so nobody is more than one product ahead, and what
// two products in turn have apart (sums, arrivals, rows) is free when its turn comes.
#pragma once
#include "resident_attention.h"
#include "resident_parameters.h"

namespace albert {

template <class T, class S>
struct WordEncoder {
  static constexpr int kCluster = S::kCluster;
  // Clocks before the first look at other blocks' words, which take longer: who looks in vain is in their way.
  static constexpr int kHold = 200;

  const Arguments<T>& args;
  const Parameters<T> parameters;
  char* const shared;
  const int index, rank, first;       // of the block; in its cluster; the cluster's first
  int thread, warp, lane, row, quad;  // of a matrix instruction's operands: lane = 4 row + quad
  int pass = 0;
  uint32_t products = 0, norms_found = 0;  // that were finished
  // What the thread finished last, of rows `row` and `row + 8`, and those rows' LayerNorm.
  uint32_t attended[2] = {}, summed[2] = {};
  Norm norms[2] = {};
  Sequence own_sequences[2] = {};  // of the same rows

  ALBERT_DEVICE explicit WordEncoder(const Arguments<T>& a)
      : args(a), parameters{a, S::kHidden, S::kInner}, shared(shared_memory()), index(block_index()),
        rank(index % kCluster), first(index - rank) {
    begin();
  }
  // Each product finds its places anew: those of all products at a time are more than there are registers.
  ALBERT_DEVICE void begin() {
    thread = opaque(thread_index());
    warp = same_in_warp(thread / kWarp);
    lane = thread % kWarp;
    row = lane / 4;
    quad = lane % 4;
  }

  template <class P>
  ALBERT_DEVICE P* at(int bytes) const {
    return reinterpret_cast<P*>(shared + bytes);
  }
  ALBERT_DEVICE Eight* weights(int matrix, int of_block, int unit, int chunk) const {
    const int place = (of_block * S::units(matrix) + unit) * S::chunks(matrix) + chunk;
    return at<Eight>(S::weights(matrix) + place * kChunkBytes + lane * 16);
  }
  // Of a product; two take turns, for a block of the cluster may be one ahead of another.
  ALBERT_DEVICE Four* sums(int matrix, int part, int unit) const {
    return at<Four>(S::kSums + matrix % 2 * S::kSumsBytes + ((part * S::units(matrix) + unit) * kWarp + lane) * 16);
  }
  ALBERT_DEVICE Arrivals* arrivals(int matrix) const { return at<Arrivals>(S::kArrivals) + matrix % 2; }
  ALBERT_DEVICE Arrivals* statistics_arrivals() const { return at<Arrivals>(S::kArrivals) + 2; }
  ALBERT_DEVICE Arrivals* folded_arrivals() const { return at<Arrivals>(S::kArrivals) + 3; }
  ALBERT_DEVICE float* norm(int parameter) const {  // kNorm or kAttentionNorm, or the bias after it
    return at<float>(S::kNorms) + (parameter - kAttentionNorm) % 4 * S::kNormInputs;
  }
  ALBERT_DEVICE Two* folded(int matrix, int part, int unit) const {
    return at<Two>(S::kFolded + (matrix == kQkv ? 0 : S::kFoldedBytes) + (part * S::kMostOfUnits + unit) * kUnit * 8);
  }
  ALBERT_DEVICE float* vector(int matrix, int which) const {
    return at<float>(S::kVectors + matrix * S::kVectorBytes) + which * S::units(matrix) * kUnit;
  }
  ALBERT_DEVICE const Sequence* sequences() const { return at<Sequence>(S::kSequences); }
  ALBERT_DEVICE T* words(int of_pass, int which) const {
    return args.qkv + static_cast<long>(of_pass) * S::kPassElements + which;
  }
  // The first column of a block's unit.
  ALBERT_DEVICE static int column(int matrix, int block, int unit) { return (block * S::units(matrix) + unit) * kUnit; }

  // ---- once ----
  ALBERT_DEVICE void load_weights() const {
    load_weight<kQkv>();
    load_weight<kDense>();
    load_weight<kFfn>();
    load_weight<kFfnOutput>();
  }
  template <int kMatrix>
  ALBERT_DEVICE void load_weight() const {
    constexpr int kChunks = S::chunks(kMatrix), kPieces = kChunks * 4, kAtOnce = S::kThreads / kPieces;  // of a row; rows
    constexpr int kRows = kCluster * S::units(kMatrix) * kUnit;
    static_assert(S::kThreads % kPieces == 0 && kRows % kAtOnce == 0, "threads without a piece");
    const int piece = thread % kPieces;
#pragma unroll
    for (int i = 0; i < kRows / kAtOnce; ++i) {
      const int r = i * kAtOnce + thread / kPieces;  // of the cluster's, whose blocks' units lie one after the other
      char* to = shared + S::weights(kMatrix) + (r / kUnit * kChunks + piece / 4) * kChunkBytes +
                 (r % kUnit * 4 + piece % 4) * 16;
      parameters.bring(to, kMatrix, column(kMatrix, first, 0) + r, rank * kChunks * kChunk + piece * 8);
    }
  }

  // Its part of what nobody has told yet.
  ALBERT_DEVICE void clear_words() const {
    constexpr int kWords = S::kPassElements / kUnit;
    Eight* const all = reinterpret_cast<Eight*>(args.qkv);
    for (int i = index * S::kThreads + thread; i < args.passes * kWords; i += S::kBlocks * S::kThreads)
      all[i] = {{kNotThere, kNotThere, kNotThere, kNotThere}};
  }

  // Of the block's own columns the biases, and weight and bias of the residuals' LayerNorms: a vector a warp, so that they
  // are on their way at the same time.
  ALBERT_DEVICE void load_vectors() const {
#pragma unroll
    for (int matrix = 0; matrix < kMatrices; ++matrix)
#pragma unroll
      for (int which = 0; which < (matrix == kDense || matrix == kFfnOutput ? 3 : 1); ++which) {
        if (warp != (matrix + which * kMatrices) % S::kWarps) continue;
        for (int i = lane; i < S::units(matrix) * kUnit; i += kWarp)
          vector(matrix, which)[i] = parameters.vector(matrix, which, column(matrix, index, 0) + i);
      }
  }

  // Weight and bias of both LayerNorms, of the block's inputs.
  ALBERT_DEVICE void load_norms() const {
    for (int i = thread; i < 4 * S::kNormInputs; i += S::kThreads) {
      const int place = i / S::kNormInputs, parameter = (place < 2 ? kAttentionNorm : kNorm) + place % 2;
      norm(parameter)[i % S::kNormInputs] = parameters.value(parameter, rank * S::kNormInputs + i % S::kNormInputs);
    }
  }

  // Of every row its sequence, none beyond the last.
  ALBERT_DEVICE void find_sequences() const {
    const int r = S::kThreads - 1 - thread;  // by the last warp, which has no vector to load
    if (r < kTile) at<Sequence>(S::kSequences)[r] = sequence_of(args, r);
  }

  // A LayerNorm's weight into that of the product after it: W', u and c (see resident_encoder.cu); sums of u and c to who
  // finishes these columns.
  template <int kMatrix>
  ALBERT_DEVICE void fold() const {
    const int destination = warp % kCluster, group = warp / kCluster;
    constexpr int kUnits = S::units(kMatrix), kChunks = S::chunks(kMatrix) / S::kFoldGroups;
    float u[kUnits] = {}, c[kUnits] = {};
#pragma unroll 1
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = group * kChunks + i;
      float weight[8], bias[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float* of_norm = norm(kMatrix == kQkv ? kNorm : kAttentionNorm) + chunk * kChunk + quad * 8 + j;
        weight[j] = of_norm[0];
        bias[j] = of_norm[S::kNormInputs];
      }
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        Eight* const of_unit = weights(kMatrix, destination, unit, chunk);
        *of_unit = folded_weight<T>(*of_unit, weight, bias, u[unit], c[unit]);
      }
    }
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      for (int mask = 1; mask < 4; mask *= 2) {
        u[unit] += shuffle_xor(u[unit], mask);
        c[unit] += shuffle_xor(c[unit], mask);
      }
      if (quad == 0)
        albert::send(folded(kMatrix, rank * S::kFoldGroups + group, unit) + row, folded_arrivals(), destination,
                     Two{{u[unit], c[unit]}});
    }
  }
  ALBERT_DEVICE void collect_folded() const {
    constexpr int kUnits = S::units(kQkv) + S::units(kFfn);
    if (thread == 0) expect(folded_arrivals(), S::kWarps * kUnits * kUnit * static_cast<int>(sizeof(Two)));
    wait(folded_arrivals(), 0);
    collect_folded<kQkv>();
    collect_folded<kFfn>();
  }
  template <int kMatrix>
  ALBERT_DEVICE void collect_folded() const {
    for (int i = thread; i < S::units(kMatrix) * kUnit; i += S::kThreads) {
      float u = 0, c = vector(kMatrix, 0)[i];
      for (int part = 0; part < S::kWarps; ++part) {
        const Two x = folded(kMatrix, part, 0)[i];
        u += x.value[0];
        c += x.value[1];
      }
      vector(kMatrix, 1)[i] = u;
      vector(kMatrix, 2)[i] = c;
    }
  }

  // ---- words ----
  // Takes pieces, in which each lane has eight elements of row `row` or `row + 8`, from(piece), and lays them down as
  // matrix instructions take them; zeros beyond the tokens. `waits`: they are words; use(piece, eight).
  template <int kPieces, class From, class Use>
  ALBERT_DEVICE void take_words(int to, bool waits, From from, Use use) const {
    constexpr int kOfWarp = divide_up(kPieces, S::kWarps);
    if (waits) hold(kHold);
    Eight word[kOfWarp] = {};
    const auto has = [&](int i) {
      const int piece = i * S::kWarps + warp;
      return piece < kPieces && row + piece % 2 * 8 < args.tokens;
    };
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i)
      if (has(i)) word[i] = load_eight_whole(from(i * S::kWarps + warp));
    while (waits) {
      bool missing = false;
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i) missing |= has(i) && !is_there(word[i]);
      if (!any_in_warp(missing)) break;
      pause();
#pragma unroll
      for (int i = 0; i < kOfWarp; ++i)
        if (has(i) && !is_there(word[i])) word[i] = load_eight_whole(from(i * S::kWarps + warp));
    }
#pragma unroll
    for (int i = 0; i < kOfWarp; ++i) {
      const int piece = i * S::kWarps + warp;
      if (piece >= kPieces) break;
      *fragment(to, piece) = word[i];
      use(piece, word[i]);
    }
  }
  ALBERT_DEVICE Eight* fragment(int begin, int piece) const { return at<Eight>(begin + piece * S::kFragment + lane * 16); }

  // The block's columns of rows of words, [unit][row]; with their statistics.
  template <int kMatrix>
  ALBERT_DEVICE void take_rows(const T* from, bool with_statistics) const {
    take_words<2 * S::chunks(kMatrix)>(
        kMatrix == kFfnOutput ? S::kInnerRows : S::kRows, true,
        [&](int piece) {
          const int unit = (rank * S::chunks(kMatrix) + piece / 2) * 4 + quad;
          return from + (unit * kTile + row + piece % 2 * 8) * kUnit;
        },
        [&](int piece, const Eight& word) {
          if (with_statistics) leave_statistics(piece, word);
        });
  }
  ALBERT_DEVICE void take_hidden() const {
    take_words<2 * S::chunks(kQkv)>(
        S::kRows, false,
        [&](int piece) {
          const int column = (rank * S::chunks(kQkv) + piece / 2) * kChunk + quad * 8;
          return args.hidden + (row + piece % 2 * 8) * S::kHidden + column;
        },
        [](int, const Eight&) {});
  }
  // Of a head its query, key and value one after the other.
  ALBERT_DEVICE void take_heads() const {
    const T* from = words(pass, S::kQkvWords);
    take_words<6 * S::kHeadsOfBlock * S::kHeadChunks>(
        S::kHeadRows, true,
        [&](int piece) {
          const int chunk = piece / 2 % S::kHeadChunks, part = piece / 2 / S::kHeadChunks;
          const int head = rank * S::kHeadsOfBlock + part / 3;
          const int unit = (part % 3 * S::kHidden + head * S::kHeadDim + chunk * kChunk) / kUnit + quad;
          return from + (unit * kTile + row + piece % 2 * 8) * kUnit;
        },
        [](int, const Eight&) {});
  }
  // A pair of columns of rows `row` and `row + 8` of the block's unit: from all lanes of a warp.
  ALBERT_DEVICE void tell(int which, int matrix, int unit, const uint32_t (&pairs)[2]) const {
    const Eight low = gather_quad(pairs[0]), high = gather_quad(pairs[1]);
    Eight word = quad == 0 ? low : high;
    word.pair[0] = told(word.pair[0]);
    const int r = row + quad * 8;
    if (quad < 2 && r < args.tokens)
      store_eight_whole(words(pass, which) + (column(matrix, index, unit) / kUnit * kTile + r) * kUnit, word);
  }

  // ---- LayerNorm ----
  // Mean and squared deviations of 8 columns, of a chunk, of the block's columns, of the row: each from equal parts of those
  // before (Chan, Golub and LeVeque, 1983), so that nothing cancels where the mean is large.
  ALBERT_DEVICE void leave_statistics(int piece, const Eight& word) const {
    const float origin = low<T>(word.pair[0]);
    float sum = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float d = (i % 2 ? high<T>(word.pair[i / 2]) : low<T>(word.pair[i / 2])) - origin;
      sum += d;
      squares += d * d;
    }
    float mean = sum * 0.125f;
    squares = fmaxf(squares - sum * mean, 0.0f);
    mean += origin;
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2) {
      const float other = shuffle_xor(mean, mask), off = other - mean;
      squares += shuffle_xor(squares, mask) + off * off * static_cast<float>(4 * mask);
      mean = 0.5f * (mean + other);
    }
    if (quad == 0) at<Statistics>(S::kChunkStatistics)[piece / 2 * kTile + row + piece % 2 * 8] = {mean, squares};
  }
  template <int kParts>
  ALBERT_DEVICE static Statistics together(const Statistics* from, int columns) {
    Statistics part[kParts];
    float off = 0, squares = 0;  // of the mean from the first part's
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      part[i] = from[i * kTile];
      off += (part[i].mean - part[0].mean) * (1.0f / kParts);
    }
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float d = part[i].mean - part[0].mean - off;
      squares += part[i].squares + static_cast<float>(columns) * d * d;
    }
    return {part[0].mean + off, squares};
  }
  // Of each row those of the block's columns, to every block of the cluster: by warps that do not multiply.
  ALBERT_DEVICE void send_statistics() const {
    const int i = thread - kCluster * kWarp, r = i % kTile;
    if (i < 0 || i >= kTile * kCluster) return;
    const Statistics s = together<S::chunks(kQkv)>(at<Statistics>(S::kChunkStatistics) + r, kChunk);
    albert::send(at<Two>(S::kRankStatistics) + rank * kTile + r, statistics_arrivals(), i / kTile, Two{{s.mean, s.squares}});
  }
  // Those that the blocks of the cluster sent. All threads call.
  ALBERT_DEVICE void find_norms(bool mine) {
    if (thread == 0) expect(statistics_arrivals(), kCluster * kTile * 8);
    const uint32_t phase = norms_found++;
    if (!mine) return;
    wait(statistics_arrivals(), phase);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Statistics* of_row = at<Statistics>(S::kRankStatistics) + row + half * 8;
      const Statistics s = together<kCluster>(of_row, S::kHidden / kCluster);
      norms[half] = {s.mean, inverse_root(s.squares * (1.0f / S::kHidden) + args.eps)};
    }
  }

  // ---- attention ----
  // Of the block's heads, a few columns a warp, into shared memory as the next product takes them.
  ALBERT_DEVICE void attend() const {
    constexpr int kChunks = S::kHeadChunks;
    const int head = warp / S::kWarpsOfHead, first_pair = warp % S::kWarpsOfHead * S::kPairsOfWarp;
    const int chunk = first_pair / 4, pair = first_pair % 4;
    const auto of_head = [&](int part, int chunk, int half) {
      return fragment(S::kHeadRows, ((head * 3 + part) * kChunks + chunk) * 2 + half);
    };
    HeadOfTile<T, kChunks> tile;
#pragma unroll
    for (int i = 0; i < kChunks; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        tile.query[i][half] = *of_head(0, i, half);
        tile.key[i][half] = *of_head(1, i, half);
      }
    uint32_t value[S::kPairsOfWarp][2];
#pragma unroll
    for (int i = 0; i < S::kPairsOfWarp; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) value[i][half] = of_head(2, chunk, half)->pair[pair + i];
    tile.attend(own_sequences, quad);
    TwoPairs context[S::kPairsOfWarp];
    tile.context(value, context, sequences(), args.tokens, row, quad);
#pragma unroll
    for (int i = 0; i < S::kPairsOfWarp; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        fragment(S::kContext, (head * kChunks + chunk) * 2 + half)->pair[pair + i] = context[i].half[half];
  }

  // ---- products ----
  // What a warp multiplies with: of each chunk the units of one block of the cluster, or of all of them.
  template <int kMatrix>
  struct Units {
    static constexpr int kGroups = S::groups(kMatrix), kChunks = S::chunks(kMatrix) / kGroups;
    static constexpr int kBlocks = kGroups, kUnits = S::units(kMatrix);
    Eight of[kChunks][kBlocks][kUnits];
  };
  template <int kMatrix>
  ALBERT_DEVICE int first_chunk() const {
    return Units<kMatrix>::kGroups == 1 ? 0 : warp * Units<kMatrix>::kChunks;
  }
  template <int kMatrix>
  ALBERT_DEVICE int first_block() const {
    return Units<kMatrix>::kGroups == 1 ? warp : 0;
  }
  // While the words are on their way.
  template <int kMatrix>
  ALBERT_DEVICE Units<kMatrix> load_units() const {
    using U = Units<kMatrix>;
    U units{};
    if (warp >= kCluster) return units;
#pragma unroll
    for (int i = 0; i < U::kChunks; ++i)
#pragma unroll
      for (int block = 0; block < U::kBlocks; ++block)
#pragma unroll
        for (int u = 0; u < U::kUnits; ++u)
          units.of[i][block][u] = *weights(kMatrix, first_block<kMatrix>() + block, u, first_chunk<kMatrix>() + i);
    return units;
  }
  // Parts of the sums, to the blocks whose columns they are.
  template <int kMatrix>
  ALBERT_DEVICE void multiply(int rows, const Units<kMatrix>& units) const {
    if (warp >= kCluster) return;
    using U = Units<kMatrix>;
    constexpr int kGroups = U::kGroups, kChunks = U::kChunks, kBlocks = U::kBlocks, kUnits = U::kUnits;
    constexpr int kAtOnce = kBlocks * kUnits;
    constexpr int kChains = kAtOnce >= 4 ? 1 : kAtOnce > 1 ? 2 : 4;  // a long one waits for each of its instructions
    Four parts[kChains][kBlocks][kUnits] = {};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = first_chunk<kMatrix>() + i;
      const Eight a[2] = {*fragment(rows, chunk * 2), *fragment(rows, chunk * 2 + 1)};
#pragma unroll
      for (int block = 0; block < kBlocks; ++block)
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const Eight& b = units.of[i][block][u];
          multiply_add(parts[2 * i % kChains][block][u], {a[0].pair[0], a[1].pair[0], a[0].pair[1], a[1].pair[1]},
                       b.pair[0], b.pair[1], T{});
          multiply_add(parts[(2 * i + 1) % kChains][block][u], {a[0].pair[2], a[1].pair[2], a[0].pair[3], a[1].pair[3]},
                       b.pair[2], b.pair[3], T{});
        }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        Four& sum = parts[0][block][u];
#pragma unroll
        for (int chain = 1; chain < kChains; ++chain) add(sum, parts[chain][block][u]);
        const int part = rank * kGroups + (kGroups == 1 ? 0 : warp);
        albert::send(sums(kMatrix, part, u), arrivals(kMatrix), first_block<kMatrix>() + block, sum);
      }
  }
  ALBERT_DEVICE static void add(Four& sum, const Four& x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum.value[i] += x.value[i];
  }

  // For all parts of the block's sums. All threads call, and wait: there are no other blocks' words before.
  template <int kMatrix>
  ALBERT_DEVICE void wait_sums() {
    if (thread == 0) expect(arrivals(kMatrix), S::sum_bytes(kMatrix));
    wait(arrivals(kMatrix), products++ / 2);
  }
  // Of a unit's columns 2 quad and 2 quad + 1, rows `row` and `row + 8`.
  template <int kMatrix>
  ALBERT_DEVICE Four total(int unit) const {
    constexpr int kParts = S::parts(kMatrix);
    Four part[kParts];
#pragma unroll
    for (int i = 0; i < kParts; ++i) part[i] = *sums(kMatrix, i, unit);
#pragma unroll
    for (int step = 1; step < kParts; step *= 2)
#pragma unroll
      for (int i = 0; i + step < kParts; i += 2 * step) add(part[i], part[i + step]);
    return part[0];
  }
  struct Columns {  // what a lane's two columns of a unit have in vector()
    float value[2];
  };
  ALBERT_DEVICE Columns columns_of(int matrix, int which, int unit) const {
    const float* from = vector(matrix, which) + unit * kUnit + quad * 2;
    return {{from[0], from[1]}};
  }

  // Query, key and value, or the activations.
  template <int kMatrix>
  ALBERT_DEVICE void finish_words(bool normalizes) {
    const int unit = warp;
    const bool mine = unit < S::units(kMatrix);
    Columns u{}, c{};
    if (mine) {
      if (normalizes) u = columns_of(kMatrix, 1, unit);
      c = columns_of(kMatrix, normalizes ? 2 : 0, unit);
    }
    if (normalizes) find_norms(mine);
    wait_sums<kMatrix>();
    if (!mine) return;
    const Four x = total<kMatrix>(unit);
    float y[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] = x.value[i];
      if (normalizes) y[i] = (y[i] - norms[i / 2].mean * u.value[i % 2]) * norms[i / 2].scale;
      y[i] += c.value[i % 2];
    }
    if (kMatrix == kFfn) activate(y, args.activation);
    const uint32_t pairs[2] = {pack_pair(y[0], y[1], T{}), pack_pair(y[2], y[3], T{})};
    tell(kMatrix == kQkv ? S::kQkvWords : S::kInnerWords, kMatrix, unit, pairs);
  }

  // What is added to a residual: dense, whose residual is the pass's input, and ffn_output.
  template <int kMatrix>
  ALBERT_DEVICE void finish_sum(bool normalizes) {
    const int unit = warp;
    const bool mine = unit < S::units(kMatrix);
    Four residual{};
    Columns bias{};
    if (mine) {
      bias = columns_of(kMatrix, 0, unit);
      residual = normalizes ? normalized<kMatrix>(kMatrix == kDense ? summed : attended, unit) : input(unit);
    }
    wait_sums<kMatrix>();
    if (!mine) return;
    const Four x = total<kMatrix>(unit);
    uint32_t(&own)[2] = kMatrix == kDense ? attended : summed;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      own[half] = pack_pair(residual.value[2 * half] + x.value[2 * half] + bias.value[0],
                            residual.value[2 * half + 1] + x.value[2 * half + 1] + bias.value[1], T{});
    tell(kMatrix == kDense ? S::kAttended : S::kSummed, kMatrix, unit, own);
    // What the pass before gives is dense's residual.
    if (kMatrix == kDense && normalizes && args.return_all) write(residual, pass - 1, unit);
  }
  template <int kMatrix>
  ALBERT_DEVICE Four normalized(const uint32_t (&pairs)[2], int unit) const {
    const Columns weight = columns_of(kMatrix, 1, unit), bias = columns_of(kMatrix, 2, unit);
    Four x;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = i % 2 ? high<T>(pairs[i / 2]) : low<T>(pairs[i / 2]);
      x.value[i] = (value - norms[i / 2].mean) * norms[i / 2].scale * weight.value[i % 2] + bias.value[i % 2];
    }
    return x;
  }
  ALBERT_DEVICE Four input(int unit) const {
    Four x{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (row + half * 8 >= args.tokens) break;
      const uint32_t pair = load_pair_shared_by_blocks(args.hidden + (row + half * 8) * S::kHidden +
                                                       column(kDense, index, unit) + quad * 2);
      x.value[2 * half] = low<T>(pair);
      x.value[2 * half + 1] = high<T>(pair);
    }
    return x;
  }
  ALBERT_DEVICE void write(const Four& x, int state, int unit) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8;
      if (r >= args.tokens) break;
      const long at = static_cast<long>(state) * args.tokens + r;
      T* to = args.output + at * S::kHidden + column(kDense, index, unit) + quad * 2;
      *reinterpret_cast<uint32_t*>(to) = pack_pair(x.value[2 * half], x.value[2 * half + 1], T{});
    }
  }

  // ---- each pass ----
  ALBERT_DEVICE void run() {
    if (thread < 4) make_arrivals(at<Arrivals>(S::kArrivals) + thread);
    load_weights();
    clear_words();
    GridToken token = arrive_grid();
    load_vectors();
    load_norms();
    find_sequences();
    wait_grid(token);
    wait_copies();
    sync_cluster();  // and every block of it has begun
    for (int half = 0; half < 2; ++half) own_sequences[half] = sequences()[row + half * 8];
#pragma unroll 1
    for (;; ++pass) {
      const bool normalizes = pass > 0;
      begin();
      const auto qkv = load_units<kQkv>();
      if (normalizes)
        take_rows<kQkv>(words(pass - 1, S::kSummed), true);
      else
        take_hidden();
      sync_block();
      if (pass == args.passes) return write_last();
      multiply<kQkv>(S::kRows, qkv);
      if (normalizes) send_statistics();
      finish_words<kQkv>(normalizes);
      if (!normalizes) {  // whose input goes through no LayerNorm; others' words are on their way
        fold<kQkv>();
        fold<kFfn>();
      }

      begin();
      take_heads();
      sync_block();
      const auto dense = load_units<kDense>();
      attend();
      sync_block();
      multiply<kDense>(S::kContext, dense);
      finish_sum<kDense>(normalizes);
      if (!normalizes) collect_folded();

      begin();
      const auto ffn = load_units<kFfn>();
      take_rows<kFfn>(words(pass, S::kAttended), true);
      sync_block();
      multiply<kFfn>(S::kRows, ffn);
      send_statistics();
      finish_words<kFfn>(true);

      begin();
      const auto output = load_units<kFfnOutput>();
      take_rows<kFfnOutput>(words(pass, S::kInnerWords), false);
      sync_block();
      multiply<kFfnOutput>(S::kInnerRows, output);
      finish_sum<kFfnOutput>(true);
    }
  }
  // The second LayerNorm for who called.
  ALBERT_DEVICE void write_last() {
    const bool mine = warp < S::units(kDense);
    send_statistics();
    find_norms(mine);
    if (mine) write(normalized<kDense>(summed, warp), args.return_all ? args.passes - 1 : 0, warp);
    sync_cluster();  // nobody is gone to whom another one sends
  }
};

// What all passes have for words.
template <class T>
size_t word_bytes(const Arguments<T>& args) {
  return static_cast<size_t>(args.passes) * Words::kPassElements * sizeof(T);
}

template <class T, class S>
ALBERT_KERNEL(S::kThreads) void resident_encoder_by_words(ALBERT_ARGUMENT Arguments<T> args) {
  if constexpr (kHasWords) WordEncoder<T, S>(args).run();
}

}  // namespace albert
