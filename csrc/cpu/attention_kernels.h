// The entry points that exist once per instruction set; attention_api.cpp checks arguments and picks one.
#pragma once
#include "attention.h"
#include "pack_weight.h"

namespace albert {

// Checked arguments, and what follows from them.
struct Attention {
  albert_attention_args args;
  Unit unit;  // how the products are computed: f32, or bf16x2 where the machine multiplies bfloat16
  bool quantized;
  bool dropout;
  uint32_t keep_threshold;  // a probability is kept where its random word is below
  float keep_scale;         // and then multiplied by this
};

#define ALBERT_DECLARE_ATTENTION(isa, linkage)                                                                  \
  namespace isa {                                                                                               \
  linkage size_t attention_workspace_bytes(const Attention& attention, int threads);                            \
  linkage void attention_forward(const Attention& attention, char* workspace, const albert_parallel* parallel); \
  linkage size_t attention_backward_workspace_bytes(const Attention& attention, int threads);                   \
  linkage void attention_backward(const Attention& attention, const albert_attention_gradients& gradients,      \
                                  char* workspace, const albert_parallel* parallel);                            \
  }
ALBERT_DECLARE_ATTENTION(avx2, )
ALBERT_DECLARE_ATTENTION(avx512, [[gnu::weak]])
#undef ALBERT_DECLARE_ATTENTION

namespace avx512 {  // with VNNI
[[gnu::weak]] size_t quantized_attention_workspace_bytes(const Attention& attention, int threads);
[[gnu::weak]] void quantized_attention(const Attention& attention, char* workspace, const albert_parallel* parallel);
}  // namespace avx512

}  // namespace albert
