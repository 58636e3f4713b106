// Host side of pairs.cuh: rows of embeddings, and how a matrix of pairs is divided among launches.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "pairs.cuh"
#include "stream.h"

namespace fastreid_vi {

// A matrix [N, D] with unit stride along D; a dense copy where it had another.
struct Rows {
  Tensor tensor;
  RowMatrix shape;
};

inline Rows rows_of(const Tensor& x, const char* op) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max() / 4;  // 2 N, and tails
  STD_TORCH_CHECK(x.dim() == 2, op, ": expected embeddings of rank 2, got ", x.dim());
  STD_TORCH_CHECK(x.size(0) <= limit && x.size(1) <= limit, op,
                  ": expected fewer than 2^29 rows and columns");
  const Tensor rows = x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  return {rows, {rows.stride(0), static_cast<int>(x.size(0)), static_cast<int>(x.size(1))}};
}

// Whether 16-byte vectors fit every row.
template <typename T>
bool fits_vectors(const Rows& x) {
  constexpr int64_t size = Vector<T>::size;
  return x.shape.columns % size == 0 && (x.shape.rows <= 1 || x.shape.stride % size == 0) &&
         reinterpret_cast<uintptr_t>(x.tensor.const_data_ptr()) % kVectorBytes == 0;
}

inline Tensor labels_of(const Tensor& labels, int64_t count, const char* op) {
  STD_TORCH_CHECK(
      labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == count, op,
      ": expected int64 labels or indices, one for each of ", count, " rows");
  return torch::stable::contiguous(labels);
}

// A contiguous tensor of `count` elements in the accumulation dtype.
inline Tensor values_of(const Tensor& values, const Tensor& like, int64_t count, const char* op) {
  STD_TORCH_CHECK(
      values.scalar_type() == accumulate_type(like.scalar_type()) && values.numel() == count, op,
      ": expected ", count, " values in the accumulation dtype of the embeddings");
  return torch::stable::contiguous(values);
}

// Panels of rows that are searched one after another. Up to 512 rows there is one; beyond, the
// matrix of all pairs is never stored: a panel has half of the rows at most, 2^22 pairs, and 2^20
// rows, which a grid's second axis holds.
struct PairPlan {
  static constexpr int kOnePanel = 512;
  static constexpr int64_t kPairs = 1 << 22, kRows = 1 << 20;
  static constexpr int64_t kBlocks = 264;  // two for each SM of an H100 or H200

  int rows, columns, depth, panel, splits;
  bool symmetric;

  PairPlan(const RowMatrix& x, const RowMatrix& y, bool self)
      : rows(x.rows), columns(y.rows), panel(x.rows) {
    if (std::max(rows, columns) > kOnePanel) {
      const int64_t fitting = std::min<int64_t>({kPairs / columns, rows / 2, kRows});
      panel = static_cast<int>(std::max<int64_t>(fitting / kPairTile, 1) * kPairTile);
      panel = std::min(panel, rows);
    }
    symmetric = self && panel == rows;
    const int64_t down = tiles(panel), across = tiles(columns);
    const int64_t count = symmetric ? down * (down + 1) / 2 : down * across;
    const int64_t rounds = (x.columns + kPairDepth - 1) / kPairDepth;
    const int64_t parts = std::clamp<int64_t>(kBlocks / count, 1, rounds);
    depth = static_cast<int>((rounds + parts - 1) / parts * kPairDepth);
    splits = (x.columns + depth - 1) / depth;
  }
  static int64_t tiles(int64_t count) { return (count + kPairTile - 1) / kPairTile; }
  PairPanel at(int first) const { return {first, std::min(panel, rows - first), splits}; }
  int64_t scratch() const { return static_cast<int64_t>(splits) * panel * columns; }
  int64_t norms() const { return static_cast<int64_t>(splits) * (panel + columns); }
};

// Sums of one panel. counters and limit may be null.
template <typename T, bool dot>
void launch_pairs(const PairPlan& plan, PairPanel panel, const T* x, const T* y, RowMatrix xs,
                  RowMatrix ys, bool wide, Accumulator<T>* partial, Accumulator<T>* norms,
                  unsigned* counters, const int* limit, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(PairPlan::tiles(plan.columns)),
                  static_cast<unsigned>(PairPlan::tiles(panel.rows)),
                  static_cast<unsigned>(panel.splits));
  x += panel.first * xs.stride;
  xs.rows = panel.rows;
  launch(pair_partials_kernel<T, dot>, grid, dim3(kPairThreads), 0, stream, x, y, partial, norms,
         panel.first == 0 ? counters : nullptr, limit, xs, ys, panel.first, plan.depth,
         plan.symmetric, wide);
}

}  // namespace fastreid_vi
