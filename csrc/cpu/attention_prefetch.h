// One head's tokens lie a page or two apart, which no hardware prefetcher follows, and often beyond L2. Attention asks
// for them beside its products, a few at a time: without this, writing the output alone cost a tenth of forward.
// Compiled once per instruction set.
#pragma once
#include "pack_columns.h"

namespace albert::ALBERT_ISA {

enum class For { reading, writing };

// `tokens` tokens of a head that will soon be read or written.
template <class T>
ALBERT_INLINE void prefetch_tokens(const T* head, int64_t stride, int64_t d, int64_t tokens, For what = For::reading) {
  constexpr int64_t per_line = 64 / sizeof(T);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t c = 0; c < d; c += per_line)
      if (what == For::writing)
        prefetch_to_write(head + t * stride + c);
      else
        __builtin_prefetch(head + t * stride + c, 0, 2);
}

// Up to `count` tokens of x from `first` on.
template <class T>
ALBERT_INLINE void prefetch_tokens(const TokenRows<T>& x, int64_t d, int64_t first, int64_t count) {
  if (first >= x.tokens) return;
  prefetch_tokens(x.data + first * x.stride, x.stride, d, first + count < x.tokens ? count : x.tokens - first);
}

// Tokens to ask for, some at each step.
template <class T>
class PrefetchQueue {
 public:
  void clear() { ranges = current = total = 0; }
  void add(const T* head, int64_t stride, int64_t tokens, For what) {
    if (tokens <= 0) return;
    range[ranges++] = {head, stride, tokens, what};
    total += tokens;
  }
  // From here on step() will be called so many times.
  void spread(int64_t steps) { each = steps > 0 ? (total + steps - 1) / steps : 0; }
  ALBERT_INLINE void step(int64_t d) {
    for (int64_t left = each; left > 0 && current < ranges;) {
      Range& r = range[current];
      const int64_t count = left < r.tokens ? left : r.tokens;
      prefetch_tokens(r.head, r.stride, d, count, r.what);
      r.head += count * r.stride;
      r.tokens -= count;
      left -= count;
      if (r.tokens == 0) ++current;
    }
  }

 private:
  struct Range {
    const T* head;
    int64_t stride, tokens;
    For what;
  };
  Range range[6];
  int64_t ranges = 0, current = 0, total = 0, each = 0;
};

}  // namespace albert::ALBERT_ISA
