// Copies columns of a matrix of tokens into the micro-kernel's "steps" layout, [step][width] units, bfloat16
// interleaved in pairs of tokens. Compiled once per instruction set.
#pragma once
#include "gemm_micro.h"
#include "vec.h"

namespace albert::ALBERT_ISA {

template <class T>
struct TokenRows {
  const T* data;
  int64_t stride, tokens;
  int tokens_per_step;  // 2 for bf16x2
};

// Steps [step, step + kLine) of `columns` columns from `first` on; zeros past the tokens and up to `width` units.
// Returns the columns' sums in sums, unless null: short sums, for the caller to add up.
template <int vectors, class T>
inline void pack_steps(const TokenRows<T>& x, int64_t step, int64_t first, int columns, int width, float* out,
                       F* sums) {
  const auto columns_of = [&](int64_t token, int v) {
    const int n = columns - v * kLanes;
    const T* p = x.data + token * x.stride + first + v * kLanes;
    return token >= x.tokens || n <= 0 ? zero() : n >= kLanes ? load(p) : load(p, n);
  };
  for (int v = 0; sums != nullptr && v < vectors; ++v) sums[v] = zero();
  for (int64_t s = step; s < step + kLine; ++s, out += width)
    for (int v = 0; v < vectors; ++v) {
      const F a = columns_of(s * x.tokens_per_step, v);
      F units = a, total = a;
      if (x.tokens_per_step == 2) {
        const F b = columns_of(s * 2 + 1, v);
        units = interleave(a, b);
        total = add(a, b);
      }
      const int n = width - v * kLanes;
      if (n >= kLanes)
        store(out + v * kLanes, units);
      else
        store(out + v * kLanes, units, n);
      if (sums != nullptr) sums[v] = add(sums[v], total);
    }
}

}  // namespace albert::ALBERT_ISA
