// The resident encoder from the host: what fits, where the workspace's parts lie, and the launch.
#pragma once
#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#ifdef __CUDACC__
#include "resident_on_gpu.h"
#else
#include "resident_on_host.h"
#endif

namespace albert {

// Calls use(S) with the sizes that the layout's instance of the kernel has.
template <class Use>
int with_sizes(const Layout& l, Use use) {
  switch (l.instance) {
    case 1: return use(InClusters{});
    case 2: return use(Alone{});
    case 3: return use(OneTile{});
    default: return use(AnySizes{});
  }
}

// The layout on so many blocks, by the instance made for the shape where there is one.
template <class S>
bool is_made_for(const albert_resident_shape& s, int blocks, int cluster, Layout& layout) {
  layout = S::make();
  const bool same = layout.hidden == s.hidden && layout.inner == s.inner && layout.heads == s.heads;
  layout.blocks = blocks;
  return same && layout.cluster == cluster && blocks >= S::kLeastBlocks;
}

template <class T>
int find_layout(const albert_resident_shape& shape, const Device& device, Layout& layout) {
  const auto fits = [&](int blocks, int cluster) {
    const auto has_room = [&] { return serves(layout) && layout.shared_bytes <= device.shared_bytes; };
    if (is_made_for<InClusters>(shape, blocks, cluster, layout) && has_room()) return true;
    if (is_made_for<Alone>(shape, blocks, cluster, layout) && has_room()) return true;
    for (const int tiles : {kMostTiles, 2}) {
      layout = make_layout(0, shape.hidden, shape.inner, shape.heads, blocks, cluster, AnySizes::kTilesOfWarp, tiles);
      if (has_room()) return true;
    }
    return false;
  };
  const auto allow = [&] {
    const int error = with_sizes(layout, [&](auto s) { return allow_shared<T, decltype(s)>(device); });
    return error == 0 && layout.instance == Alone::make().instance ? allow_shared<T, OneTile>(device) : error;
  };
  if (shape.cluster != 1 && device.has_clusters && device.multiprocessors >= kClusterBlocks) {
    // How many clusters there can be depends on the shared memory, which depends on how many there are.
    int clusters = device.multiprocessors / kClusterBlocks;
    for (int found = 0; clusters > 0 && fits(clusters * kClusterBlocks, kClusterBlocks); clusters = found) {
      if (const int error = allow()) return error;
      const int error = with_sizes(layout, [&](auto s) { return count_clusters<T, decltype(s)>(layout, found); });
      if (error != 0 || found >= clusters) return error;
    }
  }
  if (shape.cluster <= 1 && fits(device.multiprocessors, 1)) return allow();
  return ALBERT_CUDA_DOES_NOT_FIT;
}

// Whether up to 16 tokens are served by the instance that waits for words.
template <class T>
int find_words(const albert_resident_shape& shape, const Device& device, bool& words) {
  const bool same = shape.hidden == Words::kHidden && shape.inner == Words::kInner && shape.heads == Words::kHeads;
  words = kHasWords && shape.words != 0 && same && device.has_clusters && Words::kSharedBytes <= device.shared_bytes;
  return words ? allow_words<T>(device, words) : 0;
}

// Both, found once for each device and shape: the questions take longer than a launch.
template <class T>
int layout_of(const albert_resident_shape& shape, Layout& layout, bool& words) {
  struct Known {
    Device device;
    albert_resident_shape shape;
    Layout layout;
    bool words;
  };
  static std::mutex mutex;
  static std::vector<Known> known;
  Device device{};
  if (const int error = find_device(device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Known& k : known)
    if (std::memcmp(&k.device, &device, sizeof device) == 0 && std::memcmp(&k.shape, &shape, sizeof shape) == 0) {
      layout = k.layout;
      words = k.words;
      return 0;
    }
  if (const int error = find_layout<T>(shape, device, layout)) return error;
  if (const int error = find_words<T>(shape, device, words)) return error;
  known.push_back({device, shape, layout, words});
  return 0;
}

inline bool valid(const albert_resident_shape& s) {
  return s.hidden > 0 && s.inner > 0 && s.heads > 0 && s.hidden % s.heads == 0 &&
         (s.dtype == ALBERT_CUDA_BF16 || s.dtype == ALBERT_CUDA_FP16) &&
         (s.parameter_dtype == s.dtype || s.parameter_dtype == ALBERT_CUDA_F32) &&
         (s.cluster == 0 || s.cluster == 1 || s.cluster == kClusterBlocks);
}

// Calls use(T) with the shape's dtype.
template <class Use>
int with_dtype(const albert_resident_shape& s, Use use) {
  return s.dtype == ALBERT_CUDA_BF16 ? use(Bf16{}) : use(Fp16{});
}

// The workspace's parts; returns its size. base may be null.
template <class T>
size_t lay_out(Arguments<T>& a, const albert_resident_shape& shape, int tokens, int passes, char* base) {
  const int hidden = shape.hidden, inner = shape.inner;
  size_t size = 0;
  const auto take = [&](const char* name, size_t bytes) {
    char* part = base + size;
    if (base != nullptr) note_part(name, part, bytes);
    size += (bytes + kApart - 1) / kApart * kApart;
    return part;
  };
  a.tokens = tokens;
  a.passes = passes;
  const size_t rows = static_cast<size_t>(tokens);
  a.arrivals = reinterpret_cast<uint32_t*>(take("arrivals", sizeof(uint32_t)));
  a.context = reinterpret_cast<T*>(take("context", rows * hidden * sizeof(T)));
  a.partial = reinterpret_cast<Statistics*>(take("partial", rows * hidden / kUnit * sizeof(Statistics)));
  size_t qkv_bytes = static_cast<size_t>(divide_up(tokens, kTile)) * kTile * hidden * 3 * sizeof(T);
  if (shape.words && tokens <= kTile) qkv_bytes = std::max(qkv_bytes, word_bytes(a));
  a.qkv = reinterpret_cast<T*>(take("qkv", qkv_bytes));
  a.attended = reinterpret_cast<T*>(take("attended", rows * hidden * sizeof(T)));
  a.inner = reinterpret_cast<T*>(take("inner", rows * inner * sizeof(T)));
  a.summed = reinterpret_cast<T*>(take("summed", rows * hidden * sizeof(T)));
#ifdef ALBERT_RESIDENT_TIMES
  a.times = reinterpret_cast<long long*>(take("times", kTimesBytes));
#endif
  return size;
}

inline bool aligned(const void* p) { return p != nullptr && reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline bool valid(const albert_resident_args& a) {
  for (const void* p : a.parameters)
    if (!aligned(p)) return false;
  return valid(a.shape) && a.tokens > 0 && a.tokens <= kMostTokens && a.batch >= 0 && a.passes > 0 &&
         a.activation >= ALBERT_CUDA_GELU_TANH && a.activation <= ALBERT_CUDA_RELU && aligned(a.hidden) &&
         a.cu_seqlens != nullptr && aligned(a.output) && aligned(a.workspace);
}

inline int launch(const albert_resident_args& given, void* stream) {
  return with_dtype(given.shape, [&](auto t) {
    using T = decltype(t);
    Arguments<T> a{};
    bool words;
    if (const int error = layout_of<T>(given.shape, a.layout, words)) return error;
    lay_out(a, given.shape, given.tokens, given.passes, static_cast<char*>(given.workspace));
    a.float_parameters = given.shape.parameter_dtype == ALBERT_CUDA_F32;
    a.batch = given.batch;
    a.activation = given.activation;
    a.return_all = given.return_all != 0;
    a.eps = given.eps;
    a.hidden = static_cast<const T*>(given.hidden);
    a.cu_seqlens = given.cu_seqlens;
    for (int i = 0; i < 16; ++i) a.parameters[i] = given.parameters[i];
    a.output = static_cast<T*>(given.output);
    if (words && a.tokens <= kTile) return start_words<T>(a, stream);
    if (a.layout.instance == Alone::make().instance && a.tokens <= kTile) {
      a.layout.instance = OneTile::make().instance;
      a.layout.blocks = OneTile::kLeastBlocks;  // no others have anything to do
    }
    return with_sizes(a.layout, [&](auto s) { return start<T, decltype(s)>(a, stream); });
  });
}

}  // namespace albert

extern "C" {

int albert_resident_plan_of(const albert_resident_shape* shape, albert_resident_plan* plan) {
  using namespace albert;
  if (!valid(*shape)) return ALBERT_CUDA_BAD_ARGUMENT;
  Layout layout{};
  bool words;
  const int error = with_dtype(*shape, [&](auto t) { return layout_of<decltype(t)>(*shape, layout, words); });
  if (error == 0) *plan = {layout.blocks, layout.cluster, layout.shared_bytes, words};
  return error;
}

size_t albert_resident_workspace_bytes(const albert_resident_shape* shape, int tokens, int passes) {
  using namespace albert;
  Arguments<Bf16> a{};
  return lay_out(a, *shape, tokens, passes, nullptr);
}

int albert_resident_encoder(const albert_resident_args* given, void* stream) {
  using namespace albert;
  if (!valid(*given)) return ALBERT_CUDA_BAD_ARGUMENT;
#ifdef __CUDACC__
  return launch(*given, stream);
#else
  return on_host(*given, [&](const albert_resident_args& args) { return launch(args, stream); });
#endif
}

const char* albert_cuda_error(int error) {
  switch (error) {
    case 0: return "no error";
    case ALBERT_CUDA_BAD_ARGUMENT: return "an argument is wrong";
    case ALBERT_CUDA_DOES_NOT_FIT: return "the layer does not fit into the device's shared memory";
#ifdef __CUDACC__
    default: return cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    default: return albert::host_error().c_str();
#endif
  }
}

#ifndef __CUDACC__
void albert_host_machine(int multiprocessors, int shared_bytes, int has_clusters, unsigned seed, int watched) {
  albert::host_device() = {0, multiprocessors, shared_bytes, has_clusters != 0};
  albert::host_seed() = seed;
  albert::host_watched() = watched != 0;
}
// Of the kernel that ran last.
int albert_host_instance() { return albert::host_instance(); }
#endif
}
