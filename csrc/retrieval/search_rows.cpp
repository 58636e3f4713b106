#include "search_rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "turns.h"

// A fused multiply-add would give other bits where the instruction set has one.
#if defined(__GNUC__) && !defined(__clang__)
#define UNFUSED_CLONES FASTREID_VI_CLONES __attribute__((optimize("fp-contract=off")))
#else
#define UNFUSED_CLONES FASTREID_VI_CLONES
#endif

namespace fastreid_vi::retrieval {
namespace {

constexpr std::int64_t kLanes = 32;

// A vector holds four lanes: eight accumulators fit in the registers of AVX2 and hide the latency.
constexpr int kVectors = 8;
typedef double Four __attribute__((vector_size(4 * sizeof(double))));

template <typename T>
struct Lanes {
  typedef T Narrow __attribute__((vector_size(4 * sizeof(T))));
};

// By reference: a vector type as an argument has another ABI in each clone.
template <typename T>
[[gnu::always_inline]] inline void load(const T* from, Four& to) {
  typename Lanes<T>::Narrow narrow;
  std::memcpy(&narrow, from, sizeof(narrow));
  to = __builtin_convertvector(narrow, Four);
}

template <bool kDifference, typename T>
[[gnu::always_inline]] inline void accumulate(const double* query, const T* row, Four* sums) {
  for (int v = 0; v < kVectors; ++v) {
    Four a, b;
    load(query + 4 * v, a);
    load(row + 4 * v, b);
    if constexpr (kDifference) {
      a -= b;
      b = a;
    }
    sums[v] += a * b;
  }
}

// Sum of query[d] row[d], or of (query[d] - row[d])^2, in the order that search_rows.h states.
template <bool kDifference, typename T>
[[gnu::always_inline]] inline double sum_of(const double* query, const T* row, std::int64_t size) {
  Four sums[kVectors] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) accumulate<kDifference>(query + d, row + d, sums);
  if (d < size) {
    double rest_of_query[kLanes] = {};
    T rest_of_row[kLanes] = {};
    std::copy(query + d, query + size, rest_of_query);
    std::copy(row + d, row + size, rest_of_row);
    accumulate<kDifference>(rest_of_query, rest_of_row, sums);
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  }
  return (sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]);
}

template <bool kDifference, typename T>
[[gnu::always_inline]] inline void sums_of(const double* query, const Matrix<T>& rows,
                                           const std::int32_t* columns, std::int64_t count,
                                           double* sums) {
  // The rows lie scattered in a large gallery: fetch one while the one before is summed.
  constexpr std::int64_t kAhead = 2, kLine = 64 / sizeof(T);
  for (std::int64_t c = 0; c < count; ++c) {
    if (c + kAhead < count) {
      const T* next = rows.row(columns[c + kAhead]);
      for (std::int64_t d = 0; d < rows.columns; d += kLine) __builtin_prefetch(next + d);
    }
    sums[c] = sum_of<kDifference>(query, rows.row(columns[c]), rows.columns);
  }
}

template <typename T>
[[gnu::always_inline]] inline double norm_of(const T* row, std::int64_t size) {
  Four sums[kVectors] = {};
  std::int64_t d = 0;
  const auto add = [&sums](const T* values) __attribute__((always_inline)) {
    for (int v = 0; v < kVectors; ++v) {
      Four a;
      load(values + 4 * v, a);
      sums[v] += a * a;
    }
  };
  for (; d + kLanes <= size; d += kLanes) add(row + d);
  if (d < size) {
    T rest[kLanes] = {};
    std::copy(row + d, row + size, rest);
    add(rest);
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  }
  return std::sqrt((sums[0][0] + sums[0][2]) + (sums[0][1] + sums[0][3]));
}

// As wide as the values compared, so that a comparison's lanes need no conversion.
template <typename T>
using Flag = std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>;

// Few columns survive: look at 64 at once and, only where one does, at each.
template <Metric kMetric, typename T>
[[gnu::always_inline]] inline std::int64_t filter(const T* products, const T* terms,
                                                  std::int64_t count, T limit,
                                                  std::int32_t* columns) {
  constexpr std::int64_t kGroup = 64;
  std::int64_t size = 0;
  const auto append = [&](std::int64_t begin, std::int64_t end) __attribute__((always_inline)) {
    // Written whether it survives or not: no branch to guess.
    for (std::int64_t j = begin; j < end; ++j) {
      columns[size] = static_cast<std::int32_t>(j);
      size += !(closeness(kMetric, products[j], terms[j]) < limit);
    }
  };
  std::int64_t begin = 0;
  for (; begin + kGroup <= count; begin += kGroup) {
    Flag<T> any = 0;
    for (std::int64_t j = begin; j < begin + kGroup; ++j) {
      any |= !(closeness(kMetric, products[j], terms[j]) < limit);
    }
    if (any) append(begin, begin + kGroup);
  }
  append(begin, count);
  return size;
}

template <typename T>
[[gnu::always_inline]] inline std::int64_t filter(Metric metric, const T* products, const T* terms,
                                                  std::int64_t count, T limit,
                                                  std::int32_t* columns) {
  if (metric == Metric::kCosine) {
    return filter<Metric::kCosine>(products, terms, count, limit, columns);
  }
  if (metric == Metric::kEuclidean) {
    return filter<Metric::kEuclidean>(products, terms, count, limit, columns);
  }
  return filter<Metric::kInner>(products, terms, count, limit, columns);
}

template <typename T>
[[gnu::always_inline]] inline void all_norms(const Matrix<T>& rows, std::int64_t begin,
                                             std::int64_t end, double* norms) {
  for (std::int64_t i = begin; i < end; ++i) norms[i - begin] = norm_of(rows.row(i), rows.columns);
}

}  // namespace

UNFUSED_CLONES void norms_of(const Matrix<float>& rows, std::int64_t begin, std::int64_t end,
                             double* norms) {
  all_norms(rows, begin, end, norms);
}

UNFUSED_CLONES void norms_of(const Matrix<double>& rows, std::int64_t begin, std::int64_t end,
                             double* norms) {
  all_norms(rows, begin, end, norms);
}

UNFUSED_CLONES void dot_products(const double* query, const Matrix<float>& rows,
                                 const std::int32_t* columns, std::int64_t count, double* sums) {
  sums_of<false>(query, rows, columns, count, sums);
}

UNFUSED_CLONES void dot_products(const double* query, const Matrix<double>& rows,
                                 const std::int32_t* columns, std::int64_t count, double* sums) {
  sums_of<false>(query, rows, columns, count, sums);
}

UNFUSED_CLONES void squared_distances(const double* query, const Matrix<float>& rows,
                                      const std::int32_t* columns, std::int64_t count,
                                      double* sums) {
  sums_of<true>(query, rows, columns, count, sums);
}

UNFUSED_CLONES void squared_distances(const double* query, const Matrix<double>& rows,
                                      const std::int32_t* columns, std::int64_t count,
                                      double* sums) {
  sums_of<true>(query, rows, columns, count, sums);
}

UNFUSED_CLONES std::int64_t survivors(Metric metric, const float* products, const float* terms,
                                      std::int64_t count, float limit, std::int32_t* columns) {
  return filter(metric, products, terms, count, limit, columns);
}

UNFUSED_CLONES std::int64_t survivors(Metric metric, const double* products, const double* terms,
                                      std::int64_t count, double limit, std::int32_t* columns) {
  return filter(metric, products, terms, count, limit, columns);
}

}  // namespace fastreid_vi::retrieval
