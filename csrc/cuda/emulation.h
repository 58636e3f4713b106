// CUDA kernels on the CPU: one fibre per thread, blocks one after another, and a scheduler that
// releases barriers and warp operations. Deterministic: a run depends on the chosen order and
// nothing else.
//
// Found here, each with the source line and the threads concerned: divergent and unreachable
// barriers, warp operations whose lanes disagree, launches beyond the device's limits, writes past
// a shared array. Shared memory is NaN until written. Threads and blocks run ascending, descending
// or shuffled; between two barriers a thread runs without interruption, so races are left to
// tests/cuda/races.cpp.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation_fibre.h"
#include "emulation_memory.h"

namespace emulation {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Order : int { ascending, descending, shuffled };
enum class Waiting : uint8_t { nowhere, at_block_barrier, at_warp_operation, finished };
enum class Operation : uint8_t { sync, shuffle, ballot };

struct Thread {
  Fibre fibre;
  uint3 index;
  unsigned linear;
  Waiting waiting;
  Operation operation;
  unsigned mask, source;       // of a warp operation
  uint64_t given, received;    // deposited on arrival, handed out on release
  unsigned warp_phase;         // warp barriers passed
  std::source_location place;  // where it waits
};

constexpr unsigned warp_size = 32, block_limit = 1024;

class Scheduler {
 public:
  dim3 grid, block;
  uint3 block_index{};
  Thread* current = nullptr;  // null while host code runs
  bool quiet = true;          // while the scheduler's own code runs
  Order order = Order::ascending;
  uint64_t seed = 1;
  unsigned launches = 0, block_linear = 0, phase = 0;  // phase: block barriers passed

  void run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& body);
  uint64_t block_barrier(bool predicate, const std::source_location& place);
  uint64_t warp_operation(Operation operation, unsigned mask, uint64_t given, unsigned source,
                          const std::source_location& place);
  void* shared(const void* key, const char* name, size_t bytes, size_t alignment);
  void* dynamic_shared();
  [[noreturn]] void fail(const std::string& message);  // from inside a kernel
  bool owns(const void* address) const;                // fibre stacks and the scheduler itself
  bool is_shared(const void* address) const { return shared_.contains(address); }
  std::string memory_name(const void* address) const { return shared_.name(address); }

 private:
  void run_block(const std::vector<unsigned>& sequence);
  bool release_block();
  bool release_warp(Thread* first, unsigned lanes);
  void release_lanes(Thread* first, unsigned lanes, unsigned mask);
  void wait();
  std::string deadlock() const;
  std::vector<unsigned> sequence(unsigned count, uint64_t salt) const;
  static void enter();

  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  Stacks stacks_;
  SharedMemory shared_;
  size_t dynamic_bytes_ = 0;
  std::string failure_;
};

inline Scheduler scheduler;

// The race detector looks away while one of these lives. The compiler sees no reader of `quiet`:
// the fences keep it from moving the kernel's own accesses across the border, or dropping the
// border.
struct Quietly {
  Quietly() { set(true); }
  ~Quietly() { set(false); }
  static void set(bool quiet) {
    asm volatile("" ::: "memory");
    scheduler.quiet = quiet;
    asm volatile("" ::: "memory");
  }
};

inline bool same(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         !std::strcmp(a.file_name(), b.file_name());
}

inline std::string described(const uint3& i) {
  return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")";
}

inline std::string described(const std::source_location& place) {
  const std::string path = place.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(place.line());
}

inline std::vector<unsigned> Scheduler::sequence(unsigned count, uint64_t salt) const {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (order == Order::descending) std::reverse(result.begin(), result.end());
  if (order != Order::shuffled) return result;
  uint64_t state = seed * 0x9E3779B97F4A7C15ull + salt;
  for (unsigned i = count; i > 1; --i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    std::swap(result[i - 1], result[(state >> 33) % i]);
  }
  return result;
}

// Told of every launch; defined in tests/cuda/control.cpp, absent without it.
extern "C" __attribute__((weak)) void fastreid_vi_emulation_launched(const dim3* grid,
                                                                     const dim3* block,
                                                                     size_t shared_bytes);

inline void Scheduler::run(dim3 grid_size, dim3 block_size, size_t shared_bytes,
                           const std::function<void()>& body) {
  const uint64_t threads = uint64_t(block_size.x) * block_size.y * block_size.z;
  if (threads == 0 || threads > block_limit || block_size.z > 64) {
    throw Error("launch: expected 1 to 1024 threads a block, got " + std::to_string(threads));
  }
  if (!grid_size.x || !grid_size.y || !grid_size.z || grid_size.x > 0x7FFFFFFFu ||
      grid_size.y > 65535 || grid_size.z > 65535) {
    throw Error("launch: grid " + described(uint3(grid_size)) + " is outside the device's limits");
  }
  if (shared_bytes > shared_limit) {
    throw Error("launch: " + std::to_string(shared_bytes) +
                " bytes of dynamic shared memory, limit " + std::to_string(shared_limit));
  }
  grid = grid_size;
  block = block_size;
  dynamic_bytes_ = shared_bytes;
  body_ = &body;
  failure_.clear();
  ++launches;
  if (fastreid_vi_emulation_launched) {
    fastreid_vi_emulation_launched(&grid_size, &block_size, shared_bytes);
  }
  threads_.assign(threads, Thread{});
  stacks_.reserve(static_cast<unsigned>(threads));
  const unsigned blocks = grid.x * grid.y * grid.z;
  for (const unsigned linear : sequence(blocks, 0)) {
    block_linear = linear;
    block_index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    run_block(sequence(static_cast<unsigned>(threads), linear + 1));
  }
}

inline void Scheduler::run_block(const std::vector<unsigned>& sequence) {
  const unsigned count = static_cast<unsigned>(threads_.size());
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = threads_[i];
    thread = Thread{};
    thread.linear = i;
    thread.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    stacks_.prepare(thread.fibre, i, &Scheduler::enter);
  }
  phase = 0;
  shared_.clear();
  while (true) {
    bool progress = false;
    for (const unsigned i : sequence) {
      if (threads_[i].waiting != Waiting::nowhere) continue;
      current = &threads_[i];
      stacks_.resume(threads_[i].fibre);
      current = nullptr;
      progress = true;
      if (!failure_.empty()) throw Error(failure_);
    }
    for (unsigned first = 0; first < count; first += warp_size) {
      progress |= release_warp(&threads_[first], std::min(warp_size, count - first));
    }
    progress |= release_block();
    if (!failure_.empty()) throw Error(failure_);
    if (std::all_of(threads_.begin(), threads_.end(),
                    [](const Thread& t) { return t.waiting == Waiting::finished; })) {
      const std::string damage = shared_.damage();
      if (damage.empty()) return;
      throw Error("block " + described(block_index) + " " + damage);
    }
    if (!progress) throw Error(deadlock());
  }
}

// Threads that have returned do not count, as on the device.
inline bool Scheduler::release_block() {
  const Thread* first = nullptr;
  uint64_t agreeing = 0;
  for (const Thread& t : threads_) {
    if (t.waiting == Waiting::finished) continue;
    if (t.waiting != Waiting::at_block_barrier) return false;
    if (first == nullptr) first = &t;
    if (!same(t.place, first->place)) {
      failure_ = "divergent barrier in block " + described(block_index) + ": thread " +
                 described(first->index) + " waits at " + described(first->place) + ", thread " +
                 described(t.index) + " at " + described(t.place);
      return false;
    }
    agreeing += t.given;
  }
  if (first == nullptr) return false;
  for (Thread& t : threads_) {
    if (t.waiting != Waiting::at_block_barrier) continue;
    t.waiting = Waiting::nowhere;
    t.received = agreeing;
  }
  ++phase;
  return true;
}

inline bool Scheduler::release_warp(Thread* first, unsigned lanes) {
  bool released = false;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    const Thread& one = first[lane];
    if (one.waiting != Waiting::at_warp_operation) continue;
    bool complete = true;
    for (unsigned other = 0; other < lanes; ++other) {
      const Thread& t = first[other];
      if (!(one.mask >> other & 1) || t.waiting == Waiting::finished) continue;
      complete &= t.waiting == Waiting::at_warp_operation;
      if (!complete) break;
      if (t.mask != one.mask || t.operation != one.operation || !same(t.place, one.place)) {
        failure_ = "divergent warp operation in block " + described(block_index) + ": thread " +
                   described(one.index) + " waits at " + described(one.place) + ", thread " +
                   described(t.index) + " at " + described(t.place) +
                   (t.mask != one.mask ? " with another mask" : "");
        return false;
      }
    }
    if (!complete) continue;
    release_lanes(first, lanes, one.mask);
    released = true;
  }
  return released;
}

inline void Scheduler::release_lanes(Thread* first, unsigned lanes, unsigned mask) {
  uint64_t ballot = 0;
  const auto present = [&](unsigned lane) {
    return lane < lanes && (mask >> lane & 1) && first[lane].waiting == Waiting::at_warp_operation;
  };
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (present(lane) && first[lane].given) ballot |= uint64_t(1) << lane;
  }
  // A lane that reads one outside the group gets NaN: the device leaves the value undefined.
  for (unsigned lane = 0; lane < lanes; ++lane) {
    Thread& t = first[lane];
    if (!present(lane)) continue;
    const bool shuffle = t.operation == Operation::shuffle;
    t.received = !shuffle ? ballot : present(t.source) ? first[t.source].given : ~uint64_t(0);
    if (t.operation == Operation::sync) ++t.warp_phase;
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (present(lane)) first[lane].waiting = Waiting::nowhere;
  }
}

inline std::string Scheduler::deadlock() const {
  std::string message = "deadlock in block " + described(block_index) + ":";
  std::vector<bool> told(threads_.size());
  for (size_t i = 0; i < threads_.size(); ++i) {
    if (told[i]) continue;
    const Thread& one = threads_[i];
    unsigned count = 0;
    for (size_t j = i; j < threads_.size(); ++j) {
      const Thread& t = threads_[j];
      const bool alike = one.waiting == Waiting::finished || same(t.place, one.place);
      if (t.waiting != one.waiting || !alike) continue;
      told[j] = true;
      ++count;
    }
    message += " " + std::to_string(count) + " of " + std::to_string(threads_.size()) +
               " threads (" + described(one.index) + " first) ";
    if (one.waiting == Waiting::finished) {
      message += "returned;";
    } else {
      message += one.waiting == Waiting::at_block_barrier ? "wait at the barrier "
                                                          : "wait at the warp operation ";
      message += described(one.place) + ";";
    }
  }
  message.pop_back();
  return message;
}

inline void Scheduler::enter() {
  Quietly::set(false);
  (*scheduler.body_)();
  Quietly::set(true);
  scheduler.current->waiting = Waiting::finished;
  scheduler.stacks_.leave(scheduler.current->fibre, true);
  std::abort();  // a finished fibre is never resumed
}

inline void Scheduler::wait() { stacks_.leave(current->fibre, false); }

[[noreturn]] inline void Scheduler::fail(const std::string& message) {
  Quietly::set(true);
  failure_ = "thread " + described(current->index) + " of block " + described(block_index) + ": " +
             message;
  current->waiting = Waiting::finished;
  stacks_.leave(current->fibre, true);
  std::abort();
}

inline uint64_t Scheduler::block_barrier(bool predicate, const std::source_location& place) {
  const Quietly quietly;
  current->waiting = Waiting::at_block_barrier;
  current->given = predicate;
  current->place = place;
  wait();
  return current->received;
}

inline uint64_t Scheduler::warp_operation(Operation operation, unsigned mask, uint64_t given,
                                          unsigned source, const std::source_location& place) {
  const Quietly quietly;
  if (!(mask >> current->linear % warp_size & 1)) {
    fail("calls the warp operation " + described(place) +
         " with a mask that leaves its own lane out");
  }
  current->waiting = Waiting::at_warp_operation;
  current->operation = operation;
  current->mask = mask;
  current->given = given;
  current->source = source;
  current->place = place;
  wait();
  return current->received;
}

inline void* Scheduler::shared(const void* key, const char* name, size_t bytes, size_t alignment) {
  const Quietly quietly;
  void* array = shared_.array(key, name, bytes, alignment);
  if (array == nullptr) fail(std::string("no room for the shared array ") + name);
  return array;
}

inline void* Scheduler::dynamic_shared() {
  static const char key = 0;
  if (dynamic_bytes_ == 0) fail("uses dynamic shared memory, but was launched with none");
  return shared(&key, "dynamic shared memory", dynamic_bytes_, 128);
}

inline bool Scheduler::owns(const void* address) const {
  const auto inside = [&](const void* begin, size_t bytes) {
    return address >= begin && address < static_cast<const char*>(begin) + bytes;
  };
  return stacks_.contains(address) || inside(this, sizeof *this) ||
         inside(threads_.data(), threads_.size() * sizeof(Thread));
}

}  // namespace emulation
