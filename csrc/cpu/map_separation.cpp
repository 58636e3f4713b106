// Loss that keeps the pattern maps of a sample apart.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "common.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::FeatureMap;
using torch::stable::Tensor;

// B P (P-1), and 1 where there is no pair.
double pairs(const FeatureMap& maps) {
  return static_cast<double>(std::max<int64_t>(
      maps.batches * maps.channels * (maps.channels - 1), 1));
}

Tensor map_separation_loss(const Tensor& maps) {
  const FeatureMap map = fastreid_vi::feature_map(maps);
  Tensor loss = torch::stable::new_empty(maps, {}, fastreid_vi::accumulate_type(maps.scalar_type()));
  fastreid_vi::for_floating(maps.scalar_type(), [&]<typename T>() {
    const T* x = map.tensor.const_data_ptr<T>();
    std::vector<double> parts(static_cast<size_t>(map.batches));
    fastreid_vi::parallel(map.batches, map.channels * map.positions, [&](int64_t from, int64_t to) {
      std::vector<double> earlier(static_cast<size_t>(map.positions));
      for (int64_t b = from; b < to; ++b) {
        std::fill(earlier.begin(), earlier.end(), 0.0);
        // Each map meets the sum of those before it: one map gives exactly zero.
        for (int64_t p = 0; p < map.channels; ++p) {
          const T* row = x + b * map.batch + p * map.channel;
          double overlap = 0;
          for (int64_t s = 0; s < map.positions; ++s) {
            const double a = static_cast<double>(static_cast<accumulate_t<T>>(row[s * map.position]));
            overlap += a * earlier[s];
            earlier[s] += a;
          }
          parts[b] += overlap;
        }
      }
    });
    double total = 0;
    for (int64_t b = 0; b < map.batches; ++b) total += parts[b];
    *loss.mutable_data_ptr<accumulate_t<T>>() = static_cast<accumulate_t<T>>(2 * total / pairs(map));
  });
  return loss;
}

Tensor map_separation_loss_backward(const Tensor& grad, const Tensor& maps) {
  const FeatureMap map = fastreid_vi::feature_map(maps);
  Tensor out = fastreid_vi::empty_map(maps, fastreid_vi::is_channels_last(maps));
  const FeatureMap to = fastreid_vi::feature_map(out);
  fastreid_vi::for_floating(maps.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T* x = map.tensor.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const A scale = static_cast<A>(2.0 * static_cast<double>(*grad.const_data_ptr<A>()) / pairs(map));
    fastreid_vi::parallel(map.batches, map.channels * map.positions, [&](int64_t from, int64_t last) {
      for (int64_t b = from; b < last; ++b) {
        for (int64_t s = 0; s < map.positions; ++s) {
          const T* a = x + b * map.batch + s * map.position;
          T* d = y + b * to.batch + s * to.position;
          A sum = 0;
          for (int64_t p = 0; p < map.channels; ++p) sum += static_cast<A>(a[p * map.channel]);
          for (int64_t p = 0; p < map.channels; ++p) {
            d[p * to.channel] = static_cast<T>((sum - static_cast<A>(a[p * map.channel])) * scale);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("map_separation_loss", TORCH_BOX(&map_separation_loss));
  m.impl("map_separation_loss_backward", TORCH_BOX(&map_separation_loss_backward));
}
