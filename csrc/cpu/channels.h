// What the norms share: one vector per channel, sums over positions in short pieces, so that
// float32 stays accurate, and the mean and variance built on them.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "common.h"

namespace fastreid_vi {
namespace {

constexpr int64_t kBlock = 256;  // channels that one pass over the positions carries
constexpr int64_t kPiece = 16;   // positions summed before they join the total
constexpr int64_t kLanes = 32;   // independent sums of a row

// One sample of a map.
template <typename T>
struct Plane {
  T* data;
  int64_t channel, position;
  T* at(int64_t c) const { return data + c * channel; }
};

template <typename T>
Plane<const T> plane(const FeatureMap& map, int64_t b) {
  return {map.tensor.const_data_ptr<T>() + b * map.batch, map.channel, map.position};
}

// The elements of a small tensor of any floating dtype; `size` times `otherwise` without one.
template <typename A>
std::vector<A> values_of(const std::optional<Tensor>& tensor, int64_t size, A otherwise) {
  if (!tensor) return std::vector<A>(static_cast<size_t>(size), otherwise);
  const Tensor dense = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
  return for_floating(dense.scalar_type(), [&]<typename T>() {
    const T* first = dense.const_data_ptr<T>();
    return std::vector<A>(first, first + size);
  });
}

// A new tensor of the dtype of `like` with these values.
template <typename A>
Tensor tensor_of(const std::vector<A>& values, const Tensor& like,
                 torch::headeronly::IntHeaderOnlyArrayRef shape) {
  Tensor out = torch::stable::new_empty(like, shape);
  for_floating(like.scalar_type(), [&]<typename T>() {
    T* to = out.mutable_data_ptr<T>();
    for (size_t i = 0; i < values.size(); ++i) to[i] = static_cast<T>(values[i]);
  });
  return out;
}

// total[i] = sum over positions of term(s, i), i < width <= kBlock, inner loop over i.
template <typename A, typename F>
[[gnu::always_inline]] inline void sum_columns(int64_t positions, int64_t width, A* total, F term) {
  A run[kBlock];
  std::fill(total, total + width, A(0));
  for (int64_t first = 0; first < positions; first += kPiece) {
    const int64_t last = std::min(first + kPiece, positions);
    std::fill(run, run + width, A(0));
    for (int64_t s = first; s < last; ++s) {
      for (int64_t i = 0; i < width; ++i) run[i] += term(s, i);
    }
    for (int64_t i = 0; i < width; ++i) total[i] += run[i];
  }
}

// Sum over positions of term(s), in kLanes independent lanes.
template <typename A, typename F>
[[gnu::always_inline]] inline A sum_row(int64_t positions, F term) {
  A lane[kLanes] = {};
  int64_t s = 0;
  for (; s + kLanes <= positions; s += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) lane[i] += term(s + i);
  }
  for (int64_t i = 0; s + i < positions; ++i) lane[i] += term(s + i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  }
  return lane[0];
}

// Joins the moments of `more` positions to those of `count`: means and sums of squared deviations.
template <typename A>
[[gnu::always_inline]] inline void join_moments(A count, A more, A mean, A squares, A& all_mean,
                                                A& all_squares) {
  const A share = more / (count + more), step = mean - all_mean;
  all_mean += step * share;
  all_squares += squares + step * step * (count * share);
}

// mean[i] and biased variance[i] of `width` channels, in one pass: a few positions at a time in
// registers, mean first, joined to the rest. All shifted by the first position, so that a large
// mean costs no precision. `exact` takes the mean before it is rounded.
template <typename T, typename A>
FASTREID_VI_CLONES void moments_columns(const T* __restrict x, int64_t stride, int64_t positions,
                                        int64_t width, A* __restrict mean, A* __restrict variance,
                                        double* exact = nullptr) {
  constexpr int64_t kRows = 8;
  std::fill(mean, mean + width, A(0));
  std::fill(variance, variance + width, A(0));
  int64_t s = 0;
  for (; s + kRows <= positions; s += kRows) {
    const T* __restrict rows = x + s * stride;
    const A count = static_cast<A>(s);
    for (int64_t i = 0; i < width; ++i) {
      const A shift = static_cast<A>(x[i]);
      A v[kRows], sum = 0, squares = 0;
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r)
        sum += v[r] = static_cast<A>(rows[r * stride + i]) - shift;
      const A middle = sum / A(kRows);
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) squares += (v[r] - middle) * (v[r] - middle);
      join_moments(count, A(kRows), middle, squares, mean[i], variance[i]);
    }
  }
  for (; s < positions; ++s) {
    for (int64_t i = 0; i < width; ++i) {
      const A v = static_cast<A>(x[s * stride + i]) - static_cast<A>(x[i]);
      join_moments(static_cast<A>(s), A(1), v, A(0), mean[i], variance[i]);
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    const A shift = static_cast<A>(x[i]);
    if (exact) exact[i] = static_cast<double>(shift) + static_cast<double>(mean[i]);
    mean[i] += shift;
    variance[i] /= static_cast<A>(positions);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void moments_row(const T* x, int64_t positions, A* mean, A* variance,
                                    double* exact = nullptr) {
  const A n = static_cast<A>(positions);
  const A shift = static_cast<A>(x[0]);
  const A rest = sum_row<A>(positions, [&](int64_t s) { return static_cast<A>(x[s]) - shift; }) / n;
  const A mu = shift + rest;
  if (exact) *exact = static_cast<double>(shift) + static_cast<double>(rest);
  *mean = mu;
  *variance = sum_row<A>(positions,
                         [&](int64_t s) {
                           const A d = static_cast<A>(x[s]) - mu;
                           return d * d;
                         }) /
              n;
}

// sum_g = sum of g, sum_gc = sum of g (x - mean)
template <typename T, typename A>
FASTREID_VI_CLONES void gradient_sums_columns(const T* __restrict g, int64_t g_stride,
                                              const T* __restrict x, int64_t x_stride,
                                              int64_t positions, int64_t width,
                                              const A* __restrict mean, A* __restrict sum_g,
                                              A* __restrict sum_gc) {
  constexpr int64_t kRows = 8;
  std::fill(sum_g, sum_g + width, A(0));
  std::fill(sum_gc, sum_gc + width, A(0));
  int64_t s = 0;
  for (; s + kRows <= positions; s += kRows) {
    const T* __restrict gs = g + s * g_stride, * __restrict xs = x + s * x_stride;
    for (int64_t i = 0; i < width; ++i) {
      A part_g = 0, part_gc = 0;
#pragma GCC unroll 8
      for (int64_t r = 0; r < kRows; ++r) {
        const A v = static_cast<A>(gs[r * g_stride + i]);
        part_g += v;
        part_gc += v * (static_cast<A>(xs[r * x_stride + i]) - mean[i]);
      }
      sum_g[i] += part_g;
      sum_gc[i] += part_gc;
    }
  }
  for (; s < positions; ++s) {
    for (int64_t i = 0; i < width; ++i) {
      const A v = static_cast<A>(g[s * g_stride + i]);
      sum_g[i] += v;
      sum_gc[i] += v * (static_cast<A>(x[s * x_stride + i]) - mean[i]);
    }
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void gradient_sums_row(const T* g, const T* x, int64_t positions, A mean,
                                          A* sum_g, A* sum_gc) {
  *sum_g = sum_row<A>(positions, [&](int64_t s) { return static_cast<A>(g[s]); });
  *sum_gc = sum_row<A>(
      positions, [&](int64_t s) { return static_cast<A>(g[s]) * (static_cast<A>(x[s]) - mean); });
}

}  // namespace
}  // namespace fastreid_vi
