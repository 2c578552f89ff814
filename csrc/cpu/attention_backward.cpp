// Attention backward over a batch. Where there are too few heads for the threads, a head's keys are cut into parts:
// each then has its own gradient of the queries, and they are added up in order at the end.
// Compiled once per instruction set.
#include "attention_backward_worker.h"

namespace albert::ALBERT_ISA {
namespace {

struct Plan {
  int64_t parts, panels;  // panels of keys: of the longest part
  size_t task_bytes, partial_bytes;
  Plan(const Attention& attention, const HeadShape& shape, int threads) {
    const albert_attention_args& a = attention.args;
    int64_t most = 0;
    for (int64_t r = 0; r < a.batch; ++r) most = larger(most, divide_up(Row(a, r).keys, kPanel));
    const Work work(a);
    parts = larger(1, smaller(most, static_cast<int64_t>(work.largest / work.unit(threads) + 0.999)));
    panels = divide_up(most, parts);
    task_bytes = BackwardScratch(shape, panels, nullptr).bytes;
    partial_bytes = parts == 1 ? 0 : static_cast<size_t>(parts * a.tokens_q * a.heads * a.head_dim) * sizeof(float);
  }
};

// The parts' gradients of the queries [begin, end), added up.
template <class T>
void add_parts(const Backward& backward, int64_t parts, int64_t begin, int64_t end) {
  const albert_attention_args& a = backward.attention.args;
  const albert_attention_gradients& g = backward.grads;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < a.heads; ++h) {
      T* out = static_cast<T*>(g.grad_query) + t * g.grad_query_token_stride + h * g.grad_query_head_stride;
      for (int64_t c = 0; c < a.head_dim; c += kLanes) {
        const int left = static_cast<int>(smaller(a.head_dim - c, kLanes));
        F total = zero();
        const float* sums = backward.partial + (t * a.heads + h) * a.head_dim + c;
        for (int64_t p = 0; p < parts; ++p)
          total = add(total, load_columns(sums + p * a.tokens_q * a.heads * a.head_dim, left));
        store_columns(out + c, mul(total, set(a.scale)), left);
      }
    }
}

template <class T>
void run(const Attention& attention, const albert_attention_gradients& g, char* workspace,
         const albert_parallel* parallel) {
  const albert_attention_args& a = attention.args;
  const HeadShape shape(attention);
  const int threads = thread_count(parallel);
  const Plan plan(attention, shape, threads);
  char* partial = workspace + plan.task_bytes * static_cast<size_t>(threads);
  const Backward backward{attention,
                          g,
                          shape,
                          KernelTable(shape.unit, RowLayout::lines),
                          KernelTable(shape.unit, RowLayout::steps),
                          plan.parts == 1 ? nullptr : reinterpret_cast<float*>(partial)};
  for_each_unit(a, parallel, [&](const Row&) { return plan.parts; }, [&](int task) {
    char* memory = workspace + plan.task_bytes * static_cast<size_t>(task);
    return BackwardWorker<T>{backward, BackwardScratch(shape, plan.panels, memory)};
  });
  const int64_t used_q = a.cu_seqlens_q[a.batch], used_k = a.cu_seqlens_k[a.batch];
  if (plan.parts > 1) {
    auto add = [&](int i) {
      add_parts<T>(backward, plan.parts, part_begin(used_q, threads, i), part_begin(used_q, threads, i + 1));
    };
    parallel_tasks(parallel, threads, add);
  }
  const auto clear = [&](void* grad, int64_t token_stride, int64_t head_stride, int64_t used, int64_t tokens) {
    clear_tokens(static_cast<T*>(grad), token_stride, head_stride, a, used, tokens);
  };
  clear(g.grad_query, g.grad_query_token_stride, g.grad_query_head_stride, used_q, a.tokens_q);
  clear(g.grad_key, g.grad_key_token_stride, g.grad_key_head_stride, used_k, a.tokens_k);
  clear(g.grad_value, g.grad_value_token_stride, g.grad_value_head_stride, used_k, a.tokens_k);
}

}  // namespace

size_t attention_backward_workspace_bytes(const Attention& attention, int threads) {
  const Plan plan(attention, HeadShape(attention), threads);
  return plan.task_bytes * static_cast<size_t>(threads) + plan.partial_bytes;
}

void attention_backward(const Attention& attention, const albert_attention_gradients& gradients, char* workspace,
                        const albert_parallel* parallel) {
  if (attention.args.dtype == ALBERT_BF16)
    run<bf16>(attention, gradients, workspace, parallel);
  else
    run<float>(attention, gradients, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
