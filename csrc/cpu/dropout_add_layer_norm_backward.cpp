// Gradients of LayerNorm(residual + dropout(x + bias)) in one pass over memory: a few rows are read from it, and stay
// in L1 for the second look that LayerNorm's gradient needs. Compiled once per instruction set.
#include "layer_norm_gradient.h"
#include "residual_sum.h"
#include "token_kernels.h"
#include "token_parts.h"

namespace albert::ALBERT_ISA {
namespace {

constexpr int kRows = 4;
enum { kWeight, kLnBias, kBias, kVectors };

int64_t scratch_stride(const albert_layer_norm_args& a) { return divide_up(a.n, 16) * 16; }

// X, R: the formats of x and residual. S: of the sum, which is pre_norm, or scratch in float32.
template <class X, class R, class S>
struct Backward {
  using Y = typename Wider<X, R>::Type;
  const albert_layer_norm_args& a;
  const TokenDropout dropout;
  PartialSums sums;
  float* scratch;  // [task][kRows][stride]

  void zero_rows(int64_t i) const {
    clear_row(row_of<R>(a.grad_residual, a.grad_residual_stride, i), a.n);
    clear_row(row_of<X>(a.grad_x, a.grad_x_stride, i), a.n);
  }

  // Where the sum is scratch, makes it.
  NormRow<float, Y> norm_row(const float*, TokenCounters::Counters counters, int64_t i, float* own) const {
    residual_sum<X, R>(a, dropout, counters, i, own);
    const RowStatistics s = row_statistics(own, a.n, a.eps);
    return {own, row_of<Y>(a.grad_y, a.grad_y_stride, i), s.mean + s.correction, s.rstd, 0, 0};
  }
  template <class Stored>
  NormRow<Stored, Y> stored_row(int64_t i) const {
    const Stored* sum = row_of<Stored>(a.pre_norm, a.pre_norm_stride, i);
    const Y* grad_y = row_of<Y>(a.grad_y, a.grad_y_stride, i);
    if (a.mean != nullptr) return {sum, grad_y, a.mean[i], a.rstd[i], 0, 0};
    const RowStatistics s = row_statistics(sum, a.n, a.eps);
    return {sum, grad_y, s.mean + s.correction, s.rstd, 0, 0};
  }

  template <int rows>
  void run_rows(int64_t first, int part, TokenCounters& walk, float* own) const {
    TokenCounters::Counters counters[rows];
    NormRow<S, Y> row[rows];
    for (int r = 0; r < rows; ++r) {
      counters[r] = walk.of(first + r);
      if constexpr (sizeof(S) == sizeof(float))
        row[r] = a.pre_norm == nullptr
                     ? norm_row(static_cast<const float*>(nullptr), counters[r], first + r, own + r * scratch_stride(a))
                     : stored_row<S>(first + r);
      else
        row[r] = stored_row<S>(first + r);
    }
    norm_sums<rows>(row, a.weight, a.n, sums.of(part, kWeight), sums.of(part, kLnBias));

    float* bias_sums = sums.of(part, kBias);
    F factor[rows][TokenDropout::kVectors];
    norm_gradient<rows>(row, a.weight, a.n, [&](int64_t j, int lanes, const F* grad) {
      if (dropout.on() && j % TokenDropout::kColumns == 0)
        for (int r = 0; r < rows; ++r) dropout.factors(counters[r], j, factor[r]);
      F total = zero();
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        R* grad_residual = row_of<R>(a.grad_residual, a.grad_residual_stride, first + r);
        X* grad_x = row_of<X>(a.grad_x, a.grad_x_stride, first + r);
        const F through = dropout.on() ? mul(grad[r], factor[r][j / kLanes % TokenDropout::kVectors]) : grad[r];
        if (grad_residual != nullptr) store_part(grad_residual + j, grad[r], lanes);
        if (grad_x != nullptr) store_part(grad_x + j, through, lanes);
        total = add(total, through);
      }
      // Lanes past the row's end hold nonsense, and add it up where nothing is read from.
      if (a.grad_bias != nullptr) store(bias_sums + j, add(load(bias_sums + j), total));
    });
  }

  void run(const albert_parallel* parallel) const {
    const int64_t used = tokens_of_rows(a.dropout, a.m);
    for_parts(a.m, parallel, [&](int task, int part, int64_t begin, int64_t end) {
      TokenCounters walk(a.dropout);
      float* own = scratch + task * kRows * scratch_stride(a);
      sums.clear(part);
      int64_t i = begin;
      for (; i + kRows <= smaller(end, used); i += kRows) run_rows<kRows>(i, part, walk, own);
      for (; i < smaller(end, used); ++i) run_rows<1>(i, part, walk, own);
      for (; i < end; ++i) zero_rows(i);
    });
    float* const targets[kVectors] = {a.grad_weight, a.grad_ln_bias, a.grad_bias};
    sums.add_to(targets, parallel);
  }
};

template <class X, class R>
void run(const albert_layer_norm_args& a, char* workspace, const albert_parallel* parallel) {
  const PartialSums sums(a.m, a.n, kVectors, workspace);
  float* scratch = reinterpret_cast<float*>(workspace + sums.bytes());
  using Y = typename Wider<X, R>::Type;
  if (a.pre_norm == nullptr)
    Backward<X, R, float>{a, TokenDropout(a.dropout), sums, scratch}.run(parallel);
  else
    Backward<X, R, Y>{a, TokenDropout(a.dropout), sums, scratch}.run(parallel);
}

}  // namespace

size_t layer_norm_backward_workspace_bytes(const albert_layer_norm_args& a, int threads) {
  const size_t scratch = a.pre_norm != nullptr ? 0 : static_cast<size_t>(threads * kRows * scratch_stride(a));
  return PartialSums(a.m, a.n, kVectors, nullptr).bytes() + scratch * sizeof(float);
}

void layer_norm_backward(const albert_layer_norm_args& a, char* workspace, const albert_parallel* parallel) {
  const bool half = a.residual_dtype == ALBERT_BF16;
  if (a.x_dtype == ALBERT_BF16)
    half ? run<bf16, bf16>(a, workspace, parallel) : run<bf16, float>(a, workspace, parallel);
  else
    half ? run<float, bf16>(a, workspace, parallel) : run<float, float>(a, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
