// Second half of re-ranking: from ranking lists to reciprocal neighbours, their weights V, the
// averages V' and the overlap S. All matrices are sparse rows with ascending columns.
//
// Only the first `rows` items can be neighbours; the others have a list and no row in V.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastreid_vi::retrieval {

// Ranking lists, [rows, length] each.
struct Lists {
  const std::int32_t* items;
  const float* distances;  // NaN where unknown
  std::int64_t rows, length;
  std::span<const std::int32_t> row(std::int64_t i) const {
    return {items + i * length, static_cast<std::size_t>(length)};
  }
};

// Rows of a sparse matrix: columns and values of row i at offsets[i] .. offsets[i + 1].
struct Rows {
  std::span<const std::int64_t> offsets;  // [rows + 1]
  std::span<const std::int32_t> columns;
  std::span<const float> values;
};

struct NeighborSets {
  std::vector<std::int64_t> offsets;  // [rows + 1]
  std::vector<std::int32_t> columns;  // R*, ascending
  std::vector<float> distances;       // to the row's item
};

struct NeighborRule {
  std::int64_t k1, half;  // lengths of the lists and of those that expansion adds
  bool expand;
};

// R* of every row. Distances that no list holds are summed up from `features`, [rows] vectors of
// `size` numbers.
NeighborSets find_neighbors(const Lists& lists, const NeighborRule& rule,
                            std::span<const float* const> features, std::int64_t size, int threads);

// V: exp(-d / m) of every member, divided by the row's sum. A row's m at or below its `rounding`
// counts as zero: all distances are then zero.
void encode(std::span<const std::int64_t> offsets, std::span<const float> distances,
            std::span<const float> maxima, std::span<const float> rounding, int threads,
            std::span<float> values);

// One set of features on either side or on both.
struct TrialShape {
  std::int64_t query_images, query_sets;
  std::int64_t pool_images, gallery_sets;
  std::int64_t rows;  // items that can be neighbours
  std::int64_t k2;
  float weight;
  std::int64_t queries() const { return query_images * query_sets; }
  std::int64_t items() const { return queries() + pool_images * gallery_sets; }
};

struct TrialInput {
  Lists lists, other_lists;               // of the first `rows` items, of the others
  Rows encoding;                          // V
  const float* base;                      // [queries, pool_images], added up over gallery sets
  std::span<const float> maxima;          // [rows] m
  std::span<const float> rounding;        // [rows]
  std::span<const std::int64_t> columns;  // pool images of this gallery
  std::span<const std::int64_t> wanted;   // query images whose results count
};

// F, [wanted, columns], the mean over sets.
void fuse(const TrialShape& shape, const TrialInput& in, int threads, float* out);

// V' of some items; the sets' `distances` are its values.
NeighborSets average(const TrialShape& shape, const TrialInput& in,
                     std::span<const std::int64_t> items);

}  // namespace fastreid_vi::retrieval
