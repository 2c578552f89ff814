/* Where a call's time goes: the steps that a thread takes, when it asks for them. C linkage.
 *
 * albert_trace_begin lends memory to the calling thread; until albert_trace_end, each function of gemm.h (but packing
 * and quantizing), attention.h, token_ops.h and masked_lm_loss.h that this thread calls, itself or through encoder.h,
 * leaves a span there. A function that is spread over the caller's threads is one span: from its begin to its end.
 * The recorder is the thread's own: any number of threads may have one each, and what others do is not seen.
 * Without one, a function looks at a single pointer of its thread. Results are the same either way.
 */
#pragma once
#include "gemm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What was done, and what m, n and k then are. */
enum {
  ALBERT_SPAN_PRODUCT = 0,            /* [m][k] x [n][k]^T, its epilogue included */
  ALBERT_SPAN_WEIGHT_GRADIENT = 1,    /* [n][k], over m tokens */
  ALBERT_SPAN_ATTENTION = 2,          /* m queries, n heads of k */
  ALBERT_SPAN_ATTENTION_BACKWARD = 3,
  ALBERT_SPAN_LAYER_NORM = 4, /* [m][n], dropout and residual included; k is 0 here and below */
  ALBERT_SPAN_LAYER_NORM_BACKWARD = 5,
  ALBERT_SPAN_ACTIVATION = 6,
  ALBERT_SPAN_ACTIVATION_BACKWARD = 7,
  ALBERT_SPAN_EMBEDDINGS = 8,
  ALBERT_SPAN_EMBEDDINGS_BACKWARD = 9,
  ALBERT_SPAN_MASKED_LM_LOSS = 10, /* m tokens, labelled or not, n words, k is their size */
  ALBERT_SPAN_MASKED_LM_LOSS_BACKWARD = 11
};

/* Its name in words, such as "weight gradient"; null beyond the last. */
const char* albert_span_name(int64_t kind);

typedef struct albert_span {
  int64_t kind;
  int64_t pass;       /* of the encoder; -1 outside of it */
  int64_t begin, end; /* nanoseconds of CLOCK_MONOTONIC */
  int64_t m, n, k;
  /* That the matrix products of the result need, a multiply and an add being two; 0 where there are none. Backward of
   * attention and loss needs twice what forward does: what it makes again does not count. */
  int64_t operations;
} albert_span;

/* ALBERT_BAD_ARGUMENT where spans is null, or the thread has a recorder. */
int albert_trace_begin(albert_span* spans, int64_t capacity);
/* The steps since then, 0 without a recorder. More than the capacity: only the first ones were written. */
int64_t albert_trace_end(void);

#ifdef __cplusplus
}

namespace albert {

// The calling thread's next span, begun; null where none is wanted, or there is no room.
albert_span* begin_span(int64_t kind, int64_t m, int64_t n, int64_t k);
void end_span(albert_span* span);
void trace_pass(int64_t pass);

// A step, until the end of the scope.
class Step {
 public:
  Step(int64_t kind, int64_t m, int64_t n, int64_t k = 0) : span_(begin_span(kind, m, n, k)) {}
  ~Step() {
    if (span_ != nullptr) end_span(span_);
  }
  Step(const Step&) = delete;
  Step& operator=(const Step&) = delete;
  // Called where somebody wants to know.
  template <class Operations>
  void count(Operations operations) {
    if (span_ != nullptr) span_->operations = operations();
  }

 private:
  albert_span* const span_;
};

// The pass that steps belong to, until the end of the scope.
class PassOfSteps {
 public:
  explicit PassOfSteps(int64_t pass) { trace_pass(pass); }
  ~PassOfSteps() { trace_pass(-1); }
  PassOfSteps(const PassOfSteps&) = delete;
  PassOfSteps& operator=(const PassOfSteps&) = delete;
};

}  // namespace albert
#endif
