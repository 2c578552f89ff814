/* Matrix products of the CPU backend: y = epilogue(x . weight^T), and the weight's gradient. C linkage, raw pointers.
 *
 * A weight is packed once (albert_pack) and used many times. Packing also fixes how it is computed: float32 as
 * float32; bfloat16 with bfloat16 dot products, or widened to float32 where the machine has none; int8 (symmetric, one
 * float32 scale an output channel) with u8 x s8 dot products, or with exact 16-bit products where the machine has none.
 * Sums are float32 (int32 for int8) throughout; x is converted to the weight's format a row block at a time.
 * A packed weight is good for the machine and the ALBERT_FAST_ISA it was packed under; any other use is an error.
 *
 * Nothing here allocates, keeps state, or changes the floating-point environment: scratch memory is the caller's
 * workspace, threads are the caller's albert_parallel, and every function may run on many threads at once, with a
 * workspace each. The result is the same, bit for bit, for any number of threads, and a row of y is the same whatever
 * other rows there are. Only declared bytes are touched.
 * Strides count elements; a matrix's columns are contiguous unless a column stride is given. Pointers need the
 * alignment of their element, packed weights and workspaces of a cache line (64 bytes). Sizes may be 0.
 * Functions that return int return 0, or one of the errors below before anything was written.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "parallel.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { ALBERT_F32 = 0, ALBERT_BF16 = 1, ALBERT_INT8 = 2, ALBERT_U8 = 3 };
enum { ALBERT_NONE = 0, ALBERT_GELU_TANH = 1, ALBERT_GELU_ERF = 2, ALBERT_RELU = 3, ALBERT_TANH = 4 };
enum {
  ALBERT_BAD_ARGUMENT = 1,  /* a size, stride, dtype or combination that is not served */
  ALBERT_BAD_WEIGHT = 2,    /* not packed, or packed for another instruction set */
  ALBERT_SMALL_WORKSPACE = 3,
  ALBERT_NO_ISA = 4,        /* the machine lacks AVX2 and FMA */
  ALBERT_UNALIGNED = 5      /* a packed weight or a workspace */
};

/* "avx512 vnni bf16", "avx512", "avx2" or "none": what the functions below use. */
const char* albert_isa(void);

/* Packs weight[n][k], element (i, j) at source[i * row_stride + j * column_stride], as F32, BF16 or INT8. source_dtype
 * is F32 or BF16. For grad_input = grad_output . weight, pack the transpose: swap n with k and the two strides.
 * INT8 needs k <= 65536. */
size_t albert_packed_bytes(int dtype, int64_t n, int64_t k);
int albert_pack(int dtype, int source_dtype, const void* source, int64_t row_stride, int64_t column_stride, int64_t n,
                int64_t k, void* packed, const albert_parallel* parallel);

/* u8[m][k] = round(x / scale) + zero, one scale and zero point a row, so that 0 is exact: x ~ scale * (u8 - zero).
 * A row that holds NaN or infinity gets a NaN scale. x_dtype is F32 or BF16. albert_gemm does the same to an F32 or
 * BF16 x under an INT8 weight; quantizing first pays where one x meets several weights. */
int albert_quantize_rows(int x_dtype, const void* x, int64_t x_stride, int64_t m, int64_t k, uint8_t* u8,
                         int64_t u8_stride, float* scale, int32_t* zero, const albert_parallel* parallel);

/* Zero-initialise, then fill in. Null pointers switch their step off. In order:
 *   t = x . weight^T (dequantized) + bias
 *   pre_activation = t
 *   t = activation(t)                       or with activation_input, t * activation'(activation_input): backward
 *   t = t + residual                        (residual == y, with one stride, accumulates into y)
 *   with ln_weight:  pre_norm = t;  y = (t - mean) * rstd * ln_weight + ln_bias;  mean and rstd of each row stored
 *   otherwise:       y = t
 * y, pre_activation, activation_input, residual and pre_norm have y_dtype, F32 or BF16. LayerNorm sees float32. */
typedef struct albert_gemm_args {
  int64_t m;
  const void* x; /* [m][k], F32 or BF16; U8 with an INT8 weight, and then x_scale[m] and x_zero[m] */
  int64_t x_stride;
  int x_dtype;
  int y_dtype;
  const float* x_scale;
  const int32_t* x_zero;
  const void* weight; /* packed: n and k are in it */
  void* y;            /* [m][n] */
  int64_t y_stride;
  const float* bias; /* [n] */
  int activation;
  void* pre_activation;
  int64_t pre_activation_stride;
  const void* activation_input;
  int64_t activation_input_stride;
  const void* residual;
  int64_t residual_stride;
  const float* ln_weight; /* [n], with ln_bias[n] */
  const float* ln_bias;
  float ln_eps;
  float* ln_mean; /* [m] */
  float* ln_rstd; /* [m] */
  void* pre_norm;
  int64_t pre_norm_stride;
  const void* next_weight; /* packed: the product after this one, of as many rows: its first panels are asked for */
} albert_gemm_args;

size_t albert_gemm_workspace_bytes(const albert_gemm_args* args, int threads);
int albert_gemm(const albert_gemm_args* args, void* workspace, size_t workspace_bytes,
                const albert_parallel* parallel);

/* gradient[n][k] += grad_output[m][n]^T . x[m][k], and unless null bias_gradient[n] += the column sums of grad_output;
 * both gradients are float32. dtype, F32 or BF16, is that of x and grad_output. */
size_t albert_weight_gradient_workspace_bytes(int dtype, int64_t m, int64_t n, int64_t k);
int albert_weight_gradient(int dtype, int64_t m, int64_t n, int64_t k, const void* grad_output,
                           int64_t grad_output_stride, const void* x, int64_t x_stride, float* gradient,
                           int64_t gradient_stride, float* bias_gradient, void* workspace, size_t workspace_bytes,
                           const albert_parallel* parallel);

/* y = (x - mean) * rstd * weight + bias for each row of x[m][n]; mean and rstd (null, or [m]) are stored. x and y,
 * each F32 or BF16, may be the same memory where their dtype and stride are. */
int albert_layer_norm(int x_dtype, const void* x, int64_t x_stride, int y_dtype, void* y, int64_t y_stride, int64_t m,
                      int64_t n, const float* weight, const float* bias, float eps, float* mean, float* rstd,
                      const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
