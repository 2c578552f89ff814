// A unit of attention's backward pass: one head's queries against a part of its keys (Dao et al., arXiv 2205.14135,
// algorithm 4). Queries go by in groups; for each panel of keys the probabilities are computed again from logsumexp.
// Gradients of keys and values are summed transposed, [head_dim][keys], so that the tiles of P and dS are operands of
// those products as they are. Compiled once per instruction set.
#pragma once
#include "attention_backward_scratch.h"

namespace albert::ALBERT_ISA {

// What is the same for all units.
struct Backward {
  const Attention& attention;
  const albert_attention_gradients& grads;
  HeadShape shape;
  KernelTable by_lines, by_steps;
  float* partial;  // null, or where heads are cut into parts, [parts][tokens_q][heads * head_dim]: gradients of queries
};

template <class T>
struct BackwardWorker {
  const Backward& backward;
  BackwardScratch m;
  const albert_attention_args& a = backward.attention.args;
  const albert_attention_gradients& g = backward.grads;
  const HeadShape& shape = backward.shape;
  const Scores scores{backward.attention};
  const Dropout dropout = dropout_of(backward.attention);
  GradientTile tile{};
  PrefetchQueue<T> soon{};
  // The unit:
  const Row* row = nullptr;
  int64_t head = 0, part = 0, first_panel = 0, panels = 0, keys = 0;
  T *grad_key = nullptr, *grad_value = nullptr;

  void operator()(const UnitOfWork& unit) {
    row = &unit.row, head = unit.head, part = unit.part;
    const int64_t all = divide_up(row->keys, kPanel);
    first_panel = part_begin(all, unit.parts, part);
    panels = part_begin(all, unit.parts, part + 1) - first_panel;
    const int64_t token = row->key + first_panel * kPanel;
    keys = smaller(row->key + row->keys - token, panels * kPanel);
    grad_key = static_cast<T*>(g.grad_key) + token * g.grad_key_token_stride + head * g.grad_key_head_stride;
    grad_value = static_cast<T*>(g.grad_value) + token * g.grad_value_token_stride + head * g.grad_value_head_stride;
    const auto key = keys_of<T>(shape.unit, a, head, token, keys);
    const auto value = values_of<T>(shape.unit, a, head, token, keys);
    pack_tokens_as_columns(shape, key, m.staging, m.keys);
    pack_tokens_as_columns(shape, value, m.staging, m.values);
    pack_features_as_columns(shape, key, panels * shape.steps_per_panel(), m.key_features);
    const size_t sums = static_cast<size_t>(panels * kPanel * shape.d_rows()) * sizeof(float);
    __builtin_memset(m.grad_keys, 0, sums);
    __builtin_memset(m.grad_values, 0, sums);
    for (int64_t q = 0; q < row->queries; q += kGroup) group(q, smaller(kGroup, row->queries - q));
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t from = p * kPanel, count = smaller(kPanel, keys - from), at = p * shape.d_rows() * kPanel;
      store_transposed(m.grad_keys + at, shape.d, count, a.scale, grad_key + from * g.grad_key_token_stride,
                       g.grad_key_token_stride);
      store_transposed(m.grad_values + at, shape.d, count, backward.attention.keep_scale,
                       grad_value + from * g.grad_value_token_stride, g.grad_value_token_stride);
    }
  }

  // Queries [first, first + queries) of the row.
  void group(int64_t first, int64_t queries) {
    const int64_t seen = keys_seen(a, *row, first + queries - 1);
    const int64_t end = larger(0, smaller(panels, divide_up(seen, kPanel) - first_panel));
    const Blocks blocks(queries);
    if (end > 0) prepare(first, blocks);
    foresee(first, queries, end * (blocks.count + Blocks(shape.d).count));
    for (int64_t p = 0; p < end; p += kGradientRun) {
      const int64_t run = smaller(kGradientRun, end - p), steps = shape.steps_per_panel();
      for (int64_t i = 0; i < run; ++i) panel(first, blocks, p + i, i);
      for (int64_t b = 0; b < blocks.count; ++b)
        for (int64_t j = 0; j < shape.d_panels; ++j)
          backward.by_lines.of[blocks.rows(b)](m.lines + blocks.begin(b) * kGradientRun * steps,
                                               m.key_features + (j * panels + p) * steps * kPanel, run * steps,
                                               grad_query_tile(blocks, b, j), p > 0, {});
    }
    store_grad_queries(first, blocks, end > 0);
  }

  // What this group will write, what the next one will read, and after the last what the unit will write.
  void foresee(int64_t first, int64_t queries, int64_t steps) {
    const int64_t token = row->query + first, next = token + queries, left = row->queries - first - queries;
    soon.clear();
    if (backward.partial == nullptr) soon.add(grad_query(token), g.grad_query_token_stride, queries, For::writing);
    if (left > 0) {
      const int64_t count = smaller(kGroup, left);
      const auto add = [&](const void* base, int64_t token_stride, int64_t head_stride) {
        soon.add(static_cast<const T*>(base) + next * token_stride + head * head_stride, token_stride, count,
                 For::reading);
      };
      add(a.query, a.query_token_stride, a.query_head_stride);
      add(g.grad_output, g.grad_output_stride, shape.d);
      add(a.output, a.output_stride, shape.d);
    } else {
      soon.add(grad_key, g.grad_key_token_stride, keys, For::writing);
      soon.add(grad_value, g.grad_value_token_stride, keys, For::writing);
    }
    soon.spread(steps);
  }

  T* grad_query(int64_t token) const {
    return static_cast<T*>(g.grad_query) + token * g.grad_query_token_stride + head * g.grad_query_head_stride;
  }

  float* grad_query_tile(const Blocks& blocks, int64_t b, int64_t j) const {
    return m.grad_queries + (blocks.begin(b) * shape.d_panels + j * blocks.rows(b)) * kPanel;
  }

  void prepare(int64_t first, const Blocks& blocks) {
    const int64_t token = row->query + first, steps = shape.steps(blocks.size);
    const auto query =
        head_rows<T>(shape.unit, a.query, a.query_token_stride, a.query_head_stride, head, token, blocks.size);
    const auto grad_output =
        head_rows<T>(shape.unit, g.grad_output, g.grad_output_stride, shape.d, head, token, blocks.size);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const int64_t begin = blocks.begin(b), at = begin * shape.d_steps;
      pack_tokens_as_rows(shape, query, begin, blocks.rows(b), m.queries + at);
      pack_tokens_as_rows(shape, grad_output, begin, blocks.rows(b), m.grad_outputs + at);
    }
    pack_features_as_rows(shape, query, steps, m.query_features);
    pack_features_as_rows(shape, grad_output, steps, m.grad_output_features);

    tile.queries = blocks.size;
    tile.factor = scores.factor, tile.keep_scale = backward.attention.keep_scale;
    tile.padded = steps * elements_per_unit(shape.unit);
    tile.scores = m.scores, tile.grad_probabilities = m.grad_probabilities;
    tile.probabilities_out = m.probabilities_out, tile.grad_scores_out = m.grad_scores_out;
    tile.shift = m.shift, tile.rest = m.rest, tile.delta = m.delta;
    tile.clear_padding(shape.unit);
    tile.place_lines(m.lines, kGradientRun * shape.steps_per_panel());
    const T* output = static_cast<const T*>(a.output) + token * a.output_stride + head * shape.d;
    const float* logsumexp = a.logsumexp + head * a.tokens_q + token;
    for (int64_t r = 0; r < kGroup; ++r) {
      if (r >= blocks.size || logsumexp[r] == minus_infinity()) {
        tile.set_nothing(r);
        continue;
      }
      const float dot = row_dot(grad_output.data + r * grad_output.stride, output + r * a.output_stride, shape.d);
      if (a.bias == nullptr)
        tile.set_query(r, logsumexp[r], dot);
      else
        tile.set_query(r, logsumexp[r], logsumexp[a.heads * a.tokens_q + r], dot);
    }
  }

  // Panel p of the part, the i-th of its run.
  void panel(int64_t first, const Blocks& blocks, int64_t p, int64_t i) {
    const int64_t at = p * shape.d_steps * kPanel, key = (first_panel + p) * kPanel, steps = shape.steps(blocks.size);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const MicroKernel kernel = backward.by_lines.of[blocks.rows(b)];
      const int64_t begin = blocks.begin(b), rows_at = begin * shape.d_steps;
      soon.step(shape.d);
      kernel(m.queries + rows_at, m.keys + at, shape.d_steps, m.scores + begin * kPanel, false, {});
      kernel(m.grad_outputs + rows_at, m.values + at, shape.d_steps, m.grad_probabilities + begin * kPanel, false, {});
    }
    const bool ready = scores.ready(key, keys_seen(a, *row, first), 1);
    for (int64_t r = 0; r < blocks.size && !ready; ++r)
      scores.finish(*row, head, first + r, key, keys_seen(a, *row, first + r), m.scores + r * kPanel, 0, 1);
    const bool dropped = backward.attention.dropout;
    const auto f = shape.unit == Unit::f32 ? (dropped ? differentiate<float, true> : differentiate<float, false>)
                                           : (dropped ? differentiate<bf16, true> : differentiate<bf16, false>);
    f(tile, i, dropout, static_cast<uint32_t>(row->index * a.heads + head),
      static_cast<uint32_t>(first), static_cast<uint32_t>(key));
    const Blocks features(shape.d);
    for (int64_t b = 0; b < features.count; ++b) {
      const MicroKernel kernel = backward.by_steps.of[features.rows(b)];
      soon.step(shape.d);
      const int64_t begin = features.begin(b), sums = (p * shape.d_rows() + begin) * kPanel;
      kernel(m.grad_output_features + begin * steps, m.probabilities_out, steps, m.grad_values + sums, true, {});
      kernel(m.query_features + begin * steps, m.grad_scores_out, steps, m.grad_keys + sums, true, {});
    }
  }

  void store_grad_queries(int64_t first, const Blocks& blocks, bool any) {
    for (int64_t b = 0; b < blocks.count; ++b)
      for (int r = 0; r < blocks.rows(b); ++r) {
        const int64_t token = row->query + first + blocks.begin(b) + r;
        const auto put = [&](auto* out, float factor) {
          for (int64_t c = 0; c < shape.d; c += kLanes) {
            const float* sums = grad_query_tile(blocks, b, c / kPanel) + r * kPanel + c % kPanel;
            store_columns(out + c, any ? mul(load(sums), set(factor)) : zero(),
                          static_cast<int>(smaller(shape.d - c, kLanes)));
          }
        };
        if (backward.partial != nullptr)
          put(backward.partial + ((part * a.tokens_q + token) * a.heads + head) * shape.d, 1.0f);
        else
          put(grad_query(token), a.scale);
      }
  }
};

}  // namespace albert::ALBERT_ISA
