// One vector register of float32 or int32, the same names for AVX-512 (16 lanes) and AVX2 (8 lanes).
// Functions that take n touch the first n lanes' memory only, 0 < n < kLanes. Compiled once per instruction set (isa.h).
#pragma once
#if __GNUC__ == 12 && !defined(__clang__) && !defined(__AVX512F__)
// GCC's immintrin.h reads 2 MB for AVX-512 whatever it compiles for, which takes most of a second in every file: these
// are the parts of it that count here. Only for the version that this was tried with: the parts are GCC's own affair.
#define _IMMINTRIN_H_INCLUDED
#include <smmintrin.h>
// Each relies on those above it.
#include <avxintrin.h>
#include <avx2intrin.h>
#include <fmaintrin.h>
#elif defined(__GNUC__) && !defined(__clang__)
// GCC 12's own header starts from registers left undefined on purpose, and warns of it.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif

#include <cstdint>

#ifndef ALBERT_ISA
#error "compile with -DALBERT_ISA=avx2|avx512|..., see isa.h"
#endif

#define ALBERT_INLINE inline __attribute__((always_inline))

namespace albert::ALBERT_ISA {

// Asks for a line as its only owner. GCC's own prefetch for writing reads it, if it may not take this instruction for
// granted, and the first write to a line that another core has read waits for that core.
ALBERT_INLINE void prefetch_to_write(const void* p) { asm volatile("prefetchw %0" ::"m"(*static_cast<const char*>(p))); }

using bf16 = uint16_t;  // the upper half of a float32

#ifdef __AVX512F__

constexpr int kLanes = 16;
using F = __m512;
using I = __m512i;

ALBERT_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

ALBERT_INLINE F zero() { return _mm512_setzero_ps(); }
ALBERT_INLINE F set(float x) { return _mm512_set1_ps(x); }
ALBERT_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
ALBERT_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
ALBERT_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
ALBERT_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }

ALBERT_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
ALBERT_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
ALBERT_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
ALBERT_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
ALBERT_INLINE F select(const float* table, I index) {  // of kLanes numbers; the lowest bits count
  return _mm512_permutexvar_ps(index, load(table));
}
ALBERT_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a*b + c
ALBERT_INLINE F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a*b
ALBERT_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }  // b where either is NaN, as max
ALBERT_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
ALBERT_INLINE F abs(F a) { return _mm512_abs_ps(a); }
ALBERT_INLINE F sign_of(F magnitude, F sign) {
  return _mm512_or_ps(_mm512_andnot_ps(set(-0.0f), magnitude), _mm512_and_ps(set(-0.0f), sign));
}
ALBERT_INLINE F less(F a, F b, F yes, F no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
ALBERT_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
ALBERT_INLINE float min(F a) { return _mm512_reduce_min_ps(a); }
ALBERT_INLINE float max(F a) { return _mm512_reduce_max_ps(a); }
ALBERT_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
ALBERT_INLINE F scale(F a, F exponent) { return _mm512_scalef_ps(a, exponent); }  // a * 2^exponent, |exponent| <= 252

ALBERT_INLINE I set(int x) { return _mm512_set1_epi32(x); }
ALBERT_INLINE I load(const int* p) { return _mm512_loadu_si512(p); }
ALBERT_INLINE void store(int* p, I x) { _mm512_storeu_si512(p, x); }
ALBERT_INLINE I add(I a, I b) { return _mm512_add_epi32(a, b); }
ALBERT_INLINE I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
ALBERT_INLINE I mul(I a, I b) { return _mm512_mullo_epi32(a, b); }
ALBERT_INLINE I max(I a, I b) { return _mm512_max_epi32(a, b); }
ALBERT_INLINE I select_of_pair(const int* table, I index) {  // of 2 kLanes numbers; the lowest bits count
  return _mm512_permutex2var_epi32(load(table), index, load(table + kLanes));
}
template <int count>
ALBERT_INLINE I shift_left(I a) { return _mm512_slli_epi32(a, count); }
ALBERT_INLINE I exclusive_or(I a, I b) { return _mm512_xor_si512(a, b); }
ALBERT_INLINE I madd16(I a, I b) { return _mm512_madd_epi16(a, b); }
ALBERT_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
ALBERT_INLINE I to_int(F a) { return _mm512_cvtps_epi32(a); }  // to nearest even
ALBERT_INLINE I bits(F a) { return _mm512_castps_si512(a); }
ALBERT_INLINE F from_bits(I a) { return _mm512_castsi512_ps(a); }

ALBERT_INLINE F widen(__m256i x) { return from_bits(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
ALBERT_INLINE F load(const bf16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
ALBERT_INLINE F load(const bf16* p, int n) { return widen(_mm256_maskz_loadu_epi16(first(n), p)); }

// The upper halves are x in bfloat16, rounded to nearest even. A NaN stays one: its upper half gets the quiet bit.
ALBERT_INLINE I round_bf16(F x) {
  const I i = bits(x);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), set(1));
  const I rounded = add(add(i, set(0x7fff)), odd);
  return _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), i, set(0x400000));
}
ALBERT_INLINE __m256i narrow(F x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16(x), 16)); }
// Lane by lane, a in the lower half and b in the upper: both exact bfloat16 values.
ALBERT_INLINE F interleave(F a, F b) {
  return from_bits(_mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(bits(a), 16), bits(b)));
}
ALBERT_INLINE void store(bf16* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
ALBERT_INLINE void store(bf16* p, F x, int n) { _mm256_mask_storeu_epi16(p, first(n), narrow(x)); }
// a, then b.
ALBERT_INLINE void store_pair(bf16* p, F a, F b) {
  alignas(64) static constexpr int16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(round_bf16(a), _mm512_load_si512(upper), round_bf16(b)));
}
// Values beyond 255 become 255; none is negative, but what came from a NaN.
ALBERT_INLINE void store_u8(uint8_t* p, I x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(x));
}
// Of four vectors that were packed to bytes within 128 bits.
ALBERT_INLINE I in_order(I bytes) {
  const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, bytes);
}
// Four vectors, one after the other: below 0 becomes 0, beyond 255 255.
ALBERT_INLINE void store_u8(uint8_t* p, I a, I b, I c, I d) {
  _mm512_storeu_si512(p, in_order(_mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d))));
}
// Four vectors of numbers in [-128, 127], as bytes one after the other.
ALBERT_INLINE I to_bytes(I a, I b, I c, I d) {
  return in_order(_mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}
// The lowest bits of each lane.
ALBERT_INLINE void store_low16(void* p, I x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
// Lane by lane, the lowest 16 bits of a, then those of b.
ALBERT_INLINE I interleave_low16(I a, I b) { return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16)); }

#else

constexpr int kLanes = 8;
using F = __m256;
using I = __m256i;

ALBERT_INLINE I first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ALBERT_INLINE F zero() { return _mm256_setzero_ps(); }
ALBERT_INLINE F set(float x) { return _mm256_set1_ps(x); }
ALBERT_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
ALBERT_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, first(n)); }
ALBERT_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
ALBERT_INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, first(n), x); }

ALBERT_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
ALBERT_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
ALBERT_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
ALBERT_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
ALBERT_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
ALBERT_INLINE F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
ALBERT_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
ALBERT_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
ALBERT_INLINE F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
ALBERT_INLINE F sign_of(F magnitude, F sign) {
  return _mm256_or_ps(abs(magnitude), _mm256_and_ps(set(-0.0f), sign));
}
ALBERT_INLINE F less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
template <class Op>
ALBERT_INLINE float reduce(F a, Op op) {
  const F half = op(a, _mm256_permute2f128_ps(a, a, 1));
  const F quarter = op(half, _mm256_permute_ps(half, 0x4e));
  return _mm256_cvtss_f32(op(quarter, _mm256_permute_ps(quarter, 0xb1)));
}
ALBERT_INLINE float sum(F a) { return reduce(a, [](F x, F y) { return add(x, y); }); }
ALBERT_INLINE float min(F a) { return reduce(a, [](F x, F y) { return min(x, y); }); }
ALBERT_INLINE float max(F a) { return reduce(a, [](F x, F y) { return max(x, y); }); }
ALBERT_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

ALBERT_INLINE I set(int x) { return _mm256_set1_epi32(x); }
ALBERT_INLINE I load(const int* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
ALBERT_INLINE void store(int* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
ALBERT_INLINE I add(I a, I b) { return _mm256_add_epi32(a, b); }
ALBERT_INLINE I sub(I a, I b) { return _mm256_sub_epi32(a, b); }
ALBERT_INLINE I mul(I a, I b) { return _mm256_mullo_epi32(a, b); }
ALBERT_INLINE I madd16(I a, I b) { return _mm256_madd_epi16(a, b); }
ALBERT_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
ALBERT_INLINE I to_int(F a) { return _mm256_cvtps_epi32(a); }
ALBERT_INLINE I bits(F a) { return _mm256_castps_si256(a); }
ALBERT_INLINE F from_bits(I a) { return _mm256_castsi256_ps(a); }

// In two halves, so that neither factor leaves the range of normal numbers before the product does.
ALBERT_INLINE F scale(F a, F exponent) {
  const I e = to_int(exponent), half = _mm256_srai_epi32(e, 1), rest = sub(e, half);
  const auto power = [](I x) { return from_bits(_mm256_slli_epi32(add(x, set(127)), 23)); };
  return mul(mul(a, power(half)), power(rest));
}

ALBERT_INLINE F widen(__m128i x) { return from_bits(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
ALBERT_INLINE F load(const bf16* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
ALBERT_INLINE F load(const bf16* p, int n) {
  alignas(16) bf16 part[kLanes] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
ALBERT_INLINE __m128i narrow(F x) {
  const I i = bits(x);
  const I odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), set(1));
  const I rounded = add(add(i, set(0x7fff)), odd);
  const I quiet = _mm256_or_si256(i, set(0x400000));
  const I chosen = _mm256_blendv_epi8(rounded, quiet, bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  const I packed = _mm256_packus_epi32(_mm256_srli_epi32(chosen, 16), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
ALBERT_INLINE F interleave(F a, F b) {
  return from_bits(_mm256_blend_epi16(_mm256_srli_epi32(bits(a), 16), bits(b), 0xaa));
}
ALBERT_INLINE void store(bf16* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x)); }
ALBERT_INLINE void store(bf16* p, F x, int n) {
  alignas(16) bf16 part[kLanes];
  store(part, x);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}
ALBERT_INLINE void store_pair(bf16* p, F a, F b) {
  store(p, a);
  store(p + kLanes, b);
}
ALBERT_INLINE void store_u8(uint8_t* p, I x) {
  const I words = _mm256_packus_epi32(x, x), bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
}
ALBERT_INLINE void store_u8(uint8_t* p, I a, I b, I c, I d) {
  const I bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  store(reinterpret_cast<int*>(p), _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}

#endif

ALBERT_INLINE void store_pair(float* p, F a, F b) {
  store(p, a);
  store(p + kLanes, b);
}

}  // namespace albert::ALBERT_ISA
