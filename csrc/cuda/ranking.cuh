// Where the matches of each query stand in each gallery, as csrc/retrieval/ranking.h has it. A
// block takes one query and one gallery and sorts nothing but the matches:
//   1. the matches, by (distance, gallery order)
//   2. for every other image it sees, how many matches come before it: a histogram of the gaps
//      between matches; images before the first match mark their identity in a bit set
//   3. positions r_m = m + images in the gaps up to m, and AP = (1/n) sum of m / r_m, in double, in
//      the order of m: the bits of every other room
#pragma once

#include "ordered.cuh"

namespace fastreid_vi {

constexpr int kRankThreads = 128;
constexpr int kRankShared = 40960;        // bytes a block writes on in shared memory
constexpr int kRankBlocks = 1056;         // that share scratch in global memory where it needs more
constexpr int kRankLongest = 1073741824;  // rows, columns, identities, galleries

// Which gallery images a query does not see.
enum RankRule : int {
  kRankNone = 0,             // it sees all
  kRankLocation = 1,         // none at the query's place, whoever they show
  kRankSameIdAndCamera = 2,  // none of its own identity at its own place
};

// Dense identities, a query of nobody in the pool has -1, and places.
struct RankLabels {
  const int *query_ids, *query_places;  // [R]
  const int *pool_ids, *pool_places;    // [N]
  int rule;
};

// Gallery t holds the pool columns columns[offsets[t]], ..., columns[offsets[t + 1] - 1].
struct RankGalleries {
  const int* columns;
  const int64_t* offsets;
  int count;
};

// [galleries, rows] each; zeros, and NaN, without a match.
struct RankCounts {
  int *matches, *first_image, *first_identity, *last_image;
  double* precision;
};

// What a block writes on: in shared memory, or where that is too small in global memory.
template <typename T>
struct RankMemory {
  PlacedNumber<T>* matches;  // [padded]
  int* gaps;                 // [most]
  uint32_t* seen;            // a bit for each identity

  static __host__ __device__ constexpr int64_t bytes(int most, int num_ids) {
    const int64_t words = static_cast<int64_t>(most) + (num_ids + 31) / 32;
    const int64_t placed = sort_padded(most) * static_cast<int64_t>(sizeof(PlacedNumber<T>));
    return placed + (words + 3) / 4 * 16;
  }
  __device__ __forceinline__ RankMemory(unsigned char* memory, int most)
      : matches(reinterpret_cast<PlacedNumber<T>*>(memory)),
        gaps(reinterpret_cast<int*>(matches + sort_padded(most))),
        seen(reinterpret_cast<uint32_t*>(gaps + most)) {}
};

// A query, a gallery and what the query sees of it.
template <typename T>
struct RankTask {
  const T* distance;  // of the query
  int64_t stride;
  RankLabels labels;
  const int* columns;
  int size, id, place;

  __device__ __forceinline__ bool same_place(int column) const {
    return labels.rule != kRankNone && labels.pool_places[column] == place;
  }
  // -0.0 as 0.0.
  __device__ __forceinline__ PlacedNumber<T> key(int slot, int column) const {
    const T d = distance[column * stride];
    return {ordered_bits(d == 0 ? T(0) : d), static_cast<uint32_t>(slot)};
  }
};

// Writes the matches in any order and returns their number; what is beyond `most` is only counted.
template <typename T>
__device__ __forceinline__ int rank_matches(const RankTask<T>& task, PlacedNumber<T>* matches,
                                            int most) {
  SHARED_ARRAY(int, found, [1]);
  if (threadIdx.x == 0) found[0] = 0;
  __syncthreads();
  for (int slot = threadIdx.x; slot < task.size; slot += kRankThreads) {
    const int column = task.columns[slot];
    if (task.labels.pool_ids[column] != task.id || task.same_place(column)) continue;
    const int at = atomicAdd(found, 1);
    if (at < most) matches[at] = task.key(slot, column);
  }
  __syncthreads();
  return found[0];
}

// Fills the gaps before each of n sorted matches; returns what this thread found of the identities
// before the first.
template <typename T>
__device__ __forceinline__ int rank_gaps(const RankTask<T>& task, const RankMemory<T>& memory,
                                         int n) {
  int identities = 0;
  const PlacedNumber<T> last = memory.matches[n - 1];
  for (int slot = threadIdx.x; slot < task.size; slot += kRankThreads) {
    const int column = task.columns[slot], id = task.labels.pool_ids[column];
    // Its own identity's images are matches, or dropped.
    if (id == task.id) continue;
    if (task.labels.rule == kRankLocation && task.same_place(column)) continue;
    const PlacedNumber<T> key = task.key(slot, column);
    if (!(key < last)) continue;
    int low = 0, high = n - 1;  // the first match after it
    while (low < high) {
      const int middle = (low + high) / 2;
      if (key < memory.matches[middle]) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    atomicAdd(memory.gaps + low, 1);
    if (low > 0) continue;
    const uint32_t bit = 1u << (id % 32);
    if (!(atomicOr(memory.seen + id / 32, bit) & bit)) ++identities;
  }
  return identities;
}

// Positions and average precision; one warp.
__device__ __forceinline__ void rank_positions(const int* gaps, int n, int identities,
                                               const RankCounts& counts, int64_t to) {
  const int lane = threadIdx.x;
  int ahead = 0;
  double sum = 0;
  for (int first = 0; first < n; first += kWarp) {
    const int m = first + lane;
    int passed = m < n ? gaps[m] : 0;
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int before = __shfl_up_sync(kAllLanes, passed, lanes);
      if (lane >= lanes) passed += before;
    }
    const int position = ahead + passed + m + 1;
    const double term = static_cast<double>(m + 1) / position;
    const int members = n - first < kWarp ? n - first : kWarp;
#pragma unroll 1
    for (int source = 0; source < members; ++source) {
      sum += __shfl_sync(kAllLanes, term, source);
    }
    ahead += __shfl_sync(kAllLanes, passed, kWarp - 1);
    if (m == 0) counts.first_image[to] = position;
    if (m == n - 1) counts.last_image[to] = position;
  }
  if (lane != 0) return;
  counts.matches[to] = n;
  counts.first_identity[to] = identities + 1;
  counts.precision[to] = sum / n;
}

template <typename T>
__device__ __forceinline__ void rank_task(const RankTask<T>& task, const RankMemory<T>& memory,
                                          int num_ids, int most, bool usable,
                                          const RankCounts& counts, int64_t to) {
  const int n = rank_matches(task, memory.matches, most);
  if (n == 0 || n > most || !usable) {
    if (threadIdx.x != 0) return;
    counts.matches[to] = usable ? n : 0;
    counts.first_image[to] = counts.first_identity[to] = counts.last_image[to] = 0;
    counts.precision[to] = not_a_number();
    return;
  }
  const int padded = sort_padded(n);
  for (int i = n + static_cast<int>(threadIdx.x); i < padded; i += kRankThreads) {
    memory.matches[i] = beyond_all<T>();
  }
  for (int i = threadIdx.x; i < n; i += kRankThreads) memory.gaps[i] = 0;
  for (int i = threadIdx.x; i < (num_ids + 31) / 32; i += kRankThreads) memory.seen[i] = 0;
  __syncthreads();
  const BlockTeam<kRankThreads> team{static_cast<int>(threadIdx.x)};
  if (n > 1) bitonic_sort<false>(team, memory.matches, nullptr, padded);
  const int identities = block_reduce(rank_gaps(task, memory, n), Sum{});
  if (threadIdx.x < kWarp) rank_positions(memory.gaps, n, identities, counts, to);
}

// Rows from `first_row` on, all galleries of each. `shared`: RankMemory fits there; else each block
// has `pitch` bytes of `scratch`. No query may match more than `most` images of a gallery; one that
// does gets zeros and its number of matches.
template <typename T, bool shared>
__global__ void __launch_bounds__(kRankThreads)
    rank_rows_kernel(const T* __restrict__ distance, int64_t row_stride, int64_t column_stride,
                     RankLabels labels, RankGalleries galleries, const int* __restrict__ nan_column,
                     RankCounts counts, unsigned char* __restrict__ scratch, int64_t pitch,
                     int rows, int first_row, int num_ids, int most) {
  unsigned char* room;
  if constexpr (shared) {
    DYNAMIC_SHARED(unsigned char, memory);
    room = memory;
  } else {
    room = scratch + blockIdx.x * pitch;
  }
  const RankMemory<T> own(room, most);
  // Blocks that run together share rows.
  const int gallery = static_cast<int>(blockIdx.x % galleries.count);
  const int row = first_row + static_cast<int>(blockIdx.x / galleries.count);
  const int64_t begin = galleries.offsets[gallery];
  const RankTask<T> task{distance + row * row_stride,
                         column_stride,
                         labels,
                         galleries.columns + begin,
                         static_cast<int>(galleries.offsets[gallery + 1] - begin),
                         labels.query_ids[row],
                         labels.query_places[row]};
  rank_task(task, own, num_ids, most, nan_column[row] < 0, counts,
            static_cast<int64_t>(gallery) * rows + row);
}

// The first column of each row that holds a NaN, or -1; a block takes a row.
template <typename T>
__global__ void __launch_bounds__(kRankThreads)
    nan_column_kernel(const T* __restrict__ distance, int64_t row_stride, int64_t column_stride,
                      int* __restrict__ nan_column, int columns) {
  const T* const row = distance + static_cast<int64_t>(blockIdx.x) * row_stride;
  int first = columns;
  const auto look = [&](T value, int column) {
    if (value != value && column < first) first = column;
  };
  if (column_stride == 1) {
    const VectorSpan<T> span(row, columns, true);
#pragma unroll 4
    for (int i = threadIdx.x; i < span.count; i += kRankThreads) {
      const int begin = span.first + i * Vector<T>::size;
      const Vector<T> v = load_vector(row + begin);
#pragma unroll
      for (int j = 0; j < Vector<T>::size; ++j) look(v.at[j], begin + j);
    }
    for (int i = threadIdx.x; i < span.odd(columns); i += kRankThreads) {
      look(row[span.element(i)], span.element(i));
    }
  } else {
    for (int j = threadIdx.x; j < columns; j += kRankThreads) look(row[j * column_stride], j);
  }
  first = block_reduce(first, Minimum{});
  if (threadIdx.x == 0) nan_column[blockIdx.x] = first < columns ? first : -1;
}

}  // namespace fastreid_vi
