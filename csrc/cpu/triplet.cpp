// Triplet losses: the hardest pair of every anchor, and all pairs weighted by softmax. Distances of
// a batch are held at once, those of a large one strip by strip, and computed again for the
// gradient.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/pairs.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Gradient;
using fastreid_vi::Metric;
using fastreid_vi::Rows;
using fastreid_vi::Scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumns = 256;     // columns of one sweep over the mined pairs
constexpr double kWeightEps = 1e-6;   // joins the sum of the weights
constexpr std::ptrdiff_t kStats = 6;  // m+, 1/S+, f+, m-, 1/S-, f-

// The farthest positive and the nearest negative of an anchor: the first of equals, and any NaN.
template <typename A>
struct Mined {
  int64_t positive = -1, negative = -1;  // -1: there is none
  A near = 0, far = 0;

  bool valid() const { return positive >= 0 && negative >= 0; }
};

template <typename A>
Mined<A> mine(const A* distance, const int64_t* labels, int64_t count, int64_t label) {
  Mined<A> best;
  for (int64_t j = 0; j < count; ++j) {
    const A d = distance[j];
    if (labels[j] == label) {
      if (best.positive < 0 || d > best.near || (d != d && best.near == best.near)) {
        best.positive = j, best.near = d;
      }
    } else if (best.negative < 0 || d < best.far || (d != d && best.far == best.far)) {
      best.negative = j, best.far = d;
    }
  }
  return best;
}

// Calls body(i, distances of x_i to all of y) for all rows, in parallel.
template <typename A, typename F>
void each_anchor(const Rows<A>& x, const Rows<A>& y, Metric metric, const F& body) {
  const int64_t strip = fastreid_vi::strip_of(x.count, y.count);
  const bool symmetric = &x == &y && strip == x.count;
  const Scratch<A> matrix(strip * y.count);
  for (int64_t first = 0; first < x.count; first += strip) {
    const int64_t rows = std::min(strip, x.count - first);
    fastreid_vi::distances(x, first, rows, y, metric, symmetric, matrix.get(), y.count);
    fastreid_vi::parallel(rows, 4 * y.count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(first + i, matrix.get() + i * y.count);
    });
  }
}

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Loss batch_hard_triplet_loss(const Tensor& embeddings, const Tensor& labels,
                             const std::optional<Tensor>& references,
                             const std::optional<Tensor>& reference_labels, double margin,
                             const std::string& name) {
  const Metric metric = fastreid_vi::metric_of(name);
  const auto kind = fastreid_vi::accumulate_type(embeddings.scalar_type());
  const Tensor own = torch::stable::contiguous(labels);
  const Tensor theirs = reference_labels ? torch::stable::contiguous(*reference_labels) : own;
  const int64_t n = embeddings.size(0), m = theirs.size(0);
  Tensor loss = torch::stable::new_empty(embeddings, {}, kind);
  Tensor correct = torch::stable::new_empty(own, {}, ScalarType::Long);
  Tensor positive = torch::stable::new_empty(own, {n}, ScalarType::Long);
  Tensor negative = torch::stable::new_empty(own, {n}, ScalarType::Long);
  Tensor weight = torch::stable::new_empty(embeddings, {n}, kind);
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const int64_t *label = own.const_data_ptr<int64_t>(), *other = theirs.const_data_ptr<int64_t>();
    std::vector<Mined<A>> mined(static_cast<size_t>(n));
    const auto keep = [&](int64_t i, const A* distance) {
      mined[static_cast<size_t>(i)] = mine(distance, other, m, label[i]);
    };
    if (n > 0 && m > 0) {
      const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, metric);
      if (references) {
        each_anchor(x, fastreid_vi::rows_of<T>(*references, metric), metric, keep);
      } else {
        each_anchor(x, x, metric, keep);
      }
    }
    double sum = 0;
    int64_t right = 0;
    int64_t* p = positive.mutable_data_ptr<int64_t>();
    int64_t* q = negative.mutable_data_ptr<int64_t>();
    A* w = weight.mutable_data_ptr<A>();
    for (int64_t i = 0; i < n; ++i) {
      const Mined<A>& pair = mined[static_cast<size_t>(i)];
      const A hinge = pair.valid() ? pair.near - pair.far + static_cast<A>(margin) : A(0);
      sum += hinge <= 0 ? 0.0 : static_cast<double>(hinge);  // NaN stays
      right += pair.valid() && pair.far >= pair.near;
      p[i] = std::max<int64_t>(pair.positive, 0);
      q[i] = std::max<int64_t>(pair.negative, 0);
      w[i] = hinge > 0 ? A(1) / static_cast<A>(n) : A(0);
    }
    *loss.mutable_data_ptr<A>() =
        static_cast<A>(sum / static_cast<double>(std::max<int64_t>(n, 1)));
    *correct.mutable_data_ptr<int64_t>() = right;
  });
  return {loss, correct, positive, negative, weight};
}

// One column run of coefficient * (x - y) joins dx and leaves dy. The two may be the same row.
template <typename A>
FASTREID_VI_CLONES void pull(const A* x, const A* y, A coefficient, int64_t width, A* dx, A* dy) {
  A term[kColumns];
  for (int64_t k = 0; k < width; ++k) term[k] = coefficient * (x[k] - y[k]);
  for (int64_t k = 0; k < width; ++k) dx[k] += term[k];
  for (int64_t k = 0; k < width; ++k) dy[k] -= term[k];
}

// A pair of rows and the coefficient of their difference in the gradient of the first.
template <typename A>
struct Pull {
  int64_t row, other;
  A coefficient;
};

template <typename A>
FASTREID_VI_CLONES A square_of(const A* x, const A* y, int64_t width) {
  constexpr int64_t kLanes = 16;
  A lane[kLanes] = {}, square = 0;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const A difference = x[i + k] - y[i + k];
      lane[k] += difference * difference;
    }
  }
  for (; i < width; ++i) square += (x[i] - y[i]) * (x[i] - y[i]);
  for (const A part : lane) square += part;
  return square;
}

// The pairs that get a gradient: the positive, pulled by grad * weight, and the negative, pushed.
template <typename A>
std::vector<Pull<A>> pulls(const Rows<A>& x, const Rows<A>& y, Metric metric, A grad,
                           const int64_t* positive, const int64_t* negative, const A* weight) {
  std::vector<Pull<A>> all(static_cast<size_t>(2 * x.count));
  fastreid_vi::parallel(2 * x.count, x.width, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t i = item / 2, j = item % 2 ? negative[i] : positive[i];
      Pull<A>& pull = all[static_cast<size_t>(item)];
      pull = {i, j, 0};
      if (weight[i] == 0 || j < 0 || j >= y.count) continue;
      A scale = item % 2 ? -grad * weight[i] : grad * weight[i];
      if (metric == Metric::sqeuclidean) scale *= 2;
      if (metric == Metric::euclidean) {
        const A square = square_of(x.row(i), y.row(j), x.width);
        scale =
            square <= static_cast<A>(fastreid_vi::kSquareFloor) ? A(0) : scale / std::sqrt(square);
      }
      pull.coefficient = scale;
    }
  });
  std::erase_if(all, [](const Pull<A>& pull) { return pull.coefficient == 0; });
  return all;
}

// Columns are shared out among threads: each sums the pairs in their order, and writes alone.
// Without dy the two sides are the same.
template <typename A, typename T, typename U>
void apply(const Rows<A>& x, const Rows<A>& y, const std::vector<Pull<A>>& pulls, T* dx, U* dy) {
  const bool self = dy == nullptr;
  const int64_t blocks = fastreid_vi::blocks_of(x.width, kColumns);
  const int64_t cost = (static_cast<int64_t>(pulls.size()) + x.count + y.count) * kColumns;
  fastreid_vi::parallel(blocks, cost, [&](int64_t begin, int64_t end) {
    const int64_t sums = x.count + (self ? 0 : y.count);
    const Scratch<A> memory(sums * kColumns);
    A *to = memory.get(), *from = self ? to : to + x.count * kColumns;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kColumns, width = std::min(kColumns, x.width - first);
      std::fill(to, to + sums * kColumns, A(0));
      for (const Pull<A>& p : pulls) {
        pull(x.row(p.row) + first, y.row(p.other) + first, p.coefficient, width,
             to + p.row * kColumns, from + p.other * kColumns);
      }
      for (int64_t i = 0; i < x.count; ++i) {
        fastreid_vi::convert(to + i * kColumns, width, dx + i * x.width + first);
      }
      if (!self) {
        for (int64_t j = 0; j < y.count; ++j) {
          fastreid_vi::convert(from + j * kColumns, width, dy + j * y.width + first);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor> batch_hard_triplet_loss_backward(
    const Tensor& grad, const Tensor& embeddings, const std::optional<Tensor>& references,
    const Tensor& positive, const Tensor& negative, const Tensor& weight, const std::string& name) {
  const Metric metric = fastreid_vi::metric_of(name);
  const Tensor p = torch::stable::contiguous(positive), q = torch::stable::contiguous(negative);
  const Tensor w = torch::stable::contiguous(weight);
  Tensor dx, dr = torch::stable::new_empty(embeddings, {0});
  fastreid_vi::for_floating(embeddings.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const auto pairs = [&](const Rows<A>& x, const Rows<A>& y) {
      return pulls(x, y, metric, *grad.const_data_ptr<A>(), p.const_data_ptr<int64_t>(),
                   q.const_data_ptr<int64_t>(), w.const_data_ptr<A>());
    };
    Gradient<T> own(embeddings, metric);
    const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, metric);
    if (references) {
      Gradient<T> other(*references, metric);
      const Rows<A> y = fastreid_vi::rows_of<T>(*references, metric);
      own.sum(
          [&](auto* to) { other.sum([&](auto* from) { apply(x, y, pairs(x, y), to, from); }); });
      other.finish(y);
      dr = other.tensor;
    } else {
      own.sum([&](auto* to) { apply(x, x, pairs(x, x), to, decltype(to)(nullptr)); });
    }
    own.finish(x);
    dx = own.tensor;
  });
  return {dx, dr};
}

// Weighted regularised triplet loss.

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
      const Mined<A> mined = mine(distance, label, n, label[i]);
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
      each_anchor(x, x, Metric::euclidean, weigh);
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
    const A clamped = std::sqrt(static_cast<A>(fastreid_vi::kSquareFloor));
    const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
    const int64_t strip = fastreid_vi::strip_of(n, n);
    const Scratch<A> matrix(strip * n);
    for (int64_t first = 0; first < n; first += strip) {
      const int64_t rows = std::min(strip, n - first);
      fastreid_vi::distances(x, first, rows, x, Metric::euclidean, strip == n, matrix.get(), n);
      fastreid_vi::parallel(rows, 32 * n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t j = 0; j < n; ++j) {
            A& d = matrix.get()[i * n + j];
            const A both = anchors.pair(first + i, j, d) + anchors.pair(j, first + i, d);
            d = d <= clamped ? A(0) : both / d;
          }
        }
      });
      fastreid_vi::differences(x, first, rows, x, matrix.get(), n,
                               dx.mutable_data_ptr<T>() + first * x.width, x.width);
    }
  });
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("batch_hard_triplet_loss", TORCH_BOX(&batch_hard_triplet_loss));
  m.impl("batch_hard_triplet_loss_backward", TORCH_BOX(&batch_hard_triplet_loss_backward));
  m.impl("weighted_triplet_loss", TORCH_BOX(&weighted_triplet_loss));
  m.impl("weighted_triplet_loss_backward", TORCH_BOX(&weighted_triplet_loss_backward));
}
