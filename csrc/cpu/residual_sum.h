// residual + dropout(x + bias), one token at a time. Compiled once per instruction set.
#pragma once
#include "row_statistics.h"
#include "token_dropout.h"

namespace albert::ALBERT_ISA {

template <class X, class R>
struct Wider {
  using Type = float;
};
template <>
struct Wider<bf16, bf16> {
  using Type = bf16;
};

ALBERT_INLINE F round_to(const float*, F x) { return x; }
ALBERT_INLINE F round_to(const bf16*, F x) { return widen(narrow(x)); }

// Row i of a matrix; null stays null.
template <class T>
ALBERT_INLINE T* row_of(void* p, int64_t stride, int64_t i) {
  return p == nullptr ? nullptr : static_cast<T*>(p) + i * stride;
}
template <class T>
ALBERT_INLINE const T* row_of(const void* p, int64_t stride, int64_t i) {
  return p == nullptr ? nullptr : static_cast<const T*>(p) + i * stride;
}

// out = the sum, rounded to the wider format of x and residual, which out can hold.
template <class X, class R, class Out>
inline void residual_sum(const albert_layer_norm_args& a, const TokenDropout& dropout,
                         TokenCounters::Counters counters, int64_t token, Out* out) {
  const X* x = row_of<X>(a.x, a.x_stride, token);
  const R* residual = row_of<R>(a.residual, a.residual_stride, token);
  const auto put = [&](int64_t j, int lanes, F factor) {
    F v = load_part(x + j, lanes);
    if (a.bias != nullptr) v = add(v, load_part(a.bias + j, lanes));
    v = fma(v, factor, load_part(residual + j, lanes));
    store_part(out + j, round_to(static_cast<const typename Wider<X, R>::Type*>(nullptr), v), lanes);
  };
  if (dropout.on())
    for_dropout_columns(dropout, counters, a.n, put);
  else
    for_columns(a.n, [&](int64_t j, int lanes) { put(j, lanes, set(1.0f)); });
}

}  // namespace albert::ALBERT_ISA
