// The machine of device.h on a CPU: every thread of every block is a fibre, all on one thread of the processor. Who goes
// on is drawn at each step, and for a while some warps, drawn as well, only go on when no other can: what is read late or
// written early without a barrier between shows. Barriers are barriers, a block's shared memory is memory that holds NaN at
// first, a warp's matrix instruction is a loop once its 32 lanes are there. For tests: it finds what is wrong in a
// kernel's logic (a missing barrier, a wrong index, reads of what nobody wrote), not what only a GPU's memory model shows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define ALBERT_DEVICE inline
#define ALBERT_BOTH inline
#define ALBERT_KERNEL(threads) inline
#define ALBERT_ARGUMENT const

namespace albert {
namespace host {

struct Fibre {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  int block, thread;
};

// Fibres that wait for `count` of them.
struct Barrier {
  int count = 0;
  std::vector<Fibre*> waiting;
};

struct Warp {
  Barrier barrier;
  bool slow = false;
  float shuffled[kWarp];
  uint32_t a[kWarp][4], b[kWarp][2];
};

struct Machine {
  int blocks = 0, cluster = 1, threads = 0;  // threads: of a block
  size_t shared_bytes = 0;
  std::vector<char> shared;
  std::vector<Fibre> fibres;
  std::vector<Fibre*> ready, late;  // late: of slow warps
  std::vector<Barrier> of_block, of_cluster;
  std::vector<Warp> warps;
  Fibre* running = nullptr;
  jmp_buf scheduler;
  std::function<void()> body;
  std::mt19937 random;
  size_t steps = 0, next = 0;  // next: when other warps are slow
  size_t arrived = 0;  // fibres at the grid's barrier, which a launch has once
  size_t waits = 0;    // since a block last told another one something
  std::string error;
};

inline Machine*& machine() {
  static Machine* current = nullptr;
  return current;
}
inline Fibre& self() { return *machine()->running; }
inline char* shared_of(int block) {
  Machine& m = *machine();
  // 128 bytes apart from its neighbours, which hold NaN, too.
  return m.shared.data() + (128 - reinterpret_cast<uintptr_t>(m.shared.data()) % 128) + block * (m.shared_bytes + 128);
}

inline void switch_to_scheduler() {
  if (!_setjmp(self().here)) _longjmp(machine()->scheduler, 1);
}
inline void yield(std::vector<Fibre*>& to) {
  to.push_back(&self());
  switch_to_scheduler();
}
inline void arrive(Barrier& barrier) {
  Machine& m = *machine();
  if (static_cast<int>(barrier.waiting.size()) + 1 == barrier.count) {
    m.ready.insert(m.ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
    return yield(m.ready);
  }
  barrier.waiting.push_back(&self());
  switch_to_scheduler();
}

// An exception cannot leave a fibre: it ends, and run() throws.
[[noreturn]] inline void fail(const char* what) {
  machine()->error = what;
  _longjmp(machine()->scheduler, 1);
}

inline void enter() {
  machine()->body();
  self().done = true;
  _longjmp(machine()->scheduler, 1);
}

inline void prepare(Machine& m) {
  constexpr size_t stack_bytes = 64 << 10;
  m.shared.assign(static_cast<size_t>(m.blocks) * (m.shared_bytes + 128) + 256, static_cast<char>(0xff));
  m.of_block.resize(static_cast<size_t>(m.blocks));
  m.of_cluster.resize(static_cast<size_t>(m.blocks / m.cluster));
  m.warps.resize(static_cast<size_t>(m.blocks * m.threads / kWarp));
  for (Barrier& barrier : m.of_block) barrier.count = m.threads;
  for (Barrier& barrier : m.of_cluster) barrier.count = m.threads * m.cluster;
  for (Warp& warp : m.warps) warp.barrier.count = kWarp;
  m.fibres.resize(static_cast<size_t>(m.blocks * m.threads));
  for (size_t i = 0; i < m.fibres.size(); ++i) {
    Fibre& fibre = m.fibres[i];
    fibre.block = static_cast<int>(i) / m.threads;
    fibre.thread = static_cast<int>(i) % m.threads;
    fibre.stack.reset(new char[stack_bytes]);
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = stack_bytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, enter, 0);
    m.ready.push_back(&fibre);
  }
}

inline Warp& warp_of(Machine& m, const Fibre& fibre) {
  return m.warps[static_cast<size_t>((fibre.block * m.threads + fibre.thread) / kWarp)];
}

inline Fibre* draw(Machine& m) {
  if (m.steps++ == m.next) {
    m.next = m.steps + m.fibres.size() * (16u << m.random() % 3 * 2);  // long enough for a block to be a product behind

    for (Warp& warp : m.warps) warp.slow = m.random() % 4 == 0;
    m.ready.insert(m.ready.end(), m.late.begin(), m.late.end());
    m.late.clear();
  }
  for (;;) {
    const bool others = !m.ready.empty();
    std::vector<Fibre*>& from = others ? m.ready : m.late;
    std::swap(from[m.random() % from.size()], from.back());
    Fibre* fibre = from.back();
    from.pop_back();
    if (!others || !warp_of(m, *fibre).slow) return fibre;
    m.late.push_back(fibre);
  }
}

inline void schedule(Machine& m) {
  while (!(m.ready.empty() && m.late.empty()) && m.error.empty()) {
    m.running = draw(m);
    if (_setjmp(m.scheduler)) continue;
    if (m.running->started) _longjmp(m.running->here, 1);
    m.running->started = true;
    setcontext(&m.running->start);
  }
}

// Runs `body` as `blocks` blocks of so many threads, in clusters of `cluster`, with so much shared memory each.
inline void run(int blocks, int threads, int cluster, size_t shared_bytes, unsigned seed, std::function<void()> body) {
  Machine m{};
  m.blocks = blocks;
  m.threads = threads;
  m.cluster = cluster;
  m.shared_bytes = (shared_bytes + 127) / 128 * 128;
  m.body = std::move(body);
  m.random.seed(seed);
  prepare(m);
  machine() = &m;
  schedule(m);
  machine() = nullptr;
  if (!m.error.empty()) throw std::runtime_error(m.error);
  for (const Fibre& fibre : m.fibres)
    if (!fibre.done) throw std::runtime_error("a thread waits at a barrier that the others never reach");
}

inline void pause() {  // nothing changes before the others have gone on
  Machine& m = *machine();
  if (++m.waits > 4000 * m.fibres.size()) fail("threads wait for what no other tells them");
  yield(m.late);
}
inline void tell() { machine()->waits = 0; }
inline Warp& warp() { return warp_of(*machine(), self()); }

}  // namespace host

constexpr bool kHasClusters = true;
inline int thread_index() { return host::self().thread; }
inline int same_in_warp(int x) { return x; }
inline int opaque(int x) { return x; }
inline int block_index() { return host::self().block; }
inline int block_count() { return host::machine()->blocks; }
inline char* shared_memory() { return host::shared_of(host::self().block); }

inline void sync_block() { host::arrive(host::machine()->of_block[static_cast<size_t>(host::self().block)]); }
inline void sync_cluster() {
  host::Machine& m = *host::machine();
  host::arrive(m.of_cluster[static_cast<size_t>(host::self().block / m.cluster)]);
}
struct GridToken {};
inline GridToken arrive_grid() {
  ++host::machine()->arrived;
  host::tell();
  return {};
}
inline void wait_grid(GridToken&) {
  while (host::machine()->arrived < host::machine()->fibres.size()) host::pause();
}
inline float shuffle_xor(float x, int mask) {
  host::Warp& warp = host::warp();
  const int lane = host::self().thread % kWarp;
  warp.shuffled[lane] = x;
  host::arrive(warp.barrier);
  const float other = warp.shuffled[lane ^ mask];
  host::arrive(warp.barrier);
  return other;
}
inline bool any_in_warp(bool x) {
  host::Warp& warp = host::warp();
  warp.shuffled[host::self().thread % kWarp] = x ? 1.0f : 0.0f;
  host::arrive(warp.barrier);
  bool any = false;
  for (const float one : warp.shuffled) any |= one != 0.0f;
  host::arrive(warp.barrier);
  return any;
}
inline Eight gather_quad(uint32_t pair) {
  host::Warp& warp = host::warp();
  const int lane = host::self().thread % kWarp;
  warp.b[lane][0] = pair;
  host::arrive(warp.barrier);
  Eight x;
  for (int i = 0; i < 4; ++i) x.pair[i] = warp.b[lane / 4 * 4 + i][0];
  host::arrive(warp.barrier);
  return x;
}
inline float shuffle_from(float x, int lane) {
  host::Warp& warp = host::warp();
  if (lane < 0 || lane >= kWarp) host::fail("a shuffle from a lane that there is not");
  warp.shuffled[host::self().thread % kWarp] = x;
  host::arrive(warp.barrier);
  const float other = warp.shuffled[lane];
  host::arrive(warp.barrier);
  return other;
}
inline uint32_t transpose(uint32_t pair) {
  host::Warp& warp = host::warp();
  const int lane = host::self().thread % kWarp, column = lane / 4;
  warp.b[lane][0] = pair;
  host::arrive(warp.barrier);
  const auto element = [&](int row) { return warp.b[row * 4 + column / 2][0] >> column % 2 * 16 & 0xffffu; };
  const uint32_t x = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
  host::arrive(warp.barrier);
  return x;
}
struct alignas(8) Arrivals {
  int32_t missing;  // bytes: expected and not there yet
  uint16_t expected, phase;
};
inline void make_arrivals(Arrivals* arrivals) { *arrivals = {0, 0, 0}; }
inline void end_phase(Arrivals* arrivals) {
  if (arrivals->expected != 0 && arrivals->missing == 0) *arrivals = {0, 0, static_cast<uint16_t>(arrivals->phase + 1)};
}
inline void expect(Arrivals* arrivals, int bytes) {
  if (arrivals->expected != 0) host::fail("a phase of arrivals is expected before the one before it is over");
  arrivals->expected = 1;
  arrivals->missing += bytes;
  end_phase(arrivals);
}
inline void wait(Arrivals* arrivals, uint32_t phase) {
  while ((arrivals->phase & 1) == (phase & 1)) host::pause();
}
template <class X>
inline void send(X* local, Arrivals* arrivals, int rank, const X& x) {
  const int own = host::self().block, cluster = host::machine()->cluster;
  const size_t place = static_cast<size_t>(reinterpret_cast<char*>(local) - host::shared_of(own));
  if (rank < 0 || rank >= cluster || place % sizeof x != 0 || place + sizeof x > host::machine()->shared_bytes)
    host::fail("what a block sends is not aligned, or not for the shared memory of one of its cluster");
  char* other = host::shared_of(own / cluster * cluster + rank);
  std::memcpy(other + place, &x, sizeof x);
  auto* count = reinterpret_cast<Arrivals*>(other + (reinterpret_cast<char*>(arrivals) - host::shared_of(own)));
  count->missing -= static_cast<int32_t>(sizeof x);
  end_phase(count);
  host::tell();
}

inline Eight load_shared_by_blocks(const void* p) {
  Eight x;
  if (reinterpret_cast<uintptr_t>(p) % sizeof x != 0) host::fail("a load of 16 bytes is not aligned");
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Eight load_constant(const void* p) { return load_shared_by_blocks(p); }
inline uint32_t load_pair_shared_by_blocks(const void* p) {
  uint32_t x;
  if (reinterpret_cast<uintptr_t>(p) % sizeof x != 0) host::fail("a load of 4 bytes is not aligned");
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Two load_two_shared_by_blocks(const void* p) {
  Two x;
  if (reinterpret_cast<uintptr_t>(p) % sizeof x != 0) host::fail("a load of 8 bytes is not aligned");
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store_two(void* p, float a, float b) {
  const Two x{{a, b}};
  if (reinterpret_cast<uintptr_t>(p) % sizeof x != 0) host::fail("a store of 8 bytes is not aligned");
  std::memcpy(p, &x, sizeof x);
}
constexpr bool kHasWords = true;
inline Eight load_eight_whole(const void* p) { return load_shared_by_blocks(p); }
inline void store_eight_whole(void* p, const Eight& x) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof x != 0) host::fail("a store of 16 bytes is not aligned");
  std::memcpy(p, &x, sizeof x);
  host::tell();
}
inline void add_release(uint32_t* p, uint32_t x) {
  *p += x;
  host::tell();
}
inline uint32_t load_acquire(const uint32_t* p) { return *p; }
inline void pause() { host::pause(); }
inline void hold(int) {}
inline void copy_async(void* to_shared, const void* from) {
  if ((reinterpret_cast<uintptr_t>(to_shared) | reinterpret_cast<uintptr_t>(from)) % 16 != 0)
    host::fail("a copy of 16 bytes is not aligned");
  std::memcpy(to_shared, from, 16);
}
inline void wait_copies() {}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline float inverse(float x) { return 1.0f / x; }
inline float inverse_root(float x) { return 1.0f / std::sqrt(x); }
inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Fp16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return x.bits >> 15 ? -size : size;
}
inline void from_float(float x, Bf16& y) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  y.bits = static_cast<uint16_t>(x != x ? (bits >> 16) | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Fp16& y) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) {
    y.bits = 0x7e00;
  } else if (size >= 65520.0f) {
    y.bits = sign | 0x7c00;
  } else {
    // In units of the last place of its binade: nearbyint rounds halves to even, and carries into the exponent by itself.
    int exponent;
    std::frexp(size, &exponent);
    exponent = exponent < -13 ? -13 : exponent;
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
    y.bits = static_cast<uint16_t>(sign | (size == 0.0f ? 0 : ((exponent + 13) << 10) + units));
  }
}

template <class T>
inline uint32_t pack_pair(float first, float second, T) {
  T a, b;
  from_float(first, a);
  from_float(second, b);
  return a.bits | static_cast<uint32_t>(b.bits) << 16;
}

template <class T>
inline void multiply_add(Four& sum, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  host::Warp& warp = host::warp();
  const int lane = host::self().thread % kWarp;
  std::memcpy(warp.a[lane], a, sizeof a);
  warp.b[lane][0] = b0;
  warp.b[lane][1] = b1;
  host::arrive(warp.barrier);
  const auto element = [](uint32_t pair, int which) {
    return to_float(T{static_cast<uint16_t>(which == 0 ? pair : pair >> 16)});
  };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int pair = k / 2, holder = row % 8 * 4 + pair % 4;
      const float x = element(warp.a[holder][row / 8 + pair / 4 * 2], k % 2);
      sum.value[i] += x * element(warp.b[column * 4 + pair % 4][pair / 4], k % 2);
    }
  }
  host::arrive(warp.barrier);
}

}  // namespace albert
