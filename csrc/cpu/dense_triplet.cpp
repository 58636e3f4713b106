// Dense triplet loss of three maps. Maps are read in runs along their dense axis; positive and
// negative take the layout of the anchor.
#include "cpu/dense_triplet.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "cpu/correspondence.h"

namespace {

using fastreid_vi::accumulate_t;
using fastreid_vi::Result;
using fastreid_vi::Samples;
using fastreid_vi::Scratch;
using torch::stable::Tensor;

constexpr double kEps = 1e-6;  // added to every channel of a difference, as published

// out[s] = sum over channels of (x - y + eps)^2
template <typename T, typename A>
FASTREID_VI_CLONES void squares_of_runs(const T* x, int64_t x_stride, const T* y, int64_t y_stride,
                                        int64_t runs, int64_t width, bool per_run, double* out) {
  constexpr int64_t kLanes = 32;
  const A eps = static_cast<A>(kEps);
  if (!per_run) std::fill(out, out + width, 0.0);
  for (int64_t r = 0; r < runs; ++r) {
    const T *a = x + r * x_stride, *b = y + r * y_stride;
    if (per_run) {
      A lane[kLanes] = {};
      int64_t i = 0;
      for (; i + kLanes <= width; i += kLanes) {
        for (int64_t k = 0; k < kLanes; ++k) {
          const A d = static_cast<A>(a[i + k]) - static_cast<A>(b[i + k]) + eps;
          lane[k] += d * d;
        }
      }
      for (; i < width; ++i) {
        const A d = static_cast<A>(a[i]) - static_cast<A>(b[i]) + eps;
        lane[i % kLanes] += d * d;
      }
      out[r] = 0;
      for (int64_t k = 0; k < kLanes; ++k) out[r] += static_cast<double>(lane[k]);
    } else {
      for (int64_t i = 0; i < width; ++i) {
        const A d = static_cast<A>(a[i]) - static_cast<A>(b[i]) + eps;
        out[i] += static_cast<double>(d * d);
      }
    }
  }
}

std::tuple<Tensor, Tensor> dense_triplet_loss(const Tensor& anchor, const Tensor& positive,
                                              const Tensor& negative, const Tensor& weight,
                                              double margin, const std::string& weighting) {
  const auto wide = fastreid_vi::accumulate_type(anchor.scalar_type());
  const int64_t batch = anchor.size(0), size = anchor.size(2) * anchor.size(3);
  Tensor loss = torch::stable::new_empty(anchor, {}, wide);
  Tensor slopes = torch::stable::new_empty(anchor, {2, batch, size}, wide);
  const Tensor weights = torch::stable::contiguous(weight);
  fastreid_vi::for_floating(anchor.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Samples<T> x(anchor);
    const Samples<T> p(positive, x.channels_last()), n(negative, x.channels_last());
    const Scratch<double> memory(2 * batch * size);
    double *near = memory.get(), *far = near + batch * size;
    fastreid_vi::parallel(batch, 2 * size * x.channels(), [&](int64_t from, int64_t to) {
      for (int64_t b = from; b < to; ++b) {
        squares_of_runs<T, A>(x.data(b), x.stride(), p.data(b), p.stride(), x.runs(), x.width(),
                              x.channels_last(), near + b * size);
        squares_of_runs<T, A>(x.data(b), x.stride(), n.data(b), n.stride(), x.runs(), x.width(),
                              x.channels_last(), far + b * size);
      }
    });
    loss.mutable_data_ptr<A>()[0] =
        fastreid_vi::position_losses(near, far, weights.const_data_ptr<A>(), batch, size, margin,
                                     weighting == "batch", slopes.mutable_data_ptr<A>());
  });
  return {loss, slopes};
}

// All three gradients of one sample in one pass.
template <typename T, typename A>
FASTREID_VI_CLONES void triplet_gradient(const T* x, int64_t x_stride, const T* p, int64_t p_stride,
                                         const T* n, int64_t n_stride, int64_t runs, int64_t width,
                                         bool per_run, const A* pull, const A* push, T* dx, T* dp,
                                         T* dn) {
  const A eps = static_cast<A>(kEps);
  for (int64_t r = 0; r < runs; ++r) {
    const T* __restrict a = x + r * x_stride;
    const T* __restrict b = p + r * p_stride;
    const T* __restrict c = n + r * n_stride;
    T* __restrict da = dx + r * width;
    T* __restrict db = dp + r * width;
    T* __restrict dc = dn + r * width;
    for (int64_t i = 0; i < width; ++i) {
      const int64_t s = per_run ? r : i;
      const A value = static_cast<A>(a[i]);
      const A near = pull[s] * (value - static_cast<A>(b[i]) + eps);
      const A far = push[s] * (value - static_cast<A>(c[i]) + eps);
      da[i] = static_cast<T>(near + far);
      db[i] = static_cast<T>(-near);
      dc[i] = static_cast<T>(-far);
    }
  }
}

// A gradient computed in the anchor's layout, in the layout of its own map.
Tensor like(const Tensor& gradient, const Tensor& map) {
  const bool last = fastreid_vi::is_channels_last(map);
  if (fastreid_vi::is_channels_last(gradient) == last) return gradient;
  Tensor out = fastreid_vi::empty_map(map, last);
  torch::stable::copy_(out, gradient);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> dense_triplet_loss_backward(const Tensor& grad,
                                                               const Tensor& anchor,
                                                               const Tensor& positive,
                                                               const Tensor& negative,
                                                               const Tensor& slopes) {
  const int64_t batch = anchor.size(0), size = anchor.size(2) * anchor.size(3);
  const Tensor gates = torch::stable::contiguous(slopes);
  return fastreid_vi::for_floating(anchor.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Samples<T> x(anchor);
    const Samples<T> p(positive, x.channels_last()), n(negative, x.channels_last());
    const Result<T> dx(anchor), dp(anchor), dn(anchor);
    const A scale = grad.const_data_ptr<A>()[0];
    const A* slope = gates.const_data_ptr<A>();
    fastreid_vi::parallel(batch, 4 * size * x.channels(), [&](int64_t from, int64_t to) {
      const Scratch<A> memory(2 * size);
      A *pull = memory.get(), *push = pull + size;
      for (int64_t b = from; b < to; ++b) {
        for (int64_t s = 0; s < size; ++s) {
          pull[s] = scale * slope[b * size + s];
          push[s] = scale * slope[(batch + b) * size + s];
        }
        triplet_gradient(x.data(b), x.stride(), p.data(b), p.stride(), n.data(b), n.stride(),
                         x.runs(), x.width(), x.channels_last(), pull, push, dx.data(b), dp.data(b),
                         dn.data(b));
      }
    });
    return std::tuple(dx.tensor, like(dp.tensor, positive), like(dn.tensor, negative));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("dense_triplet_loss", TORCH_BOX(&dense_triplet_loss));
  m.impl("dense_triplet_loss_backward", TORCH_BOX(&dense_triplet_loss_backward));
}
