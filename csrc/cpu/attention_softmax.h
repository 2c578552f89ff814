// Scores to probabilities, a row of a tile at a time. Everything is to the base 2: exp(x) = exp2(x log2(e)).
// Compiled once per instruction set.
#pragma once
#include "attention_layout.h"
#include "gemm_epilogue.h"
#include "philox.h"
#include "transpose.h"

namespace albert::ALBERT_ISA {

constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f;
constexpr double kLn2 = 0.693147180559945309;
constexpr int kVectors = kPanel / kLanes;  // of a panel
ALBERT_INLINE float minus_infinity() { return -__builtin_inff(); }

// What becomes of q . k. Where nothing is added, and the scale is positive, it stays as it is until the exponential,
// which multiplies by `factor` without another rounding. Otherwise finish() computes (q . k scale + bias) log2(e), and
// the factor is 1.
struct Scores {
  const albert_attention_args& args;
  float product, factor;
  bool raw;
  explicit Scores(const Attention& a)
      : args(a.args), product(args.scale * kLog2e), factor(1), raw(args.bias == nullptr && product > 0) {
    if (raw) factor = product, product = 1;
  }

  // Whether scores need no finishing, if the query that sees least sees `seen` keys.
  bool ready(int64_t key, int64_t seen, int64_t panels) const { return raw && seen - key >= panels * kPanel; }

  // Finishes the scores of query q with `panels` panels of keys from `key` on; s + p * stride holds those of panel p.
  // seen: the row's keys that q may see. Everything else becomes -inf.
  void finish(const Row& row, int64_t head, int64_t q, int64_t key, int64_t seen, float* s, int64_t stride,
              int64_t panels) const {
    const int64_t n = seen - key;
    if (args.bias == nullptr)
      return apply(s, stride, raw ? larger(n, 0) / kPanel : 0, panels, n, static_cast<const float*>(nullptr));
    const int64_t offset =
        row.index * args.bias_batch_stride + head * args.bias_head_stride + q * args.bias_query_stride + key;
    if (args.bias_dtype == ALBERT_BF16)
      apply(s, stride, 0, panels, n, static_cast<const bf16*>(args.bias) + offset);
    else
      apply(s, stride, 0, panels, n, static_cast<const float*>(args.bias) + offset);
  }

 private:
  template <class B>
  void apply(float* s, int64_t stride, int64_t first_panel, int64_t panels, int64_t n, const B* bias) const {
    for (int64_t p = first_panel; p < panels; ++p)
      for (int c = 0; c < kPanel; c += kLanes) {
        float* at = s + p * stride + c;
        const int64_t key = p * kPanel + c;
        const int left = static_cast<int>(smaller(n - key, kLanes));
        F t = mul(load(at), set(product));
        if (bias != nullptr && left > 0) t = fma(load_columns(bias + key, left), set(kLog2e), t);
        if (left < kLanes) store(at, set(minus_infinity()));
        store_columns(at, t, left);
      }
  }
};

inline Dropout dropout_of(const Attention& a) {
  return {static_cast<uint32_t>(a.args.seed), static_cast<uint32_t>(a.args.seed >> 32), a.args.site, a.keep_threshold};
}

// exp2(score * factor + shift), the shift being less the row's maximum or logsumexp; 0 for -inf, NaN for NaN. Denormal
// numbers take a hundred times as long, and come up in exp2_normal before its result is one: results below 2^-100 are
// computed as that, then taken off.
ALBERT_INLINE F exponent(F score, F factor, F shift) { return max(set(-100.0f), fma(score, factor, shift)); }
ALBERT_INLINE F probability(F power) { return sub(power, set(0x1p-100f)); }
ALBERT_INLINE F probability(F score, F factor, F shift) {
  return probability(exp2_normal(exponent(score, factor, shift)));
}

// The running softmax of a block of queries: maximum, sum (a vector, added up at the end), and what the earlier sums
// must be multiplied by.
struct OnlineSoftmax {
  static constexpr int kRows = (kMaxRows + kLanes - 1) / kLanes * kLanes;
  alignas(64) float top[kRows], shift[kRows], alpha[kRows];
  alignas(64) float sums[kRows * kLanes];
  float factor;  // of the scores (Scores)

  void start(float scores_factor) {
    factor = scores_factor;
    for (int r = 0; r < kRows; r += kLanes) store(top + r, set(minus_infinity()));
    for (int r = 0; r < kRows; ++r) store(sums + r * kLanes, zero());
  }

  // Tile s: [panels][rows][kPanel].
  void raise(const float* s, int64_t panels, int rows) {
    alignas(64) float best[kRows * kLanes];
    for (int r = 0; r < kRows; ++r) {
      F most[kVectors];
      for (int v = 0; v < kVectors; ++v) most[v] = set(minus_infinity());
      for (int64_t p = 0; p < panels && r < rows; ++p)
        for (int v = 0; v < kVectors; ++v) most[v] = max(most[v], load(s + (p * rows + r) * kPanel + v * kLanes));
      for (int v = 1; v < kVectors; ++v) most[0] = max(most[0], most[v]);
      store(best + r * kLanes, most[0]);
    }
    for (int r = 0; r < kRows; r += kLanes) {
      const F before = load(top + r);
      const F now = max(before, mul(across(best + r * kLanes, [](F a, F b) { return max(a, b); }), set(factor)));
      const F less_top = less(set(minus_infinity()), now, sub(zero(), now), zero());  // no key so far: anything will do
      store(alpha + r, probability(before, set(1.0f), less_top));
      store(shift + r, less_top);
      store(top + r, now);
    }
  }

  // The sums, and what the output must be multiplied by: keep_scale / sum, and 0 for a query without keys.
  void close(float keep_scale, float* totals, float* factors) const {
    for (int r = 0; r < kRows; r += kLanes) {
      const F total = across(sums + r * kLanes, [](F a, F b) { return add(a, b); });
      store(totals + r, total);
      store(factors + r, less(zero(), total, div(set(keep_scale), total), mul(total, zero())));  // NaN stays NaN
    }
  }
};

// Where the probabilities of a tile go as the rows' operand ("lines") of a product that reduces over keys.
template <class Stored>
struct KeyLines {
  static constexpr int kPerLine = 64 / sizeof(Stored);
  Stored* out;
  int rows;
  ALBERT_INLINE Stored* at(int r, int64_t key) const {  // key: within the tile
    return out + (key / kPerLine * rows + r) * kPerLine + key % kPerLine;
  }
};

// `count` rows of the tile from r on: probabilities into lines, their sums (before dropout) into the softmax. The same
// for a row whatever `count` is: no product is left beside a sum, which the compiler might make one operation or two.
template <bool dropped, int count, class Stored>
void exponentiate(OnlineSoftmax& softmax, const float* s, int64_t panels, int rows, int r, const Dropout& dropout,
                  uint32_t outer, uint32_t q, uint32_t key, const KeyLines<Stored>& lines) {
  F total[count], shift[count];
  for (int i = 0; i < count; ++i) {
    total[i] = zero();
    shift[i] = set(softmax.shift[r + i]);
  }
  I words[count][4];
  for (int64_t p = 0; p < panels; ++p) {
    F e[count * kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < count * kVectors; ++i)
      e[i] = exponent(load(s + (p * rows + r) * kPanel + i * kLanes), set(softmax.factor), shift[i / kVectors]);
    exp2_normal(e);
#pragma GCC unroll 8
    for (int i = 0; i < count * kVectors; ++i) {
      const int64_t row = i / kVectors, column = p * kPanel + i % kVectors * kLanes, word = column / kLanes % 4;
      e[i] = probability(e[i]);
      total[row] = add(total[row], e[i]);
      if (dropped) {
        if (word == 0)
          dropout.words(outer, q + static_cast<uint32_t>(row), key + static_cast<uint32_t>(column), words[row]);
        e[i] = keep_below(e[i], words[row][word], dropout.threshold);
      }
      store(lines.at(static_cast<int>(r + row), column), e[i]);
    }
  }
  for (int i = 0; i < count; ++i) {
    float* sums = softmax.sums + (r + i) * kLanes;
    store(sums, fma(load(sums), set(softmax.alpha[r + i]), total[i]));
  }
}

}  // namespace albert::ALBERT_ISA
