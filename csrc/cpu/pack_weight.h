// A packed weight: this header, the panels, then for int8 the scales and column sums. Layout: gemm_micro.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "gemm.h"
#include "gemm_micro.h"
#include "isa.h"

namespace albert {

constexpr size_t kCacheLine = 64;
inline size_t round_up(size_t x, size_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct alignas(64) PackedWeight {
  static constexpr uint64_t kMagic = 0x3174684765574c41;  // "ALWeGht1"
  uint64_t magic;
  int32_t dtype, panel;  // panel: columns in one
  Unit unit;
  int64_t n, k, steps;

  int64_t panels() const { return (n + panel - 1) / panel; }
  size_t panel_bytes() const { return static_cast<size_t>(steps) * panel * 4; }
  const char* panel_data(int64_t i) const { return reinterpret_cast<const char*>(this + 1) + i * panel_bytes(); }
  // Both have panels() * panel entries, zero beyond n. Only int8 has them.
  const float* scales() const { return reinterpret_cast<const float*>(panel_data(panels())); }
  const int32_t* column_sums() const { return reinterpret_cast<const int32_t*>(scales() + panels() * panel); }
  size_t bytes() const {
    const size_t vectors = dtype == ALBERT_INT8 ? 2 * sizeof(float) * panels() * panel : 0;
    return sizeof(*this) + panels() * panel_bytes() + vectors;
  }
};

constexpr int elements_per_unit(Unit unit) { return unit == Unit::f32 ? 1 : unit == Unit::u8s8x4 ? 4 : 2; }

// The header of a weight packed for `isa`; dtype F32, BF16 or INT8.
inline PackedWeight packed_header(const Isa& isa, int dtype, int64_t n, int64_t k) {
  PackedWeight w{};
  w.magic = PackedWeight::kMagic;
  w.dtype = dtype;
  w.panel = isa.avx512 ? avx512::kPanel : avx2::kPanel;
  w.unit = dtype == ALBERT_INT8                ? (isa.vnni ? Unit::u8s8x4 : Unit::s16x2)
           : dtype == ALBERT_BF16 && isa.bf16 ? Unit::bf16x2
                                              : Unit::f32;
  w.n = n;
  w.k = k;
  w.steps = static_cast<int64_t>(round_up(k, static_cast<size_t>(kLine) * elements_per_unit(w.unit))) /
            elements_per_unit(w.unit);
  return w;
}

// Whether this is a packed [n][k] matrix, where one has to be.
inline bool is_packed(const void* weight, int64_t n, int64_t k) {
  if (weight == nullptr || reinterpret_cast<uintptr_t>(weight) % kCacheLine != 0) return false;
  const auto& w = *static_cast<const PackedWeight*>(weight);
  return w.magic == PackedWeight::kMagic && w.n == n && w.k == k;
}

}  // namespace albert
