// The recorder of each thread.
#include "trace.h"

#include <time.h>

namespace albert {
namespace {

struct Recorder {
  albert_span* spans;  // null: off
  int64_t capacity, count, pass;
};
thread_local Recorder recorder{nullptr, 0, 0, -1};

constexpr const char* kNames[] = {"product",       "weight gradient",     "attention",  "attention backward",
                                  "LayerNorm",     "LayerNorm backward",  "activation", "activation backward",
                                  "embeddings",    "embeddings backward", "loss",       "loss backward"};
static_assert(sizeof kNames / sizeof *kNames == ALBERT_SPAN_MASKED_LM_LOSS_BACKWARD + 1, "a name for each kind");

int64_t now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * int64_t{1000000000} + t.tv_nsec;
}

}  // namespace

albert_span* begin_span(int64_t kind, int64_t m, int64_t n, int64_t k) {
  Recorder& r = recorder;
  if (r.spans == nullptr || r.count++ >= r.capacity) return nullptr;
  albert_span* span = r.spans + r.count - 1;
  *span = {kind, r.pass, now(), 0, m, n, k, 0};
  return span;
}

void end_span(albert_span* span) { span->end = now(); }

void trace_pass(int64_t pass) { recorder.pass = pass; }

}  // namespace albert

using namespace albert;

const char* albert_span_name(int64_t kind) {
  return kind < 0 || kind > ALBERT_SPAN_MASKED_LM_LOSS_BACKWARD ? nullptr : kNames[kind];
}

int albert_trace_begin(albert_span* spans, int64_t capacity) {
  if (spans == nullptr || capacity < 0 || recorder.spans != nullptr) return ALBERT_BAD_ARGUMENT;
  recorder = {spans, capacity, 0, -1};
  return 0;
}

int64_t albert_trace_end(void) {
  const int64_t count = recorder.count;
  recorder = {nullptr, 0, 0, -1};
  return count;
}
