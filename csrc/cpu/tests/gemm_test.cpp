// Stand-alone: `gemm_test math` sweeps vec_math.h against the C library in double precision and fails beyond the errors
// it states; `gemm_test bench [threads]` prints each product's rate beside that of a kernel that never leaves its
// registers. Compiled for one instruction set (isa.h, -DALBERT_ISA=avx2 or avx512) and linked with the library.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "../gemm.h"
#include "../gemm_micro.h"
#include "../vec_math.h"

namespace {

namespace v = albert::ALBERT_ISA;

// ---- math ----

using Vector = v::F (*)(v::F);
using Scalar = double (*)(double);

double gelu_tanh(double x) {
  return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}
double gelu_tanh_gradient(double x) {
  const double c = std::sqrt(2 / M_PI), s = 1 / (1 + std::exp(-2 * c * (x + 0.044715 * x * x * x)));
  return s + x * s * (1 - s) * 2 * c * (1 + 3 * 0.044715 * x * x);
}
double gelu_erf(double x) { return 0.5 * x * std::erfc(-x * M_SQRT1_2); }
double gelu_erf_gradient(double x) {
  return 0.5 * std::erfc(-x * M_SQRT1_2) + x * std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
}

struct Worst {
  double ulp = 0, absolute = 0;  // |error| in units of the last place; and over max(1, |value|)
};

// Every stride-th float32 of [low, high], both signs of zero and the ends included.
Worst sweep(Vector vector, Scalar scalar, float low, float high) {
  Worst worst;
  alignas(64) float x[v::kLanes], y[v::kLanes];
  int lane = 0;
  const auto flush = [&] {
    v::store(y, vector(v::load(x)));
    for (int i = 0; i < lane; ++i) {
      const double want = scalar(x[i]), error = std::fabs(y[i] - want);
      int exponent;
      std::frexp(want, &exponent);
      const double ulp = std::ldexp(1.0, std::max(exponent, -125) - 24);
      if (!(error / ulp <= worst.ulp)) worst.ulp = error / ulp;
      const double absolute = error / std::max(1.0, std::fabs(want));
      if (!(absolute <= worst.absolute)) worst.absolute = absolute;
    }
    lane = 0;
  };
  const auto visit = [&](float value) {
    x[lane++] = value;
    if (lane == v::kLanes) flush();
  };
  for (int sign = 0; sign < 2; ++sign)
    for (uint64_t bits = 0; bits <= 0x7f800000; bits += 701) {
      const uint32_t word = static_cast<uint32_t>(bits) | static_cast<uint32_t>(sign) << 31;
      float value;
      __builtin_memcpy(&value, &word, 4);
      if (value >= low && value <= high) visit(value);
    }
  visit(low);
  visit(high);
  while (lane > 0 && lane < v::kLanes) x[lane] = x[lane - 1], ++lane;
  flush();
  return worst;
}

bool check(const char* name, Vector vector, Scalar scalar, float low, float high, double most_ulp,
           double most_absolute) {
  const Worst w = sweep(vector, scalar, low, high);
  const bool good = w.ulp <= most_ulp && w.absolute <= most_absolute;
  std::printf("%-20s [%g, %g]: %.2f ulp, absolute %.2g%s\n", name, low, high, w.ulp, w.absolute,
              good ? "" : "  TOO MUCH");
  return good;
}

struct Limits {
  const char* name;
  Vector f;
  double low, high;  // at minus and plus infinity
};

bool limits() {
  const double infinity = INFINITY;
  const Limits all[] = {{"exp", v::exp, 0, infinity},
                        {"tanh", v::tanh, -1, 1},
                        {"erf", v::erf, -1, 1},
                        {"gelu_tanh", v::gelu_tanh, NAN, infinity},  // -infinity times 0, as in torch
                        {"gelu_tanh_bf16", v::gelu_tanh_bf16, NAN, infinity},
                        {"gelu_erf", v::gelu_erf, 0, infinity},
                        {"gelu_tanh_gradient", v::gelu_tanh_gradient, 0, 1},
                        {"gelu_erf_gradient", v::gelu_erf_gradient, 0, 1}};
  bool good = true;
  const auto expect = [&](const Limits& one, float x, double want) {
    alignas(64) float y[v::kLanes];
    v::store(y, one.f(v::set(x)));
    const bool same = std::isnan(want) ? std::isnan(y[0]) : y[0] == want || std::fabs(y[0] - want) < 1e-30;
    if (!same) std::printf("%s(%g) = %g, not %g\n", one.name, x, y[0], want);
    good &= same;
  };
  for (const Limits& one : all) {
    expect(one, NAN, NAN);
    expect(one, -INFINITY, one.low);
    expect(one, INFINITY, one.high);
  }
  return good;
}

bool math() {
  bool good = limits();
  good &= check("exp", v::exp, std::exp, -87.3f, 88.7f, 1.5, 2e-7);
  good &= check("tanh", v::tanh, std::tanh, -INFINITY, INFINITY, 1.8, 2e-7);
  good &= check("erf", v::erf, std::erf, -INFINITY, INFINITY, 2.5, 2e-7);
  good &= check("gelu_tanh", v::gelu_tanh, gelu_tanh, -3, 1e30f, 10, 2e-7);
  good &= check("gelu_tanh", v::gelu_tanh, gelu_tanh, -10, -3, 1e3, 2e-7);
  good &= check("gelu_tanh_short", v::gelu_tanh_short, gelu_tanh, -1e20f, 1e20f, INFINITY, 1e-4);
  good &= check("gelu_tanh_short", v::gelu_tanh_short, gelu_tanh, -0.13f, 0.13f, 2e3, 1e-4);
  good &= check("gelu_tanh_bf16", v::gelu_tanh_bf16, gelu_tanh, -1e30f, 1e30f, INFINITY, 6e-7);
  good &= check("gelu_tanh_bf16", v::gelu_tanh_bf16, gelu_tanh, -5.4f, 1e30f, 2.2e4, 6e-7);
  good &= check("gelu_erf", v::gelu_erf, gelu_erf, -3, 1e30f, 10, 2e-7);
  good &= check("gelu_erf", v::gelu_erf, gelu_erf, -12, -3, 1e3, 2e-7);
  good &= check("gelu_tanh_gradient", v::gelu_tanh_gradient, gelu_tanh_gradient, -100, 100, 1e30, 4e-7);
  good &= check("gelu_erf_gradient", v::gelu_erf_gradient, gelu_erf_gradient, -100, 100, 1e30, 4e-7);
  return good;
}

// ---- bench ----

double best_seconds(const std::function<void()>& f, int times) {
  double best = 1e30;
  f();
  for (int i = 0; i < times; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

void run_threads(void*, int tasks, void (*task)(void*, int), void* argument) {
  std::vector<std::thread> threads;
  for (int i = 1; i < tasks; ++i) threads.emplace_back(task, argument, i);
  task(argument, 0);
  for (auto& thread : threads) thread.join();
}

struct Aligned {
  void* p;
  explicit Aligned(size_t bytes) : p(std::aligned_alloc(64, (bytes + 64) / 64 * 64)) { __builtin_memset(p, 0, bytes); }
  ~Aligned() { std::free(p); }
};

void bench(int threads) {
  const albert_parallel parallel{nullptr, threads, threads > 1 ? run_threads : nullptr};
  const char* names[] = {"float32", "bfloat16", "int8"};
  const int64_t shapes[][2] = {{2304, 768}, {768, 768}, {3072, 768}, {768, 3072}, {768, 128}, {128, 768}};
  for (int dtype : {ALBERT_F32, ALBERT_BF16, ALBERT_INT8})
    for (int64_t m : {1, 16, 128, 1024})
      for (const auto& [n, k] : shapes) {
        const auto floats = [](int64_t count) { return static_cast<size_t>(count) * 4; };
        const Aligned source(floats(n * k)), x(floats(m * k)), y(floats(m * n)), bias(floats(n));
        const Aligned packed(albert_packed_bytes(dtype, n, k));
        albert_pack(dtype, ALBERT_F32, source.p, k, 1, n, k, packed.p, nullptr);
        albert_gemm_args args{};
        args.m = m;
        args.x = x.p;
        args.x_stride = k;
        args.x_dtype = args.y_dtype = dtype == ALBERT_F32 ? ALBERT_F32 : ALBERT_BF16;
        args.weight = packed.p;
        args.y = y.p;
        args.y_stride = n;
        args.bias = static_cast<const float*>(bias.p);
        const size_t bytes = albert_gemm_workspace_bytes(&args, threads);
        const Aligned workspace(bytes);
        const double operations = 2e-9 * static_cast<double>(m * n * k);
        const int times = static_cast<int>(std::min(200.0, 10 / operations)) + 3;
        const double s = best_seconds([&] { albert_gemm(&args, workspace.p, bytes, &parallel); }, times);
        std::printf("%-8s m %4ld n %4ld k %4ld  %9.1f us  %6.1f G/s\n", names[dtype], static_cast<long>(m),
                    static_cast<long>(n), static_cast<long>(k), s * 1e6, operations / s);
      }
}

// The rate at which one thread multiplies float32 without touching memory: the ceiling of all of the above.
void ceiling() {
  const double s = best_seconds([] {
    v::F sums[12];
    for (auto& sum : sums) sum = v::zero();
    const v::F x = v::set(1e-9f);
    for (int i = 0; i < 20000; ++i)
#pragma GCC unroll 12
      for (auto& sum : sums) {
        sum = v::fma(x, x, sum);
        asm volatile("" : "+v"(sum));
      }
  }, 100);
  std::printf("register ceiling, float32, one thread: %.1f G/s\n", 2e-9 * 12 * 20000 * v::kLanes / s);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "math";
  std::printf("%s\n", albert_isa());
  if (mode == "math") return math() ? 0 : 1;
  ceiling();
  bench(argc > 2 ? std::atoi(argv[2]) : 1);
}
