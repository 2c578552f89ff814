// What a thread of the resident encoder knows: its place, the arguments, its block's shared memory, and how blocks wait
// for each other.
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
  Statistics* partial;  // [tokens][norm_parts]: of the last that was written of attended and summed
#ifdef ALBERT_RESIDENT_TIMES
  long long* times;  // [block][pass][kPhases]
#endif
};

#ifdef ALBERT_RESIDENT_TIMES
constexpr int kPhases = 10, kTimesBytes = 256 * 16 * kPhases * 8;  // of up to 256 blocks and 16 passes
#endif

// Words: see resident_words.h.
constexpr uint32_t kNotThere = 0xffffffffu;
ALBERT_DEVICE bool is_there(const Eight& x) { return x.pair[0] != kNotThere; }
// What ones are told as: they are NaN, and so is this.
ALBERT_DEVICE uint32_t told(uint32_t begin) { return begin == kNotThere ? 0x7fff7fffu : begin; }

template <class T, class S>
struct Block {
  const Arguments<T>& args;
  char* shared;
  int thread, warp, lane, index, rank;
  int row, quad;  // of a matrix instruction's operands: lane = 4 row + quad
  int tiles, log_tiles;  // log_tiles: of the power of two from tiles on
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
  ALBERT_DEVICE float* sums() const { return reinterpret_cast<float*>(shared + layout().sums); }
  ALBERT_DEVICE float* received() const { return reinterpret_cast<float*>(shared + layout().received); }
  ALBERT_DEVICE Arrivals* arrivals() const { return reinterpret_cast<Arrivals*>(shared + layout().arrivals); }
  ALBERT_DEVICE Norm* row_norms() const { return reinterpret_cast<Norm*>(shared + layout().row_norms); }
  ALBERT_DEVICE Sequence* sequences() const { return reinterpret_cast<Sequence*>(shared + layout().sequences); }
  // Of each tile the chunks of keys that its rows see.
  ALBERT_DEVICE Sequence* keys() const { return reinterpret_cast<Sequence*>(shared + layout().keys); }

  // Rows beyond the tokens are the last one once more: nothing of them is kept.
  ALBERT_DEVICE int real_row(int r) const { return least(r, args.tokens - 1); }

  // LayerNorm of a row, by `lanes` lanes, each at its place among them. A part's mean is at most
  // sqrt(parts) standard deviations from the row's: with one as origin the difference of the squares loses no more than
  // a factor of `parts` (Chan, Golub and LeVeque, 1983, on shifted data).
  ALBERT_DEVICE Norm norm_of(int r, int place, int lanes) const {
    const int parts = layout().norm_parts();
    const Statistics* of_row = args.partial + r * parts;
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
      for (int i = 0; i < kAhead; ++i) {
        if (first + i * lanes >= parts) break;
        const float n = static_cast<float>(layout().norm_columns(first + i * lanes)), d = part[i].value[0] - origin;
        sum += n * d;
        squares += part[i].value[1] + n * d * d;
      }
    }
    for (int mask = 1; mask < lanes; mask *= 2) {
      sum += shuffle_xor(sum, mask);
      squares += shuffle_xor(squares, mask);
    }
    const float share = 1.0f / static_cast<float>(layout().hidden), distance = sum * share;
    return {origin + distance, inverse_root(fmaxf(squares * share - distance * distance, 0.0f) + args.eps)};
  }

  // All blocks; meanwhile() has what others leave before it to do. The count only grows, and begins at zero with each
  // launch.
  template <class Meanwhile>
  ALBERT_DEVICE void sync_grid(Meanwhile meanwhile) {
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

template <class T>
ALBERT_DEVICE float low(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
ALBERT_DEVICE float high(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

template <int kCount>
ALBERT_DEVICE void activate(float (&x)[kCount], int activation) {
  const auto each = [&](auto of) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = of(x[i]);
  };
  switch (activation) {
    case ALBERT_CUDA_GELU_TANH:  // 1 + tanh(y) = 2 / (1 + exp(-2 y)); log2(e) is in the factor
      return each([](float x) {
        const float y = x * (1.0f + 0.044715f * x * x);
        return x * inverse(1.0f + exp2_fast(-2.302208198f * y));
      });
    case ALBERT_CUDA_GELU_ERF: return each([](float x) { return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f)); });
    default: return each([](float x) { return x < 0.0f ? 0.0f : x; });
  }
}

}  // namespace albert
