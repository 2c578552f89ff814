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
  F low[2] = {zero(), zero()}, high[2] = {zero(), zero()}, poison[2] = {zero(), zero()};
  int64_t j = 0;
  for (; j + 2 * kLanes <= k; j += 2 * kLanes)
    for (int i = 0; i < 2; ++i) {
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
  const float lowest = min(min(low[0], low[1])), highest = max(max(high[0], high[1]));
  const float scale = (highest - lowest) / 255.0f;
  // A row of zeros, or one too small to divide by: everything becomes the zero point.
  const float inverse = scale > 1e-36f ? 1.0f / scale : 0.0f;
  return {scale + sum(add(poison[0], poison[1])), inverse, static_cast<int>(-lowest * inverse + 0.5f)};
}

ALBERT_INLINE I quantize(F x, const RowScale& row) {
  // Clamped as a float: a NaN becomes 255, not an integer out of range.
  const F q = fma(x, set(row.inverse), set(static_cast<float>(row.zero)));
  return to_int(max(zero(), min(q, set(255.0f))));
}

template <class Source>
inline void quantize_row(const Source* x, int64_t k, const RowScale& row, uint8_t* out) {
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) store_u8(out + j, quantize(load(x + j), row));
  if (j < k) {
    alignas(64) uint8_t part[kLanes];
    store_u8(part, quantize(load(x + j, static_cast<int>(k - j)), row));
    for (int i = 0; j + i < k; ++i) out[j + i] = part[i];
  }
}

}  // namespace albert::ALBERT_ISA
