// The machine that kernels run on in tests: every thread of every block is a fibre, all on one thread of the processor. Who
// goes on is drawn at each step, and for a while some warps, drawn as well, only go on when no other can: what is read late
// or written early without a barrier between shows. Barriers are barriers, a block's shared memory is memory that holds
// NaN at first, a warp's instruction is done once its 32 lanes are there, all at the same one. With watch.h every access
// to memory is looked at, too.
//
// host.h is compiled with hooks before each load and store (see watch.cpp); this is not, and tells the watch itself.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace albert::host {

struct Launch {
  int blocks, threads, cluster;  // threads: of a block; cluster: blocks of one
  size_t shared_bytes;           // of a block
  unsigned seed;                 // of the order
};

// Runs `kernel` in every thread; what was wrong, or nothing.
std::string run(const Launch& launch, std::function<void()> kernel);

// ---- from a thread of the kernel ----
int thread_index();
int block_index();
int block_count();
char* shared_memory();
[[noreturn]] void fail(const std::string& what);  // ends the launch

// What a warp's lanes tell each other in one instruction.
struct Lanes {
  float number[32];
  uint32_t pair[32];
  float a[32][8], b[32][4];  // of a product
};
// Those of the next instruction: while some lanes read what was told in one, others may tell in the next one already.
Lanes& next_lanes();
// All lanes, before they read what the others told; what: the instruction.
void meet(const char* what);

void sync_block();
void sync_cluster();
void arrive_grid();
void wait_grid();
void pause();  // nothing changes before the others have gone on

// Copies that others see as they are told to, whatever the compiler makes of the kernel's own loads and stores.
void store_whole(void* to, const void* from, size_t bytes);
void load_whole(void* to, const void* from, size_t bytes);
void add_release(uint32_t* to, uint32_t x);
uint32_t load_acquire(const uint32_t* from);
void copy_async(void* to_shared, const void* from, size_t bytes);
void wait_copies();
void read_constant(const void* from, size_t bytes);  // that nobody writes

struct alignas(8) Arrivals {
  int32_t missing;  // bytes: expected and not there yet
  uint16_t expected, phase;
};
void make_arrivals(Arrivals* arrivals);
void expect(Arrivals* arrivals, int bytes);
void wait(Arrivals* arrivals, uint32_t phase);
// To the place of `local` in the shared memory of the cluster's block `rank`, and its bytes to that block's arrivals.
void send(void* local, Arrivals* arrivals, int rank, const void* from, size_t bytes);

}  // namespace albert::host
