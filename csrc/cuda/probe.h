/* What the design of the resident encoder rests on, measured on the current device. C linkage. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int multiprocessors;
  float grid_barrier;    /* microseconds, of one block a multiprocessor */
  float cluster_barrier; /* microseconds, of 8 blocks; 0 where there are no clusters */
  float shared_bytes;    /* gigabytes a second that a multiprocessor takes from L2 into shared memory, all at once */
  float register_bytes;  /* the same into registers, as the encoder loads activations */
  float graph_node;      /* microseconds that an empty kernel adds to a graph's replay */
  float multiply;        /* teraflop/s of mma.sync in bfloat16, operands in registers */
} albert_probe_figures;

/* Returns 0 or an error that albert_cuda_error puts into words. Takes about a second. */
int albert_probe(albert_probe_figures* figures);

#ifdef __cplusplus
}
#endif
