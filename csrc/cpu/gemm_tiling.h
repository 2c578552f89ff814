// How a product is cut up: among threads, into chunks of rows that stay in L2, into blocks of a tile's rows.
// Compiled once per instruction set.
#pragma once
#include <cstdint>

#include "gemm_micro.h"

namespace albert::ALBERT_ISA {

// A group of panels stays in L2 while the blocks of a chunk pass by. A chunk of packed rows is read once for each group,
// from L2 or L3; larger chunks read the weight less often. Cores with AVX-512 have 1 to 2 MB of L2, those without it
// 256 to 512 KB. Cycles are what choose_grid counts with: of a step for a row that is quantized, and for a block at least.
#ifdef __AVX512F__
constexpr int64_t kGroupBytes = 256 << 10, kChunkBytes = 1024 << 10;
constexpr double kQuantizeCycles = 3.5;
constexpr int64_t kLeastBlockCycles = 24;
#else
constexpr int64_t kGroupBytes = 64 << 10, kChunkBytes = 128 << 10;
constexpr double kQuantizeCycles = 2;
constexpr int64_t kLeastBlockCycles = 0;
#endif
constexpr int64_t kMostChunkRows = 32 * kMaxRows;
// Float32 sums are closed after so many steps and added up: one sum over K = 3072 has five times the error. Where few
// are added up each must be short: MKL's sums over K = 128 of a few rows have half the error of one sum.
constexpr int64_t kStepsPerSum = 128, kStepsPerShortSum = 32;
constexpr int64_t steps_per_sum(int64_t steps) { return steps <= 512 ? kStepsPerShortSum : kStepsPerSum; }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// Where part i of `parts` nearly equal ones begins.
constexpr int64_t part_begin(int64_t size, int64_t parts, int64_t i) { return size * i / parts; }

struct Grid {
  int rows, panels;  // tasks along each
};

// The cheapest grid of at most `threads` tasks, by a count of cycles for one step of the reduction: 2 per row and panel
// in the micro-kernel, 2 to bring a panel's line from L3 (more tasks along the rows read each panel more often),
// pack_cycles to pack a row (more tasks along the panels pack each row more often). Measured to be right: streaming
// panels is not hidden behind 16 to 64 rows.
inline Grid choose_grid(int threads, int64_t rows, int64_t panels, double pack_cycles) {
  Grid best{1, 1};
  double best_cost = 0;
  for (int along_rows = 1; along_rows <= threads; ++along_rows) {
    const int64_t along_panels = smaller(threads / along_rows, panels);
    if (along_rows > rows || along_panels < 1) break;
    const int64_t r = divide_up(rows, along_rows), blocks = divide_up(r, kMaxRows);
    // Cores that read the same panels, each several times, get no further in small blocks.
    const int64_t products = along_rows > 1 && blocks > 1 ? larger(2 * r, kLeastBlockCycles * blocks) : 2 * r;
    const double cost = static_cast<double>(divide_up(panels, along_panels) * (products + 2)) +
                        pack_cycles * static_cast<double>(r);
    if (along_rows == 1 || cost < best_cost) {
      best = {along_rows, static_cast<int>(along_panels)};
      best_cost = cost;
    }
  }
  return best;
}

// The most rows of `steps` units that a chunk may have: at least two blocks, or a panel would be read for too little.
inline int64_t chunk_rows(int64_t steps) {
  const int64_t fit = kChunkBytes / (larger(steps, 1) * 4) / kMaxRows * kMaxRows;
  return smaller(larger(fit, 2 * kMaxRows), kMostChunkRows);
}

// Panels of `steps` units in a group.
inline int64_t panel_group(int64_t steps) { return larger(kGroupBytes / (larger(steps, 1) * kPanel * 4), 1); }

// The micro-kernels of these units by number of rows. vnni: the machine has it; u8s8x4 needs it.
struct KernelTable {
  MicroKernel of[kMaxRows + 1];
  KernelTable(Unit unit, RowLayout layout, bool vnni = false) {
    of[0] = nullptr;
    for (int rows = 1; rows <= kMaxRows; ++rows) {
#ifdef __AVX512F__
      of[rows] = unit == Unit::bf16x2           ? avx512_bf16::micro_kernel(unit, layout, rows)
                 : unit == Unit::u8s8x4 || vnni ? avx512_vnni::micro_kernel(unit, layout, rows)
                                                : avx512::micro_kernel(unit, layout, rows);
#else
      static_cast<void>(vnni);
      of[rows] = avx2::micro_kernel(unit, layout, rows);
#endif
    }
  }
};

}  // namespace albert::ALBERT_ISA
