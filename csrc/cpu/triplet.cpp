// Batch-hard triplet loss: the farthest positive and the nearest negative of every anchor.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/mining.h"
#include "cpu/pairs.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Gradient;
using fastreid_vi::Metric;
using fastreid_vi::Mined;
using fastreid_vi::Rows;
using fastreid_vi::Scratch;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kColumns = 256;  // columns of one sweep over the mined pairs

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
      mined[static_cast<size_t>(i)] = fastreid_vi::mine(distance, other, m, label[i]);
    };
    if (n > 0 && m > 0) {
      const Rows<A> x = fastreid_vi::rows_of<T>(embeddings, metric);
      if (references) {
        fastreid_vi::each_anchor(x, fastreid_vi::rows_of<T>(*references, metric), metric, keep);
      } else {
        fastreid_vi::each_anchor(x, x, metric, keep);
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("batch_hard_triplet_loss", TORCH_BOX(&batch_hard_triplet_loss));
  m.impl("batch_hard_triplet_loss_backward", TORCH_BOX(&batch_hard_triplet_loss_backward));
}
