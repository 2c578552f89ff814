// The masked-LM loss, backward, in one sweep over the vocabulary. Each task has some groups of words, whose gradients
// are its alone; for the tokens' gradients it has sums of its own, which are put together in order at the end. With dz
// the gradient of a tile of logits, [word][token]:
//   grad_x     += table^T . dz   rows: the table's columns, reduction over the group's words
//   grad_table += dz . x         rows: words, reduction over tokens
// dz is one operand as it lies; for the other it is stored once more, in lines. Both products are in float32.
// Compiled once per instruction set.
#include "masked_lm_loss_backward.h"
#include "pack_columns.h"
#include "vec_math.h"

namespace albert::ALBERT_ISA {
namespace {

using Task = BackwardScratch::Task;

template <class T>
struct Backward {
  const albert_masked_lm_loss_args& a;
  const LossShape& s;
  const BackwardScratch& m;
  const KernelTable &logits, &lines, &steps;

  int64_t size_blocks() const { return divide_up(a.size, kMaxRows); }
  int64_t size_begin(int64_t b) const { return part_begin(a.size, size_blocks(), b); }
  int size_rows(int64_t b) const { return static_cast<int>(size_begin(b + 1) - size_begin(b)); }

  void pack_group(const WordGroup& group, const Task& own) const {
    pack_words<T>(a, s, group, own.words);
    const TokenRows<T> rows{static_cast<const T*>(a.table) + group.first * a.table_stride, a.table_stride, group.count,
                            1};
    for (int64_t w = 0; w < group.padded(); w += kLine)
      for (int64_t b = 0; b < size_blocks(); ++b)
        pack_steps<1>(rows, w, size_begin(b), size_rows(b), size_rows(b),
                      own.words_columns + size_begin(b) * group.padded() + w * size_rows(b), nullptr);
    __builtin_memset(own.bias_sums, 0, static_cast<size_t>(group.count * kLanes) * sizeof(float));
    __builtin_memset(own.tile + group.count * kTokens, 0,
                     static_cast<size_t>((group.padded() - group.count) * kTokens) * sizeof(float));
  }

  // Where lines hold dz of the group's word and a panel's token; panel counts from the span's first.
  int64_t line_at(const WordGroup& group, int64_t block, int64_t row, int64_t panel, int64_t token) const {
    const int64_t line = (panel * kTokens + token) / kLine;
    return group.block_begin(block) * kSpan + (line * group.block_rows(block) + row) * kLine + token % kLine;
  }

  // Logits to dz, in the tile and in lines.
  void differentiate(const TokenBlock& block, const WordGroup& group, const Task& own, int64_t p) const {
    const int64_t panel = p % kSpanPanels, first = p * kTokens;
    for (int c = 0; c < kTokens; c += kLanes) {
      const F total = load(m.logsumexp + first + c), scale = load(m.scale + first + c);
      const F smooth = load(m.smooth + first + c);
      for (int64_t b = 0; b < group.blocks(); ++b) {
        float* line = own.lines + line_at(group, b, 0, panel, c);
        for (int64_t w = group.block_begin(b); w < group.block_begin(b + 1); ++w, line += kLine) {
          float* z = own.tile + w * kTokens + c;
          const F bias = set(a.bias == nullptr ? 0.0f : a.bias[group.first + w]);
          const F dz = sub(mul(scale, exp(sub(add(load(z), bias), total))), smooth);
          store(z, dz);
          store(line, dz);
          store(own.bias_sums + w * kLanes, add(load(own.bias_sums + w * kLanes), dz));
        }
      }
    }
    for (int t = 0; t < block.panel_tokens(p); ++t) {
      const int64_t w = a.labels[block.positions[first + t]] - group.first;
      if (w < 0 || w >= group.count) continue;
      int64_t b = w / kMaxRows;  // or one of those before and after, which are of nearly equal size
      while (group.block_begin(b + 1) <= w) ++b;
      own.tile[w * kTokens + t] -= m.target[first + t];
      own.lines[line_at(group, b, w - group.block_begin(b), panel, t)] = own.tile[w * kTokens + t];
      own.bias_sums[w * kLanes] -= m.target[first + t];
    }
  }

  void add_grad_x(const WordGroup& group, const Task& own, int64_t p, bool accumulate) const {
    float* out = own.x_sums + p * a.size * kTokens;
    for (int64_t b = 0; b < size_blocks(); ++b)
      steps.of[size_rows(b)](own.words_columns + size_begin(b) * group.padded(), own.tile, group.padded(),
                             out + size_begin(b) * kTokens, accumulate, {});
  }

  // The span's tokens begin with panel `first`.
  void add_table_sums(const WordGroup& group, const Task& own, int64_t first, int64_t panels) const {
    for (int64_t b = 0; b < group.blocks(); ++b)
      for (int64_t e = 0; e < size_panels(a); ++e) {
        const int rows = group.block_rows(b);
        lines.of[rows](own.lines + group.block_begin(b) * kSpan,
                       m.columns + (e * s.block_tokens + first * kTokens) * kPanel, panels * kTokens,
                       own.table_sums + (group.block_begin(b) * size_panels(a) + e * rows) * kPanel, first > 0, {});
      }
  }

  void add_to_gradients(const WordGroup& group, const Task& own) const {
    for (int64_t w = 0; a.grad_bias != nullptr && w < group.count; ++w)
      a.grad_bias[group.first + w] += sum(load(own.bias_sums + w * kLanes));
    if (a.grad_table == nullptr) return;
    const float* sums = own.table_sums;
    for (int64_t b = 0; b < group.blocks(); ++b)
      for (int64_t e = 0; e < size_panels(a); ++e)
        for (int r = 0; r < group.block_rows(b); ++r, sums += kPanel) {
          float* out = a.grad_table + (group.first + group.block_begin(b) + r) * a.grad_table_stride + e * kPanel;
          for_columns(smaller(kPanel, a.size - e * kPanel), [&](int64_t j, int lanes) {
            store_part(out + j, add(load_part(out + j, lanes), load(sums + j)), lanes);
          });
        }
  }

  void run_group(const TokenBlock& block, const WordGroup& group, const Task& own, bool first_group) const {
    pack_group(group, own);
    for (int64_t span = 0; span < block.panels(); span += kSpanPanels) {
      const int64_t end = smaller(span + kSpanPanels, block.panels());
      for (int64_t p = span; p < end; ++p) {
        logit_tile(s, logits, group, own.words, m.panels + p * kTokens * s.steps * 4, own.tile);
        differentiate(block, group, own, p);
        if (a.grad_x != nullptr) add_grad_x(group, own, p, !first_group);
      }
      if (a.grad_table != nullptr) add_table_sums(group, own, span, end - span);
    }
    add_to_gradients(group, own);
  }

  void write_grad_x(const TokenBlock& block, int64_t p, int tasks) const {
    for (int t = 0; t < block.panel_tokens(p); ++t) {
      T* out = static_cast<T*>(a.grad_x) + block.positions[p * kTokens + t] * a.grad_x_stride;
      for (int64_t j = 0; j < a.size; j += kLanes) {
        alignas(64) float row[kLanes] = {};
        const int lanes = static_cast<int>(smaller(a.size - j, kLanes));
        for (int task = 0; task < tasks; ++task) {
          const float* sums = m.task(a, s, task).x_sums + (p * a.size + j) * kTokens + t;
          for (int i = 0; i < lanes; ++i) row[i] += sums[i * kTokens];
        }
        store_part(out + j, load(row), lanes);
      }
    }
  }

  void run(const TokenBlock& block, int tasks, const albert_parallel* parallel) const {
    for_panels(block, parallel, [&](int64_t p) { prepare_panel<T>(a, s, m, block, p); });
    auto work = [&](int task) {
      const Task own = m.task(a, s, task);
      const int64_t begin = part_begin(s.groups(), tasks, task), end = part_begin(s.groups(), tasks, task + 1);
      for (int64_t g = begin; g < end; ++g) run_group(block, WordGroup(s, g), own, g == begin);
    };
    parallel_tasks(parallel, tasks, work);
    if (a.grad_x != nullptr) for_panels(block, parallel, [&](int64_t p) { write_grad_x(block, p, tasks); });
  }
};

int task_count(const LossShape& s, int threads) { return static_cast<int>(smaller(s.groups(), threads)); }

template <class T>
void clear_unlabelled(const albert_masked_lm_loss_args& a, const albert_parallel* parallel) {
  const int tasks = static_cast<int>(smaller(divide_up(a.tokens, kSpan), thread_count(parallel)));
  auto task = [&](int i) {
    for (int64_t t = part_begin(a.tokens, tasks, i); t < part_begin(a.tokens, tasks, i + 1); ++t)
      if (a.labels[t] == a.ignore_index)
        __builtin_memset(static_cast<T*>(a.grad_x) + t * a.grad_x_stride, 0, static_cast<size_t>(a.size) * sizeof(T));
  };
  if (tasks > 0) parallel_tasks(parallel, tasks, task);
}

template <class T>
void run(const albert_masked_lm_loss_args& a, bool bf16_dot, char* workspace, const albert_parallel* parallel) {
  if (a.grad_x != nullptr) clear_unlabelled<T>(a, parallel);
  const LossShape s(a, bf16_dot);
  const int tasks = task_count(s, thread_count(parallel));
  const BackwardScratch m(a, s, tasks, workspace);
  const KernelTable logits(s.unit, RowLayout::lines), lines(Unit::f32, RowLayout::lines);
  const KernelTable steps(Unit::f32, RowLayout::steps);
  const Backward<T> backward{a, s, m, logits, lines, steps};
  for_token_blocks(a, s, m.positions, [&](const TokenBlock& block) { backward.run(block, tasks, parallel); });
}

}  // namespace

size_t masked_lm_loss_backward_workspace_bytes(const albert_masked_lm_loss_args& a, bool bf16_dot, int threads) {
  const LossShape s(a, bf16_dot);
  return BackwardScratch(a, s, task_count(s, threads), nullptr).bytes;
}

void masked_lm_loss_backward(const albert_masked_lm_loss_args& a, bool bf16_dot, char* workspace,
                             const albert_parallel* parallel) {
  a.dtype == ALBERT_BF16 ? run<bf16>(a, bf16_dot, workspace, parallel) : run<float>(a, bf16_dot, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
