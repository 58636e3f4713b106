// The hot loops of search, compiled once per instruction set; same bits from all of them.
#pragma once

#include <cstdint>

#include "search.h"

namespace fastreid_vi::retrieval {

// Sums over d in float64 in a fixed order: 32 lanes, lane l sums d = l, l + 32, ...; then the upper
// half of the lanes is added to the lower until one is left. No fused multiply-add.

// norms[i - begin] = sqrt(sum of rows[i, d]^2), begin <= i < end
void norms_of(const Matrix<float>& rows, std::int64_t begin, std::int64_t end, double* norms);
void norms_of(const Matrix<double>& rows, std::int64_t begin, std::int64_t end, double* norms);

// sums[c] = sum of query[d] rows[columns[c], d]
void dot_products(const double* query, const Matrix<float>& rows, const std::int32_t* columns,
                  std::int64_t count, double* sums);
void dot_products(const double* query, const Matrix<double>& rows, const std::int32_t* columns,
                  std::int64_t count, double* sums);

// sums[c] = sum of (query[d] - rows[columns[c], d])^2
void squared_distances(const double* query, const Matrix<float>& rows, const std::int32_t* columns,
                       std::int64_t count, double* sums);
void squared_distances(const double* query, const Matrix<double>& rows, const std::int32_t* columns,
                       std::int64_t count, double* sums);

// Approximate closeness from a product: itself, times the row's term (cosine: 1 / norm), or minus
// it (euclidean: norm^2 / 2).
template <typename T>
[[gnu::always_inline]] inline T closeness(Metric metric, T product, T term) {
  if (metric == Metric::kCosine) return product * term;
  if (metric == Metric::kEuclidean) return product - term;
  return product;
}

// Writes the columns whose closeness is not below the limit (a NaN is not), rising; their number.
// `columns` has room for `count`.
std::int64_t survivors(Metric metric, const float* products, const float* terms, std::int64_t count,
                       float limit, std::int32_t* columns);
std::int64_t survivors(Metric metric, const double* products, const double* terms,
                       std::int64_t count, double limit, std::int32_t* columns);

}  // namespace fastreid_vi::retrieval
