// Dropout of packed tokens: which elements survive, as factors 0 or 1 / (1 - p), four vectors of columns at a time.
// Compiled once per instruction set.
#pragma once
#include "philox.h"
#include "token_ops.h"

namespace albert::ALBERT_ISA {

// What names a token to Philox. Tokens are asked for in rising order, and only those of rows.
class TokenCounters {
 public:
  explicit TokenCounters(const albert_dropout& d) : cu_seqlens_(d.cu_seqlens), batch_(d.batch) {}
  struct Counters {
    uint32_t row, position;
  };
  ALBERT_INLINE Counters of(int64_t token) {
    if (cu_seqlens_ == nullptr) return {0, static_cast<uint32_t>(token)};
    while (row_ < batch_ && cu_seqlens_[row_ + 1] <= token) ++row_;
    return {static_cast<uint32_t>(row_), static_cast<uint32_t>(token - cu_seqlens_[row_])};
  }

 private:
  const int32_t* cu_seqlens_;
  int64_t batch_, row_ = 0;
};

// Tokens that belong to a row: those beyond get zeros.
inline int64_t tokens_of_rows(const albert_dropout& d, int64_t tokens) {
  return d.cu_seqlens == nullptr ? tokens : d.cu_seqlens[d.batch];
}

// An element survives where its word is below round((1 - p) 2^32), and is then divided by 1 - p.
class TokenDropout {
 public:
  static constexpr int kVectors = 4;  // one draw of Philox
  static constexpr int kColumns = kVectors * kLanes;

  explicit TokenDropout(const albert_dropout& d) : draw_{}, scale_(static_cast<float>(1.0 / (1.0 - d.p))) {
    const double threshold = __builtin_nearbyint((1.0 - d.p) * 4294967296.0);
    on_ = threshold < 4294967296.0;  // otherwise p is 0 or next to it: every word is below, and the scale is 1
    draw_.key0 = static_cast<uint32_t>(d.seed);
    draw_.key1 = static_cast<uint32_t>(d.seed >> 32);
    draw_.site = d.site;
    draw_.threshold = on_ ? static_cast<uint32_t>(threshold) : 0;
  }

  bool on() const { return on_; }

  // Factors of columns [column, column + kColumns); column is a multiple of kColumns.
  ALBERT_INLINE void factors(TokenCounters::Counters token, int64_t column, F out[kVectors]) const {
    I words[kVectors];
    draw_.words(token.row, token.position, static_cast<uint32_t>(column), words);
    for (int i = 0; i < kVectors; ++i) out[i] = keep_below(set(scale_), words[i], draw_.threshold);
  }

 private:
  Dropout draw_;
  float scale_;
  bool on_;
};

// f(column, lanes in use, factor) for every vector of a token's columns; a factor of 1 without dropout.
template <class Function>
ALBERT_INLINE void for_dropout_columns(const TokenDropout& dropout, TokenCounters::Counters token, int64_t n,
                                       Function f) {
  for (int64_t j = 0; j < n; j += TokenDropout::kColumns) {
    F factor[TokenDropout::kVectors];
    dropout.factors(token, j, factor);
    for (int v = 0; v < TokenDropout::kVectors; ++v) {
      const int64_t column = j + v * kLanes, left = n - column;
      if (left >= kLanes)
        f(column, kLanes, factor[v]);
      else if (left > 0)
        f(column, static_cast<int>(left), factor[v]);
    }
  }
}

}  // namespace albert::ALBERT_ISA
