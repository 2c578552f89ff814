// The entry points of masked_lm_loss.h that exist once per instruction set; masked_lm_loss_api.cpp checks and picks.
#pragma once
#include "masked_lm_loss.h"

namespace albert {

// bf16_dot: the machine multiplies bfloat16.
#define ALBERT_DECLARE_KERNELS(isa, linkage)                                                                         \
  namespace isa {                                                                                                    \
  linkage size_t masked_lm_loss_workspace_bytes(const albert_masked_lm_loss_args& args, bool bf16_dot, int threads); \
  linkage void masked_lm_loss(const albert_masked_lm_loss_args& args, bool bf16_dot, char* workspace,                \
                              const albert_parallel* parallel);                                                      \
  linkage size_t masked_lm_loss_backward_workspace_bytes(const albert_masked_lm_loss_args& args, bool bf16_dot,      \
                                                         int threads);                                               \
  linkage void masked_lm_loss_backward(const albert_masked_lm_loss_args& args, bool bf16_dot, char* workspace,       \
                                       const albert_parallel* parallel);                                             \
  }
ALBERT_DECLARE_KERNELS(avx2, )
ALBERT_DECLARE_KERNELS(avx512, [[gnu::weak]])
#undef ALBERT_DECLARE_KERNELS

}  // namespace albert
