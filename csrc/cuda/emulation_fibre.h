// Fibres: the stacks of a block's threads and the switch between them. x86-64 switches in a dozen
// instructions; elsewhere (or with EMULATION_UCONTEXT) ucontext does it, some ten times slower.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) && !defined(EMULATION_UCONTEXT)
#define EMULATION_UCONTEXT
#endif
#ifdef EMULATION_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

#ifdef EMULATION_UCONTEXT
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
#else
using Context = void*;  // the stack pointer; the registers a callee must keep lie on the stack
extern "C" void fastreid_vi_emulation_switch(void** from, void* to);
asm(R"(
.pushsection .text
.weak fastreid_vi_emulation_switch
.hidden fastreid_vi_emulation_switch
.type fastreid_vi_emulation_switch, @function
fastreid_vi_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastreid_vi_emulation_switch, . - fastreid_vi_emulation_switch
.popsection
)");
inline void switch_context(Context* from, Context* to) { fastreid_vi_emulation_switch(from, *to); }
#endif

struct Fibre {
  Context context;
  char* stack;
  void* sanitizer_stack;
};

// One mapping for all stacks, a guard page below each: an overflow stops the program there and
// then.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(unsigned count) {
    if (count <= count_) return;
    release();
    void* memory = mmap(nullptr, count * stride(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (unsigned i = 0; i < count; ++i) mprotect(memory_ + i * stride(), page(), PROT_NONE);
  }

  // The next resume() of this fibre calls `enter`, which must not return.
  void prepare(Fibre& fibre, unsigned index, void (*enter)()) {
    fibre.stack = memory_ + index * stride() + page();
    fibre.sanitizer_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(fibre.stack, kBytes);  // of a kernel that failed halfway
#endif
    entry_ = enter;
#ifdef EMULATION_UCONTEXT
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack;
    fibre.context.uc_stack.ss_size = kBytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, &Stacks::begin, 0);
#else
    void** top = reinterpret_cast<void**>(fibre.stack + kBytes);  // 16-byte aligned
    *--top = nullptr;  // the return address of `begin`, which never returns
    *--top = reinterpret_cast<void*>(&Stacks::begin);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fibre.context = top;
#endif
  }

  void resume(Fibre& fibre) {
#ifdef __SANITIZE_ADDRESS__
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fibre.stack, kBytes);
#endif
    self_ = this;
    switch_context(&host_, &fibre.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
  }

  void leave(Fibre& fibre, [[maybe_unused]] bool finished) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(finished ? nullptr : &fibre.sanitizer_stack, host_stack_,
                                   host_bytes_);
#endif
    switch_context(&fibre.context, &host_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fibre.sanitizer_stack, &host_stack_, &host_bytes_);
#endif
  }

  bool contains(const void* address) const {
    return address >= memory_ && address < memory_ + count_ * stride();
  }

 private:
  static constexpr size_t kBytes = 64 * 1024;
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static size_t stride() { return kBytes + page(); }

  static void begin() {
    Stacks& self = *self_;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &self.host_stack_, &self.host_bytes_);
#endif
    self.entry_();
  }

  void release() {
    if (memory_ != nullptr) munmap(memory_, count_ * stride());
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  unsigned count_ = 0;
  Context host_{};
  void (*entry_)() = nullptr;
  const void* host_stack_ = nullptr;
  size_t host_bytes_ = 0;
  static inline Stacks* self_ = nullptr;
};

}  // namespace emulation
