// Soft ranks of rows: the projection of theta = values / strength onto the permutahedron.
//   s = theta in descending order, w = n, n - 1, ..., 1
//   v = non-increasing isotonic regression of s - w;  rank = s - v
// A row with max theta - min theta <= n/2 is one block: rank = theta - mean + (n + 1)/2, no sort.
// A negative strength ranks in descending order. Sums and ranks are taken in double.
#pragma once

#include "ordered.cuh"

namespace fastreid_vi {

constexpr int kSoftRankWarpRow = 1024;   // the longest row that a warp takes; a block above
constexpr int kSoftRankWarps = 4;        // rows of a block of the warp kernels
constexpr int kSoftRankThreads = 512;    // of a block that takes one row
constexpr int kSoftRankSlotBytes = 12;   // shared memory for each entry of a padded row
constexpr int kSoftRankLongest = 32768;  // positions are 16-bit

// Rounded once.
template <typename T>
__device__ __forceinline__ T from_double(double x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half from_double<__half>(double x) {
  return __double2half(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_double<__nv_bfloat16>(double x) {
  return __double2bfloat16(x);
}

// Shared memory of one row. `slots` hold sort keys, then s, then the sums of the blocks of the
// isotonic regression; block t begins at position start[t] of the sorted order, position k of which
// is entry index[k].
struct RankRow {
  uint64_t* slots;
  unsigned short *index, *start;

  __device__ __forceinline__ RankRow(unsigned char* memory, int padded)
      : slots(reinterpret_cast<uint64_t*>(memory)),
        index(reinterpret_cast<unsigned short*>(slots + padded)),
        start(index + padded) {}
};

// rank = (theta - mean) + weight for the members of a block: positions begin to begin + count - 1.
struct RankBlock {
  int begin, count;
  double mean, weight;

  __device__ __forceinline__ double rank(double theta) const { return (theta - mean) + weight; }
};

// The number of the block that a position of the sorted order belongs to: the last one that does
// not begin after it.
__device__ __forceinline__ int rank_block_number(const RankRow& row, int blocks, int position) {
  int low = 0, high = blocks;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (row.start[middle] <= position ? low : high) = middle;
  }
  return low;
}

__device__ __forceinline__ int rank_block_size(const RankRow& row, int blocks, int n, int number) {
  return (number + 1 < blocks ? row.start[number + 1] : n) - row.start[number];
}

__device__ __forceinline__ RankBlock rank_block(const RankRow& row, int blocks, int n,
                                                int position) {
  const int number = rank_block_number(row, blocks, position);
  const int begin = row.start[number], count = rank_block_size(row, blocks, n, number);
  return {begin, count, number_of(row.slots[number]) / count, n - (begin + 0.5 * (count - 1))};
}

// Pools adjacent violators; one thread. A block's mean of s - w is its mean of s less that of w,
// and the latter falls by half of both counts from a block to the next. Block t is written over
// slot t, which has been read by then. Returns the number of blocks.
__device__ __forceinline__ int pool_violators(const RankRow& row, int n) {
  int blocks = 0, top_begin = 0;
  double top_sum = 0, next = number_of(row.slots[0]);
  for (int k = 0; k < n; ++k) {
    int begin = k;
    double sum = next;
    if (k + 1 < n) next = number_of(row.slots[k + 1]);
    while (blocks > 0) {
      const double earlier = begin - top_begin, later = k + 1 - begin;
      if (top_sum * later - sum * earlier > 0.5 * earlier * later * (earlier + later)) break;
      begin = top_begin;
      sum += top_sum;
      if (--blocks == 0) break;
      top_begin = row.start[blocks - 1];
      top_sum = number_of(row.slots[blocks - 1]);
    }
    row.start[blocks] = static_cast<unsigned short>(begin);
    row.slots[blocks] = bits_of(sum);
    ++blocks;
    top_begin = begin;
    top_sum = sum;
  }
  return blocks;
}

// The general path up to the blocks; value(j) is entry j, a finite A. All threads of the team get
// the number of blocks. Equal values stay in one block, so the order among them does not matter.
template <typename A, typename Team, typename Value>
__device__ __forceinline__ int pool_row(const Team& team, const RankRow& row, int n, int padded,
                                        double strength, Value&& value) {
  constexpr bool indexed = sizeof(A) == 8;  // narrower keys leave room for the index
  for (int i = team.rank; i < padded; i += Team::size) {
    uint64_t slot = ~uint64_t(0);
    if (i < n) {
      const A x = strength < 0 ? -value(i) : value(i);
      slot = static_cast<uint64_t>(~ordered_bits(x));
      if constexpr (!indexed) slot = slot << 32 | static_cast<unsigned>(i);
    }
    row.slots[i] = slot;
    if constexpr (indexed) row.index[i] = static_cast<unsigned short>(i);
  }
  team.sync();
  bitonic_sort<indexed>(team, row.slots, row.index, padded);
  for (int k = team.rank; k < n; k += Team::size) {
    if constexpr (!indexed) row.index[k] = static_cast<unsigned short>(row.slots[k]);
    row.slots[k] = bits_of(value(row.index[k]) / strength);
  }
  team.sync();
  return team.from_first(team.rank == 0 ? pool_violators(row, n) : 0);
}

// What decides a row's path.
template <typename A>
struct RowRange {
  A low, high;
  double sum;

  __device__ __forceinline__ explicit RowRange(A first) : low(first), high(first), sum(0) {}
  __device__ __forceinline__ void add(A x) {
    low = Minimum{}(low, x);
    high = Maximum{}(high, x);
    sum += x;
  }
  template <typename Team>
  __device__ __forceinline__ void reduce(const Team& team) {
    low = team.reduce(low, Minimum{});
    high = team.reduce(high, Maximum{});
    sum = team.reduce(sum, Sum{});
  }
  __device__ __forceinline__ bool finite() const { return low - low == 0 && high - high == 0; }
  __device__ __forceinline__ bool one_block(int n, double strength) const {
    const double a = low / strength, b = high / strength;
    return (a < b ? b - a : a - b) <= 0.5 * n;
  }
};

template <typename T, typename Team>
__device__ __forceinline__ void soft_rank_row(const Team& team, unsigned char* memory,
                                              const T* values, T* ranks, int* blocks, int n,
                                              int padded, double strength) {
  using A = Accumulator<T>;
  RowRange<A> range(widen(values[0]));
  each_in_row(team, values, n, [&](T v) { range.add(widen(v)); });
  range.reduce(team);
  if (!range.finite()) {
    fill_row(team, ranks, n, from_double<T>(not_a_number()));
    return fill_row(team, blocks, n, -1);
  }
  if (range.one_block(n, strength)) {
    const double mean = range.sum / n, slope = 1 / strength, middle = 0.5 * (n + 1);
    map_row(team, values, ranks, n,
            [&](T v) { return from_double<T>((widen(v) - mean) * slope + middle); });
    return fill_row(team, blocks, n, 0);
  }
  const RankRow row(memory, padded);
  const auto value = [&](int j) { return widen(values[j]); };
  const int count = pool_row<A>(team, row, n, padded, strength, value);
  for (int k = team.rank; k < n; k += Team::size) {
    const int j = row.index[k];
    const RankBlock block = rank_block(row, count, n, k);
    ranks[j] = from_double<T>(block.rank(value(j) / strength));
    blocks[j] = block.begin;
  }
}

// Means of the blocks of a row whose entries are sorted by block: keys hold block << 16 | entry. A
// thread sums a run of equal length; what continues the block of the run before it waits at
// means[first of the run], which no block begins at and so none uses.
template <typename T, typename Team>
__device__ __forceinline__ void block_means(const Team& team, const uint32_t* keys, const T* grad,
                                            double* means, int n) {
  const int run = (n + Team::size - 1) / Team::size;
  const int from = team.rank * run < n ? team.rank * run : n, to = from + run < n ? from + run : n;
  const auto block_at = [&](int k) { return keys[k] >> 16; };
  int k = from;
  const auto sum_while = [&](uint32_t block) {
    double sum = 0;
    for (; k < to && block_at(k) == block; ++k) sum += widen(grad[keys[k] & 0xFFFF]);
    return sum;
  };
  if (from > 0 && from < to && block_at(from) == block_at(from - 1)) {
    means[from] = sum_while(block_at(from));
  }
  team.sync();
  while (k < to) {
    const uint32_t block = block_at(k);
    const int begin = k;
    double sum = sum_while(block);
    int end = k;
    if (k == to && to < n && block_at(to) == block) {
      for (int high = n; end < high;) {  // the first entry of a later block
        const int middle = (end + high) / 2;
        if (block_at(middle) == block) {
          end = middle + 1;
        } else {
          high = middle;
        }
      }
      for (int next = to; next < end; next += run) sum += means[next];
    }
    means[block] = sum / (end - begin);
  }
  team.sync();
}

// (g - mean of g over the entry's block) / strength.
template <typename T, typename Team>
__device__ __forceinline__ void soft_rank_backward_row(const Team& team, unsigned char* memory,
                                                       const T* grad, const int* blocks, T* dvalues,
                                                       int n, int padded, double strength) {
  int low = blocks[0], high = low;
  each_in_row(team, blocks, n, [&](int block) {
    low = Minimum{}(low, block);
    high = Maximum{}(high, block);
  });
  low = team.reduce(low, Minimum{});
  high = team.reduce(high, Maximum{});
  if (low < 0) return fill_row(team, dvalues, n, from_double<T>(not_a_number()));
  const double slope = 1 / strength;
  if (high == 0) {
    double sum = 0;
    each_in_row(team, grad, n, [&](T g) { sum += widen(g); });
    const double mean = team.reduce(sum, Sum{}) / n;
    return map_row(team, grad, dvalues, n,
                   [&](T g) { return from_double<T>((widen(g) - mean) * slope); });
  }
  double* means = reinterpret_cast<double*>(memory);
  uint32_t* keys = reinterpret_cast<uint32_t*>(means + padded);
  const auto block_of = [&](int j) { return blocks[j] < n ? blocks[j] : n - 1; };
  for (int i = team.rank; i < padded; i += Team::size) {
    keys[i] = i < n ? static_cast<uint32_t>(block_of(i)) << 16 | i : ~0u;
  }
  team.sync();
  bitonic_sort<false>(team, keys, nullptr, padded);
  block_means(team, keys, grad, means, n);
  for (int j = team.rank; j < n; j += Team::size) {
    dvalues[j] = from_double<T>((widen(grad[j]) - means[block_of(j)]) * slope);
  }
}

// n <= kSoftRankWarpRow: a warp takes one row.
template <typename T>
__global__ void __launch_bounds__(kSoftRankWarps* kWarp, 8)
    soft_rank_warp_kernel(const T* __restrict__ values, T* __restrict__ ranks,
                          int* __restrict__ blocks, int64_t rows, int64_t pitch, int n, int padded,
                          double strength) {
  DYNAMIC_SHARED(unsigned char, memory);
  const int warp = threadIdx.x / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSoftRankWarps + warp;
  if (row >= rows) return;
  soft_rank_row(WarpTeam{static_cast<int>(threadIdx.x % kWarp)},
                memory + warp * padded * kSoftRankSlotBytes, values + row * pitch, ranks + row * n,
                blocks + row * n, n, padded, strength);
}

// Longer rows: a block takes one.
template <typename T>
__global__ void __launch_bounds__(kSoftRankThreads, 2)
    soft_rank_block_kernel(const T* __restrict__ values, T* __restrict__ ranks,
                           int* __restrict__ blocks, int64_t, int64_t pitch, int n, int padded,
                           double strength) {
  DYNAMIC_SHARED(unsigned char, memory);
  const int64_t row = blockIdx.x;
  soft_rank_row(BlockTeam<kSoftRankThreads>{static_cast<int>(threadIdx.x)}, memory,
                values + row * pitch, ranks + row * n, blocks + row * n, n, padded, strength);
}

// Work is divided as in the forward pass; grad, blocks and dvalues are contiguous.
template <typename T>
__global__ void __launch_bounds__(kSoftRankWarps* kWarp, 8)
    soft_rank_backward_warp_kernel(const T* __restrict__ grad, const int* __restrict__ blocks,
                                   T* __restrict__ dvalues, int64_t rows, int n, int padded,
                                   double strength) {
  DYNAMIC_SHARED(unsigned char, memory);
  const int warp = threadIdx.x / kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSoftRankWarps + warp;
  if (row >= rows) return;
  soft_rank_backward_row(WarpTeam{static_cast<int>(threadIdx.x % kWarp)},
                         memory + warp * padded * kSoftRankSlotBytes, grad + row * n,
                         blocks + row * n, dvalues + row * n, n, padded, strength);
}

template <typename T>
__global__ void __launch_bounds__(kSoftRankThreads, 2)
    soft_rank_backward_block_kernel(const T* __restrict__ grad, const int* __restrict__ blocks,
                                    T* __restrict__ dvalues, int64_t, int n, int padded,
                                    double strength) {
  DYNAMIC_SHARED(unsigned char, memory);
  const int64_t row = blockIdx.x;
  soft_rank_backward_row(BlockTeam<kSoftRankThreads>{static_cast<int>(threadIdx.x)}, memory,
                         grad + row * n, blocks + row * n, dvalues + row * n, n, padded, strength);
}

}  // namespace fastreid_vi
