// A task's memory in attention's backward pass. Compiled once per instruction set.
#pragma once
#include "attention_gradient_tile.h"

namespace albert::ALBERT_ISA {

constexpr int64_t kGradientRun = 128 / kPanel;  // panels of keys in one product for the gradient of the queries

struct BackwardScratch {
  float *keys, *values, *key_features, *grad_keys, *grad_values, *staging;  // of the part
  float *queries, *grad_outputs, *query_features, *grad_output_features;    // of a group
  float *scores, *grad_probabilities, *probabilities_out, *grad_scores_out, *lines, *grad_queries;
  float *shift, *rest, *delta;
  size_t bytes;
  BackwardScratch(const HeadShape& s, int64_t panels, char* base) {
    Arena arena{base};
    keys = arena.take(panels * kPanel * s.d_steps);
    values = arena.take(panels * kPanel * s.d_steps);
    key_features = arena.take(panels * s.steps_per_panel() * s.d_panels * kPanel);
    grad_keys = arena.take(panels * kPanel * s.d_rows());
    grad_values = arena.take(panels * kPanel * s.d_rows());
    staging = arena.take(kPanel * s.d_steps);
    queries = arena.take(kGroup * s.d_steps);
    grad_outputs = arena.take(kGroup * s.d_steps);
    query_features = arena.take(kGroup * s.d);
    grad_output_features = arena.take(kGroup * s.d);
    scores = arena.take(kGroup * kPanel);
    grad_probabilities = arena.take(kGroup * kPanel);
    probabilities_out = s.unit == Unit::f32 ? scores : arena.take(kGroup / 2 * kPanel);
    grad_scores_out = s.unit == Unit::f32 ? grad_probabilities : arena.take(kGroup / 2 * kPanel);
    lines = arena.take((kGroup + 1) * kGradientRun * s.steps_per_panel());
    grad_queries = arena.take(kGroup * s.d_panels * kPanel);
    shift = arena.take(kGroup);
    rest = arena.take(kGroup);
    delta = arena.take(kGroup);
    bytes = arena.used;
  }
};

}  // namespace albert::ALBERT_ISA
