// Instance norm, activation and residual in one pass over a plane that the cache holds. The
// activation's slope is recomputed from x in backward, so that nothing else of map size is kept.
// Channels-last maps are read in blocks of channels narrow enough for the cache, NCHW maps by
// plane.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/channels.h"
#include "cpu/turned.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::FeatureMap;
using fastreid_vi::kBlock;
using fastreid_vi::kLanes;
using fastreid_vi::kPiece;
using fastreid_vi::plane;
using fastreid_vi::Turned;
using torch::stable::Tensor;

// Planes of an NCHW map that share the lines of a channels-last gradient.
constexpr int64_t kTurnedPlanes = 64;

struct Rectify {
  template <typename A>
  [[gnu::always_inline]] A operator()(A z) const {
    return z < A(0) ? A(0) : z;  // NaN passes
  }
  template <typename A>
  [[gnu::always_inline]] A slope(A z) const {
    return z > A(0) ? A(1) : A(0);
  }
};
struct Leak {
  double negative_slope;
  template <typename A>
  [[gnu::always_inline]] A operator()(A z) const {
    return z < A(0) ? static_cast<A>(negative_slope) * z : z;
  }
  template <typename A>
  [[gnu::always_inline]] A slope(A z) const {
    return z > A(0) ? A(1) : static_cast<A>(negative_slope);
  }
};
struct Linear {
  template <typename A>
  [[gnu::always_inline]] A operator()(A z) const {
    return z;
  }
  template <typename A>
  [[gnu::always_inline]] A slope(A) const {
    return A(1);
  }
};

template <typename F>
void with_activation(const std::string& name, double negative_slope, F&& body) {
  if (name == "relu") return body(Rectify{});
  if (name == "leaky_relu") return body(Leak{negative_slope});
  body(Linear{});
}

// z = scale (x - mean) + offset, for `width` channels or one.
template <typename A>
struct Affine {
  const A *mean, *scale, *offset;
  [[gnu::always_inline]] A operator()(A x, int64_t i) const {
    return scale[i] * (x - mean[i]) + offset[i];
  }
};

// A stack of rows: row s at data + s * stride.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  [[gnu::always_inline]] T* operator[](int64_t s) const { return data + s * stride; }
};

// y = act(z) + residual
template <typename T, typename A, typename F>
FASTREID_VI_CLONES void apply_columns(Rows<const T> x, Rows<const T> residual, int64_t positions,
                                      int64_t width, Affine<A> affine, F act, Rows<T> y) {
  for (int64_t s = 0; s < positions; ++s) {
    const T* __restrict from = x[s];
    T* __restrict to = y[s];
    if (residual.data) {
      const T* __restrict add = residual[s];
      for (int64_t i = 0; i < width; ++i) {
        to[i] = static_cast<T>(act(affine(static_cast<A>(from[i]), i)) + static_cast<A>(add[i]));
      }
    } else {
      for (int64_t i = 0; i < width; ++i) {
        to[i] = static_cast<T>(act(affine(static_cast<A>(from[i]), i)));
      }
    }
  }
}

template <typename T, typename A, typename F>
FASTREID_VI_CLONES void apply_row(const T* __restrict x, const T* __restrict residual,
                                  int64_t positions, Affine<A> affine, F act, T* __restrict y) {
  const A mean = *affine.mean, scale = *affine.scale, offset = *affine.offset;
  const Affine<A> one{&mean, &scale, &offset};
  if (residual) {
    for (int64_t s = 0; s < positions; ++s) {
      y[s] = static_cast<T>(act(one(static_cast<A>(x[s]), 0)) + static_cast<A>(residual[s]));
    }
  } else {
    for (int64_t s = 0; s < positions; ++s) {
      y[s] = static_cast<T>(act(one(static_cast<A>(x[s]), 0)));
    }
  }
}

// Sums of gz = g act'(z) and of gz (x - mean).
template <typename T, typename A, typename F>
FASTREID_VI_CLONES void sums_columns(Rows<const T> g, Rows<const T> x, int64_t positions,
                                     int64_t width, Affine<A> affine, F act, A* sum_g, A* sum_gc) {
  A run_g[kBlock], run_gc[kBlock];
  std::fill(sum_g, sum_g + width, A(0));
  std::fill(sum_gc, sum_gc + width, A(0));
  for (int64_t first = 0; first < positions; first += kPiece) {
    std::fill(run_g, run_g + width, A(0));
    std::fill(run_gc, run_gc + width, A(0));
    for (int64_t s = first; s < std::min(first + kPiece, positions); ++s) {
      const T* __restrict gs = g[s], * __restrict xs = x[s];
      for (int64_t i = 0; i < width; ++i) {
        const A v = static_cast<A>(xs[i]);
        const A gz = static_cast<A>(gs[i]) * act.slope(affine(v, i));
        run_g[i] += gz;
        run_gc[i] += gz * (v - affine.mean[i]);
      }
    }
    for (int64_t i = 0; i < width; ++i) sum_g[i] += run_g[i];
    for (int64_t i = 0; i < width; ++i) sum_gc[i] += run_gc[i];
  }
}

template <typename T, typename A, typename F>
FASTREID_VI_CLONES void sums_row(const T* __restrict g, const T* __restrict x, int64_t positions,
                                 Affine<A> affine, F act, A* sum_g, A* sum_gc) {
  const A mean = *affine.mean, scale = *affine.scale, offset = *affine.offset;
  const Affine<A> one{&mean, &scale, &offset};
  A lane_g[kLanes] = {}, lane_gc[kLanes] = {};
  int64_t s = 0;
  const auto add = [&](int64_t i) __attribute__((always_inline)) {
    const A v = static_cast<A>(x[s + i]);
    const A gz = static_cast<A>(g[s + i]) * act.slope(one(v, 0));
    lane_g[i] += gz;
    lane_gc[i] += gz * (v - mean);
  };
  for (; s + kLanes <= positions; s += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) add(i);
  }
  for (int64_t i = 0; s + i < positions; ++i) add(i);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) lane_g[i] += lane_g[i + half];
    for (int64_t i = 0; i < half; ++i) lane_gc[i] += lane_gc[i + half];
  }
  *sum_g = lane_g[0], *sum_gc = lane_gc[0];
}

// dx = scale gz + on_x (x - mean) + constant
template <typename T, typename A, typename F>
FASTREID_VI_CLONES void gradient_columns(Rows<const T> g, Rows<const T> x, int64_t positions,
                                         int64_t width, Affine<A> affine, const A* __restrict on_x,
                                         const A* __restrict constant, F act, Rows<T> dx) {
  for (int64_t s = 0; s < positions; ++s) {
    const T* __restrict gs = g[s], * __restrict xs = x[s];
    T* __restrict to = dx[s];
    for (int64_t i = 0; i < width; ++i) {
      const A v = static_cast<A>(xs[i]);
      const A gz = static_cast<A>(gs[i]) * act.slope(affine(v, i));
      to[i] = static_cast<T>(affine.scale[i] * gz + on_x[i] * (v - affine.mean[i]) + constant[i]);
    }
  }
}

template <typename T, typename A, typename F>
FASTREID_VI_CLONES void gradient_row(const T* __restrict g, const T* __restrict x,
                                     int64_t positions, Affine<A> affine, A on_x, A constant, F act,
                                     T* __restrict dx) {
  const A mean = *affine.mean, scale = *affine.scale, offset = *affine.offset;
  const Affine<A> one{&mean, &scale, &offset};
  for (int64_t s = 0; s < positions; ++s) {
    const A v = static_cast<A>(x[s]);
    const A gz = static_cast<A>(g[s]) * act.slope(one(v, 0));
    dx[s] = static_cast<T>(scale * gz + on_x * (v - mean) + constant);
  }
}

// The blocks of channels that a thread takes at a time: `planes` planes of an NCHW map, or whole
// runs of a channels-last map (narrower columns fall into few sets of the cache, and are slower).
struct Blocks {
  Blocks(const FeatureMap& map, bool columns, int64_t planes = 1)
      : batches(map.batches), channels(map.channels), positions(map.positions) {
    width = std::min(columns ? kBlock : planes, channels);
    count = (channels + width - 1) / width;
  }
  int64_t batches, channels, positions, width, count;

  // Calls body(sample, first channel, channels, memory); `scratch` elements of it for each thread.
  template <typename T, typename F>
  void each(int64_t scratch, const F& body) const {
    fastreid_vi::parallel(batches * count, width * positions, [&](int64_t from, int64_t to) {
      const fastreid_vi::Untouched<T> memory(scratch);
      for (int64_t i = from; i < to; ++i) {
        const int64_t c = i % count * width;
        body(i / count, c, std::min(width, channels - c), memory.get());
      }
    });
  }
};

// scale = weight / sqrt(variance + eps), offset = bias; one pair per channel.
template <typename A>
struct Parameters {
  Parameters(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             int64_t channels, double eps)
      : weight(fastreid_vi::values_of(weight, channels, A(1))),
        offset(fastreid_vi::values_of(bias, channels, A(0))),
        eps(static_cast<A>(eps)) {}
  std::vector<A> weight, offset;
  A eps;

  Affine<A> affine(int64_t c, int64_t width, const A* mean, const A* variance, A* scale) const {
    for (int64_t i = 0; i < width; ++i) {
      scale[i] = weight[c + i] * (A(1) / std::sqrt(variance[i] + eps));
    }
    return {mean, scale, offset.data() + c};
  }
};

std::tuple<Tensor, Tensor, Tensor> instance_norm_act(
    const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& residual, const std::optional<Tensor>& running_mean,
    const std::optional<Tensor>& running_var, const std::string& activation, double negative_slope,
    double eps) {
  const bool columns = fastreid_vi::is_channels_last(x);
  const FeatureMap map = fastreid_vi::map_in_layout(x, columns);
  const FeatureMap add = fastreid_vi::map_in_layout(residual ? *residual : x, columns);
  Tensor out = fastreid_vi::empty_map(x, columns);
  const FeatureMap to = fastreid_vi::map_in_layout(out, columns);
  const auto kind = fastreid_vi::accumulate_type(x.scalar_type());
  Tensor mean = torch::stable::new_empty(x, {map.batches, map.channels}, kind);
  Tensor variance = torch::stable::new_empty(x, {map.batches, map.channels}, kind);
  const auto run = [&]<typename T, typename F>(F act) {
    using A = accumulate_t<T>;
    const Parameters<A> parameters(weight, bias, map.channels, eps);
    const auto fixed_mean = fastreid_vi::values_of(running_mean, map.channels, A(0));
    const auto fixed_var = fastreid_vi::values_of(running_var, map.channels, A(0));
    A *means = mean.mutable_data_ptr<A>(), *variances = variance.mutable_data_ptr<A>();
    T* y = out.mutable_data_ptr<T>();
    const Blocks blocks(map, columns);
    blocks.each<T>(0, [&](int64_t b, int64_t c, int64_t width, T*) {
      const auto from = plane<T>(map, b), plus = plane<T>(add, b);
      A *mu = means + b * map.channels + c, *v = variances + b * map.channels + c;
      if (running_mean) {
        std::copy_n(fixed_mean.data() + c, width, mu);
        std::copy_n(fixed_var.data() + c, width, v);
      } else if (columns) {
        fastreid_vi::moments_columns(from.at(c), from.position, map.positions, width, mu, v);
      } else {
        fastreid_vi::moments_row(from.at(c), map.positions, mu, v);
      }
      A scale[kBlock];
      const Affine<A> affine = parameters.affine(c, width, mu, v, scale);
      const T* added = residual ? plus.at(c) : nullptr;
      T* into = y + b * to.batch + c * to.channel;
      if (columns) {
        apply_columns<T>({from.at(c), from.position}, {added, plus.position}, map.positions, width,
                         affine, act, {into, to.position});
      } else {
        apply_row<T>(from.at(c), added, map.positions, affine, act, into);
      }
    });
  };
  fastreid_vi::for_floating(x.scalar_type(), [&]<typename T>() {
    with_activation(activation, negative_slope, [&](auto act) { run.template operator()<T>(act); });
  });
  return {out, mean, variance};
}

// Gradients of weight and bias: the samples' shares in order.
template <typename A>
std::vector<A> sum_over_samples(const std::vector<A>& shares, int64_t batches, int64_t channels) {
  std::vector<A> total(static_cast<size_t>(channels));
  for (int64_t b = 0; b < batches; ++b) {
    for (int64_t c = 0; c < channels; ++c) total[c] += shares[b * channels + c];
  }
  return total;
}

std::tuple<Tensor, Tensor, Tensor> instance_norm_act_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& variance,
    const std::string& activation, double negative_slope, double eps, bool fixed) {
  const bool columns = fastreid_vi::is_channels_last(x);
  const FeatureMap map = fastreid_vi::map_in_layout(x, columns);
  Tensor out = fastreid_vi::empty_map(x, columns), dweight, dbias;
  const FeatureMap to = fastreid_vi::map_in_layout(out, columns);
  const auto run = [&]<typename T, typename F>(F act) {
    using A = accumulate_t<T>;
    const Parameters<A> parameters(weight, bias, map.channels, eps);
    const A *means = mean.const_data_ptr<A>(), *variances = variance.const_data_ptr<A>();
    const A n = static_cast<A>(map.positions);
    T* dx = out.mutable_data_ptr<T>();
    std::vector<A> on_weight(static_cast<size_t>(map.batches * map.channels));
    std::vector<A> on_bias(on_weight.size());
    const Turned<T> given(grad, columns);
    const Blocks blocks(map, columns, given.turned() ? kTurnedPlanes : 1);
    const auto one = [&](int64_t b, int64_t c, int64_t width, Rows<const T> g) {
      const auto from = plane<T>(map, b);
      const int64_t first = b * map.channels + c;
      const A* v = variances + first;
      A *sum_g = on_bias.data() + first, *sum_gh = on_weight.data() + first;
      A scale[kBlock], on_x[kBlock], constant[kBlock];
      const Affine<A> affine = parameters.affine(c, width, means + first, v, scale);
      if (columns) {
        sums_columns<T>(g, {from.at(c), from.position}, map.positions, width, affine, act, sum_g,
                        sum_gh);
      } else {
        sums_row(g.data, from.at(c), map.positions, affine, act, sum_g, sum_gh);
      }
      for (int64_t i = 0; i < width; ++i) {
        const A rstd = A(1) / std::sqrt(v[i] + parameters.eps);
        sum_gh[i] *= rstd;
        on_x[i] = fixed ? A(0) : -scale[i] * rstd * sum_gh[i] / n;
        constant[i] = fixed ? A(0) : -scale[i] * sum_g[i] / n;
      }
      T* into = dx + b * to.batch + c * to.channel;
      if (columns) {
        gradient_columns<T>(g, {from.at(c), from.position}, map.positions, width, affine, on_x,
                            constant, act, {into, to.position});
      } else {
        gradient_row(g.data, from.at(c), map.positions, affine, *on_x, *constant, act, into);
      }
    };
    blocks.each<T>(given.scratch(blocks.width),
                   [&](int64_t b, int64_t c, int64_t width, T* memory) {
                     const auto g = given.block(b, c, width, memory);
                     const int64_t step = columns ? width : 1;
                     for (int64_t i = 0; i < width; i += step)
                       one(b, c + i, step, {g.at(i), g.position});
                   });
    const auto finish = [&](const std::vector<A>& shares, const std::optional<Tensor>& like) {
      if (!like) return torch::stable::new_empty(x, {0});
      return fastreid_vi::tensor_of(sum_over_samples(shares, map.batches, map.channels), *like,
                                    like->sizes());
    };
    dweight = finish(on_weight, weight);
    dbias = finish(on_bias, bias);
  };
  fastreid_vi::for_floating(x.scalar_type(), [&]<typename T>() {
    with_activation(activation, negative_slope, [&](auto act) { run.template operator()<T>(act); });
  });
  return {out, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("instance_norm_act", TORCH_BOX(&instance_norm_act));
  m.impl("instance_norm_act_backward", TORCH_BOX(&instance_norm_act_backward));
}
