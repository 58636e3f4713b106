// Weighted regularised triplet loss: all pairs, weighted by softmax. The gradient computes the
// distances again.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/mining.h"
#include "cpu/pairs.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Metric;
using fastreid_vi::Mined;
using fastreid_vi::Rows;
using fastreid_vi::Scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kWeightEps = 1e-6;   // joins the sum of the weights
constexpr std::ptrdiff_t kStats = 6;  // m+, 1/S+, f+, m-, 1/S-, f-

// f = sum of weight * distance over a softmax, 1 / (sum of the weights + eps), and its shift m.
template <typename A>
struct Soft {
  A shift, inverse, mean;
};

// The soft extreme of the distances whose label is (`same`) or is not the anchor's.
template <typename A>
Soft<A> soft_extreme(const A* distance, const int64_t* labels, int64_t count, int64_t label,
                     bool same, A shift) {
  double sum = 0, moment = 0;
  for (int64_t j = 0; j < count; ++j) {
    if ((labels[j] == label) != same) continue;
    const A e = std::exp((same ? distance[j] : -distance[j]) - shift);
    sum += static_cast<double>(e);
    moment += static_cast<double>(e * distance[j]);
  }
  const double inverse = 1 / (sum + kWeightEps);
  return {shift, static_cast<A>(inverse), static_cast<A>(moment * inverse)};
}

using WeightedLoss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

WeightedLoss weighted_triplet_loss(const Tensor& embeddings, const Tensor& labels, bool stable) {
  const auto kind = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const Tensor own = torch::stable::contiguous(labels);
  const int64_t n = embeddings.size(0);
  Tensor loss = torch::stable::new_empty(embeddings, {}, kind);
  Tensor correct = torch::stable::new_empty(own, {}, ScalarType::Long);
  Tensor positive = torch::stable::new_empty(own, {n}, ScalarType::Long);
  Tensor negative = torch::stable::new_empty(own, {n}, ScalarType::Long);
  Tensor slope = torch::stable::new_empty(embeddings, {n}, kind);
  Tensor stats = torch::stable::new_empty(embeddings, {n, kStats}, kind);
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const int64_t* label = own.const_data_ptr<int64_t>();
    int64_t* p = positive.mutable_data_ptr<int64_t>();
    int64_t* q = negative.mutable_data_ptr<int64_t>();
    A *rise = slope.mutable_data_ptr<A>(), *stat = stats.mutable_data_ptr<A>();
    std::vector<A> terms(static_cast<size_t>(n));
    std::vector<char> right(static_cast<size_t>(n));
    const auto weigh = [&](int64_t i, const A* distance) {
      const Mined<A> mined = fastreid_vi::mine(distance, label, n, label[i]);
      const auto over = soft_extreme(distance, label, n, label[i], true, mined.near);
      Soft<A> under{0, 0, 0};
      if (mined.valid()) {
        under = soft_extreme(distance, label, n, label[i], false, stable ? -mined.far : A(0));
      }
      const A gap = over.mean - under.mean, decay = std::exp(-std::abs(gap));
      const A sigmoid = (gap < 0 ? decay : A(1)) / (1 + decay);
      terms[static_cast<size_t>(i)] =
          mined.valid() ? (gap <= 0 ? A(0) : gap) + std::log1p(decay) : A(0);
      right[static_cast<size_t>(i)] = mined.valid() && gap <= 0;
      rise[i] = mined.valid() ? sigmoid / static_cast<A>(n) : A(0);
      p[i] = std::max<int64_t>(mined.positive, 0);
      q[i] = std::max<int64_t>(mined.negative, 0);
      const std::array<A, kStats> row{over.shift,  over.inverse,  over.mean,
                                      under.shift, under.inverse, under.mean};
      std::copy(row.begin(), row.end(), stat + i * kStats);
    };
    if (n > 0) {
      const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
      fastreid_vi::each_anchor(x, x, Metric::euclidean, weigh);
    }
    double sum = 0;
    int64_t count = 0;
    for (const A term : terms) sum += static_cast<double>(term);
    for (const char one : right) count += one;
    *loss.mutable_data_ptr<A>() =
        static_cast<A>(sum / static_cast<double>(std::max<int64_t>(n, 1)));
    *correct.mutable_data_ptr<int64_t>() = count;
  });
  return {loss, correct, positive, negative, slope, stats};
}

// What the forward pass knows of every anchor.
template <typename A>
struct Anchors {
  const int64_t *label, *positive, *negative;
  const A *slope, *stats;
  A grad;
  bool stable;

  // dL / dD_ij of anchor i. The eps in the denominators lets a little of the gradient through the
  // shifts.
  A pair(int64_t i, int64_t j, A d) const {
    const A* s = stats + i * kStats;
    const A eps = static_cast<A>(kWeightEps);
    if (slope[i] == 0) return 0;
    if (label[i] == label[j]) {
      const A through = j == positive[i] ? s[2] * eps * s[1] : A(0);
      return grad * slope[i] * (std::exp(d - s[0]) * s[1] * (1 + d - s[2]) - through);
    }
    const A through = stable && j == negative[i] ? s[5] * eps * s[4] : A(0);
    return -grad * slope[i] * (std::exp(-d - s[3]) * s[4] * (1 - d + s[5]) + through);
  }
};

// Turns distances of rows [first, first + rows) to all into the coefficients of their differences.
// Those of all rows are symmetric: each pair is computed once, and long and short rows alternate so
// that threads get equal shares.
template <typename A>
void push_and_pull(const Anchors<A>& anchors, int64_t first, int64_t rows, int64_t count,
                   A* matrix) {
  const bool symmetric = rows == count;
  const A clamped = std::sqrt(static_cast<A>(fastreid_vi::kSquareFloor));
  fastreid_vi::parallel(rows, 32 * count, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = !symmetric ? item : item % 2 ? rows - 1 - item / 2 : item / 2;
      for (int64_t j = symmetric ? i : 0; j < count; ++j) {
        const A d = matrix[i * count + j];
        const A both = anchors.pair(first + i, j, d) + anchors.pair(j, first + i, d);
        const A coefficient = d <= clamped ? A(0) : both / d;
        matrix[i * count + j] = coefficient;
        if (symmetric) matrix[j * count + i] = coefficient;
      }
    }
  });
}

Tensor weighted_triplet_loss_backward(const Tensor& grad, const Tensor& embeddings,
                                      const Tensor& labels, const Tensor& positive,
                                      const Tensor& negative, const Tensor& slope,
                                      const Tensor& stats, bool stable) {
  using torch::stable::contiguous;
  const Tensor own = contiguous(labels), p = contiguous(positive), q = contiguous(negative);
  const Tensor rise = contiguous(slope), stat = contiguous(stats);
  const int64_t n = embeddings.size(0);
  Tensor dx = torch::stable::new_empty(embeddings, embeddings.sizes());
  if (n == 0) return dx;
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Anchors<A> anchors{own.const_data_ptr<int64_t>(),
                             p.const_data_ptr<int64_t>(),
                             q.const_data_ptr<int64_t>(),
                             rise.const_data_ptr<A>(),
                             stat.const_data_ptr<A>(),
                             *grad.const_data_ptr<A>(),
                             stable};
    const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
    const int64_t strip = fastreid_vi::strip_of(n, n);
    const Scratch<A> matrix(strip * n);
    for (int64_t first = 0; first < n; first += strip) {
      const int64_t rows = std::min(strip, n - first);
      fastreid_vi::distances(x, first, rows, x, Metric::euclidean, strip == n, matrix.get(), n);
      push_and_pull(anchors, first, rows, n, matrix.get());
      fastreid_vi::differences(x, first, rows, x, matrix.get(), nullptr,
                               dx.mutable_data_ptr<T>() + first * x.width, x.width);
    }
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("weighted_triplet_loss", TORCH_BOX(&weighted_triplet_loss));
  m.impl("weighted_triplet_loss_backward", TORCH_BOX(&weighted_triplet_loss_backward));
}
