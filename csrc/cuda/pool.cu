// Launch and registration of the pooling kernels.
#include <tuple>

#include "pool.cuh"
#include "stream.h"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::FeatureMap;
using fastreid_vi::input;
using fastreid_vi::kPoolColumns;
using fastreid_vi::kPoolThreads;
using fastreid_vi::kPoolWarps;
using fastreid_vi::MapShape;
using fastreid_vi::MapStrides;
using fastreid_vi::output;
using torch::stable::Tensor;

MapShape shape_of(const FeatureMap& map) {
  constexpr int64_t limit =
      std::numeric_limits<int32_t>::max() / 2;  // indices may overshoot by a block
  STD_TORCH_CHECK(map.channels <= limit && map.positions <= limit,
                  "gem_pool: expected fewer than 2^30 channels and positions");
  return {static_cast<int>(map.channels), static_cast<int>(map.positions)};
}

MapStrides strides_of(const FeatureMap& map) { return {map.batch, map.channel, map.position}; }

// Whether 16-byte vectors can run along the channels at every position.
template <typename T>
bool vectors_along_channels(const FeatureMap& map, const void* data) {
  constexpr int64_t size = fastreid_vi::Vector<T>::size;
  return map.channel == 1 && map.channels % size == 0 && map.position % size == 0 &&
         (map.batches == 1 || map.batch % size == 0) &&
         reinterpret_cast<uintptr_t>(data) % fastreid_vi::kVectorBytes == 0;
}

dim3 pool_grid(const FeatureMap& map, int64_t channels_per_block) {
  return fastreid_vi::blocks(map.batches *
                             ((map.channels + channels_per_block - 1) / channels_per_block));
}

template <typename T, bool cube>
void forward(const FeatureMap& map, const Tensor& pooled, const Tensor& moment, double p,
             double eps, cudaStream_t stream) {
  using A = Accumulator<T>;
  const T* x = input<T>(map.tensor);
  const bool columns = vectors_along_channels<T>(map, x);
  fastreid_vi::launch(columns ? fastreid_vi::gem_pool_channels_last_kernel<T, cube>
                              : fastreid_vi::gem_pool_positions_kernel<T, cube>,
                      pool_grid(map, columns ? kPoolColumns<T> : kPoolWarps), dim3(kPoolThreads), 0,
                      stream, x, output<T>(pooled), output<A>(moment), shape_of(map),
                      strides_of(map), static_cast<A>(p), static_cast<A>(eps));
}

template <typename T, bool cube>
void backward(const Tensor& grad, const FeatureMap& map, const Tensor& moment, const FeatureMap& to,
              double p, cudaStream_t stream) {
  using A = Accumulator<T>;
  const T* x = input<T>(map.tensor);
  T* dx = output<T>(to.tensor);
  const bool columns = vectors_along_channels<T>(map, x) && vectors_along_channels<T>(to, dx);
  fastreid_vi::launch(columns ? fastreid_vi::gem_pool_backward_channels_last_kernel<T, cube>
                              : fastreid_vi::gem_pool_backward_positions_kernel<T, cube>,
                      pool_grid(map, columns ? kPoolColumns<T> : kPoolWarps), dim3(kPoolThreads), 0,
                      stream, input<T>(grad), x, input<A>(moment), dx, shape_of(map),
                      strides_of(map), strides_of(to), static_cast<A>(p));
}

std::tuple<Tensor, Tensor> gem_pool(const Tensor& features, double p, double eps) {
  STD_TORCH_CHECK(features.dim() == 4, "gem_pool: expected features of rank 4, got ",
                  features.dim());
  const fastreid_vi::OnDevice device(features);
  const FeatureMap map = fastreid_vi::feature_map(features);
  Tensor pooled = torch::stable::new_empty(features, {map.batches, map.channels});
  Tensor moment = torch::stable::new_empty(features, {map.batches, map.channels},
                                           fastreid_vi::accumulate_type(features.scalar_type()));
  if (pooled.numel() == 0) return {pooled, moment};
  fastreid_vi::for_device_floating(features.scalar_type(), [&]<typename T>() {
    p == 3.0 ? forward<T, true>(map, pooled, moment, p, eps, device.stream())
             : forward<T, false>(map, pooled, moment, p, eps, device.stream());
  });
  fastreid_vi::check_launch();
  return {pooled, moment};
}

Tensor gem_pool_backward(const Tensor& grad, const Tensor& features, const Tensor& moment,
                         double p) {
  const auto dtype = features.scalar_type();
  STD_TORCH_CHECK(features.dim() == 4, "gem_pool_backward: expected features of rank 4, got ",
                  features.dim());
  STD_TORCH_CHECK(
      grad.scalar_type() == dtype && moment.scalar_type() == fastreid_vi::accumulate_type(dtype),
      "gem_pool_backward: expected grad like features and moment in their accumulation dtype");
  STD_TORCH_CHECK(grad.is_contiguous() && moment.is_contiguous() &&
                      grad.numel() == moment.numel() &&
                      moment.numel() == features.size(0) * features.size(1),
                  "gem_pool_backward: expected contiguous grad and moment of shape [B, C]");
  const fastreid_vi::OnDevice device(features);
  const FeatureMap map = fastreid_vi::feature_map(features);
  const Tensor dx = fastreid_vi::empty_map(features, fastreid_vi::is_channels_last(features));
  if (dx.numel() == 0) return dx;
  const FeatureMap to = fastreid_vi::feature_map(dx);
  fastreid_vi::for_device_floating(dtype, [&]<typename T>() {
    p == 3.0 ? backward<T, true>(grad, map, moment, to, p, device.stream())
             : backward<T, false>(grad, map, moment, to, p, device.stream());
  });
  fastreid_vi::check_launch();
  return dx;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("gem_pool", TORCH_BOX(&gem_pool));
  m.impl("gem_pool_backward", TORCH_BOX(&gem_pool_backward));
}
