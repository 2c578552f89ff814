// The C interface: checks arguments, then calls the kernels of the machine's instruction set.
#include "attention_kernels.h"
#include "trace.h"

namespace albert {
namespace {

bool is_float(int dtype) { return dtype == ALBERT_F32 || dtype == ALBERT_BF16; }

bool valid_offsets(const int32_t* offsets, int64_t batch, int64_t tokens) {
  if (offsets == nullptr || offsets[0] != 0 || offsets[batch] > tokens) return false;
  for (int64_t r = 0; r < batch; ++r)
    if (offsets[r + 1] < offsets[r]) return false;
  return true;
}

bool valid_strides(int64_t token_stride, int64_t head_stride) { return token_stride >= 0 && head_stride >= 0; }

// Heads side by side within a token, or tokens within a head; then no two elements that are written share an address.
bool disjoint(const albert_attention_args& a, int64_t tokens, int64_t token_stride, int64_t head_stride) {
  const bool heads_inside = (a.heads <= 1 || head_stride >= a.head_dim) &&
                            (tokens <= 1 || token_stride >= (a.heads - 1) * head_stride + a.head_dim);
  const bool tokens_inside = (tokens <= 1 || token_stride >= a.head_dim) &&
                             (a.heads <= 1 || head_stride >= (tokens - 1) * token_stride + a.head_dim);
  return heads_inside || tokens_inside;
}

int check(const albert_attention_args* args, const Isa& isa, Attention& out) {
  if (args == nullptr) return ALBERT_BAD_ARGUMENT;
  const albert_attention_args& a = *args;
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (!is_float(a.dtype) || a.batch < 0 || a.heads < 0 || a.head_dim < 1 || a.head_dim > 128 || a.tokens_q < 0 ||
      a.tokens_k < 0)
    return ALBERT_BAD_ARGUMENT;
  if (!valid_offsets(a.cu_seqlens_q, a.batch, a.tokens_q) || !valid_offsets(a.cu_seqlens_k, a.batch, a.tokens_k))
    return ALBERT_BAD_ARGUMENT;
  if (!valid_strides(a.query_token_stride, a.query_head_stride) ||
      !valid_strides(a.key_token_stride, a.key_head_stride) ||
      !valid_strides(a.value_token_stride, a.value_head_stride))
    return ALBERT_BAD_ARGUMENT;
  if (a.tokens_q > 1 && a.output_stride < a.heads * a.head_dim) return ALBERT_BAD_ARGUMENT;
  if (a.bias != nullptr && (!is_float(a.bias_dtype) || a.bias_batch_stride < 0 || a.bias_head_stride < 0 ||
                            a.bias_query_stride < 0))
    return ALBERT_BAD_ARGUMENT;
  if (!(a.dropout_p >= 0.0 && a.dropout_p < 1.0)) return ALBERT_BAD_ARGUMENT;
  if (a.quantized && (a.dropout_p > 0.0 || a.logsumexp != nullptr)) return ALBERT_BAD_ARGUMENT;

  out.args = a;
  out.unit = a.dtype == ALBERT_BF16 && isa.bf16 ? Unit::bf16x2 : Unit::f32;
  out.quantized = a.quantized && isa.vnni && a.scale > 0;
  const double threshold = __builtin_nearbyint((1.0 - a.dropout_p) * 4294967296.0);
  out.dropout = threshold < 4294967296.0;  // a probability too small to drop anything switches it off
  out.keep_threshold = out.dropout ? static_cast<uint32_t>(threshold) : 0;
  out.keep_scale = out.dropout ? static_cast<float>(1.0 / (1.0 - a.dropout_p)) : 1.0f;
  return 0;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0; }

// Of the scores and of what they weigh. A causal mask spares none.
int64_t operations(const albert_attention_args& a) {
  int64_t pairs = 0;
  for (int64_t r = 0; r < a.batch; ++r)
    pairs += static_cast<int64_t>(a.cu_seqlens_q[r + 1] - a.cu_seqlens_q[r]) *
             (a.cu_seqlens_k[r + 1] - a.cu_seqlens_k[r]);
  return 4 * pairs * a.heads * a.head_dim;
}

}  // namespace
}  // namespace albert

using namespace albert;

size_t albert_attention_workspace_bytes(const albert_attention_args* args, int threads) {
  const Isa isa = detect_isa();
  Attention a;
  if (check(args, isa, a) != 0) return 0;
  if (threads < 1) threads = 1;
  if (a.quantized) return avx512::quantized_attention_workspace_bytes(a, threads);
  return isa.avx512 ? avx512::attention_workspace_bytes(a, threads) : avx2::attention_workspace_bytes(a, threads);
}

int albert_attention(const albert_attention_args* args, void* workspace, size_t workspace_bytes,
                     const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  Attention a;
  if (const int error = check(args, isa, a)) return error;
  if (!aligned(workspace)) return ALBERT_UNALIGNED;
  if (workspace_bytes < albert_attention_workspace_bytes(args, thread_count(parallel))) return ALBERT_SMALL_WORKSPACE;
  if (a.args.heads == 0) return 0;
  const auto forward = a.quantized  ? avx512::quantized_attention
                       : isa.avx512 ? avx512::attention_forward
                                    : avx2::attention_forward;
  Step step(ALBERT_SPAN_ATTENTION, a.args.tokens_q, a.args.heads, a.args.head_dim);
  step.count([&] { return operations(a.args); });
  forward(a, static_cast<char*>(workspace), parallel);
  return 0;
}

size_t albert_attention_backward_workspace_bytes(const albert_attention_args* args, int threads) {
  const Isa isa = detect_isa();
  Attention a;
  if (check(args, isa, a) != 0) return 0;
  if (threads < 1) threads = 1;
  return isa.avx512 ? avx512::attention_backward_workspace_bytes(a, threads)
                    : avx2::attention_backward_workspace_bytes(a, threads);
}

int albert_attention_backward(const albert_attention_args* args, const albert_attention_gradients* gradients,
                              void* workspace, size_t workspace_bytes, const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  Attention a;
  if (const int error = check(args, isa, a)) return error;
  if (gradients == nullptr) return ALBERT_BAD_ARGUMENT;
  const albert_attention_gradients& g = *gradients;
  if (a.args.tokens_q > 0 && a.args.heads > 0 && a.args.logsumexp == nullptr) return ALBERT_BAD_ARGUMENT;
  if (a.args.tokens_q > 1 && g.grad_output_stride < a.args.heads * a.args.head_dim) return ALBERT_BAD_ARGUMENT;
  if (!disjoint(a.args, a.args.tokens_q, g.grad_query_token_stride, g.grad_query_head_stride) ||
      !disjoint(a.args, a.args.tokens_k, g.grad_key_token_stride, g.grad_key_head_stride) ||
      !disjoint(a.args, a.args.tokens_k, g.grad_value_token_stride, g.grad_value_head_stride))
    return ALBERT_BAD_ARGUMENT;
  if (!aligned(workspace)) return ALBERT_UNALIGNED;
  if (workspace_bytes < albert_attention_backward_workspace_bytes(args, thread_count(parallel)))
    return ALBERT_SMALL_WORKSPACE;
  if (a.args.heads == 0) return 0;
  Step step(ALBERT_SPAN_ATTENTION_BACKWARD, a.args.tokens_q, a.args.heads, a.args.head_dim);
  step.count([&] { return 2 * operations(a.args); });
  (isa.avx512 ? avx512::attention_backward : avx2::attention_backward)(a, g, static_cast<char*>(workspace), parallel);
  return 0;
}
