// Launch and registration of the ranking kernels.
#include <algorithm>
#include <string>
#include <tuple>

#include "ranking.cuh"
#include "stream.h"

namespace {

using fastreid_vi::input;
using fastreid_vi::kRankBlocks;
using fastreid_vi::kRankLongest;
using fastreid_vi::kRankShared;
using fastreid_vi::kRankThreads;
using fastreid_vi::output;
using fastreid_vi::RankMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int rule_named(const std::string& name) {
  if (name == "none") return fastreid_vi::kRankNone;
  if (name == "location") return fastreid_vi::kRankLocation;
  STD_TORCH_CHECK(name == "same_id_and_camera", "rank_rows: expected a known rule, got ", name);
  return fastreid_vi::kRankSameIdAndCamera;
}

Tensor vector_of(const Tensor& values, const char* name, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(values.scalar_type() == dtype && values.dim() == 1 && values.numel() == length,
                  "rank_rows: ", name, ": expected ", dtype == ScalarType::Int ? "int32" : "int64",
                  " of shape [", length, "]");
  return torch::stable::contiguous(values);
}

template <typename T>
void launch_ranking(const Tensor& distance, const fastreid_vi::RankLabels& labels,
                    const fastreid_vi::RankGalleries& galleries, const Tensor& nan_column,
                    const fastreid_vi::RankCounts& counts, int64_t num_ids, int64_t most,
                    cudaStream_t stream) {
  const int rows = static_cast<int>(distance.size(0)), ids = static_cast<int>(num_ids);
  fastreid_vi::launch(fastreid_vi::nan_column_kernel<T>, fastreid_vi::blocks(rows),
                      dim3(kRankThreads), 0, stream, input<T>(distance), distance.stride(0),
                      distance.stride(1), output<int>(nan_column),
                      static_cast<int>(distance.size(1)));
  fastreid_vi::check_launch();
  if (galleries.count == 0) return;
  const int64_t bytes = RankMemory<T>::bytes(static_cast<int>(most), ids);
  const bool shared = bytes <= kRankShared;
  // Launches of so many rows follow each other and share the scratch.
  const int step = std::clamp((shared ? kRankLongest : kRankBlocks) / galleries.count, 1, rows);
  const Tensor scratch = torch::stable::new_empty(
      distance, {shared ? 0 : step * galleries.count * bytes}, ScalarType::Byte);
  for (int first = 0; first < rows; first += step) {
    const int64_t count = std::min(step, rows - first) * static_cast<int64_t>(galleries.count);
    fastreid_vi::launch(
        shared ? fastreid_vi::rank_rows_kernel<T, true> : fastreid_vi::rank_rows_kernel<T, false>,
        fastreid_vi::blocks(count), dim3(kRankThreads), shared ? bytes : 0, stream,
        input<T>(distance), distance.stride(0), distance.stride(1), labels, galleries,
        input<int>(nan_column), counts, output<unsigned char>(scratch), bytes, rows, first, ids,
        static_cast<int>(most));
    fastreid_vi::check_launch();
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> rank_rows(
    const Tensor& distance, const Tensor& query_ids, const Tensor& query_places,
    const Tensor& pool_ids, const Tensor& pool_places, const Tensor& columns, const Tensor& offsets,
    int64_t num_ids, int64_t most, const std::string& rule) {
  const bool wide = distance.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(distance.dim() == 2 && (wide || distance.scalar_type() == ScalarType::Float),
                  "rank_rows: expected distance [R, N], float32 or float64");
  const int64_t rows = distance.size(0), pool = distance.size(1), count = offsets.numel() - 1;
  STD_TORCH_CHECK(std::max({rows, pool, num_ids, most, columns.numel(), count}) <= kRankLongest,
                  "rank_rows: expected fewer than 2^30 rows, columns, identities and galleries");
  STD_TORCH_CHECK(count >= 0 && num_ids >= 0 && most >= 0,
                  "rank_rows: expected offsets with an entry, num_ids >= 0 and most >= 0");
  const int known = rule_named(rule);
  const Tensor ids = vector_of(query_ids, "query_ids", rows, ScalarType::Int);
  const Tensor places = vector_of(query_places, "query_places", rows, ScalarType::Int);
  const Tensor of_pool = vector_of(pool_ids, "pool_ids", pool, ScalarType::Int);
  const Tensor at_pool = vector_of(pool_places, "pool_places", pool, ScalarType::Int);
  const Tensor listed = vector_of(columns, "columns", columns.numel(), ScalarType::Int);
  const Tensor limits = vector_of(offsets, "offsets", count + 1, ScalarType::Long);
  const fastreid_vi::OnDevice device(distance);
  const auto empty = [&] {
    return torch::stable::new_empty(distance, {count, rows}, ScalarType::Int);
  };
  Tensor matches = empty(), first_image = empty(), first_identity = empty(), last_image = empty();
  Tensor precision = torch::stable::new_empty(distance, {count, rows}, ScalarType::Double);
  Tensor nan_column = torch::stable::new_empty(distance, {rows}, ScalarType::Int);
  std::tuple result{matches, first_image, first_identity, last_image, precision, nan_column};
  if (rows == 0) return result;
  const fastreid_vi::RankLabels labels{input<int>(ids), input<int>(places), input<int>(of_pool),
                                       input<int>(at_pool), known};
  const fastreid_vi::RankGalleries galleries{input<int>(listed), input<int64_t>(limits),
                                             static_cast<int>(count)};
  const fastreid_vi::RankCounts counts{output<int>(matches), output<int>(first_image),
                                       output<int>(first_identity), output<int>(last_image),
                                       output<double>(precision)};
  const auto ranked = wide ? &launch_ranking<double> : &launch_ranking<float>;
  ranked(distance, labels, galleries, nan_column, counts, num_ids, std::max<int64_t>(most, 1),
         device.stream());
  return result;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) { m.impl("rank_rows", TORCH_BOX(&rank_rows)); }
