// Cross-modality retrieval loss: soft ranks of the gallery, matches at 1, mismatches at n.
// For each modality as queries, the n rows of the other one as gallery, h = x / max(|x|, floor):
//   d_ij = (1 - h_i . h_j) / 2,  r_i = soft_rank(d_i / strength),  T_ij = 1 for p_i matches, else n
//   L = mean over the q kept queries (0 < p_i < n) and the gallery of |r_ij - T_ij|
// For n > 2 / strength it is linear in the cosines; with S, S_c the gallery's sums of h, of all and
// of identity c, R = sum over kept i of p_i/n h_i and Q_c the sum of identity c's queries:
//   L = (n - 1)/2 + (R . S - sum over kept c of Q_c . S_c) / (strength q n)
// The device decides for each direction; kernels of the general path (cmr_rows.cuh) leave at once
// where there is nothing for them. Sums run in a fixed order.
#pragma once

#include "team.cuh"

namespace fastreid_vi {

constexpr int kCmrThreads = 256;
constexpr int kCmrBatchThreads = 128;  // of cmr_batch_kernel
constexpr int kCmrWarps = kCmrThreads / kWarp;
constexpr int kCmrGroup = 8;  // lanes side by side in a row: 128 bytes
constexpr int kCmrGroups = kCmrThreads / kCmrGroup;
constexpr int kCmrLongest = 16384;  // rows; positions are 16-bit
constexpr double kCmrNormFloor = 1e-8;
constexpr int kCmrPlanInts = 8;    // in front of the tables
constexpr int kCmrItemInts = 7;    // of the tables, for each row
constexpr int kCmrCommonSums = 4;  // rows of sums before those of the identities

// Columns of a block of cmr_columns_kernel.
template <typename T>
constexpr int kCmrColumns = kCmrGroup * Vector<T>::size;

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// A row of the batch: where its identity begins in `order`, the identity's rows of either modality,
// and whether this one is infrared.
struct alignas(16) CmrItem {
  int first, visible, infrared, modality;
};

// h = x * inverse; slack = 1 - |h|^2, zero unless the floor holds the norm.
template <typename A>
struct CmrScale {
  A inverse, slack;
};

// Tables over the rows, in one buffer of ints. A modality names the direction in which it queries.
struct CmrBatch {
  int count, infrared;
  int* plan;       // infrared rows, kept visible queries, kept infrared ones, ticket
  CmrItem* items;  // by row
  int* order;      // rows by identity, modality, position
  int* gallery;    // visible rows, then infrared ones
  int* place;      // of a row among those of its modality

  __device__ __forceinline__ CmrBatch(int* memory, int rows, int infrared_rows)
      : count(rows),
        infrared(infrared_rows),
        plan(memory),
        items(reinterpret_cast<CmrItem*>(memory + kCmrPlanInts)),
        order(memory + kCmrPlanInts + 4 * rows),
        gallery(order + rows),
        place(gallery + rows) {}
  __device__ __forceinline__ CmrBatch(int* memory, int rows) : CmrBatch(memory, rows, memory[0]) {}

  __device__ __forceinline__ int gallery_size(int modality) const {
    return modality ? count - infrared : infrared;
  }
  __device__ __forceinline__ const int* gallery_of(int modality) const {
    return gallery + (modality ? 0 : count - infrared);
  }
  __device__ __forceinline__ int matches(const CmrItem& item) const {
    return item.modality ? item.visible : item.infrared;
  }
  __device__ __forceinline__ bool kept(const CmrItem& item) const {
    const int found = matches(item);
    return found > 0 && found < gallery_size(item.modality);
  }
  // Whether identity c keeps its queries of this modality, and has any.
  __device__ __forceinline__ bool identity_kept(const CmrItem& c, int modality) const {
    const int queries = modality ? c.infrared : c.visible,
              found = modality ? c.visible : c.infrared;
    return queries > 0 && found > 0 && found < gallery_size(modality);
  }
  __device__ __forceinline__ int kept_queries(int modality) const { return plan[1 + modality]; }
  __device__ __forceinline__ bool linear(int modality, double strength) const {
    return gallery_size(modality) > 2 / strength;
  }
};

// A block takes a row: its norm, and by comparing it with all others the row's place in the tables.
template <typename T>
__global__ void __launch_bounds__(kCmrBatchThreads)
    cmr_batch_kernel(const T* __restrict__ x, const int64_t* __restrict__ labels,
                     const int64_t* __restrict__ modalities, int64_t pitch, int rows, int columns,
                     int* __restrict__ tables, CmrScale<Accumulator<T>>* __restrict__ scales) {
  using A = Accumulator<T>;
  const int row = blockIdx.x;
  A square = 0;
  const BlockTeam<kCmrBatchThreads> team{static_cast<int>(threadIdx.x)};
  each_in_row(team, x + row * pitch, columns, [&](T v) { square += widen(v) * widen(v); });
  square = block_reduce(square, Sum{});

  const int64_t label = labels[row];
  const bool is_infrared = modalities[row] != 0;
  uint64_t identity = 0;  // smaller labels; same label visible, infrared; same in all, before
  uint64_t modality = 0;  // infrared; same modality, before
  for (int j = threadIdx.x; j < rows; j += kCmrBatchThreads) {
    const int64_t other = labels[j];
    const bool infrared = modalities[j] != 0, before = j < row && infrared == is_infrared;
    const uint64_t same = other == label;
    identity += static_cast<uint64_t>(other < label) | (same & !infrared) << 16 |
                (same & infrared) << 32 | (same & before) << 48;
    modality += static_cast<uint64_t>(infrared) | static_cast<uint64_t>(before) << 32;
  }
  identity = block_reduce(identity, Sum{});
  modality = block_reduce(modality, Sum{});
  if (threadIdx.x != 0) return;

  const auto field = [&](int i) { return static_cast<int>(identity >> (16 * i) & 0xFFFF); };
  const CmrBatch batch(tables, rows, static_cast<int>(modality & 0xFFFFFFFF));
  const int place = static_cast<int>(modality >> 32);
  batch.items[row] = {field(0), field(1), field(2), is_infrared};
  batch.order[field(0) + (is_infrared ? field(1) : 0) + field(3)] = row;
  batch.gallery[(is_infrared ? rows - batch.infrared : 0) + place] = row;
  batch.place[row] = place;
  if (row == 0) {
    batch.plan[0] = batch.infrared;
    batch.plan[3] = 0;
  }
  constexpr A floor = static_cast<A>(kCmrNormFloor);
  const A norm = square_root(square);
  const bool held = norm < floor;  // not for NaN
  const A unit = norm / floor;
  scales[row] = {A(1) / (held ? floor : norm), held ? A(1) - unit * unit : A(0)};
}

// Some columns of every row of h; zero past the last.
template <typename T>
struct CmrColumns {
  using A = Accumulator<T>;
  static constexpr int size = Vector<T>::size;
  const T* x;
  const CmrScale<A>* scales;
  int64_t pitch;
  int column, columns;
  bool vectors;

  __device__ __forceinline__ void load(int i, A (&h)[size]) const {
    const T* from = x + i * pitch + column;
    const A inverse = scales[i].inverse;
    if (vectors && column + size <= columns) {
      const Vector<T> v = load_vector(from);
#pragma unroll
      for (int c = 0; c < size; ++c) h[c] = widen(v.at[c]) * inverse;
    } else {
#pragma unroll
      for (int c = 0; c < size; ++c) {
        h[c] = column + c < columns ? widen(from[c]) * inverse : A(0);
      }
    }
  }
};

// Sums, padded to whole blocks of columns and aligned.
template <typename A, int size>
__device__ __forceinline__ void load_sums(const A* row, A (&to)[size]) {
#pragma unroll
  for (int i = 0; i < size; i += Vector<A>::size) {
    const Vector<A> v = load_vector(row + i);
#pragma unroll
    for (int j = 0; j < Vector<A>::size; ++j) to[i + j] = v.at[j];
  }
}
template <typename A, int size>
__device__ __forceinline__ void store_sums(A* row, const A (&from)[size]) {
#pragma unroll
  for (int i = 0; i < size; i += Vector<A>::size) {
    Vector<A> v;
#pragma unroll
    for (int j = 0; j < Vector<A>::size; ++j) v.at[j] = from[i + j];
    store_vector(row + i, v);
  }
}

// Where each identity begins in the order; all threads of the block get the number of identities.
__device__ __forceinline__ int list_identities(const CmrBatch& batch, unsigned short* firsts) {
  SHARED_ARRAY(int, found, [kCmrWarps]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int count = 0;
  for (int base = 0; base < batch.count; base += kCmrThreads) {
    const int k = base + threadIdx.x;
    const bool first = k < batch.count && batch.items[batch.order[k]].first == k;
    const unsigned ballot = __ballot_sync(kAllLanes, first);
    if (lane == 0) found[warp] = __popc(ballot);
    __syncthreads();
    int place = count + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kCmrWarps; ++w) {
      if (w < warp) place += found[w];
      count += found[w];
    }
    if (first) firsts[place] = static_cast<unsigned short>(k);
    __syncthreads();
  }
  return count;
}

// The kept queries of both modalities, counted by one block.
__device__ __forceinline__ void count_kept(const CmrBatch& batch) {
  int visible = 0, infrared = 0;
  for (int i = threadIdx.x; i < batch.count; i += kCmrThreads) {
    const CmrItem item = batch.items[i];
    if (!batch.kept(item)) continue;
    (item.modality ? infrared : visible) += 1;
  }
  visible = block_reduce(visible, Sum{});
  infrared = block_reduce(infrared, Sum{});
  if (threadIdx.x != 0) return;
  batch.plan[1] = visible;
  batch.plan[2] = infrared;
}

// Visible S, infrared S, visible R, infrared R of this thread's rows.
template <typename T, typename A, int size>
__device__ __forceinline__ void add_rows(const CmrBatch& batch, const CmrColumns<T>& from,
                                         A (&sum)[kCmrCommonSums][size]) {
  A h[size];
#pragma unroll 2
  for (int i = threadIdx.x / kCmrGroup; i < batch.count; i += kCmrGroups) {
    from.load(i, h);
    const CmrItem item = batch.items[i];
    const bool infrared = item.modality, kept = batch.kept(item);
    const A weight = A(batch.matches(item)) / A(batch.gallery_size(item.modality));
#pragma unroll
    for (int c = 0; c < size; ++c) {
      const A weighted = kept ? weight * h[c] : A(0);
      sum[0][c] += infrared ? A(0) : h[c];
      sum[1][c] += infrared ? h[c] : A(0);
      sum[2][c] += infrared ? A(0) : weighted;
      sum[3][c] += infrared ? weighted : A(0);
    }
  }
}

// A lane's sums over the groups of its warp, into the warp's row of `partial`.
template <typename A, int size, int width>
__device__ __forceinline__ void add_groups(A (&sum)[kCmrCommonSums][size],
                                           A (&partial)[kCmrCommonSums][width]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int s = 0; s < kCmrCommonSums; ++s) {
#pragma unroll
    for (int c = 0; c < size; ++c) {
#pragma unroll
      for (int lanes = kCmrGroup; lanes < kWarp; lanes *= 2) {
        sum[s][c] += __shfl_xor_sync(kAllLanes, sum[s][c], lanes);
      }
      if (lane < kCmrGroup) partial[s][lane * size + c] = sum[s][c];
    }
  }
}

// The rows begin to end - 1 of the order.
template <typename T, typename A, int size>
__device__ __forceinline__ void add_ordered(const CmrBatch& batch, const CmrColumns<T>& from,
                                            int begin, int end, A (&sum)[size]) {
  A h[size];
#pragma unroll 4
  for (int k = begin; k < end; ++k) {
    from.load(batch.order[k], h);
#pragma unroll
    for (int c = 0; c < size; ++c) sum[c] += h[c];
  }
}

// A block takes kCmrColumns columns of all rows; eight lanes take a row, or an identity.
// Forward: its share of (R . S - sum of Q_c . S_c) for either direction. Backward: the sums
// themselves, visible S, infrared S, visible R, infrared R, then at 4 + k those of the rows from k
// on in the order that agree in identity and modality.
template <typename T, bool backward>
__global__ void __launch_bounds__(kCmrThreads, 2)
    cmr_columns_kernel(const T* __restrict__ x, int64_t pitch, int rows, int columns, bool vectors,
                       int* __restrict__ tables,
                       const CmrScale<Accumulator<T>>* __restrict__ scales,
                       double* __restrict__ shares, Accumulator<T>* __restrict__ sums,
                       int64_t sums_pitch) {
  using A = Accumulator<T>;
  constexpr int size = Vector<T>::size, width = kCmrColumns<T>;
  SHARED_ARRAY(A, partial, [kCmrWarps][kCmrCommonSums][width]);
  SHARED_ARRAY(A, total, [kCmrCommonSums][width]);
  DYNAMIC_SHARED(unsigned short, firsts);  // for each row
  const CmrBatch batch(tables, rows);
  const int group = threadIdx.x / kCmrGroup;
  const int column = blockIdx.x * width + threadIdx.x % kCmrGroup * size;
  const CmrColumns<T> from{x, scales, pitch, column, columns, vectors};
  if (blockIdx.x == 0) count_kept(batch);

  A sum[kCmrCommonSums][size] = {};
  add_rows(batch, from, sum);
  add_groups(sum, partial[threadIdx.x / kWarp]);
  __syncthreads();
  for (int i = threadIdx.x; i < kCmrCommonSums * width; i += kCmrThreads) {
    A all = 0;
#pragma unroll
    for (int w = 0; w < kCmrWarps; ++w) all += partial[w][i / width][i % width];
    total[i / width][i % width] = all;
    if constexpr (backward) sums[i / width * sums_pitch + blockIdx.x * width + i % width] = all;
  }
  const int identities = list_identities(batch, firsts);

  double share[2] = {0, 0};
  for (int c = group; c < identities; c += kCmrGroups) {
    const int first = firsts[c];
    const CmrItem item = batch.items[batch.order[first]];
    const bool kept[2] = {batch.identity_kept(item, 0), batch.identity_kept(item, 1)};
    if (!kept[0] && !kept[1]) continue;
    const int middle = first + item.visible;
    A own[2][size] = {};
    add_ordered(batch, from, first, middle, own[0]);
    add_ordered(batch, from, middle, middle + item.infrared, own[1]);
    if constexpr (backward) {
      store_sums(sums + (kCmrCommonSums + first) * sums_pitch + column, own[0]);
      store_sums(sums + (kCmrCommonSums + middle) * sums_pitch + column, own[1]);
    }
    if constexpr (!backward) {
      double product = 0;
#pragma unroll
      for (int j = 0; j < size; ++j) product += static_cast<double>(own[0][j]) * own[1][j];
      if (kept[0]) share[0] -= product;
      if (kept[1]) share[1] -= product;
    }
  }
  if constexpr (!backward) {
    if (threadIdx.x < width) {
      const int c = threadIdx.x;
      share[0] += static_cast<double>(total[2][c]) * total[1][c];
      share[1] += static_cast<double>(total[3][c]) * total[0][c];
    }
    const double visible = block_reduce(share[0], Sum{}), infrared = block_reduce(share[1], Sum{});
    if (threadIdx.x != 0) return;
    shares[2 * blockIdx.x] = visible;
    shares[2 * blockIdx.x + 1] = infrared;
  }
}

}  // namespace fastreid_vi
