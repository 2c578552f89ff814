// The entry points of token_ops.h that exist once per instruction set; token_ops_api.cpp checks arguments and picks.
#pragma once
#include "token_ops.h"

namespace albert {

#define ALBERT_DECLARE_KERNELS(isa, linkage)                                                                \
  namespace isa {                                                                                           \
  linkage void dropout_add_layer_norm(const albert_layer_norm_args& args, const albert_parallel* parallel); \
  linkage size_t layer_norm_backward_workspace_bytes(const albert_layer_norm_args& args, int threads);      \
  linkage void layer_norm_backward(const albert_layer_norm_args& args, char* workspace,                     \
                                   const albert_parallel* parallel);                                        \
  linkage void bias_gelu(const albert_bias_gelu_args& args, const albert_parallel* parallel);               \
  linkage size_t bias_gelu_backward_workspace_bytes(const albert_bias_gelu_args& args);                     \
  linkage void bias_gelu_backward(const albert_bias_gelu_args& args, char* workspace,                       \
                                  const albert_parallel* parallel);                                         \
  linkage void embed_layer_norm(const albert_embed_args& args, const albert_parallel* parallel);            \
  linkage size_t embed_layer_norm_backward_workspace_bytes(const albert_embed_args& args, int threads);     \
  linkage void embed_layer_norm_backward(const albert_embed_args& args, char* workspace,                    \
                                         const albert_parallel* parallel);                                  \
  }
ALBERT_DECLARE_KERNELS(avx2, )
ALBERT_DECLARE_KERNELS(avx512, [[gnu::weak]])
#undef ALBERT_DECLARE_KERNELS

}  // namespace albert
