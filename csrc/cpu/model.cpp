// Embeddings, projection, encoder and pooler, each by its own function; the encoder's output is all of its states.
#include "model.h"

#include <cstring>

#include "encoder_memory.h"

namespace albert {
namespace {

// Its products go by the encoder's steps: bytes, operands and scratch are the same.
albert_gemm_args projection(const EncoderSteps& s, const albert_model_args& a, const void* embedded) {
  albert_gemm_args g = s.product(a.projection, s.a.tokens, embedded, s.a.output, a.projection_bias);
  g.next_weight = s.a.layers[s.a.layer_of_pass[0]].qkv;
  return g;
}

albert_gemm_args pooler(const EncoderSteps& s, const albert_model_args& a, const void* first) {
  albert_gemm_args g = s.product(a.pooler, s.a.batch, first, a.pooled, a.pooler_bias);
  g.activation = ALBERT_TANH;
  return g;
}

albert_encoder_args encoder(const albert_model_args& a) {
  albert_encoder_args e = a.encoder;
  e.input = e.output;
  return e;
}

struct Workspace {
  void *embedded, *first, *scratch;
  size_t scratch_bytes, used;
};

Workspace carve(const albert_model_args& a, void* base, int threads) {
  const albert_encoder_args e = encoder(a);
  const EncoderSteps s{e, nullptr, nullptr, 0};
  Memory memory(base);
  Workspace w{};
  if (a.embedded == nullptr) w.embedded = memory.take(s.bytes(e.tokens, a.embed.size));
  const albert_gemm_args into = projection(s, a, nullptr);
  w.scratch_bytes = largest(albert_encoder_workspace_bytes(&e, threads), albert_gemm_workspace_bytes(&into, threads));
  if (a.pooler != nullptr) {
    w.first = memory.take(s.bytes(e.batch, e.hidden));
    const albert_gemm_args out = pooler(s, a, nullptr);
    w.scratch_bytes = largest(w.scratch_bytes, albert_gemm_workspace_bytes(&out, threads));
  }
  w.scratch = memory.take(w.scratch_bytes);
  w.used = memory.used();
  return w;
}

int wrong(const albert_model_args* args) {
  if (args == nullptr) return ALBERT_BAD_ARGUMENT;
  const albert_model_args& a = *args;
  if (const int error = check_encoder(&a.encoder, false)) return error;
  const albert_encoder_args& e = a.encoder;
  if (e.kept.x != nullptr || e.kept.qkv != nullptr || e.all_states != 0 || a.embed.size < 1 ||
      (a.embedded == nullptr && (a.embed.tokens != e.tokens || a.embed.dtype != e.dtype || a.embed.dropout.p != 0)))
    return ALBERT_BAD_ARGUMENT;
  if (!is_packed(a.projection, e.hidden, a.embed.size)) return ALBERT_BAD_WEIGHT;
  if (a.pooler != nullptr && !is_packed(a.pooler, e.hidden, e.hidden)) return ALBERT_BAD_WEIGHT;
  return 0;
}

void take_first(const EncoderSteps& s, void* first) {
  const albert_encoder_args& e = s.a;
  for (int64_t r = 0; r < e.batch; ++r) {
    const int32_t begin = e.cu_seqlens[r];
    if (begin == e.cu_seqlens[r + 1])
      std::memset(s.row(first, r, e.hidden), 0, s.bytes(1, e.hidden));
    else
      std::memcpy(s.row(first, r, e.hidden), s.row(e.output, begin, e.hidden), s.bytes(1, e.hidden));
  }
}

}  // namespace
}  // namespace albert

using namespace albert;

size_t albert_model_workspace_bytes(const albert_model_args* args, int threads) {
  return wrong(args) != 0 ? 0 : carve(*args, nullptr, threads < 1 ? 1 : threads).used;
}

int albert_model(const albert_model_args* args, void* workspace, size_t workspace_bytes,
                 const albert_parallel* parallel) {
  if (const int error = wrong(args)) return error;
  const albert_model_args& a = *args;
  if (reinterpret_cast<uintptr_t>(workspace) % kCacheLine != 0) return ALBERT_UNALIGNED;
  const Workspace w = carve(a, workspace, thread_count(parallel));
  if (workspace_bytes < w.used) return ALBERT_SMALL_WORKSPACE;
  const void* embedded = a.embedded;
  if (embedded == nullptr) {
    albert_embed_args embed = a.embed;
    embed.y = w.embedded;
    embed.y_stride = embed.size;
    if (const int error = albert_embed_layer_norm(&embed, parallel)) return error;
    embedded = w.embedded;
  }
  const albert_encoder_args e = encoder(a);
  const EncoderSteps s{e, parallel, w.scratch, w.scratch_bytes};
  if (const int error = s.run(projection(s, a, embedded))) return error;
  if (const int error = albert_encoder(&e, w.scratch, w.scratch_bytes, parallel)) return error;
  if (a.pooler == nullptr) return 0;
  take_first(s, w.first);
  return s.run(pooler(s, a, w.first));
}
