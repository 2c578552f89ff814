// The steps that the encoder's passes are made of, forward and backward: each fills in the arguments of one kernel.
// Plain C++: the kernels choose their instruction set.
#pragma once
#include "attention.h"
#include "encoder.h"
#include "pack_weight.h"
#include "token_ops.h"

namespace albert {

// The feed-forward half goes by this many tokens: the wide matrix of so many stays in a common L3, and weights are
// read again for each product's chunk of rows anyway.
constexpr int64_t kFeedForwardTokens = 1024;

struct EncoderSteps {
  const albert_encoder_args& a;
  const albert_parallel* parallel;
  void* scratch;  // of one kernel at a time
  size_t scratch_bytes;
  float* corrected = nullptr;  // [corrections()], of one pass

  // Of the model's format unless another is named.
  size_t bytes(int64_t rows, int64_t columns) const { return bytes(rows, columns, a.dtype); }
  static size_t bytes(int64_t rows, int64_t columns, int dtype) {
    return static_cast<size_t>(rows * columns) * (dtype == ALBERT_F32 ? 4 : 2);
  }
  char* row(const void* matrix, int64_t row, int64_t columns) const { return this->row(matrix, row, columns, a.dtype); }
  static char* row(const void* matrix, int64_t row, int64_t columns, int dtype) {
    return matrix == nullptr ? nullptr : static_cast<char*>(const_cast<void*>(matrix)) + bytes(row, columns, dtype);
  }

  // What lies between a pass's products: query, key and value, the attention's output, and what the activation leaves.
  // Products of 8 bits outrun the memory that float32 would take, and round it to as few anyway. Without VNNI they don't.
  int between() const {
    const auto& qkv = *static_cast<const PackedWeight*>(a.layers[0].qkv);
    const bool kept = a.kept.x != nullptr || a.kept.qkv != nullptr;
    return qkv.unit == Unit::u8s8x4 && !kept ? ALBERT_BF16 : a.dtype;
  }

  // ---- parts of the feed-forward half ----
  int64_t parts() const { return (a.tokens + kFeedForwardTokens - 1) / kFeedForwardTokens; }
  int64_t part_begin(int64_t i) const { return a.tokens * i / parts(); }
  int64_t largest_part() const { return a.tokens == 0 ? 0 : (a.tokens + parts() - 1) / parts(); }

  // ---- products: y = x weight^T + bias, then more that the caller fills in ----
  albert_gemm_args product(const void* weight, int64_t m, const void* x, void* y, const float* bias) const {
    const auto& w = *static_cast<const PackedWeight*>(weight);
    albert_gemm_args g{};
    g.m = m;
    g.x = x;
    g.x_stride = w.k;
    g.x_dtype = g.y_dtype = a.dtype;
    g.weight = weight;
    g.y = y;
    g.y_stride = w.n;
    g.bias = bias;
    return g;
  }
  // A bias with the pass's correction, which begins at `offset` among them.
  int64_t corrections() const { return 5 * a.hidden + a.inner; }
  const float* bias(const float* own, int pass, int64_t offset, int64_t n) const {
    if (a.corrections == nullptr) return own;
    const float* add = a.corrections + pass * corrections() + offset;
    for (int64_t i = 0; i < n; ++i) corrected[offset + i] = own[i] + add[i];
    return corrected + offset;
  }
  void add_residual(albert_gemm_args& g, const void* residual) const {
    g.residual = residual;
    g.residual_stride = g.y_stride;
  }
  void add_layer_norm(albert_gemm_args& g, const float* weight, const float* bias, void* summed) const {
    g.ln_weight = weight;
    g.ln_bias = bias;
    g.ln_eps = a.eps;
    g.pre_norm = summed;
    g.pre_norm_stride = g.y_stride;
  }
  int run(const albert_gemm_args& g) const { return albert_gemm(&g, scratch, scratch_bytes, parallel); }

  // ---- attention ----
  int64_t logsumexp_size() const { return (a.bias == nullptr ? 1 : 2) * a.heads * a.tokens; }
  albert_attention_args attention(int pass, const void* qkv, void* context, float* logsumexp) const {
    albert_attention_args t{};
    t.dtype = between();
    t.batch = a.batch;
    t.heads = a.heads;
    t.head_dim = a.hidden / a.heads;
    t.tokens_q = t.tokens_k = a.tokens;
    t.query = qkv;
    t.key = row(qkv, 1, a.hidden, t.dtype);
    t.value = row(qkv, 2, a.hidden, t.dtype);
    t.query_token_stride = t.key_token_stride = t.value_token_stride = 3 * a.hidden;
    t.query_head_stride = t.key_head_stride = t.value_head_stride = t.head_dim;
    t.cu_seqlens_q = t.cu_seqlens_k = a.cu_seqlens;
    t.scale = 1.0f / __builtin_sqrtf(static_cast<float>(t.head_dim));
    t.bias = a.bias;
    t.bias_dtype = a.bias_dtype;
    t.bias_batch_stride = a.bias_batch_stride;
    t.bias_head_stride = a.bias_head_stride;
    t.bias_query_stride = a.bias_query_stride;
    t.dropout_p = a.attention_dropout_p;
    t.seed = a.seed;
    t.site = static_cast<uint32_t>(1 + 2 * pass);
    t.output = context;
    t.output_stride = a.hidden;
    t.logsumexp = logsumexp;
    const void* qkv_weight = a.layers[a.layer_of_pass[pass]].qkv;
    t.quantized = static_cast<const PackedWeight*>(qkv_weight)->dtype == ALBERT_INT8 && a.kept.logsumexp == nullptr &&
                  a.attention_dropout_p == 0;
    return t;
  }

  // ---- dropout + residual + LayerNorm where the product cannot do it, and LayerNorm's gradient ----
  albert_layer_norm_args layer_norm(const float* weight, const float* bias) const {
    albert_layer_norm_args n{};
    n.m = a.tokens;
    n.n = a.hidden;
    n.x_dtype = n.residual_dtype = a.dtype;
    n.x_stride = n.residual_stride = n.y_stride = n.pre_norm_stride = a.hidden;
    n.grad_y_stride = n.grad_residual_stride = n.grad_x_stride = a.hidden;
    n.weight = weight;
    n.ln_bias = bias;
    n.eps = a.eps;
    return n;
  }
  albert_dropout hidden_dropout(int pass) const {
    return {a.hidden_dropout_p, a.seed, static_cast<uint32_t>(2 + 2 * pass), a.cu_seqlens, a.batch};
  }

  // ---- forward, by halves ----
  struct Attend {
    const void* x;
    void *qkv, *context;
    float* logsumexp;  // may be null, as summed
    void *summed, *h;
  };
  // h may lie where qkv does.
  int attend(int pass, const Attend& m) const {
    const albert_encoder_layer& layer = a.layers[a.layer_of_pass[pass]];
    const float* qkv_bias = bias(layer.qkv_bias, pass, 0, 3 * a.hidden);
    albert_gemm_args qkv = product(layer.qkv, a.tokens, m.x, m.qkv, qkv_bias);
    qkv.y_dtype = between();
    qkv.next_weight = layer.dense;
    if (const int error = run(qkv)) return error;
    const albert_attention_args attention_args = attention(pass, m.qkv, m.context, m.logsumexp);
    if (const int error = albert_attention(&attention_args, scratch, scratch_bytes, parallel)) return error;
    const float* dense_bias = bias(layer.dense_bias, pass, 3 * a.hidden, a.hidden);
    albert_gemm_args dense = product(layer.dense, a.tokens, m.context, m.h, dense_bias);
    dense.x_dtype = between();
    dense.next_weight = layer.ffn;
    if (a.hidden_dropout_p == 0) {
      add_residual(dense, m.x);
      add_layer_norm(dense, layer.attention_norm_weight, layer.attention_norm_bias, m.summed);
      return run(dense);
    }
    if (const int error = run(dense)) return error;
    albert_layer_norm_args norm = layer_norm(layer.attention_norm_weight, layer.attention_norm_bias);
    norm.dropout = hidden_dropout(pass);
    norm.x = norm.y = m.h;
    norm.residual = m.x;
    norm.pre_norm = m.summed;
    return albert_dropout_add_layer_norm(&norm, parallel);
  }

  struct FeedForward {
    const void* h;
    void* inner;      // [tokens][inner], or null
    void* activated;  // [largest_part()][inner]
    void *summed, *y;  // one of them may be null
  };
  int feed_forward(int pass, const FeedForward& m) const {
    const albert_encoder_layer& layer = a.layers[a.layer_of_pass[pass]];
    const float* ffn_bias = bias(layer.ffn_bias, pass, 4 * a.hidden, a.inner);
    const float* ffn_output_bias = bias(layer.ffn_output_bias, pass, 4 * a.hidden + a.inner, a.hidden);
    for (int64_t i = 0; i < parts(); ++i) {
      const int64_t begin = part_begin(i), count = part_begin(i + 1) - begin;
      const void* h = row(m.h, begin, a.hidden);
      albert_gemm_args wide = product(layer.ffn, count, h, m.activated, ffn_bias);
      wide.y_dtype = between();
      wide.activation = a.activation;
      wide.pre_activation = row(m.inner, begin, a.inner);
      wide.pre_activation_stride = a.inner;
      wide.next_weight = layer.ffn_output;
      if (const int error = run(wide)) return error;
      void *summed = row(m.summed, begin, a.hidden), *y = row(m.y, begin, a.hidden);
      albert_gemm_args narrow =
          product(layer.ffn_output, count, m.activated, y != nullptr ? y : summed, ffn_output_bias);
      narrow.x_dtype = between();
      add_residual(narrow, h);
      if (i + 1 < parts() || pass + 1 < a.passes)
        narrow.next_weight = i + 1 < parts() ? layer.ffn : a.layers[a.layer_of_pass[pass + 1]].qkv;
      if (y != nullptr) add_layer_norm(narrow, layer.norm_weight, layer.norm_bias, summed);
      if (const int error = run(narrow)) return error;
    }
    return 0;
  }
};

}  // namespace albert
