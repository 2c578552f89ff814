// What the kernels of this folder ask of the machine. Under nvcc these are its instructions; any other compiler takes
// host.h, which runs the same kernels on the CPU, for tests.
#pragma once
#include <cstdint>

namespace albert {

// 16-bit floats by their bits: bfloat16 and half.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Eight 16-bit elements, as memory and matrix instructions take them.
struct alignas(16) Eight {
  uint32_t pair[4];  // two elements each, the first in the low half
};
struct alignas(16) Four {
  float value[4];
};

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;

}  // namespace albert

#ifndef __CUDACC__
#include "host.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace albert {

#define ALBERT_DEVICE __device__ __forceinline__
#define ALBERT_BOTH __host__ __device__ __forceinline__
#define ALBERT_KERNEL __global__ __launch_bounds__(albert::kThreads, 1)
#define ALBERT_ARGUMENT const __grid_constant__

ALBERT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
ALBERT_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ALBERT_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
ALBERT_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

ALBERT_DEVICE void sync_block() { __syncthreads(); }
ALBERT_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// ---- blocks of a cluster, on compute capability 9.0 and later ----
ALBERT_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// What lies at `local` in this block's shared memory, in that of the cluster's block `rank`.
ALBERT_DEVICE Four load_of_cluster(const Four* local, int rank) {
  Four x{};
#if __CUDA_ARCH__ >= 900
  const uint32_t own = static_cast<uint32_t>(__cvta_generic_to_shared(local));
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(own), "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.value[0]), "=f"(x.value[1]), "=f"(x.value[2]), "=f"(x.value[3])
               : "r"(address)
               : "memory");
#endif
  return x;
}

// ---- what blocks tell each other goes through L2: L1 is not kept coherent ----
ALBERT_DEVICE Eight load_shared_by_blocks(const void* p) {
  const uint4 x = __ldcg(static_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
ALBERT_DEVICE uint32_t load_pair_shared_by_blocks(const void* p) { return __ldcg(static_cast<const uint32_t*>(p)); }
// What no block writes.
ALBERT_DEVICE Eight load_constant(const void* p) {
  const uint4 x = __ldg(static_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
// Everything that this block's threads wrote before its last sync_block becomes seen with the addition.
ALBERT_DEVICE void add_release(uint32_t* p, uint32_t x) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}
ALBERT_DEVICE uint32_t load_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
ALBERT_DEVICE void pause() {}

// ---- 16 bytes from global to shared memory, without registers; wait_copies before the sync that shows them ----
ALBERT_DEVICE void copy_async(void* to_shared, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
ALBERT_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

ALBERT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
ALBERT_DEVICE float to_float(float x) { return x; }
ALBERT_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ALBERT_DEVICE float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
ALBERT_DEVICE void from_float(float x, Bf16& y) { y.bits = __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
ALBERT_DEVICE void from_float(float x, Fp16& y) { y.bits = __half_as_ushort(__float2half_rn(x)); }

// sum += a b, a 16 x 16 by b 16 x 8: lane 4 g + t has, with pairs along the 16 that are summed over,
//   a: rows g, g + 8, g, g + 8 at pairs t, t, t + 4, t + 4;  b: column g at pairs t, t + 4;
//   sum: row g at columns 2 t and 2 t + 1, row g + 8 at the same.
ALBERT_DEVICE void multiply_add(Four& sum, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.value[0]), "+f"(sum.value[1]), "+f"(sum.value[2]), "+f"(sum.value[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
ALBERT_DEVICE void multiply_add(Four& sum, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.value[0]), "+f"(sum.value[1]), "+f"(sum.value[2]), "+f"(sum.value[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace albert
#endif
