// Generalised-mean pooling. Channels-last maps are read as rows of channels, NCHW maps as rows of
// positions; both keep the inner axis contiguous, and sum in short runs so that float32 stays
// accurate.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::FeatureMap;
using torch::stable::Tensor;

constexpr int64_t kColumns = 256;  // channels that one pass over the positions carries
constexpr int64_t kRun = 16;       // positions summed before they join the total

struct Cube {
  template <typename A>
  [[gnu::always_inline]] A operator()(A x) const {
    return x * x * x;
  }
};
struct Square {
  template <typename A>
  [[gnu::always_inline]] A operator()(A x) const {
    return x * x;
  }
};
struct Identity {
  template <typename A>
  [[gnu::always_inline]] A operator()(A x) const {
    return x;
  }
};
struct One {
  template <typename A>
  [[gnu::always_inline]] A operator()(A) const {
    return A(1);
  }
};
struct Power {
  double exponent;
  template <typename A>
  [[gnu::always_inline]] A operator()(A x) const {
    return std::pow(x, static_cast<A>(exponent));
  }
};

// Calls body with a functor for x^p; the exponents in use need no call into libm.
template <typename F>
void with_power(double p, F&& body) {
  if (p == 3.0) return body(Cube{});
  if (p == 2.0) return body(Square{});
  if (p == 1.0) return body(Identity{});
  if (p == 0.0) return body(One{});
  body(Power{p});
}

// total[i] = sum over positions of f(x[s * stride + i]), i < width <= kColumns.
template <typename T, typename A, typename F>
FASTREID_VI_CLONES void sum_columns(const T* x, int64_t positions, int64_t stride, int64_t width,
                                    F f, A* total) {
  A run[kColumns];
  std::fill(total, total + width, A(0));
  for (int64_t first = 0; first < positions; first += kRun) {
    const int64_t last = std::min(first + kRun, positions);
    for (int64_t i = 0; i < width; ++i) run[i] = f(static_cast<A>(x[first * stride + i]));
    for (int64_t s = first + 1; s < last; ++s) {
      const T* row = x + s * stride;
      for (int64_t i = 0; i < width; ++i) run[i] += f(static_cast<A>(row[i]));
    }
    for (int64_t i = 0; i < width; ++i) total[i] += run[i];
  }
}

// sum over positions of f(x[s]), in kRun independent lanes.
template <typename T, typename A, typename F>
FASTREID_VI_CLONES A sum_row(const T* x, int64_t positions, F f) {
  A lane[kRun] = {};
  int64_t s = 0;
  for (; s + kRun <= positions; s += kRun) {
    for (int64_t i = 0; i < kRun; ++i) lane[i] += f(static_cast<A>(x[s + i]));
  }
  for (int64_t i = 0; s + i < positions; ++i) lane[i] += f(static_cast<A>(x[s + i]));
  A total = 0;
  for (int64_t i = 0; i < kRun; ++i) total += lane[i];
  return total;
}

template <typename T, typename A, typename F>
FASTREID_VI_CLONES void scale_columns(const T* x, const A* scale, int64_t width, F f, T* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(scale[i] * f(static_cast<A>(x[i])));
}

template <typename T, typename A, typename F>
FASTREID_VI_CLONES void scale_row(const T* x, A scale, int64_t width, F f, T* out) {
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(scale * f(static_cast<A>(x[i])));
}

template <typename T, typename F>
void moments(const FeatureMap& map, F f, accumulate_t<T>* moment, double eps) {
  using A = accumulate_t<T>;
  const T* x = map.tensor.const_data_ptr<T>();
  const A n = static_cast<A>(map.positions), bias = static_cast<A>(eps);
  if (map.channel == 1) {
    const int64_t blocks = (map.channels + kColumns - 1) / kColumns;
    fastreid_vi::parallel(
        map.batches * blocks, map.positions * kColumns, [&](int64_t from, int64_t to) {
          for (int64_t item = from; item < to; ++item) {
            const int64_t b = item / blocks, c = item % blocks * kColumns;
            A* total = moment + b * map.channels + c;
            const int64_t width = std::min(kColumns, map.channels - c);
            sum_columns(x + b * map.batch + c, map.positions, map.position, width, f, total);
            for (int64_t i = 0; i < width; ++i) total[i] = total[i] / n + bias;
          }
        });
  } else {
    fastreid_vi::parallel(map.batches * map.channels, map.positions, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const int64_t b = row / map.channels, c = row % map.channels;
        const T* first = x + b * map.batch + c * map.channel;
        moment[row] = sum_row<T, A>(first, map.positions, f) / n + bias;
      }
    });
  }
}

std::tuple<Tensor, Tensor> gem_pool(const Tensor& features, double p, double eps) {
  const FeatureMap map = fastreid_vi::feature_map(features);
  const auto dtype = features.scalar_type();
  Tensor pooled = torch::stable::new_empty(features, {map.batches, map.channels});
  Tensor moment = torch::stable::new_empty(features, {map.batches, map.channels},
                                           fastreid_vi::accumulate_type(dtype));
  fastreid_vi::for_floating(dtype, [&]<typename T>() {
    using A = accumulate_t<T>;
    A* m = moment.mutable_data_ptr<A>();
    T* y = pooled.mutable_data_ptr<T>();
    with_power(p, [&](auto f) { moments<T>(map, f, m, eps); });
    const A root = static_cast<A>(1.0 / p);
    for (int64_t i = 0; i < pooled.numel(); ++i) y[i] = static_cast<T>(std::pow(m[i], root));
  });
  return {pooled, moment};
}

Tensor gem_pool_backward(const Tensor& grad, const Tensor& features, const Tensor& moment,
                         double p) {
  const FeatureMap map = fastreid_vi::feature_map(features);
  const bool last = fastreid_vi::is_channels_last(features);
  Tensor out = fastreid_vi::empty_map(features, last);
  const FeatureMap to = fastreid_vi::feature_map(out);
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T* g = grad.const_data_ptr<T>();
    const A* m = moment.const_data_ptr<A>();
    const T* x = map.tensor.const_data_ptr<T>();
    T* dx = out.mutable_data_ptr<T>();
    const A power = static_cast<A>(1.0 / p - 1.0), n = static_cast<A>(map.positions);
    std::vector<A> scale(static_cast<size_t>(moment.numel()));
    for (size_t i = 0; i < scale.size(); ++i) {
      scale[i] = static_cast<A>(g[i]) * std::pow(m[i], power) / n;
    }
    with_power(p - 1.0, [&](auto f) {
      if (map.channel == 1 && to.channel == 1) {
        fastreid_vi::parallel(map.batches * map.positions, map.channels, [&](int64_t a, int64_t z) {
          for (int64_t row = a; row < z; ++row) {
            const int64_t b = row / map.positions, s = row % map.positions;
            scale_columns(x + b * map.batch + s * map.position, scale.data() + b * map.channels,
                          map.channels, f, dx + b * to.batch + s * to.position);
          }
        });
        return;
      }
      fastreid_vi::parallel(map.batches * map.channels, map.positions, [&](int64_t a, int64_t z) {
        for (int64_t row = a; row < z; ++row) {
          const int64_t b = row / map.channels, c = row % map.channels;
          const T* from = x + b * map.batch + c * map.channel;
          T* into = dx + b * to.batch + c * to.channel;
          if (map.position == 1 && to.position == 1) {
            scale_row(from, scale[row], map.positions, f, into);
          } else {  // a strided slice: neither axis of input and output runs alike
            for (int64_t s = 0; s < map.positions; ++s) {
              into[s * to.position] =
                  static_cast<T>(scale[row] * f(static_cast<A>(from[s * map.position])));
            }
          }
        }
      });
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("gem_pool", TORCH_BOX(&gem_pool));
  m.impl("gem_pool_backward", TORCH_BOX(&gem_pool_backward));
}
