// Loss that keeps the pattern maps of a sample apart.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "common.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::FeatureMap;
using torch::stable::Tensor;

constexpr int64_t kLanes = 16;  // independent sums, so that they vectorise

// One map meets the sum of those before it, and joins it; gives their overlap.
template <typename T, bool Dense>
FASTREID_VI_CLONES double meet(const T* __restrict map, int64_t positions, int64_t stride,
                               double* __restrict earlier) {
  const int64_t step = Dense ? 1 : stride;
  double lane[kLanes] = {};
  int64_t s = 0;
  for (; s + kLanes <= positions; s += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      const auto a = static_cast<double>(static_cast<accumulate_t<T>>(map[(s + i) * step]));
      lane[i] += a * earlier[s + i];
      earlier[s + i] += a;
    }
  }
  double sum = 0;
  for (; s < positions; ++s) {
    const auto a = static_cast<double>(static_cast<accumulate_t<T>>(map[s * step]));
    sum += a * earlier[s];
    earlier[s] += a;
  }
  for (const double part : lane) sum += part;
  return sum;
}

template <typename T, typename A, bool Dense>
FASTREID_VI_CLONES void add_map(const T* map, int64_t positions, int64_t stride, A* total) {
  const int64_t step = Dense ? 1 : stride;
  for (int64_t s = 0; s < positions; ++s) total[s] += static_cast<A>(map[s * step]);
}

template <typename T, typename A, bool Dense>
FASTREID_VI_CLONES void subtract_map(const A* total, const T* map, int64_t positions,
                                     int64_t stride, A scale, T* out, int64_t out_stride) {
  const int64_t step = Dense ? 1 : stride, out_step = Dense ? 1 : out_stride;
  for (int64_t s = 0; s < positions; ++s) {
    out[s * out_step] = static_cast<T>((total[s] - static_cast<A>(map[s * step])) * scale);
  }
}

// B P (P-1), and 1 where there is no pair.
double pairs(const FeatureMap& maps) {
  return static_cast<double>(
      std::max<int64_t>(maps.batches * maps.channels * (maps.channels - 1), 1));
}

template <typename T>
double overlap(const FeatureMap& map, int64_t b, double* earlier) {
  const T* x = map.tensor.const_data_ptr<T>() + b * map.batch;
  double sum = 0;
  std::fill(earlier, earlier + map.positions, 0.0);
  for (int64_t p = 0; p < map.channels; ++p) {
    const T* row = x + p * map.channel;
    if (map.position == 1) {
      sum += meet<T, true>(row, map.positions, 1, earlier);
    } else {
      sum += meet<T, false>(row, map.positions, map.position, earlier);
    }
  }
  return sum;
}

Tensor map_separation_loss(const Tensor& maps) {
  const FeatureMap map = fastreid_vi::feature_map(maps);
  const auto kind = fastreid_vi::accumulate_type(maps.scalar_type());
  Tensor loss = torch::stable::new_empty(maps, {}, kind);
  fastreid_vi::for_floating(maps.scalar_type(), [&]<typename T>() {
    std::vector<double> parts(static_cast<size_t>(map.batches));
    const int64_t cost = map.channels * map.positions;
    fastreid_vi::parallel(map.batches, cost, [&](int64_t from, int64_t to) {
      std::vector<double> earlier(static_cast<size_t>(map.positions));
      for (int64_t b = from; b < to; ++b) parts[b] = overlap<T>(map, b, earlier.data());
    });
    double total = 0;
    for (const double part : parts) total += part;
    using A = accumulate_t<T>;
    *loss.mutable_data_ptr<A>() = static_cast<A>(2 * total / pairs(map));
  });
  return loss;
}

Tensor map_separation_loss_backward(const Tensor& grad, const Tensor& maps) {
  const FeatureMap map = fastreid_vi::feature_map(maps);
  Tensor out = fastreid_vi::empty_map(maps, fastreid_vi::is_channels_last(maps));
  const FeatureMap to = fastreid_vi::feature_map(out);
  const bool dense = map.position == 1 && to.position == 1;
  fastreid_vi::for_floating(maps.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T* x = map.tensor.const_data_ptr<T>();
    T* y = out.mutable_data_ptr<T>();
    const auto g = static_cast<double>(*grad.const_data_ptr<A>());
    const A scale = static_cast<A>(2.0 * g / pairs(map));
    const int64_t cost = map.channels * map.positions, n = map.positions;
    fastreid_vi::parallel(map.batches, cost, [&](int64_t from, int64_t last) {
      std::vector<A> total(static_cast<size_t>(n));
      for (int64_t b = from; b < last; ++b) {
        std::fill(total.begin(), total.end(), A(0));
        for (int64_t p = 0; p < map.channels; ++p) {
          const T* a = x + b * map.batch + p * map.channel;
          if (dense) {
            add_map<T, A, true>(a, n, 1, total.data());
          } else {
            add_map<T, A, false>(a, n, map.position, total.data());
          }
        }
        for (int64_t p = 0; p < map.channels; ++p) {
          const T* a = x + b * map.batch + p * map.channel;
          T* d = y + b * to.batch + p * to.channel;
          if (dense) {
            subtract_map<T, A, true>(total.data(), a, n, 1, scale, d, 1);
          } else {
            subtract_map<T, A, false>(total.data(), a, n, map.position, scale, d, to.position);
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
