// Gradients of the embeddings: first that of each token's sum, into the workspace, then from there into the tables. A
// task owns columns of the tables, and where there are more tasks than cache lines in a row, every so-many-th row of
// them: nothing is written by two, and each element is summed in the order of the tokens.
// Compiled once per instruction set.
#include "embed_rows.h"
#include "layer_norm_gradient.h"
#include "token_kernels.h"
#include "token_parts.h"

namespace albert::ALBERT_ISA {
namespace {

constexpr int kRows = 4;
constexpr int64_t kFloats = 16;  // in a cache line

int64_t stride_of(const albert_embed_args& a) { return divide_up(a.size, kFloats) * kFloats; }

// The gradient of each token's sum. scratch holds kRows sums, then kRows gradients of y without the dropout.
template <class T>
struct SumGradients {
  const albert_embed_args& a;
  const TokenDropout dropout;
  PartialSums sums;
  float *grads, *scratch;

  NormRow<float, float> norm_row(TokenCounters& walk, int64_t i, float* own, float* grad) const {
    embedding_sum<T>(a, i, own);
    const T* grad_y = row_of<T>(a.grad_y, a.grad_y_stride, i);
    const auto put = [&](int64_t j, int lanes, F factor) {
      store_part(grad + j, mul(load_part(grad_y + j, lanes), factor), lanes);
    };
    if (dropout.on())
      for_dropout_columns(dropout, walk.of(i), a.size, put);
    else
      for_columns(a.size, [&](int64_t j, int lanes) { put(j, lanes, set(1.0f)); });
    const RowStatistics s = row_statistics(own, a.size, a.eps);
    return {own, grad, s.mean + s.correction, s.rstd, 0, 0};
  }

  template <int rows>
  void run_rows(int64_t first, int part, TokenCounters& walk, float* own) const {
    NormRow<float, float> row[rows];
    for (int r = 0; r < rows; ++r)
      row[r] = norm_row(walk, first + r, own + r * stride_of(a), own + (kRows + r) * stride_of(a));
    norm_sums<rows>(row, a.weight, a.size, sums.of(part, 0), sums.of(part, 1));
    norm_gradient<rows>(row, a.weight, a.size, [&](int64_t j, int lanes, const F* grad) {
      for (int r = 0; r < rows; ++r) {
        T* grad_inputs = row_of<T>(a.grad_inputs, a.grad_inputs_stride, first + r);
        if (grad_inputs != nullptr) store_part(grad_inputs + j, grad[r], lanes);
        store(grads + (first + r) * stride_of(a) + j, grad[r]);
      }
    });
  }

  void run(int64_t used, const albert_parallel* parallel) const {
    for_parts(a.tokens, parallel, [&](int task, int part, int64_t begin, int64_t end) {
      TokenCounters walk(a.dropout);
      float* own = scratch + task * 2 * kRows * stride_of(a);
      sums.clear(part);
      int64_t i = begin;
      for (; i + kRows <= smaller(end, used); i += kRows) run_rows<kRows>(i, part, walk, own);
      for (; i < smaller(end, used); ++i) run_rows<1>(i, part, walk, own);
      for (; i < end; ++i) clear_row(row_of<T>(a.grad_inputs, a.grad_inputs_stride, i), a.size);
    });
    float* const targets[] = {a.grad_weight, a.grad_bias};
    sums.add_to(targets, parallel);
  }
};

// Of one table, rows with id % shares == share, columns [begin, end).
void add_rows(const albert_embedding& e, const float* grads, int64_t stride, int64_t tokens, int64_t share,
              int64_t shares, int64_t begin, int64_t end, int64_t padding_idx) {
  if (e.gradient == nullptr) return;
  for (int64_t i = 0; i < tokens; ++i) {
    const int64_t id = id_of(e, i);
    if (id == padding_idx || (shares > 1 && id % shares != share)) continue;
    float* target = e.gradient + id * e.gradient_stride + begin;
    const float* grad = grads + i * stride + begin;
    for_columns(end - begin, [&](int64_t j, int lanes) {
      store_part(target + j, add(load_part(target + j, lanes), load_part(grad + j, lanes)), lanes);
    });
  }
}

void add_tables(const albert_embed_args& a, const float* grads, int64_t used, const albert_parallel* parallel) {
  const int64_t lines = divide_up(a.size, kFloats), threads = thread_count(parallel);
  const int64_t slices = smaller(threads, lines), shares = larger(threads / slices, 1);
  auto task = [&](int i) {
    const int64_t slice = i % slices, share = i / slices;
    const int64_t begin = part_begin(lines, slices, slice) * kFloats;
    const int64_t end = smaller(part_begin(lines, slices, slice + 1) * kFloats, a.size);
    const auto add = [&](const albert_embedding& e, int64_t padding_idx) {
      add_rows(e, grads, stride_of(a), used, share, shares, begin, end, padding_idx);
    };
    if (a.inputs == nullptr) add(a.word, a.padding_idx);
    add(a.position, -1);
    add(a.token_type, -1);
  };
  parallel_tasks(parallel, static_cast<int>(slices * shares), task);
}

template <class T>
void run(const albert_embed_args& a, char* workspace, const albert_parallel* parallel) {
  const int64_t used = tokens_of_rows(a.dropout, a.tokens);
  const PartialSums sums(a.tokens, a.size, 2, workspace);
  float* grads = reinterpret_cast<float*>(workspace + sums.bytes());
  SumGradients<T>{a, TokenDropout(a.dropout), sums, grads, grads + a.tokens * stride_of(a)}.run(used, parallel);
  add_tables(a, grads, used, parallel);
}

}  // namespace

size_t embed_layer_norm_backward_workspace_bytes(const albert_embed_args& a, int threads) {
  const int64_t rows = a.tokens + threads * 2 * kRows;
  return PartialSums(a.tokens, a.size, 2, nullptr).bytes() + static_cast<size_t>(rows * stride_of(a)) * sizeof(float);
}

void embed_layer_norm_backward(const albert_embed_args& a, char* workspace, const albert_parallel* parallel) {
  a.dtype == ALBERT_BF16 ? run<bf16>(a, workspace, parallel) : run<float>(a, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
