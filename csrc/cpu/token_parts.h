// How the operations on tokens are shared out among threads, and how sums over tokens are made. Tokens are cut into
// parts whose number and borders depend on nothing but how many tokens there are; each part sums by itself, and the
// parts' sums are added in order. So the result does not depend on who computed what, and sums stay short.
// Compiled once per instruction set.
#pragma once
#include "gemm_tiling.h"
#include "parallel.h"
#include "vec.h"

namespace albert::ALBERT_ISA {

constexpr int64_t kMostParts = 64, kLeastTokens = 32;

inline int part_count(int64_t tokens) {
  return static_cast<int>(smaller(larger(divide_up(tokens, kLeastTokens), 1), kMostParts));
}

// body(task, part, begin, end) for each part of the tokens.
template <class Body>
void for_parts(int64_t tokens, const albert_parallel* parallel, Body body) {
  const int parts = part_count(tokens), tasks = static_cast<int>(smaller(parts, thread_count(parallel)));
  auto task = [&](int i) {
    for (int part = static_cast<int>(part_begin(parts, tasks, i)); part < part_begin(parts, tasks, i + 1); ++part)
      body(i, part, part_begin(tokens, parts, part), part_begin(tokens, parts, part + 1));
  };
  parallel_tasks(parallel, tasks, task);
}

// Sums over tokens of `vectors` vectors of n columns, for each part.
class PartialSums {
 public:
  PartialSums(int64_t tokens, int64_t n, int vectors, char* memory)
      : parts_(part_count(tokens)), n_(n), vectors_(vectors), data_(reinterpret_cast<float*>(memory)) {}
  size_t bytes() const { return static_cast<size_t>(parts_ * vectors_ * stride()) * sizeof(float); }
  float* of(int part, int vector) const { return data_ + (part * vectors_ + vector) * stride(); }
  void clear(int part) const {
    __builtin_memset(of(part, 0), 0, static_cast<size_t>(vectors_ * stride()) * sizeof(float));
  }

  // targets[vector][column] += the sum over the parts; null targets are left out.
  void add_to(float* const* targets, const albert_parallel* parallel) const {
    const int64_t lines = divide_up(n_, 16);
    const int tasks = static_cast<int>(smaller(lines, thread_count(parallel)));
    auto task = [&](int i) {
      const int64_t begin = part_begin(lines, tasks, i) * 16, end = smaller(part_begin(lines, tasks, i + 1) * 16, n_);
      for (int vector = 0; vector < vectors_; ++vector)
        for (int64_t j = begin; targets[vector] != nullptr && j < end; j += kLanes) {
          F total = zero();
          for (int part = 0; part < parts_; ++part) total = add(total, load(of(part, vector) + j));
          float* target = targets[vector] + j;
          const int64_t lanes = smaller(end - j, kLanes);
          if (lanes == kLanes)
            store(target, add(load(target), total));
          else
            store(target, add(load(target, static_cast<int>(lanes)), total), static_cast<int>(lanes));
        }
    };
    if (tasks > 0) parallel_tasks(parallel, tasks, task);
  }

 private:
  int64_t stride() const { return divide_up(n_, 16) * 16; }  // a cache line, and whole vectors
  int parts_;
  int64_t n_;
  int vectors_;
  float* data_;
};

template <class T>
inline void clear_row(T* row, int64_t n) {
  if (row != nullptr) __builtin_memset(row, 0, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace albert::ALBERT_ISA
