// Transposition of a block of 4-byte elements in registers. Compiled once per instruction set.
#pragma once
#include "vec.h"

namespace albert::ALBERT_ISA {

// to[j][i] = from[i][j] for kLanes x kLanes elements.
#ifdef __AVX512F__
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  F t[16], r[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    const F a = load(from + i * from_stride), b = load(from + (i + 1) * from_stride);
    t[i] = _mm512_unpacklo_ps(a, b);
    t[i + 1] = _mm512_unpackhi_ps(a, b);
  }
  const auto low = [](F a, F b) { return from_bits(_mm512_unpacklo_epi64(bits(a), bits(b))); };
  const auto high = [](F a, F b) { return from_bits(_mm512_unpackhi_epi64(bits(a), bits(b))); };
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + j], quarter q: column 4q + j of rows i to i + 3
    r[i] = low(t[i], t[i + 2]);
    r[i + 1] = high(t[i], t[i + 2]);
    r[i + 2] = low(t[i + 1], t[i + 3]);
    r[i + 3] = high(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const F a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const F c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    store(to + j * to_stride, _mm512_shuffle_f32x4(a, b, 0x88));
    store(to + (4 + j) * to_stride, _mm512_shuffle_f32x4(c, d, 0x88));
    store(to + (8 + j) * to_stride, _mm512_shuffle_f32x4(a, b, 0xdd));
    store(to + (12 + j) * to_stride, _mm512_shuffle_f32x4(c, d, 0xdd));
  }
}
#else
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  F t[8], r[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    const F a = load(from + i * from_stride), b = load(from + (i + 1) * from_stride);
    t[i] = _mm256_unpacklo_ps(a, b);
    t[i + 1] = _mm256_unpackhi_ps(a, b);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // r[i + j], half q: column 4q + j of rows i to i + 3
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    store(to + j * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x20));
    store(to + (4 + j) * to_stride, _mm256_permute2f128_ps(r[j], r[4 + j], 0x31));
  }
}
#endif

// One element for each of kLanes vectors: the reduction of its lanes by op.
template <class Op>
ALBERT_INLINE F across(const float* vectors, Op op) {
  alignas(64) float turned[kLanes * kLanes];
  transpose(vectors, kLanes, turned, kLanes);
  F result = load(turned);
  for (int i = 1; i < kLanes; ++i) result = op(result, load(turned + i * kLanes));
  return result;
}

}  // namespace albert::ALBERT_ISA
