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

// The same to 3e-6 of itself.
ALBERT_INLINE F exp2_short(F t) {
  const F n = round(t), f = sub(t, n);
  const F q = horner(f, 0.6931241750717163f, 0.24024099111557007f, 0.055906426161527634f, 0.009582853876054287f);
  return scale(fma(f, q, set(1.0f)), n);
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
// To 1e-4 of itself, for what was computed from 8 bits and will be rounded to them again.
ALBERT_INLINE F gelu_tanh_short(F x) {
  const F u = mul(x, fma(mul(x, x), set(-0.102943240f), set(-2.30220819f)));
  return mul(x, reciprocal_short(add(set(1.0f), exp2_short(clamp(u, -100.0f, 100.0f)))));
}
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
