// What a thread of an emulated kernel asks of the scheduler: to wait, for shared memory, to fail.
#pragma once

#include "emulation.h"

namespace emulation {

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

inline void Scheduler::cluster_barrier(const std::source_location& place) {
  const Quietly quietly;
  current->waiting = Waiting::at_cluster_barrier;
  current->given = 0;
  current->place = place;
  wait();
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
  void* array = residents_[rank].shared.array(key, name, bytes, alignment);
  if (array == nullptr) fail(std::string("no room for the shared array ") + name);
  return array;
}

inline void* Scheduler::dynamic_shared() {
  static const char key = 0;
  if (dynamic_bytes_ == 0) fail("uses dynamic shared memory, but was launched with none");
  return shared(&key, "dynamic shared memory", dynamic_bytes_, 128);
}

inline void* Scheduler::at_rank(const void* own, unsigned other) {
  const Quietly quietly;
  if (other >= cluster) fail("asks for a block beyond its cluster");
  void* const there = residents_[rank].shared.twin(own, residents_[other].shared);
  const Thread* const first = &threads_[other * count()];
  const bool returned = std::all_of(first, first + count(),
                                    [](const Thread& t) { return t.waiting == Waiting::finished; });
  if (there == nullptr || returned) {
    fail("asks for " + memory_name(own) + " of block " + described(residents_[other].index) +
         ", which has " + (returned ? "returned" : "not declared it yet"));
  }
  return there;
}

inline unsigned Scheduler::owner(const void* address) const {
  for (unsigned r = 0; r < cluster && r < residents_.size(); ++r) {
    if (residents_[r].shared.contains(address)) return r;
  }
  return cluster;
}

inline std::string Scheduler::memory_name(const void* address) const {
  const unsigned r = owner(address);
  if (r >= cluster) return "global memory";
  const std::string whose = r == rank ? "" : " of block " + described(residents_[r].index);
  return residents_[r].shared.name(address) + whose;
}

inline bool Scheduler::owns(const void* address) const {
  const auto inside = [&](const void* begin, size_t bytes) {
    return address >= begin && address < static_cast<const char*>(begin) + bytes;
  };
  return stacks_.contains(address) || inside(this, sizeof *this) ||
         inside(threads_.data(), threads_.size() * sizeof(Thread));
}

}  // namespace emulation
