// A race detector for emulated kernels. g++ -fsanitize=thread puts a call before every memory
// access of device code; instead of linking the sanitizer's own runtime, this file answers those
// calls with CUDA's rules: two accesses to a byte, one of them a write, by different threads, are a
// race unless the threads are of one block and a __syncthreads lies between, or of one warp and a
// __syncwarp does, or of two blocks and one took over from the other: a __threadfence, then an
// atomic hands over; an atomic on the same address, then a __threadfence takes over; or of two
// blocks of a cluster and a cluster barrier lies between. It does not matter in which order the
// threads happened to run. Also found: shared memory read before it was written.
#include <dlfcn.h>

#include <sstream>
#include <unordered_map>
#include <vector>

#include "emulation.h"

namespace {

using emulation::scheduler;

enum class Kind : uint8_t { none, read, write, atomic };

struct Access {
  Kind kind = Kind::none;
  uint16_t thread = 0;
  unsigned block = 0, phase = 0, warp_phase = 0, cluster_phase = 0;
  const void* code = nullptr;
};

// Of the reads since the last write three are enough: two by one block, of different warps where
// there are such, else of different threads, and one by another block. A later write that races
// with any of the others races with one of these.
struct Byte {
  Access write, reads[3];
};

// What a block has handed over: all before this phase, and what this thread did.
struct Handover {
  unsigned phase = 0, thread = 0;
  size_t turn = 0;  // how many blocks came to the same atomic before
};
using Handovers = std::unordered_map<unsigned, Handover>;  // by block

// What the present block has taken over: the first `turns` of these, visible to this thread, and to
// the others after the phase. Not before the fence.
struct Takeover {
  const Handovers* from;
  size_t turns;
  unsigned phase, thread;
  bool fenced;
};

std::unordered_map<const void*, Handovers> handed_over;  // by the atomic's address
std::vector<Takeover> taken_over;
std::unordered_map<unsigned, unsigned> fences;  // of the present block: phase of a thread's fence
unsigned present = 0;

constexpr uintptr_t kPage = 256;
std::unordered_map<uintptr_t, std::vector<Byte>> pages;
unsigned launch = 0;
bool watching = true;

unsigned cluster_of(const Access& a) { return a.block / scheduler.cluster; }
unsigned warp_of(const Access& a) { return a.thread / emulation::warp_size; }

bool ordered_by_atomics(const Access& before, const Access& now) {
  for (const Takeover& takeover : taken_over) {
    if (!takeover.fenced || (takeover.thread != now.thread && takeover.phase >= now.phase))
      continue;
    const auto found = takeover.from->find(before.block);
    if (found == takeover.from->end() || found->second.turn >= takeover.turns) continue;
    const Handover& handover = found->second;
    if (before.phase < handover.phase || before.thread == handover.thread) return true;
  }
  return false;
}

bool ordered(const Access& before, const Access& now, bool shared) {
  if (before.kind == Kind::none) return true;
  if (before.block != now.block) {
    if (cluster_of(before) == cluster_of(now)) {
      if (before.cluster_phase < now.cluster_phase) return true;
    } else if (shared) {  // another cluster's shared memory is another array
      return true;
    }
    return ordered_by_atomics(before, now);
  }
  if (before.thread == now.thread || before.phase < now.phase) return true;
  return warp_of(before) == warp_of(now) && before.warp_phase < now.warp_phase;
}

std::string described(const Access& access) {
  const dim3 b = scheduler.block, g = scheduler.grid;
  const uint3 thread{access.thread % b.x, access.thread / b.x % b.y, access.thread / (b.x * b.y)};
  const uint3 block{access.block % g.x, access.block / g.x % g.y, access.block / (g.x * g.y)};
  Dl_info library{};
  dladdr(access.code, &library);
  std::ostringstream text;
  text << "thread " << emulation::described(thread) << " of block " << emulation::described(block)
       << (access.kind == Kind::read    ? " reads"
           : access.kind == Kind::write ? " writes"
                                        : " updates atomically")
       << " at [+0x" << std::hex
       << static_cast<const char*>(access.code) - static_cast<const char*>(library.dli_fbase) - 1
       << "]";
  return text.str();
}

// Forgets what a launch or a block does not leave to the next. Blocks of a cluster take turns: of
// their handovers by atomics some are forgotten too, which may report a race that is none.
bool begins() {
  const bool new_launch = launch != scheduler.launches;
  if (new_launch || present != scheduler.block_linear) {
    taken_over.clear();
    fences.clear();
    present = scheduler.block_linear;
  }
  if (!new_launch) return false;
  pages.clear();
  handed_over.clear();
  launch = scheduler.launches;
  return true;
}

Byte& byte_at(uintptr_t address) {
  static uintptr_t last = 0;  // neighbours mostly follow each other
  static Byte* page = nullptr;
  if (begins()) page = nullptr;
  if (page == nullptr || address / kPage != last) {
    last = address / kPage;
    std::vector<Byte>& found = pages[last];
    found.resize(kPage);
    page = found.data();
  }
  return page[address % kPage];
}

void report(const Access& before, const Access& now, const void* address) {
  scheduler.fail("race on " + scheduler.memory_name(address) + ": " + described(before) + ", " +
                 described(now) + ", with no barrier between");
}

void note_read(Byte& byte, const Access& now, bool shared) {
  Access& first = byte.reads[0];
  Access& second = byte.reads[1];
  Access& elsewhere = byte.reads[2];
  if (ordered(first, now, shared) || (first.thread == now.thread && first.block == now.block)) {
    first = now;
    if (ordered(second, now, shared)) second = {};
    if (ordered(elsewhere, now, shared)) elsewhere = {};
  } else if (first.block != now.block) {
    elsewhere = now;
  } else if (ordered(second, now, shared) || warp_of(first) == warp_of(second)) {
    second = now;
  }
}

void check_byte(uintptr_t address, const Access& now) {
  const void* pointer = reinterpret_cast<const void*>(address);
  const bool shared = scheduler.is_shared(pointer);
  Byte& byte = byte_at(address);
  if (shared && cluster_of(byte.write) != cluster_of(now)) byte = {};
  const bool both_atomic = now.kind == Kind::atomic && byte.write.kind == Kind::atomic;
  if (!both_atomic && !ordered(byte.write, now, shared)) report(byte.write, now, pointer);
  if (now.kind == Kind::read) {
    if (shared && byte.write.kind == Kind::none) {
      scheduler.fail("reads " + scheduler.memory_name(pointer) +
                     " before it is written: " + described(now));
    }
    return note_read(byte, now, shared);
  }
  for (const Access& read : byte.reads) {
    if (!ordered(read, now, shared)) report(read, now, pointer);
  }
  byte = {now, {}};
}

void observe(const void* address, size_t size, Kind kind, const void* code) {
  if (scheduler.current == nullptr || scheduler.quiet || !watching) return;
  if (scheduler.owns(address)) return;
  const emulation::Quietly quietly;
  const emulation::Thread& thread = *scheduler.current;
  const Access now{kind,
                   static_cast<uint16_t>(thread.linear),
                   scheduler.block_linear,
                   scheduler.phase,
                   thread.warp_phase,
                   scheduler.cluster_phase,
                   code};
  for (size_t i = 0; i < size; ++i) check_byte(reinterpret_cast<uintptr_t>(address) + i, now);
  // What a thread writes after its fence is not handed over.
  if (kind == Kind::write && !fences.empty() && !scheduler.is_shared(address)) {
    fences.erase(now.thread);
  }
}

void meet(const void* address) {
  const emulation::Quietly quietly;
  const unsigned thread = scheduler.current->linear;
  Handovers& handovers = handed_over[address];
  taken_over.push_back({&handovers, handovers.size(), scheduler.phase, thread, false});
  if (const auto fence = fences.find(thread); fence != fences.end()) {
    handovers.try_emplace(scheduler.block_linear, fence->second, thread, handovers.size());
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void fastreid_vi_emulation_watch(bool on) { watching = on; }

void fastreid_vi_emulation_atomic(const void* address, size_t size) {
  observe(address, size, Kind::atomic, __builtin_return_address(0));
  if (watching && !scheduler.is_shared(address)) meet(address);
}

void fastreid_vi_emulation_fence() {
  if (!watching) return;
  const emulation::Quietly quietly;
  begins();
  const unsigned thread = scheduler.current->linear;
  fences[thread] = scheduler.phase;
  for (Takeover& takeover : taken_over) {
    if (takeover.thread == thread && !takeover.fenced) {
      takeover.fenced = true;
      takeover.phase = scheduler.phase;
    }
  }
}

#define ACCESS(size)                                                                               \
  void __tsan_read##size(void* p) { observe(p, size, Kind::read, __builtin_return_address(0)); }   \
  void __tsan_write##size(void* p) { observe(p, size, Kind::write, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##size(void* p) {                                                      \
    observe(p, size, Kind::read, __builtin_return_address(0));                                     \
  }                                                                                                \
  void __tsan_unaligned_write##size(void* p) {                                                     \
    observe(p, size, Kind::write, __builtin_return_address(0));                                    \
  }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void* p, size_t size) {
  observe(p, size, Kind::read, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  observe(p, size, Kind::write, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// Host code's reference counts and guards of static variables; no kernel has these.
#define ATOMIC(bits, type)                                              \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {        \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                        \
  }                                                                     \
  void __tsan_atomic##bits##_store(volatile type* p, type v, int) {     \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                           \
  }                                                                     \
  type __tsan_atomic##bits##_fetch_add(volatile type* p, type v, int) { \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                  \
  }                                                                     \
  type __tsan_atomic##bits##_fetch_sub(volatile type* p, type v, int) { \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                  \
  }
ATOMIC(8, uint8_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

}  // extern "C"
