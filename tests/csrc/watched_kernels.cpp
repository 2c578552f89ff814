// Small kernels for test_cuda_watch.py, right ones and wrong ones: what csrc/cuda/host/watch.h says of them.
#include <map>
#include <string>

#include "device.h"
#include "host/watch.h"

namespace albert {
namespace {

constexpr int kThreadsOfBlock = 2 * kWarp, kSharedBytes = 1024, kCount = 256;

// What a launch of two blocks of 64 threads, one cluster, is given: floats, but for words and count.
struct Given {
  const float* constant;
  float *scratch, *output;
  Eight* words;
  uint32_t* count;
};

float* own(int i) { return reinterpret_cast<float*>(shared_memory()) + i; }
Arrivals* arrivals() { return reinterpret_cast<Arrivals*>(shared_memory() + 512); }
bool is_first() { return thread_index() == 0 && block_index() == 0; }
bool is_other() { return thread_index() == 0 && block_index() == 1; }

void tell(const Given& g, uint32_t x) { store_eight_whole(g.words, {{x, x, x, x}}); }
void wait_word(const Given& g, uint32_t x) {
  while (load_eight_whole(g.words).pair[0] != x) pause();
}
void clear_words(const Given& g) {
  if (is_first()) g.words[0] = {};
  sync_cluster();
}
void begin_arrivals() {
  if (thread_index() == 0) make_arrivals(arrivals());
  sync_cluster();
}
// From the first block's shared memory into the same place of the second's.
void send_two(float x) {
  if (is_first()) send(reinterpret_cast<Two*>(own(0)), arrivals(), 1, Two{{x, x}});
}
void expect_two() {
  if (is_other()) expect(arrivals(), 8);
}

void pass_time() {
  for (int i = 0; i < 2000; ++i) shuffle_xor(1.0f, 1);
}

using Kernel = void (*)(const Given&);
const std::map<std::string, Kernel> kKernels = {
    {"a barrier of the block",
     [](const Given& g) {
       *own(thread_index()) = 1;
       sync_block();
       g.output[block_index() * kThreadsOfBlock + thread_index()] = *own(thread_index() ^ 1);
     }},
    {"no barrier of the block",
     [](const Given& g) {
       *own(thread_index()) = 1;
       g.output[block_index() * kThreadsOfBlock + thread_index()] = *own(thread_index() ^ 1);
     }},
    {"a warp's instruction is no barrier",
     [](const Given& g) {
       *own(thread_index()) = 1;
       const float x = shuffle_xor(1.0f, 1);
       g.output[block_index() * kThreadsOfBlock + thread_index()] = x + *own(thread_index() ^ 1);
     }},
    {"what was read before a warp's instruction is written after it",
     [](const Given& g) {
       *own(thread_index()) = 1;
       sync_block();
       const float x = shuffle_xor(*own(thread_index() ^ 1), 1);
       *own(thread_index()) = x;
       g.output[block_index() * kThreadsOfBlock + thread_index()] = x;
     }},
    {"what another warp reads is written",
     [](const Given& g) {
       *own(thread_index()) = 1;
       sync_block();
       const float x = shuffle_xor(*own(thread_index() ^ kWarp), 1);
       *own(thread_index()) = x;
       g.output[block_index() * kThreadsOfBlock + thread_index()] = x;
     }},
    {"two write",
     [](const Given&) {
       if (thread_index() < 2) *own(0) = 1;
     }},
    {"parts of four bytes",
     [](const Given&) { shared_memory()[thread_index()] = 1; }},
    {"copies that are waited for",
     [](const Given& g) {
       if (thread_index() < 16) copy_async(own(4 * thread_index()), g.constant + 4 * thread_index());
       wait_copies();
       sync_block();
       g.output[block_index() * kThreadsOfBlock + thread_index()] = *own(thread_index());
     }},
    {"copies that nobody waits for",
     [](const Given& g) {
       if (thread_index() < 16) copy_async(own(4 * thread_index()), g.constant + 4 * thread_index());
       sync_block();
       g.output[block_index() * kThreadsOfBlock + thread_index()] = *own(thread_index());
     }},
    {"a barrier of the cluster",
     [](const Given& g) {
       if (is_first()) g.scratch[0] = 1;
       sync_cluster();
       if (is_other()) g.output[0] = g.scratch[0];
     }},
    {"a barrier of the block is none of the cluster",
     [](const Given& g) {
       if (is_first()) g.scratch[0] = 1;
       sync_block();
       if (is_other()) g.output[0] = g.scratch[0];
     }},
    {"a barrier of the grid",
     [](const Given& g) {
       if (is_first()) g.scratch[0] = 1;
       GridToken token = arrive_grid();
       wait_grid(token);
       if (is_other()) g.output[0] = g.scratch[0];
     }},
    {"what is written after the arrival",
     [](const Given& g) {
       GridToken token = arrive_grid();
       if (is_first()) g.scratch[0] = 1;
       wait_grid(token);
       if (is_other()) g.output[0] = g.scratch[0];
     }},
    {"a release and an acquire",
     [](const Given& g) {
       g.scratch[block_index() * kThreadsOfBlock + thread_index()] = 1;
       sync_block();
       if (thread_index() == 0) {
         add_release(g.count, 1);
         while (load_acquire(g.count) < 2) pause();
       }
       sync_block();
       g.output[block_index() * kThreadsOfBlock + thread_index()] = g.scratch[(block_index() ^ 1) * kThreadsOfBlock + thread_index()];
     }},
    {"a release before the barrier",
     [](const Given& g) {
       g.scratch[block_index() * kThreadsOfBlock + thread_index()] = 1;
       if (thread_index() == 0) {
         add_release(g.count, 1);
         while (load_acquire(g.count) < 2) pause();
       }
       sync_block();
       g.output[block_index() * kThreadsOfBlock + thread_index()] = g.scratch[(block_index() ^ 1) * kThreadsOfBlock + thread_index()];
     }},
    {"a word",
     [](const Given& g) {
       clear_words(g);
       if (is_first()) tell(g, 7);
       if (is_other()) wait_word(g, 7);
     }},
    {"a word that was never cleared",
     [](const Given& g) {
       if (block_index() == 0) pass_time();
       if (is_first()) tell(g, 7);
       if (is_other()) wait_word(g, 7);
     }},
    {"a word that is still cleared",
     [](const Given& g) {
       if (is_first()) g.words[0] = {};
       if (is_other()) tell(g, 7);
     }},
    {"a word orders nothing else",
     [](const Given& g) {
       clear_words(g);
       if (is_first()) {
         g.scratch[0] = 1;
         tell(g, 7);
       }
       if (is_other()) {
         wait_word(g, 7);
         g.output[0] = g.scratch[0];
       }
     }},
    {"what the teller of a word has read is written",
     [](const Given& g) {
       clear_words(g);
       if (is_first()) {
         g.output[0] = g.scratch[0];
         tell(g, 7);
       }
       if (is_other()) {
         wait_word(g, 7);
         g.scratch[0] = 1;
       }
     }},
    {"what the teller of a word reads later is written",
     [](const Given& g) {
       clear_words(g);
       if (is_first()) {
         tell(g, 7);
         g.output[0] = g.scratch[0];
       }
       if (is_other()) {
         wait_word(g, 7);
         g.scratch[0] = 1;
       }
     }},
    {"arrivals",
     [](const Given& g) {
       begin_arrivals();
       send_two(3);
       expect_two();
       if (block_index() == 1) {
         wait(arrivals(), 0);
         g.output[thread_index()] = *own(0);
       }
       sync_cluster();
     }},
    {"arrivals that nobody waits for",
     [](const Given& g) {
       begin_arrivals();
       send_two(3);
       expect_two();
       if (is_other()) g.output[0] = *own(0);
       sync_cluster();
     }},
    {"arrivals bring what was sent alone",
     [](const Given& g) {
       begin_arrivals();
       if (is_first()) g.scratch[0] = 1;
       send_two(3);
       expect_two();
       if (is_other()) {
         wait(arrivals(), 0);
         g.output[0] = g.scratch[0];
       }
       sync_cluster();
     }},
    {"what is sent to a place that is still read",
     [](const Given& g) {
       if (block_index() == 1) *own(0) = *own(1) = thread_index() == 0 ? 1.0f : 0.0f;
       begin_arrivals();
       send_two(3);
       expect_two();
       if (is_other()) {
         g.output[0] = *own(0);
         wait(arrivals(), 0);
       }
       sync_cluster();
     }},
    {"arrivals before they are made",
     [](const Given&) {
       if (thread_index() == 0) make_arrivals(arrivals());
       send_two(3);
       expect_two();
       sync_cluster();
     }},
    {"a send to who is gone",
     [](const Given&) {
       begin_arrivals();
       if (block_index() == 1) return;
       pass_time();
       send_two(3);
     }},
    {"beyond the output",
     [](const Given& g) {
       if (is_other()) g.output[kCount] = 1;
     }},
    {"before the output",
     [](const Given& g) { g.output[-1] = 1; }},
    {"beyond shared memory",
     [](const Given& g) { g.output[block_index() * kThreadsOfBlock + thread_index()] = *own(kSharedBytes / 4 + thread_index()); }},
    {"another block's shared memory",
     [](const Given& g) {
       static float* of_first = nullptr;
       if (is_first()) of_first = own(5);
       sync_cluster();
       if (is_other()) g.output[0] = *of_first;
     }},
    {"a write to what is constant",
     [](const Given& g) { const_cast<float*>(g.constant)[thread_index()] = 1; }},
    {"a constant that is written",
     [](const Given& g) { g.output[thread_index()] = static_cast<float>(load_constant(g.scratch).pair[0]); }},
    {"lanes that part",
     [](const Given& g) {
       const float x = thread_index() % 2 ? shuffle_xor(1.0f, 2) : static_cast<float>(any_in_warp(true));
       g.output[block_index() * kThreadsOfBlock + thread_index()] = x;
     }},
    {"a barrier that one does not reach",
     [](const Given&) {
       if (!is_first()) sync_block();
     }},
    {"a word that nobody tells",
     [](const Given& g) {
       clear_words(g);
       if (is_other()) wait_word(g, 7);
     }},
    {"a load that is not aligned",
     [](const Given& g) { g.output[thread_index()] = static_cast<float>(load_shared_by_blocks(g.scratch + 1).pair[0]); }},
};

}  // namespace
}  // namespace albert

// What is said of a kernel; nothing of a right one.
extern "C" const char* run_watched(const char* name, unsigned seed) {
  using namespace albert;
  static std::string said;
  float constant[kCount] = {}, output[kCount] = {};
  host::Memory memory;
  Given given{};
  given.constant = memory.constant("a constant", constant, sizeof constant);
  given.output = static_cast<float*>(memory.output("the output", output, sizeof output));
  const auto part = [&](const char* of, size_t bytes) {
    char* begin = memory.room(bytes);
    memory.part(of, begin, bytes);
    return begin;
  };
  given.scratch = reinterpret_cast<float*>(part("scratch", kCount * sizeof(float)));
  given.words = reinterpret_cast<Eight*>(part("words", sizeof(Eight)));
  given.count = reinterpret_cast<uint32_t*>(part("the count", sizeof(uint32_t)));
  memory.set_zero(given.count, sizeof(uint32_t));
  const auto kernel = kKernels.find(name);
  if (kernel == kKernels.end()) return "no such kernel";
  host::watched_memory() = &memory;
  said = host::run({2, kThreadsOfBlock, 2, kSharedBytes, seed}, [&] { kernel->second(given); });
  host::watched_memory() = nullptr;
  return said.c_str();
}
