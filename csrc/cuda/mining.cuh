// The search along one row of distances for the farthest positive and the nearest negative, with
// the softmax sums around them that the weighted triplet loss needs.
#pragma once

#include "pairs.cuh"

namespace fastreid_vi {

constexpr int kMiningThreads = 128;
constexpr int kMiningWarps = kMiningThreads / kWarp;

// The best score of some columns, and the sums of exp(score - shift) and distance * exp(score -
// shift) over them; the shift is the best score itself (`shifted`) or zero. NaN beats every number,
// of equals the first column wins. No column: index -1, sums zero.
template <typename A>
struct Best {
  A score;
  int index;
  A weight, moment;

  __device__ __forceinline__ bool loses_to(const Best& other) const {
    if (index < 0 || other.index < 0) return index < 0 && other.index >= 0;
    const bool nan = score != score, other_nan = other.score != other.score;
    if (nan != other_nan) return other_nan;
    if (nan || score == other.score) return other.index < index;
    return other.score > score;
  }

  template <bool soft>
  __device__ __forceinline__ void join(const Best& other, bool shifted) {
    const bool replaced = loses_to(other);
    if constexpr (soft) {
      A own_scale = 1, other_scale = 1;
      if (shifted && index >= 0 && other.index >= 0) {
        const A scale = exponential(replaced ? score - other.score : other.score - score);
        (replaced ? own_scale : other_scale) = scale;
      }
      weight = weight * own_scale + other.weight * other_scale;
      moment = moment * own_scale + other.moment * other_scale;
    }
    if (!replaced) return;
    score = other.score;
    index = other.index;
  }

  template <bool soft>
  __device__ __forceinline__ void join_lanes(bool shifted) {
#pragma unroll
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
      Best other{__shfl_down_sync(kAllLanes, score, lanes),
                 __shfl_down_sync(kAllLanes, index, lanes), 0, 0};
      if constexpr (soft) {
        other.weight = __shfl_down_sync(kAllLanes, weight, lanes);
        other.moment = __shfl_down_sync(kAllLanes, moment, lanes);
      }
      if (static_cast<int>(threadIdx.x % kWarp) < lanes) join<soft>(other, shifted);
    }
  }
};

template <typename A>
struct Mined {
  Best<A> positive, negative;  // score: the distance, the distance negated
};

// Of a block's row: distance(j) of `columns` columns, positive where labels[j] is `label`. `soft`:
// with the sums; the positives' are shifted, the negatives' if `shifted` says so. The same result
// reaches every thread.
template <bool soft, typename A, typename Distance>
__device__ __forceinline__ Mined<A> mine_row(int columns, int64_t label, const int64_t* labels,
                                             bool shifted, Distance distance) {
  SHARED_ARRAY(Mined<A>, found, [kMiningWarps]);
  Mined<A> mined{{0, -1, 0, 0}, {0, -1, 0, 0}};
  for (int j = threadIdx.x; j < columns; j += kMiningThreads) {
    const A d = distance(j);
    if (labels[j] == label) {
      mined.positive.template join<soft>({d, j, 1, d}, true);
    } else {
      const A weight = soft && !shifted ? exponential(-d) : A(1);
      mined.negative.template join<soft>({-d, j, weight, d * weight}, shifted);
    }
  }
  mined.positive.template join_lanes<soft>(true);
  mined.negative.template join_lanes<soft>(shifted);
  if (threadIdx.x % kWarp == 0) found[threadIdx.x / kWarp] = mined;
  __syncthreads();
  mined = found[0];
#pragma unroll
  for (int w = 1; w < kMiningWarps; ++w) {
    mined.positive.template join<soft>(found[w].positive, true);
    mined.negative.template join<soft>(found[w].negative, shifted);
  }
  return mined;
}

// The end of a loss that is a mean over anchors: the last block adds up their terms. counters: the
// ticket, and how many anchors have been counted as correct.
template <typename A>
__device__ __forceinline__ void finish_mean(A* terms, int anchors, unsigned* counters, A* loss,
                                            int64_t* correct) {
  if (!comes_last(counters, anchors)) return;
  const A sum = block_sum(terms, anchors);
  if (threadIdx.x != 0) return;
  *loss = sum / static_cast<A>(anchors);
  *correct = atomicAdd(counters + 1, 0u);
}

}  // namespace fastreid_vi
