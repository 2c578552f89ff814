// What attention's forward and backward share: rows of the batch, sizes of packed operands, and units of work.
// Compiled once per instruction set.
#pragma once
#include "attention_kernels.h"
#include "attention_prefetch.h"
#include "gemm_tiling.h"
#include "pack_columns.h"

namespace albert::ALBERT_ISA {

// A row of the batch: its first token and their number, among the queries and among the keys.
struct Row {
  int64_t index, query, queries, key, keys;
  Row(const albert_attention_args& a, int64_t r)
      : index(r),
        query(a.cu_seqlens_q[r]),
        queries(a.cu_seqlens_q[r + 1] - query),
        key(a.cu_seqlens_k[r]),
        keys(a.cu_seqlens_k[r + 1] - key) {}
};

// How many of its row's keys query q of the row may see.
inline int64_t keys_seen(const albert_attention_args& a, const Row& row, int64_t q) {
  return a.causal ? larger(0, smaller(row.keys, q + 1 + row.keys - row.queries)) : row.keys;
}

// One head of `tokens` tokens, [tokens][head_dim].
template <class T>
TokenRows<T> head_rows(Unit unit, const void* base, int64_t token_stride, int64_t head_stride, int64_t head,
                       int64_t token, int64_t tokens) {
  const T* data = static_cast<const T*>(base) + head * head_stride;
  return {data + token * token_stride, token_stride, tokens, elements_per_unit(unit)};
}

template <class T>
TokenRows<T> keys_of(Unit unit, const albert_attention_args& a, int64_t head, int64_t token, int64_t tokens) {
  return head_rows<T>(unit, a.key, a.key_token_stride, a.key_head_stride, head, token, tokens);
}
template <class T>
TokenRows<T> values_of(Unit unit, const albert_attention_args& a, int64_t head, int64_t token, int64_t tokens) {
  return head_rows<T>(unit, a.value, a.value_token_stride, a.value_head_stride, head, token, tokens);
}

// Head size d as the micro-kernels see it: a reduction of d_steps, or columns in d_panels.
struct HeadShape {
  Unit unit;
  int64_t d, d_steps, d_panels;
  explicit HeadShape(const Attention& a)
      : unit(a.unit),
        d(a.args.head_dim),
        d_steps(steps(d)),
        d_panels(divide_up(d, kPanel)) {}
  int64_t steps(int64_t elements) const { return divide_up(elements, kLine * elements_per_unit(unit)) * kLine; }
  int64_t d_rows() const { return divide_up(d, kLanes) * kLanes; }  // of a tile that is transposed in the end
  int64_t steps_per_panel() const { return kPanel / elements_per_unit(unit); }  // of keys, as a reduction
};

// Rows of a micro-kernel: `size` of them in blocks of nearly equal size.
struct Blocks {
  int64_t size, count;
  explicit Blocks(int64_t n) : size(n), count(divide_up(n, kMaxRows)) {}
  int64_t begin(int64_t b) const { return part_begin(size, count, b); }
  int rows(int64_t b) const { return static_cast<int>(begin(b + 1) - begin(b)); }
};

// A task's scratch memory, dealt out in cache lines. Without memory it only counts.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T = float>
  T* take(int64_t count) {
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(static_cast<size_t>(count) * sizeof(T), kCacheLine);
    return p;
  }
};

// A part of one head of one row of the batch.
struct UnitOfWork {
  Row row;
  int64_t head, part, parts;
};

// Calls worker(unit) for every part of every head of every row; parts(row) says how many it has. The tasks draw units
// from a counter, so that a slow thread does less: which task does a unit must not show in the result.
// make_worker(task) is called once in each task.
template <class Parts, class MakeWorker>
void for_each_unit(const albert_attention_args& a, const albert_parallel* parallel, Parts parts,
                   MakeWorker make_worker) {
  int64_t units = 0, counter = 0;
  for (int64_t r = 0; r < a.batch; ++r) units += a.heads * parts(Row(a, r));
  if (units == 0) return;
  auto task = [&](int index) {
    auto worker = make_worker(index);
    int64_t r = 0, first = 0;  // the row that the last unit fell into, and its first unit
    for (;;) {
      const int64_t unit = __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
      if (unit >= units) return;
      while (unit >= first + a.heads * parts(Row(a, r))) first += a.heads * parts(Row(a, r++));
      const int64_t count = parts(Row(a, r));
      worker(UnitOfWork{Row(a, r), (unit - first) / count, (unit - first) % count, count});
    }
  };
  parallel_tasks(parallel, static_cast<int>(smaller(thread_count(parallel), units)), task);
}

// The work of all rows, and of the largest (row, head), in pairs of query and key, with something for each token.
struct Work {
  double total = 0, largest = 0;
  static double of(const Row& row) {
    return static_cast<double>(row.queries + 16) * static_cast<double>(row.keys + 16);
  }
  explicit Work(const albert_attention_args& a) {
    for (int64_t r = 0; r < a.batch; ++r) {
      const double work = of(Row(a, r));
      total += work * static_cast<double>(a.heads);
      if (work > largest) largest = work;
    }
  }
  // With units no larger than this, threads that draw them one by one end at nearly the same time.
  double unit(int threads) const { return threads == 1 ? total + 1 : total / (4.0 * threads) + 1; }
};

// Into how many parts a row's queries are split: units of work of forward.
struct QueryParts {
  double unit;
  QueryParts(const albert_attention_args& a, const albert_parallel* parallel)
      : unit(Work(a).unit(thread_count(parallel))) {}
  int64_t operator()(const Row& row) const {
    const int64_t wanted = static_cast<int64_t>(Work::of(row) / unit + 0.999);
    return larger(1, smaller(wanted, divide_up(row.queries, 4 * kMaxRows)));
  }
};

inline int64_t most_keys(const albert_attention_args& a) {
  int64_t most = 0;
  for (int64_t r = 0; r < a.batch; ++r) most = larger(most, Row(a, r).keys);
  return most;
}

// Tokens that belong to no row.
template <class T>
void clear_tokens(T* base, int64_t token_stride, int64_t head_stride, const albert_attention_args& a, int64_t begin,
                  int64_t end) {
  for (int64_t t = begin; t < end; ++t)
    for (int64_t h = 0; h < a.heads; ++h)
      __builtin_memset(base + t * token_stride + h * head_stride, 0, static_cast<size_t>(a.head_dim) * sizeof(T));
}

}  // namespace albert::ALBERT_ISA
