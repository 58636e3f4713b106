// The rows of the retrieval loss (cmr.cuh): the general path, for queries with n <= 2 / strength,
// the end of the forward pass, and the gradient.
#pragma once

#include "cmr.cuh"
#include "softrank.cuh"

namespace fastreid_vi {

constexpr int kCmrRowBlocks =
    1024;  // of the general path; each takes rows blockIdx, + gridDim, ...

// Shared bytes of a query of the general path, for each entry of its padded gallery.
template <typename T>
constexpr int kCmrEntryBytes = kSoftRankSlotBytes + static_cast<int>(sizeof(Accumulator<T>));

// |a_scale a - b_scale b|^2, by a warp.
template <typename T, typename A = Accumulator<T>>
__device__ __forceinline__ A square_distance(const T* a, A a_scale, const T* b, A b_scale,
                                             int columns) {
  const int lane = threadIdx.x % kWarp;
  const bool alike =
      (reinterpret_cast<uintptr_t>(a) ^ reinterpret_cast<uintptr_t>(b)) % kVectorBytes == 0;
  const VectorSpan<T> span(a, columns, alike);
  A sum = 0;
#pragma unroll 2
  for (int i = lane; i < span.count; i += kWarp) {
    const int first = span.first + i * Vector<T>::size;
    const Vector<T> u = load_vector(a + first), v = load_vector(b + first);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) {
      const A difference = widen(u.at[j]) * a_scale - widen(v.at[j]) * b_scale;
      sum += difference * difference;
    }
  }
#pragma unroll 1
  for (int i = lane; i < span.odd(columns); i += kWarp) {
    const int j = span.element(i);
    const A difference = widen(a[j]) * a_scale - widen(b[j]) * b_scale;
    sum += difference * difference;
  }
  return warp_reduce(sum, Sum{});
}

// A query of the general path in shared memory: its distances and the blocks of its ranks.
template <typename T>
struct CmrQuery {
  using A = Accumulator<T>;
  RankRow row;
  A* distances;
  const int* gallery;
  int n, blocks;  // no blocks: NaN or infinity among the distances

  __device__ __forceinline__ CmrQuery(unsigned char* memory, int padded)
      : row(memory, padded),
        distances(reinterpret_cast<A*>(memory + padded * kSoftRankSlotBytes)) {}

  // All threads of the block. d = (1 - h_i . h_j) / 2 = (|h_i - h_j|^2 + both slacks) / 4.
  __device__ __forceinline__ void rank(const CmrBatch& batch, const T* x, int64_t pitch,
                                       const CmrScale<A>* scales, int query, int columns,
                                       int padded, double strength) {
    const BlockTeam<kCmrThreads> team{static_cast<int>(threadIdx.x)};
    const int modality = batch.items[query].modality;
    gallery = batch.gallery_of(modality);
    n = batch.gallery_size(modality);
    const CmrScale<A> own = scales[query];
    __syncthreads();  // the query before may still be read
    for (int g = threadIdx.x / kWarp; g < n; g += kCmrWarps) {
      const CmrScale<A> other = scales[gallery[g]];
      const A square = square_distance(x + query * pitch, own.inverse, x + gallery[g] * pitch,
                                       other.inverse, columns);
      if (threadIdx.x % kWarp == 0) distances[g] = (square + own.slack + other.slack) / 4;
    }
    __syncthreads();
    RowRange<A> range(distances[0]);
    for (int g = threadIdx.x; g < n; g += kCmrThreads) range.add(distances[g]);
    range.reduce(team);
    if (!range.finite()) {
      blocks = 0;
    } else if (range.one_block(n, strength)) {
      for (int g = threadIdx.x; g < n; g += kCmrThreads) {
        row.index[g] = static_cast<unsigned short>(g);
      }
      if (threadIdx.x == 0) {
        row.start[0] = 0;
        row.slots[0] = bits_of(range.sum / strength);
      }
      blocks = 1;
      __syncthreads();
    } else {
      const auto distance = [&](int g) { return distances[g]; };
      blocks = pool_row<A>(team, row, n, padded, strength, distance);
    }
  }

  // r - T of the entry at a position of the sorted order.
  __device__ __forceinline__ double error(const CmrBatch& batch, int first, int position,
                                          double strength) const {
    const int g = row.index[position];
    const double rank = rank_block(row, blocks, n, position).rank(distances[g] / strength);
    return rank - (batch.items[gallery[g]].first == first ? 1 : n);
  }
};

// Whether the row is a query of the general path.
__device__ __forceinline__ bool is_general(const CmrBatch& batch, const CmrItem& item,
                                           double strength) {
  return batch.kept(item) && !batch.linear(item.modality, strength);
}

// The mean over one direction, by a block.
__device__ __forceinline__ double direction_loss(const CmrBatch& batch, int modality,
                                                 const double* shares, int column_blocks,
                                                 const double* row_sums, double strength) {
  const double n = batch.gallery_size(modality), kept = batch.kept_queries(modality);
  double sum = 0;
  if (batch.linear(modality, strength)) {
    for (int i = threadIdx.x; i < column_blocks; i += kCmrThreads) sum += shares[2 * i + modality];
    return 0.5 * (n - 1) + block_reduce(sum, Sum{}) / (strength * kept * n);
  }
  for (int i = threadIdx.x; i < batch.count; i += kCmrThreads) {
    const CmrItem item = batch.items[i];
    if (item.modality == modality && batch.kept(item)) sum += row_sums[i];
  }
  return block_reduce(sum, Sum{}) / (kept * n);
}

// Sum of |r - T| for each query of the general path; then the last block to come adds up the loss.
template <typename T>
__global__ void __launch_bounds__(kCmrThreads, 2)
    cmr_loss_kernel(const T* __restrict__ x, int64_t pitch, int rows, int columns,
                    int* __restrict__ tables, const CmrScale<Accumulator<T>>* __restrict__ scales,
                    const double* __restrict__ shares, int column_blocks, double* row_sums,
                    Accumulator<T>* __restrict__ loss, int padded, double strength) {
  DYNAMIC_SHARED(unsigned char, memory);
  SHARED_ARRAY(bool, last, [1]);
  const CmrBatch batch(tables, rows);
  CmrQuery<T> query(memory, padded);
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const CmrItem item = batch.items[i];
    if (!is_general(batch, item, strength)) continue;
    query.rank(batch, x, pitch, scales, i, columns, padded, strength);
    double sum = 0;
    for (int k = threadIdx.x; query.blocks > 0 && k < query.n; k += kCmrThreads) {
      const double error = query.error(batch, item.first, k, strength);
      sum += error < 0 ? -error : error;
    }
    sum = block_reduce(sum, Sum{});
    if (threadIdx.x == 0) row_sums[i] = query.blocks > 0 ? sum : not_a_number();
  }
  if (threadIdx.x == 0) {
    __threadfence();
    last[0] = atomicAdd(batch.plan + 3, 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last[0]) return;
  double total = 0;
  int directions = 0;
  for (int modality = 0; modality < 2; ++modality) {
    if (batch.kept_queries(modality) == 0) continue;
    total += direction_loss(batch, modality, shares, column_blocks, row_sums, strength);
    ++directions;
  }
  if (threadIdx.x == 0) {
    loss[0] = static_cast<Accumulator<T>>(directions == 0 ? 0 : total / directions);
  }
}

// sign(r - T) less its mean over the block, at [query][place in the gallery], for each query of the
// general path; nothing else is written.
template <typename T>
__global__ void __launch_bounds__(kCmrThreads, 2)
    cmr_slopes_kernel(const T* __restrict__ x, int64_t pitch, int rows, int columns,
                      int* __restrict__ tables, const CmrScale<Accumulator<T>>* __restrict__ scales,
                      Accumulator<T>* __restrict__ slopes, int slopes_pitch, int padded,
                      double strength) {
  using A = Accumulator<T>;
  DYNAMIC_SHARED(unsigned char, memory);
  const CmrBatch batch(tables, rows);
  CmrQuery<T> query(memory, padded);
  for (int i = blockIdx.x; i < rows; i += gridDim.x) {
    const CmrItem item = batch.items[i];
    if (!is_general(batch, item, strength)) continue;
    query.rank(batch, x, pitch, scales, i, columns, padded, strength);
    A* slope = slopes + static_cast<int64_t>(i) * slopes_pitch;
    if (query.blocks == 0) {
      for (int g = threadIdx.x; g < query.n; g += kCmrThreads) {
        slope[g] = static_cast<A>(not_a_number());
      }
      continue;
    }
    for (int k = threadIdx.x; k < query.n; k += kCmrThreads) {
      const double error = query.error(batch, item.first, k, strength);
      slope[query.row.index[k]] = static_cast<A>((error > 0) - (error < 0));
    }
    __syncthreads();
    int* signs = reinterpret_cast<int*>(query.row.slots);  // the ranks are no longer needed
    for (int b = threadIdx.x; b < query.blocks; b += kCmrThreads) signs[b] = 0;
    __syncthreads();
    for (int k = threadIdx.x; k < query.n; k += kCmrThreads) {
      atomicAdd(signs + rank_block_number(query.row, query.blocks, k),
                static_cast<int>(slope[query.row.index[k]]));
    }
    __syncthreads();
    for (int k = threadIdx.x; k < query.n; k += kCmrThreads) {
      const int number = rank_block_number(query.row, query.blocks, k);
      const int count = rank_block_size(query.row, query.blocks, query.n, number);
      slope[query.row.index[k]] -= A(signs[number]) / A(count);
    }
  }
}

// How a row's h moves the loss: dh = visible or infrared S, R and an identity's sum, weighted, plus
// the slopes of its pairs in the general path.
template <typename A>
struct CmrPull {
  const A *total, *weighted, *identity;  // sums of the other modality
  A by_total, by_weighted, by_identity;
  const int* others;
  int count;
  A as_query, as_gallery;  // factors of the slopes; zero where the direction is linear or empty
};

template <typename A>
__device__ __forceinline__ CmrPull<A> cmr_pull(const CmrBatch& batch, const CmrItem& item, A grad,
                                               const A* sums, int64_t sums_pitch, double strength) {
  const int own = item.modality, other = 1 - own;
  const double directions = (batch.kept_queries(0) > 0) + (batch.kept_queries(1) > 0);
  double factor[2];  // of the directions in which the row queries, and in which it is gallery
  bool linear[2];
  for (int i = 0; i < 2; ++i) {
    const int modality = i ? other : own;
    const double kept = batch.kept_queries(modality), n = batch.gallery_size(modality);
    factor[i] = kept > 0 ? grad / (directions * strength * kept * n) : 0;
    linear[i] = batch.linear(modality, strength);
  }
  const bool queries = batch.kept(item);
  CmrPull<A> pull{};
  if (queries && linear[0]) {
    pull.by_total = A(factor[0] * batch.matches(item) / batch.gallery_size(own));
    pull.by_identity -= A(factor[0]);
  }
  if (linear[1]) {
    pull.by_weighted = A(factor[1]);
    if (batch.identity_kept(item, other)) pull.by_identity -= A(factor[1]);
  }
  if (queries && !linear[0]) pull.as_query = A(-factor[0] / 2);
  if (!linear[1]) pull.as_gallery = A(-factor[1] / 2);
  pull.total = sums + other * sums_pitch;
  pull.weighted = sums + (2 + other) * sums_pitch;
  pull.identity = sums + (kCmrCommonSums + item.first + (other ? item.visible : 0)) * sums_pitch;
  pull.others = batch.gallery_of(own);
  pull.count = batch.gallery_size(own);
  return pull;
}

// dh of row i at some columns, up to a multiple of h where the projection removes that; h.
template <typename T, typename A, int size>
__device__ __forceinline__ void cmr_pulled(const CmrBatch& batch, const CmrPull<A>& pull,
                                           const CmrColumns<T>& from, int i, const A* slopes,
                                           int slopes_pitch, A (&h)[size], A (&dh)[size]) {
  A other[size];
  from.load(i, h);
#pragma unroll
  for (int c = 0; c < size; ++c) dh[c] = 0;
  const auto add = [&](A weight, const A* sums) {
    if (weight == 0) return;
    load_sums(sums + from.column, other);
#pragma unroll
    for (int c = 0; c < size; ++c) dh[c] += weight * other[c];
  };
  add(pull.by_total, pull.total);
  add(pull.by_weighted, pull.weighted);
  add(pull.by_identity, pull.identity);
  if (pull.as_query == 0 && pull.as_gallery == 0) return;
  const int place = batch.place[i];
  const bool held = from.scales[i].slack != 0;
  for (int g = 0; g < pull.count; ++g) {
    const int j = pull.others[g];
    A weight = 0;
    if (pull.as_query != 0) weight = pull.as_query * slopes[int64_t(i) * slopes_pitch + g];
    if (pull.as_gallery != 0 && batch.kept(batch.items[j])) {
      weight += pull.as_gallery * slopes[int64_t(j) * slopes_pitch + place];
    }
    from.load(j, other);
#pragma unroll
    for (int c = 0; c < size; ++c) dh[c] += weight * (other[c] - (held ? A(0) : h[c]));
  }
}

// A block takes a row: dx = (dh - h (h . dh)) / |x|, or dh / floor where the floor holds the norm.
template <typename T>
__global__ void __launch_bounds__(kCmrThreads, 2)
    cmr_gradient_kernel(const Accumulator<T>* __restrict__ grad, const T* __restrict__ x,
                        int64_t pitch, int rows, int columns, bool vectors, bool dx_vectors,
                        int* __restrict__ tables,
                        const CmrScale<Accumulator<T>>* __restrict__ scales,
                        const Accumulator<T>* __restrict__ sums, int64_t sums_pitch,
                        const Accumulator<T>* __restrict__ slopes, int slopes_pitch,
                        T* __restrict__ dx, double strength) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size;
  const CmrBatch batch(tables, rows);
  const int i = blockIdx.x;
  const CmrScale<A> scale = scales[i];
  const CmrPull<A> pull = cmr_pull(batch, batch.items[i], grad[0], sums, sums_pitch, strength);
  CmrColumns<T> from{x, scales, pitch, 0, columns, vectors};

  A h[size], dh[size], along = 0;
  if (scale.slack == 0) {
    for (int column = threadIdx.x * size; column < columns; column += kCmrThreads * size) {
      from.column = column;
      cmr_pulled(batch, pull, from, i, slopes, slopes_pitch, h, dh);
#pragma unroll
      for (int c = 0; c < size; ++c) along += h[c] * dh[c];
    }
    along = block_reduce(along, Sum{});
  }
  for (int column = threadIdx.x * size; column < columns; column += kCmrThreads * size) {
    from.column = column;
    cmr_pulled(batch, pull, from, i, slopes, slopes_pitch, h, dh);
    Vector<T> v;
#pragma unroll
    for (int c = 0; c < size; ++c) v.at[c] = narrow<T>((dh[c] - h[c] * along) * scale.inverse);
    T* to = dx + static_cast<int64_t>(i) * columns + column;
    if (dx_vectors && column + size <= columns) {
      store_vector(to, v);
    } else {
#pragma unroll
      for (int c = 0; c < size; ++c) {
        if (column + c < columns) to[c] = v.at[c];
      }
    }
  }
}

}  // namespace fastreid_vi
