// Numbers as unsigned integers of the same order, and their sort in shared memory.
#pragma once

#include "team.cuh"

namespace fastreid_vi {

__device__ __forceinline__ double not_a_number() { return __int_as_float(0x7FC00000); }

__device__ __forceinline__ uint64_t bits_of(double x) {
  union {
    double number;
    uint64_t bits;
  } both;
  both.number = x;
  return both.bits;
}
__device__ __forceinline__ double number_of(uint64_t x) {
  union {
    uint64_t bits;
    double number;
  } both;
  both.bits = x;
  return both.number;
}

// Unsigned integers in the order of the numbers.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ uint64_t ordered_bits(double x) {
  const uint64_t bits = bits_of(x);
  return bits >> 63 ? ~bits : bits | (uint64_t(1) << 63);
}

// Ascending; `padded` is a power of two. With `indexed`, index[] moves along with the keys.
template <bool indexed, typename Key, typename Team>
__device__ __forceinline__ void bitonic_sort(const Team& team, Key* keys, unsigned short* index,
                                             int padded) {
  for (int run = 2; run <= padded; run *= 2) {
    for (int stride = run / 2; stride > 0; stride /= 2) {
      for (int pair = team.rank; pair < padded / 2; pair += Team::size) {
        const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
        const Key a = keys[low], b = keys[high];
        if ((a > b) != ((low & run) == 0)) continue;
        keys[low] = b;
        keys[high] = a;
        if constexpr (indexed) {
          const unsigned short moved = index[low];
          index[low] = index[high];
          index[high] = moved;
        }
      }
      team.sync();
    }
  }
}

// The power of two that a bitonic sort of n entries needs.
__host__ __device__ constexpr int sort_padded(int n) {
  int padded = 2;
  while (padded < n) padded *= 2;
  return padded;
}

// A number, as integer, and where it stands: smaller ones first, of equals the earlier.
template <typename Bits>
struct alignas(2 * sizeof(Bits)) Placed {
  Bits bits;
  uint32_t index;

  __device__ __forceinline__ bool operator<(const Placed& other) const {
    return bits < other.bits || (bits == other.bits && index < other.index);
  }
  __device__ __forceinline__ bool operator>(const Placed& other) const { return other < *this; }
};
template <typename T>
struct placed;
template <>
struct placed<float> {
  using type = Placed<uint32_t>;
};
template <>
struct placed<double> {
  using type = Placed<uint64_t>;
};
template <typename T>
using PlacedNumber = typename placed<T>::type;

// After every number; no index is as high.
template <typename T>
__device__ __forceinline__ PlacedNumber<T> beyond_all() {
  return {static_cast<decltype(PlacedNumber<T>::bits)>(~uint64_t(0)), ~uint32_t(0)};
}

}  // namespace fastreid_vi
