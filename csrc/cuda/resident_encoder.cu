// The encoder in one kernel. A pass is
//
//   query, key, value | attention | dense + residual | ffn, gelu | ffn_output + residual
//
// with a barrier of the whole grid at each |, and at the first one of a cluster where there are clusters. LayerNorm has no
// step of its own: who reads a row computes its mean and rstd on the way, from the row that it needs in any case.
#include "resident_attention.h"
#include "resident_product.h"

namespace albert {

template <class T, class P>
struct Encoder {
  const Arguments<T, P>& args;
  const Layout& layout;
  Block<T, P> block;

  ALBERT_DEVICE explicit Encoder(const Arguments<T, P>& a) : args(a), layout(a.layout), block(a) {}

  // ---- once ----
  // Row `row` of a matrix [out][in], of query, key and value one after the other for kQkv.
  ALBERT_DEVICE const P* weight_row(int matrix, int row) const {
    const P* w;
    switch (matrix) {
      case kQkv:
        w = row < layout.hidden ? args.parameters[kQuery]
                                : row < 2 * layout.hidden ? args.parameters[kKey] : args.parameters[kValue];
        row %= layout.hidden;
        break;
      case kDense: w = args.parameters[kDenseWeight]; break;
      case kFfn: w = args.parameters[kFfnWeight]; break;
      default: w = args.parameters[kFfnOutputWeight];
    }
    return w + static_cast<long>(row) * layout.inputs(matrix);
  }

  // Eight elements that lie one after the other, into shared memory as T.
  ALBERT_DEVICE static void bring(char* to, const T* from) { copy_async(to, from); }
  template <class Q>
  ALBERT_DEVICE static void bring(char* to, const Q* from) {
    float x[8];
    load_parameters(from, x);
    Eight y;
#pragma unroll
    for (int i = 0; i < 4; ++i) y.pair[i] = pack_pair<T>(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<Eight*>(to) = y;
  }

  ALBERT_DEVICE void load_weights() {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      const Share share{layout, matrix, block.index};
      const int begin = share.chunk_begin(), chunks = share.chunk_end() - begin;
      for (int u = 0; u < layout.units[matrix]; ++u) {
        const int unit = share.unit(u);
        if (unit < 0) continue;
        // Consecutive threads take what lies together in a row: 4 of them a chunk.
        for (int i = block.thread; i < kUnit * chunks * 4; i += kThreads) {
          const int column = i / (chunks * 4), chunk = i / 4 % chunks, quad = i % 4;
          char* to = block.shared + layout.offset[matrix] + (u * chunks + chunk) * kChunkBytes +
                     (column * 4 + quad) * static_cast<int>(sizeof(Eight));
          bring(to, weight_row(matrix, unit * kUnit + column) + (begin + chunk) * kChunk + quad * 8);
        }
      }
    }
    wait_copies();
  }

  // Of every row its sequence, none beyond the last; offsets that are no offsets are brought into the tokens' range.
  ALBERT_DEVICE void find_sequences() {
    const auto offset = [&](int i) {
      const int x = args.cu_seqlens[i];
      return x < 0 ? 0 : x > args.tokens ? args.tokens : x;
    };
    for (int r = block.thread; r < args.tokens; r += kThreads) {
      Sequence s{0, 0};
      for (int i = 0; i < args.batch; ++i)
        if (offset(i) <= r && r < offset(i + 1)) s = {static_cast<uint8_t>(offset(i)), static_cast<uint8_t>(offset(i + 1))};
      block.sequences()[r] = s;
    }
  }

  // ---- each pass ----
  ALBERT_DEVICE float parameter(int which, int i) const { return to_float(args.parameters[which][i]); }

  ALBERT_DEVICE float activate(float x) const {
    switch (args.activation) {
      case ALBERT_CUDA_GELU_TANH:
        return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
      case ALBERT_CUDA_GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
      default: return x < 0.0f ? 0.0f : x;
    }
  }

  // Two elements of a row through LayerNorm, whose statistics the product before has left.
  ALBERT_DEVICE void normalized(const T* x, int r, int column, int norm, float& a, float& b) const {
    load_pair(x + static_cast<long>(r) * layout.hidden + column, a, b);
    const Statistics s = block.statistics()[r];
    a = (a - s.mean) * s.rstd * parameter(norm, column) + parameter(norm + 1, column);
    b = (b - s.mean) * s.rstd * parameter(norm, column + 1) + parameter(norm + 1, column + 1);
  }

  ALBERT_DEVICE Rows<T, P> input(int matrix, bool first) const {
    const auto through = [&](const T* data, int norm) {
      return Rows<T, P>{data, layout.hidden, args.parameters[norm], args.parameters[norm + 1]};
    };
    switch (matrix) {
      case kQkv:
        if (first) return {args.hidden, layout.hidden, nullptr, nullptr};
        return through(args.summed, kNorm);
      case kDense: return {args.context, layout.hidden, nullptr, nullptr};
      case kFfn: return through(args.attended, kAttentionNorm);
      default: return {args.inner, layout.inner, nullptr, nullptr};
    }
  }

  // Where two elements of a product go: row r, columns `column` and the next. r may lie beyond the tokens.
  ALBERT_DEVICE void finish(int matrix, bool first, int r, int column, float a, float b) const {
    const int hidden = layout.hidden;
    if (r >= args.tokens) return;
    const auto add_bias = [&](int which, int i) {
      a += parameter(which + 1, i);
      b += parameter(which + 1, i + 1);
    };
    const long row = r;
    float x, y;
    switch (matrix) {
      case kQkv:
        add_bias(column < hidden ? kQuery : column < 2 * hidden ? kKey : kValue, column % hidden);
        if (column < 2 * hidden) {
          store_pair(args.query_key + row * 2 * hidden + column, a, b);
        } else {
          T* to = args.value + static_cast<long>(column % hidden) * args.value_stride() + row;
          from_float(a, to[0]);
          from_float(b, to[args.value_stride()]);
        }
        break;
      case kDense:
        add_bias(kDenseWeight, column);
        if (first)
          load_pair(args.hidden + row * hidden + column, x, y);
        else
          normalized(args.summed, r, column, kNorm, x, y);
        store_pair(args.attended + row * hidden + column, x + a, y + b);
        break;
      case kFfn:
        add_bias(kFfnWeight, column);
        store_pair(args.inner + row * layout.inner + column, activate(a), activate(b));
        break;
      default:
        add_bias(kFfnOutputWeight, column);
        normalized(args.attended, r, column, kAttentionNorm, x, y);
        store_pair(args.summed + row * hidden + column, x + a, y + b);
    }
  }

  // The second LayerNorm for who called: a row a warp.
  ALBERT_DEVICE void write_output(T* output) {
    const int hidden = layout.hidden;
    for (int r = block.index * kWarps + block.warp; r < args.tokens; r += layout.blocks * kWarps) {
      const T* x = args.summed + static_cast<long>(r) * hidden;
      float sum = 0, squares = 0, a, b;
      for (int column = 2 * block.lane; column < hidden; column += 2 * kWarp) {
        load_pair(x + column, a, b);
        sum += a + b;
      }
      for (int mask = 1; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
      const float mean = sum / static_cast<float>(hidden);
      for (int column = 2 * block.lane; column < hidden; column += 2 * kWarp) {
        load_pair(x + column, a, b);
        squares += (a - mean) * (a - mean) + (b - mean) * (b - mean);
      }
      for (int mask = 1; mask < kWarp; mask *= 2) squares += shuffle_xor(squares, mask);
      const float rstd = 1.0f / sqrtf(squares / static_cast<float>(hidden) + args.eps);
      for (int column = 2 * block.lane; column < hidden; column += 2 * kWarp) {
        load_pair(x + column, a, b);
        store_pair(output + static_cast<long>(r) * hidden + column,
                   (a - mean) * rstd * parameter(kNorm, column) + parameter(kNorm + 1, column),
                   (b - mean) * rstd * parameter(kNorm, column + 1) + parameter(kNorm + 1, column + 1));
      }
    }
  }

  ALBERT_DEVICE void run() {
    load_weights();
    find_sequences();
    sync_block();
    for (int pass = 0; pass < args.passes; ++pass) {
      const bool first = pass == 0;
#pragma unroll 1  // one product's code for all four
      for (int matrix = 0; matrix < kMatrices; ++matrix) {
        Product<T, P>(block, matrix, input(matrix, first)).run([&](int r, int column, float a, float b) {
          finish(matrix, first, r, column, a, b);
        });
        if (matrix == kQkv && layout.cluster > 1)
          sync_cluster();
        else
          block.sync_grid();
        if (matrix == kQkv) {
          Attention<T, P>(block).run();
          block.sync_grid();
        }
      }
      if (args.return_all || pass == args.passes - 1)
        write_output(args.output + (args.return_all ? static_cast<long>(pass) * args.tokens * layout.hidden : 0));
    }
  }
};

template <class T, class P>
ALBERT_KERNEL void resident_encoder(ALBERT_ARGUMENT Arguments<T, P> args) {
  Encoder<T, P>(args).run();
}

}  // namespace albert

#include "resident_launch.h"
