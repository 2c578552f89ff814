/* The masked-LM loss of albert_fast/ops/masked_lm_loss.py, forward and backward, without a matrix of logits: they are
 * made a tile at a time, and backward makes them again. C linkage, raw pointers; the rules of gemm.h hold, its codes
 * and its errors.
 *
 * For a token with a label y, logits z = table x + bias, L = logsumexp(z), s = label_smoothing, c = z_loss:
 *   loss = L - (1 - s) z[y] - (s / vocabulary) sum(z) + c L^2
 * Tokens whose label is ignore_index are not read, and their results and gradients are zero. Logits are float32,
 * whatever x is. Beside the workspace, which holds the labelled tokens' x and blocks of a fixed size, nothing is used.
 * Forward gives the same bits for any number of threads, backward for the same number.
 */
#pragma once
#include "gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Zero-initialise, then fill in. */
typedef struct albert_masked_lm_loss_args {
  int dtype; /* F32 or BF16: of x, table and grad_x */
  int64_t tokens, size, vocabulary;
  const void* x; /* [tokens][size] */
  int64_t x_stride;
  const void* table; /* [vocabulary][size] */
  int64_t table_stride;
  const float* bias;     /* [vocabulary], or null */
  const int64_t* labels; /* [tokens]: ignore_index, or in [0, vocabulary): all others are a bad argument */
  int64_t ignore_index;
  double label_smoothing, z_loss;
  /* forward; a null pointer leaves one out */
  float *loss, *logsumexp; /* [tokens]; backward reads logsumexp */
  uint8_t* correct;        /* [tokens]: 1 where the label has the largest logit, the first of several largest */
  /* backward; gradients of table and bias are added to (+=), null leaves one out */
  const float* grad_loss; /* [tokens] */
  void* grad_x;           /* [tokens][size] */
  int64_t grad_x_stride;
  float* grad_table; /* [vocabulary][size] */
  int64_t grad_table_stride;
  float* grad_bias; /* [vocabulary] */
} albert_masked_lm_loss_args;

size_t albert_masked_lm_loss_workspace_bytes(const albert_masked_lm_loss_args* args, int threads);
int albert_masked_lm_loss(const albert_masked_lm_loss_args* args, void* workspace, size_t workspace_bytes,
                          const albert_parallel* parallel);
size_t albert_masked_lm_loss_backward_workspace_bytes(const albert_masked_lm_loss_args* args, int threads);
int albert_masked_lm_loss_backward(const albert_masked_lm_loss_args* args, void* workspace, size_t workspace_bytes,
                                   const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
