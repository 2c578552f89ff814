// How much scratch the encoder's kernels need, and the workspace that it is cut from.
#pragma once
#include "encoder_steps.h"

namespace albert {

inline size_t largest(size_t a, size_t b) { return a > b ? a : b; }

// Scratch of any product of [m][*] by one of the weights, with the epilogues used here.
inline size_t product_scratch(const EncoderSteps& s, const void* weight, int64_t m, bool norm, int threads) {
  albert_gemm_args g = s.product(weight, m, nullptr, nullptr, nullptr);
  size_t most = albert_gemm_workspace_bytes(&g, threads);
  if (!norm) return most;
  static const float vector = 0;  // for its address
  s.add_layer_norm(g, &vector, &vector, nullptr);
  return largest(most, albert_gemm_workspace_bytes(&g, threads));
}

// Scratch of a pass's forward kernels.
inline size_t forward_scratch(const EncoderSteps& s, int threads) {
  const albert_encoder_args& a = s.a;
  const albert_attention_args attention = s.attention(0, nullptr, nullptr, nullptr);
  size_t most = albert_attention_workspace_bytes(&attention, threads);
  for (int i = 0; i < a.layer_count; ++i) {
    const albert_encoder_layer& layer = a.layers[i];
    most = largest(most, product_scratch(s, layer.qkv, a.tokens, false, threads));
    most = largest(most, product_scratch(s, layer.dense, a.tokens, true, threads));
    for (int64_t part = s.largest_part() - 1; part <= s.largest_part(); ++part) {
      if (part < 0) continue;
      most = largest(most, product_scratch(s, layer.ffn, part, false, threads));
      most = largest(most, product_scratch(s, layer.ffn_output, part, true, threads));
    }
  }
  return round_up(most, kCacheLine);
}

// Hands out parts of the workspace, each on a cache line of its own; with a null base it only counts.
class Memory {
 public:
  explicit Memory(void* base) : base_(static_cast<char*>(base)) {}
  char* take(size_t bytes) {
    char* p = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(bytes, kCacheLine);
    return p;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// What is wrong with the arguments, or 0.
int check_encoder(const albert_encoder_args* args, bool backward);  // encoder.cpp

}  // namespace albert
