// Copies rows of x into the micro-kernel's "lines" layout, converting to its units on the way.
// Compiled once per instruction set.
#pragma once
#include "gemm_micro.h"
#include "quantize.h"
#include "vec.h"

namespace albert::ALBERT_ISA {

// 64 bytes of units from consecutive elements, for every pair of formats that occurs.
template <class Source>
ALBERT_INLINE void line_f32(const Source* x, void* line) {
  for (int i = 0; i < 16; i += kLanes) store(static_cast<float*>(line) + i, load(x + i));
}
ALBERT_INLINE void line_bf16(const float* x, void* line) {
  for (int i = 0; i < 32; i += kLanes) store(static_cast<bf16*>(line) + i, load(x + i));
}
ALBERT_INLINE void line_bf16(const bf16* x, void* line) { __builtin_memcpy(line, x, 64); }
ALBERT_INLINE void line_s16(const uint8_t* x, void* line) {
  for (int i = 0; i < 32; ++i) static_cast<int16_t*>(line)[i] = x[i];
}
ALBERT_INLINE void line_u8(const uint8_t* x, void* line) { __builtin_memcpy(line, x, 64); }

// One row, every `stride` bytes a line; the last line is filled up with zeros.
template <int per_line, class Source, class Line>
ALBERT_INLINE void row_lines(const Source* x, int64_t k, char* out, int64_t stride, Line line) {
  int64_t j = 0;
  for (; j + per_line <= k; j += per_line, out += stride) line(x + j, out);
  if (j < k) {
    alignas(64) Source part[per_line] = {};
    __builtin_memcpy(part, x + j, static_cast<size_t>(k - j) * sizeof(Source));
    line(part, out);
  }
}

template <class Source>
inline void row_units(Unit unit, const Source* x, int64_t k, char* out, int64_t stride) {
  if (unit == Unit::f32)
    row_lines<16>(x, k, out, stride, [](const Source* from, void* to) { line_f32(from, to); });
  else
    row_lines<32>(x, k, out, stride, [](const Source* from, void* to) { line_bf16(from, to); });
}
inline void row_units(Unit unit, const uint8_t* x, int64_t k, char* out, int64_t stride) {
  if (unit == Unit::u8s8x4)
    row_lines<64>(x, k, out, stride, [](const uint8_t* from, void* to) { line_u8(from, to); });
  else
    row_lines<32>(x, k, out, stride, [](const uint8_t* from, void* to) { line_s16(from, to); });
}

// rows x k of x as one block: [line][row][64 bytes].
template <class Source>
inline void pack_block(Unit unit, const Source* x, int64_t x_stride, int rows, int64_t k, char* out) {
  for (int r = 0; r < rows; ++r) row_units(unit, x + r * x_stride, k, out + r * 64, rows * 64);
}

// The same for an int8 weight: quantized through a buffer of one row (k bytes).
template <class Source>
inline void pack_quantized_block(Unit unit, const Source* x, int64_t x_stride, int rows, int64_t k, char* out,
                                 uint8_t* buffer, float* scale, int32_t* zero_point) {
  for (int r = 0; r < rows; ++r) {
    const RowScale row = row_scale(x + r * x_stride, k);
    scale[r] = row.scale;
    zero_point[r] = row.zero;
    quantize_row(x + r * x_stride, k, row, buffer);
    row_units(unit, buffer, k, out + r * 64, rows * 64);
  }
}

}  // namespace albert::ALBERT_ISA
