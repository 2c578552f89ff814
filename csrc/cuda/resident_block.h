// What a thread of the resident encoder knows: its place, the arguments, its block's shared memory, and how blocks wait
// for each other. Two ways:
//
// - At barriers of the grid.
// - For words. The memory in which blocks tell each other something is all ones before the launch; a word, which is 8
//   columns of a row or a Statistics, is written once, whole, and does not begin with ones. Who reads one that does reads it
//   again: nothing else has to be in order, and one trip to L2 takes the place of a barrier's and a load's. Each pass has
//   its own memory.
#pragma once
#include "device.h"
#include "resident_sizes.h"

namespace albert {

// T: of hidden states.
template <class T>
struct Arguments {
  Layout layout;
  int tokens, batch, passes, activation;
  bool return_all, float_parameters;
  float eps;
  const T* hidden;
  const int32_t* cu_seqlens;
  const void* parameters[16];  // T, or float32
  T* output;
  // Workspace.
  uint32_t* arrivals;   // of blocks at the grid's barrier, zero at first
  T* qkv;               // [tokens, up to whole tiles][3 hidden]
  T* context;           // [tokens][hidden]
  T* attended;          // [tokens][hidden], before the first LayerNorm
  T* inner;             // [tokens][inner], after the activation
  T* summed;            // [tokens][hidden], before the second LayerNorm
  Statistics* partial[2];  // [tokens][norm_parts]: of attended, and of summed
  size_t pass_bytes;       // from what blocks tell each other in a pass to the next pass's, where each has its own
#ifdef ALBERT_RESIDENT_TIMES
  long long* times;  // [block][pass][kPhases]
#endif
};

#ifdef ALBERT_RESIDENT_TIMES
constexpr int kPhases = 10, kTimesBytes = 256 * 16 * kPhases * 8;  // of up to 256 blocks and 16 passes
#endif

// Places among a layer's parameters.
enum { kQuery = 0, kKey = 2, kValue = 4, kDenseWeight = 6, kAttentionNorm = 8, kFfnWeight = 10, kFfnOutputWeight = 12,
       kNorm = 14 };

constexpr uint32_t kNotThere = 0xffffffffu;
ALBERT_DEVICE bool is_there(const Eight& x) { return x.pair[0] != kNotThere; }
ALBERT_DEVICE bool is_there(const Two& x) { return bits_of(x.value[0]) != kNotThere; }
// What ones are told as: they are NaN, as two elements of 16 bits and as a float, and so is this.
ALBERT_DEVICE uint32_t told(uint32_t begin) { return begin == kNotThere ? 0x7fff7fffu : begin; }

template <class T, class S>
struct Block {
  static constexpr int kWarps = S::kWarps, kThreads = S::kThreads;

  const Arguments<T>& args;
  char* shared;
  int thread, warp, lane, index, rank;
  int row, quad;  // of a matrix instruction's operands: lane = 4 row + quad
  int tiles, log_tiles;  // log_tiles: of the power of two from tiles on
  int pass = 0;
  uint32_t own_attended = 0, own_summed = 0;  // of words: the pair of the thread's that its block wrote last
  uint32_t arrived = 0;  // blocks at the grid's barrier
  uint32_t phases = 0;   // of arrivals, that are over

  ALBERT_DEVICE explicit Block(const Arguments<T>& a)
      : args(a), shared(shared_memory()), index(block_index()), rank(index % layout().cluster),
        tiles(S::kOneTile ? 1 : divide_up(a.tokens, kTile)), log_tiles(log2_up(tiles)) {
    begin();
  }
  // Each phase finds its places anew: those of all phases at a time are more than there are registers.
  ALBERT_DEVICE void begin() {
    thread = opaque(thread_index());
    warp = same_in_warp(thread / kWarp);
    lane = thread % kWarp;
    row = lane / 4;
    quad = lane % 4;
  }

  ALBERT_DEVICE decltype(auto) layout() const { return S::layout(args.layout); }
  ALBERT_DEVICE const char* weights(int matrix) const { return shared + layout().weights[matrix]; }
  // Of the block's own columns; which: see Layout.
  ALBERT_DEVICE float* vector(int matrix, int which) const {
    return reinterpret_cast<float*>(shared + layout().vectors[matrix]) + which * layout().units[matrix] * kUnit;
  }
  // Of a product. Without barriers a warp may be a product ahead of another one: two take turns.
  ALBERT_DEVICE float* sums(int matrix = kQkv) const {
    return reinterpret_cast<float*>(shared + layout().sums + (S::kWords ? matrix % 2 * layout().sums_bytes : 0));
  }
  ALBERT_DEVICE float* received() const { return reinterpret_cast<float*>(shared + layout().received); }
  ALBERT_DEVICE Arrivals* arrivals() const { return reinterpret_cast<Arrivals*>(shared + layout().arrivals); }
  // Of the rows that a product takes, or adds as its residual.
  ALBERT_DEVICE Norm* row_norms(int matrix) const {
    return reinterpret_cast<Norm*>(shared + layout().row_norms) + (S::kWords ? matrix / 2 * kTile : 0);
  }
  ALBERT_DEVICE Sequence* sequences() const { return reinterpret_cast<Sequence*>(shared + layout().sequences); }
  // Of each tile the chunks of keys that its rows see.
  ALBERT_DEVICE Sequence* keys() const { return reinterpret_cast<Sequence*>(shared + layout().keys); }

  // Rows beyond the tokens are the last one once more: nothing of them is kept.
  ALBERT_DEVICE int real_row(int r) const { return least(r, args.tokens - 1); }

  // What blocks tell each other, of this pass.
  template <class P>
  ALBERT_DEVICE P* now(P* p) const {
    if constexpr (S::kWords) return reinterpret_cast<P*>(reinterpret_cast<char*>(p) + pass * args.pass_bytes);
    return p;
  }
  // Of the pass before.
  template <class P>
  ALBERT_DEVICE P* before(P* p) const {
    if constexpr (S::kWords) return reinterpret_cast<P*>(reinterpret_cast<char*>(p) + (pass - 1) * args.pass_bytes);
    return p;
  }
  // Of row r, before the LayerNorm of which this product takes the output, or adds it.
  ALBERT_DEVICE const Statistics* statistics(int matrix, int r) const {
    return (matrix < kFfn ? before(args.partial[1]) : now(args.partial[0])) + r * layout().norm_parts();
  }
  // Tells the other blocks: a pair of columns of a row, `on` for all four lanes of a unit or for none. All lanes call.
  ALBERT_DEVICE void tell(bool on, T* to, uint32_t pair) const {
    if constexpr (S::kWords) {
      Eight all = gather_quad(pair);
      all.pair[0] = told(all.pair[0]);
      if (on && quad == 0) store_eight_whole(to, all);
    } else {
      if (on) *reinterpret_cast<uint32_t*>(to) = pair;
    }
  }
  ALBERT_DEVICE static void tell(Statistics* to, float mean, float squares) {
    if constexpr (S::kWords)
      store_two_whole(to, {{float_of(told(bits_of(mean))), squares}});
    else
      store_two(to, mean, squares);
  }

  // LayerNorm of a row, by `lanes` lanes, each at its place among them. A part's mean is at most
  // sqrt(parts) standard deviations from the row's: with one as origin the difference of the squares loses no more than
  // a factor of `parts` (Chan, Golub and LeVeque, 1983, on shifted data).
  ALBERT_DEVICE Norm norm_of(const Statistics* of_row, int place, int lanes) const {
    const int parts = layout().norm_parts();
    const float origin = load_two_shared_by_blocks(of_row).value[0];
    float sum = 0, squares = 0;
    constexpr int kAhead = 8;  // on their way at a time
#pragma unroll 1
    for (int first = place; first < parts; first += kAhead * lanes) {
      Two part[kAhead] = {};
#pragma unroll
      for (int i = 0; i < kAhead; ++i)
        if (first + i * lanes < parts) part[i] = load_two_shared_by_blocks(of_row + first + i * lanes);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) add_part(part[i], first + i * lanes, origin, sum, squares);
    }
    return norm_of(origin, sum, squares, lanes);
  }
  ALBERT_DEVICE void add_part(const Two& part, int i, float origin, float& sum, float& squares) const {
    if (i >= layout().norm_parts()) return;
    const float n = static_cast<float>(layout().norm_columns(i)), d = part.value[0] - origin;
    sum += n * d;
    squares += part.value[1] + n * d * d;
  }
  // Of the lanes' sums.
  ALBERT_DEVICE Norm norm_of(float origin, float sum, float squares, int lanes) const {
    for (int mask = 1; mask < lanes; mask *= 2) {
      sum += shuffle_xor(sum, mask);
      squares += shuffle_xor(squares, mask);
    }
    const float share = 1.0f / static_cast<float>(layout().hidden), distance = sum * share;
    return {origin + distance, inverse_root(fmaxf(squares * share - distance * distance, 0.0f) + args.eps)};
  }

  // All blocks; meanwhile() has what others leave before it to do. The count only grows, and begins at zero with each
  // launch. Who waits for words has no barrier.
  template <class Meanwhile>
  ALBERT_DEVICE void sync_grid(Meanwhile meanwhile) {
    if constexpr (S::kWords) return meanwhile();
    arrived += static_cast<uint32_t>(block_count());
    sync_block();
    if (thread == 0) add_release(args.arrivals, 1);
    meanwhile();
    if (thread == 0)
      while (load_acquire(args.arrivals) < arrived) pause();
    sync_block();
  }

#ifdef ALBERT_RESIDENT_TIMES
  int phase = 0;
  ALBERT_DEVICE void mark() {
    if (thread == 0 && phase < kTimesBytes / 8 / 256) args.times[index * (kTimesBytes / 8 / 256) + phase] = clock64();
    ++phase;
  }
#else
  ALBERT_DEVICE void mark() {}
#endif
};

ALBERT_DEVICE void take(Eight& to, const void* from) { to = load_eight_whole(from); }
ALBERT_DEVICE void take(Two& to, const void* from) { to = load_two_whole(from); }
// Words that a warp takes: all at once, and while it waits those that are not there yet once more. each(use) calls
// use(where to, where from).
template <class Each>
ALBERT_DEVICE void take_words(Each each, bool waits) {
  each([](auto& to, const void* from) { take(to, from); });
  while (waits) {
    bool missing = false;
    each([&](auto& to, const void*) { missing |= !is_there(to); });
    if (!any_in_warp(missing)) break;
    pause();
    each([](auto& to, const void* from) {
      if (!is_there(to)) take(to, from);
    });
  }
}

template <class T>
ALBERT_DEVICE float low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
ALBERT_DEVICE float high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

}  // namespace albert
