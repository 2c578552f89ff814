// The one file that knows torch: operators of the library albert_fast_native over LibTorch's stable ABI.
//
// They are called by albert_fast/cpu.py alone, which has checked shapes and dtypes: what is left here are pointers,
// the threads of torch's own pool, and scratch memory that each thread keeps.
#include <pthread.h>
#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/encoder.h"
#include "cpu/gemm.h"
#include "cpu/masked_lm_loss.h"
#include "cpu/model.h"
#include "cpu/token_ops.h"
#include "cpu/trace.h"

namespace {

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// ------------------------------------------------------------------------------------------------------------ threads

// The threads of torch's pool do not survive a fork, and OpenMP would wait for them: a forked child runs on one.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

void run_tasks(void*, int tasks, void (*task)(void*, int), void* argument) {
  torch::stable::parallel_for(0, tasks, 1, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(argument, static_cast<int>(i));
  });
}

albert_parallel threads() {
  const int count = forked ? 1 : static_cast<int>(torch::stable::get_num_threads());
  return {nullptr, count, count > 1 ? run_tasks : nullptr};
}

// ------------------------------------------------------------------------------------------------------------- memory

// Asks for pages of 2 MB where memory is large and not yet written: packed weights pass by in whole each pass, and what
// backward reads is new memory in each step.
constexpr size_t kHugePage = size_t{2} << 20;
void advise_huge_pages(const void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto begin = (reinterpret_cast<uintptr_t>(p) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(p) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: refusal is no error
#endif
}

// Scratch memory of one call at a time, kept for the thread's next call unless it is large.
class Workspace {
 public:
  explicit Workspace(size_t bytes) {
    if (bytes > kept_.bytes) kept_.allocate(bytes);
  }
  ~Workspace() {
    if (kept_.bytes > kMost) kept_.allocate(0);
  }
  void* data() const { return kept_.data; }

 private:
  static constexpr size_t kMost = size_t{256} << 20;
  struct Memory {
    void* data = nullptr;
    size_t bytes = 0;
    void allocate(size_t wanted) {
      std::free(data);
      data = nullptr;
      const size_t alignment = wanted < kHugePage ? 64 : kHugePage;
      bytes = (wanted + alignment - 1) / alignment * alignment;
      if (bytes == 0) return;
      data = std::aligned_alloc(alignment, bytes);
      advise_huge_pages(data, bytes);
      if (data != nullptr) return;
      bytes = 0;
      throw std::bad_alloc();
    }
    ~Memory() { std::free(data); }
  };
  static thread_local Memory kept_;
};
thread_local Workspace::Memory Workspace::kept_;

void check(int error, const char* what) {
  STD_TORCH_CHECK(error == 0, "albert_fast: ", what, " failed with code ", error, " (csrc/cpu/gemm.h)");
}

// ------------------------------------------------------------------------------------------------------------ tensors

int dtype_code(const Tensor& x) {
  switch (x.scalar_type()) {
    case torch::headeronly::ScalarType::Float: return ALBERT_F32;
    case torch::headeronly::ScalarType::BFloat16: return ALBERT_BF16;
    default: STD_TORCH_CHECK(false, "albert_fast: float32 or bfloat16 was expected");
  }
}

template <class T = void>
T* data(const Tensor& x) { return static_cast<T*>(x.data_ptr()); }
template <class T = void>
T* data(const OptionalTensor& x) { return x.has_value() ? data<T>(*x) : nullptr; }

// The vectors among some tensors as the kernels take them, float32 and contiguous, one after the other.
class Vectors {
 public:
  explicit Vectors(const Tensors& tensors) {
    size_t total = 0;
    for (const Tensor& x : tensors) total += x.dim() == 1 ? static_cast<size_t>(x.numel()) : 0;
    values_.resize(total);
    float* out = values_.data();
    for (const Tensor& x : tensors)
      if (x.dim() == 1) out = copy(x, out);
  }
  const float* next(int64_t count) {
    const float* p = values_.data() + used_;
    used_ += static_cast<size_t>(count);
    return p;
  }

 private:
  static float* copy(const Tensor& x, float* out) {
    const int64_t count = x.numel(), stride = count > 1 ? x.stride(0) : 1;
    if (dtype_code(x) == ALBERT_F32) {
      const float* in = data<const float>(x);
      for (int64_t i = 0; i < count; ++i) *out++ = in[i * stride];
      return out;
    }
    const uint16_t* in = data<const uint16_t>(x);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = static_cast<uint32_t>(in[i * stride]) << 16;
      std::memcpy(out++, &bits, sizeof bits);
    }
    return out;
  }

  std::vector<float> values_;
  size_t used_ = 0;
};

// ------------------------------------------------------------------------------------------------------------ weights

std::string isa() { return albert_isa(); }

int64_t packed_bytes(int64_t dtype, int64_t n, int64_t k) {
  return static_cast<int64_t>(albert_packed_bytes(static_cast<int>(dtype), n, k));
}

void pack(Tensor weight, int64_t dtype, Tensor packed) {
  const albert_parallel parallel = threads();
  check(albert_pack(static_cast<int>(dtype), dtype_code(weight), data(weight), weight.stride(0), weight.stride(1),
                    weight.size(0), weight.size(1), data(packed), &parallel),
        "pack");
}

void advise(Tensor memory) {
  advise_huge_pages(data(memory), static_cast<size_t>(memory.numel()) * memory.element_size());
}

// Where the matrices among some tensors are, and a sample of their elements: an edit that no version counter tells of,
// such as one through .data, changes it unless it touches a few elements only. Elements side by side, for each place
// costs a miss of every cache: the last call's weights have passed by since. All places are asked for before the first
// is read.
int64_t fingerprint(Tensors tensors) {
  constexpr uint64_t kPlaces = 16, kSideBySide = 16, kStep = 0x9E3779B97F4A7C15u, kPrime = 0x100000001B3u;
  struct Run {
    const char* first;
    int64_t count, stride, bytes;
  };
  std::vector<Run> runs;
  runs.reserve(tensors.size() * kPlaces);
  uint64_t hash = 0xCBF29CE484222325u;
  for (const Tensor& x : tensors) {
    if (x.dim() != 2) continue;
    const uint64_t columns = x.size(1), elements = x.size(0) * columns;
    const int64_t bytes = dtype_code(x) == ALBERT_F32 ? 4 : 2;
    const int64_t row_stride = x.stride(0) * bytes, column_stride = x.stride(1) * bytes;
    const char* values = data<const char>(x);
    hash = (hash ^ reinterpret_cast<uintptr_t>(values)) * kPrime;
    for (uint64_t i = 0; elements > 0 && i < kPlaces; ++i) {
      const uint64_t e = static_cast<uint64_t>((static_cast<unsigned __int128>(i * kStep) * elements) >> 64);
      const uint64_t row = e / columns, column = e % columns / kSideBySide * kSideBySide;
      const char* first =
          values + static_cast<int64_t>(row) * row_stride + static_cast<int64_t>(column) * column_stride;
      __builtin_prefetch(first);
      runs.push_back({first, static_cast<int64_t>(std::min(kSideBySide, columns - column)), column_stride, bytes});
    }
  }
  for (const Run& run : runs)
    for (int64_t i = 0; i < run.count; ++i) {
      uint32_t value = 0;
      std::memcpy(&value, run.first + i * run.stride, run.bytes == 4 ? 4 : 2);
      hash = (hash ^ value) * kPrime;
    }
  return static_cast<int64_t>(hash);
}

// ------------------------------------------------------------------------------------------------------------ encoder

// Arguments of the encoder and the memory that they point into.
struct Encoder {
  albert_encoder_args args{};
  std::vector<albert_encoder_layer> layers;
  Vectors vectors;
  std::vector<int64_t> layer_of_pass;

  // parameters: 16 a layer (albert_fast/ops/encoder.py); packed: 4 a layer, or with the transposes 8; kept: none, the
  // first, all but the last, or all of albert_encoder_kept.
  Encoder(const Tensor& hidden, const Tensors& parameters, const Tensors& packed, const Tensor& cu_seqlens,
          std::vector<int64_t> passes, int64_t heads, int64_t activation, double eps, double hidden_dropout_p,
          double attention_dropout_p, int64_t seed, const OptionalTensor& bias, const Tensors& kept)
      : layers(parameters.size() / 16), vectors(parameters), layer_of_pass(std::move(passes)) {
    albert_encoder_args& a = args;
    a.dtype = dtype_code(hidden);
    a.hidden = parameters[0].size(0);
    a.inner = parameters[10].size(0);
    a.tokens = hidden.size(hidden.dim() - 2);
    a.heads = heads;
    a.batch = cu_seqlens.numel() - 1;
    a.cu_seqlens = data<const int32_t>(cu_seqlens);
    a.passes = static_cast<int>(layer_of_pass.size());
    a.layer_of_pass = layer_of_pass.data();
    a.layer_count = static_cast<int>(layers.size());
    a.activation = static_cast<int>(activation);
    a.eps = static_cast<float>(eps);
    a.hidden_dropout_p = hidden_dropout_p;
    a.attention_dropout_p = attention_dropout_p;
    a.seed = static_cast<uint64_t>(seed);
    if (bias.has_value()) {
      a.bias = data(bias);
      a.bias_dtype = dtype_code(*bias);
      a.bias_batch_stride = bias->stride(0);
      a.bias_head_stride = bias->stride(1);
      a.bias_query_stride = bias->stride(2);
    }
    const auto kept_at = [&](size_t i) { return i < kept.size() ? data(kept[i]) : nullptr; };
    a.kept = {kept_at(0), kept_at(1), kept_at(2), static_cast<float*>(kept_at(3)), kept_at(4), kept_at(5), kept_at(6)};
    fill_layers(packed);
    a.layers = layers.data();
  }

  void fill_layers(const Tensors& packed) {
    const size_t each = packed.size() / layers.size();
    for (size_t i = 0; i < layers.size(); ++i) {
      const Tensor* w = &packed[i * each];
      albert_encoder_layer& layer = layers[i];
      layer.qkv = data(w[0]);
      layer.dense = data(w[1]);
      layer.ffn = data(w[2]);
      layer.ffn_output = data(w[3]);
      if (each == 8) {
        layer.qkv_transposed = data(w[4]);
        layer.dense_transposed = data(w[5]);
        layer.ffn_transposed = data(w[6]);
        layer.ffn_output_transposed = data(w[7]);
      }
      layer.qkv_bias = vectors.next(3 * args.hidden);
      layer.dense_bias = vectors.next(args.hidden);
      layer.attention_norm_weight = vectors.next(args.hidden);
      layer.attention_norm_bias = vectors.next(args.hidden);
      layer.ffn_bias = vectors.next(args.inner);
      layer.ffn_output_bias = vectors.next(args.hidden);
      layer.norm_weight = vectors.next(args.hidden);
      layer.norm_bias = vectors.next(args.hidden);
    }
  }
};

// corrections: float32 [passes, 5 hidden + inner]; output: [tokens, hidden] or [passes + 1, tokens, hidden].
void encoder(Tensor hidden, Tensors parameters, Tensors packed, Tensor cu_seqlens, std::vector<int64_t> layer_of_pass,
             int64_t heads, int64_t activation, double eps, double hidden_dropout_p, double attention_dropout_p,
             int64_t seed, OptionalTensor bias, OptionalTensor corrections, Tensors kept, Tensor output) {
  Encoder e(hidden, parameters, packed, cu_seqlens, std::move(layer_of_pass), heads, activation, eps, hidden_dropout_p,
            attention_dropout_p, seed, bias, kept);
  e.args.corrections = corrections.has_value() ? data<const float>(*corrections) : nullptr;
  e.args.input = data(hidden);
  e.args.output = data(output);
  e.args.all_states = output.dim() == 3;
  const albert_parallel parallel = threads();
  const size_t bytes = albert_encoder_workspace_bytes(&e.args, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_encoder(&e.args, workspace.data(), bytes, &parallel), "encoder");
}

// gradients: 12 a layer, float32 and added to, as albert_encoder_layer_gradients has them.
void encoder_backward(Tensor grad_output, Tensors parameters, Tensors packed, Tensor cu_seqlens,
                      std::vector<int64_t> layer_of_pass, int64_t heads, int64_t activation, double eps,
                      double hidden_dropout_p, double attention_dropout_p, int64_t seed, OptionalTensor bias,
                      Tensors kept, Tensor grad_hidden, Tensors gradients) {
  Encoder e(grad_output, parameters, packed, cu_seqlens, std::move(layer_of_pass), heads, activation, eps,
            hidden_dropout_p, attention_dropout_p, seed, bias, kept);
  e.args.all_states = grad_output.dim() == 3;
  std::vector<albert_encoder_layer_gradients> layers(e.layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto at = [&](size_t j) { return data<float>(gradients[i * 12 + j]); };
    layers[i] = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
  }
  const albert_encoder_gradients g{data(grad_output), data(grad_hidden), layers.data()};
  const albert_parallel parallel = threads();
  const size_t bytes = albert_encoder_backward_workspace_bytes(&e.args, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_encoder_backward(&e.args, &g, workspace.data(), bytes, &parallel), "encoder_backward");
}

// ---------------------------------------------------------------------------------------------------------- attention

albert_attention_args attention_args(const Tensor& query, const Tensor& key, const Tensor& value,
                                     const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, bool causal,
                                     double dropout_p, int64_t seed, int64_t site, double scale,
                                     const OptionalTensor& bias, const Tensor& output, float* logsumexp) {
  albert_attention_args a{};
  a.dtype = dtype_code(query);
  a.batch = cu_seqlens_q.numel() - 1;
  a.heads = query.size(1);
  a.head_dim = query.size(2);
  a.tokens_q = query.size(0);
  a.tokens_k = key.size(0);
  a.query = data(query);
  a.query_token_stride = query.stride(0);
  a.query_head_stride = query.stride(1);
  a.key = data(key);
  a.key_token_stride = key.stride(0);
  a.key_head_stride = key.stride(1);
  a.value = data(value);
  a.value_token_stride = value.stride(0);
  a.value_head_stride = value.stride(1);
  a.cu_seqlens_q = data<const int32_t>(cu_seqlens_q);
  a.cu_seqlens_k = data<const int32_t>(cu_seqlens_k);
  a.causal = causal;
  a.scale = static_cast<float>(scale);
  if (bias.has_value()) {
    a.bias = data(bias);
    a.bias_dtype = dtype_code(*bias);
    a.bias_batch_stride = bias->stride(0);
    a.bias_head_stride = bias->stride(1);
    a.bias_query_stride = bias->stride(2);
  }
  a.dropout_p = dropout_p;
  a.seed = static_cast<uint64_t>(seed);
  a.site = static_cast<uint32_t>(site);
  a.output = data(output);
  a.output_stride = a.heads * a.head_dim;
  a.logsumexp = logsumexp;
  return a;
}

void attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal,
               double dropout_p, int64_t seed, int64_t site, double scale, OptionalTensor bias, Tensor output,
               Tensor logsumexp) {
  const albert_attention_args a = attention_args(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, dropout_p, seed,
                                                 site, scale, bias, output, data<float>(logsumexp));
  const albert_parallel parallel = threads();
  const size_t bytes = albert_attention_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_attention(&a, workspace.data(), bytes, &parallel), "attention");
}

void attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp,
                        Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, double dropout_p, int64_t seed,
                        int64_t site, double scale, OptionalTensor bias, Tensor grad_query, Tensor grad_key,
                        Tensor grad_value) {
  const albert_attention_args a = attention_args(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, dropout_p, seed,
                                                 site, scale, bias, output, data<float>(logsumexp));
  const int64_t width = a.heads * a.head_dim;
  const albert_attention_gradients g{data(grad_output), width, data(grad_query), width, a.head_dim, data(grad_key),
                                     width, a.head_dim, data(grad_value), width, a.head_dim};
  const albert_parallel parallel = threads();
  const size_t bytes = albert_attention_backward_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_attention_backward(&a, &g, workspace.data(), bytes, &parallel), "attention_backward");
}

// -------------------------------------------------------------------------------------------------- between products

albert_dropout dropout_args(double p, int64_t seed, int64_t site, const OptionalTensor& cu_seqlens) {
  return {p, static_cast<uint64_t>(seed), static_cast<uint32_t>(site), data<const int32_t>(cu_seqlens),
          cu_seqlens.has_value() ? cu_seqlens->numel() - 1 : 0};
}

albert_layer_norm_args layer_norm_args(const Tensor& x, const Tensor& residual, double eps, double dropout_p,
                                       int64_t seed, int64_t site, const OptionalTensor& cu_seqlens) {
  albert_layer_norm_args a{};
  a.m = x.size(0);
  a.n = x.size(1);
  a.x = data(x);
  a.x_stride = x.stride(0);
  a.x_dtype = dtype_code(x);
  a.residual = data(residual);
  a.residual_stride = residual.stride(0);
  a.residual_dtype = dtype_code(residual);
  a.eps = static_cast<float>(eps);
  a.dropout = dropout_args(dropout_p, seed, site, cu_seqlens);
  return a;
}

void dropout_add_layer_norm(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor ln_bias, double eps,
                            double dropout_p, int64_t seed, int64_t site, OptionalTensor cu_seqlens, Tensor y) {
  albert_layer_norm_args a = layer_norm_args(x, residual, eps, dropout_p, seed, site, cu_seqlens);
  Vectors vectors({bias, weight, ln_bias});
  a.bias = vectors.next(a.n);
  a.weight = vectors.next(a.n);
  a.ln_bias = vectors.next(a.n);
  a.y = data(y);
  a.y_stride = a.n;
  const albert_parallel parallel = threads();
  check(albert_dropout_add_layer_norm(&a, &parallel), "dropout_add_layer_norm");
}

// The gradients of vectors are float32 and added to.
void dropout_add_layer_norm_backward(Tensor grad_output, Tensor x, Tensor bias, Tensor residual, Tensor weight,
                                     double eps, double dropout_p, int64_t seed, int64_t site,
                                     OptionalTensor cu_seqlens, Tensor grad_x, Tensor grad_residual, Tensor grad_bias,
                                     Tensor grad_weight, Tensor grad_ln_bias) {
  albert_layer_norm_args a = layer_norm_args(x, residual, eps, dropout_p, seed, site, cu_seqlens);
  Vectors vectors({bias, weight});
  a.bias = vectors.next(a.n);
  a.weight = vectors.next(a.n);
  a.grad_y = data(grad_output);
  a.grad_x = data(grad_x);
  a.grad_residual = data(grad_residual);
  a.grad_y_stride = a.grad_x_stride = a.grad_residual_stride = a.n;
  a.grad_bias = data<float>(grad_bias);
  a.grad_weight = data<float>(grad_weight);
  a.grad_ln_bias = data<float>(grad_ln_bias);
  const albert_parallel parallel = threads();
  const size_t bytes = albert_layer_norm_backward_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_layer_norm_backward(&a, workspace.data(), bytes, &parallel), "dropout_add_layer_norm_backward");
}

// y = x weight^T of a packed weight.
void product(Tensor x, Tensor weight, Tensor y) {
  albert_gemm_args a{};
  a.m = x.size(0);
  a.x = data(x);
  a.x_stride = x.size(1);
  a.x_dtype = dtype_code(x);
  a.weight = data(weight);
  a.y = data(y);
  a.y_stride = y.size(1);
  a.y_dtype = dtype_code(y);
  const albert_parallel parallel = threads();
  const size_t bytes = albert_gemm_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_gemm(&a, workspace.data(), bytes, &parallel), "product");
}

albert_bias_gelu_args bias_gelu_args(const Tensor& x, int64_t activation) {
  albert_bias_gelu_args a{};
  a.m = x.size(0);
  a.n = x.size(1);
  a.x = data(x);
  a.x_stride = a.y_stride = a.grad_y_stride = a.grad_x_stride = a.n;
  a.dtype = dtype_code(x);
  a.activation = static_cast<int>(activation);
  return a;
}

void bias_gelu(Tensor x, Tensor bias, int64_t activation, Tensor y) {
  albert_bias_gelu_args a = bias_gelu_args(x, activation);
  Vectors vectors({bias});
  a.bias = vectors.next(a.n);
  a.y = data(y);
  const albert_parallel parallel = threads();
  check(albert_bias_gelu(&a, &parallel), "bias_gelu");
}

void bias_gelu_backward(Tensor grad_output, Tensor x, Tensor bias, int64_t activation, Tensor grad_x,
                        Tensor grad_bias) {
  albert_bias_gelu_args a = bias_gelu_args(x, activation);
  Vectors vectors({bias});
  a.bias = vectors.next(a.n);
  a.grad_y = data(grad_output);
  a.grad_x = data(grad_x);
  a.grad_bias = data<float>(grad_bias);
  const albert_parallel parallel = threads();
  const size_t bytes = albert_bias_gelu_backward_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_bias_gelu_backward(&a, workspace.data(), bytes, &parallel), "bias_gelu_backward");
}

// --------------------------------------------------------------------------------------------------------- embeddings

bool holds_floats(const Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() != ScalarType::Long && x.scalar_type() != ScalarType::Int;
}

albert_embedding embedding(const Tensor* ids, const Tensor& table) {
  albert_embedding e{};
  if (ids != nullptr) {
    e.ids = data(*ids);
    e.id_bytes = ids->scalar_type() == torch::headeronly::ScalarType::Long ? 8 : 4;
  }
  e.table = data(table);
  e.rows = table.size(0);
  e.stride = table.stride(0);
  return e;
}

albert_embed_args embed_args(const Tensor& inputs, const Tensor& position_ids, const Tensor& token_type_ids,
                             const Tensor& word, const Tensor& position, const Tensor& token_type, double eps,
                             double dropout_p, int64_t seed, int64_t site, const OptionalTensor& cu_seqlens) {
  albert_embed_args a{};
  a.tokens = inputs.size(0);
  a.size = word.size(1);
  a.dtype = dtype_code(word);
  a.word = embedding(holds_floats(inputs) ? nullptr : &inputs, word);
  a.position = embedding(&position_ids, position);
  a.token_type = embedding(&token_type_ids, token_type);
  if (holds_floats(inputs)) {
    a.inputs = data(inputs);
    a.inputs_stride = inputs.stride(0);
  }
  a.eps = static_cast<float>(eps);
  a.dropout = dropout_args(dropout_p, seed, site, cu_seqlens);
  a.y_stride = a.grad_y_stride = a.grad_inputs_stride = a.size;
  return a;
}

// False where an id is no row of its table, or a stride is not served; nothing is written then.
bool embed_layer_norm(Tensor inputs, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position,
                      Tensor token_type, Tensor weight, Tensor bias, double eps, double dropout_p, int64_t seed,
                      int64_t site, OptionalTensor cu_seqlens, Tensor y) {
  albert_embed_args a = embed_args(inputs, position_ids, token_type_ids, word, position, token_type, eps, dropout_p,
                                   seed, site, cu_seqlens);
  Vectors vectors({weight, bias});
  a.weight = vectors.next(a.size);
  a.bias = vectors.next(a.size);
  a.y = data(y);
  const albert_parallel parallel = threads();
  const int error = albert_embed_layer_norm(&a, &parallel);
  if (error == ALBERT_BAD_ARGUMENT) return false;
  check(error, "embed_layer_norm");
  return true;
}

// The gradients of tables and vectors are float32 and added to; grad_inputs has elements only where inputs are vectors.
void embed_layer_norm_backward(Tensor grad_output, Tensor inputs, Tensor position_ids, Tensor token_type_ids,
                               Tensor word, Tensor position, Tensor token_type, Tensor weight, double eps,
                               double dropout_p, int64_t seed, int64_t site, OptionalTensor cu_seqlens,
                               int64_t padding_idx, Tensor grad_inputs, Tensor grad_word, Tensor grad_position,
                               Tensor grad_token_type, Tensor grad_weight, Tensor grad_bias) {
  albert_embed_args a = embed_args(inputs, position_ids, token_type_ids, word, position, token_type, eps, dropout_p,
                                   seed, site, cu_seqlens);
  Vectors vectors({weight});
  a.weight = vectors.next(a.size);
  a.grad_y = data(grad_output);
  if (holds_floats(inputs))
    a.grad_inputs = data(grad_inputs);
  else
    a.word.gradient = data<float>(grad_word);
  a.position.gradient = data<float>(grad_position);
  a.token_type.gradient = data<float>(grad_token_type);
  a.word.gradient_stride = a.position.gradient_stride = a.token_type.gradient_stride = a.size;
  a.grad_weight = data<float>(grad_weight);
  a.grad_bias = data<float>(grad_bias);
  a.padding_idx = padding_idx;
  const albert_parallel parallel = threads();
  const size_t bytes = albert_embed_layer_norm_backward_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_embed_layer_norm_backward(&a, workspace.data(), bytes, &parallel), "embed_layer_norm_backward");
}

// -------------------------------------------------------------------------------------------------------------- model

enum : int64_t { kDone = 0, kUnfit = 1, kStale = 2 };

// Whether x is a dense CPU tensor of this dtype and shape; -1 for any size.
bool is(const Tensor& x, torch::headeronly::ScalarType dtype, std::initializer_list<int64_t> shape) {
  if (x.scalar_type() != dtype || x.dim() != static_cast<int64_t>(shape.size()) || !x.is_contiguous()) return false;
  int64_t i = 0;
  for (const int64_t size : shape)
    if (const int64_t have = x.size(i++); size >= 0 && have != size) return false;
  return true;
}

bool are_ids(const OptionalTensor& x, int64_t tokens) {
  using torch::headeronly::ScalarType;
  return x.has_value() && (is(*x, ScalarType::Long, {tokens}) || is(*x, ScalarType::Int, {tokens}));
}

// Offsets of packed rows of at most `longest` tokens, as albert_fast/ops/checks.py asks for.
bool are_offsets(const Tensor& x, int64_t tokens, int64_t longest) {
  if (!is(x, torch::headeronly::ScalarType::Int, {-1}) || x.numel() < 1) return false;
  const int32_t* offsets = data<const int32_t>(x);
  for (int64_t i = 1; i < x.numel(); ++i)
    if (offsets[i] < offsets[i - 1] || offsets[i] - offsets[i - 1] > longest) return false;
  return offsets[0] == 0 && offsets[x.numel() - 1] <= tokens;
}

bool are_layers(const Tensors& parameters, torch::headeronly::ScalarType dtype, int64_t hidden) {
  if (parameters.empty() || parameters.size() % 16 != 0) return false;
  for (size_t i = 0; i < parameters.size(); i += 16) {
    const Tensor* p = &parameters[i];
    if (p[10].dim() != 2) return false;
    const int64_t inner = parameters[10].size(0);
    for (const size_t square : {0, 2, 4, 6})
      if (!is(p[square], dtype, {hidden, hidden})) return false;
    for (const size_t vector : {1, 3, 5, 7, 8, 9, 13, 14, 15})
      if (!is(p[vector], dtype, {hidden})) return false;
    if (!is(p[10], dtype, {inner, hidden}) || !is(p[11], dtype, {inner}) || !is(p[12], dtype, {hidden, inner}))
      return false;
  }
  return true;
}

// Inference of a whole model. inputs: ids [tokens], or with no `tables` what comes out of the embeddings, [tokens, E].
// tables: word, position and token type, and weight and bias of their LayerNorm. ends: weight and bias of the
// projection and, with `pooled`, of the pooler. packed: 4 or 8 a layer, then one for each of the ends, or nothing yet.
// fingerprints: of parameters and ends as they were packed.
// kUnfit: a tensor, offset or id is not as it has to be, which is for the operations by themselves to explain. kStale:
// the matrices have changed since they were packed, or never were. Nothing is written then.
int64_t model(Tensor inputs, OptionalTensor position_ids, OptionalTensor token_type_ids, Tensors tables, Tensors ends,
              Tensors parameters, Tensors packed, std::vector<int64_t> fingerprints, Tensor cu_seqlens,
              int64_t max_seqlen, std::vector<int64_t> layer_of_pass, int64_t heads, int64_t activation, double eps,
              double embedding_eps, OptionalTensor corrections, Tensor output, OptionalTensor pooled) {
  const auto dtype = output.scalar_type();
  const int64_t tokens = output.size(0), hidden = output.size(1);
  if (!are_layers(parameters, dtype, hidden) || !are_offsets(cu_seqlens, tokens, max_seqlen)) return kUnfit;
  const int64_t size = ends[0].dim() == 2 ? ends[0].size(1) : 0;
  if (size == 0 || !is(ends[0], dtype, {hidden, size}) || !is(ends[1], dtype, {hidden})) return kUnfit;
  if (pooled.has_value() && (!is(ends[2], dtype, {hidden, hidden}) || !is(ends[3], dtype, {hidden}))) return kUnfit;
  if (tables.empty()) {
    if (!is(inputs, dtype, {tokens, size})) return kUnfit;
  } else {
    if (!are_ids(inputs, tokens) || !are_ids(position_ids, tokens) || !are_ids(token_type_ids, tokens)) return kUnfit;
    for (size_t i = 0; i < 3; ++i)
      if (!is(tables[i], dtype, {-1, size})) return kUnfit;
    if (!is(tables[3], dtype, {size}) || !is(tables[4], dtype, {size})) return kUnfit;
  }
  if (packed.empty() || fingerprint(parameters) != fingerprints[0] || fingerprint(ends) != fingerprints[1])
    return kStale;

  albert_model_args a{};
  Vectors embedding_vectors(tables), end_vectors(ends);
  if (tables.empty()) {
    a.embedded = data(inputs);
    a.embed.size = size;
  } else {
    a.embed = embed_args(inputs, *position_ids, *token_type_ids, tables[0], tables[1], tables[2], embedding_eps, 0.0, 0,
                         0, std::nullopt);
    a.embed.weight = embedding_vectors.next(size);
    a.embed.bias = embedding_vectors.next(size);
  }
  const size_t of_layers = packed.size() - ends.size() / 2;
  a.projection = data(packed[of_layers]);
  a.projection_bias = end_vectors.next(hidden);
  if (pooled.has_value()) {
    a.pooler = data(packed[of_layers + 1]);
    a.pooler_bias = end_vectors.next(hidden);
    a.pooled = data(*pooled);
  }
  packed.resize(of_layers);
  Encoder e(output, parameters, packed, cu_seqlens, std::move(layer_of_pass), heads, activation, eps, 0.0, 0.0, 0,
            std::nullopt, {});
  e.args.corrections = corrections.has_value() ? data<const float>(*corrections) : nullptr;
  e.args.output = data(output);
  a.encoder = e.args;
  const albert_parallel parallel = threads();
  const size_t bytes = albert_model_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  const int error = albert_model(&a, workspace.data(), bytes, &parallel);
  if (error == ALBERT_BAD_ARGUMENT) return kUnfit;  // an id that is no row of its table
  check(error, "model");
  return kDone;
}

// --------------------------------------------------------------------------------------------------------------- loss

albert_masked_lm_loss_args loss_args(const Tensor& x, const Tensor& table, const Tensor& labels, int64_t ignore_index,
                                     double label_smoothing, double z_loss) {
  albert_masked_lm_loss_args a{};
  a.dtype = dtype_code(x);
  a.tokens = x.size(0);
  a.size = x.size(1);
  a.vocabulary = table.size(0);
  a.x = data(x);
  a.x_stride = x.stride(0);
  a.table = data(table);
  a.table_stride = table.stride(0);
  a.labels = data<const int64_t>(labels);
  a.ignore_index = ignore_index;
  a.label_smoothing = label_smoothing;
  a.z_loss = z_loss;
  return a;
}

void masked_lm_loss(Tensor x, Tensor table, Tensor bias, Tensor labels, int64_t ignore_index, double label_smoothing,
                    double z_loss, Tensor loss, Tensor logsumexp, Tensor correct) {
  albert_masked_lm_loss_args a = loss_args(x, table, labels, ignore_index, label_smoothing, z_loss);
  Vectors vectors({bias});
  a.bias = vectors.next(a.vocabulary);
  a.loss = data<float>(loss);
  a.logsumexp = data<float>(logsumexp);
  a.correct = data<uint8_t>(correct);
  const albert_parallel parallel = threads();
  const size_t bytes = albert_masked_lm_loss_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_masked_lm_loss(&a, workspace.data(), bytes, &parallel), "masked_lm_loss");
}

// The gradients of table and bias are float32 and added to.
void masked_lm_loss_backward(Tensor grad_loss, Tensor x, Tensor table, Tensor bias, Tensor labels, Tensor logsumexp,
                             int64_t ignore_index, double label_smoothing, double z_loss, Tensor grad_x,
                             Tensor grad_table, Tensor grad_bias) {
  albert_masked_lm_loss_args a = loss_args(x, table, labels, ignore_index, label_smoothing, z_loss);
  Vectors vectors({bias});
  a.bias = vectors.next(a.vocabulary);
  a.logsumexp = data<float>(logsumexp);
  a.grad_loss = data<const float>(grad_loss);
  a.grad_x = data(grad_x);
  a.grad_x_stride = a.grad_table_stride = a.size;
  a.grad_table = data<float>(grad_table);
  a.grad_bias = data<float>(grad_bias);
  const albert_parallel parallel = threads();
  const size_t bytes = albert_masked_lm_loss_backward_workspace_bytes(&a, parallel.threads);
  const Workspace workspace(bytes);
  check(albert_masked_lm_loss_backward(&a, workspace.data(), bytes, &parallel), "masked_lm_loss_backward");
}

// -------------------------------------------------------------------------------------------------------------- trace

// spans: int64 [capacity, 8], as albert_span has them; it must live until trace_end.
void trace_begin(Tensor spans) {
  static_assert(sizeof(albert_span) == 8 * sizeof(int64_t), "a row of spans");
  check(albert_trace_begin(data<albert_span>(spans), spans.size(0)), "trace_begin");
}

int64_t trace_end() { return albert_trace_end(); }

// Empty beyond the last kind.
std::string span_name(int64_t kind) {
  const char* name = albert_span_name(kind);
  return name == nullptr ? "" : name;
}

}  // namespace

STABLE_TORCH_LIBRARY(albert_fast_native, m) {
  m.def("isa() -> str");
  m.def("packed_bytes(int dtype, int n, int k) -> int");
  m.def("advise(Tensor memory) -> ()");
  m.def("pack(Tensor weight, int dtype, Tensor(a!) packed) -> ()");
  m.def("fingerprint(Tensor[] tensors) -> int");
  m.def(
      "encoder(Tensor hidden, Tensor[] parameters, Tensor[] packed, Tensor cu_seqlens, int[] layer_of_pass, int heads, "
      "int activation, float eps, float hidden_dropout_p, float attention_dropout_p, int seed, Tensor? bias, "
      "Tensor? corrections, Tensor(a!)[] kept, Tensor(b!) output) -> ()");
  m.def(
      "encoder_backward(Tensor grad_output, Tensor[] parameters, Tensor[] packed, Tensor cu_seqlens, "
      "int[] layer_of_pass, int heads, int activation, float eps, float hidden_dropout_p, float attention_dropout_p, "
      "int seed, Tensor? bias, Tensor[] kept, Tensor(a!) grad_hidden, Tensor(b!)[] gradients) -> ()");
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, "
      "float dropout_p, int seed, int site, float scale, Tensor? bias, Tensor(a!) output, Tensor(b!) logsumexp) -> ()");
  m.def(
      "attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, Tensor logsumexp, "
      "Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float dropout_p, int seed, int site, float scale, "
      "Tensor? bias, Tensor(a!) grad_query, Tensor(b!) grad_key, Tensor(c!) grad_value) -> ()");
  m.def(
      "dropout_add_layer_norm(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor ln_bias, float eps, "
      "float dropout_p, int seed, int site, Tensor? cu_seqlens, Tensor(a!) y) -> ()");
  m.def(
      "dropout_add_layer_norm_backward(Tensor grad_output, Tensor x, Tensor bias, Tensor residual, Tensor weight, "
      "float eps, float dropout_p, int seed, int site, Tensor? cu_seqlens, Tensor(a!) grad_x, "
      "Tensor(b!) grad_residual, Tensor(c!) grad_bias, Tensor(d!) grad_weight, Tensor(e!) grad_ln_bias) -> ()");
  m.def("product(Tensor x, Tensor weight, Tensor(a!) y) -> ()");
  m.def("bias_gelu(Tensor x, Tensor bias, int activation, Tensor(a!) y) -> ()");
  m.def(
      "bias_gelu_backward(Tensor grad_output, Tensor x, Tensor bias, int activation, Tensor(a!) grad_x, "
      "Tensor(b!) grad_bias) -> ()");
  m.def(
      "embed_layer_norm(Tensor inputs, Tensor position_ids, Tensor token_type_ids, Tensor word, Tensor position, "
      "Tensor token_type, Tensor weight, Tensor bias, float eps, float dropout_p, int seed, int site, "
      "Tensor? cu_seqlens, Tensor(a!) y) -> bool");
  m.def(
      "embed_layer_norm_backward(Tensor grad_output, Tensor inputs, Tensor position_ids, Tensor token_type_ids, "
      "Tensor word, Tensor position, Tensor token_type, Tensor weight, float eps, float dropout_p, int seed, int site, "
      "Tensor? cu_seqlens, int padding_idx, Tensor(a!) grad_inputs, Tensor(b!) grad_word, Tensor(c!) grad_position, "
      "Tensor(d!) grad_token_type, Tensor(e!) grad_weight, Tensor(f!) grad_bias) -> ()");
  m.def(
      "model(Tensor inputs, Tensor? position_ids, Tensor? token_type_ids, Tensor[] tables, Tensor[] ends, "
      "Tensor[] parameters, Tensor[] packed, int[] fingerprints, Tensor cu_seqlens, int max_seqlen, "
      "int[] layer_of_pass, int heads, int activation, float eps, float embedding_eps, Tensor? corrections, "
      "Tensor(a!) output, Tensor(b!)? pooled) -> int");
  m.def(
      "masked_lm_loss(Tensor x, Tensor table, Tensor bias, Tensor labels, int ignore_index, float label_smoothing, "
      "float z_loss, Tensor(a!) loss, Tensor(b!) logsumexp, Tensor(c!) correct) -> ()");
  m.def(
      "masked_lm_loss_backward(Tensor grad_loss, Tensor x, Tensor table, Tensor bias, Tensor labels, Tensor logsumexp, "
      "int ignore_index, float label_smoothing, float z_loss, Tensor(a!) grad_x, Tensor(b!) grad_table, "
      "Tensor(c!) grad_bias) -> ()");
  m.def("trace_begin(Tensor(a!) spans) -> ()");
  m.def("trace_end() -> int");
  m.def("span_name(int kind) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(albert_fast_native, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&isa));
  m.impl("packed_bytes", TORCH_BOX(&packed_bytes));
  m.impl("trace_end", TORCH_BOX(&trace_end));
  m.impl("span_name", TORCH_BOX(&span_name));
}

STABLE_TORCH_LIBRARY_IMPL(albert_fast_native, CPU, m) {
  m.impl("advise", TORCH_BOX(&advise));
  m.impl("pack", TORCH_BOX(&pack));
  m.impl("fingerprint", TORCH_BOX(&fingerprint));
  m.impl("encoder", TORCH_BOX(&encoder));
  m.impl("encoder_backward", TORCH_BOX(&encoder_backward));
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("dropout_add_layer_norm", TORCH_BOX(&dropout_add_layer_norm));
  m.impl("dropout_add_layer_norm_backward", TORCH_BOX(&dropout_add_layer_norm_backward));
  m.impl("product", TORCH_BOX(&product));
  m.impl("bias_gelu", TORCH_BOX(&bias_gelu));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
  m.impl("embed_layer_norm", TORCH_BOX(&embed_layer_norm));
  m.impl("embed_layer_norm_backward", TORCH_BOX(&embed_layer_norm_backward));
  m.impl("model", TORCH_BOX(&model));
  m.impl("masked_lm_loss", TORCH_BOX(&masked_lm_loss));
  m.impl("masked_lm_loss_backward", TORCH_BOX(&masked_lm_loss_backward));
  m.impl("trace_begin", TORCH_BOX(&trace_begin));
}
