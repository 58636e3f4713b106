// The k best of a row of scores and of a list; and the scores of chosen pairs to the bit, as
// csrc/retrieval/search.h has them.
#pragma once

#include "ordered.cuh"

namespace fastreid_vi {

constexpr int kTopKThreads = 256;
constexpr int kTopKBuffer = 2048;   // scores that wait until they are sorted into the list
constexpr int kTopKLongest = 4096;  // the longest list
constexpr int kScoreThreads = 256;  // a warp takes a pair, or a row

// Better scores first, of equals the lower index; NaN after all numbers, -0.0 as 0.0.
template <typename T>
__device__ __forceinline__ PlacedNumber<T> placed_score(T score, int64_t index) {
  PlacedNumber<T> entry = beyond_all<T>();
  if (score == score) entry.bits = ~ordered_bits(score == 0 ? T(0) : score);
  entry.index = static_cast<uint32_t>(index);
  return entry;
}

__device__ __forceinline__ float score_of(const Placed<uint32_t>& entry) {
  const uint32_t bits = ~entry.bits;
  return __uint_as_float(bits >> 31 ? bits & 0x7FFFFFFFu : ~bits);
}
__device__ __forceinline__ double score_of(const Placed<uint64_t>& entry) {
  const uint64_t bits = ~entry.bits;
  return number_of(bits >> 63 ? bits & ~(uint64_t(1) << 63) : ~bits);
}

// Ascending halves upon halves make an ascending list; `padded` is a power of two.
template <typename Key, typename Team>
__device__ __forceinline__ void bitonic_merge(const Team& team, Key* keys, int padded) {
  for (int stride = padded / 2; stride > 0; stride /= 2) {
    for (int pair = team.rank; pair < padded / 2; pair += Team::size) {
      const int low = 2 * pair - (pair & (stride - 1)), high = low + stride;
      const Key a = keys[low], b = keys[high];
      if (!(b < a)) continue;
      keys[low] = b;
      keys[high] = a;
    }
    team.sync();
  }
}

// The best so far, ascending in the order of placed_score, and candidates that wait.
template <typename T>
struct TopK {
  using Entry = PlacedNumber<T>;
  Entry *list, *buffer;
  int padded;  // of the list

  // Sorts `filled` candidates, keeps the best of both.
  template <typename Team>
  __device__ __forceinline__ void absorb(const Team& team, int filled) const {
    const int waiting = sort_padded(filled);
    for (int i = filled + team.rank; i < waiting; i += Team::size) buffer[i] = beyond_all<T>();
    team.sync();
    bitonic_sort<false>(team, buffer, nullptr, waiting);
    for (int i = team.rank; i < padded; i += Team::size) {
      const int other = padded - 1 - i;
      if (other < waiting && buffer[other] < list[i]) list[i] = buffer[other];
    }
    team.sync();
    bitonic_merge(team, list, padded);
  }
};

// What makes scores of products: times a column's scale, minus its shift; null for none.
template <typename T>
struct ColumnTerms {
  const T *scale, *shift;
};

// A block takes a row. best, best_index [rows, listed]: best first; scores [rows, columns]: column
// j has the index indices[row, j], or first_index + j where that is null. Writes the `kept` best,
// kept <= listed + columns. `wide`: 16-byte vectors fit the scores' rows and the terms.
template <typename T>
__global__ void __launch_bounds__(kTopKThreads)
    merge_top_k_kernel(const T* __restrict__ best, const int64_t* __restrict__ best_index,
                       const T* __restrict__ scores, const int64_t* __restrict__ indices,
                       ColumnTerms<T> terms, T* __restrict__ out, int64_t* __restrict__ out_index,
                       int64_t pitch, int64_t first_index, int listed, int columns, int kept,
                       int padded, int room, bool wide) {
  constexpr int size = Vector<T>::size, round = kTopKThreads * size;
  using Entry = PlacedNumber<T>;
  DYNAMIC_SHARED(Entry, memory);
  SHARED_ARRAY(int, count, [1]);
  const BlockTeam<kTopKThreads> team{static_cast<int>(threadIdx.x)};
  const TopK<T> top{memory, memory + padded, padded};
  const int64_t row = blockIdx.x;
  for (int i = team.rank; i < padded; i += kTopKThreads) {
    top.list[i] = i < listed ? placed_score(best[row * listed + i], best_index[row * listed + i])
                             : beyond_all<T>();
  }
  if (team.rank == 0) count[0] = 0;
  __syncthreads();
  const T* const own = scores + row * pitch;
  int filled = 0;
  for (int begin = 0; begin < columns; begin += round) {
    const int first = begin + team.rank * size;
    Vector<T> part = load_part(own, first, columns, wide);
    if (terms.scale != nullptr) {
      const Vector<T> scale = load_part(terms.scale, first, columns, wide);
#pragma unroll
      for (int i = 0; i < size; ++i) part.at[i] *= scale.at[i];
    }
    if (terms.shift != nullptr) {
      const Vector<T> shift = load_part(terms.shift, first, columns, wide);
#pragma unroll
      for (int i = 0; i < size; ++i) part.at[i] -= shift.at[i];
    }
    const Entry worst = top.list[kept - 1];
    Entry found[size];
    bool better[size], any = false;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      const int j = first + i;
      const bool inside = j < columns;
      const int64_t index =
          inside && indices != nullptr ? indices[row * columns + j] : first_index + j;
      found[i] = placed_score(part.at[i], index);
      better[i] = inside && found[i] < worst;
      any |= better[i];
    }
    if (!__syncthreads_or(any)) continue;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      if (better[i]) top.buffer[atomicAdd(count, 1)] = found[i];
    }
    __syncthreads();
    filled = count[0];
    if (filled <= room - round) continue;
    __syncthreads();  // all have read the count
    if (team.rank == 0) count[0] = 0;
    top.absorb(team, filled);
    filled = 0;
  }
  if (filled > 0) top.absorb(team, filled);
  for (int i = team.rank; i < kept; i += kTopKThreads) {
    out[row * kept + i] = score_of(top.list[i]);
    out_index[row * kept + i] = top.list[i].index;
  }
}

enum PairMetric : int { kPairCosine = 0, kPairInner = 1, kPairEuclidean = 2 };

// Roundings of their own: a fused multiply-add would give other bits than the other rooms.
#ifdef __CUDACC__
__device__ __forceinline__ double rounded_sum(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#else
inline double rounded_sum(double a, double b) { return a + b; }
inline double rounded_product(double a, double b) { return a * b; }
#endif

// Sum of left[d] right[d], or of (left[d] - right[d])^2: a warp's 32 lanes, lane l sums d = l,
// l + 32, ...; then the upper half of the lanes is added to the lower until one is left.
template <typename T>
__device__ __forceinline__ double lane_sum(const T* left, const T* right, int dim, bool squares) {
  double sum = 0;
  for (int d = threadIdx.x % kWarp; d < dim; d += kWarp) {
    double a = left[d], b = right[d];
    if (squares) {
      a = rounded_sum(a, -b);
      b = a;
    }
    sum = rounded_sum(sum, rounded_product(a, b));
  }
  return warp_reduce(sum, Sum{});
}

// Rows of unit stride.
template <typename T>
struct NormedRows {
  const T* rows;
  const double* norms;  // read for the cosine only
  int64_t stride;
};

// scores[r, c] of query row r and gallery row columns[r, c], rounded once: the cosine (0 for a zero
// row), the inner product, or minus the distance.
template <typename T>
__global__ void __launch_bounds__(kScoreThreads)
    pair_scores_kernel(NormedRows<T> query, NormedRows<T> gallery,
                       const int64_t* __restrict__ columns, T* __restrict__ scores, int64_t pairs,
                       int listed, int dim, int metric) {
  const int64_t pair =
      blockIdx.x * static_cast<int64_t>(kScoreThreads / kWarp) + threadIdx.x / kWarp;
  if (pair >= pairs) return;
  const int64_t row = pair / listed, column = columns[pair];
  double score = lane_sum(query.rows + row * query.stride, gallery.rows + column * gallery.stride,
                          dim, metric == kPairEuclidean);
  if (metric == kPairEuclidean) score = -sqrt(score);
  if (metric == kPairCosine) {
    const double ours = query.norms[row], other = gallery.norms[column];
    score = ours > 0 && other > 0 ? score / ours / other : 0;
    score = score > 1 ? 1 : score < -1 ? -1 : score;
  }
  if (threadIdx.x % kWarp == 0) scores[pair] = static_cast<T>(score) + T(0);  // no -0.0
}

// Euclidean norms; a warp takes a row.
template <typename T>
__global__ void __launch_bounds__(kScoreThreads)
    row_norms_kernel(const T* __restrict__ rows, double* __restrict__ norms, int64_t stride,
                     int64_t count, int dim) {
  const int64_t row =
      blockIdx.x * static_cast<int64_t>(kScoreThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= count) return;
  const T* const own = rows + row * stride;
  const double sum = lane_sum(own, own, dim, false);
  if (threadIdx.x % kWarp == 0) norms[row] = sqrt(sum);
}

}  // namespace fastreid_vi
