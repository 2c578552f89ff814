// What backward of the masked-LM loss keeps in the workspace, and what it makes of a block's tokens before the sweep.
// Compiled once per instruction set.
#pragma once
#include "masked_lm_loss_blocks.h"
#include "row_statistics.h"

namespace albert::ALBERT_ISA {

constexpr int64_t kSpan = 128;  // tokens of one reduction into grad_table
constexpr int64_t kSpanPanels = kSpan / kTokens;

struct BackwardScratch {
  int64_t* positions;
  char* panels;    // of the block's x, for the logits
  float* columns;  // the same as operand of grad_table: [size / kPanel][block_tokens][kPanel]
  float *logsumexp, *scale, *smooth, *target;  // dz = scale exp(z - logsumexp) - smooth, at the label - target
  struct Task {
    char* words;           // the group's words, for the logits
    float* words_columns;  // the same as operand of grad_x: [block of size][word][rows]
    float* tile;           // [word][kTokens]
    float* lines;          // dz: [block of words][line of tokens][rows][kLine]
    float* table_sums;     // [block of words][panel of size][rows][kPanel]
    float* bias_sums;      // [word][kLanes]
    float* x_sums;         // [panel][size][kTokens]
  };
  char* tasks;
  size_t task_bytes, bytes;

  static Task task_of(const albert_masked_lm_loss_args& a, const LossShape& s, Carver& carver) {
    const int64_t width = divide_up(a.size, kPanel) * kPanel;
    return {carver.take<char>(s.group * s.steps * 4), carver.take<float>(s.group * a.size),
            carver.take<float>(s.group * kTokens),    carver.take<float>(s.group * kSpan),
            carver.take<float>(s.group * width),      carver.take<float>(s.group * kLanes),
            carver.take<float>(s.block_tokens * a.size)};
  }
  Task task(const albert_masked_lm_loss_args& a, const LossShape& s, int i) const {
    Carver carver(tasks + i * task_bytes);
    return task_of(a, s, carver);
  }

  BackwardScratch(const albert_masked_lm_loss_args& a, const LossShape& s, int task_count, char* base) {
    Carver carver(base);
    positions = carver.take<int64_t>(a.tokens);
    panels = carver.take<char>(s.block_tokens * s.steps * 4);
    columns = carver.take<float>(divide_up(a.size, kPanel) * s.block_tokens * kPanel);
    logsumexp = carver.take<float>(s.block_tokens);
    scale = carver.take<float>(s.block_tokens);
    smooth = carver.take<float>(s.block_tokens);
    target = carver.take<float>(s.block_tokens);
    Carver counter(nullptr);
    task_of(a, s, counter);
    task_bytes = counter.used();
    tasks = carver.take<char>(task_count * static_cast<int64_t>(task_bytes));
    bytes = carver.used();
  }
};

inline int64_t size_panels(const albert_masked_lm_loss_args& a) { return divide_up(a.size, kPanel); }

// One panel of the block's x, and its tokens' vectors.
template <class T>
void prepare_panel(const albert_masked_lm_loss_args& a, const LossShape& s, const BackwardScratch& m,
                   const TokenBlock& block, int64_t p) {
  pack_token_panel<T>(a, s, block, p, m.panels + p * kTokens * s.steps * 4);
  for (int64_t t = p * kTokens; t < (p + 1) * kTokens; ++t) {
    const bool inside = t < block.count;
    for (int64_t e = 0; e < size_panels(a); ++e) {
      float* out = m.columns + (e * s.block_tokens + t) * kPanel;
      __builtin_memset(out, 0, kPanel * sizeof(float));
      const T* x = static_cast<const T*>(a.x) + (inside ? block.positions[t] * a.x_stride : 0) + e * kPanel;
      if (inside)
        for_columns(smaller(kPanel, a.size - e * kPanel),
                    [&](int64_t j, int lanes) { store_part(out + j, load_part(x + j, lanes), lanes); });
    }
    const float grad = inside ? a.grad_loss[block.positions[t]] : 0.0f;
    const double total = inside ? a.logsumexp[block.positions[t]] : 0.0, smoothing = a.label_smoothing;
    m.logsumexp[t] = inside ? static_cast<float>(total) : __builtin_inff();  // past the tokens exp must be 0
    m.scale[t] = static_cast<float>(grad * (1 + 2 * a.z_loss * total));
    m.smooth[t] = static_cast<float>(grad * smoothing / static_cast<double>(a.vocabulary));
    m.target[t] = static_cast<float>(grad * (1 - smoothing));
  }
}

}  // namespace albert::ALBERT_ISA
