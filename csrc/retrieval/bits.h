// A set of column numbers that is read in ascending order and empty afterwards.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <vector>

namespace fastreid_vi::retrieval {

class ColumnSet {
 public:
  explicit ColumnSet(std::int64_t columns)
      : words_((columns + 63) / 64), first_(std::ssize(words_)) {}

  void insert(std::int32_t column) {
    const std::int64_t word = column >> 6;
    words_[word] |= std::uint64_t{1} << (column & 63);
    first_ = std::min(first_, word);
    last_ = std::max(last_, word);
  }
  bool contains(std::int32_t column) const {
    return (words_[column >> 6] >> (column & 63) & 1) != 0;
  }
  template <typename Use>
  void drain(const Use& use) {
    for (std::int64_t w = first_; w <= last_; ++w) {
      for (std::uint64_t word = words_[w]; word != 0; word &= word - 1) {
        use(static_cast<std::int32_t>(w * 64 + std::countr_zero(word)));
      }
      words_[w] = 0;
    }
    first_ = std::ssize(words_);
    last_ = -1;
  }

 private:
  std::vector<std::uint64_t> words_;
  std::int64_t first_, last_ = -1;  // words in use
};

}  // namespace fastreid_vi::retrieval
