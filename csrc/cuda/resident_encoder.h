/* The encoder for a few tokens in one kernel: the layer's weights stay in the multiprocessors' shared memory through all
 * of its passes. C linkage, raw pointers. Each function returns 0, or an error that albert_cuda_error puts into words. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { ALBERT_CUDA_BF16 = 0, ALBERT_CUDA_FP16 = 1, ALBERT_CUDA_F32 = 2 };
enum { ALBERT_CUDA_GELU_TANH = 1, ALBERT_CUDA_GELU_ERF = 2, ALBERT_CUDA_RELU = 3 };
enum { ALBERT_CUDA_MOST_TOKENS = 128 };
/* Errors of this library; those of the CUDA runtime are positive. */
enum { ALBERT_CUDA_BAD_ARGUMENT = -1, ALBERT_CUDA_DOES_NOT_FIT = -2, ALBERT_CUDA_KERNEL = -3 };

typedef struct {
  int hidden, inner, heads;
  int dtype;           /* of hidden states and products: BF16 or FP16 */
  int parameter_dtype; /* dtype, or F32 */
  int cluster;         /* blocks of a cluster: 0 chooses, 1 has none; 8 from compute capability 9.0 */
  int words;           /* up to 16 tokens, where it serves: 1 waits for words (resident_words.h), 0 at barriers */
} albert_resident_shape;

/* What the shape takes on the current device. */
typedef struct {
  int blocks, cluster;
  int shared_bytes; /* of each block */
  int words;        /* whether up to 16 tokens wait for words: asked for, of an instance's sizes, and there is room */
} albert_resident_plan;

/* DOES_NOT_FIT: the layer is larger than the shared memory, or has sizes that the kernel does not serve. */
int albert_resident_plan_of(const albert_resident_shape* shape, albert_resident_plan* plan);

typedef struct {
  albert_resident_shape shape;
  int tokens; /* at most MOST_TOKENS */
  int batch, passes, activation;
  int return_all; /* whether output is [passes][tokens][hidden], of every pass, or the last one's alone */
  float eps;
  const void* hidden;        /* [tokens][hidden], 16-byte aligned as all that follows */
  const int32_t* cu_seqlens; /* [batch + 1], on the device */
  /* Weight and bias of query, key, value, dense, attention.LayerNorm, ffn, ffn_output, full_layer_layer_norm; weights
   * [out][in], contiguous. */
  const void* parameters[16];
  void* output;
  void* workspace; /* albert_resident_workspace_bytes; holds nothing before and after */
} albert_resident_args;

size_t albert_resident_workspace_bytes(const albert_resident_shape* shape, int tokens, int passes);

/* On the current device. stream: a cudaStream_t; the launch may be captured in a graph. */
int albert_resident_encoder(const albert_resident_args* args, void* stream);

const char* albert_cuda_error(int error);

#ifdef __cplusplus
}
#endif
