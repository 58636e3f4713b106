// Launch and registration of the kernels of re-ranking.
#include <algorithm>
#include <tuple>

#include "rerank.cuh"
#include "stream.h"

namespace {

using fastreid_vi::input;
using fastreid_vi::kAverageColumns;
using fastreid_vi::kFuseColumns;
using fastreid_vi::kFuseQueries;
using fastreid_vi::kFuseThreads;
using fastreid_vi::kRanksThreads;
using fastreid_vi::kWarp;
using fastreid_vi::output;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();

Tensor matrix(const Tensor& x, const char* name, int64_t rows, int64_t columns, ScalarType dtype) {
  STD_TORCH_CHECK(
      x.scalar_type() == dtype && x.dim() == 2 && x.size(0) == rows && x.size(1) == columns, name,
      ": expected ", dtype == ScalarType::Int ? "int32" : "float32", " of shape [", rows, ", ",
      columns, "]");
  return torch::stable::contiguous(x);
}

Tensor vector_of(const Tensor& x, const char* name, int64_t length, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.dim() == 1 && x.numel() == length, name,
                  ": expected ", dtype == ScalarType::Int ? "int32" : "float32", " of shape [",
                  length, "]");
  return torch::stable::contiguous(x);
}

int number(int64_t value, const char* name) {
  STD_TORCH_CHECK(0 <= value && value < kLimit, name, ": expected 0 to 2^31 - 2, got ", value);
  return static_cast<int>(value);
}

using Sparse = std::tuple<Tensor, Tensor, Tensor>;

Sparse sparse_rows(const Tensor& like, int64_t rows, int64_t room) {
  return {torch::stable::new_empty(like, {rows}, ScalarType::Int),
          torch::stable::new_empty(like, {rows, room}, ScalarType::Int),
          torch::stable::new_empty(like, {rows, room}, ScalarType::Float)};
}

fastreid_vi::RerankOutput filled(const Sparse& rows) {
  return {output<int>(std::get<0>(rows)), output<int>(std::get<1>(rows)),
          output<float>(std::get<2>(rows))};
}

Sparse rerank_neighbors(const Tensor& lists, const Tensor& distances, const Tensor& features,
                        const Tensor& maxima, const Tensor& rounding, int64_t k1, int64_t half,
                        bool expand) {
  STD_TORCH_CHECK(lists.dim() == 2 && features.dim() == 2,
                  "rerank_neighbors: expected lists [R, L] and features [R, D]");
  const int64_t rows = lists.size(0), length = lists.size(1), dim = features.size(1);
  number(rows, "rerank_neighbors: rows");
  number(dim, "rerank_neighbors: features' length");
  const int first = number(k1, "rerank_neighbors: k1"),
            second = number(half, "rerank_neighbors: half");
  const Tensor items = matrix(lists, "rerank_neighbors: lists", rows, length, ScalarType::Int);
  const Tensor near =
      matrix(distances, "rerank_neighbors: distances", rows, length, ScalarType::Float);
  const Tensor vectors =
      matrix(features, "rerank_neighbors: features", rows, dim, ScalarType::Float);
  const Tensor most = vector_of(maxima, "rerank_neighbors: maxima", rows, ScalarType::Float);
  const Tensor least = vector_of(rounding, "rerank_neighbors: rounding", rows, ScalarType::Float);
  const int64_t reach = std::min<int64_t>(first + 1, length);
  const int64_t added = expand ? std::min<int64_t>(second + 1, length) : 0;
  const int64_t room = std::min(reach * (1 + added), rows);
  const fastreid_vi::OnDevice device(lists);
  const Sparse result = sparse_rows(lists, rows, room);
  if (rows == 0) return result;
  const int64_t bytes = 2 * ((rows + 31) / 32) * static_cast<int64_t>(sizeof(uint32_t));
  const int64_t limit = fastreid_vi::shared_memory_limit() - 1024;
  STD_TORCH_CHECK(bytes <= limit, "rerank_neighbors: ", rows, " items need ", bytes,
                  " bytes of shared memory, this device has ", limit);
  const Tensor ranks = torch::stable::new_empty(lists, {rows, length}, ScalarType::Int);
  if (length > 0) {
    constexpr int64_t per_block = kRanksThreads / kWarp;
    fastreid_vi::launch(fastreid_vi::rerank_ranks_kernel,
                        fastreid_vi::blocks((rows * length + per_block - 1) / per_block),
                        dim3(kRanksThreads), 0, device.stream(), input<int>(items),
                        output<int>(ranks), rows * length, static_cast<int>(length));
    fastreid_vi::check_launch();
  }
  fastreid_vi::launch(fastreid_vi::rerank_neighbors_kernel, fastreid_vi::blocks(rows),
                      dim3(fastreid_vi::kNeighborsThreads), bytes, device.stream(),
                      fastreid_vi::RerankLists{input<int>(items), input<float>(near),
                                               input<int>(ranks), static_cast<int>(length)},
                      fastreid_vi::RerankScale{input<float>(most), input<float>(least)},
                      input<float>(vectors), filled(result), static_cast<int>(rows),
                      static_cast<int>(dim), first, second, static_cast<int>(room), expand);
  fastreid_vi::check_launch();
  return result;
}

Sparse rerank_average(const Tensor& lists, const Tensor& counts, const Tensor& columns,
                      const Tensor& values, int64_t room) {
  STD_TORCH_CHECK(lists.dim() == 2 && columns.dim() == 2,
                  "rerank_average: expected lists [M, K] and columns [R, E]");
  const int64_t rows = lists.size(0), listed = lists.size(1);
  const int64_t items = columns.size(0), entries = columns.size(1);
  number(items, "rerank_average: rows");
  const int wanted = number(room, "rerank_average: room");
  const Tensor named = matrix(lists, "rerank_average: lists", rows, listed, ScalarType::Int);
  const Tensor sizes = vector_of(counts, "rerank_average: counts", items, ScalarType::Int);
  const Tensor places = matrix(columns, "rerank_average: columns", items, entries, ScalarType::Int);
  const Tensor weights =
      matrix(values, "rerank_average: values", items, entries, ScalarType::Float);
  const fastreid_vi::OnDevice device(lists);
  const Sparse result = sparse_rows(lists, rows, room);
  if (rows == 0) return result;
  const int64_t bytes =
      std::min<int64_t>(items, kAverageColumns) * static_cast<int64_t>(sizeof(float));
  fastreid_vi::launch(
      fastreid_vi::rerank_average_kernel, fastreid_vi::blocks(rows),
      dim3(fastreid_vi::kAverageThreads), bytes, device.stream(), input<int>(named),
      fastreid_vi::RerankRows{input<int>(sizes), input<int>(places), input<float>(weights)},
      filled(result), static_cast<int>(listed), static_cast<int>(items), static_cast<int>(entries),
      wanted);
  fastreid_vi::check_launch();
  return result;
}

Tensor rerank_fuse(const Tensor& query_counts, const Tensor& query_columns,
                   const Tensor& query_values, const Tensor& gallery_counts,
                   const Tensor& gallery_columns, const Tensor& gallery_values, const Tensor& base,
                   const Tensor& maxima, const Tensor& rounding, int64_t query_sets,
                   int64_t gallery_sets, int64_t columns, double weight) {
  STD_TORCH_CHECK(base.dim() == 2 && query_columns.dim() == 2 && gallery_columns.dim() == 2,
                  "rerank_fuse: expected matrices");
  const int64_t rows = base.size(0), images = base.size(1), others = gallery_columns.size(1);
  const int64_t room = query_columns.size(1), longest = gallery_columns.size(0);
  STD_TORCH_CHECK(query_sets >= 1 && gallery_sets >= 1 && rows % query_sets == 0 &&
                      others == images * gallery_sets,
                  "rerank_fuse: base [query sets x Q, G] does not fit the sets");
  const int last = number(columns, "rerank_fuse: columns");
  const Tensor d = matrix(base, "rerank_fuse: base", rows, images, ScalarType::Float);
  const Tensor n = vector_of(query_counts, "rerank_fuse: query_counts", rows, ScalarType::Int);
  const Tensor c = matrix(query_columns, "rerank_fuse: query_columns", rows, room, ScalarType::Int);
  const Tensor v = matrix(query_values, "rerank_fuse: query_values", rows, room, ScalarType::Float);
  const Tensor gn =
      vector_of(gallery_counts, "rerank_fuse: gallery_counts", others, ScalarType::Int);
  const Tensor gc =
      matrix(gallery_columns, "rerank_fuse: gallery_columns", longest, others, ScalarType::Int);
  const Tensor gv =
      matrix(gallery_values, "rerank_fuse: gallery_values", longest, others, ScalarType::Float);
  const Tensor most = vector_of(maxima, "rerank_fuse: maxima", rows, ScalarType::Float);
  const Tensor least = vector_of(rounding, "rerank_fuse: rounding", rows, ScalarType::Float);
  const int64_t queries = rows / query_sets;
  const fastreid_vi::OnDevice device(base);
  Tensor out = torch::stable::new_empty(base, {queries, images});
  if (queries == 0 || images == 0) return out;
  const int width = std::min(last, kFuseColumns);
  const int64_t chunks = (images + kFuseThreads - 1) / kFuseThreads;
  const int64_t groups = (queries + kFuseQueries - 1) / kFuseQueries;
  fastreid_vi::launch(
      fastreid_vi::rerank_fuse_kernel, fastreid_vi::blocks(groups * chunks), dim3(kFuseThreads),
      width * static_cast<int64_t>(sizeof(fastreid_vi::Vector<float>)), device.stream(),
      fastreid_vi::RerankRows{input<int>(n), input<int>(c), input<float>(v)},
      fastreid_vi::RerankRows{input<int>(gn), input<int>(gc), input<float>(gv)}, input<float>(d),
      fastreid_vi::RerankScale{input<float>(most), input<float>(least)}, output<float>(out),
      fastreid_vi::RerankShape{static_cast<int>(queries), static_cast<int>(query_sets),
                               static_cast<int>(images), static_cast<int>(gallery_sets), last,
                               static_cast<float>(weight)},
      static_cast<int>(room), width, static_cast<int>(chunks));
  fastreid_vi::check_launch();
  return out;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("rerank_neighbors", TORCH_BOX(&rerank_neighbors));
  m.impl("rerank_average", TORCH_BOX(&rerank_average));
  m.impl("rerank_fuse", TORCH_BOX(&rerank_fuse));
}
