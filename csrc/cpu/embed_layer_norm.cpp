// y = dropout(LayerNorm(word + token type + position)). Compiled once per instruction set.
#include "embed_rows.h"
#include "token_kernels.h"
#include "token_parts.h"

namespace albert::ALBERT_ISA {
namespace {

template <class T>
void run(const albert_embed_args& a, const albert_parallel* parallel) {
  const TokenDropout dropout(a.dropout);
  const int64_t used = tokens_of_rows(a.dropout, a.tokens);
  for_parts(a.tokens, parallel, [&](int, int, int64_t begin, int64_t end) {
    TokenCounters counters(a.dropout);
    for (int64_t i = begin; i < end; ++i) {
      T* y = row_of<T>(a.y, a.y_stride, i);
      if (i >= used) {
        clear_row(y, a.size);
        continue;
      }
      embedding_sum<T>(a, i, y);
      const RowStatistics s = row_statistics(y, a.size, a.eps);
      const auto put = [&](int64_t j, int lanes, F factor) {
        const F normal = mul(sub(sub(load_part(y + j, lanes), set(s.mean)), set(s.correction)), set(s.rstd));
        const F v = fma(normal, load_part(a.weight + j, lanes), load_part(a.bias + j, lanes));
        store_part(y + j, mul(v, factor), lanes);
      };
      if (dropout.on())
        for_dropout_columns(dropout, counters.of(i), a.size, put);
      else
        for_columns(a.size, [&](int64_t j, int lanes) { put(j, lanes, set(1.0f)); });
    }
  });
}

}  // namespace

void embed_layer_norm(const albert_embed_args& a, const albert_parallel* parallel) {
  a.dtype == ALBERT_BF16 ? run<bf16>(a, parallel) : run<float>(a, parallel);
}

}  // namespace albert::ALBERT_ISA
