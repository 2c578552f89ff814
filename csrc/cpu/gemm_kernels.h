// The entry points that exist once per instruction set; gemm_api.cpp checks arguments and picks one.
#pragma once
#include "gemm.h"
#include "pack_weight.h"

namespace albert {

struct WeightGradient {
  int dtype;
  int64_t m, n, k;
  const void* grad_output;
  int64_t grad_output_stride;
  const void* x;
  int64_t x_stride;
  float* gradient;
  int64_t gradient_stride;
  float* bias_gradient;
  bool bf16_dot;  // the machine multiplies bfloat16
};

#define ALBERT_DECLARE_KERNELS(isa, linkage)                                                                    \
  namespace isa {                                                                                               \
  linkage size_t gemm_workspace_bytes(const albert_gemm_args& args, int threads);                               \
  linkage void gemm(const albert_gemm_args& args, char* workspace, const albert_parallel* parallel);            \
  linkage size_t weight_gradient_workspace_bytes(const WeightGradient& args);                                   \
  linkage void weight_gradient(const WeightGradient& args, char* workspace, const albert_parallel* parallel);   \
  linkage void quantize_rows(int x_dtype, const void* x, int64_t x_stride, int64_t m, int64_t k, uint8_t* u8,   \
                             int64_t u8_stride, float* scale, int32_t* zero, const albert_parallel* parallel);  \
  linkage void layer_norm(int x_dtype, const void* x, int64_t x_stride, int y_dtype, void* y, int64_t y_stride, \
                          int64_t m, int64_t n, const float* weight, const float* bias, float eps, float* mean, \
                          float* rstd, const albert_parallel* parallel);                                        \
  }
ALBERT_DECLARE_KERNELS(avx2, )
ALBERT_DECLARE_KERNELS(avx512, [[gnu::weak]])
#undef ALBERT_DECLARE_KERNELS

}  // namespace albert
