// exp, tanh, erf and the activations, a vector at a time. Largest errors found by `gemm_test math`, which sweeps all of
// float32 against double precision, for either instruction set:
//   exp 1.2 ulp, tanh 1.5 ulp, erf 2.4 ulp
//   gelu 1.2e-7 of max(1, |gelu|) and 10 ulp down to x = -3 (the last bits of x^2 count in the tail: 130 ulp at -10)
//   derivatives of gelu 3e-7 of max(1, |value|)
// The polynomials are minimax fits in relative error.
#pragma once
#include "vec.h"

namespace albert::ALBERT_ISA {

ALBERT_INLINE F horner(F, float c0) { return set(c0); }
// c0 + c1 x + c2 x^2 + ...
template <class... Rest>
ALBERT_INLINE F horner(F x, float c0, float c1, Rest... rest) { return fma(x, horner(x, c1, rest...), set(c0)); }

// Keeps NaN: min and max return their second operand where one is NaN.
ALBERT_INLINE F clamp(F x, float low, float high) { return min(set(high), max(set(low), x)); }

// 2^t, |t| <= 150. Reduction by subtraction is exact.
ALBERT_INLINE F exp2(F t) {
  const F n = round(t), f = sub(t, n);
  const F q = horner(f, 0.6931472028551167f, 0.2402264791362172f, 0.055503324710466845f, 0.009618437358143075f,
                     0.0013398874439226839f, 0.0001535336184327583f);
  return scale(fma(f, q, set(1.0f)), n);
}

#ifdef __AVX512F__
// t, |t| <= 126, becomes what is left of it beside the nearest 32nd, and power 2 to that: picked from registers, where its
// bits lie less those that the 32nds add to the exponent. All vectors at each step, so that few instructions wait for
// the one before.
template <int n>
ALBERT_INLINE void split_power(F (&t)[n], F (&power)[n]) {
  alignas(64) static constexpr int bits_of[2 * kLanes] = {
      0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
      0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
      0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
      0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
  const F magic = set(0x1.8p18f);  // added to a small number: its lowest bits are the nearest 32nd
  I shifted[n];
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) shifted[i] = bits(add(t[i], magic));
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) t[i] = sub(t[i], sub(from_bits(shifted[i]), magic));
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i)
    power[i] = from_bits(add(select_of_pair(bits_of, shifted[i]), shift_left<18>(shifted[i])));
}
// t becomes 2^t, |t| <= 126, with half the work of exp2.
template <int n>
ALBERT_INLINE void exp2_normal(F (&t)[n]) {
  F power[n];
  split_power(t, power);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i)
    t[i] = fma(mul(power[i], t[i]), horner(t[i], 0.693147182f, 0.240228191f, 0.0555031784f), power[i]);
}
#else
template <int n>
ALBERT_INLINE void exp2_normal(F (&t)[n]) {
  for (F& each : t) each = exp2(each);
}
#endif
ALBERT_INLINE F exp2_normal(F t) {
  F all[1] = {t};
  exp2_normal(all);
  return all[0];
}

ALBERT_INLINE F exp(F x) {
  x = clamp(x, -104.0f, 89.0f);  // beyond: 0 and infinity
  const F n = round(mul(x, set(1.44269504f)));
  // ln 2 in two parts, the first short enough that n times it is exact.
  const F r = fnma(n, set(1.42860677e-6f), fnma(n, set(0.693145752f), x));
  const F q = horner(r, 0.49999993451695257f, 0.16666520689789915f, 0.04166838736391033f, 0.008368709828143714f,
                     0.0013814613130987516f);
  return scale(fma(mul(r, r), q, add(r, set(1.0f))), n);
}

ALBERT_INLINE F tanh(F x) {
  const F a = abs(x), square = mul(x, x);
  const F small = fma(mul(x, square),
                      horner(square, -0.33333281942041315f, 0.13331442198913274f, -0.05373971514582977f,
                             0.020639087439194962f, -0.005704987210581331f), x);
  const F e = exp2(mul(clamp(a, 0.0f, 20.0f), set(2.88539008f)));
  const F large = sub(set(1.0f), div(set(2.0f), add(e, set(1.0f))));
  return less(a, set(0.625f), small, sign_of(large, x));
}

// exp(-z^2), and erfc(z) for z >= 0: the Gaussian times a polynomial in 1 / (1 + 0.3 z), fitted up to z = 10.
struct Gauss {
  F density, upper_tail;
};
ALBERT_INLINE Gauss gauss(F z, F square) {
  const F t = div(set(1.0f), fma(z, set(0.3f), set(1.0f)));
  const F p = horner(t, 0.16918800633738562f, 0.17071520776321872f, 0.1483393082943504f, 0.21492551417789796f,
                     -0.09464943785817248f, 0.5477181504166749f, -0.512276435652458f, 0.48556240513293925f,
                     -0.129522738196169f);
  const F density = exp2(max(set(-150.0f), mul(square, set(-1.44269504f))));
  return {density, mul(density, mul(t, p))};
}
// With z = |x| sqrt(1/2): twice the normal distribution's tail.
ALBERT_INLINE Gauss normal(F x) { return gauss(mul(abs(x), set(0.707106781f)), mul(x, mul(x, set(0.5f)))); }

ALBERT_INLINE F erf(F x) {
  const F square = mul(x, x);
  const F small = mul(x, horner(square, 1.1283791651f, -0.37612625826f, 0.112835851654f, -0.0268538125f,
                                0.00518832862f, -0.0008010201f, 0.00007853884f));
  const F large = sub(set(1.0f), gauss(abs(x), square).upper_tail);
  return less(abs(x), set(1.0f), small, sign_of(large, x));
}

// x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is the tanh form without its cancellation at x << 0.
ALBERT_INLINE F gelu_tanh_exponential(F x) {  // exp(-2u)
  return exp2(clamp(mul(x, fma(mul(x, x), set(-0.102943240f), set(-2.30220819f))), -150.0f, 150.0f));
}
ALBERT_INLINE F gelu_tanh(F x) { return div(x, add(set(1.0f), gelu_tanh_exponential(x))); }
// For what was computed from 8 bits and will be rounded to them again: to 1e-4, and around 0 to 1e-4 of itself.
#ifdef __AVX512F__
// max(0, x) less one of sixteen parabolas in |x|; from 4.13 on nothing is taken off.
ALBERT_INLINE F gelu_tanh_short(F x) {
  alignas(64) static constexpr float c0[kLanes] = {
      0.0f, 0.000823114358f, 0.013408863f, 0.057921119f, 0.143497884f, 0.255123496f, 0.359219253f, 0.422043979f,
      0.426415831f, 0.377049685f, 0.294521153f, 0.20397839f, 0.125228509f, 0.0679576099f, 0.0324513838f,
      -0.054813046f};
  alignas(64) static constexpr float c1[kLanes] = {
      0.5f, 0.490417838f, 0.429586411f, 0.296981186f, 0.113406494f, -0.0735628977f, -0.216663286f, -0.290138811f,
      -0.295149833f, -0.251879156f, -0.186760187f, -0.121988572f, -0.070494689f, -0.0360156856f, -0.0162116252f,
      0.0278271902f};
  alignas(64) static constexpr float c2[kLanes] = {
      -0.398063481f, -0.369945943f, -0.295856684f, -0.196777582f, -0.0981638581f, -0.0197938122f, 0.0294170622f,
      0.0509071462f, 0.0523204766f, 0.0428363606f, 0.029987976f, 0.0184019115f, 0.00998278894f, 0.00479276618f,
      0.00203099265f, -0.00352427759f};
  const F a = min(set(4.13f), abs(x));  // keeps NaN
  const I which = bits(fma(a, set(3.75f), set(0x1.8p23f)));  // the lowest bits are the nearest integer
  const F tail = fma(a, fma(a, select(c2, which), select(c1, which)), select(c0, which));
  return sub(max(zero(), x), tail);
}
#else
// 2^t to 3e-6 of itself.
ALBERT_INLINE F exp2_short(F t) {
  const F n = round(t), f = sub(t, n);
  const F q = horner(f, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f, 0.009582853876054287f);
  return scale(fma(f, q, set(1.0f)), n);
}
ALBERT_INLINE F gelu_tanh_short(F x) {
  const F u = mul(x, fma(mul(x, x), set(-0.102943240f), set(-2.30220819f)));
  return div(x, add(set(1.0f), exp2_short(clamp(u, -100.0f, 100.0f))));
}
#endif
// For what will be rounded to bfloat16: to 5e-7, and to 1.3e-3 of itself down to x = -5.4.
#ifdef __AVX512F__
// max(0, x) less one of 32 cubics in |x|; from 5.5 on, 6e-9 is taken off.
ALBERT_INLINE F gelu_tanh_bf16(F x) {
  alignas(64) static constexpr float c0[2 * kLanes] = {
      0.0f, 0.076217331f, 0.128227219f, 0.158247635f, 0.169636667f, 0.166455522f, 0.152983665f, 0.133271217f,
      0.110796005f, 0.0882607102f, 0.0675316602f, 0.0496946312f, 0.0351882093f, 0.023973627f, 0.0157063846f,
      0.0098858783f, 0.00597044453f, 0.00345460256f, 0.0019118404f, 0.00101009617f, 0.000508482568f,
      0.000243387607f, 0.000110537148f, 4.75294801e-05f, 1.93065534e-05f, 7.39202187e-06f, 2.66170059e-06f,
      8.99302222e-07f, 2.84452227e-07f, 8.40372039e-08f, 2.31360442e-08f, 5.92715788e-09f};
  alignas(64) static constexpr float c1[2 * kLanes] = {
      0.5f, 0.359922141f, 0.228484288f, 0.113124169f, 0.0191226788f, -0.0509201176f, -0.0971073732f, -0.12181972f,
      -0.12899293f, -0.123293877f, -0.109372072f, -0.0913041756f, -0.0722754747f, -0.0544811711f, -0.0391942225f,
      -0.0269347522f, -0.0176816005f, -0.0110807847f, -0.00662187301f, -0.00376814767f, -0.00203836942f,
      -0.00104626862f, -0.000508574303f, -0.000233628642f, -0.000101214384f, -4.12637564e-05f, -1.57963932e-05f,
      -5.66567496e-06f, -1.89969285e-06f, -5.94127471e-07f, -1.72926221e-07f, -4.69347405e-08f};
  alignas(64) static constexpr float c2[2 * kLanes] = {
      -0.399251401f, -0.385984898f, -0.350436151f, -0.296651185f, -0.23164849f, -0.163218781f, -0.0985403731f,
      -0.0430959612f, -0.000108934066f, 0.0294760652f, 0.0465847664f, 0.0533782877f, 0.0525890104f, 0.0469667427f,
      0.0389004573f, 0.0302202888f, 0.0221495852f, 0.0153604988f, 0.0100902673f, 0.00627860054f, 0.00369812525f,
      0.00205945456f, 0.00108276482f, 0.000536534993f, 0.000250123703f, 0.000109489927f, 4.49155232e-05f,
      1.72321943e-05f, 6.17033356e-06f, 2.05773472e-06f, 6.37764913e-07f, 1.68179724e-07f};
  alignas(64) static constexpr float c3[2 * kLanes] = {
      0.00929955766f, 0.0461695492f, 0.0858854055f, 0.114028968f, 0.127801314f, 0.127102152f, 0.114240892f,
      0.0931118205f, 0.0681405962f, 0.043330688f, 0.0216376986f, 0.00474119466f, -0.00685568992f, -0.013535114f,
      -0.0162147656f, -0.0160300862f, -0.0140948752f, -0.0113476589f, -0.00847820751f, -0.00591715379f,
      -0.00386975426f, -0.00237427838f, -0.00136673544f, -0.000737683324f, -0.000372930343f, -0.000176349291f,
      -7.78825124e-05f, -3.2069991e-05f, -1.22907604e-05f, -4.37596736e-06f, -1.44461546e-06f, -5.86580995e-07f};
  const auto pick = [](const float* table, I index) {
    return from_bits(select_of_pair(reinterpret_cast<const int*>(table), index));
  };
  const F a = min(set(5.5f), abs(x)), magic = set(0x1.8p23f);  // keeps NaN
  const F shifted = fma(a, set(31 / 5.5f), magic), from = fnma(sub(shifted, magic), set(5.5f / 31), a);
  const I which = bits(shifted);  // the lowest bits are the nearest integer
  const F tail = fma(from, fma(from, fma(from, pick(c3, which), pick(c2, which)), pick(c1, which)), pick(c0, which));
  return fma(min(zero(), x), zero(), sub(max(zero(), x), tail));  // minus infinity becomes NaN, as in torch
}
#else
ALBERT_INLINE F gelu_tanh_bf16(F x) { return gelu_tanh(x); }
#endif
ALBERT_INLINE F gelu_tanh_gradient(F x) {
  x = clamp(x, -10.0f, 30.0f);  // 0 and 1 beyond, and no overflow
  const F e = gelu_tanh_exponential(x), s = div(set(1.0f), add(set(1.0f), e));
  const F slope = mul(x, fma(mul(x, x), set(0.214064430f), set(1.59576912f)));  // 2 x u'
  return fma(mul(s, mul(e, s)), slope, s);  // e s = 1 - s
}

// x * Phi(x), from the smaller tail.
ALBERT_INLINE F gelu_erf(F x) {
  const F bounded = clamp(x, -14.0f, 14.0f);
  const F tail = mul(mul(bounded, set(0.5f)), normal(bounded).upper_tail);
  return less(x, zero(), tail, sub(x, tail));
}
ALBERT_INLINE F gelu_erf_gradient(F x) {
  x = clamp(x, -14.0f, 14.0f);
  const Gauss g = normal(x);
  const F tail = mul(set(0.5f), g.upper_tail), cdf = less(x, zero(), tail, sub(set(1.0f), tail));
  return fma(mul(x, set(0.398942280f)), g.density, cdf);
}

}  // namespace albert::ALBERT_ISA
