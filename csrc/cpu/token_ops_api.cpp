// The C interface of token_ops.h: checks arguments, then calls the kernels of the machine's instruction set.
#include "isa.h"
#include "token_kernels.h"
#include "trace.h"

namespace albert {
namespace {

bool is_float(int dtype) { return dtype == ALBERT_F32 || dtype == ALBERT_BF16; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 64 == 0; }
bool strided(const void* p, int64_t rows, int64_t stride, int64_t columns) {
  return p == nullptr || rows <= 1 || stride >= columns;
}

bool valid(const albert_dropout& d, int64_t tokens) {
  if (!(d.p >= 0 && d.p < 1)) return false;
  if (d.cu_seqlens == nullptr) return true;
  if (d.batch < 0 || d.cu_seqlens[0] != 0 || d.cu_seqlens[d.batch] > tokens) return false;
  for (int64_t i = 0; i < d.batch; ++i)
    if (d.cu_seqlens[i] > d.cu_seqlens[i + 1]) return false;
  return true;
}

bool valid(const albert_layer_norm_args& a) {
  return a.m >= 0 && a.n >= 0 && is_float(a.x_dtype) && is_float(a.residual_dtype) && valid(a.dropout, a.m) &&
         strided(a.x, a.m, a.x_stride, a.n) && strided(a.residual, a.m, a.residual_stride, a.n) &&
         strided(a.y, a.m, a.y_stride, a.n) && strided(a.pre_norm, a.m, a.pre_norm_stride, a.n) &&
         strided(a.grad_y, a.m, a.grad_y_stride, a.n) && strided(a.grad_x, a.m, a.grad_x_stride, a.n) &&
         strided(a.grad_residual, a.m, a.grad_residual_stride, a.n) && (a.mean == nullptr) == (a.rstd == nullptr);
}

bool valid(const albert_bias_gelu_args& a) {
  return a.m >= 0 && a.n >= 0 && is_float(a.dtype) && strided(a.x, a.m, a.x_stride, a.n) &&
         strided(a.y, a.m, a.y_stride, a.n) && strided(a.grad_y, a.m, a.grad_y_stride, a.n) &&
         strided(a.grad_x, a.m, a.grad_x_stride, a.n) &&
         (a.activation == ALBERT_GELU_TANH || a.activation == ALBERT_GELU_ERF || a.activation == ALBERT_RELU);
}

template <class Id>
bool within(const void* ids, int64_t tokens, int64_t rows) {
  bool inside = true;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t id = static_cast<const Id*>(ids)[i];
    inside &= 0 <= id && id < rows;
  }
  return inside;
}

bool valid(const albert_embedding& e, int64_t tokens, int64_t size) {
  if (!strided(e.table, e.rows, e.stride, size) || !strided(e.gradient, e.rows, e.gradient_stride, size)) return false;
  if (e.id_bytes == 8) return within<int64_t>(e.ids, tokens, e.rows);
  return e.id_bytes == 4 && within<int32_t>(e.ids, tokens, e.rows);
}

bool valid(const albert_embed_args& a) {
  if (a.tokens < 0 || !valid(a.dropout, a.tokens)) return false;
  const int64_t used = a.dropout.cu_seqlens == nullptr ? a.tokens : a.dropout.cu_seqlens[a.dropout.batch];
  return a.size >= 0 && is_float(a.dtype) && strided(a.inputs, a.tokens, a.inputs_stride, a.size) &&
         strided(a.y, a.tokens, a.y_stride, a.size) && strided(a.grad_y, a.tokens, a.grad_y_stride, a.size) &&
         strided(a.grad_inputs, a.tokens, a.grad_inputs_stride, a.size) &&
         (a.inputs != nullptr || valid(a.word, used, a.size)) && valid(a.position, used, a.size) &&
         valid(a.token_type, used, a.size);
}

// What all functions have in common. f is called where there is something to do.
template <class Args, class Function>
int checked(const Args* args, int64_t columns, const void* workspace, size_t bytes, size_t needed, Function f) {
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (args == nullptr || !valid(*args)) return ALBERT_BAD_ARGUMENT;
  if (needed > 0 && !aligned(workspace)) return ALBERT_UNALIGNED;
  if (bytes < needed) return ALBERT_SMALL_WORKSPACE;
  if (columns > 0) f(isa.avx512);
  return 0;
}

}  // namespace
}  // namespace albert

using namespace albert;

int albert_dropout_add_layer_norm(const albert_layer_norm_args* args, const albert_parallel* parallel) {
  return checked(args, args == nullptr ? 0 : args->n, nullptr, 0, 0, [&](bool wide) {
    const Step step(ALBERT_SPAN_LAYER_NORM, args->m, args->n);
    (wide ? avx512::dropout_add_layer_norm : avx2::dropout_add_layer_norm)(*args, parallel);
  });
}

size_t albert_layer_norm_backward_workspace_bytes(const albert_layer_norm_args* args, int threads) {
  if (args == nullptr || !detect_isa().avx2 || !valid(*args)) return 0;
  return avx2::layer_norm_backward_workspace_bytes(*args, threads < 1 ? 1 : threads);
}

int albert_layer_norm_backward(const albert_layer_norm_args* args, void* workspace, size_t workspace_bytes,
                               const albert_parallel* parallel) {
  const size_t needed = albert_layer_norm_backward_workspace_bytes(args, thread_count(parallel));
  return checked(args, args == nullptr ? 0 : args->n, workspace, workspace_bytes, needed, [&](bool wide) {
    const Step step(ALBERT_SPAN_LAYER_NORM_BACKWARD, args->m, args->n);
    (wide ? avx512::layer_norm_backward : avx2::layer_norm_backward)(*args, static_cast<char*>(workspace), parallel);
  });
}

int albert_bias_gelu(const albert_bias_gelu_args* args, const albert_parallel* parallel) {
  return checked(args, args == nullptr ? 0 : args->n, nullptr, 0, 0, [&](bool wide) {
    const Step step(ALBERT_SPAN_ACTIVATION, args->m, args->n);
    (wide ? avx512::bias_gelu : avx2::bias_gelu)(*args, parallel);
  });
}

size_t albert_bias_gelu_backward_workspace_bytes(const albert_bias_gelu_args* args, int) {
  if (args == nullptr || !detect_isa().avx2 || !valid(*args)) return 0;
  return avx2::bias_gelu_backward_workspace_bytes(*args);
}

int albert_bias_gelu_backward(const albert_bias_gelu_args* args, void* workspace, size_t workspace_bytes,
                              const albert_parallel* parallel) {
  const size_t needed = albert_bias_gelu_backward_workspace_bytes(args, thread_count(parallel));
  return checked(args, args == nullptr ? 0 : args->n, workspace, workspace_bytes, needed, [&](bool wide) {
    const Step step(ALBERT_SPAN_ACTIVATION_BACKWARD, args->m, args->n);
    (wide ? avx512::bias_gelu_backward : avx2::bias_gelu_backward)(*args, static_cast<char*>(workspace), parallel);
  });
}

int albert_embed_layer_norm(const albert_embed_args* args, const albert_parallel* parallel) {
  return checked(args, args == nullptr ? 0 : args->size, nullptr, 0, 0, [&](bool wide) {
    const Step step(ALBERT_SPAN_EMBEDDINGS, args->tokens, args->size);
    (wide ? avx512::embed_layer_norm : avx2::embed_layer_norm)(*args, parallel);
  });
}

size_t albert_embed_layer_norm_backward_workspace_bytes(const albert_embed_args* args, int threads) {
  if (args == nullptr || !detect_isa().avx2 || !valid(*args)) return 0;
  return avx2::embed_layer_norm_backward_workspace_bytes(*args, threads < 1 ? 1 : threads);
}

int albert_embed_layer_norm_backward(const albert_embed_args* args, void* workspace, size_t workspace_bytes,
                                     const albert_parallel* parallel) {
  const size_t needed = albert_embed_layer_norm_backward_workspace_bytes(args, thread_count(parallel));
  return checked(args, args == nullptr ? 0 : args->size, workspace, workspace_bytes, needed, [&](bool wide) {
    const Step step(ALBERT_SPAN_EMBEDDINGS_BACKWARD, args->tokens, args->size);
    (wide ? avx512::embed_layer_norm_backward : avx2::embed_layer_norm_backward)(*args, static_cast<char*>(workspace),
                                                                                parallel);
  });
}
