// Weighted regularised triplet loss: distances weighted by softmax in place of the hardest.
//   forward: pair_partials_kernel, then weighted_rows_kernel, a block for each anchor
//   backward: pair_partials_kernel once more, then weighted_backward_kernel
#pragma once

#include "mining.cuh"

namespace fastreid_vi {

template <typename A>
constexpr A kWeightEps = A(1e-6);  // added to the sums of the weights, as published

// Of each anchor: m+, 1 / S+, f+, m-, 1 / S-, f-; see ops/triplet.py.
template <typename A>
struct WeightedStats {
  A far, far_inverse, far_mean, near, near_inverse, near_mean;
};

__device__ __forceinline__ float log_one_plus(float x) { return log1pf(x); }
__device__ __forceinline__ double log_one_plus(double x) { return log1p(x); }

template <typename A>
__global__ void __launch_bounds__(kMiningThreads)
    weighted_rows_kernel(const A* __restrict__ partial, const int64_t* __restrict__ labels,
                         A* terms, unsigned* counters, A* __restrict__ loss,
                         int64_t* __restrict__ correct, int64_t* __restrict__ positive,
                         int64_t* __restrict__ negative, A* __restrict__ slope,
                         WeightedStats<A>* __restrict__ stats, PairPanel panel, int rows,
                         bool stable) {
  const int anchor = panel.first + blockIdx.x;
  const int64_t pairs = static_cast<int64_t>(panel.rows) * rows;
  const A* const row = partial + static_cast<int64_t>(blockIdx.x) * rows;
  const Mined<A> mined = mine_row<true, A>(rows, labels[anchor], labels, stable, [&](int j) {
    return root(at_least(ordered_sum(row + j, panel.splits, pairs), kSquareFloor<A>));
  });
  if (threadIdx.x == 0) {
    const bool valid = mined.negative.index >= 0;
    WeightedStats<A> s{mined.positive.score, 0, 0, 0, 0, 0};
    s.far_inverse = A(1) / (mined.positive.weight + kWeightEps<A>);
    s.far_mean = mined.positive.moment * s.far_inverse;
    if (valid) {
      s.near = stable ? mined.negative.score : A(0);
      s.near_inverse = A(1) / (mined.negative.weight + kWeightEps<A>);
      s.near_mean = mined.negative.moment * s.near_inverse;
    }
    const A gap = s.far_mean - s.near_mean;
    const A small = exponential(gap > A(0) ? -gap : gap);  // of |gap|, never overflows
    const A softplus = at_least(gap, A(0)) + log_one_plus(small);
    const A sigmoid = (gap > A(0) ? A(1) : small) / (A(1) + small);
    positive[anchor] = mined.positive.index;
    negative[anchor] = valid ? mined.negative.index : 0;
    stats[anchor] = s;
    terms[anchor] = valid ? softplus : A(0);
    slope[anchor] = valid ? sigmoid / static_cast<A>(rows) : A(0);
    if (valid && gap <= A(0)) atomicAdd(counters + 1, 1u);
  }
  finish_mean(terms, rows, counters, loss, correct);
}

// What the gradient takes from an anchor.
template <typename A>
struct WeightedAnchor {
  WeightedStats<A> stats;
  A slope;
  int64_t label, positive, negative;

  // Derivative of the anchor's term by its distance d to row j.
  __device__ __forceinline__ A derivative(A d, int j, bool same, bool stable) const {
    if (!(slope > A(0))) return A(0);
    if (same) {
      const A w = exponential(d - stats.far) * stats.far_inverse;
      const A shift = j == positive ? stats.far_mean * kWeightEps<A> * stats.far_inverse : A(0);
      return slope * (w * (A(1) + d - stats.far_mean) - shift);
    }
    const A w = exponential(-d - stats.near) * stats.near_inverse;
    const bool shifts = stable && j == negative;
    const A shift = shifts ? stats.near_mean * kWeightEps<A> * stats.near_inverse : A(0);
    return -slope * (w * (A(1) - d + stats.near_mean) + shift);
  }
};

constexpr int kWeightedThreads = 256;
constexpr int kWeightedColumns = 32;  // whose coefficients lie in shared memory at a time

// Rows of the gradient that a block works on: what the registers hold.
template <typename T>
constexpr int kWeightedRows = Vector<T>::size > 4 ? 4 : 8;

// dx_i = sum over j of c_ij (x_i - x_j). A block takes kWeightedRows rows of the panel and a chunk
// of kWeightedThreads vectors, grid (row tiles, chunks), and walks over all rows j.
template <typename T>
__global__ void __launch_bounds__(kWeightedThreads)
    weighted_backward_kernel(const Accumulator<T>* __restrict__ grad, const T* __restrict__ x,
                             const Accumulator<T>* __restrict__ partial,
                             const int64_t* __restrict__ labels,
                             const int64_t* __restrict__ positive,
                             const int64_t* __restrict__ negative,
                             const Accumulator<T>* __restrict__ slope,
                             const WeightedStats<Accumulator<T>>* __restrict__ stats,
                             T* __restrict__ dx, RowMatrix xs, PairPanel panel, bool stable,
                             bool wide) {
  using A = Accumulator<T>;
  constexpr int rows = kWeightedRows<T>, size = Vector<T>::size;
  SHARED_ARRAY(A, coefficients, [kWeightedColumns][rows]);
  const int first = blockIdx.x * rows, end = xs.rows;
  const int k = (blockIdx.y * kWeightedThreads + threadIdx.x) * size;
  const int64_t pairs = static_cast<int64_t>(panel.rows) * end;
  const auto anchor = [&](int i) {
    return WeightedAnchor<A>{stats[i], slope[i], labels[i], positive[i], negative[i]};
  };
  A own[rows][size], sum[rows][size] = {};
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    const int i = min(first + r, panel.rows - 1) + panel.first;
    const Vector<T> v = load_part(x + i * xs.stride, k, xs.columns, wide);
#pragma unroll
    for (int e = 0; e < size; ++e) own[r][e] = widen(v.at[e]);
  }
  const A scale = *grad;
  for (int from = 0; from < end; from += kWeightedColumns) {
    __syncthreads();  // the coefficients before have been read
    for (int t = threadIdx.x; t < kWeightedColumns * rows; t += kWeightedThreads) {
      const int j = from + t % kWeightedColumns, r = t / kWeightedColumns;
      A coefficient = 0;
      if (j < end && first + r < panel.rows) {
        const int i = panel.first + first + r;
        const A square =
            ordered_sum(partial + static_cast<int64_t>(first + r) * end + j, panel.splits, pairs);
        const A d = root(square);
        const WeightedAnchor<A> p = anchor(i), q = anchor(j);
        const bool same = p.label == q.label;
        const A both = p.derivative(d, j, same, stable) + q.derivative(d, i, same, stable);
        coefficient = square <= kSquareFloor<A> ? A(0) : scale * both / d;
      }
      coefficients[t % kWeightedColumns][r] = coefficient;
    }
    __syncthreads();
    const int count = k < xs.columns ? min(kWeightedColumns, end - from) : 0;
#pragma unroll 2
    for (int j = 0; j < count; ++j) {
      const Vector<T> v = load_part(x + (from + j) * xs.stride, k, xs.columns, wide);
#pragma unroll
      for (int e = 0; e < size; ++e) {
        const A other = widen(v.at[e]);
#pragma unroll
        for (int r = 0; r < rows; ++r) sum[r][e] += coefficients[j][r] * (own[r][e] - other);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < rows; ++r) {
    if (first + r >= panel.rows) continue;
    const int64_t i = panel.first + first + r;
    store_part(dx + i * xs.columns, k, xs.columns, wide, sum[r]);
  }
}

}  // namespace fastreid_vi
