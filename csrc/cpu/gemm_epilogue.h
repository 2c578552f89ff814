// What happens to a tile between the micro-kernel and y, while it lies in L1: a few passes over [rows][kPanel] float32.
// Compiled once per instruction set.
#pragma once
#include "gemm.h"
#include "gemm_micro.h"
#include "vec_math.h"

namespace albert::ALBERT_ISA {

// Columns past the matrix's edge read as zero and are not written.
template <class T>
ALBERT_INLINE F load_columns(const T* p, int n) {
  return n >= kLanes ? load(p) : n > 0 ? load(p, n) : zero();
}
template <class T>
ALBERT_INLINE void store_columns(T* p, F x, int n) {
  if (n >= kLanes)
    store(p, x);
  else if (n > 0)
    store(p, x, n);
}

inline void add_bias(float* tile, int rows, const float* bias, int columns) {
  for (int c = 0; c < kPanel; c += kLanes) {
    const F b = load_columns(bias + c, columns - c);
    for (int r = 0; r < rows; ++r) store(tile + r * kPanel + c, add(load(tile + r * kPanel + c), b));
  }
}

// put(row, a, b) with the two vectors of a row, scale_x scale_w (sum - zero_x column_sum) + bias, for a tile of int32.
// Exact but for the conversions of sums beyond 2^24, and one rounding of the difference.
template <class Put>
ALBERT_INLINE void dequantize(const float* tile, int rows, const float* x_scale, const int32_t* x_zero,
                              const float* w_scale, const int32_t* w_sum, const float* bias, int columns, Put put) {
  constexpr int vectors = kPanel / kLanes;
  static_assert(vectors == 2);
  F scale[vectors], sum[vectors], b[vectors];
  for (int v = 0; v < vectors; ++v) {
    scale[v] = load(w_scale + v * kLanes);
    sum[v] = to_float(load(w_sum + v * kLanes));
    b[v] = bias == nullptr ? zero() : load_columns(bias + v * kLanes, columns - v * kLanes);
  }
  for (int r = 0; r < rows; ++r) {
    const F row_scale = set(x_scale[r]), row_zero = set(static_cast<float>(x_zero[r]));
    F values[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      const F sums = to_float(load(reinterpret_cast<const int*>(tile + r * kPanel + v * kLanes)));
      values[v] = fma(fnma(sum[v], row_zero, sums), mul(scale[v], row_scale), b[v]);
    }
    put(r, values[0], values[1]);
  }
}

template <class Function>
ALBERT_INLINE void for_each(float* tile, int rows, Function f) {
  for (int i = 0; i < rows * kPanel; i += 2 * kLanes) {
    const F a = f(load(tile + i)), b = f(load(tile + i + kLanes));  // two at once: each is a long chain
    store(tile + i, a);
    store(tile + i + kLanes, b);
  }
}

// T: what will hold the result.
template <class T>
void activate(int activation, float* tile, int rows) {
  switch (activation) {
    case ALBERT_GELU_TANH:
      return for_each(tile, rows, [](F x) { return sizeof(T) == sizeof(bf16) ? gelu_tanh_bf16(x) : gelu_tanh(x); });
    case ALBERT_GELU_ERF: return for_each(tile, rows, [](F x) { return gelu_erf(x); });
    case ALBERT_RELU: return for_each(tile, rows, [](F x) { return max(zero(), x); });
    case ALBERT_TANH: return for_each(tile, rows, [](F x) { return tanh(x); });
  }
}

template <class T, class Function>
ALBERT_INLINE void multiply_each(float* tile, int rows, const T* input, int64_t stride, int columns, Function f) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kPanel; c += kLanes) {
      float* p = tile + r * kPanel + c;
      store(p, mul(load(p), f(load_columns(input + r * stride + c, columns - c))));
    }
}

template <class T>
void multiply_gradient(int activation, float* tile, int rows, const T* x, int64_t stride, int columns) {
  const auto multiply = [&](auto f) { multiply_each(tile, rows, x, stride, columns, f); };
  switch (activation) {
    case ALBERT_GELU_TANH: return multiply([](F v) { return gelu_tanh_gradient(v); });
    case ALBERT_GELU_ERF: return multiply([](F v) { return gelu_erf_gradient(v); });
    case ALBERT_RELU: return multiply([](F v) { return less(zero(), v, set(1.0f), zero()); });
    case ALBERT_TANH: return multiply([](F v) { const F t = tanh(v); return fnma(t, t, set(1.0f)); });
  }
}

template <class T>
void store_tile(const float* tile, int rows, T* y, int64_t stride, int columns) {
  for (int r = 0; r < rows; ++r, y += stride)
    for (int c = 0; c < kPanel; c += kLanes) store_columns(y + c, load(tile + r * kPanel + c), columns - c);
}

template <class T>
void add_tile(float* tile, int rows, const T* residual, int64_t stride, int columns) {
  for (int r = 0; r < rows; ++r, residual += stride)
    for (int c = 0; c < kPanel; c += kLanes) {
      float* p = tile + r * kPanel + c;
      store(p, add(load(p), load_columns(residual + c, columns - c)));
    }
}

// All steps up to the residual, for the tile whose first element is y[row][column]. T is y's format; t is where the
// result goes: y, or float32 memory that LayerNorm reads next.
template <class T, class Destination>
void finish_tile(const albert_gemm_args& args, float* tile, int rows, int columns, int64_t row, int64_t column,
                 Destination* t, int64_t t_stride) {
  const auto at = [&](const void* p, int64_t stride) { return static_cast<const T*>(p) + row * stride + column; };
  if (args.pre_activation != nullptr)
    store_tile(tile, rows, const_cast<T*>(at(args.pre_activation, args.pre_activation_stride)),
               args.pre_activation_stride, columns);
  if (args.activation_input != nullptr)
    multiply_gradient(args.activation, tile, rows, at(args.activation_input, args.activation_input_stride),
                      args.activation_input_stride, columns);
  else
    activate<T>(args.activation, tile, rows);
  if (args.residual != nullptr)
    add_tile(tile, rows, at(args.residual, args.residual_stride), args.residual_stride, columns);
  store_tile(tile, rows, t, t_stride, columns);
}

}  // namespace albert::ALBERT_ISA
