// Modality distribution adapter: y = x + a (x - mean) + d, one affine map per sample and channel.
//
// Forward reads the map once from memory for the softmax pooling and the moments of each sample
// (its further reads hit the cache), and once more for the affine map. Backward does the same: sums
// of the gradient, then all of its maps sample by sample. Between the passes stands [B, C]-sized
// work (both batch norms and the gate), in float64.
#include "cpu/adapter.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "cpu/channels.h"
#include "cpu/stacks.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::AdapterSizes;
using fastreid_vi::BatchNorm;
using fastreid_vi::FeatureMap;
using fastreid_vi::kBlock;
using fastreid_vi::Plan;
using fastreid_vi::plane;
using fastreid_vi::Sample;
using fastreid_vi::Scratch;
using fastreid_vi::Stack;
using fastreid_vi::values_of;
using fastreid_vi::Vector;
using torch::stable::Tensor;

constexpr int64_t kGroups =
    64;  // partial weight gradients: fixed, so that sums do not follow the threads
constexpr int64_t kRows = 8;  // rows of dx whose sums of maps stay in the cache

// Moments of one sample; every way of splitting the work computes the same sums.
template <typename T, typename A>
void sample_moments(const FeatureMap& map, int64_t b, bool columns, A* mean, A* variance,
                    double* exact) {
  const auto x = plane<T>(map, b);
  const int64_t width = columns ? std::min(kBlock, map.channels) : 1;
  const int64_t blocks = (map.channels + width - 1) / width;
  fastreid_vi::parallel(blocks, width * map.positions, [&](int64_t from, int64_t to) {
    for (int64_t c = from * width; c < std::min(to * width, map.channels); c += width) {
      if (columns) {
        fastreid_vi::moments_columns(x.at(c), x.position, map.positions,
                                     std::min(width, map.channels - c), mean + c, variance + c,
                                     exact + c);
      } else {
        fastreid_vi::moments_row(x.at(c), map.positions, mean + c, variance + c, exact + c);
      }
    }
  });
}

// Sums over positions of g and g (x - mean) of one sample, likewise.
template <typename T, typename A>
void sample_sums(const FeatureMap& given, const FeatureMap& map, int64_t b, bool columns,
                 const A* mean, A* sum_g, A* sum_gc) {
  const auto x = plane<T>(map, b), g = plane<T>(given, b);
  const int64_t width = columns ? std::min(kBlock, map.channels) : 1;
  const int64_t blocks = (map.channels + width - 1) / width;
  fastreid_vi::parallel(blocks, 2 * width * map.positions, [&](int64_t from, int64_t to) {
    for (int64_t c = from * width; c < std::min(to * width, map.channels); c += width) {
      if (columns) {
        fastreid_vi::gradient_sums_columns(g.at(c), g.position, x.at(c), x.position, map.positions,
                                           std::min(width, map.channels - c), mean + c, sum_g + c,
                                           sum_gc + c);
      } else {
        fastreid_vi::gradient_sums_row(g.at(c), x.at(c), map.positions, mean[c], sum_g + c,
                                       sum_gc + c);
      }
    }
  });
}

// Attention [M, S] of one sample and its context [M, C], relative to the mean.
template <typename Tiles, typename T, typename A>
void attend(const Sample<T>& sample, const Plan& plan, Stack<A> weights, const A* mean,
            A* attention, A* context) {
  const Scratch<A> a(plan.size(plan.positions, 1)), y(plan.size(plan.channels, 1));
  const Stack<A> p = plan.stack(a.get(), plan.positions, 1, !sample.by_position);
  const Stack<A> t = plan.stack(y.get(), plan.channels, 1, sample.by_position);
  fastreid_vi::over_channels<Tiles>(sample, plan, weights, p);
  for (int64_t m = 0; m < plan.maps; ++m) {
    fastreid_vi::softmax(p, m, plan.positions);
    for (int64_t s = 0; s < plan.positions; ++s) attention[m * plan.positions + s] = p.at(m, s);
  }
  fastreid_vi::over_positions<Tiles>(sample, plan, p, t);
  for (int64_t m = 0; m < plan.maps; ++m) {
    for (int64_t c = 0; c < plan.channels; ++c)
      context[m * plan.channels + c] = t.at(m, c) - mean[c];
  }
}

// y = x + a (x - mean) + d; along channels or, with step 0, along positions.
template <typename T, typename A>
FASTREID_VI_CLONES void adapt(const T* __restrict x, const A* __restrict mean,
                              const A* __restrict a, const A* __restrict d, int64_t width,
                              T* __restrict y) {
  for (int64_t i = 0; i < width; ++i) {
    const A v = static_cast<A>(x[i]);
    y[i] = static_cast<T>(v + (a[i] * (v - mean[i]) + d[i]));
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void adapt_row(const T* __restrict x, A mean, A a, A d, int64_t width,
                                  T* __restrict y) {
  for (int64_t i = 0; i < width; ++i) {
    const A v = static_cast<A>(x[i]);
    y[i] = static_cast<T>(v + (a * (v - mean) + d));
  }
}

// dx = on_g g - on_x (x - mean) - offset + maps, where `maps` holds what came through the
// attention.
template <typename T, typename A>
FASTREID_VI_CLONES void gather(const T* __restrict g, const T* __restrict x,
                               const A* __restrict mean, const A* __restrict on_g,
                               const A* __restrict on_x, const A* __restrict offset,
                               const A* __restrict maps, int64_t width, T* __restrict dx) {
  for (int64_t i = 0; i < width; ++i) {
    const A centred = static_cast<A>(x[i]) - mean[i];
    dx[i] =
        static_cast<T>(on_g[i] * static_cast<A>(g[i]) - on_x[i] * centred - offset[i] + maps[i]);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void gather_row(const T* __restrict g, const T* __restrict x, A mean, A on_g,
                                   A on_x, A offset, const A* __restrict maps, int64_t width,
                                   T* __restrict dx) {
  for (int64_t i = 0; i < width; ++i) {
    const A centred = static_cast<A>(x[i]) - mean;
    dx[i] = static_cast<T>(on_g * static_cast<A>(g[i]) - on_x * centred - offset + maps[i]);
  }
}

// Where one call reads and writes, and in which order.
struct Maps {
  explicit Maps(const Tensor& features)
      : last(fastreid_vi::is_channels_last(features)),
        x(fastreid_vi::map_in_layout(features, last)),
        result(fastreid_vi::empty_map(features, last)),
        to(fastreid_vi::map_in_layout(result, last)),
        columns(fastreid_vi::rows_are_positions(x)),
        rows(columns ? x.positions : x.channels),
        width(columns ? x.channels : x.positions) {}
  bool last;
  FeatureMap x;
  Tensor result;
  FeatureMap to;
  bool columns;
  int64_t rows, width;

  int64_t stride(const FeatureMap& map) const { return columns ? map.position : map.channel; }
};

// The stack of the 1x1 convolution, beside `before` empty maps.
template <typename A>
void copy_weights(const Tensor& weight, const Plan& plan, Stack<A> to) {
  const auto values = values_of(std::optional<Tensor>(weight), plan.maps * plan.channels, A(0));
  fastreid_vi::copy_stack(values.data(), A(1), plan.maps, plan.channels, to);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
distribution_adapter(const Tensor& features, const Tensor& sc_weight, const Tensor&,
                     const Tensor& ca_weight, const Tensor& ca_bn_weight, const Tensor& ca_bn_bias,
                     const Tensor& norm_weight, const Tensor& norm_bias,
                     const std::optional<Tensor>& ca_running_mean,
                     const std::optional<Tensor>& ca_running_var,
                     const std::optional<Tensor>& norm_running_mean,
                     const std::optional<Tensor>& norm_running_var, double eps) {
  const Maps maps(features);
  const Plan plan(maps.x, sc_weight.size(0));
  const int64_t channels = plan.channels, samples = plan.samples;
  const auto kind = fastreid_vi::accumulate_type(features.scalar_type());
  Tensor attention = torch::stable::new_empty(features, {samples, plan.maps, plan.positions}, kind);
  Tensor context = torch::stable::new_empty(features, {samples, plan.maps, channels}, kind);
  const auto statistic = [&](torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return torch::stable::new_empty(features, shape, torch::headeronly::ScalarType::Double);
  };
  Tensor mean = statistic({samples, channels}), variance = statistic({samples, channels});
  Tensor gate = statistic({samples, channels});
  Tensor statistics[4];
  for (Tensor& t : statistics) t = statistic({channels});
  BatchNorm ca(channels, ca_running_mean, ca_running_var);
  BatchNorm norm(channels, norm_running_mean, norm_running_var);
  const auto vector = [&](const Tensor& t) { return values_of<double>(t, t.numel(), 0); };
  const auto run = [&]<typename T, typename Tiles>() {
    using A = accumulate_t<T>;
    A *p = attention.mutable_data_ptr<A>(), *t = context.mutable_data_ptr<A>();
    double *exact = mean.mutable_data_ptr<double>(), *v = variance.mutable_data_ptr<double>();
    std::vector<A> mu(static_cast<size_t>(samples * channels)), spread(mu.size());
    const Scratch<A> memory(plan.size(channels, 1));
    const Stack<A> weights = plan.stack(memory.get(), channels, 1, maps.columns);
    copy_weights(sc_weight, plan, weights);
    const int64_t cost = channels * plan.positions * (plan.count + 2);
    fastreid_vi::each_sample(samples, cost, [&](int64_t b) {
      const int64_t at = b * channels;
      sample_moments<T>(maps.x, b, maps.columns, &mu[at], &spread[at], exact + at);
      attend<Tiles>(Sample<T>(maps.x, b), plan, weights, &mu[at],
                    p + b * plan.maps * plan.positions, t + plan.maps * at);
    });
    std::copy(spread.begin(), spread.end(), v);
    const AdapterSizes sizes{samples, channels, plan.positions, plan.maps, eps};
    const fastreid_vi::OpenGate open(sizes, t, exact, v, vector(ca_weight), vector(ca_bn_weight),
                                     vector(ca_bn_bias), vector(norm_weight), vector(norm_bias), ca,
                                     norm);
    std::copy(open.gate.begin(), open.gate.end(), gate.mutable_data_ptr<double>());
    const Vector* measured[4] = {&ca.mean, &ca.variance, &norm.mean, &norm.variance};
    for (int i = 0; i < 4; ++i) {
      std::copy(measured[i]->begin(), measured[i]->end(), statistics[i].mutable_data_ptr<double>());
    }
    const std::vector<A> a(open.a.begin(), open.a.end()), d(open.d.begin(), open.d.end());
    const T* x = maps.x.tensor.const_data_ptr<T>();
    T* y = maps.result.mutable_data_ptr<T>();
    fastreid_vi::parallel(samples * maps.rows, maps.width, [&](int64_t from, int64_t until) {
      for (int64_t i = from; i < until; ++i) {
        const int64_t b = i / maps.rows, row = i % maps.rows;
        const T* source = x + b * maps.x.batch + row * maps.stride(maps.x);
        T* into = y + b * maps.to.batch + row * maps.stride(maps.to);
        const int64_t at = b * channels + (maps.columns ? 0 : row);
        if (maps.columns) {
          adapt(source, &mu[at], &a[at], &d[at], channels, into);
        } else {
          adapt_row(source, mu[at], a[at], d[at], plan.positions, into);
        }
      }
    });
  };
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    fastreid_vi::with_tiles<T>([&]<typename Tiles>() { run.template operator()<T, Tiles>(); });
  });
  return {maps.result, attention,     context,       mean,          variance,
          gate,        statistics[0], statistics[1], statistics[2], statistics[3]};
}

// One sample's way back through the attention: d(logits) behind the attention in `positions`, its
// product with x added to `total`.
template <typename Tiles, typename T, typename A>
void attend_backward(const Sample<T>& sample, const Plan& plan, const A* attention, const A* mean,
                     Stack<A> channels, Stack<A> positions, Stack<A> total) {
  const Stack<A> d = positions.from(plan.count);
  fastreid_vi::copy_stack(attention, A(1), plan.maps, plan.positions, positions);
  fastreid_vi::over_channels<Tiles>(sample, plan, channels, d);
  for (int64_t m = 0; m < plan.maps; ++m) {
    fastreid_vi::through_softmax(positions, d, m, plan.positions);
  }
  fastreid_vi::over_positions<Tiles>(sample, plan, d, total);
  for (int64_t m = 0; m < plan.maps; ++m) {
    // d sums to zero but for rounding, which a large mean of x would weigh.
    double rest = 0;
    for (int64_t s = 0; s < plan.positions; ++s) rest += static_cast<double>(d.at(m, s));
    for (int64_t c = 0; c < plan.channels; ++c) total.at(m, c) -= static_cast<A>(rest) * mean[c];
  }
}

// dx of one sample, in blocks of rows: what came through the attention is an outer product of the
// stacks, and joins the affine part before it is rounded.
template <typename Tiles, typename T, typename A>
void write_gradient(const Maps& maps, const FeatureMap& given, const Plan& plan, int64_t b,
                    Stack<A> channels, Stack<A> positions, const A* mean, const A* on_g,
                    const A* on_x, const A* offset, T* dx) {
  const Stack<A> along = maps.columns ? positions : channels;
  const Stack<A> across = maps.columns ? channels : positions;
  const T* x = maps.x.tensor.const_data_ptr<T>() + b * maps.x.batch;
  const T* g = given.tensor.const_data_ptr<T>() + b * given.batch;
  T* to = dx + b * maps.to.batch;
  const int64_t blocks = (maps.rows + kRows - 1) / kRows, pitch = maps.width;
  fastreid_vi::parallel(blocks, kRows * maps.width * plan.count, [&](int64_t from, int64_t until) {
    const Scratch<A> memory(kRows * pitch);
    for (int64_t first = from * kRows; first < std::min(until * kRows, maps.rows); first += kRows) {
      const int64_t rows = std::min(kRows, maps.rows - first);
      Tiles::Wide::outer(along.data + first * along.item, along.item, across.data, across.map,
                         2 * plan.count, memory.get(), rows, pitch, maps.width);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t row = first + r, at = b * plan.channels + (maps.columns ? 0 : row);
        const T *gs = g + row * maps.stride(given), *xs = x + row * maps.stride(maps.x);
        const A* mapped = memory.get() + r * pitch;
        T* into = to + row * maps.stride(maps.to);
        if (maps.columns) {
          gather(gs, xs, mean + at, on_g + at, on_x + at, offset + at, mapped, maps.width, into);
        } else {
          gather_row(gs, xs, mean[at], on_g[at], on_x[at], offset[at], mapped, maps.width, into);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> distribution_adapter_backward(
    const Tensor& grad, const Tensor& features, const Tensor& sc_weight, const Tensor& ca_weight,
    const Tensor& ca_bn_weight, const Tensor& norm_weight, const Tensor& attention,
    const Tensor& context, const Tensor& mean, const Tensor& variance, const Tensor& gate,
    const Tensor& ca_mean, const Tensor& ca_var, const Tensor& norm_mean, const Tensor& norm_var,
    double eps, bool fixed) {
  const Maps maps(features);
  const FeatureMap given = fastreid_vi::map_in_layout(grad, maps.columns);
  const Plan plan(maps.x, sc_weight.size(0));
  const int64_t channels = plan.channels, samples = plan.samples;
  BatchNorm ca(channels, ca_mean, ca_var), norm(channels, norm_mean, norm_var);
  ca.fixed = norm.fixed = fixed;
  const auto vector = [&](const Tensor& t) { return values_of<double>(t, t.numel(), 0); };
  Tensor dsc, dca, dbn_weight, dbn_bias, dnorm_weight, dnorm_bias;
  const int64_t groups = std::min(kGroups, samples), part = plan.size(channels, 1);
  const auto run = [&]<typename T, typename Tiles>() {
    using A = accumulate_t<T>;
    const A *p = attention.const_data_ptr<A>(), *t = context.const_data_ptr<A>();
    const double *exact = mean.const_data_ptr<double>(), *v = variance.const_data_ptr<double>();
    const std::vector<A> mu(exact, exact + samples * channels);
    std::vector<A> sum_g(static_cast<size_t>(samples * channels)), sum_gc(sum_g.size());
    const int64_t cost = channels * plan.positions * (plan.count + 2);
    fastreid_vi::each_sample(samples, cost, [&](int64_t b) {
      sample_sums<T>(given, maps.x, b, maps.columns, &mu[b * channels], &sum_g[b * channels],
                     &sum_gc[b * channels]);
    });
    const AdapterSizes sizes{samples, channels, plan.positions, plan.maps, eps};
    const Vector wa = vector(ca_weight);
    const fastreid_vi::CloseGate closed(
        sizes, Vector(sum_g.begin(), sum_g.end()), Vector(sum_gc.begin(), sum_gc.end()), t, exact,
        v, gate.const_data_ptr<double>(), wa, vector(ca_bn_weight), vector(norm_weight), ca, norm);
    const auto narrow = [](const Vector& w) { return std::vector<A>(w.begin(), w.end()); };
    const std::vector<A> on_g = narrow(closed.on_g), on_x = narrow(closed.on_x);
    const std::vector<A> offset = narrow(closed.offset);
    const Scratch<A> parts(groups * part);
    T* dx = maps.result.mutable_data_ptr<T>();
    fastreid_vi::each_sample(
        groups, cost * (samples / std::max<int64_t>(groups, 1)), [&](int64_t g) {
          const Scratch<A> wide(plan.size(channels, 2)), tall(plan.size(plan.positions, 2));
          const Stack<A> on_channels = plan.stack(wide.get(), channels, 2, maps.columns);
          const Stack<A> on_positions = plan.stack(tall.get(), plan.positions, 2, !maps.columns);
          copy_weights(sc_weight, plan, on_channels.from(plan.count));
          const Stack<A> total = plan.stack(parts.get() + g * part, channels, 1, maps.columns);
          for (int64_t b = g * samples / groups; b < (g + 1) * samples / groups; ++b) {
            std::fill(tall.get(), tall.get() + plan.size(plan.positions, 2), A(0));
            for (int64_t m = 0; m < plan.maps; ++m) {
              for (int64_t c = 0; c < channels; ++c) {
                on_channels.at(m, c) =
                    static_cast<A>(closed.mixed_gradient[b * channels + c] * wa[c * plan.maps + m]);
              }
            }
            attend_backward<Tiles>(Sample<T>(maps.x, b), plan, p + b * plan.maps * plan.positions,
                                   &mu[b * channels], on_channels, on_positions, total);
            write_gradient<Tiles, T>(maps, given, plan, b, on_channels, on_positions, mu.data(),
                                     on_g.data(), on_x.data(), offset.data(), dx);
          }
        });
    std::vector<A> sum(static_cast<size_t>(plan.maps * channels));
    for (int64_t g = 0; g < groups; ++g) {
      const Stack<A> total = plan.stack(parts.get() + g * part, channels, 1, maps.columns);
      for (int64_t i = 0; i < plan.maps * channels; ++i) {
        sum[i] += total.at(i / channels, i % channels);
      }
    }
    using fastreid_vi::tensor_of;
    dsc = tensor_of(sum, sc_weight, sc_weight.sizes());
    dca = tensor_of(closed.ca_gradient, ca_weight, ca_weight.sizes());
    dbn_weight = tensor_of(closed.bn_weight_gradient, ca_bn_weight, {channels});
    dbn_bias = tensor_of(closed.bn_bias_gradient, ca_bn_weight, {channels});
    dnorm_weight = tensor_of(closed.norm_weight_gradient, norm_weight, {channels});
    dnorm_bias = tensor_of(closed.norm_bias_gradient, norm_weight, {channels});
  };
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    fastreid_vi::with_tiles<T>([&]<typename Tiles>() { run.template operator()<T, Tiles>(); });
  });
  return {maps.result, dsc, dca, dbn_weight, dbn_bias, dnorm_weight, dnorm_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("distribution_adapter", TORCH_BOX(&distribution_adapter));
  m.impl("distribution_adapter_backward", TORCH_BOX(&distribution_adapter_backward));
}
