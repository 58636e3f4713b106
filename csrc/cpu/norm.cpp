// Modality alleviation: statistics, gate and affine map of one sample at a time, so that the second
// read of the sample comes from the cache. Channels-last maps are read as rows of channels in
// blocks, NCHW maps as rows of positions.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common.h"
#include "cpu/channels.h"
#include "cpu/turned.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::FeatureMap;
using fastreid_vi::gradient_sums_columns;
using fastreid_vi::gradient_sums_row;
using fastreid_vi::kBlock;
using fastreid_vi::moments_columns;
using fastreid_vi::moments_row;
using fastreid_vi::plane;
using torch::stable::Tensor;

// out = keep x + pull (x - mean)
template <typename T, typename A>
FASTREID_VI_CLONES void blend_columns(const T* x, const A* keep, const A* pull, const A* mean,
                                      int64_t width, T* out) {
  for (int64_t i = 0; i < width; ++i) {
    const A v = static_cast<A>(x[i]);
    out[i] = static_cast<T>(keep[i] * v + pull[i] * (v - mean[i]));
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void blend_row(const T* x, A keep, A pull, A mean, int64_t positions, T* out) {
  for (int64_t s = 0; s < positions; ++s) {
    const A v = static_cast<A>(x[s]);
    out[s] = static_cast<T>(keep * v + pull * (v - mean));
  }
}

// dx = on_g g + on_x (x - mean) + offset
template <typename T, typename A>
FASTREID_VI_CLONES void gradient_columns(const T* g, const T* x, const A* on_g, const A* on_x,
                                         const A* mean, const A* offset, int64_t width, T* dx) {
  for (int64_t i = 0; i < width; ++i) {
    const A centred = static_cast<A>(x[i]) - mean[i];
    dx[i] = static_cast<T>(on_g[i] * static_cast<A>(g[i]) + on_x[i] * centred + offset[i]);
  }
}

template <typename T, typename A>
FASTREID_VI_CLONES void gradient_row(const T* g, const T* x, A on_g, A on_x, A mean, A offset,
                                     int64_t positions, T* dx) {
  for (int64_t s = 0; s < positions; ++s) {
    dx[s] =
        static_cast<T>(on_g * static_cast<A>(g[s]) + on_x * (static_cast<A>(x[s]) - mean) + offset);
  }
}

// The two small matrices of the gate, [hidden, C] and [C, hidden], in the accumulation type: the
// weights themselves where they are of it.
template <typename A>
struct Gate {
  template <typename T>
  Gate(const Tensor& w1, const Tensor& w2, const T*)
      : hidden(w1.size(0)), channels(w1.size(1)), tensors{dense(w1), dense(w2)} {
    reduce = values<T>(0);
    expand = values<T>(1);
  }
  Gate(const Gate&) = delete;  // points into itself

  int64_t hidden, channels;
  const A *reduce, *expand;

 private:
  static Tensor dense(const Tensor& weight) {
    return weight.is_contiguous() ? weight : torch::stable::contiguous(weight);
  }

  template <typename T>
  const A* values(int i) {
    const T* first = tensors[i].template const_data_ptr<T>();
    if constexpr (std::is_same_v<T, A>) return first;
    copies[i].assign(first, first + tensors[i].numel());
    return copies[i].data();
  }

  Tensor tensors[2];
  std::vector<A> copies[2];
};

template <typename A>
FASTREID_VI_CLONES A dot(const A* a, const A* b, int64_t n) {
  return fastreid_vi::sum_row<A>(n, [&](int64_t i) { return a[i] * b[i]; });
}

template <typename A>
FASTREID_VI_CLONES void add_scaled(A scale, const A* x, int64_t n, A* y) {
  for (int64_t i = 0; i < n; ++i) y[i] += scale * x[i];
}

template <typename A>
void squeeze(const Gate<A>& gate, const A* mean, A* hidden) {
  for (int64_t j = 0; j < gate.hidden; ++j) {
    hidden[j] = std::max(dot(gate.reduce + j * gate.channels, mean, gate.channels), A(0));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> modality_alleviation(const Tensor& features,
                                                                const Tensor& reduce_weight,
                                                                const Tensor& expand_weight,
                                                                double eps) {
  const bool columns = fastreid_vi::is_channels_last(features);
  const FeatureMap map = fastreid_vi::map_in_layout(features, columns);
  const int64_t channels = map.channels, positions = map.positions;
  Tensor out = fastreid_vi::empty_map(features, columns);
  const FeatureMap to = fastreid_vi::map_in_layout(out, columns);
  const auto kind = fastreid_vi::accumulate_type(features.scalar_type());
  const auto statistic = [&] {
    return torch::stable::new_empty(features, {map.batches, channels}, kind);
  };
  Tensor mean = statistic(), rstd = statistic(), gates = statistic();
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Gate<A> gate(reduce_weight, expand_weight, static_cast<const T*>(nullptr));
    A *means = mean.mutable_data_ptr<A>(), *rstds = rstd.mutable_data_ptr<A>();
    A* opened = gates.mutable_data_ptr<A>();
    T* y = out.mutable_data_ptr<T>();
    fastreid_vi::parallel(map.batches, channels * positions, [&](int64_t from, int64_t until) {
      std::vector<A> hidden(static_cast<size_t>(gate.hidden)), pull(static_cast<size_t>(channels));
      for (int64_t b = from; b < until; ++b) {
        const auto x = plane<T>(map, b);
        A *mu = means + b * channels, *q = rstds + b * channels, *m = opened + b * channels;
        if (columns) {
          for (int64_t c = 0; c < channels; c += kBlock) {
            moments_columns(x.at(c), x.position, positions, std::min(kBlock, channels - c), mu + c,
                            q + c);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            moments_row(x.at(c), positions, mu + c, q + c);
          }
        }
        squeeze(gate, mu, hidden.data());
        for (int64_t c = 0; c < channels; ++c) {
          q[c] = A(1) / std::sqrt(q[c] + static_cast<A>(eps));
          const A z = dot(gate.expand + c * gate.hidden, hidden.data(), gate.hidden);
          m[c] = A(1) / (A(1) + std::exp(-z));
          pull[c] = (A(1) - m[c]) * q[c];
        }
        T* into = y + b * to.batch;
        if (columns) {
          for (int64_t s = 0; s < positions; ++s) {
            blend_columns(x.data + s * x.position, m, pull.data(), mu, channels,
                          into + s * to.position);
          }
        } else {
          for (int64_t c = 0; c < channels; ++c) {
            blend_row(x.at(c), m[c], pull[c], mu[c], positions, into + c * to.channel);
          }
        }
      }
    });
  });
  return {out, mean, rstd, gates};
}

// The gradient of one sample through its gate; leaves dz [C] and dh [hidden] for the weights.
template <typename A>
void gate_gradient(const Gate<A>& gate, const A* mean, const A* rstd, const A* m, const A* sum_g,
                   const A* sum_gc, A* hidden, A* dz, A* dh, A* dmean) {
  squeeze(gate, mean, hidden);
  std::fill(dh, dh + gate.hidden, A(0));
  std::fill(dmean, dmean + gate.channels, A(0));
  for (int64_t c = 0; c < gate.channels; ++c) {
    const A dm = mean[c] * sum_g[c] + (A(1) - rstd[c]) * sum_gc[c];  // sum of dy (x - xn)
    dz[c] = dm * m[c] * (A(1) - m[c]);
    add_scaled(dz[c], gate.expand + c * gate.hidden, gate.hidden, dh);
  }
  for (int64_t j = 0; j < gate.hidden; ++j) {
    if (hidden[j] <= A(0)) dh[j] = A(0);
    add_scaled(dh[j], gate.reduce + j * gate.channels, gate.channels, dmean);
  }
}

// dw[r, :] = sum over samples of rows[b, r] * columns[b, :], samples in order.
template <typename T, typename A>
void outer_sums(const std::vector<A>& rows, int64_t height, const std::vector<A>& columns,
                int64_t width, int64_t batches, T* dw) {
  fastreid_vi::parallel(height, width * batches, [&](int64_t from, int64_t until) {
    std::vector<A> total(static_cast<size_t>(width));
    for (int64_t r = from; r < until; ++r) {
      std::fill(total.begin(), total.end(), A(0));
      for (int64_t b = 0; b < batches; ++b) {
        add_scaled(rows[b * height + r], columns.data() + b * width, width, total.data());
      }
      for (int64_t i = 0; i < width; ++i) dw[r * width + i] = static_cast<T>(total[i]);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> modality_alleviation_backward(
    const Tensor& grad, const Tensor& features, const Tensor& reduce_weight,
    const Tensor& expand_weight, const Tensor& mean, const Tensor& rstd, const Tensor& gates) {
  const bool columns = fastreid_vi::is_channels_last(features);
  const FeatureMap map = fastreid_vi::map_in_layout(features, columns);
  const int64_t channels = map.channels, positions = map.positions, batches = map.batches;
  Tensor out = fastreid_vi::empty_map(features, columns);
  const FeatureMap to = fastreid_vi::map_in_layout(out, columns);
  Tensor grad_reduce = torch::stable::new_empty(reduce_weight, reduce_weight.sizes());
  Tensor grad_expand = torch::stable::new_empty(expand_weight, expand_weight.sizes());
  fastreid_vi::for_floating(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Gate<A> gate(reduce_weight, expand_weight, static_cast<const T*>(nullptr));
    const A* means = mean.const_data_ptr<A>();
    const A *rstds = rstd.const_data_ptr<A>(), *opened = gates.const_data_ptr<A>();
    T* dx = out.mutable_data_ptr<T>();
    const fastreid_vi::Turned<T> given(grad, columns);
    const auto buffer = [](int64_t n) { return std::vector<A>(static_cast<size_t>(n)); };
    auto hidden = buffer(batches * gate.hidden), dh = buffer(batches * gate.hidden);
    auto dz = buffer(batches * channels),
         mu_all = std::vector<A>(means, means + batches * channels);
    const A n = static_cast<A>(positions);
    fastreid_vi::parallel(batches, channels * positions, [&](int64_t from, int64_t until) {
      auto sum_g = buffer(channels), sum_gc = buffer(channels), dmean = buffer(channels);
      const fastreid_vi::Untouched<T> scratch(given.scratch(channels));
      auto on_g = buffer(channels), on_x = buffer(channels), offset = buffer(channels);
      for (int64_t b = from; b < until; ++b) {
        const auto x = plane<T>(map, b), g = given.block(b, 0, channels, scratch.get());
        const A *mu = means + b * channels, *q = rstds + b * channels, *m = opened + b * channels;
        for (int64_t c = 0; c < channels; c += columns ? kBlock : 1) {
          if (columns) {
            gradient_sums_columns(g.at(c), g.position, x.at(c), x.position, positions,
                                  std::min(kBlock, channels - c), mu + c, &sum_g[c], &sum_gc[c]);
          } else {
            gradient_sums_row(g.at(c), x.at(c), positions, mu[c], &sum_g[c], &sum_gc[c]);
          }
        }
        gate_gradient(gate, mu, q, m, sum_g.data(), sum_gc.data(), &hidden[b * gate.hidden],
                      &dz[b * channels], &dh[b * gate.hidden], dmean.data());
        for (int64_t c = 0; c < channels; ++c) {
          const A pull = (A(1) - m[c]) * q[c];
          on_g[c] = m[c] + pull;
          on_x[c] = -pull * q[c] * q[c] * sum_gc[c] / n;
          offset[c] = (dmean[c] - pull * sum_g[c]) / n;
        }
        T* into = dx + b * to.batch;
        for (int64_t s = 0; columns && s < positions; ++s) {
          gradient_columns(g.data + s * g.position, x.data + s * x.position, on_g.data(),
                           on_x.data(), mu, offset.data(), channels, into + s * to.position);
        }
        for (int64_t c = 0; !columns && c < channels; ++c) {
          gradient_row(g.at(c), x.at(c), on_g[c], on_x[c], mu[c], offset[c], positions,
                       into + c * to.channel);
        }
      }
    });
    outer_sums(dh, gate.hidden, mu_all, channels, batches, grad_reduce.mutable_data_ptr<T>());
    outer_sums(dz, channels, hidden, gate.hidden, batches, grad_expand.mutable_data_ptr<T>());
  });
  return {out, grad_reduce, grad_expand};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("modality_alleviation", TORCH_BOX(&modality_alleviation));
  m.impl("modality_alleviation_backward", TORCH_BOX(&modality_alleviation_backward));
}
