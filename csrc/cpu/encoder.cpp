// The encoder's forward: for inference in memory that every pass uses again, for training into what backward reads.
#include <cstring>

#include "encoder_memory.h"
#include "trace.h"

namespace albert {
namespace {

struct Workspace {
  void* context;
  char* shared;  // qkv, and when that is no longer needed h and the wide matrix
  void *h, *activated;
  float* corrected;
  void* scratch;
  size_t scratch_bytes, used;
};

Workspace carve(const albert_encoder_args& a, void* base, int threads) {
  const EncoderSteps s{a, nullptr, nullptr, 0};
  Memory memory(base);
  Workspace w{};
  const size_t h = round_up(s.bytes(a.tokens, a.hidden), kCacheLine), wide = s.bytes(s.largest_part(), a.inner);
  if (a.kept.context == nullptr) w.context = memory.take(s.bytes(a.tokens, a.hidden));
  const size_t qkv = a.kept.qkv == nullptr ? s.bytes(a.tokens, 3 * a.hidden) : 0;
  w.shared = memory.take(largest(qkv, h + wide));
  w.h = w.shared;
  w.activated = base == nullptr ? nullptr : w.shared + h;
  if (a.corrections != nullptr)
    w.corrected = reinterpret_cast<float*>(memory.take(static_cast<size_t>(s.corrections()) * sizeof(float)));
  w.scratch_bytes = forward_scratch(s, threads);
  w.scratch = memory.take(w.scratch_bytes);
  w.used = memory.used();
  return w;
}

}  // namespace

int check_encoder(const albert_encoder_args* args, bool backward) {
  if (!detect_isa().avx2) return ALBERT_NO_ISA;
  if (args == nullptr) return ALBERT_BAD_ARGUMENT;
  const albert_encoder_args& a = *args;
  if (a.dtype != ALBERT_F32 && a.dtype != ALBERT_BF16) return ALBERT_BAD_ARGUMENT;
  if (a.tokens < 0 || a.hidden < 1 || a.inner < 1 || a.heads < 1 || a.hidden % a.heads != 0 || a.batch < 0 ||
      a.passes < 1 || a.layer_count < 1 || a.cu_seqlens == nullptr)
    return ALBERT_BAD_ARGUMENT;
  if (a.activation != ALBERT_GELU_TANH && a.activation != ALBERT_GELU_ERF && a.activation != ALBERT_RELU)
    return ALBERT_BAD_ARGUMENT;
  for (int i = 0; i < a.passes; ++i)
    if (a.layer_of_pass[i] < 0 || a.layer_of_pass[i] >= a.layer_count) return ALBERT_BAD_ARGUMENT;
  const int64_t hidden = a.hidden, inner = a.inner;
  for (int i = 0; i < a.layer_count; ++i) {
    const albert_encoder_layer& w = a.layers[i];
    if (!is_packed(w.qkv, 3 * hidden, hidden) || !is_packed(w.dense, hidden, hidden) ||
        !is_packed(w.ffn, inner, hidden) || !is_packed(w.ffn_output, hidden, inner))
      return ALBERT_BAD_WEIGHT;
    if (!backward) continue;
    if (!is_packed(w.qkv_transposed, hidden, 3 * hidden) || !is_packed(w.dense_transposed, hidden, hidden) ||
        !is_packed(w.ffn_transposed, hidden, inner) || !is_packed(w.ffn_output_transposed, inner, hidden))
      return ALBERT_BAD_WEIGHT;
  }
  if (a.tokens == 0) return 0;
  if (backward && a.corrections != nullptr) return ALBERT_BAD_ARGUMENT;
  const albert_encoder_kept& k = a.kept;
  const bool most = k.qkv != nullptr;  // all of these or none
  if ((k.context != nullptr) != most || (k.logsumexp != nullptr) != most || (k.summed != nullptr) != most ||
      (k.output_summed != nullptr) != most || ((most || k.inner != nullptr || backward) && k.x == nullptr) ||
      (k.inner != nullptr && !most))
    return ALBERT_BAD_ARGUMENT;
  return 0;
}

}  // namespace albert

using namespace albert;

size_t albert_encoder_workspace_bytes(const albert_encoder_args* args, int threads) {
  return check_encoder(args, false) != 0 ? 0 : carve(*args, nullptr, threads < 1 ? 1 : threads).used;
}

int albert_encoder(const albert_encoder_args* args, void* workspace, size_t workspace_bytes,
                   const albert_parallel* parallel) {
  if (const int error = check_encoder(args, false)) return error;
  const albert_encoder_args& a = *args;
  if (a.tokens == 0) return 0;
  if (reinterpret_cast<uintptr_t>(workspace) % kCacheLine != 0) return ALBERT_UNALIGNED;
  const Workspace w = carve(a, workspace, thread_count(parallel));
  if (workspace_bytes < w.used) return ALBERT_SMALL_WORKSPACE;
  const EncoderSteps s{a, parallel, w.scratch, w.scratch_bytes, w.corrected};
  const size_t state = s.bytes(a.tokens, a.hidden);
  // State p is what pass p reads: in the output, among what is kept, or, for inference, always in the one output.
  const auto state_of = [&](int p) -> char* {
    if (a.all_states) return static_cast<char*>(a.output) + p * state;
    if (a.kept.x != nullptr && p < a.passes) return static_cast<char*>(a.kept.x) + p * state;
    return static_cast<char*>(a.output);
  };
  const void* x = a.input;
  if (a.all_states || a.kept.x != nullptr) x = std::memcpy(state_of(0), a.input, state);
  for (int p = 0; p < a.passes; ++p) {
    const PassOfSteps traced(p);
    const auto kept = [&](void* all, int64_t columns, void* own) -> void* {
      return all == nullptr ? own : static_cast<char*>(all) + p * s.bytes(a.tokens, columns);
    };
    if (a.all_states && a.kept.x != nullptr) std::memcpy(kept(a.kept.x, a.hidden, nullptr), x, state);
    void* qkv = kept(a.kept.qkv, 3 * a.hidden, w.shared);
    float* logsumexp = a.kept.logsumexp == nullptr ? nullptr : a.kept.logsumexp + p * s.logsumexp_size();
    void* y = state_of(p + 1);
    if (const int error = s.attend(p, {x, qkv, kept(a.kept.context, a.hidden, w.context), logsumexp,
                                       kept(a.kept.summed, a.hidden, nullptr), w.h}))
      return error;
    if (const int error = s.feed_forward(p, {w.h, kept(a.kept.inner, a.inner, nullptr), w.activated,
                                             kept(a.kept.output_summed, a.hidden, nullptr), y}))
      return error;
    x = y;
  }
  return 0;
}
