// Philox-4x32-10 (Salmon et al., SC11), a vector of counters at a time, and the dropout that it decides: the same bits
// as albert_fast/ops/dropout.py. Compiled once per instruction set.
#pragma once
#include "vec.h"

namespace albert::ALBERT_ISA {

// 64-bit lanes. Only the lower half of each counts, except where a product's upper half is asked for.
#ifdef __AVX512F__
ALBERT_INLINE I wide_product(I a, I b) { return _mm512_mul_epu32(a, b); }
ALBERT_INLINE I upper(I a) { return _mm512_srli_epi64(a, 32); }
ALBERT_INLINE I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
ALBERT_INLINE I join(I even, I odd) { return _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32)); }
ALBERT_INLINE I low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
ALBERT_INLINE I high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
ALBERT_INLINE I low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
ALBERT_INLINE I high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
// x where the word, unsigned, is below the threshold, and 0 elsewhere.
ALBERT_INLINE F keep_below(F x, I word, uint32_t threshold) {
  return _mm512_maskz_mov_ps(_mm512_cmplt_epu32_mask(word, set(static_cast<int>(threshold))), x);
}
#else
ALBERT_INLINE I wide_product(I a, I b) { return _mm256_mul_epu32(a, b); }
ALBERT_INLINE I upper(I a) { return _mm256_srli_epi64(a, 32); }
ALBERT_INLINE I xor3(I a, I b, I c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
ALBERT_INLINE I join(I even, I odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
ALBERT_INLINE I low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
ALBERT_INLINE I high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
ALBERT_INLINE I low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
ALBERT_INLINE I high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
ALBERT_INLINE F keep_below(F x, I word, uint32_t threshold) {
  const I sign = set(static_cast<int>(0x80000000u));  // AVX2 compares signed integers only
  const I below = _mm256_cmpgt_epi32(set(static_cast<int>(threshold ^ 0x80000000u)), _mm256_xor_si256(word, sign));
  return _mm256_and_ps(x, from_bits(below));
}
#endif

// The ten rounds for the counters in the lower halves of the 64-bit lanes; so lie the results.
ALBERT_INLINE void philox_rounds(uint32_t key0, uint32_t key1, I c[4]) {
  const I multiplier0 = set(static_cast<int>(0xD2511F53u)), multiplier1 = set(static_cast<int>(0xCD9E8D57u));
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const I product0 = wide_product(c[0], multiplier0), product2 = wide_product(c[2], multiplier1);
    c[0] = xor3(upper(product2), c[1], set(static_cast<int>(key0)));
    c[1] = product2;
    c[2] = xor3(upper(product0), c[3], set(static_cast<int>(key1)));
    c[3] = product0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// out[w], lane i: integer w of the counter that stands in lane i of c0 to c3.
ALBERT_INLINE void philox4(uint32_t key0, uint32_t key1, I c0, I c1, I c2, I c3, I out[4]) {
  I even[4] = {c0, c1, c2, c3}, odd[4] = {upper(c0), upper(c1), upper(c2), upper(c3)};
  philox_rounds(key0, key1, even);
  philox_rounds(key0, key1, odd);
  for (int w = 0; w < 4; ++w) out[w] = join(even[w], odd[w]);
}

// What a dropout needs to know to draw its words.
struct Dropout {
  uint32_t key0, key1, site;
  uint32_t threshold;  // an element is kept where its word is below

  // Columns first to first + 4 * kLanes of the element (outer, inner), first a multiple of 4. Lane i of words[v]
  // belongs to column first + v * kLanes + i. Lane 4q + j takes group (kLanes / 4) * j + q: then a transposition of
  // 4 x 4 words within each 128 bits, which is what AVX has, leaves the columns in order.
  ALBERT_INLINE void words(uint32_t outer, uint32_t inner, uint32_t first, I words[4]) const {
    alignas(64) int group[kLanes];
    for (int i = 0; i < kLanes; ++i) group[i] = kLanes / 4 * (i % 4) + i / 4;
    draw(outer, set(static_cast<int>(inner)), add(load(group), set(static_cast<int>(first / 4))), words);
  }

  // The same for 2 * kLanes columns of the elements inner (words 0 and 1) and inner + 1 (words 2 and 3).
  ALBERT_INLINE void words_of_two(uint32_t outer, uint32_t inner, uint32_t first, I words[4]) const {
    alignas(64) int group[kLanes], second[kLanes];
    for (int i = 0; i < kLanes; ++i) group[i] = kLanes / 4 * (i % 2) + i / 4;
    for (int i = 0; i < kLanes; ++i) second[i] = i % 4 / 2;
    draw(outer, add(load(second), set(static_cast<int>(inner))), add(load(group), set(static_cast<int>(first / 4))),
         words);
  }

 private:
  ALBERT_INLINE void draw(uint32_t outer, I inner, I group, I words[4]) const {
    I w[4];
    philox4(key0, key1, set(static_cast<int>(site)), set(static_cast<int>(outer)), inner, group, w);
    const I a = low32(w[0], w[1]), b = low32(w[2], w[3]), c = high32(w[0], w[1]), d = high32(w[2], w[3]);
    words[0] = low64(a, b);
    words[1] = high64(a, b);
    words[2] = low64(c, d);
    words[3] = high64(c, d);
  }
};

}  // namespace albert::ALBERT_ISA
