/* Attention of the CPU backend: softmax(Q K^T scale + bias) V over packed rows, and its gradients. C linkage, raw
 * pointers; errors, alignment, threads and workspaces as in gemm.h.
 *
 * Row r of the batch owns the tokens cu_seqlens[r] to cu_seqlens[r + 1] and attends to nothing else. Tokens beyond the
 * last offset belong to no row: their output and gradients are zero. So is the output of a query that may attend to no
 * key (every score -inf, or a row without keys); its logsumexp is -inf, both parts of it, and it gives no gradient.
 *
 * Scores, softmax and all sums are float32. bfloat16 operands are widened to float32, which leaves the probabilities
 * unrounded; where the machine multiplies bfloat16 (isa.h), probabilities and score gradients are rounded to it.
 * Forward gives the same bits for any number of threads, backward for the same number of threads.
 */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Zero-initialise, then fill in. Strides count elements; head_dim is contiguous. */
typedef struct albert_attention_args {
  int dtype; /* F32 or BF16, of everything but logsumexp and bias */
  int64_t batch, heads, head_dim; /* head_dim: 1 to 128 */
  int64_t tokens_q, tokens_k;     /* size of the packed dimensions */
  const void* query; /* [tokens_q][heads][head_dim] */
  int64_t query_token_stride, query_head_stride;
  const void* key; /* [tokens_k][heads][head_dim] */
  int64_t key_token_stride, key_head_stride;
  const void* value; /* [tokens_k][heads][head_dim] */
  int64_t value_token_stride, value_head_stride;
  const int32_t* cu_seqlens_q; /* [batch + 1], from 0, never falling */
  const int32_t* cu_seqlens_k;
  int causal;  /* query i of a row sees its keys up to i + keys - queries: the last query sees the last key */
  float scale; /* of the scores */
  const void* bias; /* null, or added to the scores: [batch][heads][queries][keys], keys contiguous; stride 0 repeats */
  int bias_dtype;   /* F32 or BF16; -inf forbids */
  int64_t bias_batch_stride, bias_head_stride, bias_query_stride;
  double dropout_p; /* of the probabilities, in [0, 1): albert_fast/ops/dropout.py */
  uint64_t seed;
  uint32_t site;
  void* output; /* [tokens_q][heads * head_dim]; backward reads it */
  int64_t output_stride;
  /* [heads][tokens_q], with a bias [2][heads][tokens_q]: the largest score, and the logarithm of the sum of
   * exp(score - largest), both in units of ln 2. Forward may have null, backward reads it. */
  float* logsumexp;
  /* Forward, without dropout and logsumexp: where the machine has VNNI, and scale > 0, the products are of integers.
   * Queries, and keys less their mean over the row, which no softmax sees, are rounded to 8 bits, one scale a token and
   * head; probabilities to 13 bits of the largest one; values to 11 bits, one scale a feature, row and head. */
  int quantized;
} albert_attention_args;

/* Depends on the values of cu_seqlens, not on what any other pointer points to. */
size_t albert_attention_workspace_bytes(const albert_attention_args* args, int threads);
int albert_attention(const albert_attention_args* args, void* workspace, size_t workspace_bytes,
                     const albert_parallel* parallel);

/* grad_query, grad_key and grad_value are written, not added to; they may share one [tokens][3][heads][head_dim]. */
typedef struct albert_attention_gradients {
  const void* grad_output; /* [tokens_q][heads * head_dim] */
  int64_t grad_output_stride;
  void* grad_query;
  int64_t grad_query_token_stride, grad_query_head_stride;
  void* grad_key;
  int64_t grad_key_token_stride, grad_key_head_stride;
  void* grad_value;
  int64_t grad_value_token_stride, grad_value_head_stride;
} albert_attention_gradients;

size_t albert_attention_backward_workspace_bytes(const albert_attention_args* args, int threads);
int albert_attention_backward(const albert_attention_args* args, const albert_attention_gradients* gradients,
                              void* workspace, size_t workspace_bytes, const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
