// Pattern maps and the features pooled under them; stacks.h says how maps and features meet.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "common.h"
#include "cpu/pattern_tiles.h"
#include "cpu/stacks.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::copy_stack;
using fastreid_vi::each_sample;
using fastreid_vi::FeatureMap;
using fastreid_vi::over_channels;
using fastreid_vi::over_positions;
using fastreid_vi::Plan;
using fastreid_vi::rows_are_positions;
using fastreid_vi::Sample;
using fastreid_vi::Scratch;
using fastreid_vi::Stack;
using torch::stable::Tensor;

constexpr int64_t kGroups =
    64;  // partial weight gradients: fixed, so that sums do not follow the threads

// maps = act(logits + bias), in place and, rounded, to `out` [P, S]
template <typename T, typename A>
void activate(const Plan& plan, Stack<A> z, const T* bias, bool sigmoid, T* out) {
  for (int64_t p = 0; p < plan.maps; ++p) {
    if (!sigmoid) fastreid_vi::softmax(z, p, plan.positions);  // the bias cancels
    const A b = bias ? static_cast<A>(bias[p]) : A(0);
    T* row = out + p * plan.positions;
    for (int64_t s = 0; s < plan.positions; ++s) {
      A& a = z.at(p, s);
      if (sigmoid) a = 1 / (1 + std::exp(-(a + b)));
      row[s] = static_cast<T>(a);
    }
  }
}

std::tuple<Tensor, Tensor> pattern_pool(const Tensor& features, const Tensor& weight,
                                        const std::optional<Tensor>& bias,
                                        const std::string& activation) {
  const FeatureMap map = fastreid_vi::feature_map(features);
  const Plan plan(map, weight.size(0));
  const bool sigmoid = activation == "sigmoid", by_position = rows_are_positions(map);
  Tensor pooled = torch::stable::new_empty(features, {plan.samples, plan.maps, plan.channels});
  Tensor maps = torch::stable::new_empty(
      features, {plan.samples, plan.maps, features.size(2), features.size(3)});
  const Tensor w = torch::stable::contiguous(weight);
  const Tensor b = bias ? torch::stable::contiguous(*bias) : w;
  const auto run = [&]<typename T, typename Tiles>() {
    using A = accumulate_t<T>;
    const Scratch<A> memory(plan.size(plan.channels, 1));
    const Stack<A> weights = plan.stack(memory.get(), plan.channels, 1, by_position);
    copy_stack(w.const_data_ptr<T>(), A(1), plan.maps, plan.channels, weights);
    const T* offsets = bias ? b.const_data_ptr<T>() : nullptr;
    const A divisor = sigmoid ? static_cast<A>(plan.positions) : A(1);
    T* pooled_to = pooled.mutable_data_ptr<T>();
    T* maps_to = maps.mutable_data_ptr<T>();
    const int64_t cost = plan.channels * plan.positions * plan.count;
    each_sample(plan.samples, cost, [&](int64_t i) {
      const Sample<T> sample(map, i);
      const Scratch<A> a(plan.size(plan.positions, 1)), y(plan.size(plan.channels, 1));
      const Stack<A> z = plan.stack(a.get(), plan.positions, 1, !by_position);
      const Stack<A> sums = plan.stack(y.get(), plan.channels, 1, by_position);
      over_channels<Tiles>(sample, plan, weights, z);
      activate(plan, z, offsets, sigmoid, maps_to + i * plan.maps * plan.positions);
      over_positions<Tiles>(sample, plan, z, sums);
      T* row = pooled_to + i * plan.maps * plan.channels;
      for (int64_t p = 0; p < plan.maps; ++p) {
        for (int64_t c = 0; c < plan.channels; ++c) {
          row[p * plan.channels + c] = static_cast<T>(sums.at(p, c) / divisor);
        }
      }
    });
  };
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    fastreid_vi::with_tiles<T>([&]<typename Tiles>() { run.template operator()<T, Tiles>(); });
  });
  return {pooled, maps};
}

// dz from da (in place) and, for the bias, its sums over positions. A bias moves all positions
// alike, which softmax cancels: its gradient is zero, not rounding noise.
template <typename T, typename A>
void logit_gradient(const Plan& plan, Stack<A> a, Stack<A> d, const T* grad, bool sigmoid,
                    double* sums) {
  for (int64_t p = 0; p < plan.maps; ++p) {
    const T* g = grad + p * plan.positions;
    double sum = 0;
    for (int64_t s = 0; s < plan.positions; ++s) d.at(p, s) += static_cast<A>(g[s]);
    if (sigmoid) {
      for (int64_t s = 0; s < plan.positions; ++s) {
        d.at(p, s) *= a.at(p, s) * (1 - a.at(p, s));
        sum += static_cast<double>(d.at(p, s));
      }
    } else {
      fastreid_vi::through_softmax(a, d, p, plan.positions);
    }
    sums[p] = sum;
  }
}

// dx(c, s) = sum over 2 * count maps of channels(p, c) positions(p, s); does not read x.
template <typename Tiles, typename T, typename A>
void outer_product(const FeatureMap& to, int64_t b, T* data, const Plan& plan, Stack<A> channels,
                   Stack<A> positions) {
  const bool by_position = rows_are_positions(to);
  const int64_t count = 2 * plan.count;
  Stack<A> along = by_position ? positions : channels;   // one coefficient per row
  Stack<A> across = by_position ? channels : positions;  // one vector per map
  const int64_t rows = by_position ? plan.positions : plan.channels;
  const int64_t width = by_position ? plan.channels : plan.positions;
  const bool turned = along.map != 1 || across.item != 1;  // dx is laid out otherwise than x
  const Scratch<A> memory(turned ? plan.size(rows, 2) + plan.size(width, 2) : 0);
  if (turned) {
    const Stack<A> a = plan.stack(memory.get(), rows, 2, false);
    const Stack<A> v = plan.stack(memory.get() + plan.size(rows, 2), width, 2, true);
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t i = 0; i < rows; ++i) a.at(p, i) = along.at(p, i);
      for (int64_t i = 0; i < width; ++i) v.at(p, i) = across.at(p, i);
    }
    along = a, across = v;
  }
  const int64_t stride = by_position ? to.position : to.channel;
  fastreid_vi::parallel(rows, width * count, [&](int64_t first, int64_t last) {
    Tiles::outer(along.data + first * along.item, along.item, across.data, across.map, count,
                 data + b * to.batch + first * stride, last - first, stride, width);
  });
}

std::tuple<Tensor, Tensor, Tensor> pattern_pool_backward(const Tensor& grad_pooled,
                                                         const Tensor& grad_maps,
                                                         const Tensor& features,
                                                         const Tensor& weight, const Tensor& maps,
                                                         const std::string& activation) {
  const FeatureMap map = fastreid_vi::feature_map(features);
  const Plan plan(map, weight.size(0));
  const bool sigmoid = activation == "sigmoid", by_position = rows_are_positions(map);
  Tensor dx = fastreid_vi::empty_map(features, fastreid_vi::is_channels_last(features));
  const FeatureMap to = fastreid_vi::feature_map(dx);
  Tensor dw = torch::stable::new_empty(weight, weight.sizes());
  Tensor db = torch::stable::new_empty(weight, {plan.maps});
  const Tensor w = torch::stable::contiguous(weight), a = torch::stable::contiguous(maps);
  const Tensor gp = torch::stable::contiguous(grad_pooled);
  const Tensor gm = torch::stable::contiguous(grad_maps);
  const int64_t each = std::max<int64_t>(1, (plan.samples + kGroups - 1) / kGroups);
  const int64_t groups = (plan.samples + each - 1) / each, part = plan.size(plan.channels, 1);
  const int64_t map_size = plan.maps * plan.positions, pooled_size = plan.maps * plan.channels;
  const auto run = [&]<typename T, typename Tiles>() {
    using A = accumulate_t<T>;
    const Scratch<A> parts(groups * part);
    const Scratch<double> sums(plan.samples * plan.maps);
    const A divisor = sigmoid ? static_cast<A>(plan.positions) : A(1);
    T* dx_to = dx.mutable_data_ptr<T>();
    each_sample(groups, each * plan.channels * plan.positions * plan.count, [&](int64_t g) {
      const Scratch<A> wide(plan.size(plan.channels, 2));
      const Stack<A> channels = plan.stack(wide.get(), plan.channels, 2, by_position);
      copy_stack(w.const_data_ptr<T>(), A(1), plan.maps, plan.channels, channels.from(plan.count));
      const Stack<A> total = plan.stack(parts.get() + g * part, plan.channels, 1, by_position);
      for (int64_t i = g * each; i < std::min(plan.samples, (g + 1) * each); ++i) {
        const Sample<T> sample(map, i);
        const Scratch<A> memory(plan.size(plan.positions, 2));
        const Stack<A> masks = plan.stack(memory.get(), plan.positions, 2, !by_position);
        const Stack<A> d = masks.from(plan.count);
        copy_stack(gp.const_data_ptr<T>() + i * pooled_size, divisor, plan.maps, plan.channels,
                   channels);
        copy_stack(a.const_data_ptr<T>() + i * map_size, A(1), plan.maps, plan.positions, masks);
        over_channels<Tiles>(sample, plan, channels, d);
        logit_gradient(plan, masks, d, gm.const_data_ptr<T>() + i * map_size, sigmoid,
                       sums.get() + i * plan.maps);
        over_positions<Tiles>(sample, plan, d, total);
        outer_product<Tiles>(to, i, dx_to, plan, channels, masks);
      }
    });
    T* dw_to = dw.mutable_data_ptr<T>();
    T* db_to = db.mutable_data_ptr<T>();
    for (int64_t p = 0; p < plan.maps; ++p) {
      fastreid_vi::parallel(plan.channels, groups, [&](int64_t from, int64_t last) {
        for (int64_t c = from; c < last; ++c) {
          A sum = 0;
          for (int64_t g = 0; g < groups; ++g) {
            sum += plan.stack(parts.get() + g * part, plan.channels, 1, by_position).at(p, c);
          }
          dw_to[p * plan.channels + c] = static_cast<T>(sum);
        }
      });
      double sum = 0;
      for (int64_t i = 0; i < plan.samples; ++i) sum += sums.get()[i * plan.maps + p];
      db_to[p] = static_cast<T>(static_cast<A>(sum));
    }
  };
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    fastreid_vi::with_tiles<T>([&]<typename Tiles>() { run.template operator()<T, Tiles>(); });
  });
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("pattern_pool", TORCH_BOX(&pattern_pool));
  m.impl("pattern_pool_backward", TORCH_BOX(&pattern_pool_backward));
}
