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

// mean[i] and biased variance[i] of `width` channels; two passes and sums shifted by the first
// position, so that a large mean costs no precision. `exact` takes the mean before it is rounded.
template <typename T, typename A>
FASTREID_VI_CLONES void moments_columns(const T* x, int64_t stride, int64_t positions,
                                        int64_t width, A* mean, A* variance,
                                        double* exact = nullptr) {
  const A n = static_cast<A>(positions);
  sum_columns(positions, width, mean, [&](int64_t s, int64_t i) {
    return static_cast<A>(x[s * stride + i]) - static_cast<A>(x[i]);
  });
  for (int64_t i = 0; i < width; ++i) {
    const A shift = static_cast<A>(x[i]), rest = mean[i] / n;
    if (exact) exact[i] = static_cast<double>(shift) + static_cast<double>(rest);
    mean[i] = shift + rest;
  }
  sum_columns(positions, width, variance, [&](int64_t s, int64_t i) {
    const A d = static_cast<A>(x[s * stride + i]) - mean[i];
    return d * d;
  });
  for (int64_t i = 0; i < width; ++i) variance[i] /= n;
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
FASTREID_VI_CLONES void gradient_sums_columns(const T* g, int64_t g_stride, const T* x,
                                              int64_t x_stride, int64_t positions, int64_t width,
                                              const A* mean, A* sum_g, A* sum_gc) {
  sum_columns(positions, width, sum_g,
              [&](int64_t s, int64_t i) { return static_cast<A>(g[s * g_stride + i]); });
  sum_columns(positions, width, sum_gc, [&](int64_t s, int64_t i) {
    return static_cast<A>(g[s * g_stride + i]) * (static_cast<A>(x[s * x_stride + i]) - mean[i]);
  });
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
