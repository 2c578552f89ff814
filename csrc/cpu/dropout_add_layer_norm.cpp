// y = LayerNorm(residual + dropout(x + bias)): a row at a time, which stays in L1 between its passes.
// Compiled once per instruction set.
#include "layer_norm.h"
#include "residual_sum.h"
#include "token_kernels.h"
#include "token_parts.h"

namespace albert::ALBERT_ISA {
namespace {

template <class X, class R>
void run(const albert_layer_norm_args& a, const albert_parallel* parallel) {
  using Y = typename Wider<X, R>::Type;
  const TokenDropout dropout(a.dropout);
  const LayerNorm norm{a.weight, a.ln_bias, a.eps, a.mean, a.rstd};
  const int64_t used = tokens_of_rows(a.dropout, a.m);
  for_parts(a.m, parallel, [&](int, int, int64_t begin, int64_t end) {
    TokenCounters counters(a.dropout);
    for (int64_t i = begin; i < end; ++i) {
      Y* y = row_of<Y>(a.y, a.y_stride, i);
      Y* pre_norm = row_of<Y>(a.pre_norm, a.pre_norm_stride, i);
      if (i >= used) {
        clear_row(y, a.n);
        clear_row(pre_norm, a.n);
        if (a.mean != nullptr) a.mean[i] = 0;
        if (a.rstd != nullptr) a.rstd[i] = 0;
        continue;
      }
      Y* sum = pre_norm == nullptr ? y : pre_norm;
      residual_sum<X, R>(a, dropout, counters.of(i), i, sum);
      layer_norm_row(norm, sum, y, static_cast<Y*>(nullptr), i, a.n);
    }
  });
}

}  // namespace

void dropout_add_layer_norm(const albert_layer_norm_args& a, const albert_parallel* parallel) {
  const bool half = a.residual_dtype == ALBERT_BF16;
  if (a.x_dtype == ALBERT_BF16)
    half ? run<bf16, bf16>(a, parallel) : run<bf16, float>(a, parallel);
  else
    half ? run<float, bf16>(a, parallel) : run<float, float>(a, parallel);
}

}  // namespace albert::ALBERT_ISA
