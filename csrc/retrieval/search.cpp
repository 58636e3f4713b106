#include "search.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "search_rows.h"
#include "turns.h"

namespace fastreid_vi::retrieval {
namespace {

constexpr std::int64_t kRowsPerTurn = 8;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
bool better(const Neighbor<T>& a, const Neighbor<T>& b) {
  return a.key > b.key || (a.key == b.key && a.index < b.index);
}

// The largest T not above x.
template <typename T>
T rounded_down(double x) {
  const T near = static_cast<T>(x);
  return static_cast<double>(near) > x ? std::nextafter(near, -std::numeric_limits<T>::infinity())
                                       : near;
}

}  // namespace

template <typename T>
void row_norms(const Matrix<T>& rows, int threads, std::span<double> norms) {
  take_turns(rows.rows, kRowsPerTurn, workers_for(rows.rows, kRowsPerTurn, threads),
             [&](std::int64_t, std::int64_t begin, std::int64_t end) {
               norms_of(rows, begin, end, norms.data() + begin);
             });
}

// What one thread writes on.
template <typename T>
struct Nearest<T>::Scratch {
  std::vector<std::int32_t> columns;  // columns of a block that survive its filter
  std::vector<T> values;              // closeness, for selections
  std::vector<double> sums;           // [room], dot products or squared distances
  std::vector<double> query;          // [D]
};

template <typename T>
auto Nearest<T>::make_scratches(std::int64_t columns, int threads) const -> std::vector<Scratch> {
  // Memory is claimed here, because an exception inside a thread would end the process.
  std::vector<Scratch> scratches(workers_for(count_, kRowsPerTurn, threads));
  for (Scratch& scratch : scratches) {
    scratch.columns.resize(columns);
    scratch.values.resize(std::max(columns, room_));
    scratch.sums.resize(room_);
    scratch.query.resize(queries_.columns);
  }
  return scratches;
}

template <typename T>
Nearest<T>::Nearest(const Matrix<T>& queries, std::span<const double> norms, std::int64_t k,
                    Metric metric)
    : queries_(queries),
      norms_(norms.begin(), norms.end()),
      k_(k),
      room_(k + std::max<std::int64_t>(k, 16)),
      metric_(metric),
      kept_(queries.rows * room_),
      size_(queries.rows),
      floor_(queries.rows, -std::numeric_limits<T>::infinity()) {}

template <typename T>
void Nearest<T>::open(std::int64_t first_query, std::int64_t count, const Matrix<T>& gallery,
                      std::span<const double> norms, std::int64_t first_index) {
  first_query_ = first_query, count_ = count, first_index_ = first_index;
  gallery_ = gallery, lengths_ = norms;
  terms_.resize(norms.size());
  longest_ = 0, shortest_ = kInfinity;
  for (std::size_t j = 0; j < norms.size(); ++j) {
    const double norm = norms[j];
    longest_ = std::max(longest_, norm);
    if (norm > 0) shortest_ = std::min(shortest_, norm);
    if (metric_ == Metric::kCosine) terms_[j] = norm > 0 ? static_cast<T>(1 / norm) : T{0};
    if (metric_ == Metric::kEuclidean) terms_[j] = static_cast<T>(norm * norm / 2);
  }
  slack_.resize(count);
  limit_.resize(count);
  pending_.assign(count, 0);
  close_.resize(count * room_);
  columns_.resize(count * room_);
  for (std::int64_t row = 0; row < count; ++row) {
    const double norm = norms_[first_query + row], key = floor_[first_query + row];
    slack_[row] = slack(norm);
    double limit = key;  // closeness of a row as good as the k-th
    if (metric_ == Metric::kCosine && std::isfinite(key)) limit = key * norm;
    if (metric_ == Metric::kEuclidean) limit = (norm * norm - key * key) / 2;
    limit_[row] = rounded_down<T>(slack_[row] < kInfinity ? limit - slack_[row] : -kInfinity);
  }
}

// How far closeness() may be from its true value for a query of this norm, roundings of scores
// included: |fl(q.g) - q.g| <= gamma |q| |g| in whatever order a library sums (Higham, 3.5), and
// what underflows. Infinite where something may overflow, so that nothing is discarded.
template <typename T>
double Nearest<T>::slack(double norm) const {
  using Limits = std::numeric_limits<T>;
  constexpr double kUnit = Limits::epsilon() / 2.0, kTiny = Limits::min();
  const auto dim = static_cast<double>(queries_.columns);
  const double reach = (norm + longest_) * (norm + longest_);
  if (dim * kUnit > 0.25 || !(reach < Limits::max() / 8) || !(shortest_ > 4 * kTiny)) {
    return kInfinity;
  }
  // Scores have a rounding error of the same kind themselves when T is double.
  const double gamma = (std::is_same_v<T, double> ? 2 : 1) * dim * kUnit / (1 - dim * kUnit);
  const double underflow = dim * kTiny * (1 + norm + longest_);
  if (metric_ == Metric::kCosine) return (gamma + 16 * kUnit) * norm + underflow / shortest_;
  if (metric_ == Metric::kInner) return (gamma + 16 * kUnit) * norm * longest_ + underflow;
  return gamma * norm * longest_ + 16 * kUnit * reach + underflow;
}

template <typename T>
void Nearest<T>::add(const Matrix<T>& products, std::int64_t first_column, int threads) {
  std::vector<Scratch> scratches = make_scratches(products.columns, threads);
  take_turns(count_, kRowsPerTurn, std::ssize(scratches),
             [&](std::int64_t worker, std::int64_t begin, std::int64_t end) {
               for (std::int64_t row = begin; row < end; ++row) {
                 add_row(row, products.row(row), products.columns, first_column, scratches[worker]);
               }
             });
}

// Those of a block that may be among the best join the pending ones.
template <typename T>
void Nearest<T>::add_row(std::int64_t row, const T* products, std::int64_t columns,
                         std::int64_t first_column, Scratch& scratch) {
  const T* terms = terms_.data() + first_column;
  std::int32_t* found = scratch.columns.data();
  const std::int64_t count = survivors(metric_, products, terms, columns, limit_[row], found);
  if (count > k_ && slack_[row] < kInfinity) {
    // k of them are at least as close as this, so others need no score.
    T* values = scratch.values.data();
    for (std::int64_t c = 0; c < count; ++c) {
      values[c] = closeness(metric_, products[found[c]], terms[found[c]]);
    }
    std::nth_element(values, values + k_ - 1, values + count, std::greater<T>());
    limit_[row] = std::max(limit_[row], rounded_down<T>(values[k_ - 1] - 2 * slack_[row]));
  }
  T* close = close_.data() + row * room_;
  std::int32_t* pending = columns_.data() + row * room_;
  for (std::int64_t c = 0; c < count; ++c) {
    const T value = closeness(metric_, products[found[c]], terms[found[c]]);
    if (value < limit_[row]) continue;
    close[pending_[row]] = value;
    pending[pending_[row]++] = static_cast<std::int32_t>(first_column + found[c]);
    if (pending_[row] < room_) continue;
    thin(row, scratch);
    if (pending_[row] > k_ + (room_ - k_) / 2) settle(row, scratch);
  }
}

// Drops pending ones that are too far behind the k-th closest of them.
template <typename T>
void Nearest<T>::thin(std::int64_t row, Scratch& scratch) {
  if (slack_[row] == kInfinity || pending_[row] <= k_) return;
  T* close = close_.data() + row * room_;
  std::int32_t* pending = columns_.data() + row * room_;
  T* values = scratch.values.data();
  std::copy_n(close, pending_[row], values);
  std::nth_element(values, values + k_ - 1, values + pending_[row], std::greater<T>());
  limit_[row] = std::max(limit_[row], rounded_down<T>(values[k_ - 1] - 2 * slack_[row]));
  std::int64_t size = 0;
  for (std::int64_t c = 0; c < pending_[row]; ++c) {
    close[size] = close[c];
    pending[size] = pending[c];
    size += !(close[c] < limit_[row]);
  }
  pending_[row] = size;
}

// Scores the pending ones and keeps the best.
template <typename T>
void Nearest<T>::settle(std::int64_t row, Scratch& scratch) {
  const std::int64_t query = first_query_ + row, count = pending_[row];
  const std::int32_t* columns = columns_.data() + row * room_;
  const double norm = norms_[query];
  double* sums = scratch.sums.data();
  std::copy_n(queries_.row(query), queries_.columns, scratch.query.begin());
  if (metric_ == Metric::kEuclidean) {
    squared_distances(scratch.query.data(), gallery_, columns, count, sums);
  } else {
    dot_products(scratch.query.data(), gallery_, columns, count, sums);
  }
  for (std::int64_t c = 0; c < count; ++c) {
    double score = sums[c];
    if (metric_ == Metric::kEuclidean) score = -std::sqrt(score);
    if (metric_ == Metric::kCosine) {
      const double other = lengths_[columns[c]];
      score = norm > 0 && other > 0 ? std::clamp(score / norm / other, -1.0, 1.0) : 0;
    }
    const T key = static_cast<T>(score) + T{0};  // no -0.0
    if (key < floor_[query]) continue;
    kept_[query * room_ + size_[query]++] = {key, first_index_ + columns[c]};
    if (size_[query] == room_) compact(query);
  }
  pending_[row] = 0;
}

// Keeps the k best and remembers the worst of them.
template <typename T>
void Nearest<T>::compact(std::int64_t query) {
  Neighbor<T>* kept = kept_.data() + query * room_;
  std::nth_element(kept, kept + k_ - 1, kept + size_[query], better<T>);
  size_[query] = k_;
  floor_[query] = kept[k_ - 1].key;
}

template <typename T>
void Nearest<T>::close(int threads) {
  std::vector<Scratch> scratches = make_scratches(0, threads);
  take_turns(count_, kRowsPerTurn, std::ssize(scratches),
             [&](std::int64_t worker, std::int64_t begin, std::int64_t end) {
               for (std::int64_t row = begin; row < end; ++row) {
                 if (pending_[row] == 0) continue;
                 thin(row, scratches[worker]);
                 settle(row, scratches[worker]);
                 if (size_[first_query_ + row] >= k_) compact(first_query_ + row);
               }
             });
  count_ = 0;
  gallery_ = {};
  lengths_ = {};
}

template <typename T>
void Nearest<T>::take(std::span<T> scores, std::span<std::int64_t> indices, int threads) {
  if (!std::all_of(size_.begin(), size_.end(), [this](auto size) { return size >= k_; })) {
    throw std::logic_error("take: a query has seen fewer than k gallery rows");
  }
  const auto order = [&](std::int64_t, std::int64_t begin, std::int64_t end) {
    for (std::int64_t query = begin; query < end; ++query) {
      compact(query);
      Neighbor<T>* kept = kept_.data() + query * room_;
      std::sort(kept, kept + k_, better<T>);
      for (std::int64_t m = 0; m < k_; ++m) {
        scores[query * k_ + m] = metric_ == Metric::kEuclidean ? T{0} - kept[m].key : kept[m].key;
        indices[query * k_ + m] = kept[m].index;
      }
    }
  };
  take_turns(queries(), kRowsPerTurn, workers_for(queries(), kRowsPerTurn, threads), order);
}

template void row_norms(const Matrix<float>&, int, std::span<double>);
template void row_norms(const Matrix<double>&, int, std::span<double>);
template class Nearest<float>;
template class Nearest<double>;

}  // namespace fastreid_vi::retrieval
