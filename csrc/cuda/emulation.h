// CUDA kernels on the CPU: one fibre per thread, blocks (or clusters of them) one after another,
// and a scheduler that releases barriers and warp operations. Deterministic: a run depends on the
// chosen order and nothing else.
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
enum class Waiting : uint8_t {
  nowhere,
  at_block_barrier,
  at_cluster_barrier,
  at_warp_operation,
  finished
};
enum class Operation : uint8_t { sync, shuffle, ballot };

struct Thread {
  Fibre fibre;
  uint3 index;
  unsigned linear, rank;  // within the block, of the block
  Waiting waiting;
  Operation operation;
  unsigned mask, source;       // of a warp operation
  uint64_t given, received;    // deposited on arrival, handed out on release
  unsigned warp_phase;         // warp barriers passed
  std::source_location place;  // where it waits
};

// A block of the cluster that runs.
struct Resident {
  uint3 index{};
  unsigned linear = 0, phase = 0;  // phase: block barriers passed
  SharedMemory shared;
};

constexpr unsigned warp_size = 32, block_limit = 1024, cluster_limit = 8;

class Scheduler {
 public:
  dim3 grid, block;
  unsigned cluster = 1;  // blocks in a cluster, along x
  uint3 block_index{};   // of the thread that runs, as the next four
  unsigned rank = 0, block_linear = 0, phase = 0, cluster_phase = 0;
  Thread* current = nullptr;  // null while host code runs
  bool quiet = true;          // while the scheduler's own code runs
  Order order = Order::ascending;
  uint64_t seed = 1;
  unsigned launches = 0;

  void run(dim3 grid_size, dim3 block_size, size_t shared_bytes, const std::function<void()>& body,
           unsigned cluster_size = 1);
  uint64_t block_barrier(bool predicate, const std::source_location& place);
  uint64_t warp_operation(Operation operation, unsigned mask, uint64_t given, unsigned source,
                          const std::source_location& place);
  void cluster_barrier(const std::source_location& place);
  void* shared(const void* key, const char* name, size_t bytes, size_t alignment);
  void* dynamic_shared();
  void* at_rank(const void* own, unsigned other);      // in the shared memory of another block
  [[noreturn]] void fail(const std::string& message);  // from inside a kernel
  bool owns(const void* address) const;                // fibre stacks and the scheduler itself
  bool is_shared(const void* address) const { return owner(address) < cluster; }
  std::string memory_name(const void* address) const;

 private:
  void check_launch(uint64_t threads, size_t shared_bytes) const;
  void run_cluster(const std::vector<unsigned>& sequence);
  void prepare(unsigned first_block);
  void resume(Thread& thread);
  bool release_barrier(Waiting barrier, unsigned first_rank, unsigned last_rank);
  bool release_warp(Thread* first, unsigned lanes);
  void release_lanes(Thread* first, unsigned lanes, unsigned mask);
  void wait();
  unsigned owner(const void* address) const;  // whose shared memory it is; none: `cluster`
  unsigned count() const { return block.x * block.y * block.z; }
  std::string deadlock() const;
  std::vector<unsigned> sequence(unsigned count, uint64_t salt) const;
  static void enter();

  const std::function<void()>* body_ = nullptr;
  std::vector<Thread> threads_;
  Stacks stacks_;
  std::vector<Resident> residents_;
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

inline void Scheduler::check_launch(uint64_t threads, size_t shared_bytes) const {
  if (threads == 0 || threads > block_limit || block.z > 64) {
    throw Error("launch: expected 1 to 1024 threads a block, got " + std::to_string(threads));
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    throw Error("launch: grid " + described(uint3(grid)) + " is outside the device's limits");
  }
  if (cluster == 0 || cluster > cluster_limit || grid.x % cluster) {
    throw Error("launch: grid " + described(uint3(grid)) + " does not divide into clusters of " +
                std::to_string(cluster) + " blocks, 8 at most");
  }
  if (shared_bytes > shared_limit) {
    throw Error("launch: " + std::to_string(shared_bytes) +
                " bytes of dynamic shared memory, limit " + std::to_string(shared_limit));
  }
}

inline void Scheduler::run(dim3 grid_size, dim3 block_size, size_t shared_bytes,
                           const std::function<void()>& body, unsigned cluster_size) {
  grid = grid_size;
  block = block_size;
  cluster = cluster_size;
  check_launch(uint64_t(block_size.x) * block_size.y * block_size.z, shared_bytes);
  dynamic_bytes_ = shared_bytes;
  body_ = &body;
  failure_.clear();
  ++launches;
  if (fastreid_vi_emulation_launched) {
    fastreid_vi_emulation_launched(&grid_size, &block_size, shared_bytes);
  }
  threads_.assign(count() * cluster, Thread{});
  stacks_.reserve(count() * cluster);
  if (residents_.size() < cluster) residents_.resize(cluster);
  for (const unsigned linear : sequence(grid.x * grid.y * grid.z / cluster, 0)) {
    prepare(linear * cluster);
    run_cluster(sequence(count() * cluster, linear + 1));
  }
}

inline void Scheduler::prepare(unsigned first_block) {
  for (unsigned i = 0; i < count() * cluster; ++i) {
    Thread& thread = threads_[i];
    thread = Thread{};
    thread.rank = i / count();
    thread.linear = i % count();
    thread.index = {thread.linear % block.x, thread.linear / block.x % block.y,
                    thread.linear / (block.x * block.y)};
    stacks_.prepare(thread.fibre, i, &Scheduler::enter);
  }
  for (unsigned r = 0; r < cluster; ++r) {
    const unsigned linear = first_block + r;
    residents_[r].index = {linear % grid.x, linear / grid.x % grid.y, linear / grid.x / grid.y};
    residents_[r].linear = linear;
    residents_[r].phase = 0;
    residents_[r].shared.clear();
  }
  cluster_phase = 0;
}

inline void Scheduler::resume(Thread& thread) {
  const Resident& resident = residents_[thread.rank];
  block_index = resident.index;
  block_linear = resident.linear;
  phase = resident.phase;
  rank = thread.rank;
  current = &thread;
  stacks_.resume(thread.fibre);
  current = nullptr;
}

inline void Scheduler::run_cluster(const std::vector<unsigned>& sequence) {
  while (true) {
    bool progress = false;
    for (const unsigned i : sequence) {
      if (threads_[i].waiting != Waiting::nowhere) continue;
      resume(threads_[i]);
      progress = true;
      if (!failure_.empty()) throw Error(failure_);
    }
    for (unsigned r = 0; r < cluster; ++r) {
      for (unsigned first = 0; first < count(); first += warp_size) {
        progress |=
            release_warp(&threads_[r * count() + first], std::min(warp_size, count() - first));
      }
      progress |= release_barrier(Waiting::at_block_barrier, r, r + 1);
    }
    progress |= release_barrier(Waiting::at_cluster_barrier, 0, cluster);
    if (!failure_.empty()) throw Error(failure_);
    if (std::all_of(threads_.begin(), threads_.end(),
                    [](const Thread& t) { return t.waiting == Waiting::finished; })) {
      break;
    }
    if (!progress) throw Error(deadlock());
  }
  for (unsigned r = 0; r < cluster; ++r) {
    const std::string damage = residents_[r].shared.damage();
    if (!damage.empty()) {
      throw Error("block " + described(residents_[r].index) + " " + damage);
    }
  }
}

// Of some blocks. Threads that have returned do not count, as on the device.
inline bool Scheduler::release_barrier(Waiting barrier, unsigned first_rank, unsigned last_rank) {
  Thread* const begin = &threads_[first_rank * count()];
  Thread* const end = threads_.data() + last_rank * count();
  const Thread* first = nullptr;
  uint64_t agreeing = 0;
  for (Thread* t = begin; t != end; ++t) {
    if (t->waiting == Waiting::finished) continue;
    if (t->waiting != barrier) return false;
    if (first == nullptr) first = t;
    if (!same(t->place, first->place)) {
      failure_ = "divergent barrier in block " + described(residents_[t->rank].index) +
                 ": thread " + described(first->index) + " waits at " + described(first->place) +
                 ", thread " + described(t->index) + " at " + described(t->place);
      return false;
    }
    agreeing += t->given;
  }
  if (first == nullptr) return false;
  for (Thread* t = begin; t != end; ++t) {
    if (t->waiting != barrier) continue;
    t->waiting = Waiting::nowhere;
    t->received = agreeing;
  }
  for (unsigned r = first_rank; r < last_rank; ++r) ++residents_[r].phase;
  if (barrier == Waiting::at_cluster_barrier) ++cluster_phase;
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
        failure_ = "divergent warp operation in block " + described(residents_[one.rank].index) +
                   ": thread " + described(one.index) + " waits at " + described(one.place) +
                   ", thread " + described(t.index) + " at " + described(t.place) +
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
      message += one.waiting == Waiting::at_block_barrier     ? "wait at the barrier "
                 : one.waiting == Waiting::at_cluster_barrier ? "wait at the cluster barrier "
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

}  // namespace emulation

#include "emulation_requests.h"
