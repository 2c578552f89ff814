// Activations to u8, asymmetric, one scale and zero point a row. Compiled once per instruction set.
#pragma once
#include "vec.h"

namespace albert::ALBERT_ISA {

struct RowScale {
  float scale, inverse;
  int zero;
};

// The range always holds 0, so that 0 is exact. NaN and infinity make the scale NaN: a wrong row must not look right.
template <class Source>
inline RowScale row_scale(const Source* x, int64_t k) {
  constexpr int chains = 4;
  F low[chains], high[chains], poison[chains];
  for (int i = 0; i < chains; ++i) low[i] = high[i] = poison[i] = zero();
  int64_t j = 0;
  for (; j + chains * kLanes <= k; j += chains * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < chains; ++i) {
      const F v = load(x + j + i * kLanes);
      low[i] = min(v, low[i]);
      high[i] = max(v, high[i]);
      poison[i] = fma(v, zero(), poison[i]);
    }
  for (; j < k; j += kLanes) {
    const F v = k - j >= kLanes ? load(x + j) : load(x + j, static_cast<int>(k - j));
    low[0] = min(v, low[0]);
    high[0] = max(v, high[0]);
    poison[0] = fma(v, zero(), poison[0]);
  }
  for (int i = 1; i < chains; ++i) {
    low[0] = min(low[0], low[i]);
    high[0] = max(high[0], high[i]);
    poison[0] = add(poison[0], poison[i]);
  }
  const float lowest = min(low[0]), highest = max(high[0]);
  const float scale = (highest - lowest) / 255.0f;
  // A row of zeros, or one too small to divide by: everything becomes the zero point.
  const float inverse = scale > 1e-36f ? 1.0f / scale : 0.0f;
  return {scale + sum(poison[0]), inverse, static_cast<int>(-lowest * inverse + 0.5f)};
}

// The lowest may come out a rounding below -0.5, the highest as 256: store_u8 sees to both, the first of which `max` is
// for where a vector is stored alone.
ALBERT_INLINE F quantize(F x, const RowScale& row) {
  return fma(x, set(row.inverse), set(static_cast<float>(row.zero)));
}

template <class Source>
inline void quantize_row(const Source* x, int64_t k, const RowScale& row, uint8_t* out) {
  int64_t j = 0;
  const auto at = [&](int64_t i) { return quantize(load(x + i), row); };
  for (; j + 4 * kLanes <= k; j += 4 * kLanes)
    store_u8(out + j, to_int(at(j)), to_int(at(j + kLanes)), to_int(at(j + 2 * kLanes)), to_int(at(j + 3 * kLanes)));
  for (; j + kLanes <= k; j += kLanes) store_u8(out + j, to_int(max(zero(), at(j))));
  if (j < k) {
    alignas(64) uint8_t part[kLanes];
    store_u8(part, to_int(max(zero(), quantize(load(x + j, static_cast<int>(k - j)), row))));
    for (int i = 0; j + i < k; ++i) out[j + i] = part[i];
  }
}

}  // namespace albert::ALBERT_ISA
