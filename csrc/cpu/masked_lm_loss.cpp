// The masked-LM loss, forward. The vocabulary is cut into parts that do not depend on the number of threads; each part
// keeps, for every token, its largest logit, where that is, and the sums; then the parts are put together in order.
// Compiled once per instruction set.
#include "masked_lm_loss_blocks.h"
#include "vec_math.h"

namespace albert::ALBERT_ISA {
namespace {

constexpr int64_t kMostParts = 32;

// Of each token of a block, over some words: arrays of block_tokens.
struct Softmax {
  float *largest, *sum, *total;  // sum: of exp(logit - shift(largest)); total: of the logits
  int* word;                     // of the largest logit, the first of several
};

struct Scratch {
  int64_t* positions;
  char* panels;   // of the block's x
  float* target;  // [block_tokens], the label's logit
  Softmax state;  // [part][block_tokens]
  char* words;    // [task], a group's
  float* tiles;   // [task][group][kTokens]
  size_t bytes, words_bytes;

  Scratch(const albert_masked_lm_loss_args& a, const LossShape& s, int64_t parts, int64_t tasks, char* base) {
    Carver carver(base);
    positions = carver.take<int64_t>(a.tokens);
    panels = carver.take<char>(s.block_tokens * s.steps * 4);
    target = carver.take<float>(s.block_tokens);
    state.largest = carver.take<float>(parts * s.block_tokens);
    state.sum = carver.take<float>(parts * s.block_tokens);
    state.total = carver.take<float>(parts * s.block_tokens);
    state.word = carver.take<int>(parts * s.block_tokens);
    words_bytes = static_cast<size_t>(s.group * s.steps * 4);
    words = carver.take<char>(tasks * static_cast<int64_t>(words_bytes));
    tiles = carver.take<float>(tasks * s.group * kTokens);
    bytes = carver.used();
  }
};

// What is taken off before exp: a maximum that is infinite, or none yet, must not turn all into NaN.
ALBERT_INLINE F shift(F largest) { return less(abs(largest), set(__builtin_inff()), largest, zero()); }

// One vector of tokens, all words of the tile.
ALBERT_INLINE void add_words(float* tile, const WordGroup& group, const float* bias, const Softmax& state) {
  F largest = load(state.largest), total = zero();
  I word = load(state.word);
  const F before = shift(largest);
  for (int64_t w = 0; w < group.count; ++w, tile += kTokens) {
    const F z = add(load(tile), set(bias == nullptr ? 0.0f : bias[group.first + w]));
    store(tile, z);
    word = bits(less(largest, z, from_bits(set(static_cast<int>(group.first + w))), from_bits(word)));
    largest = max(z, largest);
    total = add(total, z);
  }
  tile -= group.count * kTokens;
  const F now = shift(largest);
  F sum = zero();
  for (int64_t w = 0; w < group.count; ++w, tile += kTokens) sum = add(sum, exp(sub(load(tile), now)));
  store(state.sum, fma(load(state.sum), exp(min(sub(before, now), zero())), sum));
  store(state.total, add(load(state.total), total));
  store(state.largest, largest);
  store(state.word, word);
}

template <class T>
struct Forward {
  const albert_masked_lm_loss_args& a;
  const LossShape& s;
  const Scratch& m;
  const KernelTable& kernels;
  int64_t parts;

  Softmax at(int64_t part, int64_t token) const {
    const int64_t i = part * s.block_tokens + token;
    return {m.state.largest + i, m.state.sum + i, m.state.total + i, m.state.word + i};
  }

  void run_part(const TokenBlock& block, int64_t part, int task) const {
    char* words = m.words + task * m.words_bytes;
    float* tile = m.tiles + task * s.group * kTokens;
    const Softmax state = at(part, 0);
    for (int64_t t = 0; t < block.panels() * kTokens; ++t) {
      state.largest[t] = -__builtin_inff();
      state.sum[t] = state.total[t] = 0;
      state.word[t] = 0;
    }
    for (int64_t g = part_begin(s.groups(), parts, part); g < part_begin(s.groups(), parts, part + 1); ++g) {
      const WordGroup group(s, g);
      pack_words<T>(a, s, group, words);
      for (int64_t p = 0; p < block.panels(); ++p) {
        logit_tile(s, kernels, group, words, m.panels + p * kTokens * s.steps * 4, tile);
        for (int c = 0; c < kTokens; c += kLanes) add_words(tile + c, group, a.bias, at(part, p * kTokens + c));
        for (int t = 0; t < block.panel_tokens(p); ++t) {
          const int64_t row = a.labels[block.positions[p * kTokens + t]] - group.first;
          if (row >= 0 && row < group.count) m.target[p * kTokens + t] = tile[row * kTokens + t];
        }
      }
    }
  }

  void finish(const TokenBlock& block, int64_t t) const {
    Softmax first = at(0, t);
    float largest = *first.largest;
    int word = *first.word;
    for (int64_t part = 1; part < parts; ++part) {
      const Softmax state = at(part, t);
      if (*state.largest > largest) {
        largest = *state.largest;
        word = *state.word;
      }
    }
    const float now = __builtin_isfinite(largest) ? largest : 0.0f;
    double sum = 0, total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      const Softmax state = at(part, t);
      const float before = __builtin_isfinite(*state.largest) ? *state.largest : 0.0f;
      const double scale = before < now ? __builtin_exp(static_cast<double>(before) - now) : 1.0;
      sum += *state.sum * scale;
      total += *state.total;
    }
    const double logsumexp = now + __builtin_log(sum), smoothing = a.label_smoothing;
    double loss = logsumexp - (1 - smoothing) * m.target[t] + a.z_loss * logsumexp * logsumexp;
    if (smoothing > 0) loss -= smoothing * total / static_cast<double>(a.vocabulary);
    const int64_t i = block.positions[t];
    if (a.loss != nullptr) a.loss[i] = static_cast<float>(loss);
    if (a.logsumexp != nullptr) a.logsumexp[i] = static_cast<float>(logsumexp);
    if (a.correct != nullptr) a.correct[i] = word == a.labels[i];
  }

  void run(const TokenBlock& block, int tasks, const albert_parallel* parallel) const {
    for_panels(block, parallel,
               [&](int64_t p) { pack_token_panel<T>(a, s, block, p, m.panels + p * kTokens * s.steps * 4); });
    auto work = [&](int task) {
      for (int64_t part = part_begin(parts, tasks, task); part < part_begin(parts, tasks, task + 1); ++part)
        run_part(block, part, task);
    };
    parallel_tasks(parallel, tasks, work);
    for_panels(block, parallel, [&](int64_t p) {
      for (int t = 0; t < block.panel_tokens(p); ++t) finish(block, p * kTokens + t);
    });
  }
};

int64_t part_count(const LossShape& s) { return smaller(s.groups(), kMostParts); }
int task_count(const LossShape& s, int threads) { return static_cast<int>(smaller(part_count(s), threads)); }

template <class T>
void run(const albert_masked_lm_loss_args& a, bool bf16_dot, char* workspace, const albert_parallel* parallel) {
  const LossShape s(a, bf16_dot);
  const int tasks = task_count(s, thread_count(parallel));
  const Scratch m(a, s, part_count(s), tasks, workspace);
  const KernelTable kernels(s.unit, RowLayout::lines);
  const Forward<T> forward{a, s, m, kernels, part_count(s)};
  for_token_blocks(a, s, m.positions, [&](const TokenBlock& block) { forward.run(block, tasks, parallel); });
}

}  // namespace

size_t masked_lm_loss_workspace_bytes(const albert_masked_lm_loss_args& a, bool bf16_dot, int threads) {
  const LossShape s(a, bf16_dot);
  return Scratch(a, s, part_count(s), task_count(s, threads), nullptr).bytes;
}

void masked_lm_loss(const albert_masked_lm_loss_args& a, bool bf16_dot, char* workspace,
                    const albert_parallel* parallel) {
  const size_t tokens = static_cast<size_t>(a.tokens);
  if (a.loss != nullptr) __builtin_memset(a.loss, 0, tokens * sizeof(float));
  if (a.logsumexp != nullptr) __builtin_memset(a.logsumexp, 0, tokens * sizeof(float));
  if (a.correct != nullptr) __builtin_memset(a.correct, 0, tokens);
  a.dtype == ALBERT_BF16 ? run<bf16>(a, bf16_dot, workspace, parallel) : run<float>(a, bf16_dot, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
