// The k best gallery rows of every query, from products that come block by block.
//
// Products serve to discard: their rounding error has a bound, and a row that cannot be among the k
// best within it is dropped. What is left gets a score of its own, summed in float64 in one fixed
// order. So neither the shape of the blocks nor the threads nor the library that multiplies shows
// in the result, which is ordered by (score, index).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fastreid_vi::retrieval {

enum class Metric { kCosine, kInner, kEuclidean };

// A view on a matrix with adjacent columns; the stride counts elements.
template <typename T>
struct Matrix {
  const T* data;
  std::int64_t rows, columns;
  std::ptrdiff_t row_stride;
  const T* row(std::int64_t i) const { return data + i * row_stride; }
};

// Euclidean norms of the rows; not finite where a row holds a NaN, an infinity or too much.
template <typename T>
void row_norms(const Matrix<T>& rows, int threads, std::span<double> norms);

// A gallery row among the best; keys fall as rows get worse: similarities, or negated distances.
template <typename T>
struct Neighbor {
  T key;
  std::int64_t index;
};

// For each part of the gallery and each range of queries: open, add until all columns came, close.
template <typename T>
class Nearest {
 public:
  // The queries must outlive this; `norms` are theirs. k >= 1.
  Nearest(const Matrix<T>& queries, std::span<const double> norms, std::int64_t k, Metric metric);

  // The queries first_query .. first_query + count meet the gallery rows [n, D], n < 2^31, that
  // stand at first_index .. first_index + n. Their norms are finite. `gallery` and `norms` stay
  // where they are until `close`. For one query, parts come with rising indices.
  void open(std::int64_t first_query, std::int64_t count, const Matrix<T>& gallery,
            std::span<const double> norms, std::int64_t first_index);

  // Products [count, m] with the rows first_column .. first_column + m of the part.
  void add(const Matrix<T>& products, std::int64_t first_column, int threads);

  // Scores what may be among the best.
  void close(int threads);

  // Best first, [Q, k] each: similarities falling or distances rising, and gallery indices.
  // Throws std::logic_error if a query has seen fewer than k rows.
  void take(std::span<T> scores, std::span<std::int64_t> indices, int threads);

  std::int64_t queries() const { return queries_.rows; }
  std::int64_t k() const { return k_; }
  std::int64_t open_queries() const { return count_; }
  std::int64_t open_rows() const { return gallery_.rows; }

 private:
  struct Scratch;
  std::vector<Scratch> make_scratches(std::int64_t columns, int threads) const;
  double slack(double norm) const;
  void add_row(std::int64_t row, const T* products, std::int64_t columns, std::int64_t first_column,
               Scratch& scratch);
  void thin(std::int64_t row, Scratch& scratch);
  void settle(std::int64_t row, Scratch& scratch);
  void compact(std::int64_t query);

  Matrix<T> queries_;  // [Q, D]
  std::vector<double> norms_;
  std::int64_t k_, room_;
  Metric metric_;
  std::vector<Neighbor<T>> kept_;   // [Q, room], the best so far and some more
  std::vector<std::int64_t> size_;  // [Q]
  std::vector<T> floor_;            // [Q], the k-th best key when last compacted

  // The open part.
  std::int64_t first_query_ = 0, count_ = 0, first_index_ = 0;
  Matrix<T> gallery_{};
  std::span<const double> lengths_;    // [n]
  std::vector<T> terms_;               // [n], see closeness()
  double longest_ = 0, shortest_ = 0;  // norms, zeros left out
  std::vector<double> slack_;          // [count]
  std::vector<T> limit_;               // [count], closeness below it cannot be among the best
  std::vector<std::int64_t> pending_;  // [count], how many wait for a score
  std::vector<T> close_;               // [count, room], their closeness
  std::vector<std::int32_t> columns_;  // [count, room], and rows of the part
};

}  // namespace fastreid_vi::retrieval
