// Where the matches of each query stand in each gallery, by counting. No row is ever sorted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace fastreid_vi::retrieval {

// Which gallery images a query does not see.
enum class CameraRule {
  kNone,             // it sees all
  kLocation,         // none at the query's place, whoever they show
  kSameIdAndCamera,  // none of its own identity at its own place
};

// A view on a matrix of distances; strides count elements and may be negative.
template <typename T>
struct Distances {
  const T* data;
  std::int64_t rows, columns;
  std::ptrdiff_t row_stride, column_stride;
};

// Identities are dense: 0 .. num_ids - 1. A query may hold -1: nobody in the pool.
// Places are camera locations for kLocation, cameras for kSameIdAndCamera, ignored for kNone.
struct Images {
  std::span<const std::int32_t> ids, places;  // [N]
};

// Gallery t holds the pool columns columns[offsets[t] : offsets[t + 1]], in this order.
struct Galleries {
  std::span<const std::int64_t> columns, offsets;
  std::int64_t size() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
};

// Results, [galleries, queries] each. Positions count kept images from 1; 0 without a match.
struct Counts {
  std::span<std::int32_t> matches;         // n
  std::span<std::int32_t> first_image;     // r_1
  std::span<std::int32_t> first_identity;  // s
  std::span<std::int32_t> last_image;      // r_n
  std::span<double> average_precision;     // NaN without a match
};

// Fills `counts` and returns the first row that holds a NaN, or -1 (counts are complete only then).
// Equal distances go by gallery order, so the result does not depend on `threads`.
template <typename T>
std::int64_t rank_rows(const Distances<T>& distances, const Images& queries, const Images& pool,
                       const Galleries& galleries, CameraRule rule, int threads,
                       const Counts& counts);

}  // namespace fastreid_vi::retrieval
