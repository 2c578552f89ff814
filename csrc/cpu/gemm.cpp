// y = epilogue(x . weight^T), by rectangles of y. A task packs a chunk of rows of x, and the weight's panels pass by:
// each is read from L3 once a chunk (Tiling says in which order). Compiled once per instruction set.
#include "gemm_epilogue.h"
#include "gemm_kernels.h"
#include "gemm_tiling.h"
#include "layer_norm.h"
#include "pack_rows.h"

namespace albert::ALBERT_ISA {
namespace {

struct Plan {
  const PackedWeight& weight;
  Tiling tiling;
  Grid grid;
  int64_t blocks, chunks;                 // of rows, in all
  int64_t rows;                           // in the largest chunk
  size_t packed, tiles, quantized, sums;  // bytes of a task's workspace for each
  size_t shared_sums;                     // LayerNorm over rows that several tasks share: one [m][n] for all
  int tasks() const { return grid.rows * grid.panels; }
  size_t task_bytes() const { return kCacheLine + packed + tiles + quantized + sums; }
  size_t bytes() const { return task_bytes() * tasks() + shared_sums; }
};

bool norm_in_scratch(const albert_gemm_args& args) { return args.ln_weight != nullptr && args.y_dtype == ALBERT_BF16; }

double pack_cycles(const PackedWeight& w) { return w.dtype == ALBERT_INT8 ? kQuantizeCycles : 0.5; }  // else copied

Plan make_plan(const albert_gemm_args& args, int threads) {
  const auto& w = *static_cast<const PackedWeight*>(args.weight);
  const Tiling tiling = tiling_of(w.unit, w.steps);
  Plan plan{w, tiling, choose_grid(tiling, threads, args.m, w.panels(), pack_cycles(w)), 0, 0, 0, 0, 0, 0, 0, 0};
  plan.blocks = larger(divide_up(args.m, tiling.rows), plan.grid.rows);
  // As many chunks for each task, where there are enough rows.
  const int64_t chunks = divide_up(plan.blocks, tiling.chunk_rows(w.steps) / tiling.rows);
  plan.chunks = smaller(divide_up(chunks, plan.grid.rows) * plan.grid.rows, plan.blocks);
  plan.rows = smaller(divide_up(plan.blocks, plan.chunks) * tiling.rows, args.m);
  plan.packed = static_cast<size_t>(plan.rows * w.steps * 4);
  plan.packed = round_up(plan.packed, kCacheLine);
  const int64_t rows = tiling.slice < w.steps ? plan.rows : tiling.rows;
  plan.tiles = static_cast<size_t>(rows * tiling.at_once * kPanel) * sizeof(float);
  if (w.dtype == ALBERT_INT8) plan.quantized = round_up(static_cast<size_t>(plan.rows * 8 + w.k), kCacheLine);
  if (norm_in_scratch(args))
    (plan.grid.panels == 1 ? plan.sums : plan.shared_sums) =
        round_up(static_cast<size_t>((plan.grid.panels == 1 ? plan.rows : args.m) * w.n) * sizeof(float), kCacheLine);
  return plan;
}

// A task's share of the workspace.
struct Scratch {
  int64_t* drawn;  // chunks of the task's own
  char* packed;
  float* tiles;  // of one block, or where the panels come in slices of all
  float* x_scale;
  int32_t* x_zero;
  uint8_t* buffer;
  float* sums;
  Scratch(const Plan& plan, char* base)
      : drawn(reinterpret_cast<int64_t*>(base)),
        packed(base + kCacheLine),
        tiles(reinterpret_cast<float*>(packed + plan.packed)),
        x_scale(reinterpret_cast<float*>(packed + plan.packed + plan.tiles)),
        x_zero(reinterpret_cast<int32_t*>(x_scale + plan.rows)),
        buffer(reinterpret_cast<uint8_t*>(x_zero + plan.rows)),
        sums(reinterpret_cast<float*>(packed + plan.packed + plan.tiles + plan.quantized)) {}
};

// What a task does at a time: a rectangle of y, its rows in blocks of nearly equal size.
struct Chunk {
  int64_t blocks, panel_begin, panel_end;
  Soon then;      // what is read after the last panel: the next product's first; its data may be null
  int64_t lines;  // that each block asks for in kLine steps of a panel
  int64_t rows[kMostBlocks + 1];

  Chunk(const Plan& plan, int64_t m, int64_t index, int64_t panels_from, int64_t panels_to, const Soon& next)
      : panel_begin(panels_from), panel_end(panels_to), then(next) {
    const int64_t block = part_begin(plan.blocks, plan.chunks, index);
    blocks = part_begin(plan.blocks, plan.chunks, index + 1) - block;
    for (int64_t b = 0; b <= blocks; ++b) rows[b] = part_begin(m, plan.blocks, block + b);
    lines = round_up(divide_up(kLine * kPanel * 4 / kCacheLine, blocks), 4);
  }
  int64_t first() const { return rows[0]; }
  int64_t end() const { return rows[blocks]; }
  int block_rows(int64_t b) const { return static_cast<int>(rows[b + 1] - rows[b]); }
};

template <class T>
struct Rows {
  T* data;
  int64_t stride, first;  // first: the row that data points to
  T* row(int64_t i) const { return data + (i - first) * stride; }
};

// Block [begin, begin + count) of a chunk whose first row is x's row `first`.
void pack(const albert_gemm_args& args, const PackedWeight& w, const Scratch& s, int64_t first, int64_t begin,
          int count) {
  const int64_t row = first + begin;
  char* out = s.packed + begin * w.steps * 4;
  const auto convert = [&](auto x) {
    x += row * args.x_stride;
    if (w.dtype == ALBERT_INT8)
      pack_quantized_block(w.unit, x, args.x_stride, count, w.k, out, s.buffer, s.x_scale + begin, s.x_zero + begin);
    else
      pack_block(w.unit, x, args.x_stride, count, w.k, out);
  };
  if (args.x_dtype == ALBERT_BF16) return convert(static_cast<const bf16*>(args.x));
  if (args.x_dtype == ALBERT_F32) return convert(static_cast<const float*>(args.x));
  for (int i = 0; i < count; ++i) {
    s.x_scale[begin + i] = args.x_scale[row + i];
    s.x_zero[begin + i] = args.x_zero[row + i];
    row_units(w.unit, static_cast<const uint8_t*>(args.x) + (row + i) * args.x_stride, w.k, out + i * 64, count * 64);
  }
}

// Steps [step, end) of a block of packed rows times a panel or two, added to their tiles. (Inline: one row's int8 tile takes
// 400 cycles.)
ALBERT_INLINE void multiply(const PackedWeight& w, const KernelTable& kernels, int rows, const char* x, int64_t panel,
                            int64_t panels, int64_t step, int64_t end, float* tiles, Soon soon) {
  const int64_t most = w.dtype == ALBERT_INT8 ? w.steps : steps_per_sum(w.steps);  // integers are exact
  do {  // once even if k == 0: the tiles must be zeroed
    const int64_t steps = smaller(most, end - step);
    const char *rows_at = x + step * rows * 4, *at = w.panel_data(panel) + step * kPanel * 4;
    if (panels == 2)
      kernels.pairs[rows](rows_at, at, w.steps * kPanel, steps, tiles, step > 0, soon);
    else
      kernels.of[rows](rows_at, at, steps, tiles, step > 0, soon);
    step += steps;
    soon.data += steps / kLine * soon.lines * kCacheLine;
  } while (step < end);
}

// Brings a tile's lines of y into cache while it is computed. Of int8 tiles alone, which end within a few thousand cycles:
// more stores than a core has room for would wait for their lines.
template <class T>
void ask_for(const T* y, int64_t stride, int rows) {
  for (int r = 0; r < rows; ++r)
    for (size_t i = 0; i < kPanel * sizeof(T); i += kCacheLine)
      _mm_prefetch(reinterpret_cast<const char*>(y + r * stride) + i, _MM_HINT_T0);
}

// A block's share of the next slice of this group, or of the first of the next group.
ALBERT_INLINE Soon share_of(const PackedWeight& w, const Tiling& tiling, const Chunk& chunk, int64_t panel, int64_t step,
                            int64_t b) {
  constexpr int64_t step_bytes = kPanel * 4;
  const int64_t next_step = step + tiling.slice, steps = smaller(next_step, w.steps) - step;
  const int64_t beyond = panel + tiling.group - chunk.panel_end;
  const char* data = w.panel_data(panel);
  int64_t apart = static_cast<int64_t>(w.panel_bytes());
  if (next_step < w.steps) {
    data += next_step * step_bytes;
  } else if (beyond < 0) {
    data += tiling.group * apart;
  } else {
    if (chunk.then.data == nullptr) return {};
    data = chunk.then.data + beyond * steps * step_bytes;
    apart = chunk.then.apart;
  }
  return {data + b * (steps / kLine) * chunk.lines * kCacheLine, static_cast<int>(chunk.lines), apart};
}

// What a task along the panels reads of a weight first.
Soon first_panels(const void* weight, int threads, int64_t m, int index) {
  if (weight == nullptr) return {};
  const auto& w = *static_cast<const PackedWeight*>(weight);
  const Grid grid = choose_grid(tiling_of(w.unit, w.steps), threads, m, w.panels(), pack_cycles(w));
  return {w.panel_data(part_begin(w.panels(), grid.panels, index % grid.panels)), 0, static_cast<int64_t>(w.panel_bytes())};
}

// A tile from its sums to t. What becomes of an int8 tile happens in registers alone, mostly.
template <class Y, class T>
void finish(const albert_gemm_args& args, const PackedWeight& w, const Scratch& s, float* tile, int rows, int64_t begin,
            int64_t row, int64_t column, const Rows<T>& t) {
  const int columns = static_cast<int>(smaller(kPanel, w.n - column));
  const float* bias = args.bias == nullptr ? nullptr : args.bias + column;
  T* out = t.row(row) + column;
  if (w.dtype == ALBERT_INT8) {
    const bool plain = args.pre_activation == nullptr && args.activation_input == nullptr;
    const auto dequantize_to = [&](auto put) __attribute__((always_inline)) {
      dequantize(tile, rows, s.x_scale + begin, s.x_zero + begin, w.scales() + column, w.column_sums() + column, bias,
                 columns, put);
    };
    const auto put = [&](int r, F a, F b) __attribute__((always_inline)) {
      T* y = out + r * t.stride;
      if (columns == kPanel) return store_pair(y, a, b);
      store_columns(y, a, columns);
      store_columns(y + kLanes, b, columns - kLanes);
    };
    if (plain && args.residual == nullptr && args.activation == ALBERT_NONE) return dequantize_to(put);
    if (plain && args.residual == nullptr && args.activation == ALBERT_GELU_TANH)
      return dequantize_to([&](int r, F a, F b) { put(r, gelu_tanh_short(a), gelu_tanh_short(b)); });
    if (plain && args.residual != nullptr && args.activation == ALBERT_NONE) {
      const Y* residual = static_cast<const Y*>(args.residual) + row * args.residual_stride + column;
      return dequantize_to([&](int r, F a, F b) {
        const Y* summand = residual + r * args.residual_stride;
        put(r, add(a, load_columns(summand, columns)), add(b, load_columns(summand + kLanes, columns - kLanes)));
      });
    }
    dequantize_to([&](int r, F a, F b) { store_pair(tile + r * kPanel, a, b); });
  } else if (bias != nullptr) {
    add_bias(tile, rows, bias, columns);
  }
  finish_tile<Y>(args, tile, rows, columns, row, column, out, t.stride);
}

// t gets everything up to LayerNorm. Y is y's format.
template <class Y, class T>
void run_chunk(const albert_gemm_args& args, const Plan& plan, const KernelTable& kernels, const Scratch& s,
               const Chunk& chunk, const Rows<T>& t) {
  const PackedWeight& w = plan.weight;
  const Tiling& tiling = plan.tiling;
  const bool sliced = tiling.slice < w.steps;
  for (int64_t g = chunk.panel_begin; g < chunk.panel_end; g += tiling.group) {
    const int64_t group_end = smaller(g + tiling.group, chunk.panel_end);
    for (int64_t step = 0; step == 0 || step < w.steps; step += tiling.slice)
      for (int64_t b = 0; b < chunk.blocks; ++b) {
        const int64_t row = chunk.rows[b], begin = row - chunk.first(), end = smaller(step + tiling.slice, w.steps);
        const int rows = chunk.block_rows(b);
        float* tiles = s.tiles + (sliced ? begin * tiling.at_once * kPanel : 0);
        if (g == chunk.panel_begin && step == 0) pack(args, w, s, chunk.first(), begin, rows);
        for (int64_t p = g; p < group_end; p += tiling.at_once) {
          const int64_t panels = smaller(tiling.at_once, group_end - p);
          if (w.dtype == ALBERT_INT8) ask_for(t.row(row) + p * kPanel, t.stride, rows);
          multiply(w, kernels, rows, s.packed + begin * w.steps * 4, p, panels, step, end, tiles,
                   share_of(w, tiling, chunk, p, step, b));
          if (end < w.steps) continue;
          for (int64_t i = 0; i < panels; ++i)
            finish<Y>(args, w, s, tiles + i * rows * kPanel, rows, begin, row, (p + i) * kPanel, t);
        }
      }
  }
}

template <class Y>
void normalize(const albert_gemm_args& args, int64_t n, int64_t begin, int64_t end, const Rows<float>& t) {
  const LayerNorm norm{args.ln_weight, args.ln_bias, args.ln_eps, args.ln_mean, args.ln_rstd};
  const Rows<Y> y{static_cast<Y*>(args.y), args.y_stride, 0};
  const Rows<Y> copy{static_cast<Y*>(args.pre_norm), args.pre_norm_stride, 0};
  const bool copied = args.pre_norm == nullptr || args.pre_norm == t.data;
  for (int64_t i = begin; i < end; ++i) layer_norm_row(norm, t.row(i), y.row(i), copied ? nullptr : copy.row(i), i, n);
}

template <class Y>
void run(const albert_gemm_args& args, const Plan& plan, char* workspace, const albert_parallel* parallel) {
  const PackedWeight& w = plan.weight;
  const Grid grid = plan.grid;
  const int tasks = plan.tasks();
  const bool norm = args.ln_weight != nullptr, whole_rows = grid.panels == 1;
  const KernelTable kernels(w.unit, RowLayout::lines);
  float* shared = reinterpret_cast<float*>(workspace + plan.task_bytes() * tasks);
  // What LayerNorm reads: float32 scratch, or where y's format is float32, pre_norm or y itself.
  const auto before_norm = [&](float* own, int64_t first) -> Rows<float> {
    if (norm_in_scratch(args)) return whole_rows ? Rows<float>{own, w.n, first} : Rows<float>{shared, w.n, 0};
    if (args.pre_norm != nullptr) return {static_cast<float*>(args.pre_norm), args.pre_norm_stride, 0};
    return {static_cast<float*>(args.y), args.y_stride, 0};
  };

  const auto scratch_of = [&](int index) { return Scratch(plan, workspace + plan.task_bytes() * index); };
  // Each task has chunks of its own, whose rows its core has in cache from the last product. Who is done with those
  // takes what a slower one has not begun.
  for (int i = 0; i < tasks; ++i) *scratch_of(i).drawn = part_begin(plan.chunks, grid.rows, i / grid.panels);
  auto task = [&](int index) {
    const Scratch s = scratch_of(index);
    // After a chunk that is not a task's only one the same panels come again.
    const bool only = plan.chunks <= grid.rows;
    const Soon then = only ? first_panels(args.next_weight, thread_count(parallel), args.m, index) : Soon{};
    for (int turn = 0; turn < tasks;) {
      const int owner = (index + turn) % tasks, i = owner / grid.panels, j = owner % grid.panels;
      const int64_t c = __atomic_fetch_add(scratch_of(owner).drawn, 1, __ATOMIC_RELAXED);
      if (c >= part_begin(plan.chunks, grid.rows, i + 1)) {
        ++turn;
        continue;
      }
      const Chunk chunk(plan, args.m, c, part_begin(w.panels(), grid.panels, j), part_begin(w.panels(), grid.panels, j + 1),
                        then);
      if (norm) {
        const Rows<float> t = before_norm(s.sums, chunk.first());
        run_chunk<Y>(args, plan, kernels, s, chunk, t);
        if (whole_rows) normalize<Y>(args, w.n, chunk.first(), chunk.end(), t);  // while they are in cache
      } else {
        run_chunk<Y>(args, plan, kernels, s, chunk, Rows<Y>{static_cast<Y*>(args.y), args.y_stride, 0});
      }
    }
  };
  parallel_tasks(parallel, tasks, task);

  if (!norm || whole_rows) return;
  auto norm_task = [&](int i) {
    normalize<Y>(args, w.n, part_begin(args.m, tasks, i), part_begin(args.m, tasks, i + 1), before_norm(nullptr, 0));
  };
  parallel_tasks(parallel, tasks, norm_task);
}

}  // namespace

size_t gemm_workspace_bytes(const albert_gemm_args& args, int threads) { return make_plan(args, threads).bytes(); }

void gemm(const albert_gemm_args& args, char* workspace, const albert_parallel* parallel) {
  const Plan plan = make_plan(args, thread_count(parallel));
  if (args.y_dtype == ALBERT_BF16)
    run<bf16>(args, plan, workspace, parallel);
  else
    run<float>(args, plan, workspace, parallel);
}

}  // namespace albert::ALBERT_ISA
