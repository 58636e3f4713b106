// Centre cluster loss: rows near the centre of their identity, centres apart.
//   forward: cluster_centres_kernel, then cluster_finish_kernel
//   backward: cluster_centres_kernel once more, then cluster_backward_kernel
// Beyond kClusterRows rows cluster_first_kernel comes before, and pair_partials_kernel, panel by
// panel, takes the gaps between the centres.
#pragma once

#include "pairs.cuh"

namespace fastreid_vi {

constexpr int kClusterRows = 512;     // up to which the first kernel does everything
constexpr int kClusterThreads = 256;  // those of a tile of pairs
constexpr int kClusterWarps = kClusterThreads / kWarp;
constexpr int kClusterFinishThreads = 128;
static_assert(kClusterThreads == kPairThreads);

// Columns that a warp has at once: a vector for each lane.
template <typename T>
constexpr int kClusterColumns = kWarp * Vector<T>::size;

// The lowest row with the label of row i.
__device__ __forceinline__ int first_with(const int64_t* labels, int i) {
  const int64_t label = labels[i];
  int j = 0;
  while (labels[j] != label) ++j;
  return j;
}

template <typename Label>  // int64_t
__global__ void __launch_bounds__(kClusterThreads)
    cluster_first_kernel(const Label* __restrict__ labels, int64_t* __restrict__ first, int rows) {
  const int i = blockIdx.x * kClusterThreads + threadIdx.x;
  if (i < rows) first[i] = first_with(labels, i);
}

// Elements first, first + 1, ... of a row in the accumulation dtype, as many as a vector of T has.
template <typename T, typename A>
__device__ __forceinline__ void load_values(const A* row, int first, int end, bool wide,
                                            A* values) {
#pragma unroll
  for (int p = 0; p < Vector<T>::size; p += Vector<A>::size) {
    const Vector<A> part = load_part(row, first + p, end, wide);
#pragma unroll
    for (int e = 0; e < Vector<A>::size; ++e) values[p + e] = part.at[e];
  }
}

// body(rows) for the rows i with first[i] = `speaker`, in order and four at a time so that as many
// loads are in flight; -1 where there are none left. All lanes of a warp together.
template <typename Body>
__device__ __forceinline__ void for_members(const int64_t* first, int speaker, int count,
                                            Body body) {
  const int lane = threadIdx.x % kWarp;
  for (int from = speaker / kWarp * kWarp; from < count; from += kWarp) {
    const bool member = from + lane < count && first[from + lane] == speaker;
    unsigned mask = __ballot_sync(kAllLanes, member);
    while (mask != 0) {
      int rows[4];
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        rows[b] = mask == 0 ? -1 : from + __ffs(static_cast<int>(mask)) - 1;
        mask &= mask - 1;
      }
      body(rows);
    }
  }
}

// The centre of one identity in columns k, k + 1, ... of each lane of a warp, and what these
// columns add to the squared radius of its rows. Sums in double: the centre of equal rows is that
// row.
template <typename T, typename A>
__device__ __forceinline__ void warp_centre(const T* x, const int64_t* first, RowMatrix xs,
                                            int speaker, int k, bool wide, A* centre, A* squares,
                                            bool adds) {
  constexpr int size = Vector<T>::size;
  double sum[size] = {};
  int count = 0;
  for_members(first, speaker, xs.rows, [&](const int (&rows)[4]) {
    Vector<T> v[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      v[b] = load_part(x + max(rows[b], 0) * xs.stride, k, rows[b] < 0 ? 0 : xs.columns, wide);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      count += rows[b] >= 0;
#pragma unroll
      for (int e = 0; e < size; ++e) sum[e] += static_cast<double>(widen(v[b].at[e]));
    }
  });
  A mean[size];
#pragma unroll
  for (int e = 0; e < size; ++e) mean[e] = static_cast<A>(sum[e] / count);
#pragma unroll
  for (int p = 0; p < size; p += Vector<A>::size) {
    store_part<A>(centre, k + p, xs.columns, wide, mean + p);
  }
  if (squares == nullptr) return;
  for_members(first, speaker, xs.rows, [&](const int (&rows)[4]) {
    Vector<T> v[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      v[b] = load_part(x + max(rows[b], 0) * xs.stride, k, rows[b] < 0 ? 0 : xs.columns, wide);
    }
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      A square = 0;
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const A away = k + e < xs.columns ? widen(v[b].at[e]) - mean[e] : A(0);
        square += away * away;
      }
      square = warp_reduce(square, Sum{});
      if (threadIdx.x % kWarp != 0 || rows[b] < 0) continue;
      squares[rows[b]] = adds ? squares[rows[b]] + square : square;
    }
  });
}

// Squared distances of all centres in columns [begin, end), both halves of the matrix.
template <typename A>
__device__ __forceinline__ void block_gaps(const A* centres, int identities, int columns, int begin,
                                           int end, bool wide, A* gaps, int64_t pitch) {
  const RowMatrix shape{columns, identities, columns};
  for (int row = 0; row < identities; row += kPairTile) {
    for (int column = row; column < identities; column += kPairTile) {
      A result[kPairEach];
      pair_tile<false>(centres, centres, shape, shape, row, column, begin, end, wide,
                       static_cast<A*>(nullptr), static_cast<A*>(nullptr), result);
      const int p = row + pair_row();
#pragma unroll
      for (int c = 0; c < kPairEach; ++c) {
        const int q = column + pair_column(c);
        if (p >= identities || q >= identities) continue;
        gaps[p * pitch + q] = result[c];
        if (row != column) gaps[q * pitch + p] = result[c];
      }
    }
  }
}

// Centres [P, D], one for each identity in the order of their first rows (speakers), and partial
// sums for each of the blocks along D, which have `depth` columns: squares [parts, N] of the radii
// (null: none), gaps [parts, N, N] between centres (null: none). labels: null where `first` is
// given, else first is found here, N at most kClusterRows. Grid (parts, batches of kClusterThreads
// rows, or one with gaps); a warp takes one identity after another.
template <typename T>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_centres_kernel(const T* __restrict__ x, const int64_t* __restrict__ labels,
                           int64_t* __restrict__ first, Accumulator<T>* centres,
                           int* __restrict__ speakers, int* __restrict__ identities,
                           Accumulator<T>* squares, Accumulator<T>* __restrict__ gaps,
                           unsigned* __restrict__ counters, RowMatrix xs, int depth, bool wide) {
  SHARED_ARRAY(int64_t, found, [kClusterRows]);
  SHARED_ARRAY(int, list, [kClusterThreads]);
  const int64_t rows = xs.rows, columns = xs.columns;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int begin = blockIdx.x * depth, end = min(begin + depth, xs.columns);
  const bool leads = blockIdx.x == 0;  // writes what all blocks know
  if (leads && blockIdx.y == 0 && threadIdx.x == 0) counters[0] = counters[1] = 0;
  const int64_t* firsts = first;
  if (labels != nullptr) {
    firsts = found;
    for (int i = threadIdx.x; i < rows; i += kClusterThreads) {
      found[i] = first_with(labels, i);
      if (leads) first[i] = found[i];
    }
    __syncthreads();
  }
  if (squares != nullptr) squares += blockIdx.x * rows;

  int total = 0;  // identities so far
  for (int i = threadIdx.x; i < static_cast<int>(blockIdx.y) * kClusterThreads;
       i += kClusterThreads) {
    total += firsts[i] == i;
  }
  total = block_reduce(total, Sum{});
  for (int from = blockIdx.y * kClusterThreads; from < rows;
       from += gridDim.y == 1 ? kClusterThreads : xs.rows) {
    const int i = from + threadIdx.x;
    const int speaking = block_list(i < rows && firsts[i] == i, i, list);
    for (int s = warp; s < speaking; s += kClusterWarps) {
      if (leads && lane == 0) speakers[total + s] = list[s];
      for (int k = begin; k < end; k += kClusterColumns<T>) {
        warp_centre(x, firsts, xs, list[s], k + lane * Vector<T>::size, wide,
                    centres + (total + s) * columns, squares, k != begin);
      }
    }
    total += speaking;
    if (leads && threadIdx.x == 0 && from + kClusterThreads >= rows) *identities = total;
  }
  if (gaps == nullptr) return;
  __syncthreads();  // the centres are read next
  block_gaps(centres, total, xs.columns, begin, end, wide, gaps + blockIdx.x * rows * rows, rows);
}

// radius [N], and the loss. Block i of the panel has row i and the gaps of centre i to those after
// it. gaps: [splits, panel rows, N]; terms: two for each row.
template <typename A>
__global__ void __launch_bounds__(kClusterFinishThreads)
    cluster_finish_kernel(const A* __restrict__ squares, const A* __restrict__ gaps,
                          const int* __restrict__ identities, A* terms, unsigned* counters,
                          A* __restrict__ loss, A* __restrict__ pull, A* __restrict__ push,
                          A* __restrict__ radius, PairPanel panel, int rows, int parts, A margin) {
  const int i = panel.first + blockIdx.x, count = *identities;
  A square = 0, hinge = 0;
  for (int s = threadIdx.x; s < parts; s += kClusterFinishThreads) {
    square += squares[s * static_cast<int64_t>(rows) + i];
  }
  const A* const row = gaps + static_cast<int64_t>(blockIdx.x) * rows;
  for (int q = i + 1 + threadIdx.x; q < count; q += kClusterFinishThreads) {
    const A gap = ordered_sum(row + q, panel.splits, static_cast<int64_t>(panel.rows) * rows);
    hinge += at_least(margin - root(at_least(gap, kSquareFloor<A>)), A(0));
  }
  square = block_reduce(square, Sum{});
  hinge = block_reduce(hinge, Sum{});
  if (threadIdx.x == 0) {
    radius[i] = terms[i] = root(square);
    terms[rows + i] = hinge;
  }
  if (!comes_last(counters, rows)) return;
  const A pulls = block_sum(terms, rows) / static_cast<A>(rows);
  const A pairs = static_cast<A>(count) * static_cast<A>(count - 1) / 2;
  const A pushes = block_sum(terms + rows, rows) / at_least(pairs, A(1));
  if (threadIdx.x != 0) return;
  *pull = pulls;
  *push = pushes;
  *loss = pulls + pushes;
}

// Gradient of the rows of identity p, a block for each and for each chunk of kClusterFinishThreads
// vectors: grid (panel rows, chunks).
//   e_i = g_pull / N (x_i - c) / radius_i,  dx_i = e_i + (dc - sum of e) / K
//   dc = - g_push 2 / (P (P - 1)) sum over q with 1e-6 < d_pq < margin of (c_p - c_q) / d_pq
template <typename T>
__global__ void __launch_bounds__(kClusterFinishThreads, 1)
    cluster_backward_kernel(const Accumulator<T>* __restrict__ grad_pull,
                            const Accumulator<T>* __restrict__ grad_push, const T* __restrict__ x,
                            const int64_t* __restrict__ first,
                            const Accumulator<T>* __restrict__ radius,
                            const Accumulator<T>* __restrict__ centres,
                            const int* __restrict__ speakers, const int* __restrict__ identities,
                            const Accumulator<T>* __restrict__ gaps, T* __restrict__ dx,
                            RowMatrix xs, PairPanel panel, Accumulator<T> margin, bool wide) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size, threads = kClusterFinishThreads;
  SHARED_ARRAY(int, list, [threads]);
  SHARED_ARRAY(A, coefficients, [threads]);
  const int p = panel.first + blockIdx.x, count = *identities, rows = xs.rows;
  if (p >= count) return;
  const int64_t columns = xs.columns;
  const int k = (blockIdx.y * threads + threadIdx.x) * size, t = threadIdx.x;
  A centre[size], change[size] = {};  // of the centre
  load_values<T>(centres + p * columns, k, xs.columns, wide, centre);

  const A pairs = static_cast<A>(count) * static_cast<A>(count - 1);
  const A scale = A(-2) * *grad_push / at_least(pairs, A(1));
  const A* const row = gaps + static_cast<int64_t>(blockIdx.x) * rows;
  for (int from = 0; from < count; from += threads) {
    const int q = from + t;
    A gap = 0;
    if (q < count && q != p) {
      gap = ordered_sum(row + q, panel.splits, static_cast<int64_t>(panel.rows) * rows);
    }
    const bool active = gap > kSquareFloor<A> && root(gap) < margin;
    const int found = block_list(active, q, list);
    if (active) coefficients[t] = scale / root(gap);
    __syncthreads();
    for (int s = 0; s < found; ++s) {
      const A coefficient = coefficients[list[s] - from];
      A other[size];
      load_values<T>(centres + list[s] * columns, k, xs.columns, wide, other);
#pragma unroll
      for (int e = 0; e < size; ++e) change[e] += coefficient * (centre[e] - other[e]);
    }
  }

  const A pull = *grad_pull / static_cast<A>(rows);
  const int speaker = speakers[p];
  int members = 0;
  // Twice over the identity's rows: their sum, then their own.
  for (int pass = 0; pass < 2; ++pass) {
    for (int from = 0; from < rows; from += threads) {
      const int i = from + t;
      const int found = block_list(i < rows && first[i] == speaker, i, list);
      members += pass == 0 ? found : 0;
      for (int s = 0; s < found; ++s) {
        const Vector<T> v = load_part(x + list[s] * xs.stride, k, xs.columns, wide);
        const A length = radius[list[s]];
        const A weight = length > A(0) ? pull / length : A(0);
        A sum[size];
#pragma unroll
        for (int e = 0; e < size; ++e) {
          const A away = weight * (widen(v.at[e]) - centre[e]);
          sum[e] = away + change[e];
          if (pass == 0) change[e] -= away;
        }
        if (pass == 1) store_part(dx + list[s] * columns, k, xs.columns, wide, sum);
      }
    }
    if (pass == 1) break;
    const A share = A(1) / static_cast<A>(members);
#pragma unroll
    for (int e = 0; e < size; ++e) change[e] *= share;
  }
}

}  // namespace fastreid_vi
