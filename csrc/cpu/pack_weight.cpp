// Packs a weight: once a parameter update, so plain loops in parallel over panels. Compiled once, for any machine.
#include "pack_weight.h"

#include <cmath>

namespace albert {
namespace {

float to_float(float x) { return x; }
float to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// How one element is stored in each kind of unit. inverse is 1 / scale, int8 only.
struct StoreF32 {
  using Element = float;
  static float convert(float x, float) { return x; }
};
struct StoreBf16 {
  using Element = uint16_t;
  static uint16_t convert(float x, float) { return to_bf16(x); }
};
template <class Int>
struct StoreInt8 {
  using Element = Int;
  static Int convert(float x, float inverse) {
    const float q = std::nearbyintf(x * inverse);
    return static_cast<Int>(q > 127.0f ? 127.0f : q > -127.0f ? q : -127.0f);
  }
};

template <class Source>
struct Matrix {
  const Source* data;
  int64_t row_stride, column_stride;
  float at(int64_t i, int64_t j) const { return to_float(data[i * row_stride + j * column_stride]); }
};

template <class Store, class Source>
void pack_panel(const PackedWeight& w, const Matrix<Source>& source, int64_t panel, const float* scales,
                int32_t* sums) {
  using Element = typename Store::Element;
  constexpr int per_unit = 4 / sizeof(Element);
  constexpr int span = kLine * per_unit;  // elements of k in a block that stays in L1 while it is transposed
  Element* out = reinterpret_cast<Element*>(const_cast<char*>(w.panel_data(panel)));
  const int64_t first = panel * w.panel;
  const int columns = static_cast<int>(w.n - first < w.panel ? w.n - first : w.panel);
  std::memset(out, 0, w.panel_bytes());
  const auto put = [&](int64_t base, int c, int j) {
    const float inverse = scales != nullptr && scales[first + c] != 0 ? 1.0f / scales[first + c] : 0.0f;
    const Element e = Store::convert(source.at(first + c, base + j), inverse);
    out[(j / per_unit * w.panel + c) * per_unit + j % per_unit] = e;
    if (sums != nullptr) sums[first + c] += static_cast<int32_t>(e);
  };
  for (int64_t base = 0; base < w.k; base += span, out += w.panel * span) {
    const int count = static_cast<int>(w.k - base < span ? w.k - base : span);
    if (source.column_stride == 1) {
      for (int c = 0; c < columns; ++c)
        for (int j = 0; j < count; ++j) put(base, c, j);
    } else {
      for (int j = 0; j < count; ++j)
        for (int c = 0; c < columns; ++c) put(base, c, j);
    }
  }
}

template <class Source>
void pack(PackedWeight& w, const Matrix<Source>& source, const albert_parallel* parallel) {
  const int64_t panels = w.panels();
  float* scales = w.dtype == ALBERT_INT8 ? const_cast<float*>(w.scales()) : nullptr;
  int32_t* sums = w.dtype == ALBERT_INT8 ? const_cast<int32_t*>(w.column_sums()) : nullptr;
  const int threads = thread_count(parallel);
  const int tasks = static_cast<int>(panels < threads ? panels : threads);
  auto body = [&](int task) {
    for (int64_t p = panels * task / tasks; p < panels * (task + 1) / tasks; ++p) {
      if (scales != nullptr) {
        for (int64_t i = p * w.panel; i < (p + 1) * w.panel; ++i) {
          float largest = 0;
          for (int64_t j = 0; i < w.n && j < w.k; ++j) largest = std::fmax(largest, std::fabs(source.at(i, j)));
          scales[i] = largest / 127;
          sums[i] = 0;
        }
      }
      switch (w.unit) {
        case Unit::f32: pack_panel<StoreF32>(w, source, p, scales, sums); break;
        case Unit::bf16x2: pack_panel<StoreBf16>(w, source, p, scales, sums); break;
        case Unit::s16x2: pack_panel<StoreInt8<int16_t>>(w, source, p, scales, sums); break;
        case Unit::u8s8x4: pack_panel<StoreInt8<int8_t>>(w, source, p, scales, sums); break;
      }
    }
  };
  if (tasks > 0) parallel_tasks(parallel, tasks, body);
}

bool valid(int dtype, int64_t n, int64_t k) {
  return n >= 0 && k >= 0 && (dtype == ALBERT_F32 || dtype == ALBERT_BF16 || (dtype == ALBERT_INT8 && k <= 65536));
}

}  // namespace
}  // namespace albert

size_t albert_packed_bytes(int dtype, int64_t n, int64_t k) {
  using namespace albert;
  return valid(dtype, n, k) ? packed_header(detect_isa(), dtype, n, k).bytes() : 0;
}

int albert_pack(int dtype, int source_dtype, const void* source, int64_t row_stride, int64_t column_stride, int64_t n,
                int64_t k, void* packed, const albert_parallel* parallel) {
  using namespace albert;
  const Isa isa = detect_isa();
  if (!isa.avx2) return ALBERT_NO_ISA;
  if (!valid(dtype, n, k)) return ALBERT_BAD_ARGUMENT;
  if (source_dtype != ALBERT_F32 && source_dtype != ALBERT_BF16) return ALBERT_BAD_ARGUMENT;
  if (reinterpret_cast<uintptr_t>(packed) % kCacheLine != 0) return ALBERT_UNALIGNED;
  auto& weight = *static_cast<PackedWeight*>(packed);
  weight = packed_header(isa, dtype, n, k);
  if (source_dtype == ALBERT_F32)
    pack(weight, Matrix<float>{static_cast<const float*>(source), row_stride, column_stride}, parallel);
  else
    pack(weight, Matrix<uint16_t>{static_cast<const uint16_t*>(source), row_stride, column_stride}, parallel);
  return 0;
}
