// The threads that share a row of a matrix, a warp or a block, and what they do with it.
#pragma once

#include "common.cuh"

namespace fastreid_vi {

struct WarpTeam {
  int rank;
  static constexpr int size = kWarp;

  __device__ __forceinline__ void sync() const { __syncwarp(); }
  template <typename A, typename Combine>
  __device__ __forceinline__ A reduce(A value, Combine combine) const {
    return warp_reduce(value, combine);
  }
  __device__ __forceinline__ int from_first(int value) const {
    __syncwarp();
    return __shfl_sync(kAllLanes, value, 0);
  }
};
template <int threads>
struct BlockTeam {
  int rank;
  static constexpr int size = threads;

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  template <typename A, typename Combine>
  __device__ __forceinline__ A reduce(A value, Combine combine) const {
    return block_reduce(value, combine);
  }
  __device__ __forceinline__ int from_first(int value) const {
    SHARED_ARRAY(int, word, [1]);
    __syncthreads();
    if (rank == 0) word[0] = value;
    __syncthreads();
    return word[0];
  }
};

// Calls body(value) for each entry of a row of unit stride, in 16-byte vectors where it is aligned.
template <typename T, typename Team, typename F>
__device__ __forceinline__ void each_in_row(const Team& team, const T* row, int n, F&& body) {
  const VectorSpan<T> span(row, n, true);
#pragma unroll 4
  for (int i = team.rank; i < span.count; i += Team::size) {
    const Vector<T> v = load_vector(row + span.first + i * Vector<T>::size);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) body(v.at[j]);
  }
  for (int i = team.rank; i < span.odd(n); i += Team::size) body(row[span.element(i)]);
}

// to[j] = f(from[j]).
template <typename T, typename Team, typename F>
__device__ __forceinline__ void map_row(const Team& team, const T* from, T* to, int n, F&& f) {
  const bool alike =
      (reinterpret_cast<uintptr_t>(from) ^ reinterpret_cast<uintptr_t>(to)) % kVectorBytes == 0;
  const VectorSpan<T> span(from, n, alike);
  for (int i = team.rank; i < span.count; i += Team::size) {
    const int first = span.first + i * Vector<T>::size;
    Vector<T> v = load_vector(from + first);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v.at[j] = f(v.at[j]);
    store_vector(to + first, v);
  }
#pragma unroll 1
  for (int i = team.rank; i < span.odd(n); i += Team::size) {
    const int j = span.element(i);
    to[j] = f(from[j]);
  }
}

template <typename T, typename Team>
__device__ __forceinline__ void fill_row(const Team& team, T* to, int n, T value) {
  const VectorSpan<T> span(to, n, true);
  Vector<T> v;
#pragma unroll
  for (int j = 0; j < Vector<T>::size; ++j) v.at[j] = value;
#pragma unroll 2
  for (int i = team.rank; i < span.count; i += Team::size) {
    store_vector(to + span.first + i * Vector<T>::size, v);
  }
#pragma unroll 1
  for (int i = team.rank; i < span.odd(n); i += Team::size) to[span.element(i)] = value;
}

}  // namespace fastreid_vi
