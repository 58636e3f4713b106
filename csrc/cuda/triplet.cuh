// Batch-hard triplet loss: hinge between the farthest positive and the nearest negative.
//   forward: pair_partials_kernel, then batch_hard_rows_kernel, a block for each anchor
//   backward: batch_hard_coefficients_kernel, a block for each mined pair, then
//             batch_hard_gather_kernel: each row of the gradient gathers the pairs that it is in
#pragma once

#include "mining.cuh"

namespace fastreid_vi {

// The order of the names in ops/_checks.py.
constexpr int kEuclidean = 0, kSqeuclidean = 1, kCosine = 2;

// What a row shorter than the floor lacks: 1 - u . v is |u - v|^2 / 2 plus this for both rows.
template <typename A>
__device__ __forceinline__ A missing_square(A norm_square) {
  const A unit = norm_square / (kNormFloor<A> * kNormFloor<A>);
  return unit < A(0.5) ? (A(1) - unit) / 2 : A(0);
}

// 1 - cosine of two rows, from the difference of the unit rows: exact where they are near-equal.
template <typename T>
__device__ __forceinline__ Accumulator<T> cosine_distance(const T* x, const T* y, int columns,
                                                          bool wide, Accumulator<T> x_square,
                                                          Accumulator<T> y_square) {
  using A = Accumulator<T>;
  const A x_scale = A(1) / at_least(root(x_square), kNormFloor<A>);
  const A y_scale = A(1) / at_least(root(y_square), kNormFloor<A>);
  A sum = 0;
  for (int k = threadIdx.x * Vector<T>::size; k < columns; k += blockDim.x * Vector<T>::size) {
    const Vector<T> p = load_part(x, k, columns, wide), q = load_part(y, k, columns, wide);
#pragma unroll
    for (int e = 0; e < Vector<T>::size; ++e) {
      const A difference = widen(p.at[e]) * x_scale - widen(q.at[e]) * y_scale;
      sum += difference * difference;
    }
  }
  return block_reduce(sum, Sum{}) / 2 + missing_square(x_square) + missing_square(y_square);
}

// Index of the farthest positive and nearest negative, and the hinge's weight, 1 / anchors where it
// acts. Sums of products and of squared norms choose the pair of the cosine metric; its two
// distances are then taken anew.
template <typename T>
__global__ void __launch_bounds__(kMiningThreads)
    batch_hard_rows_kernel(const Accumulator<T>* __restrict__ partial,
                           const Accumulator<T>* __restrict__ norms, const T* __restrict__ x,
                           const T* __restrict__ references, const int64_t* __restrict__ labels,
                           const int64_t* __restrict__ reference_labels, Accumulator<T>* terms,
                           unsigned* counters, Accumulator<T>* __restrict__ loss,
                           int64_t* __restrict__ correct, int64_t* __restrict__ positive,
                           int64_t* __restrict__ negative, Accumulator<T>* __restrict__ weight,
                           RowMatrix xs, RowMatrix rs, PairPanel panel, Accumulator<T> margin,
                           int metric, bool self, bool wide) {
  using A = Accumulator<T>;
  const int anchor = panel.first + blockIdx.x, columns = rs.rows;
  const int64_t pairs = static_cast<int64_t>(panel.rows) * columns, lengths = panel.rows + columns;
  const A* const row = partial + static_cast<int64_t>(blockIdx.x) * columns;
  const auto norm_square = [&](int j) {  // of reference j
    return ordered_sum(norms + panel.rows + j, panel.splits, lengths);
  };
  A own_square = 0;
  if (metric == kCosine) {
    own_square =
        self ? norm_square(anchor) : ordered_sum(norms + blockIdx.x, panel.splits, lengths);
  }
  const A own_norm = at_least(root(own_square), kNormFloor<A>);
  const Mined<A> mined =
      mine_row<false, A>(columns, labels[anchor], reference_labels, false, [&](int j) {
        const A sum = ordered_sum(row + j, panel.splits, pairs);
        if (metric == kSqeuclidean) return sum;
        if (metric == kEuclidean) return root(at_least(sum, kSquareFloor<A>));
        return A(1) - sum / (own_norm * at_least(root(norm_square(j)), kNormFloor<A>));
      });
  const int p = mined.positive.index, q = mined.negative.index;
  const bool valid = p >= 0 && q >= 0;
  A near = mined.positive.score, far = -mined.negative.score;
  if (metric == kCosine && valid) {
    const T* const own = x + anchor * xs.stride;
    near = cosine_distance(own, references + p * rs.stride, xs.columns, wide, own_square,
                           norm_square(p));
    far = cosine_distance(own, references + q * rs.stride, xs.columns, wide, own_square,
                          norm_square(q));
  }
  if (threadIdx.x == 0) {
    const A hinge = valid ? near - far + margin : A(0);
    positive[anchor] = p < 0 ? 0 : p;
    negative[anchor] = q < 0 ? 0 : q;
    weight[anchor] = hinge > A(0) ? A(1) / static_cast<A>(xs.rows) : A(0);
    terms[anchor] = at_least(hinge, A(0));
    if (valid && far >= near) atomicAdd(counters + 1, 1u);
  }
  finish_mean(terms, xs.rows, counters, loss, correct);
}

// What the two mined pairs of an anchor contribute: `pull` times the difference to the partner, on
// either side, and, for the cosine, `turn` times the row itself.
template <typename A>
struct PairSide {
  A pull, anchor_turn, partner_turn;
};

constexpr int kGradientThreads = 128;

// sides[l] of pair l: anchor l with its positive, anchor l - N with its negative.
//   d = |x - r|: pull = g / d;  d = |x - r|^2: pull = 2 g
//   d = 1 - u . v: pull = g / (|x| |r|), turn = pull * (x . r / |x|^2 - 1), from differences
template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    batch_hard_coefficients_kernel(const Accumulator<T>* __restrict__ grad, const T* __restrict__ x,
                                   const T* __restrict__ references,
                                   const int64_t* __restrict__ positive,
                                   const int64_t* __restrict__ negative,
                                   const Accumulator<T>* __restrict__ weight,
                                   PairSide<Accumulator<T>>* __restrict__ sides, RowMatrix xs,
                                   RowMatrix rs, int metric, bool self, bool wide) {
  using A = Accumulator<T>;
  const int anchor = blockIdx.x % xs.rows;
  const bool far = static_cast<int>(blockIdx.x) >= xs.rows;
  const int64_t partner = (far ? negative : positive)[anchor];
  const A w = weight[anchor];
  // An anchor that is its own positive has no gradient, nor has an index that is none.
  const bool idle = w == A(0) || partner < 0 || partner >= rs.rows || (self && partner == anchor);
  if (idle) {
    if (threadIdx.x == 0) sides[blockIdx.x] = {0, 0, 0};
    return;
  }
  const T *const own = x + anchor * xs.stride, *const other = references + partner * rs.stride;
  A square = 0, along_own = 0, along_other = 0, own_square = 0, other_square = 0;
  for (int k = threadIdx.x * Vector<T>::size; k < xs.columns;
       k += kGradientThreads * Vector<T>::size) {
    const Vector<T> p = load_part(own, k, xs.columns, wide);
    const Vector<T> q = load_part(other, k, xs.columns, wide);
#pragma unroll
    for (int e = 0; e < Vector<T>::size; ++e) {
      const A s = widen(p.at[e]), t = widen(q.at[e]);
      square += (s - t) * (s - t);
      if (metric != kCosine) continue;
      along_own += s * (t - s);
      along_other += t * (s - t);
      own_square += s * s;
      other_square += t * t;
    }
  }
  const A g = (far ? -w : w) * *grad;
  if (metric != kCosine) {
    square = block_reduce(square, Sum{});
    const bool clamped = square <= kSquareFloor<A>;
    const A pull = metric == kSqeuclidean ? 2 * g : clamped ? A(0) : g / root(square);
    if (threadIdx.x == 0) sides[blockIdx.x] = {pull, 0, 0};
    return;
  }
  along_own = block_reduce(along_own, Sum{});
  along_other = block_reduce(along_other, Sum{});
  own_square = block_reduce(own_square, Sum{});
  other_square = block_reduce(other_square, Sum{});
  if (threadIdx.x != 0) return;
  const A own_norm = at_least(root(own_square), kNormFloor<A>);
  const A other_norm = at_least(root(other_square), kNormFloor<A>);
  const A pull = g / (own_norm * other_norm);
  // x . r - |x|^2, less what the floor adds to |x|.
  const auto turn = [&](A along, A norm_square, A norm) {
    const A short_of = norm > kNormFloor<A> ? A(0) : norm_square - norm * norm;
    return pull * ((along + short_of) / norm / norm);
  };
  sides[blockIdx.x] = {pull, turn(along_own, own_square, own_norm),
                       turn(along_other, other_square, other_norm)};
}

// A thread's share of one row of the gradient.
template <typename T>
struct GradientPart {
  using A = Accumulator<T>;
  static constexpr int size = Vector<T>::size;
  A own[size], sum[size] = {};

  // pull * (own - other)
  __device__ __forceinline__ void add(A pull, const Vector<T>& other) {
#pragma unroll
    for (int e = 0; e < size; ++e) sum[e] += pull * (own[e] - widen(other.at[e]));
  }
  __device__ __forceinline__ void add_own(A turn) {
#pragma unroll
    for (int e = 0; e < size; ++e) sum[e] += turn * own[e];
  }
};

// Rows of the gradient: those of dx, then those of dr unless `self`. A block takes one of them and
// a chunk of kGradientThreads vectors, grid (rows, chunks); it looks through all pairs for those
// that end in its row.
template <typename T>
__global__ void __launch_bounds__(kGradientThreads)
    batch_hard_gather_kernel(const T* __restrict__ x, const T* __restrict__ references,
                             const int64_t* __restrict__ positive,
                             const int64_t* __restrict__ negative,
                             const PairSide<Accumulator<T>>* __restrict__ sides, T* __restrict__ dx,
                             T* __restrict__ dr, RowMatrix xs, RowMatrix rs, bool self, bool wide) {
  using A = Accumulator<T>;
  SHARED_ARRAY(int, links, [kGradientThreads]);
  const bool is_anchor = static_cast<int>(blockIdx.x) < xs.rows;
  const int row = is_anchor ? blockIdx.x : blockIdx.x - xs.rows;
  const int k = (blockIdx.y * kGradientThreads + threadIdx.x) * Vector<T>::size;
  const int columns = xs.columns, end = 2 * xs.rows;
  GradientPart<T> part;
  const Vector<T> own =
      load_part(is_anchor ? x + row * xs.stride : references + row * rs.stride, k, columns, wide);
#pragma unroll
  for (int e = 0; e < Vector<T>::size; ++e) part.own[e] = widen(own.at[e]);

  if (is_anchor) {
    A turn = 0;
    for (int link = row; link < end; link += xs.rows) {
      const PairSide<A> side = sides[link];
      turn += side.anchor_turn;
      if (side.pull == A(0)) continue;
      const int64_t partner = (link < xs.rows ? positive : negative)[row];
      part.add(side.pull, load_part(references + partner * rs.stride, k, columns, wide));
    }
    part.add_own(turn);
  }
  for (int from = 0; from < end && (self || !is_anchor); from += kGradientThreads) {
    const int link = from + threadIdx.x;
    bool ends_here = false;
    if (link < end) {
      const int64_t partner = link < xs.rows ? positive[link] : negative[link - xs.rows];
      ends_here = partner == row && sides[link].pull != A(0);
    }
    const int total = block_list(ends_here, link, links);
    for (int i = 0; i < total; ++i) {
      const PairSide<A> side = sides[links[i]];
      part.add(side.pull, load_part(x + links[i] % xs.rows * xs.stride, k, columns, wide));
      part.add_own(side.partner_turn);
    }
  }
  store_part((is_anchor ? dx : dr) + static_cast<int64_t>(row) * columns, k, columns, wide,
             part.sum);
}

}  // namespace fastreid_vi
