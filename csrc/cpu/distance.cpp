// Distances between all rows of two matrices, or of one with itself.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common.h"
#include "cpu/pairs.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Gradient;
using fastreid_vi::Metric;
using fastreid_vi::Rows;
using fastreid_vi::Scratch;
using torch::stable::Tensor;

constexpr int64_t kSquare = 16;  // entries a side of the blocks in which matrices are transposed

Tensor pairwise_distance(const Tensor& x, const std::optional<Tensor>& y, const std::string& name) {
  const Metric metric = fastreid_vi::metric_of(name);
  const Tensor& other = y ? *y : x;
  const int64_t n = x.size(0), m = other.size(0);
  Tensor distance =
      torch::stable::new_empty(x, {n, m}, fastreid_vi::accumulate_type(x.scalar_type()));
  if (n == 0 || m == 0) return distance;
  fastreid_vi::for_floating(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Rows<A> rows = fastreid_vi::rows_of<T>(x, metric);
    A* out = distance.mutable_data_ptr<A>();
    if (y) {
      fastreid_vi::distances(rows, 0, n, fastreid_vi::rows_of<T>(other, metric), metric, false, out,
                             m);
    } else {
      fastreid_vi::distances(rows, 0, n, rows, metric, true, out, m);
    }
  });
  return distance;
}

// Coefficients c_ij of (x_i - y_j) in the gradient of x_i, and the distances.
template <typename A>
struct Coefficients {
  const A* grad;
  int64_t down, across;  // strides of grad
  const A* distance;
  int64_t pitch;
  Metric metric;
  A clamped = std::sqrt(static_cast<A>(fastreid_vi::kSquareFloor));

  A apart(int64_t i, int64_t j) const { return distance[i * pitch + j]; }
  A at(int64_t i, int64_t j) const {
    const A g = grad[i * down + j * across];
    if (metric == Metric::cosine) return g;
    if (metric == Metric::sqeuclidean) return 2 * g;
    const A d = apart(i, j);
    return d > clamped ? g / d : A(0);
  }
};

// How the coefficients are read: as they are, for the other side, or for both sides at once.
enum class Side { rows, columns, both };

// out[(i - first) * count + j] = c_ij, c_ji or c_ij + c_ji; square blocks keep both orders in
// cache. For the cosine also cosines_ij = u_i . v_j.
template <typename A>
void gather(const Coefficients<A>& c, Side side, int64_t first, int64_t rows, int64_t count, A* out,
            A* cosines) {
  const int64_t blocks = fastreid_vi::blocks_of(count, kSquare);
  fastreid_vi::parallel(blocks, rows * kSquare, [&](int64_t begin, int64_t end) {
    for (int64_t i0 = 0; i0 < rows; i0 += kSquare) {
      for (int64_t j0 = begin * kSquare; j0 < std::min(count, end * kSquare); j0 += kSquare) {
        for (int64_t i = i0; i < std::min(rows, i0 + kSquare); ++i) {
          for (int64_t j = j0; j < std::min(count, j0 + kSquare); ++j) {
            A value = side == Side::columns ? A(0) : c.at(first + i, j);
            if (side != Side::rows) value += c.at(j, first + i);
            out[i * count + j] = value;
            if (cosines) {
              cosines[i * count + j] =
                  1 - (side == Side::columns ? c.apart(j, first + i) : c.apart(first + i, j));
            }
          }
        }
      }
    }
  });
}

template <typename T>
Tensor gradient(const Tensor& like, const Rows<accumulate_t<T>>& x, const Rows<accumulate_t<T>>& y,
                const Coefficients<accumulate_t<T>>& c, Side side) {
  using A = accumulate_t<T>;
  Gradient<T> gradient(like, c.metric);
  if (y.count == 0) {
    torch::stable::zero_(gradient.tensor);
    return gradient.tensor;
  }
  // For the cosine the gradient of a direction is -sum g v; what lies along the row itself is of no
  // effect, and taken out term by term: v - cos u keeps its digits where v is close to u.
  const bool cosine = c.metric == Metric::cosine;
  const int64_t strip = fastreid_vi::strip_of(x.count, y.count);
  const Scratch<A> memory((cosine ? 2 : 1) * strip * y.count);
  A* cosines = cosine ? memory.get() + strip * y.count : nullptr;
  for (int64_t first = 0; first < x.count; first += strip) {
    const int64_t rows = std::min(strip, x.count - first);
    gather(c, side, first, rows, y.count, memory.get(), cosines);
    gradient.sum([&](auto* out) {
      fastreid_vi::differences(x, first, rows, y, memory.get(), cosines, out + first * x.width,
                               x.width);
    });
  }
  gradient.finish(x);
  return gradient.tensor;
}

std::tuple<Tensor, Tensor> pairwise_distance_backward(const Tensor& grad, const Tensor& x,
                                                      const std::optional<Tensor>& y,
                                                      const Tensor& distance,
                                                      const std::string& name) {
  const Metric metric = fastreid_vi::metric_of(name);
  const Tensor d = torch::stable::contiguous(distance);
  Tensor dx, dy = torch::stable::new_empty(x, {0});
  fastreid_vi::for_floating(x.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Coefficients<A> c{grad.const_data_ptr<A>(), grad.stride(0), grad.stride(1),
                            d.const_data_ptr<A>(),    grad.size(1),   metric};
    const Rows<A> a = fastreid_vi::rows_of<T>(x, metric);
    if (!y) {
      dx = gradient<T>(x, a, a, c, Side::both);
      return;
    }
    const Rows<A> b = fastreid_vi::rows_of<T>(*y, metric);
    dx = gradient<T>(x, a, b, c, Side::rows);
    dy = gradient<T>(*y, b, a, c, Side::columns);
  });
  return {dx, dy};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  m.impl("pairwise_distance_backward", TORCH_BOX(&pairwise_distance_backward));
}
