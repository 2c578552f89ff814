// Attention forward in integers (attention.h, `quantized`), for a machine with VNNI: 8-bit products for the scores, at
// four times the rate of float32, 16-bit ones for the output, at twice. Probabilities of 8 bits would lose a long tail
// of small ones, which together may be most of a row. Compiled for AVX-512 alone.
#include "attention_pack.h"
#include "attention_softmax.h"

namespace albert::avx512 {
namespace {

constexpr int64_t kMostHeadDim = 128;
// Of a run of keys: int32 sums hold 256 products of the largest probability and value, and two per cent more, for the
// rounding of scores of a hundred thousand.
constexpr int64_t kRunPanels = 256 / kPanel;
constexpr float kToken = 127, kProbability = 8000, kLog2Probability = 12.9657843f, kValue = 1023;
constexpr int kQueryZero = 128;  // queries are unsigned
constexpr float kMagic = 0x1.8p23f;  // added to a small number: rounds it, and its lowest bits are the integer

// The larger magnitude; NaN, which is the largest of all, stays.
ALBERT_INLINE F larger_magnitude(F a, F b) { return from_bits(max(bits(abs(a)), bits(abs(b)))); }
// levels / largest, or 0 where that is too small; and largest / levels, NaN where it is not finite.
ALBERT_INLINE F inverse_scale(F largest, float levels) {
  return less(set(1e-30f), largest, div(set(levels), largest), zero());
}
ALBERT_INLINE F scale_of(F largest, float levels) { return fma(largest, zero(), mul(largest, set(1 / levels))); }

// t becomes 2^t + addend, rounded once, of a 2^t to 3e-5 of itself; t in [-126, 126], NaN stays.
template <int n>
ALBERT_INLINE void exp2_plus(F (&t)[n], F addend) {
  F power[n];
  split_power(t, power);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i) t[i] = fma(power[i], fma(t[i], set(0.693140405f), set(1.00002932f)), addend);
}

// `tokens` (at most kLanes) tokens of a head, less `mean`, as bytes in [-127, 127], or as those plus kQueryZero; 64 of a
// token's lie together, the next token's token_stride further, the same token's next 64 line_stride further. Features
// past head_dim become 0, of which the other operand has 0. scales: [kLanes].
template <bool is_query, class T>
void quantize_tokens(const T* x, int64_t stride, int tokens, int64_t d, const float* mean, char* out,
                     int64_t token_stride, int64_t line_stride, float* scales) {
  alignas(64) float most[kLanes * kLanes], inverses[kLanes];
  const auto centred = [=](int i, int64_t c) {
    const F v = load_columns(x + i * stride + c, static_cast<int>(d - c));
    return is_query ? v : sub(v, load(mean + c));
  };
  for (int i = tokens; i < kLanes; ++i) store(most + i * kLanes, zero());
  for (int i = 0; i < tokens; ++i) {
    F largest = zero();
    for (int64_t c = 0; c < d; c += kLanes) largest = larger_magnitude(largest, centred(i, c));
    store(most + i * kLanes, largest);
  }
  const F largest = across(most, larger_magnitude);
  store(inverses, inverse_scale(largest, kToken));
  store(scales, scale_of(largest, kToken));
  for (int i = 0; i < tokens; ++i)
    for (int64_t c = 0; c < d; c += 64) {
      const F inverse = set(inverses[i]);
      const auto rounded = [&](int64_t from) { return to_int(mul(centred(i, c + from), inverse)); };
      const I bytes = to_bytes(rounded(0), rounded(kLanes), rounded(2 * kLanes), rounded(3 * kLanes));
      store(reinterpret_cast<int*>(out + i * token_stride + c / 64 * line_stride),
            is_query ? exclusive_or(bytes, set(static_cast<int>(0x01010101u * kQueryZero))) : bytes);
    }
}

struct Scratch {
  char *keys, *values, *staging, *query, *ones;
  float *key_scale, *key_offset, *mean, *value_scale, *scores, *output;
  int16_t* probabilities;
  int* sums;
  size_t bytes;
  Scratch(const HeadShape& shape, int64_t most_keys, char* base) : bytes(0) {
    Arena arena{base};
    const int64_t panels = divide_up(most_keys, kPanel), run = smaller(panels, kRunPanels) * kPanel;
    keys = arena.take<char>(panels * kPanel * shape.d_steps * 4);
    values = arena.take<char>(panels * kPanel * shape.d_panels * kPanel * 2);
    staging = arena.take<char>(kPanel * shape.d_steps * 4);
    query = arena.take<char>(kMaxRows * shape.d_steps * 4);
    ones = arena.take<char>(shape.d_steps * 4);
    key_scale = arena.take(panels * kPanel);
    key_offset = arena.take(panels * kPanel);
    mean = arena.take(kMostHeadDim);
    value_scale = arena.take(kMostHeadDim);
    scores = arena.take(kMaxRows * run);
    output = arena.take(kMaxRows * shape.d_panels * kPanel);
    probabilities = arena.take<int16_t>(kMaxRows * run);
    sums = arena.take<int>(kMaxRows * kPanel);
    bytes = arena.used;
  }
};

template <class T>
struct Worker {
  const Attention& attention;
  const HeadShape& shape;
  const KernelTable& value_kernels;
  Scratch scratch;
  PrefetchQueue<T> soon;
  int64_t packed_row = -1, packed_head = -1;
  Scores scores;
  // The block's softmax: largest score, what is added to the exponent, the factor of earlier sums, those of the scores
  // in the exponential and before anything is added to them (Scores), and the sums of probabilities, lane by lane.
  alignas(64) float top[kLanes], shift[kLanes], alpha[kLanes], factor[kLanes], product[kLanes];
  alignas(64) float totals[kLanes * kLanes], largest[kLanes * kLanes];

  Worker(const Attention& a, const HeadShape& s, const KernelTable& for_values, const Scratch& memory)
      : attention(a), shape(s), value_kernels(for_values), scratch(memory), scores(a) {
    scores.raw = a.args.bias == nullptr && !a.args.causal;
    __builtin_memset(scratch.ones, kQueryZero, static_cast<size_t>(shape.d_steps) * 4);
  }

  void operator()(const UnitOfWork& unit) {
    const albert_attention_args& a = attention.args;
    const Row& row = unit.row;
    const int64_t head = unit.head, begin = part_begin(row.queries, unit.parts, unit.part);
    const Blocks blocks(part_begin(row.queries, unit.parts, unit.part + 1) - begin);
    if (blocks.size == 0) return;
    if (row.index != packed_row || head != packed_head) {
      pack_keys(keys_of<T>(shape.unit, a, head, row.key, row.keys));
      pack_values(values_of<T>(shape.unit, a, head, row.key, row.keys));
      packed_row = row.index;
      packed_head = head;
    }
    for (int64_t b = 0; b < blocks.count; ++b) {
      block(row, head, begin + blocks.begin(b), blocks.rows(b), begin + blocks.size);
      finish(row, head, begin + blocks.begin(b), blocks.rows(b));
    }
  }

  // ---- operands ----

  void pack_keys(const TokenRows<T>& x) {
    const float share = 1.0f / static_cast<float>(larger(x.tokens, 1));
    for (int64_t c = 0; c < kMostHeadDim; c += kLanes) {
      F total = zero();
      const int n = static_cast<int>(shape.d - c);
      for (int64_t t = 0; t < x.tokens && n > 0; ++t) total = add(total, load_columns(x.data + t * x.stride + c, n));
      store(scratch.mean + c, mul(total, set(share)));
    }
    const int64_t token_bytes = shape.d_steps * 4;
    const MicroKernel sum_up = avx512_vnni::micro_kernel(Unit::u8s8x4, RowLayout::lines, 1);
    for (int64_t token = 0; token < x.tokens; token += kPanel) {
      char* panel = scratch.keys + token * token_bytes;
      __builtin_memset(scratch.staging, 0, static_cast<size_t>(kPanel * token_bytes));
      for (int64_t i = 0; i < kPanel && token + i < x.tokens; i += kLanes)
        quantize_tokens<false>(x.data + (token + i) * x.stride, x.stride,
                               static_cast<int>(smaller(kLanes, x.tokens - token - i)), shape.d, scratch.mean,
                               scratch.staging + i * token_bytes, token_bytes, 64, scratch.key_scale + token + i);
      const float* from = reinterpret_cast<const float*>(scratch.staging);
      for (int64_t s = 0; s < shape.d_steps; s += kLanes)
        for (int64_t i = 0; i < kPanel; i += kLanes)
          transpose(from + i * shape.d_steps + s, shape.d_steps, reinterpret_cast<float*>(panel) + s * kPanel + i,
                    kPanel);
      // What queries' zero point adds to a key's products.
      sum_up(scratch.ones, panel, shape.d_steps, scratch.sums, false, {});
      for (int64_t i = 0; i < kPanel; i += kLanes) {
        const F scales = load(scratch.key_scale + token + i);
        store(scratch.key_offset + token + i, fnma(to_float(load(scratch.sums + i)), scales, zero()));
      }
      for (int64_t i = larger(0, x.tokens - token); i < kPanel; ++i) {  // past the row's last key
        scratch.key_scale[token + i] = 0;
        scratch.key_offset[token + i] = minus_infinity();
      }
    }
  }

  void pack_values(const TokenRows<T>& x) {
    const int64_t pairs = divide_up(x.tokens, kPanel) * kPanel / 2;
    for (int64_t c = 0; c < shape.d_panels * kPanel; c += kLanes) {
      const int n = static_cast<int>(shape.d - c);
      F largest = zero();
      for (int64_t t = 0; t < x.tokens && n > 0; ++t)
        largest = larger_magnitude(largest, load_columns(x.data + t * x.stride + c, n));
      store(scratch.value_scale + c, scale_of(largest, kValue));
      const F inverse = inverse_scale(largest, kValue);
      const auto rounded = [&](int64_t t) {
        return t < x.tokens ? to_int(mul(load_columns(x.data + t * x.stride + c, n), inverse)) : set(0);
      };
      int* out = reinterpret_cast<int*>(scratch.values) + c / kPanel * pairs * kPanel + c % kPanel;
      for (int64_t s = 0; s < pairs; ++s)
        store(out + s * kPanel, interleave_low16(rounded(2 * s), rounded(2 * s + 1)));
    }
  }

  // ---- one block of queries: [first, first + rows) of those up to `end` ----

  void block(const Row& row, int64_t head, int64_t first, int rows, int64_t end) {
    const albert_attention_args& a = attention.args;
    const auto queries =
        head_rows<T>(shape.unit, a.query, a.query_token_stride, a.query_head_stride, head, row.query, row.queries);
    quantize_tokens<true>(queries.data + first * queries.stride, queries.stride, rows, shape.d, nullptr, scratch.query,
                          64, rows * 64, factor);
    // A query of zeros: not 0 times the -inf of a key that it may not see. NaN stays.
    store(factor, max(set(1e-30f), mul(load(factor), set(a.scale * kLog2e))));
    if (!scores.raw) {
      store(product, load(factor));
      store(factor, set(1.0f));
    }
    store(top, set(minus_infinity()));
    for (int r = 0; r < rows; ++r) store(totals + r * kLanes, zero());
    const int64_t panels = divide_up(keys_seen(a, row, first + rows - 1), kPanel), tile = rows * kPanel;
    const int64_t all_steps = divide_up(row.keys, kPanel) * kPanel / 2;
    soon.clear();
    soon.add(static_cast<T*>(a.output) + (row.query + first) * a.output_stride + head * shape.d, a.output_stride, rows,
             For::writing);
    if (first + rows < end)
      soon.add(queries.data + (first + rows) * queries.stride, queries.stride, smaller(kMaxRows, end - first - rows),
               For::reading);
    soon.spread(panels);
    const ScoreKernel score_kernel = avx512_vnni::score_kernel(rows);
    for (int64_t p = 0; p < panels; p += kRunPanels) {
      const int64_t count = smaller(kRunPanels, panels - p), steps = count * kPanel / 2;
      for (int r = 0; r < kLanes; ++r) store(largest + r * kLanes, set(minus_infinity()));
      for (int64_t i = 0; i < count; ++i) {
        soon.step(shape.d);
        const int64_t key = (p + i) * kPanel;
        score_kernel(scratch.query, scratch.keys + key * shape.d_steps * 4, shape.d_steps, scratch.key_scale + key,
                     scratch.key_offset + key, scratch.scores + i * tile, largest);
      }
      raise(row, head, first, rows, p * kPanel, count);
      int done = 0;
      for (; done + 2 <= rows; done += 2) exponentiate<2>(rows, done, count);
      if (done < rows) exponentiate<1>(rows, done, count);
      for (int64_t i = 0; i < shape.d_panels; ++i) {
        value_kernels.of[rows](scratch.probabilities, scratch.values + (i * all_steps + p * kPanel / 2) * kPanel * 4,
                               steps, scratch.sums, false, {});
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < kPanel; c += kLanes) {
            float* out = scratch.output + (i * rows + r) * kPanel + c;
            const F sums = to_float(load(scratch.sums + r * kPanel + c));
            store(out, p == 0 ? sums : fma(load(out), set(alpha[r]), sums));
          }
      }
    }
    if (panels == 0) __builtin_memset(scratch.output, 0, static_cast<size_t>(rows * shape.d_panels * kPanel) * 4);
  }

  // Scores to what the softmax takes, where something is added or left out, and its new maximum.
  void raise(const Row& row, int64_t head, int64_t first, int rows, int64_t key, int64_t panels) {
    for (int r = 0; r < rows && !scores.raw; ++r) {
      float* row_scores = scratch.scores + r * kPanel;
      const int64_t tile = rows * kPanel;
      scores.product = product[r];
      scores.finish(row, head, first + r, key, keys_seen(attention.args, row, first + r), row_scores, tile, panels);
      F most = set(minus_infinity());
      for (int64_t p = 0; p < panels; ++p)
        for (int c = 0; c < kPanel; c += kLanes) most = max(most, load(row_scores + p * tile + c));
      store(largest + r * kLanes, most);
    }
    const F before = load(top);
    const F now = max(before, mul(across(largest, [](F a, F b) { return max(a, b); }), load(factor)));
    const F less_top = less(set(minus_infinity()), now, sub(zero(), now), zero());  // no key so far: anything will do
    store(alpha, probability(before, set(1.0f), less_top));
    store(shift, add(less_top, set(kLog2Probability)));
    store(top, now);
  }

  // Probabilities of `count` rows from r on as 16-bit numbers, which add up to what is kept as their totals.
  template <int count>
  ALBERT_INLINE void exponentiate(int rows, int r, int64_t panels) {
    static_assert(kPanel * sizeof(int16_t) == 64, "a panel's probabilities are a line");
    const float* s = scratch.scores + r * kPanel;
    int16_t* out = scratch.probabilities + r * kPanel;
    const F magic = set(kMagic);
    F total[count], f[count], less_top[count];
    for (int i = 0; i < count; ++i) {
      total[i] = zero();
      f[i] = set(factor[r + i]);
      less_top[i] = set(shift[r + i]);
    }
    for (int64_t p = 0; p < panels; ++p, s += rows * kPanel, out += rows * kPanel) {
      F e[count * kVectors];
#pragma GCC unroll 8
      for (int i = 0; i < count * kVectors; ++i)
        e[i] = max(set(-30.0f), fma(load(s + i * kLanes), f[i / kVectors], less_top[i / kVectors]));
      exp2_plus(e, magic);
#pragma GCC unroll 8
      for (int i = 0; i < count * kVectors; ++i) {
        store_low16(out + i * kLanes, bits(e[i]));
        total[i / kVectors] = add(total[i / kVectors], sub(e[i], magic));
      }
    }
    for (int i = 0; i < count; ++i) {
      float* sums = totals + (r + i) * kLanes;
      store(sums, fma(load(sums), set(alpha[r + i]), total[i]));
    }
  }

  void finish(const Row& row, int64_t head, int64_t first, int rows) {
    const albert_attention_args& a = attention.args;
    for (int r = rows; r < kLanes; ++r) store(totals + r * kLanes, zero());
    alignas(64) float factors[kLanes];
    const F total = across(totals, [](F x, F y) { return add(x, y); });
    store(factors, less(zero(), total, div(set(1.0f), total), mul(total, zero())));  // NaN stays NaN
    for (int r = 0; r < rows; ++r) {
      T* out = static_cast<T*>(a.output) + (row.query + first + r) * a.output_stride + head * shape.d;
      for (int64_t c = 0; c < shape.d; c += kLanes) {
        const F sums = load(scratch.output + (c / kPanel * rows + r) * kPanel + c % kPanel);
        store_columns(out + c, mul(sums, mul(load(scratch.value_scale + c), set(factors[r]))),
                      static_cast<int>(smaller(shape.d - c, kLanes)));
      }
    }
  }
};

template <class T>
void run(const Attention& attention, const HeadShape& shape, char* workspace, const albert_parallel* parallel) {
  const albert_attention_args& a = attention.args;
  const KernelTable for_values(Unit::s16x2, RowLayout::lines, true);
  const int64_t keys = most_keys(a);
  const size_t bytes = Scratch(shape, keys, nullptr).bytes;
  for_each_unit(a, parallel, QueryParts(a, parallel), [&](int task) {
    return Worker<T>(attention, shape, for_values, Scratch(shape, keys, workspace + bytes * static_cast<size_t>(task)));
  });
  clear_tokens(static_cast<T*>(a.output), a.output_stride, shape.d, a, a.cu_seqlens_q[a.batch], a.tokens_q);
}

HeadShape quantized_shape(Attention attention) {
  attention.unit = Unit::u8s8x4;
  return HeadShape(attention);
}

}  // namespace

size_t quantized_attention_workspace_bytes(const Attention& attention, int threads) {
  return Scratch(quantized_shape(attention), most_keys(attention.args), nullptr).bytes * static_cast<size_t>(threads);
}

void quantized_attention(const Attention& attention, char* workspace, const albert_parallel* parallel) {
  const HeadShape shape = quantized_shape(attention);
  if (attention.args.dtype == ALBERT_BF16)
    run<bf16>(attention, shape, workspace, parallel);
  else
    run<float>(attention, shape, workspace, parallel);
}

}  // namespace albert::avx512
