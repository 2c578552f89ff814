// Mean and reciprocal standard deviation of one row, and the loops over its columns. Two passes: the mean, then the
// variance of the differences from it, since E[x^2] - mean^2 loses everything where the mean is large. The second pass
// also finds the rounding error of the first's mean. Compiled once per instruction set.
#pragma once
#include "vec.h"

namespace albert::ALBERT_ISA {

// f(column, lanes in use) for every vector of a row.
template <class Function>
ALBERT_INLINE void for_columns(int64_t n, Function f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, kLanes);
  if (j < n) f(j, static_cast<int>(n - j));
}
template <class T>
ALBERT_INLINE F load_part(const T* p, int n) {
  return n == kLanes ? load(p) : load(p, n);
}
template <class T>
ALBERT_INLINE void store_part(T* p, F x, int n) {
  if (n == kLanes)
    store(p, x);
  else
    store(p, x, n);
}

struct RowStatistics {
  float mean, correction, rstd;  // mean + correction is the better mean
};

template <class In>
inline RowStatistics row_statistics(const In* x, int64_t n, float eps) {
  F total = zero(), rest = zero(), squares = zero();
  for_columns(n, [&](int64_t j, int lanes) { total = add(total, load_part(x + j, lanes)); });
  const float mean = sum(total) / static_cast<float>(n);
  for_columns(n, [&](int64_t j, int lanes) {
    F d = sub(load_part(x + j, lanes), set(mean));
    if (lanes < kLanes) {  // the unused lanes hold -mean
      alignas(64) float part[kLanes] = {};
      store(part, d, lanes);
      d = load(part);
    }
    rest = add(rest, d);
    squares = fma(d, d, squares);
  });
  const float correction = sum(rest) / static_cast<float>(n);
  const float variance = sum(squares) / static_cast<float>(n) - correction * correction;
  return {mean, correction, 1.0f / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps)};
}

}  // namespace albert::ALBERT_ISA
