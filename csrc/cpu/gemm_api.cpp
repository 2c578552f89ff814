// The C interface: checks arguments, then calls the kernels of the machine's instruction set.
#include "gemm_kernels.h"
#include "trace.h"

namespace albert {
namespace {

bool is_float(int dtype) { return dtype == ALBERT_F32 || dtype == ALBERT_BF16; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kCacheLine == 0; }

int check_weight(const void* packed, const Isa& isa) {
  if (packed == nullptr) return ALBERT_BAD_WEIGHT;
  if (!aligned(packed)) return ALBERT_UNALIGNED;
  const auto& w = *static_cast<const PackedWeight*>(packed);
  if (w.magic != PackedWeight::kMagic) return ALBERT_BAD_WEIGHT;
  const PackedWeight expected = packed_header(isa, w.dtype, w.n, w.k);
  return w.panel == expected.panel && w.unit == expected.unit && w.steps == expected.steps ? 0 : ALBERT_BAD_WEIGHT;
}

int check_args(const albert_gemm_args& a, const Isa& isa) {
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (const int error = check_weight(a.weight, isa)) return error;
  const auto& w = *static_cast<const PackedWeight*>(a.weight);
  const bool quantized = a.x_dtype == ALBERT_U8;
  if (quantized ? w.dtype != ALBERT_INT8 || a.x_scale == nullptr || a.x_zero == nullptr : !is_float(a.x_dtype))
    return ALBERT_BAD_ARGUMENT;
  if (!is_float(a.y_dtype) || a.m < 0 || a.activation < ALBERT_NONE || a.activation > ALBERT_TANH)
    return ALBERT_BAD_ARGUMENT;
  const auto strided = [](const void* p, int64_t stride, int64_t least) { return p == nullptr || stride >= least; };
  if (a.m > 1 && !(strided(a.x, a.x_stride, w.k) && strided(a.y, a.y_stride, w.n) &&
                   strided(a.pre_activation, a.pre_activation_stride, w.n) &&
                   strided(a.activation_input, a.activation_input_stride, w.n) &&
                   strided(a.residual, a.residual_stride, w.n) && strided(a.pre_norm, a.pre_norm_stride, w.n)))
    return ALBERT_BAD_ARGUMENT;
  if ((a.ln_weight == nullptr) != (a.ln_bias == nullptr)) return ALBERT_BAD_ARGUMENT;
  if (a.activation_input != nullptr && a.activation == ALBERT_NONE) return ALBERT_BAD_ARGUMENT;
  return 0;
}

bool valid(int dtype, int64_t m, int64_t n, int64_t k) { return is_float(dtype) && m >= 0 && n >= 0 && k >= 0; }

}  // namespace
}  // namespace albert

using namespace albert;

const char* albert_isa(void) {
  const Isa isa = detect_isa();
  if (isa.bf16 && isa.vnni) return "avx512 vnni bf16";
  if (isa.vnni) return "avx512 vnni";
  return isa.avx512 ? "avx512" : isa.avx2 ? "avx2" : "none";
}

size_t albert_gemm_workspace_bytes(const albert_gemm_args* args, int threads) {
  const Isa isa = detect_isa();
  if (args == nullptr || check_args(*args, isa) != 0) return 0;
  if (threads < 1) threads = 1;
  return isa.avx512 ? avx512::gemm_workspace_bytes(*args, threads) : avx2::gemm_workspace_bytes(*args, threads);
}

int albert_gemm(const albert_gemm_args* args, void* workspace, size_t workspace_bytes,
                const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  if (args == nullptr) return ALBERT_BAD_ARGUMENT;
  if (const int error = check_args(*args, isa)) return error;
  if (!aligned(workspace)) return ALBERT_UNALIGNED;
  if (workspace_bytes < albert_gemm_workspace_bytes(args, thread_count(parallel))) return ALBERT_SMALL_WORKSPACE;
  const auto& w = *static_cast<const PackedWeight*>(args->weight);
  if (args->m == 0 || w.n == 0) return 0;
  Step step(ALBERT_SPAN_PRODUCT, args->m, w.n, w.k);
  step.count([&] { return 2 * args->m * w.n * w.k; });
  (isa.avx512 ? avx512::gemm : avx2::gemm)(*args, static_cast<char*>(workspace), parallel);
  return 0;
}

static WeightGradient weight_gradient_args(int dtype, int64_t m, int64_t n, int64_t k, const Isa& isa) {
  WeightGradient args{};
  args.dtype = dtype;
  args.m = m;
  args.n = n;
  args.k = k;
  args.bf16_dot = isa.bf16;
  return args;
}

size_t albert_weight_gradient_workspace_bytes(int dtype, int64_t m, int64_t n, int64_t k) {
  if (!valid(dtype, m, n, k)) return 0;
  const Isa isa = detect_isa();
  const WeightGradient args = weight_gradient_args(dtype, m, n, k, isa);
  return isa.avx512 ? avx512::weight_gradient_workspace_bytes(args) : avx2::weight_gradient_workspace_bytes(args);
}

int albert_weight_gradient(int dtype, int64_t m, int64_t n, int64_t k, const void* grad_output,
                           int64_t grad_output_stride, const void* x, int64_t x_stride, float* gradient,
                           int64_t gradient_stride, float* bias_gradient, void* workspace, size_t workspace_bytes,
                           const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (!valid(dtype, m, n, k)) return ALBERT_BAD_ARGUMENT;
  if ((m > 1 && (grad_output_stride < n || x_stride < k)) || (n > 1 && gradient_stride < k)) return ALBERT_BAD_ARGUMENT;
  if (!aligned(workspace)) return ALBERT_UNALIGNED;
  if (workspace_bytes < albert_weight_gradient_workspace_bytes(dtype, m, n, k)) return ALBERT_SMALL_WORKSPACE;
  if (m == 0 || n == 0) return 0;
  WeightGradient args = weight_gradient_args(dtype, m, n, k, isa);
  args.grad_output = grad_output;
  args.grad_output_stride = grad_output_stride;
  args.x = x;
  args.x_stride = x_stride;
  args.gradient = gradient;
  args.gradient_stride = gradient_stride;
  args.bias_gradient = bias_gradient;
  Step step(ALBERT_SPAN_WEIGHT_GRADIENT, m, n, k);
  step.count([&] { return 2 * m * n * k; });
  (isa.avx512 ? avx512::weight_gradient : avx2::weight_gradient)(args, static_cast<char*>(workspace), parallel);
  return 0;
}

int albert_quantize_rows(int x_dtype, const void* x, int64_t x_stride, int64_t m, int64_t k, uint8_t* u8,
                         int64_t u8_stride, float* scale, int32_t* zero, const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (!valid(x_dtype, m, 0, k) || (m > 1 && (x_stride < k || u8_stride < k))) return ALBERT_BAD_ARGUMENT;
  (isa.avx512 ? avx512::quantize_rows : avx2::quantize_rows)(x_dtype, x, x_stride, m, k, u8, u8_stride, scale, zero,
                                                             parallel);
  return 0;
}

int albert_layer_norm(int x_dtype, const void* x, int64_t x_stride, int y_dtype, void* y, int64_t y_stride, int64_t m,
                      int64_t n, const float* weight, const float* bias, float eps, float* mean, float* rstd,
                      const albert_parallel* parallel) {
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (!valid(x_dtype, m, n, 0) || !is_float(y_dtype) || (m > 1 && (x_stride < n || y_stride < n)))
    return ALBERT_BAD_ARGUMENT;
  if (n == 0) return 0;
  const Step step(ALBERT_SPAN_LAYER_NORM, m, n);
  (isa.avx512 ? avx512::layer_norm : avx2::layer_norm)(x_dtype, x, x_stride, y_dtype, y, y_stride, m, n, weight, bias,
                                                       eps, mean, rstd, parallel);
  return 0;
}
