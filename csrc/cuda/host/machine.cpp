#include "machine.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "watch.h"

namespace albert::host {
namespace {

constexpr int kWarp = 32;

struct Fibre {
  ucontext_t start;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  int block, thread, number;  // number: among all threads
  int instructions = 0;       // of its warp, so far
};

// Fibres that wait for `count` of them.
struct Barrier {
  int count = 0;
  std::vector<Fibre*> waiting;
  Telling telling;
  const char* what = nullptr;  // of a warp's: the instruction that the first of them is at
};

struct Warp {
  Barrier barrier;
  bool slow = false;
  Lanes lanes[2];  // in turn
};

struct Machine {
  Launch launch;
  std::function<void()> kernel;
  std::vector<char> own_memory;  // where nothing is watched
  std::vector<char*> shared;
  std::vector<Fibre> fibres;
  std::vector<Fibre*> ready, late;  // late: of slow warps
  std::vector<int> ended;           // of each block's
  std::vector<Barrier> of_block, of_cluster;
  std::vector<Warp> warps;
  Fibre* running = nullptr;
  jmp_buf scheduler;
  std::mt19937 random;
  size_t steps = 0, next = 0;  // next: when other warps are slow
  size_t arrived = 0;          // fibres at the grid's barrier, which a launch has once
  size_t waits = 0;            // since a block last told another one something
  Telling at_grid;
  Known grid_has;  // once all are there
  std::unique_ptr<Watch> watch;
  Memory* memory = nullptr;
  std::string error;
};

Machine* machine = nullptr;

Fibre& self() { return *machine->running; }
int number() { return self().number; }
Watch* watch() { return machine->watch.get(); }
Warp& warp_of(const Fibre& fibre) { return machine->warps[static_cast<size_t>(fibre.number / kWarp)]; }
// Where in the kernel a function of the machine is called.
#define ALBERT_CODE __builtin_return_address(0)

void switch_to_scheduler() {
  if (!_setjmp(self().here)) _longjmp(machine->scheduler, 1);
}
void yield(std::vector<Fibre*>& to) {
  to.push_back(&self());
  switch_to_scheduler();
}
void tell_others() { machine->waits = 0; }

// Until all have come: who comes last calls all(fibre) for each of them before they go on.
template <class All>
void arrive(Barrier& barrier, All all) {
  barrier.waiting.push_back(&self());
  if (static_cast<int>(barrier.waiting.size()) == barrier.count) {
    std::vector<Fibre*> there;
    there.swap(barrier.waiting);
    all(there);
    there.pop_back();
    machine->ready.insert(machine->ready.end(), there.begin(), there.end());
    return yield(machine->ready);
  }
  switch_to_scheduler();
}
void sync(Barrier& barrier) {
  if (watch()) watch()->tell(number(), barrier.telling, true);
  arrive(barrier, [&](const std::vector<Fibre*>& there) {
    if (!watch()) return;
    const Known known = barrier.telling.take();
    for (const Fibre* fibre : there) watch()->learn(fibre->number, known);
  });
}

void enter() {
  machine->kernel();
  self().done = true;
  ++machine->ended[static_cast<size_t>(self().block)];
  _longjmp(machine->scheduler, 1);
}

void take_memory(Machine& m) {
  const size_t blocks = static_cast<size_t>(m.launch.blocks);
  if (m.memory != nullptr) {
    for (size_t i = 0; i < blocks; ++i) m.shared.push_back(m.memory->shared(static_cast<int>(i), m.launch.shared_bytes));
    m.watch = std::make_unique<Watch>(*m.memory, m.launch.blocks * m.launch.threads, m.launch.threads);
    return;
  }
  // 128 bytes apart from its neighbours, which hold NaN, too.
  const size_t apart = (m.launch.shared_bytes + 127) / 128 * 128 + 128;
  m.own_memory.assign(blocks * apart + 256, static_cast<char>(0xff));
  char* const first = m.own_memory.data() + (128 - reinterpret_cast<uintptr_t>(m.own_memory.data()) % 128);
  for (size_t i = 0; i < blocks; ++i) m.shared.push_back(first + i * apart);
}

void make_fibres(Machine& m) {
  constexpr size_t stack_bytes = 64 << 10;
  const Launch& l = m.launch;
  m.ended.resize(static_cast<size_t>(l.blocks));
  m.of_block.resize(static_cast<size_t>(l.blocks));
  m.of_cluster.resize(static_cast<size_t>(l.blocks / l.cluster));
  m.warps.resize(static_cast<size_t>(l.blocks * l.threads / kWarp));
  for (Barrier& barrier : m.of_block) barrier.count = l.threads;
  for (Barrier& barrier : m.of_cluster) barrier.count = l.threads * l.cluster;
  for (Warp& warp : m.warps) warp.barrier.count = kWarp;
  m.fibres.resize(static_cast<size_t>(l.blocks * l.threads));
  for (size_t i = 0; i < m.fibres.size(); ++i) {
    Fibre& fibre = m.fibres[i];
    fibre.number = static_cast<int>(i);
    fibre.block = fibre.number / l.threads;
    fibre.thread = fibre.number % l.threads;
    fibre.stack.reset(new char[stack_bytes]);
    getcontext(&fibre.start);
    fibre.start.uc_stack.ss_sp = fibre.stack.get();
    fibre.start.uc_stack.ss_size = stack_bytes;
    fibre.start.uc_link = nullptr;
    makecontext(&fibre.start, enter, 0);
    m.ready.push_back(&fibre);
  }
}

Fibre* draw(Machine& m) {
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
    if (!others || !warp_of(*fibre).slow) return fibre;
    m.late.push_back(fibre);
  }
}

void schedule(Machine& m) {
  while (!(m.ready.empty() && m.late.empty()) && m.error.empty()) {
    m.running = draw(m);
    if (_setjmp(m.scheduler)) continue;
    if (m.running->started) _longjmp(m.running->here, 1);
    m.running->started = true;
    setcontext(&m.running->start);
  }
}

}  // namespace

// ---- what the compiler puts before loads and stores of the kernels (-fsanitize=thread) ----
namespace {
void touch(const void* p, size_t bytes, uint8_t kind, const void* code) {
  if (machine != nullptr && machine->memory != nullptr && machine->memory->has(p))
    watch()->access(number(), p, bytes, kind, code);
}
}  // namespace

#pragma GCC visibility push(hidden)
extern "C" {
#define ALBERT_HOOK(name, bytes, kind) \
  void __tsan_##name(void* p) { touch(p, bytes, kind, ALBERT_CODE); }
#define ALBERT_HOOKS(bytes)                   \
  ALBERT_HOOK(read##bytes, bytes, kRead)      \
  ALBERT_HOOK(write##bytes, bytes, kWrite)    \
  ALBERT_HOOK(unaligned_read##bytes, bytes, kRead) \
  ALBERT_HOOK(unaligned_write##bytes, bytes, kWrite)
ALBERT_HOOKS(1)
ALBERT_HOOKS(2)
ALBERT_HOOKS(4)
ALBERT_HOOKS(8)
ALBERT_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { touch(p, bytes, kRead, ALBERT_CODE); }
void __tsan_write_range(void* p, size_t bytes) { touch(p, bytes, kWrite, ALBERT_CODE); }
void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  touch(from, bytes, kRead, ALBERT_CODE);
  touch(to, bytes, kWrite, ALBERT_CODE);
  return std::memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int x, size_t bytes) {
  touch(to, bytes, kWrite, ALBERT_CODE);
  return std::memset(to, x, bytes);
}
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }  // of statics
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
#pragma GCC visibility pop

// ---- a launch ----
std::string run(const Launch& launch, std::function<void()> kernel) {
  Machine m{};
  m.launch = launch;
  m.kernel = std::move(kernel);
  m.random.seed(launch.seed);
  m.memory = watched_memory();
  take_memory(m);
  machine = &m;
  make_fibres(m);
  schedule(m);
  machine = nullptr;
  if (m.error.empty())
    for (const Fibre& fibre : m.fibres)
      if (!fibre.done) return "a thread waits at a barrier that the others never reach";
  return m.error;
}

void fail(const std::string& what) {
  machine->error = what;
  _longjmp(machine->scheduler, 1);
}

int thread_index() { return self().thread; }
int block_index() { return self().block; }
int block_count() { return machine->launch.blocks; }
char* shared_memory() { return machine->shared[static_cast<size_t>(self().block)]; }

Lanes& next_lanes() { return warp_of(self()).lanes[++self().instructions % 2]; }
void meet(const char* what) {
  Barrier& barrier = warp_of(self()).barrier;
  if (barrier.waiting.empty())
    barrier.what = what;
  else if (std::strcmp(barrier.what, what) != 0)
    fail(std::string("lanes of a warp are at different instructions that need all of them: ") + barrier.what + ", " + what);
  if (watch() && watch()->has_news(number())) watch()->tell(number(), barrier.telling, false);
  arrive(barrier, [&](const std::vector<Fibre*>& there) {
    if (!watch() || barrier.telling.empty()) return;
    const Known known = barrier.telling.take();
    for (const Fibre* fibre : there) watch()->learn_in_warp(fibre->number, known);
  });
}

void sync_block() { sync(machine->of_block[static_cast<size_t>(self().block)]); }
void sync_cluster() { sync(machine->of_cluster[static_cast<size_t>(self().block / machine->launch.cluster)]); }
void arrive_grid() {
  if (watch()) watch()->tell(number(), machine->at_grid, true);
  ++machine->arrived;
  tell_others();
}
void wait_grid() {
  Machine& m = *machine;
  while (m.arrived < m.fibres.size()) pause();
  if (!watch()) return;
  if (!m.at_grid.empty()) m.grid_has = m.at_grid.take();
  watch()->learn(number(), m.grid_has);
}
void pause() {
  Machine& m = *machine;
  if (++m.waits > 4000 * m.fibres.size()) fail("threads wait for what no other tells them");
  yield(m.late);
}

void store_whole(void* to, const void* from, size_t bytes) {
  if (watch()) {
    watch()->access(number(), to, bytes, kWrite | kWhole, ALBERT_CODE);
    watch()->tell_by(to, number());
  }
  std::memcpy(to, from, bytes);
  tell_others();
}
void load_whole(void* to, const void* from, size_t bytes) {
  if (watch()) {
    watch()->access(number(), from, bytes, kRead | kWhole, ALBERT_CODE);
    watch()->learn_by(from, number());
  }
  std::memcpy(to, from, bytes);
}
void add_release(uint32_t* to, uint32_t x) {
  if (watch()) {
    watch()->access(number(), to, sizeof x, kWrite | kWhole, ALBERT_CODE);
    watch()->add_by(to, number());
  }
  *to += x;
  tell_others();
}
uint32_t load_acquire(const uint32_t* from) {
  if (watch()) {
    watch()->access(number(), from, sizeof *from, kRead | kWhole, ALBERT_CODE);
    watch()->learn_by(from, number());
  }
  return *from;
}
void copy_async(void* to_shared, const void* from, size_t bytes) {
  if (watch()) {
    watch()->access(number(), from, bytes, kRead, ALBERT_CODE);
    watch()->copy(number(), to_shared, bytes, ALBERT_CODE);
  }
  std::memcpy(to_shared, from, bytes);
}
void wait_copies() {
  if (watch()) watch()->wait_copies(number());
}
void read_constant(const void* from, size_t bytes) {
  if (watch()) watch()->read_constant(number(), from, bytes);
}

// ---- arrivals ----
namespace {
void end_phase(Arrivals* arrivals) {
  if (arrivals->expected == 0 || arrivals->missing != 0) return;
  *arrivals = {0, 0, static_cast<uint16_t>(arrivals->phase + 1)};
  if (watch()) watch()->end_phase(arrivals);
}
}  // namespace
void make_arrivals(Arrivals* arrivals) {
  if (watch()) watch()->access(number(), arrivals, sizeof *arrivals, kWrite, ALBERT_CODE);
  *arrivals = {0, 0, 0};
}
void expect(Arrivals* arrivals, int bytes) {
  if (watch()) {
    watch()->access(number(), arrivals, sizeof *arrivals, kRead | kWhole, ALBERT_CODE);
    watch()->access(number(), arrivals, sizeof *arrivals, kWrite | kWhole, ALBERT_CODE);
    watch()->tell_in_phase(arrivals, number());
  }
  if (arrivals->expected != 0) fail("a phase of arrivals is expected before the one before it is over");
  arrivals->expected = 1;
  arrivals->missing += bytes;
  end_phase(arrivals);
}
void wait(Arrivals* arrivals, uint32_t phase) {
  while ((arrivals->phase & 1) == (phase & 1)) pause();
  if (!watch()) return;
  watch()->access(number(), arrivals, sizeof *arrivals, kRead | kWhole, ALBERT_CODE);
  watch()->learn_by(arrivals, number());
}
void send(void* local, Arrivals* arrivals, int rank, const void* from, size_t bytes) {
  const Machine& m = *machine;
  const int own = self().block, cluster = m.launch.cluster;
  const size_t place = static_cast<size_t>(static_cast<char*>(local) - shared_memory());
  if (rank < 0 || rank >= cluster || place % bytes != 0 || place + bytes > m.launch.shared_bytes)
    fail("what a block sends is not aligned, or not for the shared memory of one of its cluster");
  const size_t to = static_cast<size_t>(own / cluster * cluster + rank);
  if (m.ended[to] > 0) fail("a block sends to another one that may be gone");
  char* other = m.shared[to];
  auto* count = reinterpret_cast<Arrivals*>(other + (reinterpret_cast<char*>(arrivals) - shared_memory()));
  if (watch()) watch()->send(number(), other + place, bytes, count, sizeof *count, ALBERT_CODE);
  std::memcpy(other + place, from, bytes);
  count->missing -= static_cast<int32_t>(bytes);
  end_phase(count);
  tell_others();
}

}  // namespace albert::host
