// Packed operands of attention's products, from one head's [tokens][head_dim]. Compiled once per instruction set.
#pragma once
#include "attention_layout.h"
#include "pack_rows.h"
#include "transpose.h"

namespace albert::ALBERT_ISA {

// Tokens as the columns' operand of a product that reduces over head_dim: panels of [d_steps][kPanel] units, zeros past
// the tokens. staging: [kPanel][d_steps].
template <class T>
void pack_tokens_as_columns(const HeadShape& shape, const TokenRows<T>& x, float* staging, float* out) {
  const int64_t steps = shape.d_steps;
  for (int64_t token = 0; token < x.tokens; token += kPanel, out += steps * kPanel) {
    const int64_t count = smaller(kPanel, x.tokens - token);
    prefetch_tokens(x, shape.d, token + kPanel, kPanel);
    for (int64_t i = 0; i < count; ++i)
      row_units(shape.unit, x.data + (token + i) * x.stride, shape.d, reinterpret_cast<char*>(staging + i * steps),
                kCacheLine);
    __builtin_memset(staging + count * steps, 0, static_cast<size_t>((kPanel - count) * steps) * sizeof(float));
    for (int64_t s = 0; s < steps; s += kLanes)
      for (int64_t i = 0; i < kPanel; i += kLanes)
        transpose(staging + i * steps + s, steps, out + s * kPanel + i, kPanel);
  }
}

// head_dim as the columns' operand of a product that reduces over tokens: d_panels panels of [steps][kPanel], zeros
// past the tokens and past head_dim.
template <class T>
void pack_features_as_columns(const HeadShape& shape, const TokenRows<T>& x, int64_t steps, float* out) {
  for (int64_t step = 0; step < steps; step += kLine) {
    const int64_t next = (step + kLine) * x.tokens_per_step;
    prefetch_tokens(x, shape.d, next, kLine * x.tokens_per_step);
    for (int64_t p = 0; p < shape.d_panels; ++p)
      pack_steps<kPanel / kLanes>(x, step, p * kPanel, static_cast<int>(smaller(kPanel, shape.d - p * kPanel)), kPanel,
                                  out + (p * steps + step) * kPanel, nullptr);
  }
}

// The same as the rows' operand: blocks of [steps][features of the block].
template <class T>
void pack_features_as_rows(const HeadShape& shape, const TokenRows<T>& x, int64_t steps, float* out) {
  const Blocks blocks(shape.d);
  for (int64_t step = 0; step < steps; step += kLine)
    for (int64_t b = 0; b < blocks.count; ++b)
      pack_steps<1>(x, step, blocks.begin(b), blocks.rows(b), blocks.rows(b),
                    out + blocks.begin(b) * steps + step * blocks.rows(b), nullptr);
}

// A block of tokens as the rows' operand of a product that reduces over head_dim.
template <class T>
void pack_tokens_as_rows(const HeadShape& shape, const TokenRows<T>& x, int64_t first, int count, float* out) {
  pack_block(shape.unit, x.data + first * x.stride, x.stride, count, shape.d, reinterpret_cast<char*>(out));
}

}  // namespace albert::ALBERT_ISA
