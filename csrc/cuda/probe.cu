// Measures what a barrier, a load and a launch cost: each kernel repeats one thing, and the difference between many and
// few repetitions, over their number, is its cost.
#include "probe.h"

#ifdef __CUDACC__
#include <algorithm>

#include "resident_block.h"

namespace albert {
namespace {

constexpr int kLoadBytes = 96 << 10;  // that a block loads at a time: all blocks' share stays in L2

ALBERT_KERNEL(kThreads) void repeat_grid_barrier(uint32_t* arrivals, int repeats) {
  for (uint32_t i = 1; i <= static_cast<uint32_t>(repeats); ++i) {
    sync_block();
    if (thread_index() == 0) {
      add_release(arrivals, 1);
      while (load_acquire(arrivals) < i * static_cast<uint32_t>(block_count())) pause();
    }
    sync_block();
  }
}

ALBERT_KERNEL(kThreads) void repeat_cluster_barrier(int repeats) {
  for (int i = 0; i < repeats; ++i) sync_cluster();
}

ALBERT_KERNEL(kThreads) void repeat_shared_load(const char* from, int repeats) {
  for (int r = 0; r < repeats; ++r) {
    for (int i = thread_index() * 16; i < kLoadBytes; i += kThreads * 16) copy_async(shared_memory() + i, from + i);
    wait_copies();
    sync_block();
  }
}

ALBERT_KERNEL(kThreads) void repeat_register_load(const char* from, int repeats, uint32_t* to) {
  uint32_t sum = 0;
  for (int r = 0; r < repeats; ++r) {
#pragma unroll 8
    for (int i = thread_index() * 16; i < kLoadBytes; i += kThreads * 16) {
      const Eight x = load_shared_by_blocks(from + i);
      sum += x.pair[0] ^ x.pair[1] ^ x.pair[2] ^ x.pair[3];
    }
  }
  if (sum == 0x12345678u) *to = sum;  // nearly never: the loads must not be dropped
}

ALBERT_KERNEL(kThreads) void repeat_multiply(int repeats, float* to) {
  Four sums[8] = {};
  const uint32_t a[4] = {static_cast<uint32_t>(thread_index()), 1, 2, 3};
  for (int r = 0; r < repeats; ++r)
#pragma unroll
    for (int i = 0; i < 8; ++i) multiply_add(sums[i], a, 4, 5, Bf16{});
  float total = 0;
  for (const Four& sum : sums) total += sum.value[0] + sum.value[1] + sum.value[2] + sum.value[3];
  if (total == 1.2345e30f) *to = total;
}

ALBERT_KERNEL(kThreads) void nothing() {}

struct Probe {
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;
  char* memory = nullptr;  // kLoadBytes, then the barrier's count
  int blocks = 0;
  cudaError_t error = cudaSuccess;

  bool good(cudaError_t e) {
    if (error == cudaSuccess) error = e;
    return error == cudaSuccess;
  }
  uint32_t* count() const { return reinterpret_cast<uint32_t*>(memory + kLoadBytes); }

  // Microseconds of work(): the least of five.
  template <class Work>
  double time(Work work) {
    double best = 1e30;
    for (int i = 0; i < 5 && error == cudaSuccess; ++i) {
      float milliseconds = 0;
      good(cudaMemsetAsync(count(), 0, sizeof(uint32_t), stream));
      good(cudaEventRecord(begin, stream));
      work();
      good(cudaEventRecord(end, stream));
      good(cudaEventSynchronize(end));
      good(cudaEventElapsedTime(&milliseconds, begin, end));
      best = std::min(best, 1e3 * milliseconds);
    }
    return best;
  }
  // Microseconds of one repetition of what work(repeats) repeats.
  template <class Work>
  float each(int repeats, Work work) {
    return static_cast<float>((time([&] { work(11 * repeats); }) - time([&] { work(repeats); })) / (10 * repeats));
  }

  template <class... P, class... A>
  void launch(void (*kernel)(P...), int grid, size_t shared, int cluster, bool cooperative, A... arguments) {
    cudaLaunchAttribute attributes[2];
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = cooperative;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t c{};
    c.gridDim = dim3(static_cast<unsigned>(grid));
    c.blockDim = dim3(kThreads);
    c.dynamicSmemBytes = shared;
    c.stream = stream;
    c.attrs = attributes;
    c.numAttrs = cluster > 1 ? 2 : 1;
    good(cudaLaunchKernelEx(&c, kernel, arguments...));
  }

  float graph(int nodes) {
    cudaGraph_t captured = nullptr;
    cudaGraphExec_t executable = nullptr;
    good(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < nodes; ++i) launch(nothing, 1, 0, 1, false);
    good(cudaStreamEndCapture(stream, &captured));
    if (error == cudaSuccess) good(cudaGraphInstantiate(&executable, captured, 0));
    const double microseconds = time([&] { good(cudaGraphLaunch(executable, stream)); });
    if (executable != nullptr) cudaGraphExecDestroy(executable);
    if (captured != nullptr) cudaGraphDestroy(captured);
    return static_cast<float>(microseconds);
  }
};

}  // namespace
}  // namespace albert

extern "C" int albert_probe(albert_probe_figures* figures) {
  using namespace albert;
  Probe p;
  int device = 0, major = 0;
  p.good(cudaGetDevice(&device));
  p.good(cudaDeviceGetAttribute(&p.blocks, cudaDevAttrMultiProcessorCount, device));
  p.good(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  p.good(cudaStreamCreateWithFlags(&p.stream, cudaStreamNonBlocking));
  p.good(cudaEventCreate(&p.begin));
  p.good(cudaEventCreate(&p.end));
  p.good(cudaMalloc(&p.memory, kLoadBytes + 128));
  p.good(cudaFuncSetAttribute(repeat_shared_load, cudaFuncAttributeMaxDynamicSharedMemorySize, kLoadBytes));
  if (p.error == cudaSuccess) {
    const float bytes = kLoadBytes * 1e-3f;  // over microseconds: gigabytes a second
    const double flops = 2.0 * 16 * 8 * 16 * 8 * kWarps * p.blocks;
    figures->multiprocessors = p.blocks;
    figures->grid_barrier =
        p.each(100, [&](int n) { p.launch(repeat_grid_barrier, p.blocks, 0, 1, true, p.count(), n); });
    figures->cluster_barrier =
        major < 9 ? 0 : p.each(100, [&](int n) { p.launch(repeat_cluster_barrier, p.blocks / 8 * 8, 0, 8, false, n); });
    figures->shared_bytes =
        bytes / p.each(20, [&](int n) { p.launch(repeat_shared_load, p.blocks, kLoadBytes, 1, false, p.memory, n); });
    figures->register_bytes = bytes / p.each(20, [&](int n) {
      p.launch(repeat_register_load, p.blocks, 0, 1, false, p.memory, n, p.count() + 1);
    });
    figures->graph_node = (p.graph(110) - p.graph(10)) / 100;
    figures->multiply = static_cast<float>(flops * 1e-6 / p.each(1000, [&](int n) {
      p.launch(repeat_multiply, p.blocks, 0, 1, false, n, reinterpret_cast<float*>(p.count() + 1));
    }));
  }
  cudaFree(p.memory);
  if (p.begin != nullptr) cudaEventDestroy(p.begin);
  if (p.end != nullptr) cudaEventDestroy(p.end);
  if (p.stream != nullptr) cudaStreamDestroy(p.stream);
  return p.error;
}
#endif
