// What resident_launch.h asks of CUDA: the device, what it has room for, and launches.
#pragma once
#include "resident_words.h"

namespace albert {

constexpr size_t kApart = 128;  // bytes, of the workspace's parts
inline void note_part(const char*, void*, size_t) {}

inline int find_device(Device& d) {
  int major = 0;
  cudaError_t error = cudaGetDevice(&d.index);
  const auto ask = [&](int& to, cudaDeviceAttr what) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&to, what, d.index);
  };
  ask(d.multiprocessors, cudaDevAttrMultiProcessorCount);
  ask(d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(major, cudaDevAttrComputeCapabilityMajor);
  d.has_clusters = major >= 9;
  return error;
}

inline cudaLaunchConfig_t configuration(int blocks, int cluster, int threads, int shared_bytes,
                                        cudaLaunchAttribute (&attributes)[2], cudaStream_t stream) {
  attributes[0].id = cudaLaunchAttributeCooperative;  // all blocks are there at once, or the launch fails
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t c{};
  c.gridDim = dim3(static_cast<unsigned>(blocks));
  c.blockDim = dim3(static_cast<unsigned>(threads));
  c.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  c.stream = stream;
  c.attrs = attributes;
  c.numAttrs = cluster > 1 ? 2 : 1;
  return c;
}
inline cudaLaunchConfig_t configuration(const Layout& l, cudaLaunchAttribute (&attributes)[2], cudaStream_t stream) {
  return configuration(l.blocks, l.cluster, kThreads, l.shared_bytes, attributes, stream);
}
inline cudaLaunchConfig_t configuration(Words, cudaLaunchAttribute (&attributes)[2], cudaStream_t stream) {
  return configuration(Words::kBlocks, Words::kCluster, Words::kThreads, Words::kSharedBytes, attributes, stream);
}

// Clusters that the device runs at once: what it is cut into need not be a multiple of a cluster.
template <class T, class S>
int count_clusters(const Layout& l, int& clusters) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = configuration(l, attributes, nullptr);
  return cudaOccupancyMaxActiveClusters(&clusters, resident_encoder<T, S>, &c);
}

template <class T, class S>
int allow_shared(const Device& d) {
  return cudaFuncSetAttribute(resident_encoder<T, S>, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_bytes);
}

template <class T, class S>
int start(const Arguments<T>& args, void* stream_pointer) {
  const auto stream = static_cast<cudaStream_t>(stream_pointer);
  const cudaError_t error = cudaMemsetAsync(args.arrivals, 0, sizeof(uint32_t), stream);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = configuration(args.layout, attributes, stream);
  return cudaLaunchKernelEx(&c, resident_encoder<T, S>, args);
}

// Whether the device has room for all clusters of who waits for words at a time.
template <class T>
int allow_words(const Device& d, bool& allowed) {
  const auto kernel = resident_encoder_by_words<T, Words>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_bytes);
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = configuration(Words{}, attributes, nullptr);
  int clusters = 0;
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &c);
  allowed = clusters * Words::kCluster >= Words::kBlocks;
  return error;
}
template <class T>
int start_words(const Arguments<T>& args, void* stream) {
  cudaLaunchAttribute attributes[2];
  const cudaLaunchConfig_t c = configuration(Words{}, attributes, static_cast<cudaStream_t>(stream));
  return cudaLaunchKernelEx(&c, resident_encoder_by_words<T, Words>, args);
}

}  // namespace albert
