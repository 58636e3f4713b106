// The soft ranks of one row, L2 (Blondel et al. 2020): closed form where a single block is certain,
// sort and pool adjacent violators otherwise. Sums are float64 whatever the row's type.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.h"

namespace fastreid_vi {
namespace {

constexpr int64_t kRankLanes = 64;      // independent extremes and sums, so that they vectorise
constexpr int64_t kWorthCounting = 64;  // shorter rows sort faster by comparisons
constexpr int64_t kDigits = 256;        // values of a radix digit
constexpr int32_t kNotFinite = -1;      // the block of every entry of a row with NaN or infinity

// The matrix with unit stride along its rows; copies only if it must.
inline torch::stable::Tensor with_unit_rows(const torch::stable::Tensor& x) {
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// What decides between the two paths. Everything is relative to the first entry, so that a common
// offset of the row costs no digits.
struct Extent {
  double range, mean;
  bool finite;
};

template <typename T>
FASTREID_VI_CLONES Extent extent_of(const T* __restrict x, int64_t n) {
  using A = accumulate_t<T>;
  const A first = static_cast<A>(x[0]);
  A low[kRankLanes], high[kRankLanes];
  double sum[kRankLanes] = {};
  for (int64_t i = 0; i < kRankLanes; ++i) low[i] = high[i] = first;
  int64_t j = 0;
  for (; j + kRankLanes <= n; j += kRankLanes) {
    for (int64_t i = 0; i < kRankLanes; ++i) {
      const A value = static_cast<A>(x[j + i]);
      low[i] = value < low[i] ? value : low[i];
      high[i] = value > high[i] ? value : high[i];
    }
    for (int64_t i = 0; i < kRankLanes; ++i) {  // its own loop: lanes of another width
      sum[i] += static_cast<double>(static_cast<A>(x[j + i])) - static_cast<double>(first);
    }
  }
  for (int64_t i = 0; j + i < n; ++i) {
    const A value = static_cast<A>(x[j + i]);
    low[i] = value < low[i] ? value : low[i];
    high[i] = value > high[i] ? value : high[i];
    sum[i] += static_cast<double>(value) - static_cast<double>(first);
  }
  double total = 0;
  for (int64_t i = 0; i < kRankLanes; ++i) {
    low[0] = std::min(low[0], low[i]);
    high[0] = std::max(high[0], high[i]);
    total += sum[i];
  }
  // NaN and infinity survive every sum, and no finite float32 row overflows a float64 one.
  bool finite = std::isfinite(total);
  if (std::is_same_v<T, double> && !finite) {
    finite = std::all_of(x, x + n, [](T v) { return std::isfinite(static_cast<double>(v)); });
  }
  return {static_cast<double>(high[0]) - static_cast<double>(low[0]),
          total / static_cast<double>(n), finite};
}

// ranks = (x - mean) / strength + (n + 1) / 2, with the sign of `scale`.
template <typename T>
FASTREID_VI_CLONES void centre_row(const T* __restrict x, int64_t n, double mean, double scale,
                                   T* __restrict ranks) {
  using A = accumulate_t<T>;
  const auto first = static_cast<double>(static_cast<A>(x[0]));
  const double middle = 0.5 * static_cast<double>(n + 1);
  for (int64_t j = 0; j < n; ++j) {
    const double shifted = static_cast<double>(static_cast<A>(x[j])) - first;
    ranks[j] = static_cast<T>(static_cast<A>((shifted - mean) * scale + middle));
  }
}

// An unsigned integer that orders like the value, and back.
template <typename A>
struct KeyOf {
  using Bits = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;
  static constexpr Bits kSign = Bits(1) << (8 * sizeof(Bits) - 1);

  [[gnu::always_inline]] static Bits encode(A value) {
    const Bits bits = std::bit_cast<Bits>(value);
    return bits ^ ((bits & kSign) ? ~Bits(0) : kSign);
  }
  [[gnu::always_inline]] static A decode(Bits key) {
    return std::bit_cast<A>(key ^ ((key & kSign) ? kSign : ~Bits(0)));
  }
};

// A key with the entry it belongs to: one machine word for 32-bit keys, so that a pass of the
// radix sort moves it at once.
template <typename A>
struct Keyed {
  using Bits = typename KeyOf<A>::Bits;
  Bits key;
  uint32_t entry;
};

// Least significant digit first; passes in which all keys share the digit are left out. The sorted
// keys end in `items`.
template <typename A>
void radix_sort(std::vector<Keyed<A>>& items, std::vector<Keyed<A>>& other, int64_t n) {
  constexpr int kPasses = sizeof(typename KeyOf<A>::Bits);
  uint32_t counts[kPasses][kDigits] = {};
  for (int64_t j = 0; j < n; ++j) {
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][items[j].key >> (8 * pass) & 255];
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    uint32_t* next = counts[pass];
    if (next[items[0].key >> (8 * pass) & 255] == static_cast<uint32_t>(n)) continue;
    uint32_t start = 0;
    for (int64_t d = 0; d < kDigits; ++d) start += std::exchange(next[d], start);
    for (int64_t j = 0; j < n; ++j) {
      other[next[items[j].key >> (8 * pass) & 255]++] = items[j];
    }
    items.swap(other);
  }
}

// Soft ranks row by row; one per thread, the scratch is reused.
template <typename T>
class SoftRanker {
  using A = accumulate_t<T>;

 public:
  SoftRanker(int64_t n, double strength, bool descending)
      : n_(n), strength_(strength), descending_(descending) {}

  // ranks[n], and blocks[n]: where the block of each entry starts in sorted order.
  void row(const T* x, T* ranks, int32_t* blocks) {
    const Extent extent = extent_of(x, n_);
    if (!extent.finite) {
      std::fill(ranks, ranks + n_, static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
      std::fill(blocks, blocks + n_, kNotFinite);
    } else if (extent.range / strength_ <= 0.5 * static_cast<double>(n_)) {
      centre_row(x, n_, extent.mean, (descending_ ? -1.0 : 1.0) / strength_, ranks);
      std::fill(blocks, blocks + n_, 0);
    } else {
      sort(x);
      pool();
      scatter(ranks, blocks);
    }
  }

 private:
  // theta_[k] = the k-th largest of x / strength (of -x / strength where descending).
  void sort(const T* x) {
    if (items_.empty()) reserve();
    const auto flip = descending_ ? typename KeyOf<A>::Bits(0) : ~typename KeyOf<A>::Bits(0);
    for (int64_t j = 0; j < n_; ++j) {
      items_[j] = {KeyOf<A>::encode(static_cast<A>(x[j])) ^ flip, static_cast<uint32_t>(j)};
    }
    if (n_ < kWorthCounting) {
      std::sort(items_.begin(), items_.end(),
                [](const Keyed<A>& a, const Keyed<A>& b) { return a.key < b.key; });
    } else {
      radix_sort(items_, other_, n_);
    }
    decode(items_.data(), n_, flip, descending_ ? -strength_ : strength_, theta_.data());
  }

  FASTREID_VI_CLONES static void decode(const Keyed<A>* items, int64_t n,
                                        typename KeyOf<A>::Bits flip, double divisor,
                                        double* theta) {
    for (int64_t k = 0; k < n; ++k) {
      theta[k] = static_cast<double>(KeyOf<A>::decode(items[k].key ^ flip)) / divisor;
    }
  }

  // The blocks of the isotonic regression of y_k = theta_k - (n - k): merge while the means of two
  // neighbours do not decrease. The means are compared as cross products, which are exact wherever
  // the sums are, so that equal means merge. The last block stays in registers.
  void pool() {
    const auto n = static_cast<double>(n_);
    double above = 0, above_count = 0;
    int64_t top = 0;
    for (int64_t k = 0; k < n_; ++k) {
      double sum = theta_[k] - (n - static_cast<double>(k)), count = 1;
      while (top > 0 && !(above * count > sum * above_count)) {
        sum += above;
        count += above_count;
        --top;  // slot 0 is a spare, read and not used when the stack is empty
        above = sum_[top];
        above_count = count_[top];
      }
      sum_[++top] = above = sum;
      count_[top] = above_count = count;
    }
    tops_ = top;
  }

  // rank = theta - mean of y over the block, as a distance from the block's first entry: a block of
  // one gets its whole number exactly, however large theta is.
  void scatter(T* ranks, int32_t* blocks) {
    std::fill(begins_.begin(), begins_.end(), uint8_t(0));
    int64_t start = 0;
    for (int64_t b = 0; b < tops_; ++b) {
      const double first = theta_[start], count = count_[b + 1];
      const double shift =
          count == 1 ? static_cast<double>(n_ - start) : first - sum_[b + 1] / count;
      block_[b] = {first, shift, static_cast<int32_t>(start)};
      begins_[start] = b > 0;
      start += static_cast<int64_t>(count);
    }
    const Block* block = block_.data();
    for (int64_t k = 0; k < n_; ++k) {
      block += begins_[k];  // no branch: where blocks end cannot be foreseen
      const uint32_t entry = items_[k].entry;
      ranks[entry] = static_cast<T>(static_cast<A>((theta_[k] - block->first) + block->shift));
      blocks[entry] = block->start;
    }
  }

  void reserve() {
    const auto n = static_cast<size_t>(n_);
    items_.resize(n);
    other_.resize(n);
    theta_.resize(n);
    sum_.resize(n + 1);
    count_.resize(n + 1);
    block_.resize(n);
    begins_.resize(n);
  }

  struct Block {
    double first, shift;  // theta of its first entry, and the rank of that
    int32_t start;
  };

  int64_t n_, tops_ = 0;
  double strength_;
  bool descending_;
  std::vector<Keyed<A>> items_, other_;
  std::vector<double> theta_, sum_, count_;  // of the stack of blocks; counts are whole numbers
  std::vector<Block> block_;
  std::vector<uint8_t> begins_;  // whether the next block begins at this place of the order
};

// out = scale (g - mean of g over the entries with the same block): the soft rank's Jacobian.
template <typename T>
class BlockCentring {
  using A = accumulate_t<T>;

 public:
  explicit BlockCentring(int64_t n) : n_(n), sum_(n), count_(n) {}

  void row(const T* g, const int32_t* blocks, double scale, T* out) {
    uint32_t last = 0;
    const double total = total_of(g, blocks, n_, &last);
    if (last == 0) {
      subtract(g, n_, total / static_cast<double>(n_), scale, out);
    } else if (last < static_cast<uint64_t>(n_)) {
      means(g, blocks);
      subtract_blocks(g, blocks, n_, sum_.data(), scale, out);
    } else {  // a row that was not finite
      std::fill(out, out + n_, static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
    }
  }

 private:
  // The sum of g, and the largest block, in one pass; -1 reads as the largest of all.
  FASTREID_VI_CLONES static double total_of(const T* __restrict g, const int32_t* __restrict blocks,
                                            int64_t n, uint32_t* last) {
    double sum[kRankLanes] = {};
    uint32_t high[kRankLanes] = {};
    int64_t j = 0;
    for (; j + kRankLanes <= n; j += kRankLanes) {
      for (int64_t i = 0; i < kRankLanes; ++i) {
        const auto block = static_cast<uint32_t>(blocks[j + i]);
        high[i] = block > high[i] ? block : high[i];
      }
      for (int64_t i = 0; i < kRankLanes; ++i) {
        sum[i] += static_cast<double>(static_cast<A>(g[j + i]));
      }
    }
    for (int64_t i = 0; j + i < n; ++i) {
      sum[i] += static_cast<double>(static_cast<A>(g[j + i]));
      high[i] = std::max(high[i], static_cast<uint32_t>(blocks[j + i]));
    }
    double total = 0;
    for (int64_t i = 0; i < kRankLanes; ++i) {
      total += sum[i];
      *last = std::max(*last, high[i]);
    }
    return total;
  }

  void means(const T* g, const int32_t* blocks) {
    std::fill(sum_.begin(), sum_.end(), 0.0);
    std::fill(count_.begin(), count_.end(), 0.0);
    for (int64_t j = 0; j < n_; ++j) {
      sum_[blocks[j]] += static_cast<double>(static_cast<A>(g[j]));
      count_[blocks[j]] += 1.0;
    }
    for (int64_t j = 0; j < n_; ++j) sum_[j] /= count_[j] > 0.0 ? count_[j] : 1.0;
  }

  FASTREID_VI_CLONES static void subtract(const T* __restrict g, int64_t n, double mean,
                                          double scale, T* __restrict out) {
    for (int64_t j = 0; j < n; ++j) {
      out[j] = static_cast<T>(
          static_cast<A>((static_cast<double>(static_cast<A>(g[j])) - mean) * scale));
    }
  }

  FASTREID_VI_CLONES static void subtract_blocks(const T* __restrict g,
                                                 const int32_t* __restrict blocks, int64_t n,
                                                 const double* __restrict mean, double scale,
                                                 T* __restrict out) {
    for (int64_t j = 0; j < n; ++j) {
      const double centred = static_cast<double>(static_cast<A>(g[j])) - mean[blocks[j]];
      out[j] = static_cast<T>(static_cast<A>(centred * scale));
    }
  }

  int64_t n_;
  std::vector<double> sum_, count_;
};

}  // namespace
}  // namespace fastreid_vi
