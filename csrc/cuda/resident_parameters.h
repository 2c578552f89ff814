// The layer's parameters, as the resident encoder reads them when it begins.
#pragma once
#include "resident_block.h"

namespace albert {

// Places among a layer's parameters.
enum { kQuery = 0, kKey = 2, kValue = 4, kDenseWeight = 6, kAttentionNorm = 8, kFfnWeight = 10, kFfnOutputWeight = 12,
       kNorm = 14 };

template <class T>
struct Parameters {
  const Arguments<T>& args;
  const int hidden, inner;

  // Where row `row` of a matrix [out][in] lies, of query, key and value one after the other for kQkv: the place of its
  // weight among the parameters; row becomes one of that weight.
  ALBERT_DEVICE int weight_of(int matrix, int& row) const {
    constexpr int kPlaces[kMatrices] = {kQuery, kDenseWeight, kFfnWeight, kFfnOutputWeight};
    if (matrix != kQkv) return matrix == kDense ? kPlaces[1] : matrix == kFfn ? kPlaces[2] : kPlaces[3];
    const int part = (row >= hidden) + (row >= 2 * hidden);
    row -= part * hidden;
    return part == 0 ? kQuery : part == 1 ? kKey : kValue;
  }
  ALBERT_DEVICE float value(int which, int i) const {
    const void* p = args.parameters[which];
    return args.float_parameters ? static_cast<const float*>(p)[i] : to_float(static_cast<const T*>(p)[i]);
  }
  // Of a matrix's columns of its product: the bias; weight and bias of the residual's LayerNorm.
  ALBERT_DEVICE float vector(int matrix, int which, int column) const {
    if (which > 0) return value((matrix == kDense ? kNorm : kAttentionNorm) + which - 1, column);
    const int weight = weight_of(matrix, column);
    return value(weight + 1, column);
  }

  // Eight elements of a matrix's row into shared memory, as T; there once wait_copies() and a barrier are over.
  ALBERT_DEVICE void bring(char* to, int matrix, int row, int input) const {
    const void* weight = args.parameters[weight_of(matrix, row)];
    const long at = static_cast<long>(row) * (matrix == kFfnOutput ? inner : hidden) + input;
    if (!args.float_parameters) return copy_async(to, static_cast<const T*>(weight) + at);
    Eight y;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Eight x = load_constant(static_cast<const float*>(weight) + at + 4 * half);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        y.pair[2 * half + i] = pack_pair(float_of(x.pair[2 * i]), float_of(x.pair[2 * i + 1]), T{});
    }
    *reinterpret_cast<Eight*>(to) = y;
  }
};

// Eight of a weight with the LayerNorm before it, whose weight and bias are given; adds to u and c (see
// resident_encoder.cu).
template <class T>
ALBERT_DEVICE Eight folded_weight(Eight w, const float (&weight)[8], const float (&bias)[8], float& u, float& c) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float first = low<T>(w.pair[i]), second = high<T>(w.pair[i]);
    c += first * bias[2 * i] + second * bias[2 * i + 1];
    w.pair[i] = pack_pair(first * weight[2 * i], second * weight[2 * i + 1], T{});
    u += low<T>(w.pair[i]) + high<T>(w.pair[i]);
  }
  return w;
}

// Of a row its sequence, none beyond the last; offsets that are no offsets are brought into the tokens' range.
template <class T>
ALBERT_DEVICE Sequence sequence_of(const Arguments<T>& args, int row) {
  const auto offset = [&](int i) {
    const int x = args.cu_seqlens[i];
    return x < 0 ? 0 : x > args.tokens ? args.tokens : x;
  };
  Sequence s{0, 0};
  for (int i = 0; i < args.batch && row < args.tokens; ++i)
    if (offset(i) <= row && row < offset(i + 1)) s = {static_cast<uint8_t>(offset(i)), static_cast<uint8_t>(offset(i + 1))};
  return s;
}

}  // namespace albert
