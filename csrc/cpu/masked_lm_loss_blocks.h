// How the masked-LM loss is cut up. The labelled tokens go by in blocks, a block's tokens in panels of the
// micro-kernel, whose rows are words: a tile of logits is [word][token], so that what is done for a token (maximum,
// sum of exponentials) goes down the words, a lane for each token, and the big table is copied as it lies. Words go by
// in groups that stay in L2, with all their copies, while the block's panels pass by.
// Compiled once per instruction set.
#pragma once
#include "gemm_tiling.h"
#include "masked_lm_loss_kernels.h"
#include "pack_rows.h"
#include "pack_weight.h"
#include "parallel.h"

namespace albert::ALBERT_ISA {

constexpr int kTokens = kPanel;            // tokens in a panel
constexpr int64_t kMostTokens = 1024;      // in a block
constexpr int64_t kTokenBytes = 1 << 20;   // of a block's x
constexpr int64_t kBlocks = 8;             // blocks of kMaxRows words: the least group
constexpr int64_t kWordBytes = 128 << 10;  // of a group's words
constexpr int64_t kMostGroup = 4 * kBlocks * kMaxRows;
static_assert(kBlocks * kMaxRows % kLine == 0, "a whole group has no steps to fill up");

// Hands out cache-aligned pieces of the workspace; from a null base, counts.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ == nullptr ? nullptr : base_ + used_);
    used_ += round_up(static_cast<size_t>(count) * sizeof(T), kCacheLine);
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct LossShape {
  Unit unit;
  int64_t steps;         // of a logit
  int64_t block_tokens;  // at most, whole panels
  int64_t group;         // words
  int64_t vocabulary;

  LossShape(const albert_masked_lm_loss_args& a, bool bf16_dot) : vocabulary(a.vocabulary) {
    unit = a.dtype == ALBERT_BF16 && bf16_dot ? Unit::bf16x2 : Unit::f32;
    steps = divide_up(divide_up(a.size, elements_per_unit(unit)), kLine) * kLine;
    const int64_t fit = kTokenBytes / (4 * larger(a.size, 1)) / kTokens * kTokens;
    const int64_t most = smaller(larger(fit, 2 * kTokens), kMostTokens);
    block_tokens = smaller(most, divide_up(a.tokens, kTokens) * kTokens);
    const int64_t least = kBlocks * kMaxRows;
    group = least * larger(kWordBytes / (4 * larger(a.size, 1)) / least, 1);
    group = smaller(group, kMostGroup);
  }
  int64_t panels() const { return block_tokens / kTokens; }
  int64_t groups() const { return divide_up(vocabulary, group); }
};

// Words [first, first + count) in blocks of nearly equal size.
struct WordGroup {
  int64_t first, count;
  WordGroup(const LossShape& s, int64_t i) : first(i * s.group), count(smaller(s.group, s.vocabulary - first)) {}
  int64_t blocks() const { return divide_up(count, kMaxRows); }
  int64_t block_begin(int64_t b) const { return part_begin(count, blocks(), b); }
  int block_rows(int64_t b) const { return static_cast<int>(block_begin(b + 1) - block_begin(b)); }
  int64_t padded() const { return divide_up(count, kLine) * kLine; }
};

// The labelled tokens of one block.
struct TokenBlock {
  const int64_t* positions;  // [count], in all tokens
  int64_t count;
  int64_t panels() const { return divide_up(count, kTokens); }
  int panel_tokens(int64_t p) const { return static_cast<int>(smaller(kTokens, count - p * kTokens)); }
};

// Calls body(block) for each block of the labelled tokens, whose positions are written to memory.
template <class Body>
void for_token_blocks(const albert_masked_lm_loss_args& a, const LossShape& s, int64_t* positions, Body body) {
  int64_t count = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    positions[count] = i;
    count += a.labels[i] != a.ignore_index;
  }
  if (count == 0) return;
  const int64_t panels = divide_up(count, kTokens), blocks = divide_up(panels, s.panels());
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = part_begin(panels, blocks, b) * kTokens;
    body(TokenBlock{positions + begin, smaller(part_begin(panels, blocks, b + 1) * kTokens, count) - begin});
  }
}

inline float widen_one(float x) { return x; }
inline float widen_one(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// x of one panel in the micro-kernel's order, [step][kTokens] units; zeros past the tokens and past the size.
template <class T>
void pack_token_panel(const albert_masked_lm_loss_args& a, const LossShape& s, const TokenBlock& block, int64_t panel,
                      char* out) {
  __builtin_memset(out, 0, static_cast<size_t>(s.steps * kTokens * 4));
  const int64_t* positions = block.positions + panel * kTokens;
  for (int t = 0; t < block.panel_tokens(panel); ++t) {
    const T* x = static_cast<const T*>(a.x) + positions[t] * a.x_stride;
    if (s.unit == Unit::bf16x2) {
      bf16* to = reinterpret_cast<bf16*>(out) + 2 * t;
      for (int64_t e = 0; e < a.size; ++e) __builtin_memcpy(to + e / 2 * kTokens * 2 + e % 2, x + e, sizeof(bf16));
    } else {
      float* to = reinterpret_cast<float*>(out) + t;
      for (int64_t e = 0; e < a.size; ++e) to[e * kTokens] = widen_one(x[e]);
    }
  }
}

// body(panel) for each panel of a block, in parallel.
template <class Body>
void for_panels(const TokenBlock& block, const albert_parallel* parallel, Body body) {
  const int tasks = static_cast<int>(smaller(block.panels(), thread_count(parallel)));
  auto task = [&](int i) {
    for (int64_t p = part_begin(block.panels(), tasks, i); p < part_begin(block.panels(), tasks, i + 1); ++p) body(p);
  };
  parallel_tasks(parallel, tasks, task);
}

// A group's words in the micro-kernel's "lines" layout, block after block.
template <class T>
void pack_words(const albert_masked_lm_loss_args& a, const LossShape& s, const WordGroup& group, char* out) {
  for (int64_t b = 0; b < group.blocks(); ++b) {
    const T* rows = static_cast<const T*>(a.table) + (group.first + group.block_begin(b)) * a.table_stride;
    pack_block(s.unit, rows, a.table_stride, group.block_rows(b), a.size, out + group.block_begin(b) * s.steps * 4);
  }
}

// tile[word][kTokens] of a group of words and a panel of tokens: the logits without bias.
inline void logit_tile(const LossShape& s, const KernelTable& kernels, const WordGroup& group, const char* words,
                       const char* panel, float* tile) {
  for (int64_t b = 0; b < group.blocks(); ++b) {
    const int rows = group.block_rows(b);
    int64_t step = 0;
    do {
      const int64_t steps = smaller(kStepsPerSum, s.steps - step);
      kernels.of[rows](words + (group.block_begin(b) * s.steps + step * rows) * 4, panel + step * kPanel * 4, steps,
                       tile + group.block_begin(b) * kTokens, step > 0, {});
      step += steps;
    } while (step < s.steps);
  }
}

}  // namespace albert::ALBERT_ISA
