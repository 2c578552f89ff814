#include "watch.h"

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "machine.h"

namespace albert::host {

Memory*& watched_memory() {
  static Memory* memory = nullptr;
  return memory;
}

// ------------------------------------------------------------------------------------------------------------- memory

Memory::Memory() {
  void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  all_ = static_cast<char*>(p);
  next_ = all_ + kApart;
}
Memory::~Memory() { munmap(all_, kBytes); }

char* Memory::room(size_t bytes) {
  if (bytes + 2 * kApart > static_cast<size_t>(all_ + kBytes - next_)) throw std::bad_alloc();
  char* begin = next_;
  next_ += (bytes + kApart - 1) / kApart * kApart + kApart;
  std::memset(begin, 0xff, bytes);  // NaN
  return begin;
}
void Memory::add(const char* name, void* begin, size_t bytes, Use use, int block, void* original) {
  const size_t places = use == Use::kConstant ? 0 : (bytes + 3) / 4;
  regions_[static_cast<char*>(begin)] = {name, static_cast<char*>(begin), bytes, use, block, original,
                                         std::vector<Place>(places)};
}
void* Memory::take(const char* name, void* original, size_t bytes, Use use) {
  char* begin = room(bytes);
  if (use == Use::kConstant) std::memcpy(begin, original, bytes);
  add(name, begin, bytes, use, -1, original);
  return begin;
}
char* Memory::shared(int block, size_t bytes) {
  char* begin = room(bytes);
  add("shared memory", begin, bytes, Use::kScratch, block, nullptr);
  return begin;
}
void Memory::part(const char* name, void* begin, size_t bytes) { add(name, begin, bytes, Use::kScratch, -1, nullptr); }
void Memory::set_zero(void* begin, size_t bytes) {
  std::memset(begin, 0, bytes);
  Region* region = find(begin);
  for (size_t i = 0; i < bytes / 4; ++i)
    region->places[static_cast<size_t>(static_cast<char*>(begin) - region->begin) / 4 + i].written = 15;
}
void Memory::give_back() const {
  for (const auto& [begin, region] : regions_)
    if (region.use == Use::kOutput) std::memcpy(region.original, region.begin, region.bytes);
}
Region* Memory::find(const void* p) {
  const char* at = static_cast<const char*>(p);
  if (last_ == nullptr || at < last_->begin || at >= last_->begin + last_->bytes) last_ = before(p);
  return last_ != nullptr && at < last_->begin + last_->bytes ? last_ : nullptr;
}
Region* Memory::before(const void* p) {
  auto next = regions_.upper_bound(static_cast<const char*>(p));
  return next == regions_.begin() ? nullptr : &(--next)->second;
}

// -------------------------------------------------------------------------------------------------------------- clocks

namespace {

constexpr size_t kOfPart = std::tuple_size<decltype(Part::clocks)>::value;

uint32_t time_of(const Clocks& clocks, size_t agent) {
  const size_t part = agent / kOfPart;
  return clocks && part < clocks->size() && (*clocks)[part] ? (*clocks)[part]->clocks[agent % kOfPart] : 0;
}

// Of what was joined lately: many threads join the same.
template <class X>
struct Joined {
  struct Entry {
    std::shared_ptr<const X> a, b, both;
  };
  std::vector<Entry> entries{1 << 14};
  Entry& of(const std::shared_ptr<const X>& a, const std::shared_ptr<const X>& b) {
    const uintptr_t key = reinterpret_cast<uintptr_t>(a.get()) / 16 * 31 + reinterpret_cast<uintptr_t>(b.get()) / 16;
    return entries[key % entries.size()];
  }
};

// The later of both times, of each agent. Where one has them all it is the result, and no new object.
template <class X, class Make>
std::shared_ptr<const X> join(const std::shared_ptr<const X>& a, const std::shared_ptr<const X>& b, Make make) {
  if (!b || a == b) return a;
  if (!a) return b;
  static Joined<X> joined;
  auto& known = joined.of(a, b);
  if (known.a == a && known.b == b) return known.both;
  const X both = make(*a, *b);
  known = {a, b, both == *a ? a : both == *b ? b : std::make_shared<const X>(both)};
  return known.both;
}
std::shared_ptr<const Part> join(const std::shared_ptr<const Part>& a, const std::shared_ptr<const Part>& b) {
  return join(a, b, [](const Part& x, const Part& y) {
    Part both;
    for (size_t i = 0; i < kOfPart; ++i) both.clocks[i] = std::max(x.clocks[i], y.clocks[i]);
    return both;
  });
}
void join_to(Parts& to, const Parts& x) {
  if (to.size() < x.size()) to.resize(x.size());
  for (size_t i = 0; i < x.size(); ++i)
    if (to[i] != x[i]) to[i] = join(to[i], x[i]);
}
Clocks join(const Clocks& a, const Clocks& b) {
  return join(a, b, [](const Parts& x, const Parts& y) {
    Parts both(x);
    join_to(both, y);
    return both;
  });
}
Clocks told(const Sum& sum) { return sum.parts.empty() ? nullptr : std::make_shared<const Parts>(sum.parts); }

// Where in this library: what addr2line takes.
uint32_t offset_of(const void* code) {
  static const char* const base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&watched_memory), &info);
    return static_cast<const char*>(info.dli_fbase);
  }();
  return code == nullptr ? 0 : static_cast<uint32_t>(static_cast<const char*>(code) - base);
}
std::string hexadecimal(uint32_t x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", x);
  return text;
}
const char* verb(uint8_t kind) { return kind & kWrite ? "writes" : "reads"; }

}  // namespace

void Sum::add(const Clocks& x) {
  if (!x || std::find(added.begin(), added.end(), x) != added.end()) return;
  added[count++ % added.size()] = x;
  join_to(parts, *x);
}
void Sum::set(size_t agent, uint32_t clock) {
  const size_t part = agent / kOfPart;
  if (parts.size() <= part) parts.resize(part + 1);
  auto with = parts[part] ? std::make_shared<Part>(*parts[part]) : std::make_shared<Part>();
  with->clocks[agent % kOfPart] = std::max(with->clocks[agent % kOfPart], clock);
  parts[part] = std::move(with);
}
Known Telling::told() const { return {host::told(seen), host::told(done), host::told(read)}; }
Known Telling::take() {
  const Known known = told();
  seen = done = read = {};
  return known;
}

Watch::Watch(Memory& memory, int threads, int threads_of_block)
    : memory_(memory), threads_(static_cast<size_t>(threads)), threads_of_block_(threads_of_block), agents_(threads_) {}

void Watch::tell(int thread, Telling& to, bool strong) {
  const size_t self = static_cast<size_t>(thread), beside = threads_ + self;
  Agent& agent = agents_[self];
  to.read.add(agent.known.read);
  to.read.set(self, agent.clock);
  to.done.add(agent.known.done);
  if (agent.waited > 0) to.done.set(beside, agent.waited);
  if (strong) {
    to.seen.add(agent.known.seen);
    if (agent.waited > 0) to.seen.set(beside, agent.waited);
    for (Sum* sum : {&to.seen, &to.done}) sum->set(self, agent.clock);
  }
  ++agent.clock;
}
void Watch::learn(int thread, const Known& known) {
  Agent& agent = agents_[static_cast<size_t>(thread)];
  agent.known = {join(agent.known.seen, known.seen), join(agent.known.done, known.done),
                 join(agent.known.read, known.read)};
  agent.has_news = true;
}
void Watch::learn_in_warp(int thread, const Known& known) {
  learn(thread, known);
  agents_[static_cast<size_t>(thread)].has_news = false;
}

void Watch::tell_by(const void* p, int thread) {
  Telling telling;
  tell(thread, telling, false);
  channels_[p].told = telling.take();
}
void Watch::add_by(const void* p, int thread) {
  Channel& channel = channels_[p];
  tell(thread, channel.telling, true);
  channel.told = channel.telling.told();
}
void Watch::learn_by(const void* p, int thread) {
  if (const auto found = channels_.find(p); found != channels_.end()) learn(thread, found->second.told);
}
void Watch::tell_in_phase(const void* p, int thread) { tell(thread, channels_[p].telling, true); }
void Watch::end_phase(const void* p) {
  Channel& channel = channels_[p];
  const Known phase = channel.telling.take();
  channel.told = {join(channel.told.seen, phase.seen), join(channel.told.done, phase.done),
                  join(channel.told.read, phase.read)};
}

// ------------------------------------------------------------------------------------------------------------ accesses

std::string Watch::name(size_t agent) const {
  const std::string what = agent < threads_ ? "thread " : "what goes on beside thread ";
  const int thread = static_cast<int>(agent % threads_);
  return "block " + std::to_string(thread / threads_of_block_) + ", " + what + std::to_string(thread % threads_of_block_);
}

Region& Watch::region_of(int thread, const void* p, size_t bytes, const char* does, bool of_others, const void* code) {
  Region* region = memory_.find(p);
  const auto fault = [&](const std::string& what) {
    fail(name(static_cast<size_t>(thread)) + " " + does + " " + std::to_string(bytes) + " bytes " + what + " (code at " +
         hexadecimal(offset_of(code)) + ")");
  };
  const char* const at = static_cast<const char*>(p);
  if (region == nullptr || at + bytes > region->begin + region->bytes) {
    const Region* before = memory_.before(p);
    fault(before == nullptr ? "before all that the launch was given"
                            : std::to_string(at + bytes - before->begin) + " from the begin of " + before->name +
                                  ", which has " + std::to_string(before->bytes));
  }
  if (region->block >= 0 && !of_others && region->block != thread / threads_of_block_)
    fault("of block " + std::to_string(region->block) + "'s shared memory, by an address of its own");
  return *region;
}

bool Watch::ordered(int thread, const Access& before, bool writes) const {
  const size_t self = static_cast<size_t>(thread), other = before.agent;
  const Agent& agent = agents_[self];
  if (other == self || (other == threads_ + self && before.clock <= agent.waited)) return true;
  const Clocks& known = !(before.kind & kWrite) ? agent.known.read : writes ? agent.known.done : agent.known.seen;
  return before.clock <= time_of(known, other);
}

void Watch::note(int thread, Region& region, const void* p, size_t bytes, Access now) {
  const size_t begin = static_cast<size_t>(static_cast<const char*>(p) - region.begin), end = begin + bytes;
  const bool writes = now.kind & kWrite;
  for (size_t i = begin / 4; i * 4 < end; ++i) {
    const size_t first = std::max(begin, i * 4) - i * 4, last = std::min(end, i * 4 + 4) - i * 4;
    now.bytes = static_cast<uint8_t>((1u << last) - (1u << first));
    Place& place = region.places[i];
    const auto fault = [&](const std::string& what, uint32_t code) {
      fail(name(now.agent) + " " + verb(now.kind) + " " + std::to_string(bytes) + " bytes of " + region.name + " at " +
           std::to_string(begin) + ", " + what + " (code at " + hexadecimal(now.code) +
           (code == 0 ? ")" : ", and at " + hexadecimal(code) + ")"));
    };
    // Other reads of what nobody wrote are no faults: rows beyond the tokens, columns beyond the last, which nobody uses.
    if (now.kind == (kRead | kWhole) && (now.bytes & ~place.written) != 0) fault("which nobody wrote", 0);
    for (const Access& before : place.accesses) {
      const bool meets = (before.bytes & now.bytes) != 0 && ((before.kind | now.kind) & kWrite) != 0;
      if (meets && !(before.kind & now.kind & kWhole) && !ordered(thread, before, writes))
        fault("which " + name(before.agent) + (before.kind & kWrite ? " wrote" : " read") + ", and nothing orders the two",
              before.code);
    }
    // Who comes after this one comes after what this one came after.
    const auto follows = [&](const Access& before) {
      const bool covered = (before.bytes & ~now.bytes) == 0 && (writes || !(before.kind & kWrite));
      const bool alike = !(now.kind & kWhole) || (before.kind & kWhole);  // or it may be a race where this is none
      return covered && alike && ordered(thread, before, writes);
    };
    place.accesses.erase(std::remove_if(place.accesses.begin(), place.accesses.end(), follows), place.accesses.end());
    place.accesses.push_back(now);
    if (writes) place.written |= now.bytes;
  }
}

void Watch::access(int thread, const void* p, size_t bytes, uint8_t kind, const void* code) {
  Region& region = region_of(thread, p, bytes, verb(kind), false, code);
  if (region.use == Use::kConstant) {
    if (kind & kWrite) fail(name(static_cast<size_t>(thread)) + " writes to " + region.name + ", which is constant");
    return;
  }
  Agent& agent = agents_[static_cast<size_t>(thread)];
  agent.has_news = true;
  note(thread, region, p, bytes, {static_cast<uint32_t>(thread), agent.clock, offset_of(code), kind, 0});
}
void Watch::read_constant(int thread, const void* p, size_t bytes) {
  const Region& region = region_of(thread, p, bytes, "reads", false, nullptr);
  if (region.use != Use::kConstant)
    fail(name(static_cast<size_t>(thread)) + " reads " + region.name + " as what nobody writes");
}
void Watch::copy(int thread, const void* p, size_t bytes, const void* code) {
  Agent& agent = agents_[static_cast<size_t>(thread)];
  const auto beside = static_cast<uint32_t>(threads_ + static_cast<size_t>(thread));
  note(thread, region_of(thread, p, bytes, "copies", false, code), p, bytes,
       {beside, ++agent.beside, offset_of(code), kWrite, 0});
}
void Watch::wait_copies(int thread) {
  Agent& agent = agents_[static_cast<size_t>(thread)];
  agent.waited = agent.beside;
}
void Watch::send(int thread, const void* p, size_t bytes, const void* arrivals, size_t arrivals_bytes, const void* code) {
  Agent& agent = agents_[static_cast<size_t>(thread)];
  const auto beside = static_cast<uint32_t>(threads_ + static_cast<size_t>(thread));
  ++agent.beside;
  const auto send_to = [&](const void* to, size_t size, uint8_t kind) {
    note(thread, region_of(thread, to, size, "sends", true, code), to, size,
         {beside, agent.beside, offset_of(code), kind, 0});
  };
  send_to(p, bytes, kWrite);
  send_to(arrivals, arrivals_bytes, kWrite | kWhole);
  Telling& telling = channels_[arrivals].telling;
  tell(thread, telling, false);
  for (Sum* sum : {&telling.seen, &telling.done}) sum->set(beside, agent.beside);
}

}  // namespace albert::host
