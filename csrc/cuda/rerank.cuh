// Re-ranking from ranking lists: reciprocal neighbours and their weights V, averages V' of rows of
// V, and the result, as csrc/retrieval/rerank.h has them. Sparse rows are padded to one length,
// their columns ascend; -1 and 0 stand behind the last entry. No sum depends on the order of
// threads: sets are bits, and every sum runs over ascending columns or over a list.
#pragma once

#include "team.cuh"

namespace fastreid_vi {

constexpr int kRanksThreads = 256;      // a warp takes an entry of a list
constexpr int kNeighborsThreads = 128;  // a block takes a row
constexpr int kAverageThreads = 256;    // a block takes a row, and this many words of columns
constexpr int kAverageColumns = 8192;   // in shared memory at a time
constexpr int kFuseThreads = 256;       // a thread takes an image, of each set
constexpr int kFuseBlocks = 4;          // on an SM: for more, compilers keep numbers in memory
constexpr int kFuseQueries = 4;         // of a block
constexpr int kFuseColumns = 6144;      // of V' of these queries in shared memory at a time

// Ranking lists, [rows, length] each.
struct RerankLists {
  const int* items;
  const float* distances;  // NaN where unknown
  const int* ranks;  // of the row's item in the list of the entry; `length` if it is not there
  int length;
};

// Sparse rows.
struct RerankRows {
  const int *counts, *columns;
  const float* values;
};
struct RerankOutput {
  int *counts, *columns;
  float* values;
};

// Where `item` stands in a list; `length` if it does not. A warp, all lanes get the answer.
__device__ __forceinline__ int rank_in(const int* list, int length, int item) {
  int rank = length;
  for (int r = threadIdx.x % kWarp; r < length; r += kWarp) {
    if (list[r] == item) rank = r;
  }
  return warp_reduce(rank, Minimum{});
}

__global__ void __launch_bounds__(kRanksThreads)
    rerank_ranks_kernel(const int* __restrict__ lists, int* __restrict__ ranks, int64_t entries,
                        int length) {
  const int64_t entry =
      blockIdx.x * static_cast<int64_t>(kRanksThreads / kWarp) + threadIdx.x / kWarp;
  if (entry >= entries) return;
  const int own = static_cast<int>(entry / length);
  const int rank = rank_in(lists + static_cast<int64_t>(lists[entry]) * length, length, own);
  if (threadIdx.x % kWarp == 0) ranks[entry] = rank;
}

struct Prefix {
  int before, total;
};

// Sum of the values of threads before this one, and of all; a block of `threads`.
template <int threads>
__device__ __forceinline__ Prefix block_prefix(int value) {
  SHARED_ARRAY(int, sums, [threads / kWarp]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int upto = value;
#pragma unroll
  for (int lanes = 1; lanes < kWarp; lanes *= 2) {
    const int left = __shfl_up_sync(kAllLanes, upto, lanes);
    if (lane >= lanes) upto += left;
  }
  __syncthreads();  // an earlier call may still be reading
  if (lane == kWarp - 1) sums[warp] = upto;
  __syncthreads();
  Prefix found{upto - value, 0};
#pragma unroll
  for (int w = 0; w < threads / kWarp; ++w) {
    if (w < warp) found.before += sums[w];
    found.total += sums[w];
  }
  return found;
}

// Every lane's value added to a sum, in the order of lanes.
__device__ __forceinline__ double add_lanes(double sum, float value) {
#pragma unroll 4
  for (int l = 0; l < kWarp; ++l) sum += __shfl_sync(kAllLanes, value, l);
  return sum;
}

// |a - b|^2 to the bits of the host: 64 lanes, of which a thread has two, added up in double.
__device__ __forceinline__ float squared_distance(const float* a, const float* b, int dim) {
  float low = 0, high = 0;
  for (int k = threadIdx.x % kWarp; k < dim; k += 2 * kWarp) {
    const float x = a[k] - b[k];
    low = fmaf(x, x, low);
    if (k + kWarp >= dim) continue;
    const float y = a[k + kWarp] - b[k + kWarp];
    high = fmaf(y, y, high);
  }
  return static_cast<float>(add_lanes(add_lanes(0, low), high));
}

// R* of a row as bits: its reciprocal neighbours and, with expansion, theirs.
__device__ __forceinline__ void collect_neighbors(const RerankLists& lists, int64_t row, int reach,
                                                  int reach_half, bool expand, uint32_t* initial,
                                                  uint32_t* whole) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int* const list = lists.items + row * lists.length;
  const int* const ranks = lists.ranks + row * lists.length;
  for (int r = threadIdx.x; r < reach; r += kNeighborsThreads) {
    if (ranks[r] >= reach) continue;
    const int j = list[r];
    atomicOr(initial + j / 32, uint32_t(1) << j % 32);
    atomicOr(whole + j / 32, uint32_t(1) << j % 32);
  }
  __syncthreads();
  if (!expand) return;
  for (int r = warp; r < reach; r += kNeighborsThreads / kWarp) {
    if (ranks[r] >= reach) continue;
    const int64_t other = static_cast<int64_t>(list[r]) * lists.length;
    int members = 0, common = 0;
    for (int s = lane; s < reach_half; s += kWarp) {
      if (lists.ranks[other + s] >= reach_half) continue;
      const int j = lists.items[other + s];
      ++members;
      common += initial[j / 32] >> j % 32 & 1;
    }
    members = warp_reduce(members, Sum{});
    common = warp_reduce(common, Sum{});
    if (3 * common <= 2 * members) continue;  // the initial set decides, not the growing one
    for (int s = lane; s < reach_half; s += kWarp) {
      if (lists.ranks[other + s] >= reach_half) continue;
      const int j = lists.items[other + s];
      atomicOr(whole + j / 32, uint32_t(1) << j % 32);
    }
  }
  __syncthreads();
}

// A row's m; at or below its `rounding` it counts as zero: all distances are then zero.
struct RerankScale {
  const float *maxima, *rounding;
};

// V of a row of distances, in place, by the first warp: the sum in double, in the order of columns.
__device__ __forceinline__ void encode_row(float* values, int count, float most, float rounding) {
  const int lane = threadIdx.x % kWarp;
  double sum = 0;
  for (int begin = 0; begin < count; begin += kWarp) {
    const int k = begin + lane;
    float near = 0;
    if (k < count) {
      near = most > rounding ? expf(-(values[k] > 0 ? values[k] : 0.0f) / most) : 1.0f;
      values[k] = near;
    }
    sum = add_lanes(sum, near);
  }
  for (int k = lane; k < count; k += kWarp) values[k] = static_cast<float>(values[k] / sum);
}

// A block takes a row of V. Dynamic shared memory: two bits for each of the `rows` items.
__global__ void __launch_bounds__(kNeighborsThreads)
    rerank_neighbors_kernel(RerankLists lists, RerankScale scale,
                            const float* __restrict__ features, RerankOutput out, int rows, int dim,
                            int k1, int half, int room, bool expand) {
  DYNAMIC_SHARED(uint32_t, initial);
  const int words = (rows + 31) / 32, lane = threadIdx.x % kWarp;
  uint32_t* const whole = initial + words;
  const int64_t row = blockIdx.x;
  for (int w = threadIdx.x; w < 2 * words; w += kNeighborsThreads) initial[w] = 0;
  __syncthreads();
  const int reach = k1 < lists.length ? k1 + 1 : lists.length;
  const int reach_half = half < lists.length ? half + 1 : lists.length;
  collect_neighbors(lists, row, reach, reach_half, expand, initial, whole);

  int* const columns = out.columns + row * room;
  float* const values = out.values + row * room;
  int count = 0;
  for (int begin = 0; begin < words; begin += kNeighborsThreads) {
    const int w = begin + threadIdx.x;
    uint32_t bits = w < words ? whole[w] : 0;
    const Prefix prefix = block_prefix<kNeighborsThreads>(__popc(bits));
    int at = count + prefix.before;
    for (; bits != 0; bits &= bits - 1) columns[at++] = 32 * w + __ffs(bits) - 1;
    count += prefix.total;
  }
  for (int k = count + threadIdx.x; k < room; k += kNeighborsThreads) {
    columns[k] = -1;
    values[k] = 0;
  }
  if (threadIdx.x == 0) out.counts[row] = count;
  __syncthreads();

  const int own = static_cast<int>(row);
  for (int k = threadIdx.x / kWarp; k < count; k += kNeighborsThreads / kWarp) {
    const int j = columns[k];
    const int64_t ours = row * lists.length, theirs = static_cast<int64_t>(j) * lists.length;
    int64_t at = ours + rank_in(lists.items + ours, lists.length, j);
    bool known = at < ours + lists.length;
    if (!known) {
      at = theirs + rank_in(lists.items + theirs, lists.length, own);
      known = at < theirs + lists.length;
    }
    float distance = known ? lists.distances[at] : 0.0f;
    if (!known || distance != distance) {
      distance =
          squared_distance(features + row * dim, features + static_cast<int64_t>(j) * dim, dim);
    }
    if (lane == 0) values[k] = distance;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) encode_row(values, count, scale.maxima[row], scale.rounding[row]);
}

// A block takes a row: the mean of the rows that its list names, -1 for none. Dynamic shared
// memory: a float for each column, kAverageColumns at a time.
__global__ void __launch_bounds__(kAverageThreads)
    rerank_average_kernel(const int* __restrict__ lists, RerankRows in, RerankOutput out,
                          int listed, int columns, int room_in, int room) {
  DYNAMIC_SHARED(float, sums);
  SHARED_ARRAY(uint32_t, words, [kAverageThreads]);
  const int64_t row = blockIdx.x;
  const int* const list = lists + row * listed;
  int rows = 0;
  for (int r = 0; r < listed; ++r) rows += list[r] >= 0;
  int count = 0;
  for (int begin = 0; begin < columns; begin += kAverageColumns) {
    const int width = columns - begin < kAverageColumns ? columns - begin : kAverageColumns;
    for (int c = threadIdx.x; c < width; c += kAverageThreads) sums[c] = 0;
    __syncthreads();
    for (int r = 0; r < listed; ++r) {
      if (list[r] < 0) continue;
      const int64_t first = static_cast<int64_t>(list[r]) * room_in;
      for (int k = threadIdx.x; k < in.counts[list[r]]; k += kAverageThreads) {
        const int c = in.columns[first + k] - begin;
        if (0 <= c && c < width) sums[c] += in.values[first + k];
      }
      __syncthreads();
    }
    for (int first = threadIdx.x / kWarp * kWarp; first < kAverageColumns;
         first += kAverageThreads) {
      const int c = first + threadIdx.x % kWarp;
      const unsigned some = __ballot_sync(kAllLanes, c < width && sums[c] > 0);
      if (threadIdx.x % kWarp == 0) words[first / kWarp] = some;
    }
    __syncthreads();
    uint32_t bits = words[threadIdx.x];
    const Prefix prefix = block_prefix<kAverageThreads>(__popc(bits));
    int at = count + prefix.before;
    for (; bits != 0; bits &= bits - 1, ++at) {
      if (at >= room) break;
      const int c = kWarp * threadIdx.x + __ffs(bits) - 1;
      out.columns[row * room + at] = begin + c;
      out.values[row * room + at] = sums[c] / static_cast<float>(rows);
    }
    count += prefix.total;
    __syncthreads();
  }
  for (int k = count + threadIdx.x; k < room; k += kAverageThreads) {
    out.columns[row * room + k] = -1;
    out.values[row * room + k] = 0;
  }
  if (threadIdx.x == 0) out.counts[row] = count < room ? count : room;
}

// One of the two sides has one set.
struct RerankShape {
  int queries, query_sets, images, gallery_sets;
  int columns;  // of V'
  float weight;
};

// Columns begin, ..., begin + width - 1 of V' of a block's queries, beside each other.
__device__ __forceinline__ void load_queries(const RerankShape& shape, const RerankRows& rows,
                                             int room, int set, int first, int begin, int width,
                                             Vector<float>* tile) {
  __syncthreads();  // the columns before may still be read
  for (int c = threadIdx.x; c < width; c += kFuseThreads) tile[c] = Vector<float>{};
  __syncthreads();
  float* const cells = reinterpret_cast<float*>(tile);
  const int queries = shape.queries - first < kFuseQueries ? shape.queries - first : kFuseQueries;
#pragma unroll 1
  for (int q = 0; q < queries; ++q) {
    const int64_t row = static_cast<int64_t>(set) * shape.queries + first + q;
    for (int k = threadIdx.x; k < rows.counts[row]; k += kFuseThreads) {
      const int c = rows.columns[row * room + k] - begin;
      if (0 <= c && c < width) cells[kFuseQueries * c + q] = rows.values[row * room + k];
    }
  }
  __syncthreads();
}

// F, [queries, images], the mean over sets. A block takes kFuseQueries queries and kFuseThreads
// images. asking: V' of the queries, [sets, queries] rows of `room` entries; gallery: that of the
// images, transposed: entry k of row g at k * sets * images + g. base: [sets, queries, images].
__global__ void __launch_bounds__(kFuseThreads, kFuseBlocks)
    rerank_fuse_kernel(RerankRows asking, RerankRows gallery, const float* __restrict__ base,
                       RerankScale scale, float* __restrict__ out, RerankShape shape, int room,
                       int width, int chunks) {
  DYNAMIC_SHARED(Vector<float>, tile);
  const int first = static_cast<int>(blockIdx.x / chunks) * kFuseQueries;
  const int image = static_cast<int>(blockIdx.x % chunks) * kFuseThreads + threadIdx.x;
  const bool live = image < shape.images;
  const int64_t pitch = static_cast<int64_t>(shape.gallery_sets) * shape.images;
  const float mean = 1.0f / static_cast<float>(shape.query_sets * shape.gallery_sets);
  const float jaccard = (1.0f - shape.weight) * mean, share = shape.weight * mean;
  float result[kFuseQueries] = {};
  for (int set = 0; set < shape.query_sets; ++set) {
    float sums[kFuseQueries] = {};
    for (int other = 0; other < shape.gallery_sets; ++other) {
      const int64_t g = static_cast<int64_t>(other) * shape.images + image;
      const int count = live ? gallery.counts[g] : 0;
      float overlap[kFuseQueries] = {};
      int k = 0;
      for (int begin = 0; begin < shape.columns; begin += width) {
        if (other == 0 || width < shape.columns) {
          load_queries(shape, asking, room, set, first, begin, width, tile);
        }
        for (; k < count; ++k) {
          const int c = gallery.columns[k * pitch + g] - begin;
          if (c >= width) break;
          const float value = gallery.values[k * pitch + g];
          const Vector<float> own = tile[c];
#pragma unroll
          for (int q = 0; q < kFuseQueries; ++q) {
            overlap[q] += own.at[q] < value ? own.at[q] : value;
          }
        }
      }
#pragma unroll
      for (int q = 0; q < kFuseQueries; ++q) {
        const float s = overlap[q] > 1.0f ? 1.0f : overlap[q];  // beyond 1 lies rounding only
        sums[q] += 1.0f - s / (2.0f - s);
      }
    }
#pragma unroll
    for (int q = 0; q < kFuseQueries; ++q) {
      const int query = first + q < shape.queries ? first + q : first;
      const int64_t row = static_cast<int64_t>(set) * shape.queries + query;
      const float most = scale.maxima[row], d = base[row * shape.images + (live ? image : 0)];
      const float scaled = most > scale.rounding[row] ? share / most : 0.0f;
      result[q] += fmaf(scaled, d < 0 ? 0.0f : d, jaccard * sums[q]);
    }
  }
#pragma unroll
  for (int q = 0; q < kFuseQueries; ++q) {
    if (!live || first + q >= shape.queries) continue;
    out[static_cast<int64_t>(first + q) * shape.images + image] = result[q];
  }
}

}  // namespace fastreid_vi
