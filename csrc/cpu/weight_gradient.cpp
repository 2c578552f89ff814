// gradient[n][k] += grad_output^T . x, the reduction over tokens, which go by in runs: pack a run of both operands,
// then add each tile of their product to the gradient. A tile belongs to one task, so nothing is summed across threads.
// Compiled once per instruction set.
#include "gemm_kernels.h"
#include "gemm_tiling.h"
#include "pack_columns.h"

namespace albert::ALBERT_ISA {
namespace {

constexpr int64_t kRun = 512;  // steps: the packed operands of a run (8 MB for 3072 + 768 columns) stay in L3

struct Shape {
  Unit unit;
  int64_t runs, steps;         // steps: in the longest run
  int64_t row_blocks, panels;  // of n in kMaxRows, of k in kPanel
  size_t rows_bytes, panels_bytes, sums_bytes;
};

Shape shape_of(const WeightGradient& a) {
  Shape s{};
  s.unit = a.dtype == ALBERT_BF16 && a.bf16_dot ? Unit::bf16x2 : Unit::f32;
  const int64_t steps = divide_up(a.m, elements_per_unit(s.unit));
  s.runs = larger(divide_up(steps, kRun), 1);
  s.steps = divide_up(divide_up(steps, s.runs), kLine) * kLine;
  s.row_blocks = divide_up(a.n, kMaxRows);
  s.panels = divide_up(a.k, kPanel);
  s.rows_bytes = round_up(static_cast<size_t>(a.n * s.steps * 4), kCacheLine);
  s.panels_bytes = static_cast<size_t>(s.panels * kPanel * s.steps * 4);
  s.sums_bytes = round_up(static_cast<size_t>(a.n) * sizeof(float), kCacheLine);
  return s;
}

// One run. rows and panels are its packed operands: blocks of kMaxRows or fewer columns of grad_output, panels of x.
template <class T>
struct Run {
  const WeightGradient& a;
  const Shape& shape;
  TokenRows<T> grad_output, x;
  int64_t steps;
  float *rows, *panels, *sums;

  int64_t block_begin(int64_t b) const { return part_begin(a.n, shape.row_blocks, b); }
  int block_rows(int64_t b) const { return static_cast<int>(block_begin(b + 1) - block_begin(b)); }
  int panel_columns(int64_t p) const { return static_cast<int>(smaller(kPanel, a.k - p * kPanel)); }

  // A few tokens of all blocks at a time: reads go along the rows. The bias gradient is summed on three levels (a few
  // tokens, a run, all), which keeps its error near that of a pairwise sum.
  void pack_rows(int64_t begin, int64_t end) const {
    for (int64_t step = 0; step < steps; step += kLine)
      for (int64_t b = begin; b < end; ++b) {
        const int64_t first = block_begin(b);
        const int count = block_rows(b);
        F part;
        pack_steps<1>(grad_output, step, first, count, count, rows + first * steps + step * count, &part);
        if (step > 0) part = add(part, load(sums + first, count));
        store(sums + first, part, count);
      }
    if (a.bias_gradient == nullptr || steps == 0) return;
    for (int64_t i = block_begin(begin); i < block_begin(end); ++i) a.bias_gradient[i] += sums[i];
  }

  void pack_panels(int64_t begin, int64_t end) const {
    for (int64_t step = 0; step < steps; step += kLine)
      for (int64_t p = begin; p < end; ++p)
        pack_steps<kPanel / kLanes>(x, step, p * kPanel, panel_columns(p), kPanel, panels + (p * steps + step) * kPanel,
                                    nullptr);
  }

  void add_tile(const float* tile, int64_t b, int64_t p) const {
    float* out = a.gradient + block_begin(b) * a.gradient_stride + p * kPanel;
    const int columns = panel_columns(p);
    for (int r = 0; r < block_rows(b); ++r, out += a.gradient_stride, tile += kPanel)
      for (int c = 0; c < columns; c += kLanes) {
        if (columns - c >= kLanes)
          store(out + c, add(load(out + c), load(tile + c)));
        else
          store(out + c, add(load(out + c, columns - c), load(tile + c)), columns - c);
      }
  }

  // Blocks of grad_output by panels of x, in the order of gemm.cpp: a group of panels stays in L2.
  void multiply(const KernelTable& kernels, int64_t block_from, int64_t block_to, int64_t panel_from,
                int64_t panel_to) const {
    alignas(64) float tile[kMaxRows * kPanel];
    const int64_t group = tall_tiling(steps).group;
    for (int64_t g = panel_from; g < panel_to; g += group)
      for (int64_t b = block_from; b < block_to; ++b)
        for (int64_t p = g; p < smaller(g + group, panel_to); ++p) {
          const float* out = a.gradient + block_begin(b) * a.gradient_stride + p * kPanel;
          for (int r = 0; r < block_rows(b); ++r, out += a.gradient_stride)
            for (int c = 0; c < panel_columns(p); c += 16) __builtin_prefetch(out + c, 1);
          kernels.of[block_rows(b)](rows + block_begin(b) * steps, panels + p * kPanel * steps, steps, tile, false, {});
          add_tile(tile, b, p);
        }
  }
};

template <class T>
void run_all(const WeightGradient& a, char* workspace, const albert_parallel* parallel) {
  const Shape s = shape_of(a);
  const KernelTable kernels(s.unit, RowLayout::steps);
  const Grid grid = choose_grid(tall_tiling(s.steps), thread_count(parallel), a.n, s.panels, 0.5);
  const int tasks = grid.rows * grid.panels, per_step = elements_per_unit(s.unit);
  const auto part = [](int64_t size, int parts, int i) { return part_begin(size, parts, i); };

  const int64_t all_steps = divide_up(a.m, per_step);
  for (int64_t i = 0; i < s.runs; ++i) {
    const int64_t begin = part_begin(all_steps, s.runs, i), end = part_begin(all_steps, s.runs, i + 1);
    const int64_t token = begin * per_step, tokens = smaller(end * per_step, a.m) - token;
    const Run<T> run{a,
                     s,
                     {static_cast<const T*>(a.grad_output) + token * a.grad_output_stride, a.grad_output_stride, tokens,
                      per_step},
                     {static_cast<const T*>(a.x) + token * a.x_stride, a.x_stride, tokens, per_step},
                     divide_up(end - begin, kLine) * kLine,
                     reinterpret_cast<float*>(workspace),
                     reinterpret_cast<float*>(workspace + s.rows_bytes),
                     reinterpret_cast<float*>(workspace + s.rows_bytes + s.panels_bytes)};
    auto pack = [&](int t) {
      run.pack_rows(part(s.row_blocks, tasks, t), part(s.row_blocks, tasks, t + 1));
      run.pack_panels(part(s.panels, tasks, t), part(s.panels, tasks, t + 1));
    };
    parallel_tasks(parallel, tasks, pack);
    auto multiply = [&](int t) {
      const int r = t / grid.panels, p = t % grid.panels;
      run.multiply(kernels, part(s.row_blocks, grid.rows, r), part(s.row_blocks, grid.rows, r + 1),
                   part(s.panels, grid.panels, p), part(s.panels, grid.panels, p + 1));
    };
    parallel_tasks(parallel, tasks, multiply);
  }
}

}  // namespace

size_t weight_gradient_workspace_bytes(const WeightGradient& args) {
  const Shape s = shape_of(args);
  return s.rows_bytes + s.panels_bytes + s.sums_bytes;
}

void weight_gradient(const WeightGradient& args, char* workspace, const albert_parallel* parallel) {
  if (args.dtype == ALBERT_BF16)
    run_all<bf16>(args, workspace, parallel);
  else
    run_all<float>(args, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
