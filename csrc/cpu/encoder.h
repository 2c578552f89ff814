/* The shared-layer loop of albert_fast/ops/encoder.py: all passes in one call, forward and backward. C linkage, raw
 * pointers; errors, alignment, threads and workspaces as in gemm.h.
 *
 * One pass, on x [tokens][hidden]:
 *     qkv = x qkv_weight^T + bias
 *     h   = LayerNorm(x + dropout(attention(qkv) dense^T + bias))
 *     y   = LayerNorm(h + activation(h ffn^T + bias) ffn_output^T + bias)
 * Pass i draws the dropout of the probabilities at site 1 + 2 i, that of the dense product at site 2 + 2 i.
 *
 * The feed-forward half goes by a thousand tokens at a time: its wide matrix then stays in cache and is never whole,
 * unless backward is to have it. The gradients of a layer's parameters are float32 sums over all of its passes.
 * With int8 weights, and where nothing is kept for backward, attention is `quantized` (attention.h).
 * Tokens beyond the last row attend to nothing and are computed like others: what they hold means nothing.
 * Matrices are contiguous; sizes may be 0.
 */
#pragma once
#include "gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A layer's packed weights (albert_pack) and its vectors. The transposes, [k][n] of each, are for backward. */
typedef struct albert_encoder_layer {
  const void* qkv;        /* [3 hidden][hidden]: query, key, value */
  const void* dense;      /* [hidden][hidden] */
  const void* ffn;        /* [inner][hidden] */
  const void* ffn_output; /* [hidden][inner] */
  const void *qkv_transposed, *dense_transposed, *ffn_transposed, *ffn_output_transposed;
  const float *qkv_bias, *dense_bias, *attention_norm_weight, *attention_norm_bias;
  const float *ffn_bias, *ffn_output_bias, *norm_weight, *norm_bias;
} albert_encoder_layer;

/* What backward reads, [passes] of each. All null for inference; without inner, or with x alone, backward makes the
 * rest again. */
typedef struct albert_encoder_kept {
  void* x;             /* [tokens][hidden], each pass's input */
  void* qkv;           /* [tokens][3 hidden] */
  void* context;       /* [tokens][hidden], the attention's output */
  float* logsumexp;    /* as attention.h has it */
  void* summed;        /* [tokens][hidden], input of the first LayerNorm */
  void* output_summed; /* [tokens][hidden], input of the second */
  void* inner;         /* [tokens][inner], before the activation */
} albert_encoder_kept;

/* Zero-initialise, then fill in. */
typedef struct albert_encoder_args {
  int dtype; /* F32 or BF16, of all matrices but the weights */
  int64_t tokens, hidden, inner, heads, batch;
  const int32_t* cu_seqlens; /* [batch + 1] */
  int passes, layer_count;
  const int64_t* layer_of_pass; /* [passes] */
  const albert_encoder_layer* layers;
  int activation; /* ALBERT_GELU_TANH, ALBERT_GELU_ERF or ALBERT_RELU */
  float eps;
  double hidden_dropout_p, attention_dropout_p;
  uint64_t seed;
  const void* bias; /* of the attention's scores: attention.h */
  int bias_dtype;
  int64_t bias_batch_stride, bias_head_stride, bias_query_stride;
  int all_states;
  const void* input; /* [tokens][hidden]; backward does not read it */
  void* output; /* [tokens][hidden], or with all_states [passes + 1][tokens][hidden], the first of them the input */
  albert_encoder_kept kept;
  /* [passes][5 hidden + inner]: added in each pass to the biases of qkv, dense, ffn and ffn_output. Null, or what the
   * rounding of int8 weights takes from the products on average. Not for backward. */
  const float* corrections;
} albert_encoder_args;

size_t albert_encoder_workspace_bytes(const albert_encoder_args* args, int threads);
int albert_encoder(const albert_encoder_args* args, void* workspace, size_t workspace_bytes,
                   const albert_parallel* parallel);

/* Float32, each added to (+=), in the shapes of the layer's weights before packing. */
typedef struct albert_encoder_layer_gradients {
  float *qkv, *dense, *ffn, *ffn_output;
  float *qkv_bias, *dense_bias, *attention_norm_weight, *attention_norm_bias;
  float *ffn_bias, *ffn_output_bias, *norm_weight, *norm_bias;
} albert_encoder_layer_gradients;

typedef struct albert_encoder_gradients {
  const void* grad_output; /* as output */
  void* grad_input;        /* [tokens][hidden] */
  const albert_encoder_layer_gradients* layers;
} albert_encoder_gradients;

size_t albert_encoder_backward_workspace_bytes(const albert_encoder_args* args, int threads);
int albert_encoder_backward(const albert_encoder_args* args, const albert_encoder_gradients* gradients,
                            void* workspace, size_t workspace_bytes, const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
