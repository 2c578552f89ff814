// Kernels that see one row at a time: quantization and LayerNorm. Compiled once per instruction set.
#include "gemm_kernels.h"
#include "gemm_tiling.h"
#include "layer_norm.h"
#include "quantize.h"

namespace albert::ALBERT_ISA {
namespace {

// body(row) for each row, each task a run of neighbours.
template <class Body>
void for_rows(int64_t m, const albert_parallel* parallel, Body body) {
  const int tasks = static_cast<int>(smaller(m, thread_count(parallel)));
  auto task = [&](int i) {
    for (int64_t row = part_begin(m, tasks, i); row < part_begin(m, tasks, i + 1); ++row) body(row);
  };
  if (tasks > 0) parallel_tasks(parallel, tasks, task);
}

template <class X>
void quantize_rows(const X* x, int64_t x_stride, int64_t m, int64_t k, uint8_t* u8, int64_t u8_stride, float* scale,
                   int32_t* zero_point, const albert_parallel* parallel) {
  for_rows(m, parallel, [&](int64_t i) {
    const RowScale row = row_scale(x + i * x_stride, k);
    scale[i] = row.scale;
    zero_point[i] = row.zero;
    quantize_row(x + i * x_stride, k, row, u8 + i * u8_stride);
  });
}

}  // namespace

void quantize_rows(int x_dtype, const void* x, int64_t x_stride, int64_t m, int64_t k, uint8_t* u8, int64_t u8_stride,
                   float* scale, int32_t* zero_point, const albert_parallel* parallel) {
  if (x_dtype == ALBERT_BF16)
    quantize_rows(static_cast<const bf16*>(x), x_stride, m, k, u8, u8_stride, scale, zero_point, parallel);
  else
    quantize_rows(static_cast<const float*>(x), x_stride, m, k, u8, u8_stride, scale, zero_point, parallel);
}

void layer_norm(int x_dtype, const void* x, int64_t x_stride, int y_dtype, void* y, int64_t y_stride, int64_t m,
                int64_t n, const float* weight, const float* bias, float eps, float* mean, float* rstd,
                const albert_parallel* parallel) {
  const LayerNorm norm{weight, bias, eps, mean, rstd};
  const auto rows = [&](auto* in, auto* out) {
    for_rows(m, parallel, [&](int64_t i) {
      layer_norm_row(norm, in + i * x_stride, out + i * y_stride, static_cast<decltype(out)>(nullptr), i, n);
    });
  };
  const auto* x_f32 = static_cast<const float*>(x);
  const auto* x_bf16 = static_cast<const bf16*>(x);
  auto* y_f32 = static_cast<float*>(y);
  auto* y_bf16 = static_cast<bf16*>(y);
  if (x_dtype == ALBERT_F32)
    y_dtype == ALBERT_F32 ? rows(x_f32, y_f32) : rows(x_f32, y_bf16);
  else
    y_dtype == ALBERT_F32 ? rows(x_bf16, y_f32) : rows(x_bf16, y_bf16);
}

}  // namespace albert::ALBERT_ISA
