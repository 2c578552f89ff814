// The C interface of masked_lm_loss.h: checks arguments, then calls the kernels of the machine's instruction set.
#include "isa.h"
#include "masked_lm_loss_kernels.h"
#include "trace.h"

namespace albert {
namespace {

bool valid(const albert_masked_lm_loss_args& a) {
  if (a.dtype != ALBERT_F32 && a.dtype != ALBERT_BF16) return false;
  if (a.tokens < 0 || a.size < 0 || a.vocabulary < 0) return false;
  if (!(a.label_smoothing >= 0 && a.label_smoothing < 1 && a.z_loss >= 0)) return false;
  const auto strided = [&](const void* p, int64_t rows, int64_t stride) {
    return p == nullptr || rows <= 1 || stride >= a.size;
  };
  return strided(a.x, a.tokens, a.x_stride) && strided(a.table, a.vocabulary, a.table_stride) &&
         strided(a.grad_x, a.tokens, a.grad_x_stride) && strided(a.grad_table, a.vocabulary, a.grad_table_stride);
}

bool valid_labels(const albert_masked_lm_loss_args& a) {
  bool inside = true;
  for (int64_t i = 0; i < a.tokens; ++i)
    inside &= a.labels[i] == a.ignore_index || (0 <= a.labels[i] && a.labels[i] < a.vocabulary);
  return inside;
}

// Of the logits.
int64_t operations(const albert_masked_lm_loss_args& a) {
  int64_t labelled = 0;
  for (int64_t i = 0; i < a.tokens; ++i) labelled += a.labels[i] != a.ignore_index;
  return 2 * labelled * a.vocabulary * a.size;
}

template <class Run>
int checked(const albert_masked_lm_loss_args* args, const void* workspace, size_t bytes, size_t needed, Run run) {
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (args == nullptr || !valid(*args) || !valid_labels(*args)) return ALBERT_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(workspace) % 64 != 0) return ALBERT_UNALIGNED;
  if (bytes < needed) return ALBERT_SMALL_WORKSPACE;
  run(isa);
  return 0;
}

}  // namespace
}  // namespace albert

using namespace albert;

size_t albert_masked_lm_loss_workspace_bytes(const albert_masked_lm_loss_args* args, int threads) {
  const Isa isa = detect_isa();
  if (args == nullptr || !isa.avx2 || !valid(*args)) return 0;
  return (isa.avx512 ? avx512::masked_lm_loss_workspace_bytes : avx2::masked_lm_loss_workspace_bytes)(
      *args, isa.bf16, threads < 1 ? 1 : threads);
}

int albert_masked_lm_loss(const albert_masked_lm_loss_args* args, void* workspace, size_t workspace_bytes,
                          const albert_parallel* parallel) {
  const size_t needed = albert_masked_lm_loss_workspace_bytes(args, thread_count(parallel));
  return checked(args, workspace, workspace_bytes, needed, [&](const Isa& isa) {
    Step step(ALBERT_SPAN_MASKED_LM_LOSS, args->tokens, args->vocabulary, args->size);
    step.count([&] { return operations(*args); });
    (isa.avx512 ? avx512::masked_lm_loss : avx2::masked_lm_loss)(*args, isa.bf16, static_cast<char*>(workspace),
                                                                 parallel);
  });
}

size_t albert_masked_lm_loss_backward_workspace_bytes(const albert_masked_lm_loss_args* args, int threads) {
  const Isa isa = detect_isa();
  if (args == nullptr || !isa.avx2 || !valid(*args)) return 0;
  return (isa.avx512 ? avx512::masked_lm_loss_backward_workspace_bytes
                     : avx2::masked_lm_loss_backward_workspace_bytes)(*args, isa.bf16, threads < 1 ? 1 : threads);
}

int albert_masked_lm_loss_backward(const albert_masked_lm_loss_args* args, void* workspace, size_t workspace_bytes,
                                   const albert_parallel* parallel) {
  const size_t needed = albert_masked_lm_loss_backward_workspace_bytes(args, thread_count(parallel));
  return checked(args, workspace, workspace_bytes, needed, [&](const Isa& isa) {
    Step step(ALBERT_SPAN_MASKED_LM_LOSS_BACKWARD, args->tokens, args->vocabulary, args->size);
    step.count([&] { return 2 * operations(*args); });
    (isa.avx512 ? avx512::masked_lm_loss_backward : avx2::masked_lm_loss_backward)(
        *args, isa.bf16, static_cast<char*>(workspace), parallel);
  });
}
