/* The matrix products of training whose epilogues PyTorch does not expose, by cuBLASLt.
 *
 * Host code without CUDA's headers: it compiles where there is no CUDA, and finds the library when it is asked to. All
 * matrices are row-major. Elements are of `dtype`, sums are float32. Row strides are in elements. Pointers must be
 * multiples of 16 bytes and so must be the rows' distances.
 *
 * Nothing is allocated on the device after `albert_products_open`, nothing waits for it, and algorithms are chosen on
 * the host: calls may be captured into a CUDA graph, `albert_products_open` may not. The current device must be the one
 * that was current when `products` was opened. One object may be used by several threads.
 *
 * Every function returns 0 or a code, of which `albert_products_message` tells the meaning; nothing was started then.
 */
#ifndef ALBERT_CUDA_PRODUCTS_H
#define ALBERT_CUDA_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum albert_products_dtype { ALBERT_PRODUCTS_F16 = 0, ALBERT_PRODUCTS_BF16 = 1 };

enum albert_products_error {
    ALBERT_PRODUCTS_BAD_ARGUMENT = 1, /* a size is not positive or a stride too short, a pointer is missing */
    ALBERT_PRODUCTS_UNALIGNED = 2,
    ALBERT_PRODUCTS_UNSUPPORTED = 3, /* cuBLASLt has no algorithm for these sizes on this device */
    ALBERT_PRODUCTS_NO_LIBRARY = 4,
    ALBERT_PRODUCTS_OLD_LIBRARY = 5,
    ALBERT_PRODUCTS_STATUS = 100 /* and above: plus a cublasStatus_t */
};

/* cuBLASLt on one device. */
typedef struct albert_products albert_products;

/* path: of the library. NULL: the one that this process has loaded, else libcublasLt.so.13 or .12 where the loader
 * finds them. On failure `reason` receives what the loader said. */
int albert_products_open(const char* path, albert_products** products, char* reason, size_t reason_bytes);
void albert_products_close(albert_products* products);

/* major * 10000 + minor * 100 + patch */
int albert_products_version(const albert_products* products);
const char* albert_products_message(int code);

/* Where a product runs. */
typedef struct {
    void* workspace; /* on the device, a multiple of 256 bytes; may be NULL with 0 bytes */
    size_t workspace_bytes;
    void* stream; /* cudaStream_t */
} albert_products_place;

/* inner = x weightᵀ + bias, y = gelu(inner) in the tanh form.
 * x [tokens, in], weight [out, in], bias [out]; y and inner [tokens, out]. */
int albert_products_linear_gelu(albert_products* products, const albert_products_place* place, int dtype,
                                int64_t tokens, int64_t in, int64_t out, const void* x, int64_t x_stride,
                                const void* weight, const void* bias, void* y, int64_t y_stride, void* inner,
                                int64_t inner_stride);

/* grad_inner = (grad weight) gelu'(inner), grad_bias = its sum over the tokens: written, in `dtype`.
 * grad [tokens, in], weight [in, out], inner and grad_inner [tokens, out], grad_bias [out]. */
int albert_products_gelu_gradient(albert_products* products, const albert_products_place* place, int dtype,
                                  int64_t tokens, int64_t in, int64_t out, const void* grad, int64_t grad_stride,
                                  const void* weight, const void* inner, int64_t inner_stride, void* grad_inner,
                                  int64_t grad_inner_stride, void* grad_bias);

/* grad_weight = gradᵀ x, or += with `accumulate`, in float32.
 * grad [tokens, out], x [tokens, in], grad_weight [out, in]; grad_bias [out] or NULL: the sum of grad over the tokens,
 * written in float32, whatever `accumulate`. */
int albert_products_weight_gradient(albert_products* products, const albert_products_place* place, int dtype,
                                    int64_t tokens, int64_t in, int64_t out, const void* grad, int64_t grad_stride,
                                    const void* x, int64_t x_stride, float* grad_weight, int accumulate,
                                    float* grad_bias);

#ifdef __cplusplus
}
#endif

#endif
