// How a product is cut up: among threads, into chunks of rows that stay in cache, into blocks of a tile's rows.
// Compiled once per instruction set.
#pragma once
#include <cstdint>

#include "gemm_micro.h"

namespace albert::ALBERT_ISA {

// Cores with AVX-512 have 1 to 2 MB of L2 and 32 or 48 KB of L1 (two panels' slices: 24), those without it 256 to 512 KB
// of L2. Cycles are what choose_grid counts with: of a step for a row that is quantized, and for a block at least.
#ifdef __AVX512F__
constexpr int64_t kGroupBytes = 256 << 10, kChunkBytes = 1024 << 10, kSlicedChunkBytes = 2048 << 10;
constexpr int64_t kSliceSteps = 96, kLeastRows = kPairRows;
constexpr double kQuantizeCycles = 3.5;
constexpr int64_t kLeastBlockCycles = 24;
#else
constexpr int64_t kGroupBytes = 64 << 10, kChunkBytes = 128 << 10, kSlicedChunkBytes = 512 << 10;
constexpr int64_t kLeastRows = kMaxRows;
constexpr double kQuantizeCycles = 2;
constexpr int64_t kLeastBlockCycles = 0;
#endif
constexpr int64_t kMostPanelBytes = 256 << 10, kLongSlice = 256;
constexpr int64_t kMostChunkRows = 32 * kMaxRows, kMostBlocks = kMostChunkRows / kLeastRows;  // of any tiling
// Float32 sums are closed after so many steps and added up: one sum over K = 3072 has five times the error. Where few
// are added up each must be short: MKL's sums over K = 128 of a few rows have half the error of one sum.
constexpr int64_t kStepsPerSum = 128, kStepsPerShortSum = 32;
constexpr int64_t steps_per_sum(int64_t steps) { return steps <= 512 ? kStepsPerShortSum : kStepsPerSum; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// Where part i of `parts` nearly equal ones begins.
constexpr int64_t part_begin(int64_t size, int64_t parts, int64_t i) { return size * i / parts; }

// How the blocks of a chunk of packed rows pass by the panels: all blocks by a slice of a group, then by its next slice,
// then by the next group.
struct Tiling {
  int rows;              // of a block, at most
  int at_once;           // panels in a call of the micro-kernel
  int64_t group;         // panels
  int64_t slice;         // steps
  int64_t chunk_bytes;   // larger chunks read the weight less often
  int64_t block_cycles;  // at least

  // The most rows of `steps` units in a chunk: two tall blocks at least, or a panel would be read for too little.
  int64_t chunk_rows(int64_t steps) const {
    const int64_t fit = chunk_bytes / (larger(steps, 1) * 4);
    return smaller(larger(fit, 2 * kMaxRows), kMostChunkRows) / rows * rows;
  }
};

// Tall blocks by whole panels: a group stays in L2, and the chunk is read once for each group, from L2 or L3. By slices of
// panels that would fill L2, those of xxlarge: each block would read them from L3.
inline Tiling tall_tiling(int64_t steps) {
  const int64_t panel_bytes = larger(steps, 1) * kPanel * 4;
  if (panel_bytes > kMostPanelBytes) return {kMaxRows, 1, 1, kLongSlice, kSlicedChunkBytes, kLeastBlockCycles};
  return {kMaxRows, 1, larger(kGroupBytes / panel_bytes, 1), larger(steps, 1), kChunkBytes, kLeastBlockCycles};
}

// Low blocks by two panels, where there are kernels for them: a slice stays in L1. Fewer bytes are read from L2, and of
// the chunk so few that it may lie in L3.
inline Tiling tiling_of(Unit unit, int64_t steps) {
#ifdef __AVX512F__
  if (unit == Unit::f32) return {kPairRows, 2, 2, kSliceSteps, kSlicedChunkBytes, 0};
#else
  static_cast<void>(unit);
#endif
  return tall_tiling(steps);
}

struct Grid {
  int rows, panels;  // tasks along each
};

// The cheapest grid of at most `threads` tasks, by a count of cycles for one step of the reduction: 2 per row and panel
// in the micro-kernel, 2 to bring a panel's line from L3 (more tasks along the rows read each panel more often),
// pack_cycles to pack a row (more tasks along the panels pack each row more often). Measured to be right: streaming
// panels is not hidden behind 16 to 64 rows.
inline Grid choose_grid(const Tiling& tiling, int threads, int64_t rows, int64_t panels, double pack_cycles) {
  Grid best{1, 1};
  double best_cost = 0;
  for (int along_rows = 1; along_rows <= threads; ++along_rows) {
    const int64_t along_panels = smaller(threads / along_rows, panels);
    if (along_rows > rows || along_panels < 1) break;
    const int64_t r = divide_up(rows, along_rows), blocks = divide_up(r, tiling.rows);
    // Cores that read the same panels, each several times, get no further in small blocks.
    const int64_t products = along_rows > 1 && blocks > 1 ? larger(2 * r, tiling.block_cycles * blocks) : 2 * r;
    const double cost = static_cast<double>(divide_up(panels, along_panels) * (products + 2)) +
                        pack_cycles * static_cast<double>(r);
    if (along_rows == 1 || cost < best_cost) {
      best = {along_rows, static_cast<int>(along_panels)};
      best_cost = cost;
    }
  }
  return best;
}

// The micro-kernels of these units by number of rows. vnni: the machine has it; u8s8x4 needs it.
struct KernelTable {
  MicroKernel of[kMaxRows + 1];
  PairKernel pairs[kMaxRows + 1];  // null where there is none
  KernelTable(Unit unit, RowLayout layout, bool vnni = false) {
    of[0] = nullptr, pairs[0] = nullptr;
    for (int rows = 1; rows <= kMaxRows; ++rows) {
#ifdef __AVX512F__
      of[rows] = unit == Unit::bf16x2           ? avx512_bf16::micro_kernel(unit, layout, rows)
                 : unit == Unit::u8s8x4 || vnni ? avx512_vnni::micro_kernel(unit, layout, rows)
                                                : avx512::micro_kernel(unit, layout, rows);
      pairs[rows] = unit == Unit::f32 && layout == RowLayout::lines ? avx512::pair_kernel(rows) : nullptr;
#else
      static_cast<void>(vnni);
      of[rows] = avx2::micro_kernel(unit, layout, rows);
      pairs[rows] = nullptr;
#endif
    }
  }
};

}  // namespace albert::ALBERT_ISA
