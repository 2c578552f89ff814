// The micro-kernels of one instruction set: compiled once per instruction set (isa.h). The avx512_vnni and avx512_bf16
// compilations hold only what those extensions add.
#include "gemm_micro.h"

#include "vec.h"

namespace albert::ALBERT_ISA {
namespace {

constexpr int kColumns = kPanel / kLanes;  // registers across a tile
constexpr int kAhead = 16;  // steps: past the end lies the next panel, whose beginning no hardware prefetcher foresees

struct DotF32 {
  using Sum = F;
  static ALBERT_INLINE F dot(F sum, I row, I column) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(row), "v"(column));  // of fma(), GCC moves every third sum about
    return sum;
  }
};

// Exact: a 16-bit product and the sum of two of them fit 32 bits for operands that came from 8.
struct DotS16 {
  using Sum = I;
  static ALBERT_INLINE I dot(I sum, I row, I column) {
    sum = add(sum, madd16(row, column));
    asm volatile("" : "+v"(sum));  // one product at a time: GCC would compute all, then spill
    return sum;
  }
};

#ifdef __AVX512VNNI__
struct DotU8S8 {
  using Sum = I;
  static ALBERT_INLINE I dot(I sum, I row, I column) { return _mm512_dpbusd_epi32(sum, row, column); }
};
struct DotS16Fused {
  using Sum = I;
  static ALBERT_INLINE I dot(I sum, I row, I column) { return _mm512_dpwssd_epi32(sum, row, column); }
};
#endif

#ifdef __AVX512BF16__
struct DotBf16 {
  using Sum = F;
  static ALBERT_INLINE F dot(F sum, I row, I column) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(column));
  }
};
#endif

ALBERT_INLINE F none(F) { return zero(); }
ALBERT_INLINE I none(I) { return set(0); }
ALBERT_INLINE F load_sum(const F*, const void* p) { return load(static_cast<const float*>(p)); }
ALBERT_INLINE I load_sum(const I*, const void* p) { return load(static_cast<const int*>(p)); }
ALBERT_INLINE void store_sum(void* p, F x) { store(static_cast<float*>(p), x); }
ALBERT_INLINE void store_sum(void* p, I x) { store(static_cast<int*>(p), x); }

// sums = rows . columns: of one panel, asked for a little ahead, or of two that are in L1.
template <class Dot, RowLayout layout, int rows, int panels>
ALBERT_INLINE void multiply(const void* row_units, const void* panel, long apart, long steps, const Soon& soon,
                            typename Dot::Sum (&sums)[panels][rows][kColumns]) {
  constexpr int unroll = 4;
  constexpr long row_stride = layout == RowLayout::lines ? kLine : 1;
  constexpr long step_stride = layout == RowLayout::lines ? 1 : rows;
  const int* a = static_cast<const int*>(row_units);
  const int* b = static_cast<const int*>(panel);
  const char* asked = soon.data;
#pragma GCC unroll 2
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c) sums[p][r][c] = none(typename Dot::Sum());

  for (; steps > 0; steps -= kLine) {
    for (int part = 0; part < kLine / unroll; ++part) {
      for (int i = 0; i < soon.lines; i += kLine / unroll, asked += 64)
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) _mm_prefetch(asked + p * soon.apart, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int s = 0; s < unroll; ++s) {
        I column[panels][kColumns];
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p)
#pragma GCC unroll 2
          for (int c = 0; c < kColumns; ++c) {
            column[p][c] = load(b + p * apart + s * kPanel + c * kLanes);
            if (panels == 1 && c * kLanes % kLine == 0)
              _mm_prefetch(reinterpret_cast<const char*>(b + (s + kAhead) * kPanel + c * kLanes), _MM_HINT_T0);
          }
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
          const I row = set(a[r * row_stride + s * step_stride]);
#pragma GCC unroll 2
          for (int p = 0; p < panels; ++p)
#pragma GCC unroll 2
            for (int c = 0; c < kColumns; ++c) sums[p][r][c] = Dot::dot(sums[p][r][c], row, column[p][c]);
        }
      }
      a += unroll * step_stride;
      b += unroll * kPanel;
    }
    if (layout == RowLayout::lines) a += kLine * (rows - 1);
  }
}

template <class Dot, RowLayout layout, int rows, int panels>
ALBERT_INLINE void multiply_tiles(const void* row_units, const void* panel, long apart, long steps, void* tiles,
                                  bool accumulate, const Soon& soon) {
  using Sum = typename Dot::Sum;
  Sum sums[panels][rows][kColumns];
  multiply<Dot, layout>(row_units, panel, apart, steps, soon, sums);
  int* out = static_cast<int*>(tiles);
#pragma GCC unroll 2
  for (int p = 0; p < panels; ++p)
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < kColumns; ++c, out += kLanes) {
        const Sum sum = sums[p][r][c];
        store_sum(out, accumulate ? add(load_sum(static_cast<const Sum*>(nullptr), out), sum) : sum);
      }
}

template <class Dot, RowLayout layout, int rows>
void tile_kernel(const void* row_units, const void* panel, long steps, void* tile, bool accumulate, const Soon& soon) {
  multiply_tiles<Dot, layout, rows, 1>(row_units, panel, 0, steps, tile, accumulate, soon);
}

template <class Dot, int rows>
void pair_of_tiles(const void* row_units, const void* panel, long apart, long steps, void* tiles, bool accumulate,
                   const Soon& soon) {
  multiply_tiles<Dot, RowLayout::lines, rows, 2>(row_units, panel, apart, steps, tiles, accumulate, soon);
}

#ifdef __AVX512VNNI__
template <int rows>
void scores(const void* row_units, const void* panel, long steps, const float* scales, const float* offsets,
            float* tile, float* largest) {
  I sums[1][rows][kColumns];
  multiply<DotU8S8, RowLayout::lines>(row_units, panel, 0, steps, {}, sums);
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r) {
    F most = load(largest + r * kLanes);
#pragma GCC unroll 2
    for (int c = 0; c < kColumns; ++c) {
      asm volatile("" : "+v"(sums[0][r][c]));  // or GCC keeps all of them in memory
      const F score = fma(to_float(sums[0][r][c]), load(scales + c * kLanes), load(offsets + c * kLanes));
      store(tile + r * kPanel + c * kLanes, score);
      most = max(most, score);
    }
    store(largest + r * kLanes, most);
  }
}

template <int rows>
ScoreKernel pick_scores(int wanted) {
  if constexpr (rows == 0)
    return nullptr;
  else
    return wanted == rows ? scores<rows> : pick_scores<rows - 1>(wanted);
}
#endif

template <class Dot, RowLayout layout, int rows>
MicroKernel pick(int wanted) {
  if constexpr (rows == 0)
    return nullptr;
  else
    return wanted == rows ? tile_kernel<Dot, layout, rows> : pick<Dot, layout, rows - 1>(wanted);
}

template <class Dot, int rows>
PairKernel pick_pair(int wanted) {
  if constexpr (rows == 0)
    return nullptr;
  else
    return wanted == rows ? pair_of_tiles<Dot, rows> : pick_pair<Dot, rows - 1>(wanted);
}

template <class Dot>
MicroKernel pick_layout(RowLayout layout, int rows) {
  return layout == RowLayout::lines ? pick<Dot, RowLayout::lines, kMaxRows>(rows)
                                    : pick<Dot, RowLayout::steps, kMaxRows>(rows);
}

}  // namespace

MicroKernel micro_kernel(Unit unit, RowLayout layout, int rows) {
#if defined(__AVX512BF16__)
  if (unit == Unit::bf16x2) return pick_layout<DotBf16>(layout, rows);
#elif defined(__AVX512VNNI__)
  if (unit == Unit::u8s8x4 && layout == RowLayout::lines) return pick<DotU8S8, RowLayout::lines, kMaxRows>(rows);
  if (unit == Unit::s16x2 && layout == RowLayout::lines) return pick<DotS16Fused, RowLayout::lines, kMaxRows>(rows);
#else
  if (unit == Unit::f32) return pick_layout<DotF32>(layout, rows);
  if (unit == Unit::s16x2 && layout == RowLayout::lines) return pick<DotS16, RowLayout::lines, kMaxRows>(rows);
#endif
  return nullptr;
}

#if defined(__AVX512F__) && !defined(__AVX512VNNI__) && !defined(__AVX512BF16__)
PairKernel pair_kernel(int rows) { return pick_pair<DotF32, kPairRows>(rows); }
#endif

#if defined(__AVX512VNNI__) && !defined(__AVX512BF16__)
ScoreKernel score_kernel(int rows) { return pick_scores<kMaxRows>(rows); }
#endif

}  // namespace albert::ALBERT_ISA
