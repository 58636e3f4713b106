// Backward of the pattern maps and of the features pooled under them; the formulas stand in
// pattern_pool.cuh.
#pragma once

#include "pattern_pool.cuh"

namespace fastreid_vi {

// dz of the sigmoid, and its sums over each block's positions for the bias; da of the softmax.
template <typename T>
__global__ void __launch_bounds__(kPatternThreads, kScoreBlocks<T>)
    pattern_logit_gradient_kernel(const T* __restrict__ x, const T* __restrict__ grad_pooled,
                                  const T* __restrict__ grad_maps, const T* __restrict__ maps,
                                  Accumulator<T>* __restrict__ dz, double* __restrict__ bias_parts,
                                  PatternShape shape, bool sigmoid, bool wide) {
  using A = Accumulator<T>;
  const ScorePlace place(shape);
  const int64_t pooled = place.sample * shape.maps * shape.channels;
  A d = place.product(x, grad_pooled + pooled, shape, wide);
  if (sigmoid) d /= static_cast<A>(shape.positions);
  if (place.here) {
    d += widen(grad_maps[place.planar(shape)]);
    const A a = widen(maps[place.planar(shape)]);
    if (sigmoid) d *= a * (A(1) - a);
  } else {
    d = 0;
  }
  if (place.position < shape.positions) dz[place.grouped(shape)] = d;
  if (!sigmoid) return;
  // Few numbers, and they cancel: double costs nothing here.
  const double sum = map_reduce(static_cast<double>(d), Sum{});
  if (threadIdx.x < kMapGroup) {
    bias_parts[(static_cast<int64_t>(blockIdx.x) * gridDim.y + place.group) * kMapGroup +
               threadIdx.x] = sum;
  }
}

// dz = a (da - sum over s of a da), in place; a block takes a group of one sample.
template <typename T>
__global__ void __launch_bounds__(kPatternThreads)
    pattern_softmax_gradient_kernel(const T* __restrict__ maps, Accumulator<T>* __restrict__ dz,
                                    PatternShape shape) {
  using A = Accumulator<T>;
  constexpr int step = kPatternThreads / kMapGroup;
  const int slot = threadIdx.x % kMapGroup, first = threadIdx.x / kMapGroup;
  const int map = blockIdx.y * kMapGroup + slot;
  const int positions = map < shape.maps ? shape.positions : 0;
  A* const row = dz + group_offset(shape, blockIdx.x, blockIdx.y) + slot;
  const T* const a = maps + (static_cast<int64_t>(blockIdx.x) * shape.maps + map) * shape.positions;
  A sum = 0;
  for (int s = first; s < positions; s += step) sum += widen(a[s]) * row[s * kMapGroup];
  sum = map_reduce(sum, Sum{});
  for (int s = first; s < positions; s += step) {
    row[s * kMapGroup] = widen(a[s]) * (row[s * kMapGroup] - sum);
  }
}

// dw and db from the parts: [units, P, C], and [rows, groups, kMapGroup] for the last block. A bias
// moves all positions alike, which softmax cancels: `rows` is 0, the gradient zero and no rounding
// noise.
template <typename T>
__global__ void __launch_bounds__(kPatternThreads)
    pattern_weight_gradient_kernel(const Accumulator<T>* __restrict__ weight_parts,
                                   const double* __restrict__ bias_parts, T* __restrict__ dw,
                                   T* __restrict__ db, int64_t elements, int maps, int units,
                                   int rows) {
  using A = Accumulator<T>;
  if (blockIdx.x + 1 < gridDim.x) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kPatternThreads + threadIdx.x;
    if (i >= elements) return;
    A sum = 0;
#pragma unroll 8
    for (int unit = 0; unit < units; ++unit) sum += weight_parts[unit * elements + i];
    dw[i] = narrow<T>(sum);
    return;
  }
  const int groups = (maps + kMapGroup - 1) / kMapGroup, slot = threadIdx.x % kMapGroup;
  for (int group = 0; group < groups; ++group) {
    double sum = 0;
#pragma unroll 4
    for (int row = threadIdx.x / kMapGroup; row < rows; row += kPatternThreads / kMapGroup) {
      sum += bias_parts[(static_cast<int64_t>(row) * groups + group) * kMapGroup + slot];
    }
    sum = map_reduce(sum, Sum{});
    const int map = group * kMapGroup + slot;
    if (threadIdx.x < kMapGroup && map < maps) db[map] = narrow<T>(static_cast<A>(sum));
  }
}

// Factors of one group on their way into shared memory: entry j of the k-th stands at
// tile[k][slot(j)], zero from `count` on.
template <int width, typename A, typename Slot, typename Value>
__device__ __forceinline__ void fill_factors(A (*tile)[width], int factors, int count, Slot slot,
                                             Value value) {
  for (int i = threadIdx.x; i < factors * width; i += kPatternThreads) {
    const int k = i / width, j = i % width;
    tile[k][slot(j)] = j < count ? value(k, j) : A(0);
  }
}

// dx = a grad_pooled / divisor + dz weight; x is not read. The rows of dx are positions (`last`:
// channels_last) or channels (NCHW), its columns the other. A block takes kRowTile rows and
// kPatternColumns columns of a sample, a warp kPatternWarps of the rows.
template <typename T, bool last>
__global__ void __launch_bounds__(kPatternThreads, 2)
    pattern_features_gradient_kernel(const T* __restrict__ grad_pooled,
                                     const T* __restrict__ weight, const T* __restrict__ maps,
                                     const Accumulator<T>* __restrict__ dz, T* __restrict__ dx,
                                     PatternShape shape, Accumulator<T> divisor, bool wide) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size, width = kPatternColumns<T>, piece = Vector<A>::size;
  constexpr int each = kRowTile / kPatternWarps;
  SHARED_ARRAY(A, row_tile, [2 * kMapGroup][kRowTile]);
  SHARED_ARRAY(A, column_tile, [2 * kMapGroup][kPatternColumns<T>]);
  const int rows = last ? shape.positions : shape.channels;
  const int columns = last ? shape.channels : shape.positions;
  const int across = (columns + width - 1) / width, down = (rows + kRowTile - 1) / kRowTile;
  const int64_t sample = blockIdx.x / (across * down);
  const int row = blockIdx.x / across % down * kRowTile, column = blockIdx.x % across * width;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // A lane's columns, in pieces of 16 bytes that lie a warp apart: no bank conflicts.
  const auto spread = [](int j) {
    const int i = j % size;
    return (i / piece * kWarp + j / size) * piece + i % piece;
  };
  const auto as_is = [](int j) { return j; };

  A sum[each][size] = {};
  for (int from = 0; from < shape.maps; from += kMapGroup) {
    const int count = shape.maps - from < kMapGroup ? shape.maps - from : kMapGroup;
    const int64_t first_map = sample * shape.maps + from;
    const A* const group = dz + group_offset(shape, sample, from / kMapGroup);
    const auto of_channel = [&](int k, int c) -> A {
      if (k < count) return widen(grad_pooled[(first_map + k) * shape.channels + c]) / divisor;
      return widen(weight[static_cast<int64_t>(from + k - count) * shape.channels + c]);
    };
    const auto of_position = [&](int k, int s) -> A {
      if (k < count) return widen(maps[(first_map + k) * shape.positions + s]);
      return group[s * kMapGroup + k - count];
    };
    const auto of_row = [&](int k, int j) -> A {
      return last ? of_position(k, row + j) : of_channel(k, row + j);
    };
    const auto of_column = [&](int k, int j) -> A {
      return last ? of_channel(k, column + j) : of_position(k, column + j);
    };
    __syncthreads();  // the group before may still be read
    fill_factors<kRowTile>(row_tile, 2 * count, rows - row, as_is, of_row);
    fill_factors<width>(column_tile, 2 * count, columns - column, spread, of_column);
    __syncthreads();
#pragma unroll 1
    for (int k = 0; k < 2 * count; ++k) {
      Vector<A> along[each / piece], over[size / piece];
#pragma unroll
      for (int q = 0; q < each / piece; ++q) {
        along[q] = load_vector(&row_tile[k][warp * each + q * piece]);
      }
#pragma unroll
      for (int q = 0; q < size / piece; ++q) {
        over[q] = load_vector(&column_tile[k][(q * kWarp + lane) * piece]);
      }
#pragma unroll
      for (int r = 0; r < each; ++r) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          sum[r][i] += along[r / piece].at[r % piece] * over[i / piece].at[i % piece];
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < each; ++r) {
    const int64_t at = row + warp * each + r;
    if (at < rows) {
      store_part(dx + (sample * rows + at) * columns, column + lane * size, columns, wide, sum[r]);
    }
  }
}

}  // namespace fastreid_vi
