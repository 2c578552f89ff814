// y = activation(x + bias), and backward. Compiled once per instruction set.
#include "residual_sum.h"
#include "token_kernels.h"
#include "token_parts.h"
#include "vec_math.h"

namespace albert::ALBERT_ISA {
namespace {

struct GeluTanh {
  static ALBERT_INLINE F value(F x) { return gelu_tanh(x); }
  static ALBERT_INLINE F gradient(F x, F grad_y) { return mul(grad_y, gelu_tanh_gradient(x)); }
};
struct GeluErf {
  static ALBERT_INLINE F value(F x) { return gelu_erf(x); }
  static ALBERT_INLINE F gradient(F x, F grad_y) { return mul(grad_y, gelu_erf_gradient(x)); }
};
struct Relu {
  static ALBERT_INLINE F value(F x) { return max(zero(), x); }
  static ALBERT_INLINE F gradient(F x, F grad_y) { return less(zero(), x, grad_y, zero()); }
};

ALBERT_INLINE F bias_part(const float* bias, int64_t j, int lanes) {
  return bias == nullptr ? zero() : load_part(bias + j, lanes);
}

template <class T, class Activation>
void forward(const albert_bias_gelu_args& a, const albert_parallel* parallel) {
  for_parts(a.m, parallel, [&](int, int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = row_of<T>(a.x, a.x_stride, i);
      T* y = row_of<T>(a.y, a.y_stride, i);
      for_columns(a.n, [&](int64_t j, int lanes) {
        store_part(y + j, Activation::value(add(load_part(x + j, lanes), bias_part(a.bias, j, lanes))), lanes);
      });
    }
  });
}

// A few rows at a time, so that the column sums are read and written once for all of them.
template <class T, class Activation, int rows>
void backward_rows(const albert_bias_gelu_args& a, int64_t first, float* sums) {
  for_columns(a.n, [&](int64_t j, int lanes) {
    const F bias = bias_part(a.bias, j, lanes);
    F total = zero();
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const F x = add(load_part(row_of<T>(a.x, a.x_stride, first + r) + j, lanes), bias);
      const F grad_y = load_part(row_of<T>(a.grad_y, a.grad_y_stride, first + r) + j, lanes);
      const F grad_x = Activation::gradient(x, grad_y);  // 0 where grad_y is: past the row's end too
      if (a.grad_x != nullptr) store_part(row_of<T>(a.grad_x, a.grad_x_stride, first + r) + j, grad_x, lanes);
      total = add(total, grad_x);
    }
    if (a.grad_bias != nullptr) store(sums + j, add(load(sums + j), total));
  });
}

template <class T, class Activation>
void backward(const albert_bias_gelu_args& a, char* workspace, const albert_parallel* parallel) {
  constexpr int kRows = 4;
  const PartialSums sums(a.m, a.n, 1, workspace);
  for_parts(a.m, parallel, [&](int, int part, int64_t begin, int64_t end) {
    sums.clear(part);
    int64_t i = begin;
    for (; i + kRows <= end; i += kRows) backward_rows<T, Activation, kRows>(a, i, sums.of(part, 0));
    for (; i < end; ++i) backward_rows<T, Activation, 1>(a, i, sums.of(part, 0));
  });
  float* const targets[] = {a.grad_bias};
  sums.add_to(targets, parallel);
}

// f(an element, an activation): of the types in question.
template <class Function>
void with_types(const albert_bias_gelu_args& a, Function f) {
  const auto form = [&](auto element) {
    switch (a.activation) {
      case ALBERT_GELU_TANH: return f(element, GeluTanh());
      case ALBERT_GELU_ERF: return f(element, GeluErf());
      case ALBERT_RELU: return f(element, Relu());
    }
  };
  a.dtype == ALBERT_BF16 ? form(bf16()) : form(float());
}

}  // namespace

void bias_gelu(const albert_bias_gelu_args& a, const albert_parallel* parallel) {
  with_types(a, [&](auto element, auto form) { forward<decltype(element), decltype(form)>(a, parallel); });
}

size_t bias_gelu_backward_workspace_bytes(const albert_bias_gelu_args& a) {
  return PartialSums(a.m, a.n, 1, nullptr).bytes();
}

void bias_gelu_backward(const albert_bias_gelu_args& a, char* workspace, const albert_parallel* parallel) {
  with_types(a, [&](auto element, auto form) { backward<decltype(element), decltype(form)>(a, workspace, parallel); });
}

}  // namespace albert::ALBERT_ISA
