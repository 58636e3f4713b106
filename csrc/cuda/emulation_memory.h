// Shared memory of the emulated block: NaN until written, a watched gap around every array.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulation {

constexpr size_t shared_limit = 227 * 1024;  // bytes of a block on sm_90 and sm_100

class SharedMemory {
 public:
  // The array declared at `key`; null when the block has no room for it.
  void* array(const void* key, const char* name, size_t bytes, size_t alignment) {
    for (const Array& array : arrays_) {
      if (array.key == key) return memory_.data() + array.begin;
    }
    const uintptr_t base = reinterpret_cast<uintptr_t>(memory_.data());
    const size_t begin = ((base + end_ + kGap + alignment - 1) & ~(alignment - 1)) - base;
    total_ += bytes;
    if (total_ > shared_limit || begin + bytes + kGap > memory_.size()) return nullptr;
    arrays_.push_back({key, name, begin, bytes});
    end_ = begin + bytes;
#ifdef __SANITIZE_ADDRESS__
    ASAN_UNPOISON_MEMORY_REGION(memory_.data() + begin, bytes);
#endif
    std::memset(memory_.data() + begin, 0xFF, bytes);
    return memory_.data() + begin;
  }

  // Shared memory does not outlive its block.
  void clear() {
#ifdef __SANITIZE_ADDRESS__  // watches the gaps, reads too
    ASAN_POISON_MEMORY_REGION(memory_.data(), memory_.size());
#else
    std::memset(memory_.data(), kGapByte, std::min(end_ + kGap, memory_.size()));
#endif
    arrays_.clear();
    end_ = total_ = 0;
  }

  // What was written outside the arrays, or nothing.
  std::string damage() const {
#ifndef __SANITIZE_ADDRESS__
    for (const Array& array : arrays_) {
      for (size_t i = 0; i < kGap; ++i) {
        const bool before = memory_[array.begin - 1 - i] != kGapByte;
        if (!before && memory_[array.begin + array.bytes + i] == kGapByte) continue;
        return std::string("wrote outside the shared array ") + array.name + ", " +
               std::to_string(i) + (before ? " bytes before its start" : " bytes past its end");
      }
    }
#endif
    return {};
  }

  // The same place in another block's memory; null when that has not declared the array.
  void* twin(const void* address, SharedMemory& other) const {
    const size_t at =
        static_cast<size_t>(static_cast<const unsigned char*>(address) - memory_.data());
    for (const Array& own : arrays_) {
      if (!contains(address) || at < own.begin || at >= own.begin + own.bytes) continue;
      for (const Array& array : other.arrays_) {
        if (array.key == own.key) return other.memory_.data() + array.begin + (at - own.begin);
      }
    }
    return nullptr;
  }

  std::string name(const void* address) const {
    const size_t offset =
        static_cast<size_t>(static_cast<const unsigned char*>(address) - memory_.data());
    for (const Array& array : arrays_) {
      if (offset < array.begin || offset >= array.begin + array.bytes) continue;
      return std::string("shared array ") + array.name + ", byte " +
             std::to_string(offset - array.begin);
    }
    return "shared memory outside any array";
  }

  bool contains(const void* address) const {
    return address >= memory_.data() && address < memory_.data() + memory_.size();
  }

 private:
  struct Array {
    const void* key;
    const char* name;
    size_t begin, bytes;
  };
  static constexpr size_t kGap = 64;
  static constexpr unsigned char kGapByte = 0xA5;

  std::vector<unsigned char> memory_ = std::vector<unsigned char>(2 * shared_limit, kGapByte);
  std::vector<Array> arrays_;
  size_t end_ = 0, total_ = 0;
};

}  // namespace emulation
