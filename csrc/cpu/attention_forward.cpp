// Attention forward: for each block of queries, one row of the tile each, the keys go by in runs that stay in L1, with
// an online softmax (Dao, arXiv 2307.08691). Keys and values of a head are packed once for all of its queries.
// Compiled once per instruction set.
#include "attention_pack.h"
#include "attention_softmax.h"

#include <type_traits>

namespace albert::ALBERT_ISA {
namespace {

constexpr int64_t kRunPanels = 512 / kPanel;  // keys between two looks at the maximum: scores and probabilities in L1

struct Scratch {
  float *keys, *values, *staging, *query, *scores, *probabilities, *output;
  size_t bytes;
  Scratch(const HeadShape& shape, int64_t most_keys, char* base) : bytes(0) {
    Arena arena{base};
    const int64_t panels = divide_up(most_keys, kPanel), run = smaller(panels, kRunPanels) * kPanel;
    keys = arena.take(panels * kPanel * shape.d_steps);
    values = arena.take(panels * shape.steps_per_panel() * shape.d_panels * kPanel);
    staging = arena.take(kPanel * shape.d_steps);
    query = arena.take(kMaxRows * shape.d_steps);
    scores = arena.take(kMaxRows * run);
    probabilities = arena.take(kMaxRows * run);
    output = arena.take(kMaxRows * shape.d_panels * kPanel);
    bytes = arena.used;
  }
};

template <class T>
struct ForwardWorker {
  const Attention& attention;
  const HeadShape& shape;
  const KernelTable& kernels;
  Scratch scratch;
  Scores scores;
  Dropout dropout;
  OnlineSoftmax softmax{};
  PrefetchQueue<T> soon;
  int64_t packed_row = -1, packed_head = -1;

  ForwardWorker(const Attention& a, const HeadShape& s, const KernelTable& k, const Scratch& memory)
      : attention(a), shape(s), kernels(k), scratch(memory), scores(a), dropout(dropout_of(a)) {}

  void operator()(const UnitOfWork& unit) {
    const albert_attention_args& a = attention.args;
    const Row& row = unit.row;
    const int64_t head = unit.head, begin = part_begin(row.queries, unit.parts, unit.part);
    const Blocks blocks(part_begin(row.queries, unit.parts, unit.part + 1) - begin);
    if (blocks.size == 0) return;
    if (row.index != packed_row || head != packed_head) {
      const auto keys = keys_of<T>(shape.unit, a, head, row.key, row.keys);
      const auto values = values_of<T>(shape.unit, a, head, row.key, row.keys);
      pack_tokens_as_columns(shape, keys, scratch.staging, scratch.keys);
      pack_features_as_columns(shape, values, value_steps(row), scratch.values);
      packed_row = row.index;
      packed_head = head;
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      block(row, head, begin + blocks.begin(b), blocks.rows(b), begin + blocks.size);
      finish(row, head, begin + blocks.begin(b), blocks.rows(b));
    }
  }

  int64_t value_steps(const Row& row) const { return divide_up(row.keys, kPanel) * shape.steps_per_panel(); }

  // Queries [first, first + rows) of those up to `end`: output tiles [d_panels][rows][kPanel], not yet divided by the
  // sums.
  void block(const Row& row, int64_t head, int64_t first, int rows, int64_t end) {
    const albert_attention_args& a = attention.args;
    const auto queries =
        head_rows<T>(shape.unit, a.query, a.query_token_stride, a.query_head_stride, head, row.query, row.queries);
    pack_tokens_as_rows(shape, queries, first, rows, scratch.query);
    softmax.start(scores.factor);
    const int64_t panels = divide_up(keys_seen(a, row, first + rows - 1), kPanel);
    const MicroKernel kernel = kernels.of[rows];
    T* output = static_cast<T*>(a.output) + (row.query + first) * a.output_stride + head * shape.d;
    soon.clear();
    soon.add(output, a.output_stride, rows, For::writing);
    if (first + rows < end)
      soon.add(queries.data + (first + rows) * queries.stride, queries.stride, smaller(kMaxRows, end - first - rows),
               For::reading);
    soon.spread(panels);
    for (int64_t p = 0; p < panels; p += kRunPanels) {
      const int64_t count = smaller(kRunPanels, panels - p), tile = rows * kPanel;
      for (int64_t i = 0; i < count; ++i) {
        soon.step(shape.d);
        kernel(scratch.query, scratch.keys + (p + i) * shape.d_steps * kPanel, shape.d_steps, scratch.scores + i * tile,
               false, {});
      }
      const bool ready = scores.ready(p * kPanel, keys_seen(a, row, first), count);
      for (int r = 0; r < rows && !ready; ++r)
        scores.finish(row, head, first + r, p * kPanel, keys_seen(a, row, first + r), scratch.scores + r * kPanel, tile,
                      count);
      softmax.raise(scratch.scores, count, rows);
      const uint32_t outer = static_cast<uint32_t>(row.index * a.heads + head);
      if (shape.unit == Unit::bf16x2)
        exponentiate_rows<bf16>(count, rows, outer, first, p * kPanel);
      else
        exponentiate_rows<float>(count, rows, outer, first, p * kPanel);
      if (p > 0) rescale(rows);
      for (int64_t i = 0; i < shape.d_panels; ++i)
        kernel(scratch.probabilities,
               scratch.values + (i * value_steps(row) + p * shape.steps_per_panel()) * kPanel,
               count * shape.steps_per_panel(), scratch.output + i * tile, p > 0, {});
    }
    if (panels == 0) __builtin_memset(scratch.output, 0, static_cast<size_t>(rows * shape.d_panels * kPanel) * 4);
  }

  template <class Stored>
  void exponentiate_rows(int64_t panels, int rows, uint32_t outer, int64_t first, int64_t key) {
    const KeyLines<Stored> lines{reinterpret_cast<Stored*>(scratch.probabilities), rows};
    const auto some = [&](auto count, int r) {
      (attention.dropout ? exponentiate<true, count.value, Stored> : exponentiate<false, count.value, Stored>)(
          softmax, scratch.scores, panels, rows, r, dropout, outer, static_cast<uint32_t>(first + r),
          static_cast<uint32_t>(key), lines);
    };
    int r = 0;
    for (; r + 2 <= rows; r += 2) some(std::integral_constant<int, 2>(), r);
    if (r < rows) some(std::integral_constant<int, 1>(), r);
  }

  void rescale(int rows) {
    for (int64_t i = 0; i < shape.d_panels; ++i)
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < kPanel; c += kLanes) {
          float* p = scratch.output + (i * rows + r) * kPanel + c;
          store(p, mul(load(p), set(softmax.alpha[r])));
        }
  }

  void finish(const Row& row, int64_t head, int64_t first, int rows) {
    const albert_attention_args& a = attention.args;
    alignas(64) float totals[OnlineSoftmax::kRows], factors[OnlineSoftmax::kRows];
    softmax.close(attention.keep_scale, totals, factors);
    for (int r = 0; r < rows; ++r) {
      const int64_t token = row.query + first + r;
      T* out = static_cast<T*>(a.output) + token * a.output_stride + head * shape.d;
      for (int64_t c = 0; c < shape.d; c += kLanes) {
        const F sums = load(scratch.output + (c / kPanel * rows + r) * kPanel + c % kPanel);
        store_columns(out + c, mul(sums, set(factors[r])), static_cast<int>(smaller(shape.d - c, kLanes)));
      }
      if (a.logsumexp == nullptr) continue;
      float* at = a.logsumexp + head * a.tokens_q + token;
      const double of_sum = static_cast<double>(__builtin_logf(totals[r]));
      *at = a.bias == nullptr ? static_cast<float>(softmax.top[r] * kLn2 + of_sum) : softmax.top[r];
      if (a.bias != nullptr) at[a.heads * a.tokens_q] = static_cast<float>(of_sum / kLn2);
    }
  }
};

template <class T>
void run(const Attention& attention, char* workspace, const albert_parallel* parallel) {
  const albert_attention_args& a = attention.args;
  const HeadShape shape(attention);
  const KernelTable kernels(shape.unit, RowLayout::lines);
  const int64_t keys = most_keys(a), used = a.cu_seqlens_q[a.batch];
  const size_t bytes = Scratch(shape, keys, nullptr).bytes;
  for_each_unit(a, parallel, QueryParts(a, parallel), [&](int task) {
    return ForwardWorker<T>(attention, shape, kernels,
                            Scratch(shape, keys, workspace + bytes * static_cast<size_t>(task)));
  });
  clear_tokens(static_cast<T*>(a.output), a.output_stride, shape.d, a, used, a.tokens_q);
  if (a.logsumexp == nullptr) return;
  for (int64_t h = 0; h < (a.bias == nullptr ? 1 : 2) * a.heads; ++h)
    for (int64_t t = used; t < a.tokens_q; ++t) a.logsumexp[h * a.tokens_q + t] = minus_infinity();
}

}  // namespace

size_t attention_workspace_bytes(const Attention& attention, int threads) {
  return Scratch(HeadShape(attention), most_keys(attention.args), nullptr).bytes * static_cast<size_t>(threads);
}

void attention_forward(const Attention& attention, char* workspace, const albert_parallel* parallel) {
  if (attention.args.dtype == ALBERT_BF16)
    run<bf16>(attention, workspace, parallel);
  else
    run<float>(attention, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
