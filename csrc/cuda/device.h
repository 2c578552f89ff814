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
struct alignas(8) Two {
  float value[2];
};

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;  // of a block, but for who waits for words

}  // namespace albert

#ifndef __CUDACC__
#include "host.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace albert {

#define ALBERT_DEVICE __device__ __forceinline__
#define ALBERT_BOTH __host__ __device__ __forceinline__
#define ALBERT_KERNEL(threads) __global__ __launch_bounds__(threads, 1)
#define ALBERT_ARGUMENT const __grid_constant__

ALBERT_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
// The same x, which all lanes of the warp have: now the compiler knows that they do.
ALBERT_DEVICE int same_in_warp(int x) { return __shfl_sync(0xffffffffu, x, 0); }
// The same x, of which the compiler knows nothing: it cannot compute what follows from it ahead, and keep it in registers.
ALBERT_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}
ALBERT_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
ALBERT_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
ALBERT_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

ALBERT_DEVICE void sync_block() { __syncthreads(); }
ALBERT_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
ALBERT_DEVICE bool any_in_warp(bool x) { return __any_sync(0xffffffffu, x) != 0; }
// The pairs of the lane's four, one after the other.
ALBERT_DEVICE Eight gather_quad(uint32_t pair) {
  Eight x;
#pragma unroll
  for (int i = 0; i < 4; ++i) x.pair[i] = __shfl_sync(0xffffffffu, pair, i, 4);
  return x;
}
ALBERT_DEVICE float shuffle_from(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// Of 8 x 8 elements of 16 bits lane 4 g + t has row g, columns 2 t and 2 t + 1; then column g, rows 2 t and 2 t + 1.
ALBERT_DEVICE uint32_t transpose(uint32_t pair) {
  uint32_t x;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(x) : "r"(pair));
  return x;
}

// All blocks of a launch that has them at once: what a block wrote before it arrived is seen by those that have waited.
using GridToken = cooperative_groups::grid_group::arrival_token;
ALBERT_DEVICE GridToken arrive_grid() { return cooperative_groups::this_grid().barrier_arrive(); }
ALBERT_DEVICE void wait_grid(GridToken& token) {
  cooperative_groups::this_grid().barrier_wait(static_cast<GridToken&&>(token));
}

// ---- blocks of a cluster, on compute capability 9.0 and later ----
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasClusters = false;
#else
constexpr bool kHasClusters = true;
#endif
ALBERT_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
// Counts the bytes that come from the cluster's other blocks, phase by phase: a phase ends with the bytes that its expect
// names, in whatever order both come. One thread makes it, before a barrier of the cluster, and one expects.
struct alignas(8) Arrivals {
  uint64_t state;
};
ALBERT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
ALBERT_DEVICE void make_arrivals(Arrivals* arrivals) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nfence.mbarrier_init.release.cluster;" ::"r"(shared_address(arrivals))
               : "memory");
#endif
}
ALBERT_DEVICE void expect(Arrivals* arrivals, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(arrivals)), "r"(bytes)
               : "memory");
#endif
}
// Returns when the phase, of which this is the lowest bit, is over; what it brought is seen then.
ALBERT_DEVICE void wait(Arrivals* arrivals, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(arrivals)), "r"(phase & 1)
        : "memory");
  } while (done == 0);
#endif
}
// Of what has the place of `local` in the shared memory of the cluster's block `rank`.
ALBERT_DEVICE uint32_t address_in_cluster(const void* local, int rank) {
  uint32_t address = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(rank));
#endif
  return address;
}
// To there, and its bytes to that block's arrivals.
ALBERT_DEVICE void send(Two* local, Arrivals* arrivals, int rank, const Two& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   address_in_cluster(local, rank)),
               "f"(x.value[0]), "f"(x.value[1]), "r"(address_in_cluster(arrivals, rank))
               : "memory");
#endif
}
ALBERT_DEVICE void send(Four* local, Arrivals* arrivals, int rank, const Four& x) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in_cluster(local, rank)),
               "f"(x.value[0]), "f"(x.value[1]), "f"(x.value[2]), "f"(x.value[3]), "r"(address_in_cluster(arrivals, rank))
               : "memory");
#endif
}

// ---- what blocks tell each other goes through L2: L1 is not kept coherent ----
ALBERT_DEVICE Eight load_shared_by_blocks(const void* p) {
  Eight x;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.pair[0]), "=r"(x.pair[1]), "=r"(x.pair[2]), "=r"(x.pair[3])
               : "l"(p));
  return x;
}
ALBERT_DEVICE Two load_two_shared_by_blocks(const void* p) {
  Two x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.value[0]), "=f"(x.value[1]) : "l"(p));
  return x;
}
ALBERT_DEVICE uint32_t load_pair_shared_by_blocks(const void* p) {
  uint32_t x;
  asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}
ALBERT_DEVICE void store_two(void* p, float a, float b) { *static_cast<float2*>(p) = make_float2(a, b); }
// The same of words of 16 bytes, which others see whole or not yet, in whatever order: from CUDA 12.3 on, and where
// there are clusters, for smaller devices have no room.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1203
constexpr bool kHasWords = kHasClusters;
#define ALBERT_WORD(code) "{.reg .b128 x; .reg .b64 low, high;" code "}"
#else
constexpr bool kHasWords = false;
#define ALBERT_WORD(code) ""
#endif
ALBERT_DEVICE Eight load_eight_whole(const void* p) {
  Eight x;
  asm volatile(ALBERT_WORD("ld.relaxed.gpu.global.b128 x, [%4]; mov.b128 {low, high}, x;"
                           "mov.b64 {%0, %1}, low; mov.b64 {%2, %3}, high;")
               : "=r"(x.pair[0]), "=r"(x.pair[1]), "=r"(x.pair[2]), "=r"(x.pair[3])
               : "l"(p)
               : "memory");
  return x;
}
ALBERT_DEVICE void store_eight_whole(void* p, const Eight& x) {
  asm volatile(ALBERT_WORD("mov.b64 low, {%1, %2}; mov.b64 high, {%3, %4}; mov.b128 x, {low, high};"
                           "st.relaxed.gpu.global.b128 [%0], x;") ::"l"(p),
               "r"(x.pair[0]), "r"(x.pair[1]), "r"(x.pair[2]), "r"(x.pair[3])
               : "memory");
}
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
// Does nothing for so many clocks.
ALBERT_DEVICE void hold(int clocks) {
  const long long begin = clock64();
  while (clock64() - begin < clocks) {
  }
}

// ---- 16 bytes from global to shared memory, without registers; wait_copies before the sync that shows them ----
ALBERT_DEVICE void copy_async(void* to_shared, const void* from) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to_shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
ALBERT_DEVICE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

ALBERT_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Within two units of the last place.
ALBERT_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ALBERT_DEVICE float inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ALBERT_DEVICE float inverse_root(float x) { return rsqrtf(x); }
ALBERT_DEVICE float to_float(Bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
ALBERT_DEVICE float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
// Two numbers, rounded, the first in the low half.
ALBERT_DEVICE uint32_t pack_pair(float first, float second, Bf16) {
  uint32_t x;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}
ALBERT_DEVICE uint32_t pack_pair(float first, float second, Fp16) {
  uint32_t x;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(second), "f"(first));
  return x;
}

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
