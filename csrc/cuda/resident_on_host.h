// What resident_launch.h asks of CUDA, on the machine that host.h plays.
#pragma once
#include <functional>
#include <string>
#include <utility>

#include "host/watch.h"
#include "resident_words.h"

namespace albert {

constexpr size_t kApart = 4096;  // bytes, of the workspace's parts: what is beyond one is in none
constexpr int kWordInstance = 4;  // beside those of resident_sizes.h

// Tests choose it.
inline Device& host_device() {
  static Device device{0, 4, 227 << 10, true};
  return device;
}
inline unsigned& host_seed() {
  static unsigned seed = 0;
  return seed;
}
inline std::string& host_error() {
  static std::string error;
  return error;
}
inline int& host_instance() {
  static int instance = 0;
  return instance;
}
inline bool& host_watched() {
  static bool watched = false;
  return watched;
}

inline int find_device(Device& d) {
  d = host_device();
  return 0;
}
template <class T, class S>
int count_clusters(const Layout&, int& clusters) {
  clusters = host_device().multiprocessors / kClusterBlocks;
  return 0;
}
template <class T, class S>
int allow_shared(const Device&) {
  return 0;
}
inline int run_on_host(int instance, const host::Launch& launch, std::function<void()> kernel) {
  host_instance() = instance;
  host_error() = host::run(launch, std::move(kernel));
  return host_error().empty() ? 0 : ALBERT_CUDA_KERNEL;
}
template <class T, class S>
int start(const Arguments<T>& args, void*) {
  const Layout& l = args.layout;
  if (host::Memory* memory = host::watched_memory())
    memory->set_zero(args.arrivals, sizeof(uint32_t));
  else
    *args.arrivals = 0;
  return run_on_host(l.instance, {l.blocks, kThreads, l.cluster, static_cast<size_t>(l.shared_bytes), host_seed()++},
                     [&] { resident_encoder<T, S>(args); });
}
template <class T>
int allow_words(const Device& d, bool& allowed) {
  allowed = d.multiprocessors >= Words::kBlocks;
  return 0;
}
template <class T>
int start_words(const Arguments<T>& args, void*) {
  return run_on_host(kWordInstance,
                     {Words::kBlocks, Words::kThreads, Words::kCluster, Words::kSharedBytes, host_seed()++},
                     [&] { resident_encoder_by_words<T, Words>(args); });
}

inline void note_part(const char* name, void* begin, size_t bytes) {
  if (host::Memory* memory = host::watched_memory()) memory->part(name, begin, bytes);
}

// launch(args), watched where that is asked for: then of copies of all that it is given.
template <class Launch>
int on_host(const albert_resident_args& given, Launch launch) {
  if (!host_watched()) return launch(given);
  const auto& s = given.shape;
  const size_t hidden = static_cast<size_t>(s.hidden), inner = static_cast<size_t>(s.inner), element = 2;
  const size_t parameter = s.parameter_dtype == ALBERT_CUDA_F32 ? 4 : 2;
  const size_t states = static_cast<size_t>(given.tokens) * hidden * element;
  host::Memory memory;
  albert_resident_args args = given;
  args.hidden = memory.constant("hidden states", given.hidden, states);
  args.cu_seqlens = memory.constant("cu_seqlens", given.cu_seqlens, (static_cast<size_t>(given.batch) + 1) * sizeof(int32_t));
  for (int i = 0; i < 16; ++i) {
    const size_t outputs = i == 10 || i == 11 ? inner : hidden, inputs = i == 12 ? inner : hidden;
    const bool matrix = i % 2 == 0 && i != 8 && i != 14;
    const std::string name = "parameter " + std::to_string(i);
    args.parameters[i] = memory.constant(name.c_str(), given.parameters[i], outputs * (matrix ? inputs : 1) * parameter);
  }
  args.output = memory.output("output", given.output, states * static_cast<size_t>(given.return_all ? given.passes : 1));
  args.workspace = memory.room(albert_resident_workspace_bytes(&s, given.tokens, given.passes));
  host::watched_memory() = &memory;
  const int error = launch(args);
  host::watched_memory() = nullptr;
  if (error == 0) memory.give_back();
  return error;
}

}  // namespace albert
