/* What happens to a token between the matrix products, forward and backward: dropout + residual + LayerNorm,
 * bias + activation, embeddings + LayerNorm. C linkage, raw pointers; the rules of gemm.h hold, and its codes.
 *
 * m and tokens count packed tokens. Vectors along the columns (bias, weight, ...) and their gradients are float32.
 * Gradients of vectors and of tables are added to (+=), all others are written; a null pointer leaves one out.
 * Results are the same, bit for bit, for any number of threads.
 * An output may be the very memory of an input of the same shape, dtype and stride (not of another row's).
 */
#pragma once
#include "gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Which elements survive is a function of the seed, the site, the token's row and position in it, and the column:
 * bit for bit albert_fast/ops/dropout.py. The rows matter without dropout too: tokens from cu_seqlens[batch] on get
 * zeros, outputs, statistics and gradients, whatever they hold. */
typedef struct albert_dropout {
  double p; /* in [0, 1); 0 switches dropout off */
  uint64_t seed;
  uint32_t site;
  const int32_t* cu_seqlens; /* [batch + 1], from 0, never falling; null: all tokens are of row 0 */
  int64_t batch;
} albert_dropout;

/* sum = residual + dropout(x + bias), rounded to the wider dtype of x and residual;
 * y = (sum - mean) * rstd * weight + ln_bias. y, pre_norm and grad_y have that wider dtype. */
typedef struct albert_layer_norm_args {
  int64_t m, n;
  const void* x; /* [m][n] */
  int64_t x_stride;
  const float* bias; /* or null */
  const void* residual; /* [m][n] */
  int64_t residual_stride;
  int x_dtype, residual_dtype;
  const float *weight, *ln_bias;
  float eps;
  albert_dropout dropout;
  /* forward: y, and unless null what backward reads */
  void* y;
  int64_t y_stride;
  void* pre_norm; /* the sum */
  int64_t pre_norm_stride;
  float *mean, *rstd; /* [m] */
  /* backward. pre_norm as forward stored it, or null: made again from x, bias and residual, which are not read
   * otherwise. mean and rstd likewise, both or none of them; without pre_norm they are not read. ln_bias and y are
   * not read. */
  const void* grad_y;
  int64_t grad_y_stride;
  void* grad_residual; /* the gradient of the sum, residual_dtype */
  int64_t grad_residual_stride;
  void* grad_x; /* the same through the dropout, x_dtype */
  int64_t grad_x_stride;
  float *grad_weight, *grad_ln_bias;
  float* grad_bias; /* the column sums of grad_x, before its rounding */
} albert_layer_norm_args;

int albert_dropout_add_layer_norm(const albert_layer_norm_args* args, const albert_parallel* parallel);
size_t albert_layer_norm_backward_workspace_bytes(const albert_layer_norm_args* args, int threads);
int albert_layer_norm_backward(const albert_layer_norm_args* args, void* workspace, size_t workspace_bytes,
                               const albert_parallel* parallel);

/* y = activation(x + bias); activation is ALBERT_GELU_TANH, ALBERT_GELU_ERF or ALBERT_RELU. */
typedef struct albert_bias_gelu_args {
  int64_t m, n;
  const void* x; /* [m][n] */
  int64_t x_stride;
  const float* bias; /* or null */
  int dtype;         /* of x, y, grad_y and grad_x */
  int activation;
  void* y; /* forward */
  int64_t y_stride;
  const void* grad_y; /* backward */
  int64_t grad_y_stride;
  void* grad_x;
  int64_t grad_x_stride;
  float* grad_bias; /* the column sums of grad_x, before its rounding */
} albert_bias_gelu_args;

int albert_bias_gelu(const albert_bias_gelu_args* args, const albert_parallel* parallel);
size_t albert_bias_gelu_backward_workspace_bytes(const albert_bias_gelu_args* args, int threads);
int albert_bias_gelu_backward(const albert_bias_gelu_args* args, void* workspace, size_t workspace_bytes,
                              const albert_parallel* parallel);

typedef struct albert_embedding {
  const void* ids; /* [tokens] */
  int id_bytes;    /* 4 or 8: int32 or int64 */
  const void* table; /* [rows][size] */
  int64_t rows, stride;
  float* gradient; /* [rows][size], backward */
  int64_t gradient_stride;
} albert_embedding;

/* sum = word[...] + token_type[...] + position[...], rounded to dtype; y = dropout(LayerNorm(sum)). A row's id outside
 * its table is a bad argument. */
typedef struct albert_embed_args {
  int64_t tokens, size;
  int dtype; /* of the tables, inputs, y and grad_y */
  albert_embedding word, position, token_type;
  const void* inputs; /* [tokens][size], in place of word, which is not read then; or null */
  int64_t inputs_stride;
  const float *weight, *bias;
  float eps;
  albert_dropout dropout;
  void* y; /* forward */
  int64_t y_stride;
  const void* grad_y; /* backward, which makes the sum again; bias and y are not read */
  int64_t grad_y_stride;
  void* grad_inputs;
  int64_t grad_inputs_stride;
  float *grad_weight, *grad_bias;
  int64_t padding_idx; /* the row of word that gets no gradient; -1: none */
} albert_embed_args;

int albert_embed_layer_norm(const albert_embed_args* args, const albert_parallel* parallel);
size_t albert_embed_layer_norm_backward_workspace_bytes(const albert_embed_args* args, int threads);
int albert_embed_layer_norm_backward(const albert_embed_args* args, void* workspace, size_t workspace_bytes,
                                     const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
