// Launch and registration of the kernels of search.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "stream.h"
#include "topk.cuh"

namespace {

using fastreid_vi::input;
using fastreid_vi::kScoreThreads;
using fastreid_vi::kTopKBuffer;
using fastreid_vi::kTopKLongest;
using fastreid_vi::kTopKThreads;
using fastreid_vi::kVectorBytes;
using fastreid_vi::kWarp;
using fastreid_vi::output;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowLimit = std::numeric_limits<int32_t>::max();

// A matrix of float32 or float64 with unit stride along its rows; a copy where it had another.
Tensor rows_of(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.scalar_type() == ScalarType::Float ||
                                   x.scalar_type() == ScalarType::Double),
                  name, ": expected a matrix of float32 or float64");
  STD_TORCH_CHECK(x.size(0) < kRowLimit && x.size(1) < kRowLimit, name,
                  ": expected fewer than 2^31 rows and columns");
  return x.size(1) <= 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

Tensor shaped(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(
      x.scalar_type() == dtype && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name,
      ": expected shape [", rows, ", ", columns, "] and a dtype that fits");
  return torch::stable::contiguous(x);
}

Tensor vector_of(const Tensor& x, const char* name, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.dim() == 1 && x.numel() == length, name,
                  ": expected ", dtype == ScalarType::Double ? "float64" : "float32", " of shape [",
                  length, "]");
  return torch::stable::contiguous(x);
}

template <typename T>
bool aligned(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kVectorBytes == 0;
}

template <typename F>
void for_dtype(const Tensor& x, F&& body) {
  if (x.scalar_type() == ScalarType::Double) return body.template operator()<double>();
  body.template operator()<float>();
}

std::tuple<Tensor, Tensor> merge_top_k(const Tensor& best, const Tensor& best_index,
                                       const Tensor& scores, const std::optional<Tensor>& indices,
                                       const std::optional<Tensor>& scale,
                                       const std::optional<Tensor>& shift, int64_t first_index,
                                       int64_t k) {
  const Tensor own = rows_of(scores, "merge_top_k: scores");
  const ScalarType dtype = own.scalar_type();
  const int64_t rows = own.size(0), columns = own.size(1);
  STD_TORCH_CHECK(best.dim() == 2, "merge_top_k: best: expected a matrix");
  const int64_t listed = best.size(1), kept = std::min(k, listed + columns);
  STD_TORCH_CHECK(k >= 1 && listed <= k && k <= kTopKLongest, "merge_top_k: expected k from 1 to ",
                  kTopKLongest, " and no longer list of the best, got k = ", k, " and a list of ",
                  listed);
  STD_TORCH_CHECK(first_index >= 0 && first_index + columns <= kRowLimit,
                  "merge_top_k: expected indices below 2^31, got first_index ", first_index);
  const Tensor list = shaped(best, "merge_top_k: best", rows, listed, dtype);
  const Tensor places =
      shaped(best_index, "merge_top_k: best_index", rows, listed, ScalarType::Long);
  std::optional<Tensor> given, factor, offset;
  if (indices) given = shaped(*indices, "merge_top_k: indices", rows, columns, ScalarType::Long);
  if (scale) factor = vector_of(*scale, "merge_top_k: scale", columns, dtype);
  if (shift) offset = vector_of(*shift, "merge_top_k: shift", columns, dtype);
  const fastreid_vi::OnDevice device(scores);
  Tensor out = torch::stable::new_empty(own, {rows, kept});
  Tensor out_index = torch::stable::new_empty(own, {rows, kept}, ScalarType::Long);
  if (rows == 0 || kept == 0) return {out, out_index};
  const int padded = fastreid_vi::sort_padded(static_cast<int>(kept));
  const int room = std::max(padded, kTopKBuffer);
  for_dtype(own, [&]<typename T>() {
    using Entry = fastreid_vi::PlacedNumber<T>;
    constexpr int64_t size = fastreid_vi::Vector<T>::size;
    const int64_t bytes = (padded + room) * static_cast<int64_t>(sizeof(Entry));
    const int64_t limit = fastreid_vi::shared_memory_limit() - 1024;
    STD_TORCH_CHECK(bytes <= limit, "merge_top_k: k = ", k, " needs ", bytes,
                    " bytes of shared memory, this device has ", limit);
    const bool wide = columns % size == 0 && (rows <= 1 || own.stride(0) % size == 0) &&
                      aligned<T>(own) && (!factor || aligned<T>(*factor)) &&
                      (!offset || aligned<T>(*offset));
    fastreid_vi::launch(fastreid_vi::merge_top_k_kernel<T>, fastreid_vi::blocks(rows),
                        dim3(kTopKThreads), bytes, device.stream(), input<T>(list),
                        input<int64_t>(places), input<T>(own),
                        given ? input<int64_t>(*given) : nullptr,
                        fastreid_vi::ColumnTerms<T>{factor ? input<T>(*factor) : nullptr,
                                                    offset ? input<T>(*offset) : nullptr},
                        output<T>(out), output<int64_t>(out_index), own.stride(0), first_index,
                        static_cast<int>(listed), static_cast<int>(columns), static_cast<int>(kept),
                        padded, room, wide);
  });
  fastreid_vi::check_launch();
  return {out, out_index};
}

int metric_named(const std::string& name) {
  if (name == "cosine") return fastreid_vi::kPairCosine;
  if (name == "inner") return fastreid_vi::kPairInner;
  STD_TORCH_CHECK(name == "euclidean", "pair_scores: expected a known metric, got ", name);
  return fastreid_vi::kPairEuclidean;
}

dim3 warps(int64_t count) {
  constexpr int64_t per_block = kScoreThreads / kWarp;
  return fastreid_vi::blocks((count + per_block - 1) / per_block);
}

Tensor pair_scores(const Tensor& query, const Tensor& gallery, const Tensor& query_norms,
                   const Tensor& gallery_norms, const Tensor& columns, const std::string& metric) {
  const int known = metric_named(metric);
  const Tensor left = rows_of(query, "pair_scores: query");
  const Tensor right = rows_of(gallery, "pair_scores: gallery");
  STD_TORCH_CHECK(right.scalar_type() == left.scalar_type() && right.size(1) == left.size(1),
                  "pair_scores: expected query and gallery of one dtype and length of rows");
  const Tensor ours =
      vector_of(query_norms, "pair_scores: query_norms", left.size(0), ScalarType::Double);
  const Tensor others =
      vector_of(gallery_norms, "pair_scores: gallery_norms", right.size(0), ScalarType::Double);
  STD_TORCH_CHECK(columns.dim() == 2, "pair_scores: columns: expected a matrix");
  const int64_t rows = left.size(0), listed = columns.size(1);
  const Tensor chosen = shaped(columns, "pair_scores: columns", rows, listed, ScalarType::Long);
  const fastreid_vi::OnDevice device(query);
  Tensor scores = torch::stable::new_empty(left, {rows, listed});
  if (rows == 0 || listed == 0) return scores;
  for_dtype(left, [&]<typename T>() {
    fastreid_vi::launch(
        fastreid_vi::pair_scores_kernel<T>, warps(rows * listed), dim3(kScoreThreads), 0,
        device.stream(),
        fastreid_vi::NormedRows<T>{input<T>(left), input<double>(ours), left.stride(0)},
        fastreid_vi::NormedRows<T>{input<T>(right), input<double>(others), right.stride(0)},
        input<int64_t>(chosen), output<T>(scores), rows * listed, static_cast<int>(listed),
        static_cast<int>(left.size(1)), known);
  });
  fastreid_vi::check_launch();
  return scores;
}

Tensor row_norms(const Tensor& rows) {
  const Tensor own = rows_of(rows, "row_norms: rows");
  const fastreid_vi::OnDevice device(rows);
  Tensor norms = torch::stable::new_empty(own, {own.size(0)}, ScalarType::Double);
  if (own.size(0) == 0) return norms;
  for_dtype(own, [&]<typename T>() {
    fastreid_vi::launch(fastreid_vi::row_norms_kernel<T>, warps(own.size(0)), dim3(kScoreThreads),
                        0, device.stream(), input<T>(own), output<double>(norms), own.stride(0),
                        own.size(0), static_cast<int>(own.size(1)));
  });
  fastreid_vi::check_launch();
  return norms;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("merge_top_k", TORCH_BOX(&merge_top_k));
  m.impl("pair_scores", TORCH_BOX(&pair_scores));
  m.impl("row_norms", TORCH_BOX(&row_norms));
}
