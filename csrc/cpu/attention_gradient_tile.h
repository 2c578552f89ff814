// The element-wise middle of attention's backward pass, on tiles [queries][kPanel] of one panel of keys:
//   P = exp(s - logsumexp),  dS = P (keep dP - delta),  delta = rowsum(dO O)
// Compiled once per instruction set.
#pragma once
#include "attention_pack.h"
#include "attention_softmax.h"

namespace albert::ALBERT_ISA {

// Queries in a group: what the products for the gradients of keys and values reduce over at a time.
constexpr int64_t kGroup = 128;

// The tiles of a group: `queries` of them in use, padded to fill the steps of a reduction over queries.
struct GradientTile {
  int64_t queries, padded;
  float factor, keep_scale;  // of the scores (Scores), and of what dropout keeps
  float *scores, *grad_probabilities;          // [padded][kPanel], from the micro-kernels
  float *probabilities_out, *grad_scores_out;  // the columns' operands of dV and dK, [steps][kPanel] units
  float *shift, *rest, *delta;  // [kGroup]: see set_query
  float* lines[kGroup];      // the rows' operand of dQ: where a query's first line is
  int64_t next_line[kGroup];  // and how far it is to the next

  // P = exp2(s + shift) * rest, shift = -logsumexp log2(e): its rounding would be an error of the whole row.
  void set_query(int64_t r, float natural_logsumexp, float dot) const {
    const float rounded = natural_logsumexp * kLog2e;
    shift[r] = -rounded;
    rest[r] = 1 - (__builtin_fmaf(natural_logsumexp, kLog2e, -rounded) + natural_logsumexp * kLog2eRest) *
                      static_cast<float>(kLn2);
    delta[r] = dot;
  }

  // With a bias: s are the bits of the forward, and none is more than the largest.
  void set_query(int64_t r, float largest, float log2_of_sum, float dot) const {
    shift[r] = -largest;
    rest[r] = __builtin_exp2f(-log2_of_sum);
    delta[r] = dot;
  }

  // A query without keys, and padding: P = 0.
  void set_nothing(int64_t r) const {
    shift[r] = minus_infinity();
    rest[r] = delta[r] = 0;
  }

  // run_units: of a query, in a run of panels. Where the last query lacks a partner, that gets a place nobody reads.
  void place_lines(float* memory, int64_t run_units) {
    const Blocks blocks(queries);
    for (int64_t b = 0; b < blocks.count; ++b)
      for (int r = 0; r < blocks.rows(b); ++r) {
        lines[blocks.begin(b) + r] = memory + blocks.begin(b) * run_units + r * kLine;
        next_line[blocks.begin(b) + r] = blocks.rows(b) * kLine;
      }
    if (queries % 2 == 1) {
      lines[queries] = memory + kGroup * run_units;
      next_line[queries] = kLine;
    }
  }

  // What the micro-kernels never write must be zero.
  void clear_padding(Unit unit) const {
    const auto clear = [](float* p, int64_t from, int64_t to) {
      for (int64_t i = from * kPanel; i < to * kPanel; i += kLanes) store(p + i, zero());
    };
    clear(scores, queries, padded);
    clear(grad_probabilities, queries, padded);
    if (unit == Unit::f32) return;  // the same memory
    clear(probabilities_out, divide_up(queries, 2), padded / 2);
    clear(grad_scores_out, divide_up(queries, 2), padded / 2);
  }
};

ALBERT_INLINE F to_bf16(F x) { return widen(narrow(x)); }

// Queries r and r + 1 of the group: two, because two share a unit of bfloat16, and a draw of random words. The panel is
// the i-th of its run. For float32 the tiles are overwritten with what becomes of them.
template <class Stored, bool dropped>
ALBERT_INLINE void differentiate_pair(const GradientTile& t, int64_t r, int64_t i, const Dropout& dropout,
                                      uint32_t outer, uint32_t q, uint32_t key) {
  constexpr bool pairs = sizeof(Stored) == 2;
  constexpr int per_line = 64 / sizeof(Stored);
  I words[4];
  if (dropped) dropout.words_of_two(outer, q, key, words);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) {
    const int64_t line = i * (kPanel / per_line) + v * kLanes / per_line;
    F kept[2], slope[2];
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const int64_t at = (r + j) * kPanel + v * kLanes;
      const F p = mul(probability(load(t.scores + at), set(t.factor), set(t.shift[r + j])), set(t.rest[r + j]));
      F grad = load(t.grad_probabilities + at);
      kept[j] = p;
      if (dropped) {
        kept[j] = keep_below(p, words[j * kVectors + v], dropout.threshold);
        grad = mul(keep_below(grad, words[j * kVectors + v], dropout.threshold), set(t.keep_scale));
      }
      slope[j] = mul(p, sub(grad, set(t.delta[r + j])));
      Stored* out = reinterpret_cast<Stored*>(t.lines[r + j] + line * t.next_line[r + j]);
      store(out + v * kLanes % per_line, slope[j]);
      if (!pairs) {
        store(t.probabilities_out + at, kept[j]);
        store(t.grad_scores_out + at, slope[j]);
      }
    }
    if (pairs) {
      const int64_t at = r / 2 * kPanel + v * kLanes;
      store(t.probabilities_out + at, interleave(to_bf16(kept[0]), to_bf16(kept[1])));
      store(t.grad_scores_out + at, interleave(to_bf16(slope[0]), to_bf16(slope[1])));
    }
  }
}

template <class Stored, bool dropped>
void differentiate(const GradientTile& t, int64_t i, const Dropout& dropout, uint32_t outer,
                   uint32_t q, uint32_t key) {
  for (int64_t r = 0; r < t.queries; r += 2)
    differentiate_pair<Stored, dropped>(t, r, i, dropout, outer, q + static_cast<uint32_t>(r), key);
}

// sum over d of dO O.
template <class T>
inline float row_dot(const T* a, const T* b, int64_t d) {
  F total = zero();
  for (int64_t c = 0; c < d; c += kLanes) {
    const int left = static_cast<int>(smaller(d - c, kLanes));
    total = fma(load_columns(a + c, left), load_columns(b + c, left), total);
  }
  return sum(total);
}

// grad[key][d] = factor * sums^T for one panel of keys; sums: [d rounded up to kLanes][kPanel].
template <class T>
void store_transposed(const float* sums, int64_t d, int64_t keys, float factor, T* grad, int64_t stride) {
  alignas(64) float block[kLanes * kLanes];
  for (int64_t c = 0; c < d; c += kLanes)
    for (int64_t k = 0; k < keys; k += kLanes) {
      transpose(sums + c * kPanel + k, kPanel, block, kLanes);
      for (int64_t i = 0; i < smaller(keys - k, kLanes); ++i)
        store_columns(grad + (k + i) * stride + c, mul(load(block + i * kLanes), set(factor)),
                      static_cast<int>(smaller(d - c, kLanes)));
    }
}

}  // namespace albert::ALBERT_ISA
