// The steps of the encoder's backward, a pass at a time.
#pragma once
#include "encoder_steps.h"

namespace albert {

// Memory of a backward pass, all of it used again by the next.
struct GradientMemory {
  void* grad;       // [tokens][hidden], the gradient on its way down
  void* dropped;    // the same through the dropout; is grad without one
  void* attention;  // [tokens][hidden], the gradient of the attention's output
  void* grad_qkv;   // [tokens][3 hidden]; before that the feed-forward half has its parts here:
  void *wide, *h;   // [largest_part()] of [inner] and of [hidden]
  void* part_inner;  // [largest_part()][inner], where forward kept no inner
  albert_encoder_kept again;  // of one pass, what forward did not keep
  void* again_h;
  void* scratch;
  size_t scratch_bytes, used;
};

struct GradientSteps {
  const EncoderSteps& s;
  const GradientMemory& w;
  const albert_encoder_args& a = s.a;

  int add_weight_gradient(int64_t m, const void* grad, int64_t n, const void* x, int64_t k, float* gradient,
                          float* bias_gradient) const {
    return albert_weight_gradient(a.dtype, m, n, k, grad, n, x, k, gradient, k, bias_gradient, s.scratch,
                                  s.scratch_bytes, s.parallel);
  }

  // grad_y may be w.grad, where the gradient of the sum goes.
  int layer_norm(const float* weight, const void* summed, const void* grad_y, float* grad_weight, float* grad_bias,
                 const albert_dropout* dropout) const {
    albert_layer_norm_args n = s.layer_norm(weight, nullptr);
    n.pre_norm = const_cast<void*>(summed);
    n.grad_y = grad_y;
    n.grad_residual = w.grad;
    if (dropout != nullptr) {
      n.dropout = *dropout;
      n.grad_x = w.dropped;
    }
    n.grad_weight = grad_weight;
    n.grad_ln_bias = grad_bias;
    return albert_layer_norm_backward(&n, s.scratch, s.scratch_bytes, s.parallel);
  }

  // From the gradient of the second sum to that of h, in w.grad.
  int feed_forward(const albert_encoder_layer& layer, const albert_encoder_layer_gradients& g,
                   const albert_encoder_kept& kept) const {
    for (int64_t i = 0; i < s.parts(); ++i) {
      const int64_t begin = s.part_begin(i), count = s.part_begin(i + 1) - begin;
      void* grad = s.row(w.grad, begin, a.hidden);
      if (const int error = albert_layer_norm(a.dtype, s.row(kept.summed, begin, a.hidden), a.hidden, a.dtype, w.h,
                                              a.hidden, count, a.hidden, layer.attention_norm_weight,
                                              layer.attention_norm_bias, a.eps, nullptr, nullptr, s.parallel))
        return error;
      void* inner = s.row(kept.inner, begin, a.inner);  // before the activation; w.wide: after it
      if (inner == nullptr) {
        inner = w.part_inner;
        albert_gemm_args wide = s.product(layer.ffn, count, w.h, w.wide, layer.ffn_bias);
        wide.activation = a.activation;
        wide.pre_activation = inner;
        wide.pre_activation_stride = a.inner;
        if (const int error = s.run(wide)) return error;
      } else {
        albert_bias_gelu_args activation{};
        activation.m = count;
        activation.n = activation.x_stride = activation.y_stride = a.inner;
        activation.dtype = a.dtype;
        activation.activation = a.activation;
        activation.x = inner;
        activation.y = w.wide;
        if (const int error = albert_bias_gelu(&activation, s.parallel)) return error;
      }
      if (const int error =
              add_weight_gradient(count, grad, a.hidden, w.wide, a.inner, g.ffn_output, g.ffn_output_bias))
        return error;
      albert_gemm_args through = s.product(layer.ffn_output_transposed, count, grad, w.wide, nullptr);
      through.activation = a.activation;
      through.activation_input = inner;
      through.activation_input_stride = a.inner;
      if (const int error = s.run(through)) return error;
      if (const int error = add_weight_gradient(count, w.wide, a.inner, w.h, a.hidden, g.ffn, g.ffn_bias)) return error;
      albert_gemm_args back = s.product(layer.ffn_transposed, count, w.wide, grad, nullptr);
      s.add_residual(back, grad);
      if (const int error = s.run(back)) return error;
    }
    return 0;
  }

  // From the gradient of the first sum, in w.grad, to that of the pass's input, in grad_x.
  int attend(int pass, const albert_encoder_layer& layer, const albert_encoder_layer_gradients& g,
             const albert_encoder_kept& kept, void* grad_x) const {
    const int64_t hidden = a.hidden;
    if (const int error =
            add_weight_gradient(a.tokens, w.dropped, hidden, kept.context, hidden, g.dense, g.dense_bias))
      return error;
    if (const int error = s.run(s.product(layer.dense_transposed, a.tokens, w.dropped, w.attention, nullptr)))
      return error;
    const albert_attention_args attention = s.attention(pass, kept.qkv, kept.context, kept.logsumexp);
    albert_attention_gradients t{};
    t.grad_output = w.attention;
    t.grad_output_stride = hidden;
    t.grad_query = w.grad_qkv;
    t.grad_key = s.row(w.grad_qkv, 1, hidden);
    t.grad_value = s.row(w.grad_qkv, 2, hidden);
    t.grad_query_token_stride = t.grad_key_token_stride = t.grad_value_token_stride = 3 * hidden;
    t.grad_query_head_stride = t.grad_key_head_stride = t.grad_value_head_stride = hidden / a.heads;
    if (const int error = albert_attention_backward(&attention, &t, s.scratch, s.scratch_bytes, s.parallel))
      return error;
    if (const int error = add_weight_gradient(a.tokens, w.grad_qkv, 3 * hidden, kept.x, hidden, g.qkv, g.qkv_bias))
      return error;
    albert_gemm_args back = s.product(layer.qkv_transposed, a.tokens, w.grad_qkv, grad_x, nullptr);
    s.add_residual(back, w.grad);
    return s.run(back);
  }

  // What backward needs of a pass and forward did not keep, in w.again.
  int make_again(int pass, const void* x) const {
    const albert_encoder_kept& m = w.again;
    if (const int error = s.attend(pass, {x, m.qkv, m.context, m.logsumexp, m.summed, w.again_h})) return error;
    return s.feed_forward(pass, {w.again_h, m.inner, w.wide, m.output_summed, nullptr});
  }

  int run(int pass, const void* grad_y, const albert_encoder_layer_gradients& g, void* grad_x) const {
    const albert_encoder_layer& layer = a.layers[a.layer_of_pass[pass]];
    const auto at = [&](void* all, int64_t columns) {
      return all == nullptr ? nullptr : static_cast<char*>(all) + pass * s.bytes(a.tokens, columns);
    };
    albert_encoder_kept kept{at(a.kept.x, a.hidden),
                             at(a.kept.qkv, 3 * a.hidden),
                             at(a.kept.context, a.hidden),
                             nullptr,
                             at(a.kept.summed, a.hidden),
                             at(a.kept.output_summed, a.hidden),
                             at(a.kept.inner, a.inner)};
    if (a.kept.logsumexp != nullptr) kept.logsumexp = a.kept.logsumexp + pass * s.logsumexp_size();
    if (kept.qkv == nullptr) {
      if (const int error = make_again(pass, kept.x)) return error;
      void* x = kept.x;
      kept = w.again;
      kept.x = x;
    }
    if (const int error =
            layer_norm(layer.norm_weight, kept.output_summed, grad_y, g.norm_weight, g.norm_bias, nullptr))
      return error;
    if (const int error = feed_forward(layer, g, kept)) return error;
    const albert_dropout dropout = s.hidden_dropout(pass);
    if (const int error =
            layer_norm(layer.attention_norm_weight, kept.summed, w.grad, g.attention_norm_weight,
                       g.attention_norm_bias, a.hidden_dropout_p == 0 ? nullptr : &dropout))
      return error;
    return attend(pass, layer, g, kept, grad_x);
  }
};

}  // namespace albert
