// What device.h asks of the machine, on a CPU: see host/machine.h, which plays it, and host/watch.h, which looks at what
// kernels do to memory. For tests: this finds what is wrong in a kernel's logic (a missing barrier, a wrong index, reads of
// what nobody wrote), not what only a GPU's memory model shows.
#pragma once
#include <cmath>
#include <cstring>

#include "host/machine.h"

#define ALBERT_DEVICE inline
#define ALBERT_BOTH inline
#define ALBERT_KERNEL(threads) inline
#define ALBERT_ARGUMENT const

namespace albert {

constexpr bool kHasClusters = true, kHasWords = true;
using host::add_release;
using host::Arrivals;
using host::block_count;
using host::block_index;
using host::expect;
using host::load_acquire;
using host::make_arrivals;
using host::pause;
using host::shared_memory;
using host::sync_block;
using host::sync_cluster;
using host::thread_index;
using host::wait;
using host::wait_copies;
inline int same_in_warp(int x) { return x; }
inline int opaque(int x) { return x; }

struct GridToken {};
inline GridToken arrive_grid() {
  host::arrive_grid();
  return {};
}
inline void wait_grid(GridToken&) { host::wait_grid(); }
inline void hold(int) {}

// ---- a warp's instructions ----
inline int lane_index() { return thread_index() % kWarp; }
inline float shuffle_from(float x, int lane) {
  host::Lanes& lanes = host::next_lanes();
  if (lane < 0 || lane >= kWarp) host::fail("a shuffle from a lane that there is not");
  lanes.number[lane_index()] = x;
  host::meet("shuffle");
  return lanes.number[lane];
}
inline float shuffle_xor(float x, int mask) { return shuffle_from(x, lane_index() ^ mask); }
inline bool any_in_warp(bool x) {
  host::Lanes& lanes = host::next_lanes();
  lanes.number[lane_index()] = x ? 1.0f : 0.0f;
  host::meet("any");
  bool any = false;
  for (const float one : lanes.number) any |= one != 0.0f;
  return any;
}
inline Eight gather_quad(uint32_t pair) {
  host::Lanes& lanes = host::next_lanes();
  const int lane = lane_index();
  lanes.pair[lane] = pair;
  host::meet("gather");
  Eight x;
  for (int i = 0; i < 4; ++i) x.pair[i] = lanes.pair[lane / 4 * 4 + i];
  return x;
}
inline uint32_t transpose(uint32_t pair) {
  host::Lanes& lanes = host::next_lanes();
  const int lane = lane_index(), column = lane / 4;
  lanes.pair[lane] = pair;
  host::meet("transpose");
  const auto element = [&](int row) { return lanes.pair[row * 4 + column / 2] >> column % 2 * 16 & 0xffffu; };
  return element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
}

template <class X>
inline void send(X* local, Arrivals* arrivals, int rank, const X& x) {
  host::send(local, arrivals, rank, &x, sizeof x);
}

// ---- loads and stores ----
template <class X>
inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(X) != 0) host::fail("a load or a store is not aligned to its size");
}
template <class X>
inline X load(const void* p) {
  check_aligned<X>(p);
  X x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Eight load_shared_by_blocks(const void* p) { return load<Eight>(p); }
inline uint32_t load_pair_shared_by_blocks(const void* p) { return load<uint32_t>(p); }
inline Two load_two_shared_by_blocks(const void* p) { return load<Two>(p); }
inline Eight load_constant(const void* p) {
  host::read_constant(p, sizeof(Eight));
  return load<Eight>(p);
}
inline void store_two(void* p, float a, float b) {
  const Two x{{a, b}};
  check_aligned<Two>(p);
  std::memcpy(p, &x, sizeof x);
}
inline Eight load_eight_whole(const void* p) {
  check_aligned<Eight>(p);
  Eight x;
  host::load_whole(&x, p, sizeof x);
  return x;
}
inline void store_eight_whole(void* p, const Eight& x) {
  check_aligned<Eight>(p);
  host::store_whole(p, &x, sizeof x);
}
inline void copy_async(void* to_shared, const void* from) {
  check_aligned<Eight>(to_shared);
  check_aligned<Eight>(from);
  host::copy_async(to_shared, from, sizeof(Eight));
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float inverse(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Fp16 x) {
  const uint32_t bits = x.bits & 0x7fffu;
  // The exponent is 112 more in float; numbers too small for one in fp16 become right by the product, too.
  const float size = bits > 0x7c00 ? NAN : bits == 0x7c00 ? INFINITY : float_of(bits << 13) * 0x1p112f;
  return x.bits >> 15 ? -size : size;
}
inline void from_float(float x, Bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Fp16& y) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) {
    y.bits = 0x7e00;
  } else if (size >= 65520.0f) {
    y.bits = sign | 0x7c00;
  } else {
    // In units of the last place of its binade: nearbyint rounds halves to even, and carries into the exponent by itself.
    int exponent;
    std::frexp(size, &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    y.bits = static_cast<uint16_t>(sign | (size == 0.0f ? 0 : ((exponent + 13) << 10) + units));
  }
}

template <class T>
inline uint32_t pack_pair(float first, float second, T) {
  T a, b;
  from_float(first, a);
  from_float(second, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

template <class T>
inline void multiply_add(Four& sum, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  host::Lanes& lanes = host::next_lanes();
  const int lane = lane_index();
  const auto tell = [](float* to, uint32_t pair) {
    to[0] = to_float(T{static_cast<uint16_t>(pair)});
    to[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
  };
  for (int i = 0; i < 4; ++i) tell(lanes.a[lane] + 2 * i, a[i]);
  tell(lanes.b[lane], b0);
  tell(lanes.b[lane] + 2, b1);
  host::meet("multiply");
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int holder = k / 2 % 4, place = k / 8 * 2;
      sum.value[i] += lanes.a[row % 8 * 4 + holder][(row / 8 + place) * 2 + k % 2] * lanes.b[column * 4 + holder][place + k % 2];
    }
  }
}

}  // namespace albert
