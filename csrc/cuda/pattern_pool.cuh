// Pattern maps and the features pooled under each of them.
//   a[b, p, s] = act(weight[p] . x[b, :, s] + bias[p]);  pooled[b, p] = sum over s of a x  (/ S)
//   backward: da = grad_maps + grad_pooled . x  (/ S)
//             dz = da a (1 - a) for the sigmoid, a (da - sum over s of a da) for the softmax
//             dw = sum over b, s of dz x;  dx = a grad_pooled (/ S) + dz weight
// "/ S" is the sigmoid's alone. x is read twice, for the maps and for the sums under them. Maps are
// taken kMapGroup at a time; what kernels leave to each other, a or dz, lies as [B, groups, S,
// kMapGroup] in the accumulation type, zero where a group is not full. Sums run in a fixed order.
#pragma once

#include "common.cuh"

namespace fastreid_vi {

// A map of unit stride along its channels: element (b, s, c) lies at b * batch + s * position + c.
struct PatternShape {
  int64_t batch, position;
  int channels, positions, maps;
};

constexpr int kPatternThreads = 256;
constexpr int kPatternWarps = kPatternThreads / kWarp;
constexpr int kMapGroup = 8;
constexpr int kWarpPositions = kWarp / kMapGroup;  // a warp's products with a group: one a lane
constexpr int kScoreTile = 32;                     // positions of a block of the scores kernels
constexpr int kRowTile = 64;                       // rows of a block of the gradient of x
static_assert(kScoreTile == kPatternWarps * kWarpPositions);

// Channels of a block of the sums kernel, columns of one of the gradient: a vector for each lane.
template <typename T>
constexpr int kPatternColumns = kWarp * Vector<T>::size;

// Blocks of the scores kernels that share an SM: double has twice the registers' worth of sums.
template <typename T>
constexpr int kScoreBlocks = sizeof(T) == 8 ? 1 : 2;

__device__ __forceinline__ int map_groups(const PatternShape& shape) {
  return (shape.maps + kMapGroup - 1) / kMapGroup;
}

// Where a group's values of one sample begin.
__device__ __forceinline__ int64_t group_offset(const PatternShape& shape, int64_t sample,
                                                int group) {
  return (sample * map_groups(shape) + group) * shape.positions * kMapGroup;
}

// Lane l gets the sum of value[l] over all lanes: at every step half of the values change hands.
template <int half = kWarp / 2, typename A>
__device__ __forceinline__ A transposed_sum(A (&value)[kWarp]) {
  const bool upper = threadIdx.x & half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
    const A given = upper ? value[i] : value[i + half];
    const A kept = upper ? value[i + half] : value[i];
    value[i] = kept + __shfl_xor_sync(kAllLanes, given, half);
  }
  if constexpr (half > 1) return transposed_sum<half / 2>(value);
  return value[0];
}

// Thread t gets the reduction over the threads with its t % kMapGroup. All threads of the block
// must call it.
template <typename Combine, typename A>
__device__ __forceinline__ A map_reduce(A value, Combine combine) {
  SHARED_ARRAY(A, partial, [kPatternWarps][kMapGroup]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int lanes = kWarp / 2; lanes >= kMapGroup; lanes /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));
  }
  __syncthreads();  // an earlier call may still be reading
  if (lane < kMapGroup) partial[warp][lane] = value;
  __syncthreads();
  A total = partial[0][lane % kMapGroup];
#pragma unroll
  for (int w = 1; w < kPatternWarps; ++w) total = combine(total, partial[w][lane % kMapGroup]);
  return total;
}

// Products of a warp's positions with a group of vectors: lane l gets that of position
// l / kMapGroup, of which `positions` exist, and vector l % kMapGroup, of which `maps` do; garbage
// beyond.
template <typename T>
__device__ __forceinline__ Accumulator<T> products(const T* rows, int64_t pitch, int positions,
                                                   const T* vectors, int maps, int channels,
                                                   bool wide) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size;
  A sum[kWarp] = {};
  for (int c = threadIdx.x % kWarp * size; c < channels; c += kWarp * size) {
    Vector<T> x[kWarpPositions];
#pragma unroll
    for (int r = 0; r < kWarpPositions; ++r) {
      const int existing = r < positions ? r : positions - 1;
      x[r] = load_part(rows + existing * pitch, c, channels, wide);
    }
#pragma unroll
    for (int p = 0; p < kMapGroup; ++p) {
      if (p >= maps) break;
      const Vector<T> v =
          load_part(vectors + static_cast<int64_t>(p) * channels, c, channels, wide);
#pragma unroll
      for (int r = 0; r < kWarpPositions; ++r) {
#pragma unroll
        for (int i = 0; i < size; ++i) {
          sum[r * kMapGroup + p] += widen(x[r].at[i]) * widen(v.at[i]);
        }
      }
    }
  }
  return transposed_sum(sum);
}

// What a lane of the scores kernels is responsible for: blocks take tiles of positions of a sample
// along x and groups along y.
struct ScorePlace {
  int64_t sample;
  int group, first, position, slot, map;  // first: the warp's first position
  bool here;                              // both the position and the map exist

  __device__ __forceinline__ explicit ScorePlace(const PatternShape& shape) {
    const int tiles = (shape.positions + kScoreTile - 1) / kScoreTile, lane = threadIdx.x % kWarp;
    sample = blockIdx.x / tiles;
    group = blockIdx.y;
    first = blockIdx.x % tiles * kScoreTile + threadIdx.x / kWarp * kWarpPositions;
    position = first + lane / kMapGroup;
    slot = lane % kMapGroup;
    map = group * kMapGroup + slot;
    here = position < shape.positions && map < shape.maps;
  }
  // The place's entry of a tensor [B, P, S].
  __device__ __forceinline__ int64_t planar(const PatternShape& shape) const {
    return (sample * shape.maps + map) * shape.positions + position;
  }
  __device__ __forceinline__ int64_t grouped(const PatternShape& shape) const {
    return group_offset(shape, sample, group) + static_cast<int64_t>(position) * kMapGroup + slot;
  }
  template <typename T>
  __device__ __forceinline__ Accumulator<T> product(const T* x, const T* vectors,
                                                    const PatternShape& shape, bool wide) const {
    if (first >= shape.positions) return 0;
    const int from = group * kMapGroup;
    return products(x + sample * shape.batch + first * shape.position, shape.position,
                    shape.positions - first, vectors + static_cast<int64_t>(from) * shape.channels,
                    shape.maps - from, shape.channels, wide);
  }
};

// a of the sigmoid, also rounded to `maps`; the logits of the softmax.
template <typename T>
__global__ void __launch_bounds__(kPatternThreads, kScoreBlocks<T>)
    pattern_scores_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                          const T* __restrict__ bias, Accumulator<T>* __restrict__ scores,
                          T* __restrict__ maps, PatternShape shape, bool sigmoid, bool wide) {
  using A = Accumulator<T>;
  const ScorePlace place(shape);
  A z = place.product(x, weight, shape, wide);
  if (place.position >= shape.positions) return;
  if (place.here && bias != nullptr) z += widen(bias[place.map]);
  if (sigmoid) z = A(1) / (A(1) + exponential(-z));
  scores[place.grouped(shape)] = place.here ? z : A(0);
  if (sigmoid && place.here) maps[place.planar(shape)] = narrow<T>(z);
}

// Softmax over positions, in place and rounded to `maps`; a block takes a group of one sample.
template <typename T>
__global__ void __launch_bounds__(kPatternThreads)
    pattern_softmax_kernel(Accumulator<T>* __restrict__ scores, T* __restrict__ maps,
                           PatternShape shape) {
  using A = Accumulator<T>;
  constexpr int step = kPatternThreads / kMapGroup;
  const int slot = threadIdx.x % kMapGroup, first = threadIdx.x / kMapGroup;
  const int map = blockIdx.y * kMapGroup + slot;
  A* const row = scores + group_offset(shape, blockIdx.x, blockIdx.y) + slot;
  A top = row[0];
  for (int s = first; s < shape.positions; s += step) top = Maximum{}(top, row[s * kMapGroup]);
  top = map_reduce(top, Maximum{});
  A sum = 0;
  for (int s = first; s < shape.positions; s += step) {
    const A raised = exponential(row[s * kMapGroup] - top);
    row[s * kMapGroup] = raised;
    sum += raised;
  }
  const A scale = A(1) / map_reduce(sum, Sum{});
  const bool here = map < shape.maps;
  T* const out = maps + (static_cast<int64_t>(blockIdx.x) * shape.maps + map) * shape.positions;
  for (int s = first; s < shape.positions; s += step) {
    const A a = here ? row[s * kMapGroup] * scale : A(0);
    row[s * kMapGroup] = a;
    if (here) out[s] = narrow<T>(a);
  }
}

// out[unit, p, c] = sum over the unit's `each` samples and all positions of scores x / divisor. A
// block takes kPatternColumns channels of a unit and a group of maps; its warps share the
// positions.
template <typename T, typename Out>
__global__ void __launch_bounds__(kPatternThreads, 2)
    pattern_sums_kernel(const T* __restrict__ x, const Accumulator<T>* __restrict__ scores,
                        Out* __restrict__ out, PatternShape shape, int samples, int each,
                        Accumulator<T> divisor, bool wide) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size, pieces = kMapGroup / Vector<A>::size;
  SHARED_ARRAY(A, partial, [kPatternWarps][kPatternColumns<T>]);
  const int chunks = (shape.channels + kPatternColumns<T> - 1) / kPatternColumns<T>;
  const int unit = blockIdx.x / chunks, group = blockIdx.y;
  const int first = blockIdx.x % chunks * kPatternColumns<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, column = threadIdx.x;
  const int end = samples - unit * each < each ? samples : (unit + 1) * each;

  A sum[kMapGroup][size] = {};
  for (int64_t sample = static_cast<int64_t>(unit) * each; sample < end; ++sample) {
    const T* const rows = x + sample * shape.batch;
    const A* const row_scores = scores + group_offset(shape, sample, group);
#pragma unroll 2
    for (int s = warp; s < shape.positions; s += kPatternWarps) {
      const Vector<T> v =
          load_part(rows + s * shape.position, first + lane * size, shape.channels, wide);
#pragma unroll
      for (int q = 0; q < pieces; ++q) {
        const Vector<A> a = load_vector(row_scores + s * kMapGroup + q * Vector<A>::size);
#pragma unroll
        for (int j = 0; j < Vector<A>::size; ++j) {
#pragma unroll
          for (int i = 0; i < size; ++i) {
            sum[q * Vector<A>::size + j][i] += a.at[j] * widen(v.at[i]);
          }
        }
      }
    }
  }
#pragma unroll
  for (int p = 0; p < kMapGroup; ++p) {
    const int map = group * kMapGroup + p;
    if (map >= shape.maps) break;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < size; ++i) partial[warp][lane * size + i] = sum[p][i];
    __syncthreads();
    if (column >= kPatternColumns<T> || first + column >= shape.channels) continue;
    A total = 0;
#pragma unroll
    for (int w = 0; w < kPatternWarps; ++w) total += partial[w][column];
    const int64_t row = static_cast<int64_t>(unit) * shape.maps + map;
    out[row * shape.channels + first + column] = narrow<Out>(total / divisor);
  }
}

}  // namespace fastreid_vi
