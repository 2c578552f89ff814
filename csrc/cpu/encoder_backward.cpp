// The encoder's backward: the passes in reverse, gradients of activations in the dtype of the activations, those of
// the parameters summed in float32 where the caller has them. What forward did not keep is made again.
#include <cstring>

#include "encoder_gradient_steps.h"
#include "encoder_memory.h"
#include "trace.h"

namespace albert {
namespace {

size_t backward_scratch(const EncoderSteps& s, bool forward_too, int threads) {
  const albert_encoder_args& a = s.a;
  size_t most = forward_too ? forward_scratch(s, threads) : 0;
  const albert_attention_args attention = s.attention(0, nullptr, nullptr, nullptr);
  most = largest(most, albert_attention_backward_workspace_bytes(&attention, threads));
  const albert_layer_norm_args norm = s.layer_norm(nullptr, nullptr);
  most = largest(most, albert_layer_norm_backward_workspace_bytes(&norm, threads));
  const auto weight_gradient = [&](int64_t m, int64_t n, int64_t k) {
    most = largest(most, albert_weight_gradient_workspace_bytes(a.dtype, m, n, k));
  };
  weight_gradient(a.tokens, 3 * a.hidden, a.hidden);
  for (int i = 0; i < a.layer_count; ++i) {
    const albert_encoder_layer& layer = a.layers[i];
    most = largest(most, product_scratch(s, layer.qkv_transposed, a.tokens, false, threads));
    most = largest(most, product_scratch(s, layer.dense_transposed, a.tokens, false, threads));
    for (int64_t part = s.largest_part() - 1; part <= s.largest_part(); ++part) {
      if (part < 0) continue;
      weight_gradient(part, a.inner, a.hidden);
      weight_gradient(part, a.hidden, a.inner);
      most = largest(most, product_scratch(s, layer.ffn, part, false, threads));
      most = largest(most, product_scratch(s, layer.ffn_transposed, part, false, threads));
      most = largest(most, product_scratch(s, layer.ffn_output_transposed, part, false, threads));
    }
  }
  return round_up(most, kCacheLine);
}

GradientMemory carve(const albert_encoder_args& a, void* base, int threads) {
  const EncoderSteps s{a, nullptr, nullptr, 0};
  Memory memory(base);
  GradientMemory w{};
  const size_t state = s.bytes(a.tokens, a.hidden);
  const size_t part_wide = round_up(s.bytes(s.largest_part(), a.inner), kCacheLine);
  w.grad = memory.take(state);
  w.dropped = a.hidden_dropout_p == 0 ? w.grad : memory.take(state);
  w.attention = memory.take(state);
  char* shared = memory.take(largest(s.bytes(a.tokens, 3 * a.hidden), part_wide + s.bytes(s.largest_part(), a.hidden)));
  w.grad_qkv = w.wide = shared;
  w.h = base == nullptr ? nullptr : shared + part_wide;
  const bool all_again = a.kept.qkv == nullptr;
  if (all_again) {
    w.again.qkv = memory.take(s.bytes(a.tokens, 3 * a.hidden));
    w.again.context = memory.take(state);
    w.again.logsumexp = reinterpret_cast<float*>(memory.take(static_cast<size_t>(s.logsumexp_size()) * sizeof(float)));
    w.again.summed = memory.take(state);
    w.again.output_summed = memory.take(state);
    w.again.inner = memory.take(s.bytes(a.tokens, a.inner));
    w.again_h = memory.take(state);
  } else if (a.kept.inner == nullptr) {
    w.part_inner = memory.take(part_wide);
  }
  w.scratch_bytes = backward_scratch(s, all_again, threads);
  w.scratch = memory.take(w.scratch_bytes);
  w.used = memory.used();
  return w;
}

// y += x
void add(int dtype, void* y, const void* x, int64_t count, const albert_parallel* parallel) {
  const int tasks = thread_count(parallel);
  auto task = [&](int i) {
    const int64_t begin = count * i / tasks, end = count * (i + 1) / tasks;
    if (dtype == ALBERT_F32) {
      float* out = static_cast<float*>(y);
      const float* in = static_cast<const float*>(x);
      for (int64_t j = begin; j < end; ++j) out[j] += in[j];
      return;
    }
    uint16_t* out = static_cast<uint16_t*>(y);
    const uint16_t* in = static_cast<const uint16_t*>(x);
    const auto widen = [](uint16_t half) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    };
    for (int64_t j = begin; j < end; ++j) {
      const float sum = widen(out[j]) + widen(in[j]);
      uint32_t bits;
      std::memcpy(&bits, &sum, sizeof bits);
      out[j] = static_cast<uint16_t>(sum != sum ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
  };
  parallel_tasks(parallel, tasks, task);
}

}  // namespace
}  // namespace albert

using namespace albert;

size_t albert_encoder_backward_workspace_bytes(const albert_encoder_args* args, int threads) {
  return check_encoder(args, true) != 0 ? 0 : carve(*args, nullptr, threads < 1 ? 1 : threads).used;
}

int albert_encoder_backward(const albert_encoder_args* args, const albert_encoder_gradients* gradients,
                            void* workspace, size_t workspace_bytes, const albert_parallel* parallel) {
  if (const int error = check_encoder(args, true)) return error;
  const albert_encoder_args& a = *args;
  if (a.tokens == 0) return 0;
  if (reinterpret_cast<uintptr_t>(workspace) % kCacheLine != 0) return ALBERT_UNALIGNED;
  const GradientMemory w = carve(a, workspace, thread_count(parallel));
  if (workspace_bytes < w.used) return ALBERT_SMALL_WORKSPACE;
  const EncoderSteps s{a, parallel, w.scratch, w.scratch_bytes};
  const GradientSteps backward{s, w};
  const char* grad_output = static_cast<const char*>(gradients->grad_output);
  const size_t state = s.bytes(a.tokens, a.hidden);
  const void* grad_y = a.all_states ? grad_output + a.passes * state : grad_output;
  for (int pass = a.passes - 1; pass >= 0; --pass) {
    const PassOfSteps traced(pass);
    void* grad_x = pass == 0 ? gradients->grad_input : w.grad;
    if (const int error = backward.run(pass, grad_y, gradients->layers[a.layer_of_pass[pass]], grad_x)) return error;
    if (a.all_states) add(a.dtype, grad_x, grad_output + pass * state, a.tokens * a.hidden, parallel);
    grad_y = grad_x;
  }
  return 0;
}
