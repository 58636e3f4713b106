// Pattern maps and the features pooled under them, for 16-bit types and up to eight maps: a cluster
// of eight blocks takes a sample and reads it once. Each block keeps an eighth of the channels at
// all positions in shared memory:
//   1. partial scores of its channels by tensor cores
//   2. block r adds the eight parts of every eighth position in order and hands them to all
//   3. each block takes the sigmoid or softmax of all scores; block r writes map r
//   4. features pooled from shared memory by tensor cores
// The formulas stand in pattern_pool.cuh; here the maps are rounded before they weigh x.
#pragma once

#include "pattern_pool.cuh"
#include "tensor_core.cuh"

namespace fastreid_vi {

constexpr int kClusterBlocks = 8;
constexpr int kMatrixRows = 16;  // of a product: positions for the scores, channels for the sums

// Shared memory of a block.
struct ClusterLayout {
  int channels, pitch, rows;  // of a block; positions rounded up, those beyond are zero

  __host__ __device__ constexpr ClusterLayout(int all_channels, int positions)
      : channels(all_channels / kClusterBlocks),
        pitch(channels + 8),  // an odd number of 16 bytes: no bank conflicts
        rows((positions + kMatrixRows - 1) / kMatrixRows * kMatrixRows) {}

  // The slice of x: T [rows, pitch].
  __host__ __device__ constexpr int slice_bytes() const { return rows * pitch * 2; }
  // Partial scores, float [rows, kMapGroup]; the rounded maps when those have been added.
  __host__ __device__ constexpr int score_bytes() const { return rows * kMapGroup * 4; }
  // The weight, T [kMapGroup, pitch]; then the scores; then the pooled features, as the weight.
  __host__ __device__ constexpr int mixed_bytes() const {
    const int weight = kMapGroup * pitch * 2;
    return weight > score_bytes() ? weight : score_bytes();
  }
  __host__ __device__ constexpr int bytes() const {
    return slice_bytes() + score_bytes() + mixed_bytes();
  }
};

// x and weight to shared memory, zero beyond the positions and maps there are.
template <typename T>
__device__ __forceinline__ void load_slice(const ClusterLayout& layout, const PatternShape& shape,
                                           const T* x, const T* weight, T* slice, T* weights) {
  constexpr int size = Vector<T>::size;
  const int vectors = layout.channels / size;
  for (int i = threadIdx.x; i < (layout.rows + kMapGroup) * vectors; i += kPatternThreads) {
    const int row = i / vectors, c = i % vectors * size, map = row - layout.rows;
    T* const to = map < 0 ? slice + row * layout.pitch + c : weights + map * layout.pitch + c;
    if (map < 0 ? row < shape.positions : map < shape.maps) {
      copy_async(to, map < 0 ? x + row * shape.position + c
                             : weight + static_cast<int64_t>(map) * shape.channels + c);
    } else {
      store_vector(to, Vector<T>{});
    }
  }
  copies_done();
}

// Step 1; a warp takes kMatrixRows positions at a time.
template <typename T>
__device__ __forceinline__ void partial_scores(const ClusterLayout& layout, const T* slice,
                                               const T* weights, float* scores) {
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp * kMatrixRows; row < layout.rows;
       row += kPatternWarps * kMatrixRows) {
    const T* const a_row = slice + (row + lane % 16) * layout.pitch + lane / 16 * 8;
    const T* const b_row = weights + lane % 8 * layout.pitch + lane / 8 % 2 * 8;
    float sum[4] = {};
#pragma unroll 4
    for (int c = 0; c < layout.channels; c += 16) {
      uint32_t a[4], b[2];
      load_matrices<false>(a, a_row + c);
      load_matrices<false>(b, b_row + c);
      multiply_add<T>(sum, a, b);
    }
    float* const out = scores + (row + lane / 4) * kMapGroup + lane % 4 * 2;
    out[0] = sum[0];
    out[1] = sum[1];
    out[8 * kMapGroup] = sum[2];
    out[8 * kMapGroup + 1] = sum[3];
  }
}

// Step 2. Four scores at a time.
template <typename T>
__device__ __forceinline__ void share_scores(const ClusterLayout& layout, const PatternShape& shape,
                                             const T* bias, float* scores, float* totals) {
  const int share = layout.rows / kClusterBlocks * kMapGroup;  // entries of a block
  const int first = cluster_rank() * share;
  for (int i = threadIdx.x * 4; i < share; i += kPatternThreads * 4) {
    Vector<float> part[kClusterBlocks], sum;
#pragma unroll
    for (int r = 0; r < kClusterBlocks; ++r) part[r] = load_vector(at_rank(scores, r) + first + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int map = (i + j) % kMapGroup;
      sum.at[j] = 0;
#pragma unroll
      for (int r = 0; r < kClusterBlocks; ++r) sum.at[j] += part[r].at[j];
      if (bias != nullptr && map < shape.maps) sum.at[j] += widen(bias[map]);
    }
#pragma unroll
    for (int r = 0; r < kClusterBlocks; ++r) store_vector(at_rank(totals, r) + first + i, sum);
  }
}

// Step 3: scores to rounded maps, [rows, kMapGroup] both, zero beyond the positions and maps there
// are.
template <typename T>
__device__ __forceinline__ void activate_scores(const ClusterLayout& layout,
                                                const PatternShape& shape, float* totals, T* masks,
                                                bool sigmoid) {
  constexpr int step = kPatternThreads / kMapGroup;
  const int slot = threadIdx.x % kMapGroup, first = threadIdx.x / kMapGroup;
  const bool here = slot < shape.maps;
  float* const row = totals + slot;
  float scale = 1;
  if (!sigmoid) {
    float top = row[0], sum = 0;
    for (int s = first; s < shape.positions; s += step) top = Maximum{}(top, row[s * kMapGroup]);
    top = map_reduce(top, Maximum{});
    for (int s = first; s < shape.positions; s += step) {
      const float raised = exponential(row[s * kMapGroup] - top);
      row[s * kMapGroup] = raised;
      sum += raised;
    }
    scale = 1 / map_reduce(sum, Sum{});
  }
  for (int s = first; s < layout.rows; s += step) {
    const float z = row[s * kMapGroup];
    const float a = sigmoid ? 1 / (1 + exponential(-z)) : z * scale;
    masks[s * kMapGroup + slot] = narrow<T>(here && s < shape.positions ? a : 0.0f);
  }
}

// Step 4: T [kMapGroup, pitch]; a warp takes kMatrixRows channels at a time.
template <typename T>
__device__ __forceinline__ void pool_slice(const ClusterLayout& layout, const T* slice,
                                           const T* masks, T* pooled, float divisor) {
  const int lane = threadIdx.x % kWarp;
  for (int c = threadIdx.x / kWarp * kMatrixRows; c < layout.channels;
       c += kPatternWarps * kMatrixRows) {
    const T* const a_row = slice + (lane % 8 + lane / 16 * 8) * layout.pitch + c + lane / 8 % 2 * 8;
    const T* const b_row = masks + lane % 16 * kMapGroup;
    float sum[4] = {};
#pragma unroll 4
    for (int s = 0; s < layout.rows; s += 16) {
      uint32_t a[4], b[2];
      load_matrices<true>(a, a_row + s * layout.pitch);
      load_matrices<true>(b, b_row + s * kMapGroup);
      multiply_add<T>(sum, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int map = lane % 4 * 2 + i % 2, channel = c + lane / 4 + i / 2 * 8;
      pooled[map * layout.pitch + channel] = narrow<T>(sum[i] / divisor);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPatternThreads, 2)
    pattern_cluster_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                           const T* __restrict__ bias, T* __restrict__ pooled, T* __restrict__ maps,
                           PatternShape shape, bool sigmoid) {
  static_assert(sizeof(T) == 2);
  constexpr int size = Vector<T>::size;
  DYNAMIC_SHARED(unsigned char, memory);
  const ClusterLayout layout(shape.channels, shape.positions);
  T* const slice = reinterpret_cast<T*>(memory);
  float* const scores = reinterpret_cast<float*>(memory + layout.slice_bytes());
  unsigned char* const mixed = memory + layout.slice_bytes() + layout.score_bytes();
  const int rank = cluster_rank();
  const int64_t sample = blockIdx.x / kClusterBlocks;

  load_slice(layout, shape, x + sample * shape.batch + rank * layout.channels,
             weight + rank * layout.channels, slice, reinterpret_cast<T*>(mixed));
  __syncthreads();
  partial_scores(layout, slice, reinterpret_cast<const T*>(mixed), scores);
  cluster_sync();  // all have begun, and their parts are there
  float* const totals = reinterpret_cast<float*>(mixed);
  share_scores(layout, shape, bias, scores, totals);
  cluster_sync();  // from here on a block touches its own memory only
  T* const masks = reinterpret_cast<T*>(scores);
  activate_scores(layout, shape, totals, masks, sigmoid);
  __syncthreads();
  if (rank < shape.maps) {
    T* const out = maps + (sample * shape.maps + rank) * shape.positions;
    for (int s = threadIdx.x; s < shape.positions; s += kPatternThreads) {
      out[s] = masks[s * kMapGroup + rank];
    }
  }
  T* const staged = reinterpret_cast<T*>(mixed);
  pool_slice(layout, slice, masks, staged, sigmoid ? static_cast<float>(shape.positions) : 1.0f);
  __syncthreads();
  const int vectors = layout.channels / size;
  for (int i = threadIdx.x; i < shape.maps * vectors; i += kPatternThreads) {
    const int map = i / vectors, c = i % vectors * size;
    store_vector(pooled + (sample * shape.maps + map) * shape.channels + rank * layout.channels + c,
                 load_vector(staged + map * layout.pitch + c));
  }
}

}  // namespace fastreid_vi
