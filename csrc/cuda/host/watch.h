// Watches what a launch does to memory, as compute-sanitizer's tools do on a GPU, but across blocks, too, and whatever
// order the threads happen to take: an access outside of what the launch was given (or of the block's shared memory),
// a word that is read before it is cleared, a write to what is constant, and two accesses of one place, at least one of them a write,
// that nothing orders.
//
// Order is kept by vector clocks, after FastTrack (Flanagan and Freund, 2009): each thread has a clock, and knows of every
// other one up to which time of it
//   - what that one wrote is seen here (`seen`), as a barrier, a release and an acquire, or arrived bytes bring about;
//   - what it wrote is done, so that a later write from here comes after it (`done`);
//   - what it read has been read (`read`).
// Words and a warp's instructions carry values and order nothing else: with them come `read`, for who tells what it
// computed has what it computed it from, and what the teller knew to be done, but nothing is seen by them. Copies that
// go on beside the thread that started them (sends, copies into shared memory) count as those of another one. What a GPU may
// still do otherwise: take a thread's own accesses to different places in another order, where nothing depends on it.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace albert::host {

enum Kind : uint8_t { kRead = 0, kWrite = 1, kWhole = 2 };  // kWhole: two of them at a time are no race
enum class Use { kConstant, kScratch, kOutput };            // kOutput: comes back to who called

// An access that a later one may have to come after.
struct Access {
  uint32_t agent;  // a thread, or after all threads what goes on beside it
  uint32_t clock;  // its
  uint32_t code;   // where in the library
  uint8_t kind;
  uint8_t bytes;  // of the place's four, a bit each
};
struct Place {
  std::vector<Access> accesses;
  uint8_t written = 0;  // bytes, a bit each
};
struct Region {
  std::string name;
  char* begin;
  size_t bytes;
  Use use;
  int block;  // whose shared memory it is; -1: all blocks'
  void* original;
  std::vector<Place> places;
};

// Copies of what a launch is given, far apart, so that what is beyond one of them is in no other.
class Memory {
 public:
  Memory();
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  template <class T>
  T* constant(const char* name, T* original, size_t bytes) {
    return static_cast<T*>(take(name, const_cast<void*>(static_cast<const void*>(original)), bytes, Use::kConstant));
  }
  void* output(const char* name, void* original, size_t bytes) { return take(name, original, bytes, Use::kOutput); }
  char* shared(int block, size_t bytes);
  char* room(size_t bytes);  // that belongs to nothing before part() says so
  void part(const char* name, void* begin, size_t bytes);
  void set_zero(void* begin, size_t bytes);  // by who launches
  void give_back() const;                    // outputs

  Region* find(const void* p);
  Region* before(const void* p);  // that begins there, or is the last one to begin before
  bool has(const void* p) const { return static_cast<size_t>(static_cast<const char*>(p) - all_) < kBytes; }

 private:
  static constexpr size_t kBytes = size_t{1} << 30, kApart = 4096;  // of addresses: memory comes as it is touched
  void* take(const char* name, void* original, size_t bytes, Use use);
  void add(const char* name, void* begin, size_t bytes, Use use, int block, void* original);

  char* all_;
  char* next_;
  std::map<const char*, Region> regions_;
  Region* last_ = nullptr;
};

// The clocks of all agents, in parts that those who know the same share: mostly little is new.
struct Part {
  std::array<uint32_t, 256> clocks{};
  bool operator==(const Part& other) const { return clocks == other.clocks; }
};
using Parts = std::vector<std::shared_ptr<const Part>>;  // null: zeros
using Clocks = std::shared_ptr<const Parts>;
struct Known {
  Clocks seen, done, read;
};
// What several threads tell, until it is told.
struct Sum {
  Parts parts;
  std::array<Clocks, 16> added;  // lately: threads that share what they know are the rule
  size_t count = 0;
  void add(const Clocks& x);
  void set(size_t agent, uint32_t clock);
};
struct Telling {
  Sum seen, done, read;
  Known told() const;
  Known take();
  bool empty() const { return read.parts.empty() && seen.parts.empty(); }
};

class Watch {
 public:
  Watch(Memory& memory, int threads, int threads_of_block);

  // What `thread` does to memory; what is wrong with it ends the launch.
  void access(int thread, const void* p, size_t bytes, uint8_t kind, const void* code);
  void read_constant(int thread, const void* p, size_t bytes);
  // What goes on beside it: a copy into its block's shared memory, or a send into that of another block.
  void copy(int thread, const void* p, size_t bytes, const void* code);
  void wait_copies(int thread);
  void send(int thread, const void* p, size_t bytes, const void* arrivals, size_t arrivals_bytes, const void* code);

  // strong: what it wrote is seen by who learns of it.
  void tell(int thread, Telling& to, bool strong);
  void learn(int thread, const Known& known);
  // Between a warp's instructions there is mostly nothing new.
  bool has_news(int thread) const { return agents_[static_cast<size_t>(thread)].has_news; }
  void learn_in_warp(int thread, const Known& known);

  // Of what lies at an address, by which threads tell each other.
  void tell_by(const void* p, int thread);        // a word, in place of the one before
  void add_by(const void* p, int thread);         // a release, beside those before
  void tell_in_phase(const void* p, int thread);  // a release, once the phase of arrivals has ended
  void learn_by(const void* p, int thread);
  void end_phase(const void* p);

 private:
  struct Agent {
    uint32_t clock = 1, beside = 0, waited = 0;  // beside: of its copies, of which it has waited for so many
    bool has_news = false;
    Known known;
  };
  struct Channel {
    Telling telling;
    Known told;
  };
  Region& region_of(int thread, const void* p, size_t bytes, const char* does, bool of_others, const void* code);
  void note(int thread, Region& region, const void* p, size_t bytes, Access now);
  bool ordered(int thread, const Access& before, bool writes) const;
  std::string name(size_t agent) const;

  Memory& memory_;
  const size_t threads_;
  const int threads_of_block_;
  std::vector<Agent> agents_;
  std::unordered_map<const void*, Channel> channels_;
};

// Of the next launch; null: it is not watched.
Memory*& watched_memory();

}  // namespace albert::host
