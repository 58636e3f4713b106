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
#include "cpu/elementary.h"
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
constexpr int64_t kBlock = 128;       // pairs whose terms are held at once
constexpr std::ptrdiff_t kStats = 6;  // m+, 1/S+, f+, m-, 1/S-, f-

// Sums over the positives or the negatives of an anchor: of e = exp(+-d - shift), and of e d.
template <typename A>
struct Sums {
  A weight = 0, moment = 0;
};

// same[k] = 1 for rows of the anchor's label, else 0: products with it vectorise, choices do not.
template <typename A>
[[gnu::always_inline]] inline void compare(const int64_t* labels, int64_t label, int64_t width,
                                           A* same) {
  for (int64_t k = 0; k < width; ++k) same[k] = labels[k] == label ? A(1) : A(0);
}

template <typename A>
[[gnu::always_inline]] inline A weight_of(A d, A same, A over, A under) {
  const A exponent = (2 * same - 1) * d - (same * over + (1 - same) * under);
  return fastreid_vi::exponential(exponent);
}

// Both sums in one sweep, in lanes; the exponents are not positive.
template <typename A>
FASTREID_VI_CLONES void soft_sums(const A* distance, const int64_t* labels, int64_t count,
                                  int64_t label, A over, A under, Sums<A>* positive,
                                  Sums<A>* negative) {
  constexpr int64_t kLanes = 16;
  A weights[kLanes] = {}, moments[kLanes] = {}, others[kLanes] = {}, distances[kLanes] = {};
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t width = std::min(kBlock, count - j);
    A same[kBlock] = {}, e[kBlock] = {}, d[kBlock] = {};
    std::copy(distance + j, distance + j + width, d);
    compare(labels + j, label, width, same);
    for (int64_t k = 0; k < width; ++k) e[k] = weight_of(d[k], same[k], over, under);
    for (int64_t first = 0; first < width; first += kLanes) {
      for (int64_t k = 0; k < kLanes; ++k) {
        const A near = same[first + k] * e[first + k], far = e[first + k] - near;
        weights[k] += near;
        others[k] += far;
        moments[k] += near * d[first + k];
        distances[k] += far * d[first + k];
      }
    }
  }
  for (int64_t k = 0; k < kLanes; ++k) {
    positive->weight += weights[k], positive->moment += moments[k];
    negative->weight += others[k], negative->moment += distances[k];
  }
}

// A softmax over the positives or the negatives: its shift m, 1 / (sum of the weights + eps), and
// f = sum of weight * distance.
template <typename A>
struct Soft {
  A shift = 0, inverse = 0, mean = 0;

  Soft() = default;
  Soft(A shift, const Sums<A>& sums)
      : shift(shift),
        inverse(1 / (sums.weight + static_cast<A>(kWeightEps))),
        mean(sums.moment * inverse) {}
};

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
      Sums<A> positives, negatives;
      const A least = stable && mined.valid() ? -mined.far : A(0);
      soft_sums(distance, label, n, label[i], mined.near, least, &positives, &negatives);
      const Soft<A> over(mined.near, positives);
      const Soft<A> under = mined.valid() ? Soft<A>(least, negatives) : Soft<A>();
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

// What the forward pass knows of every anchor, one array each: of its positives and its negatives.
template <typename A>
struct Anchors {
  struct Side {
    std::vector<A> shift, inverse, mean;
    std::vector<A> through;  // what the eps lets through to the shift
    const int64_t* partner;  // the pair that gives the shift
  };
  const int64_t* label;
  Side positive, negative;
  std::vector<A> slope;  // dL / d(f+ - f-)

  Anchors(const int64_t* label, const int64_t* far, const int64_t* near, const A* rise,
          const A* stats, A grad, bool stable, int64_t count)
      : label(label), positive{{}, {}, {}, {}, far}, negative{{}, {}, {}, {}, near} {
    const A eps = static_cast<A>(kWeightEps);
    for (int64_t i = 0; i < count; ++i) {
      const A* s = stats + i * kStats;
      slope.push_back(grad * rise[i]);
      for (Side* side : {&positive, &negative}) {
        side->shift.push_back(s[0]), side->inverse.push_back(s[1]), side->mean.push_back(s[2]);
        const bool shifts = side == &positive || stable;
        side->through.push_back(shifts ? s[2] * eps * s[1] : A(0));
        s += kStats / 2;
      }
    }
  }
};

// What the eps lets through to the shift, for pairs of i with rows [first, first + width).
template <typename A>
[[gnu::always_inline]] inline void let_through(const Anchors<A>& anchors, int64_t i, int64_t first,
                                               int64_t width, A* own, A* other) {
  const auto &up = anchors.positive, &down = anchors.negative;
  const auto at = static_cast<size_t>(i);
  const int64_t *ups = up.partner + first, *downs = down.partner + first;
  const A *through_up = up.through.data() + first, *through_down = down.through.data() + first;
  for (int64_t k = 0; k < width; ++k) {
    own[k] = 0;
    const A near = through_up[k], far = through_down[k];
    other[k] = (ups[k] == i ? near : A(0)) + (downs[k] == i ? far : A(0));
  }
  const int64_t mine = up.partner[i] - first, theirs = down.partner[i] - first;
  if (mine >= 0 && mine < width) own[mine] += up.through[at];
  if (theirs >= 0 && theirs < width) own[theirs] += down.through[at];
}

// Turns the distances of x_i to all rows into the coefficients of their differences:
// (c_ij + c_ji) / d_ij with c_ij = dL / d d_ij of anchor i.
template <typename A>
FASTREID_VI_CLONES void push_and_pull(const Anchors<A>& anchors, int64_t i, int64_t count, A* row) {
  const auto &up = anchors.positive, &down = anchors.negative;
  const A clamped = std::sqrt(static_cast<A>(fastreid_vi::kSquareFloor));
  const auto at = static_cast<size_t>(i);
  const auto one = [](A d, A same, A over, A under, A above, A below, A far, A near, A through,
                      A slope) __attribute__((always_inline)) {
    const A sign = 2 * same - 1, inverse = same * above + (1 - same) * below;
    const A lag = d - (same * far + (1 - same) * near);
    return slope * (sign * weight_of(d, same, over, under) * inverse * (1 + sign * lag) - through);
  };
  const A over = up.shift[at], under = down.shift[at], above = up.inverse[at],
          below = down.inverse[at], far = up.mean[at], near = down.mean[at],
          slope = anchors.slope[at];
  for (int64_t j = 0; j < count; j += kBlock) {
    const int64_t width = std::min(kBlock, count - j);
    A same[kBlock], own[kBlock], other[kBlock], *d = row + j;
    compare(anchors.label + j, anchors.label[i], width, same);
    let_through(anchors, i, j, width, own, other);
    const A *overs = up.shift.data() + j, *unders = down.shift.data() + j,
            *aboves = up.inverse.data() + j, *belows = down.inverse.data() + j,
            *fars = up.mean.data() + j, *nears = down.mean.data() + j,
            *slopes = anchors.slope.data() + j;
    for (int64_t k = 0; k < width; ++k) {
      own[k] = one(d[k], same[k], over, under, above, below, far, near, own[k], slope);
    }
    for (int64_t k = 0; k < width; ++k) {
      other[k] = one(d[k], same[k], overs[k], unders[k], aboves[k], belows[k], fars[k], nears[k],
                     other[k], slopes[k]);
    }
    for (int64_t k = 0; k < width; ++k) {
      const A coefficient = (own[k] + other[k]) / d[k];
      d[k] = d[k] <= clamped ? A(0) : coefficient;
    }
  }
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
    const Anchors<A> anchors(own.const_data_ptr<int64_t>(), p.const_data_ptr<int64_t>(),
                             q.const_data_ptr<int64_t>(), rise.const_data_ptr<A>(),
                             stat.const_data_ptr<A>(), *grad.const_data_ptr<A>(), stable, n);
    const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, Metric::euclidean);
    const int64_t strip = fastreid_vi::strip_of(n, n);
    const Scratch<A> matrix(strip * n);
    for (int64_t first = 0; first < n; first += strip) {
      const int64_t rows = std::min(strip, n - first);
      fastreid_vi::distances(x, first, rows, x, Metric::euclidean, strip == n, matrix.get(), n);
      fastreid_vi::parallel(rows, 4 * n, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          push_and_pull(anchors, first + i, n, matrix.get() + i * n);
        }
      });
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
