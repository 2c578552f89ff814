// The micro-kernels: one tile of at most kMaxRows rows by kPanel columns, its sums held in registers.
//
// All number formats share one shape, because every dot instruction takes 4 bytes a lane: a *unit* is 4 bytes along
// the reduction (1 float32, 2 bfloat16 or int16, 4 int8), and a *step* multiplies one unit of each row with one unit
// of each column. The columns' operand (a weight's panel) lies as [step][kPanel] units. The rows' operand comes in
// two layouts, each of which its source can be copied into without a transposition:
//   lines  [steps/16][row][16 units]: from a matrix that is contiguous along the reduction (activations, forward);
//          one cache line a row, and no two rows compete for a cache set whatever the source's row stride is
//   steps  [step][row]: from one that is contiguous along the rows (both operands of a weight gradient)
// The number of steps is always a multiple of kLine; whoever packs fills up with zeros.
#pragma once
#include <cstdint>

namespace albert {

constexpr int kLine = 16;  // units in a cache line

enum class Unit : int { f32 = 0, bf16x2 = 1, s16x2 = 2, u8s8x4 = 3 };
enum class RowLayout : int { lines, steps };

// What a kernel asks L2 for beside its own work: `lines` cache lines every kLine steps. A weight that streams from L3
// comes at 10 bytes a cycle and core, which few rows' products outrun. Of two panels as many of each, `apart` bytes on.
struct Soon {
  const char* data = nullptr;
  int lines = 0;
  int64_t apart = 0;
};

// tile[row][kPanel] (float32, or int32 for integer units) = rows . columns, or += with accumulate.
using MicroKernel = void (*)(const void* rows, const void* panel, long steps, void* tile, bool accumulate, const Soon& soon);

// The tiles of two panels at once: the second panel lies `apart` units behind the first, its tile rows * kPanel numbers.
// Low and wide, they take fewer instructions for the same sums. The panels have to be in L1.
using PairKernel = void (*)(const void* rows, const void* panel, long apart, long steps, void* tiles, bool accumulate,
                            const Soon& soon);

// Of u8s8x4 in lines: tile[row][kPanel] = (rows . columns) scales + offsets, both of the columns, and the larger of that
// and what was there to largest[row][lane]. A product of few steps would wait for its sums to be written and read again.
using ScoreKernel = void (*)(const void* rows, const void* panel, long steps, const float* scales,
                             const float* offsets, float* tile, float* largest);

// The kernel for so many rows; null where this instruction set has none for these units.
namespace avx2 {
constexpr int kPanel = 16, kMaxRows = 6;
MicroKernel micro_kernel(Unit unit, RowLayout layout, int rows);
}  // namespace avx2
namespace avx512 {
constexpr int kPanel = 32, kMaxRows = 14, kPairRows = 6;
[[gnu::weak]] MicroKernel micro_kernel(Unit unit, RowLayout layout, int rows);
PairKernel pair_kernel(int rows);  // of f32 in lines
}  // namespace avx512
namespace avx512_vnni {
constexpr int kPanel = 32, kMaxRows = 14;
MicroKernel micro_kernel(Unit unit, RowLayout layout, int rows);
ScoreKernel score_kernel(int rows);
}  // namespace avx512_vnni
namespace avx512_bf16 {
constexpr int kPanel = 32, kMaxRows = 14;
MicroKernel micro_kernel(Unit unit, RowLayout layout, int rows);
}  // namespace avx512_bf16

}  // namespace albert
