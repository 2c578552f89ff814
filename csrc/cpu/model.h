/* A model's inference in one call: embeddings, their projection, all passes of the encoder, the pooler. C linkage, raw
 * pointers; errors, alignment, threads and workspaces as in gemm.h.
 *
 * A call of each costs little by itself. But a host language's code between them has left the caches by the time that
 * a call's weights have passed through these, and is slow then: for few tokens it took a quarter of the time.
 */
#pragma once
#include "encoder.h"
#include "token_ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Zero-initialise, then fill in. */
typedef struct albert_model_args {
  albert_embed_args embed; /* without dropout; y is not read */
  const void* embedded;    /* [tokens][embed.size]: what embed would give. Of embed the size alone is read then */
  const void* projection;  /* packed, [hidden][embed.size] */
  const float* projection_bias;
  albert_encoder_args encoder; /* of inference: input is not read, nothing is kept, all_states is 0 */
  const void* pooler;          /* packed, [hidden][hidden]; or null */
  const float* pooler_bias;
  void* pooled; /* [batch][hidden] = tanh(x pooler^T + bias), x being a row's first token, zeros for an empty row */
} albert_model_args;

size_t albert_model_workspace_bytes(const albert_model_args* args, int threads);
int albert_model(const albert_model_args* args, void* workspace, size_t workspace_bytes,
                 const albert_parallel* parallel);

#ifdef __cplusplus
}
#endif
