// LayerNorm of one row at a time. Compiled once per instruction set.
#pragma once
#include "row_statistics.h"

namespace albert::ALBERT_ISA {

struct LayerNorm {
  const float *weight, *bias;
  float eps;
  float *mean, *rstd;  // [m], or null
};

// x and y may be one row. copy, unless null, gets x in y's format (pre_norm).
template <class In, class Out>
void layer_norm_row(const LayerNorm& norm, const In* x, Out* y, Out* copy, int64_t row, int64_t n) {
  const RowStatistics statistics = row_statistics(x, n, norm.eps);
  const float mean = statistics.mean, correction = statistics.correction, rstd = statistics.rstd;
  if (norm.mean != nullptr) norm.mean[row] = mean + correction;
  if (norm.rstd != nullptr) norm.rstd[row] = rstd;
  for_columns(n, [&](int64_t j, int lanes) {
    const F v = load_part(x + j, lanes);
    if (copy != nullptr) store_part(copy + j, v, lanes);
    const F normal = mul(sub(sub(v, set(mean)), set(correction)), set(rstd));
    store_part(y + j, fma(normal, load_part(norm.weight + j, lanes), load_part(norm.bias + j, lanes)), lanes);
  });
}

}  // namespace albert::ALBERT_ISA
