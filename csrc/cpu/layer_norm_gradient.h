// The gradient of LayerNorm for a few rows at a time, so that the gradients of weight and bias, summed down the
// columns, are read and written once for all of them. With normal = (x - mean) rstd and g = grad_y weight:
//   grad_x = rstd (g - mean(g) - normal mean(g normal))
// Compiled once per instruction set.
#pragma once
#include "row_statistics.h"

namespace albert::ALBERT_ISA {

template <class X, class G>
struct NormRow {
  const X* x;
  const G* grad_y;
  float mean, rstd;
  float mean_g, mean_g_normal;  // filled in by norm_sums
};

template <class X, class G>
ALBERT_INLINE F normal_part(const NormRow<X, G>& row, int64_t j, int lanes) {
  return mul(sub(load_part(row.x + j, lanes), set(row.mean)), set(row.rstd));
}

// Adds the rows' share to grad_weight and grad_bias (float32, whole vectors may be written).
template <int rows, class X, class G>
inline void norm_sums(NormRow<X, G>* row, const float* weight, int64_t n, float* grad_weight, float* grad_bias) {
  F g_sum[rows], g_normal_sum[rows];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r) g_sum[r] = g_normal_sum[r] = zero();
  for_columns(n, [&](int64_t j, int lanes) {
    const F w = load_part(weight + j, lanes);
    F weight_part = zero(), bias_part = zero();
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F grad = load_part(row[r].grad_y + j, lanes), normal = normal_part(row[r], j, lanes), g = mul(grad, w);
      g_sum[r] = add(g_sum[r], g);
      g_normal_sum[r] = fma(g, normal, g_normal_sum[r]);
      weight_part = fma(grad, normal, weight_part);
      bias_part = add(bias_part, grad);
    }
    store(grad_weight + j, add(load(grad_weight + j), weight_part));
    store(grad_bias + j, add(load(grad_bias + j), bias_part));
  });
  for (int r = 0; r < rows; ++r) {
    row[r].mean_g = sum(g_sum[r]) / static_cast<float>(n);
    row[r].mean_g_normal = sum(g_normal_sum[r]) / static_cast<float>(n);
  }
}

// emit(column, lanes, grad_x of each row): afterwards, with the means that norm_sums found.
template <int rows, class X, class G, class Emit>
ALBERT_INLINE void norm_gradient(const NormRow<X, G>* row, const float* weight, int64_t n, Emit emit) {
  for_columns(n, [&](int64_t j, int lanes) {
    const F w = load_part(weight + j, lanes);
    F grad_x[rows];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F g = mul(load_part(row[r].grad_y + j, lanes), w);
      const F centred = sub(g, set(row[r].mean_g));
      grad_x[r] = mul(set(row[r].rstd), fnma(normal_part(row[r], j, lanes), set(row[r].mean_g_normal), centred));
    }
    emit(j, lanes, grad_x);
  });
}

}  // namespace albert::ALBERT_ISA
