// Sums over all pairs of rows of two matrices, tile by tile: squared differences, exact for
// near-equal rows, or dot products. The depth D is split among blocks; their partial sums lie in a
// scratch tensor [splits, rows, columns] and are added in order by whoever reads them.
#pragma once

#include "common.cuh"

namespace fastreid_vi {

// Rows of unit stride: element (i, k) lies at i * stride + k.
struct RowMatrix {
  int64_t stride;
  int rows, columns;
};

// The part of an [N, M] matrix of pairs that one launch covers: `rows` of it from `first`.
struct PairPanel {
  int first, rows, splits;
};

constexpr int kPairThreads = 256;
constexpr int kPairTile = 32;   // rows and columns of a tile
constexpr int kPairDepth = 64;  // elements of each row in shared memory at a time
// Four groups of 8 x 8 threads share the depth; a thread has 4 x 4 pairs.
constexpr int kPairGroups = 4, kPairSide = 8, kPairEach = 4;
constexpr int kPairGroup = kPairSide * kPairSide;

template <typename A>
constexpr A kSquareFloor = A(1e-12);  // squared distances are clamped here before the root
template <typename A>
constexpr A kNormFloor = A(1e-12);

__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
template <typename A>
__device__ __forceinline__ A at_least(A x, A floor) {  // NaN stays
  return x < floor ? floor : x;
}

// One side of a tile on its way from global to shared memory: kPairTile rows, kPairDepth elements.
template <typename T>
struct PairRound {
  using A = Accumulator<T>;
  static constexpr int vectors = kPairDepth / Vector<T>::size;  // of a row
  static constexpr int each = kPairTile * vectors / kPairThreads;
  static constexpr int pitch = kPairDepth / Vector<A>::size + 1;  // odd: no bank conflicts
  static constexpr int pieces = Vector<T>::size / Vector<A>::size;
  using Tile = Vector<A>[kPairTile][pitch];
  Vector<T> at[each];

  __device__ __forceinline__ void load(const T* x, RowMatrix shape, int first, int begin, int end,
                                       bool wide) {
#pragma unroll
    for (int u = 0; u < each; ++u) {
      const int i = threadIdx.x + u * kPairThreads, row = first + i / vectors;
      const int k = begin + i % vectors * Vector<T>::size;
      at[u] = load_part(x + row * shape.stride, k, row < shape.rows ? end : 0, wide);
    }
  }
  // squares[u] gains the squares of the elements of row (threadIdx.x + u * kPairThreads) / vectors.
  template <bool dot>
  __device__ __forceinline__ void store(Tile& tile, A* squares) const {
#pragma unroll
    for (int u = 0; u < each; ++u) {
      const int i = threadIdx.x + u * kPairThreads;
#pragma unroll
      for (int p = 0; p < pieces; ++p) {
        Vector<A> piece;
#pragma unroll
        for (int e = 0; e < Vector<A>::size; ++e) {
          piece.at[e] = widen(at[u].at[p * Vector<A>::size + e]);
          if constexpr (dot) squares[u] += piece.at[e] * piece.at[e];
        }
        tile[i / vectors][i % vectors * pieces + p] = piece;
      }
    }
  }
};

// The squared norms of a tile's rows: the threads of a row lie side by side in a warp.
template <typename T>
__device__ __forceinline__ void store_norms(const Accumulator<T>* squares, Accumulator<T>* norms,
                                            int first, int rows) {
  using Round = PairRound<T>;
#pragma unroll
  for (int u = 0; u < Round::each; ++u) {
    Accumulator<T> sum = squares[u];
#pragma unroll
    for (int lanes = Round::vectors / 2; lanes > 0; lanes /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, lanes);
    }
    const int i = threadIdx.x + u * kPairThreads, row = first + i / Round::vectors;
    if (i % Round::vectors == 0 && norms != nullptr && row < rows) norms[row] = sum;
  }
}

// Sums over elements [begin, end) for the pairs of rows of x from `row` and of y from `column`:
// result[c] is of local row kPairEach... see pair_row and pair_column. Sums run in short runs,
// which keeps float within a few units in the last place. norms: null, or where the squared norms
// go.
template <bool dot, typename T>
__device__ __forceinline__ void pair_tile(const T* x, const T* y, RowMatrix xs, RowMatrix ys,
                                          int row, int column, int begin, int end, bool wide,
                                          Accumulator<T>* x_norms, Accumulator<T>* y_norms,
                                          Accumulator<T> (&result)[kPairEach]) {
  using A = Accumulator<T>;
  using Round = PairRound<T>;
  SHARED_ARRAY(typename Round::Tile, tiles, [2]);
  const int group = threadIdx.x / kPairGroup, member = threadIdx.x % kPairGroup;
  const int ty = member / kPairSide, tx = member % kPairSide;
  A total[kPairEach][kPairEach] = {}, x_squares[Round::each] = {}, y_squares[Round::each] = {};
  Round a, b;
  a.load(x, xs, row, begin, end, wide);
  b.load(y, ys, column, begin, end, wide);
  for (int from = begin; from < end; from += kPairDepth) {
    __syncthreads();  // the round before has been read
    a.template store<dot>(tiles[0], x_squares);
    b.template store<dot>(tiles[1], y_squares);
    __syncthreads();
    const int next = from + kPairDepth;
    if (next < end) {  // on its way during the arithmetic
      a.load(x, xs, row, next, end, wide);
      b.load(y, ys, column, next, end, wide);
    }
    const int used = (min(next, end) - from + Vector<A>::size - 1) / Vector<A>::size;
    A run[kPairEach][kPairEach] = {};
    for (int v = group; v < used; v += kPairGroups) {
      Vector<A> p[kPairEach], q[kPairEach];
#pragma unroll
      for (int i = 0; i < kPairEach; ++i) {
        p[i] = tiles[0][ty + i * kPairSide][v];
        q[i] = tiles[1][tx + i * kPairSide][v];
      }
#pragma unroll
      for (int e = 0; e < Vector<A>::size; ++e) {
#pragma unroll
        for (int i = 0; i < kPairEach * kPairEach; ++i) {
          const A s = p[i / kPairEach].at[e], t = q[i % kPairEach].at[e];
          A& sum = run[i / kPairEach][i % kPairEach];
          sum += dot ? s * t : (s - t) * (s - t);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPairEach * kPairEach; ++i) {
      total[i / kPairEach][i % kPairEach] += run[i / kPairEach][i % kPairEach];
    }
  }
  if constexpr (dot) {
    store_norms<T>(x_squares, x_norms, row, xs.rows);
    store_norms<T>(y_squares, y_norms, column, ys.rows);
  }
  // Group g adds up what the four groups have for the rows g, in their order.
  A* const sums = reinterpret_cast<A*>(tiles);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kPairEach * kPairEach; ++i) {
    sums[(group * kPairEach * kPairEach + i) * kPairGroup + member] =
        total[i / kPairEach][i % kPairEach];
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kPairEach; ++c) {
    result[c] = 0;
#pragma unroll
    for (int g = 0; g < kPairGroups; ++g) {
      const int i = (g * kPairEach + group) * kPairEach + c;
      result[c] += sums[i * kPairGroup + member];
    }
  }
}

// Where in the tile result[c] of this thread belongs.
__device__ __forceinline__ int pair_row() {
  return threadIdx.x / kPairGroup * kPairSide + threadIdx.x % kPairGroup / kPairSide;
}
__device__ __forceinline__ int pair_column(int c) {
  return c * kPairSide + threadIdx.x % kPairSide;
}

// partial[split, i, j] over the rows of x and y: a block takes a tile and `depth` elements, grid
// (tiles along y, tiles along x, splits). `symmetric`: x is y, and half of the tiles do. Also
// zeroes two counters for the launches to come. limit: null, or how many rows, counted from x's row
// -first on, are there at all. dot: norms holds, for each split, the squared norms of x's and y's
// rows; of x's not when symmetric.
template <typename T, bool dot>
__global__ void __launch_bounds__(kPairThreads)
    pair_partials_kernel(const T* __restrict__ x, const T* __restrict__ y,
                         Accumulator<T>* __restrict__ partial, Accumulator<T>* __restrict__ norms,
                         unsigned* __restrict__ counters, const int* __restrict__ limit,
                         RowMatrix xs, RowMatrix ys, int first, int depth, bool symmetric,
                         bool wide) {
  const int64_t rows = xs.rows, columns = ys.rows;
  if (counters != nullptr && blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) {
    counters[0] = counters[1] = 0;
  }
  if (limit != nullptr) {
    xs.rows = min(xs.rows, *limit - first);
    ys.rows = min(ys.rows, *limit);
  }
  const int row = blockIdx.y * kPairTile, column = blockIdx.x * kPairTile;
  if ((symmetric && column < row) || row >= xs.rows || column >= ys.rows) return;
  const int begin = blockIdx.z * depth, end = min(begin + depth, xs.columns);
  Accumulator<T>* const own_norms = dot ? norms + blockIdx.z * (rows + columns) : nullptr;
  Accumulator<T> result[kPairEach];
  pair_tile<dot>(x, y, xs, ys, row, column, begin, end, wide,
                 blockIdx.x == 0 && !symmetric ? own_norms : nullptr,
                 dot && blockIdx.y == 0 ? own_norms + rows : nullptr, result);
  partial += blockIdx.z * rows * columns;
  const int i = row + pair_row();
#pragma unroll
  for (int c = 0; c < kPairEach; ++c) {
    const int j = column + pair_column(c);
    if (i >= xs.rows || j >= ys.rows) continue;
    partial[i * columns + j] = result[c];
    if (symmetric && row != column) partial[j * columns + i] = result[c];
  }
}

// The sum of `count` terms, `stride` apart; several loads are in flight.
template <typename A>
__device__ __forceinline__ A ordered_sum(const A* terms, int count, int64_t stride) {
  A sum = 0;
#pragma unroll 8
  for (int s = 0; s < count; ++s) sum += terms[s * stride];
  return sum;
}

// The same in every thread of the block.
template <typename A>
__device__ __forceinline__ A block_sum(const A* terms, int count) {
  A sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += terms[i];
  return block_reduce(sum, Sum{});
}

// The values of those threads that have one to give, in the order of the threads; how many there
// are. list: shared memory, a place for each thread; valid until the next call.
__device__ __forceinline__ int block_list(bool gives, int value, int* list) {
  SHARED_ARRAY(int, counts, [kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const unsigned mask = __ballot_sync(kAllLanes, gives);
  __syncthreads();  // an earlier list may still be read
  if (lane == 0) counts[warp] = __popc(mask);
  __syncthreads();
  int before = __popc(mask & ((1u << lane) - 1)), total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w < warp) before += counts[w];
    total += counts[w];
  }
  if (gives) list[before] = value;
  __syncthreads();
  return total;
}

// Whether this block is the last of `count` to come here; it sees what the others wrote before.
__device__ __forceinline__ bool comes_last(unsigned* ticket, int count) {
  SHARED_ARRAY(bool, last, [1]);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(ticket, 1u) == static_cast<unsigned>(count) - 1;
    __threadfence();
  }
  __syncthreads();
  return last[0];
}

}  // namespace fastreid_vi
